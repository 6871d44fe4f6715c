"""Bundles of format 2, and checkpoints of that time: cameras and joints in place of a robot file.

Their joints are state and action at once, all behind one controller.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import Field, model_validator

from ki_vla_ros.robot import ActionPeriod, CameraSpec, Finite, Frozen, Horizon, Name, Robot, check_names

FIELDS: Final = frozenset({"cameras", "joints", "horizon", "action_period_s"})
OUTPUT: Final = {"name": "arm", "topic": "arm_controller/joint_trajectory"}


class JointSpec(Frozen):
    """Limits of position (`unit`) and speed (per second), and whether the joint's action is relative to its state."""

    name: Name
    unit: Literal["rad", "m"]
    lower: Finite
    upper: Finite
    max_velocity: Annotated[Finite, Field(gt=0)]
    relative: bool
    continuous: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> JointSpec:
        if not self.lower < self.upper:
            raise ValueError(f"joint {self.name!r}: expected lower < upper, got {self.lower} and {self.upper}")
        if self.continuous and self.unit != "rad":
            raise ValueError(f"joint {self.name!r}: expected unit rad for a continuous joint, got {self.unit}")
        return self


class _Parts(Frozen):
    cameras: Annotated[tuple[CameraSpec, ...], Field(min_length=1)]
    joints: Annotated[tuple[JointSpec, ...], Field(min_length=1)]
    action_period_s: ActionPeriod
    horizon: Horizon


def robot_from(parts: Mapping[str, Any]) -> Robot:
    """The robot that a file of format 2 describes; pydantic's ValidationError, with the old file's keys."""
    old = _Parts.model_validate(parts)
    check_names("joints", [joint.name for joint in old.joints])
    joints = [
        (
            {"name": joint.name, "kind": "joint_position", "unit": joint.unit, "continuous": joint.continuous},
            {"lower": joint.lower, "upper": joint.upper, "max_velocity": joint.max_velocity},
            {"relative": joint.relative, "output": OUTPUT["name"]},
        )
        for joint in old.joints
    ]
    return Robot.model_validate(
        {
            "name": "robot",
            "cameras": old.cameras,
            "state": [common for common, _, _ in joints],
            "actions": [{**common, **limits, **rest} for common, limits, rest in joints],
            "outputs": [OUTPUT],
            "action_period_s": old.action_period_s,
            "horizon": old.horizon,
        }
    )
