"""What the runtime moves: one axis per joint, per coordinate of a pose, or per component of a velocity.

An axis has a position that changes continuously, with bounded speed and acceleration, whatever the policy's actions
are. A joint's is its angle; a gripper's its opening; a pose's are x, y, z and a rotation vector against an orientation
that is chosen anew whenever the arm rests. A velocity's is the integral of what was commanded, so that a velocity that
falls to zero is an axis that comes to rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

AxisKind = Literal["joint", "gripper", "position", "rotation", "velocity"]
# A rotation vector stays this far (rad, each component) from where it was counted from; beyond, the arm rests first.
# The three components together then stay short of half a turn, where a rotation vector is no longer unique.
MOST_ROTATION = 1.6


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis: `lower` to `upper` (infinite: no limit) in `unit`, speeds per second.

    `output` is the index of its output. `relative`: its action is a difference from the state. `max_acceleration` None:
    as limits.time_to_speed_s says. `measured`: something says where it is; only velocities may do without. `joint`:
    it is a joint of the robot, so a URDF may know it. Its output's messages have (position - `offset`) / `scale`.
    """

    name: str
    kind: AxisKind
    unit: str
    lower: float
    upper: float
    max_velocity: float
    output: int = 0
    max_acceleration: float | None = None
    relative: bool = False
    continuous: bool = False
    measured: bool = True
    joint: bool = True
    scale: float = 1.0
    offset: float = 0.0


def main_axes(axes: Sequence[Axis]) -> tuple[list[bool], str]:
    """Which axes one figure for the whole robot is taken over, and its unit.

    Such a figure cannot mix units: the revolute joints count, else those in m, else whatever there is.
    """
    for unit, kinds in (("rad", ("joint",)), ("m", ("joint",)), ("m", ("position",)), ("rad", ("velocity",))):
        chosen = [axis.kind in kinds and axis.unit == unit for axis in axes]
        if any(chosen):
            return chosen, unit
    return [axis.unit == axes[0].unit for axis in axes], axes[0].unit


def other_axes(axes: Sequence[Axis]) -> tuple[list[bool], str]:
    """The axes of one kind in the unit (rad or m) that `main_axes` leaves out, and that unit; there may be none.

    Neither units nor kinds are mixed: a hand's place, its rotation and a gripper's opening are three figures.
    """
    main, main_unit = main_axes(axes)
    unit = "m" if main_unit == "rad" else "rad"
    for kind in ("joint", "position", "rotation", "gripper", "velocity"):
        chosen = [axis.kind == kind and axis.unit == unit for axis in axes]
        if any(chosen):
            return chosen, unit
    return [False] * len(main), unit


def led_axes(axes: Sequence[Axis]) -> list[bool]:
    """Which axes must be where they were sent: not velocities, and not a gripper, which may hold something.

    Robots of format 2 do not say which joint is the gripper; there it is what is in m beside revolute joints.
    """
    named = any(axis.kind == "gripper" for axis in axes)
    main, _ = main_axes(axes)
    return [
        (axis.kind == "joint" and (named or chosen)) or axis.kind in ("position", "rotation")
        for axis, chosen in zip(axes, main, strict=True)
    ]
