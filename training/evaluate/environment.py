"""What a policy is tried in: a simulated robot with a task, driven in its own actions, without ROS.

An environment speaks its robot file's language: images by camera name, the state and the actions of the file, in their
units. `training.demonstrations` records its scripted expert, `training.evaluate` runs a bundle in it.

Legend: S state, D actions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.robot import Robot


class Environment(Protocol):
    """One simulated robot with one task. `reset` begins an episode; the seed decides everything that is drawn."""

    robot: Robot
    """Whose actions `step` takes, one every `robot.action_period_s`."""
    instruction: str
    """The task of the running episode, in words."""
    time_limit_s: float
    """After this much simulated time an episode that has not succeeded has failed."""

    def reset(self, seed: int) -> None: ...

    def observe(self) -> tuple[Mapping[str, NDArray[np.uint8]], NDArray[np.float64]]:
        """Images [H, W, 3] by camera name, and the state [S]."""
        ...

    def step(self, action_D: NDArray[np.float64]) -> None:
        """Execute one action for its period."""
        ...

    @property
    def success(self) -> bool:
        """Whether the task has been done since `reset`."""
        ...

    def demonstrate(self) -> NDArray[np.float64]:
        """The scripted expert's next action [D], from where everything is now; SimulationError if it has none."""
        ...

    def close(self) -> None: ...
