"""An environment without a simulator: one joint that is to come to a place."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ki_vla_ros.errors import SimulationError
from ki_vla_ros.robot import find_robot, read_robot

Array = np.ndarray
TARGET = 0.5


class Slider:
    """The robot's first joint is to come to `TARGET`; from odd seeds its expert does not know the way."""

    time_limit_s = 2.0
    instruction = "slide"

    def __init__(self, robot: str = "so101") -> None:
        self.robot = read_robot(find_robot(robot))
        self.executed: list[Array] = []
        self.patience = 10**9  # Ctrl-C comes after so many actions

    def reset(self, seed: int) -> None:
        self.place_D = np.array([(sum(action.span)) / 2.0 for action in self.robot.actions])
        self.place_D[0] = np.random.default_rng(seed).uniform(-0.1, 0.1)
        self.seed, self.executed = seed, []

    def observe(self) -> tuple[Mapping[str, Array], Array]:
        shade = np.full((48, 64, 3), int(np.clip(100 + 100 * self.place_D[0], 0, 255)), np.uint8)
        return {camera.name: shade for camera in self.robot.cameras}, self.place_D

    def step(self, action_D: Array) -> None:
        self.executed.append(action_D)
        self.place_D = action_D

    @property
    def success(self) -> bool:
        return bool(self.place_D[0] > TARGET - 0.01)

    @property
    def followed(self) -> bool:
        return self.success

    @property
    def over(self) -> bool:
        return self.success

    def place(self, camera: str) -> tuple[float, float] | None:
        return (0.5 + self.place_D[0], 0.25) if camera == self.robot.cameras[-1].name else None

    def demonstrate(self) -> Array:
        if self.seed % 2:
            raise SimulationError("out of reach")
        self.patience -= 1
        if self.patience == 0:
            raise KeyboardInterrupt
        action_D = self.place_D.copy()
        action_D[0] = min(self.place_D[0] + 0.1, TARGET)
        return action_D

    def close(self) -> None: ...
