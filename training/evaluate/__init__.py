"""Figures of a policy: offline on arrays, and in closed loop."""

from training.evaluate.offline import measure

__all__ = [
    "measure",
]
