"""Signals of made-up robots."""

from __future__ import annotations

import math
from typing import Any

from ki_vla_ros.robot import JOINT_STATE, Signal


def joint_signal(
    name: str, lower: float = -math.inf, upper: float = math.inf, max_velocity: float = math.inf, **fields: Any
) -> Signal:
    """One joint of /joint_states; `fields` are those of Signal."""
    known = {"topic": "/joint_states", "type": JOINT_STATE, "part": name, "field": "position", "unit": "rad"}
    limits = {"lower": lower, "upper": upper, "max_velocity": max_velocity, "continuous": False}
    return Signal(**{"name": name, **known, **limits, **fields})
