"""The settings of limits, which say what a command may be; settings.py has all others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

RuleAction = Literal["clamp", "refuse", "stop"]
# Means "no limit set here": the range of a ROS parameter cannot hold infinity.
UNLIMITED = 1e9


def setting(
    default: bool | float | str,
    description: str,
    *,
    unit: str = "",
    ge: float | None = None,
    le: float | None = None,
    changeable: bool = False,
) -> Any:
    """A pydantic field that is also a ROS parameter; `changeable`: also while a bundle is loaded."""
    extra: dict[str, Any] = {"unit": unit, "changeable": changeable}
    return Field(default, description=description, ge=ge, le=le, json_schema_extra=extra)


class SettingsModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class JointLimitSettings(SettingsModel):
    lower: float = setting(
        -UNLIMITED,
        "lowest position; applies where it is tighter than bundle and URDF",
        ge=-UNLIMITED,
        le=UNLIMITED,
        changeable=True,
    )
    upper: float = setting(
        UNLIMITED,
        "highest position; applies where it is tighter than bundle and URDF",
        ge=-UNLIMITED,
        le=UNLIMITED,
        changeable=True,
    )
    velocity: float = setting(
        UNLIMITED,
        "highest speed per second; applies where it is tighter than bundle and URDF",
        ge=1e-6,
        le=UNLIMITED,
        changeable=True,
    )
    acceleration: float = setting(
        UNLIMITED,
        "highest acceleration per second squared; applies where it is tighter than limits.time_to_speed_s",
        ge=1e-6,
        le=UNLIMITED,
        changeable=True,
    )


class LimitSettings(SettingsModel):
    """What a command may be. While a bundle is loaded these may only be made tighter than they were at configure."""

    velocity_scale: float = setting(
        1.0, "share of the joints' speed limits that commands may use", ge=0.01, le=1.0, changeable=True
    )
    time_to_speed_s: float = setting(
        0.15,
        "acceleration limit: the time in which a joint may go from rest to its speed limit (without velocity_scale)",
        unit="s",
        ge=0.01,
        le=10.0,
        changeable=True,
    )
    position_margin: float = setting(
        0.02,
        "a target beyond a joint's limit by at most this share of the joint's range is moved onto the limit; what lies "
        "farther out falls under on_position",
        ge=0.0,
        le=0.2,
        changeable=True,
    )
    max_overspeed: float = setting(
        2.0,
        "a chunk that is faster than the speed limit by at most this factor is slowed down; a faster one falls under "
        "on_speed",
        ge=1.0,
        le=10.0,
        changeable=True,
    )
    max_jump_s: float = setting(
        0.3,
        "the first action ahead may lie as far from the measured position as the joint can go at its speed limit in "
        "the time until it is due plus this time; what lies farther away falls under on_jump",
        unit="s",
        ge=0.0,
        le=10.0,
        changeable=True,
    )
    max_chunk_age_s: float = setting(
        0.4,
        "a chunk whose observation is older than this when it would be published is refused",
        unit="s",
        ge=0.02,
        le=5.0,
        changeable=True,
    )
    on_position: RuleAction = setting("refuse", "what happens to a chunk beyond position_margin", changeable=True)
    on_speed: RuleAction = setting("refuse", "what happens to a chunk beyond max_overspeed", changeable=True)
    on_jump: RuleAction = setting("refuse", "what happens to a chunk beyond max_jump_s", changeable=True)
    joints: Mapping[str, JointLimitSettings] = Field(default_factory=dict)

    def of(self, joint: str) -> JointLimitSettings:
        return self.joints.get(joint, JointLimitSettings())

    def loosened(self, base: LimitSettings) -> str:
        """The first parameter that allows more than `base` does; "" if none."""
        smaller = ("velocity_scale", "position_margin", "max_overspeed", "max_jump_s", "max_chunk_age_s")
        for name in smaller:
            if getattr(self, name) > getattr(base, name):
                return f"limits.{name}"
        if self.time_to_speed_s < base.time_to_speed_s:
            return "limits.time_to_speed_s"
        strictness = get_args(RuleAction)
        for name in ("on_position", "on_speed", "on_jump"):
            if strictness.index(getattr(self, name)) < strictness.index(getattr(base, name)):
                return f"limits.{name}"
        for joint in {**base.joints, **self.joints}:
            ours, theirs = self.of(joint), base.of(joint)
            for name in ("upper", "velocity", "acceleration"):
                if getattr(ours, name) > getattr(theirs, name):
                    return f"limits.joints.{joint}.{name}"
            if ours.lower < theirs.lower:
                return f"limits.joints.{joint}.lower"
        return ""
