"""What numbers and names suggest: units, grippers and their ends, limits. Each guess says what it was made from."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Final

from ki_vla_ros.robot import UrdfJoint

FILL_IN: Final = "FILL IN"
"""Stands where nothing says what to write; no number and no topic, so a file that still has it is refused."""
GRIPPER = re.compile(r"grip|finger|jaw|knuckle|claw|(^|[_/])hand($|[_/])", re.IGNORECASE)
# Grippers whose joint grows as they close.
GROWS_CLOSED = re.compile(r"knuckle|robotiq|drive_joint", re.IGNORECASE)
SLIDES = re.compile(r"prismatic|slide|linear|lift_joint|rail|elevat", re.IGNORECASE)
# Joints that lift by turning, such as shoulder_lift_joint.
TURNS = re.compile(r"shoulder|elbow|wrist|neck|head|knee|hip", re.IGNORECASE)
# No joint that does not turn without end is seen beyond a turn and a little.
BEYOND_TURNS = 6.6
# Where limits are known: values as small as these may be radians of a wrong zero just as well.
BEYOND_RADIANS = 3.3
MARGIN, LEAST_MARGIN = 0.1, {"rad": 0.05, "m": 0.002, "ratio": 0.0}
# What moved less shows neither the ends of a gripper nor a speed.
STILL = {"rad": 0.02, "m": 0.002, "ratio": 0.02}
DEGREE = math.pi / 180.0


@dataclass(frozen=True)
class Seen:
    """What one number was seen to be, in the source's own unit; `speed` None: not known.

    `jumps`: how many steps were left out of the speed. `remark`: what is to be checked about the range.
    """

    low: float
    high: float
    speed: float | None
    where: str
    jumps: int = 0
    remark: str = ""

    @property
    def largest(self) -> float:
        return max(abs(self.low), abs(self.high))


@dataclass(frozen=True)
class Guess:
    """One joint: its unit, whether the source writes degrees, whether it is a gripper, its limits.

    `lower`, `upper` and `speed` are in `unit`; None: nothing says. `notes`: what is to be checked.
    """

    name: str
    unit: str
    degrees: bool
    gripper: bool
    lower: float | None
    upper: float | None
    speed: float | None
    continuous: bool
    open_high: bool
    notes: tuple[str, ...]

    @property
    def ends(self) -> tuple[float | None, float | None]:
        """A gripper's open and closed."""
        return (self.upper, self.lower) if self.open_high else (self.lower, self.upper)


def is_gripper(name: str, topic: str = "", alone: bool = False) -> bool:
    """By its name, or by that of a topic that commands it alone."""
    return bool(GRIPPER.search(name)) or (alone and bool(GRIPPER.search(topic)))


def looks_like_degrees(seen: Seen, urdf: UrdfJoint | None) -> bool:
    """Whether the values are no radians: outside the URDF's limits, or beyond all turns."""
    if urdf is None:
        return seen.largest > BEYOND_TURNS
    if urdf.continuous:
        return False
    slack = 0.05 * (urdf.upper - urdf.lower)
    outside = seen.largest > BEYOND_RADIANS and (seen.low < urdf.lower - slack or seen.high > urdf.upper + slack)
    return outside and urdf.lower - slack <= seen.low * DEGREE and seen.high * DEGREE <= urdf.upper + slack


def guess_joint(
    name: str, seen: Seen | None, urdf: UrdfJoint | None, kind: str, *, degrees: bool, gripper: bool
) -> Guess:
    """`kind` is the URDF's type of the joint, "" if it has none; `degrees`: its source writes degrees."""
    unit, notes = _unit(name, seen, kind, gripper)
    degrees = degrees and unit == "rad" and not gripper
    if seen is not None and degrees:
        speed = None if seen.speed is None else seen.speed * DEGREE
        seen = replace(seen, low=seen.low * DEGREE, high=seen.high * DEGREE, speed=speed)
        notes.append(f"degrees in {seen.where}")
    lower, upper, speed, turns = None, None, None, False
    if urdf is not None:
        turns = urdf.continuous and not gripper
        if math.isfinite(urdf.lower) and math.isfinite(urdf.upper):
            lower, upper = urdf.lower, urdf.upper
            notes.append("limits of the URDF")
        elif turns:
            notes.append("turns without end, says the URDF")
        speed = urdf.velocity if math.isfinite(urdf.velocity) else None
    if lower is None and not turns and seen is not None and (not gripper or seen.high - seen.low >= STILL[unit]):
        margin = 0.0 if gripper else max(MARGIN * (seen.high - seen.low), LEAST_MARGIN[unit])
        lower, upper = _down(seen.low - margin), -_down(-(seen.high + margin))
        notes.append(f"seen {seen.low:.4g} to {seen.high:.4g}, not limits")
        notes += [seen.remark] if seen.remark else []
    if speed is None and seen is not None and seen.speed is not None:
        if seen.speed > STILL[unit]:
            speed = -_down(-seen.speed)
            notes.append("speed seen, no limit")
        if seen.jumps:
            left_out = "1 jump" if seen.jumps == 1 else f"{seen.jumps} jumps"
            notes.append(f"CHECK: {left_out} left out of the speed, as between episodes")
    return Guess(name, unit, degrees, gripper, lower, upper, speed, turns, not GROWS_CLOSED.search(name), tuple(notes))


def _unit(name: str, seen: Seen | None, kind: str, gripper: bool) -> tuple[str, list[str]]:
    if kind:
        return ("m" if kind == "prismatic" else "rad"), []
    if not gripper:
        slides = SLIDES.search(name) and not TURNS.search(name)
        return ("m", ["CHECK: metres, by its name"]) if slides else ("rad", [])
    if seen is None:
        return "m", ["metres is a guess"]
    largest = seen.largest
    if largest <= 0.2:
        return "m", ["metres, by its range"]
    if largest <= 0.89 or GROWS_CLOSED.search(name):
        return "rad", ["radians, by its range"]
    return "ratio", [f"no unit, by its range (0 to {'1' if largest < 1.1 else '100'}?)"]


def _down(value: float) -> float:
    """Rounded down to four decimals."""
    return math.floor(value * 1e4 + 1e-9) / 1e4
