"""Signals of made-up robots."""

from __future__ import annotations

import math
from typing import Any

from ki_vla_ros.robot import JOINT_STATE, POSE_STAMPED, Signal


def joint_signal(
    name: str, lower: float = -math.inf, upper: float = math.inf, max_velocity: float = math.inf, **fields: Any
) -> Signal:
    """One joint of /joint_states; `fields` are those of Signal."""
    known = {"topic": "/joint_states", "type": JOINT_STATE, "part": name, "field": "position", "unit": "rad"}
    limits = {"lower": lower, "upper": upper, "max_velocity": max_velocity, "continuous": False}
    return Signal(**{"name": name, **known, **limits, **fields})


def pose_signals(
    topic: str = "/tool",
    max_linear_velocity: float = math.inf,
    max_angular_velocity: float = math.inf,
    frame: str = "",
) -> tuple[Signal, ...]:
    """The seven numbers of a pose topic."""
    parts = [(part, "m", max_linear_velocity) for part in ("x", "y", "z")]
    parts += [(part, "ratio", max_angular_velocity / 2.0) for part in ("qx", "qy", "qz", "qw")]
    return tuple(
        joint_signal(
            f"{topic}.{part}", max_velocity=speed, topic=topic, type=POSE_STAMPED, part=part, field="pose", unit=unit,
            frame=frame,
        )
        for part, unit, speed in parts
    )  # fmt: skip
