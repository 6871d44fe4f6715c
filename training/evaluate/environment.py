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

from ki_vla_ros.robot import Robot, measuring_state, scale_of


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

    @property
    def followed(self) -> bool:
        """Whether what the instruction names was reached, before anything else that it might have named.

        Where there is nothing else, it is `success`.
        """
        ...

    @property
    def over(self) -> bool:
        """Whether nothing that happens now changes `success` and `followed`."""
        ...

    def place(self, camera: str) -> tuple[float, float] | None:
        """Where a camera's image shows what the task is about, in 0..1 to the right and down; None: nobody says."""
        ...

    def demonstrate(self) -> NDArray[np.float64]:
        """The scripted expert's next action [D], from where everything is now; SimulationError if it has none."""
        ...

    def close(self) -> None: ...


class Slowed:
    """An environment whose actions last several of its own periods: each is gone to in a straight line.

    So a controller goes through points that are farther apart, and so a dataset is thinned out (docs/data.md).
    """

    def __init__(self, environment: Environment, steps: int) -> None:
        self._inner, self._steps = environment, steps
        own = environment.robot
        self.robot = own.model_copy(update={"action_period_s": steps * own.action_period_s})
        self.instruction, self.time_limit_s = environment.instruction, environment.time_limit_s
        self._from_D: NDArray[np.float64] | None = None

    @property
    def success(self) -> bool:
        return self._inner.success

    @property
    def followed(self) -> bool:
        return self._inner.followed

    @property
    def over(self) -> bool:
        return self._inner.over

    def reset(self, seed: int) -> None:
        self._inner.reset(seed)
        self.instruction, self._from_D = self._inner.instruction, None

    def observe(self) -> tuple[Mapping[str, NDArray[np.uint8]], NDArray[np.float64]]:
        return self._inner.observe()

    def step(self, action_D: NDArray[np.float64]) -> None:
        from_D = self._measured(action_D) if self._from_D is None else self._from_D
        for k in range(1, self._steps + 1):
            self._inner.step(from_D + (action_D - from_D) * (k / self._steps))
        self._from_D = action_D

    def place(self, camera: str) -> tuple[float, float] | None:
        return self._inner.place(camera)

    def demonstrate(self) -> NDArray[np.float64]:
        return self._inner.demonstrate()

    def close(self) -> None:
        self._inner.close()

    def _measured(self, action_D: NDArray[np.float64]) -> NDArray[np.float64]:
        """Where each action's joint is [D]; what nothing measures is where the action wants it."""
        state_S, from_D = self.observe()[1], action_D.copy()
        for d, action in enumerate(self.robot.actions):
            if (state := measuring_state(self.robot, action)) is not None:
                scale, offset = scale_of(action, state) or (1.0, 0.0)
                from_D[d] = scale * state_S[self.robot.state.index(state)] + offset
        return from_D


def at_period(environment: Environment, period_s: float) -> Environment:
    """The environment with one action every `period_s`; as it is where none of its actions may be left out for that.

    Only of places may some, and only whole multiples of its own period are made of it.
    """
    own_s = environment.robot.action_period_s
    steps = round(period_s / own_s)
    places = all(action.kind in ("joint_position", "gripper") for action in environment.robot.actions)
    if steps > 1 and abs(period_s - steps * own_s) < 1e-6 * period_s and places:
        return Slowed(environment, steps)
    return environment
