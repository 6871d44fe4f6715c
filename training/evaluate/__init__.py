"""Figures of a policy: offline on arrays, and in environments."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from training.evaluate.environment import Environment
from training.evaluate.environments import HELD_OUT, open_environment
from training.evaluate.rollouts import Act, roll_out

# Loaded by `__getattr__` on their first use: an environment may be opened where there is no torch.
if TYPE_CHECKING:
    from training.evaluate.offline import measure

__all__ = [
    "HELD_OUT",
    "Act",
    "Environment",
    "measure",
    "open_environment",
    "roll_out",
]


def __getattr__(name: str) -> Any:
    if name == "measure":
        return import_module("training.evaluate.offline").measure
    raise AttributeError(f"module 'training.evaluate' has no attribute {name!r}")
