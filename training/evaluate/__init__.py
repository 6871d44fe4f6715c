"""Figures of a policy: offline on arrays, and in environments."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from training.evaluate.environment import Environment, at_period
from training.evaluate.environments import HELD_OUT, open_environment
from training.evaluate.rollouts import Act, roll_out

# Loaded by `__getattr__` on their first use: an environment may be opened where there is no torch.
if TYPE_CHECKING:
    from training.evaluate.driving import MALFORMED, act_in_training, drive, is_driven, success_names, try_environments
    from training.evaluate.offline import Measured, measure
    from training.evaluate.page import write_page

__all__ = [
    "HELD_OUT",
    "MALFORMED",
    "Act",
    "Environment",
    "Measured",
    "act_in_training",
    "at_period",
    "drive",
    "is_driven",
    "measure",
    "open_environment",
    "roll_out",
    "success_names",
    "try_environments",
    "write_page",
]
_FILES = {
    **dict.fromkeys(("Measured", "measure"), "offline"),
    **dict.fromkeys(
        ("MALFORMED", "act_in_training", "drive", "is_driven", "success_names", "try_environments"), "driving"
    ),
    "write_page": "page",
}


def __getattr__(name: str) -> Any:
    if name in _FILES:
        return getattr(import_module(f"training.evaluate.{_FILES[name]}"), name)
    raise AttributeError(f"module 'training.evaluate' has no attribute {name!r}")
