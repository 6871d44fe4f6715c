"""ALOHA as an environment: two arms hand over a cube, or put a peg into a socket, as ki_vla_ros/sim/aloha has them.

The starts are those of gym-aloha and ACT (arXiv 2304.13705), and so are the rewards: the highest, 4, is success. An
action is where the joints are to be one period later, as for the node's controllers: the command goes there in a
straight line.

Legend: S state, D actions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.robot import find_robot, read_robot
from ki_vla_ros.sim import TIMESTEP_S
from ki_vla_ros.sim.aloha import (
    CAMERAS,
    HIGHEST_REWARD,
    HOME_J,
    INSERTION,
    INSTRUCTION,
    AlohaWorld,
    Demonstration,
    Demonstrator,
    Inserter,
    InsertionWorld,
    Planner,
    TwoArms,
    sample_insertion,
    sample_scene,
)


@dataclass(frozen=True)
class _Task:
    instruction: str
    time_limit_s: float
    world: Callable[..., TwoArms[Any]]
    planner: Callable[[], Planner[Any]]
    sample: Callable[[int], Any]


TASKS: Final[Mapping[str, _Task]] = {
    "transfer_cube": _Task(INSTRUCTION, 8.0, AlohaWorld, Demonstrator, sample_scene),
    "insertion": _Task(INSERTION, 10.0, InsertionWorld, Inserter, sample_insertion),
}
# Drawn at least as large as the node does, so that smaller images are averaged as the robot's own are.
LEAST_DRAWN: Final = 320
LARGEST: Final = 1280


class Aloha:
    """`task` is one of `TASKS`; images are `image_size` pixels wide and three quarters of it high.

    `cameras`: those that are drawn (each takes about 4 ms); ConfigurationError for one that the robot does not have.
    """

    def __init__(self, task: str, image_size: int = 640, cameras: Sequence[str] = CAMERAS) -> None:
        if task not in TASKS:
            raise ConfigurationError(f"ALOHA: task: expected one of {', '.join(TASKS)}, got {task!r}")
        if unknown := [name for name in cameras if name not in CAMERAS]:
            raise ConfigurationError(f"ALOHA: cameras: expected some of {', '.join(CAMERAS)}, got {unknown[0]!r}")
        if not 16 <= image_size <= LARGEST:
            raise ConfigurationError(f"ALOHA: image_size: expected 16 to {LARGEST} pixels, got {image_size}")
        self.robot = read_robot(find_robot("aloha"))
        self._task = TASKS[task]
        self.instruction, self.time_limit_s = self._task.instruction, self._task.time_limit_s
        self._cameras = tuple(cameras)
        self._size = image_size, image_size * 3 // 4
        drawn = max(image_size, LEAST_DRAWN)
        self._world = self._task.world(drawn, drawn * 3 // 4, render=bool(cameras))
        self._planner = self._task.planner()
        self._plan: Demonstration | None = None

    def close(self) -> None:
        self._world.close()

    def reset(self, seed: int) -> None:
        self._world.reset(self._task.sample(seed))
        self._command_D = HOME_J
        self._plan = None

    def observe(self) -> tuple[Mapping[str, NDArray[np.uint8]], NDArray[np.float64]]:
        images = {}
        for name in self._cameras:
            drawn = self._world.render(name)
            if drawn.shape[1::-1] != self._size:
                drawn = np.asarray(cv2.resize(drawn, self._size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
            images[name] = drawn
        return images, self._world.joint_position_J

    def step(self, action_D: NDArray[np.float64]) -> None:
        count = round(self.robot.action_period_s / TIMESTEP_S)
        for command_D in np.linspace(self._command_D, action_D, count + 1)[1:]:
            self._world.step(command_D)
        self._command_D = np.asarray(action_D, dtype=np.float64)

    @property
    def success(self) -> bool:
        return self._world.judge.verdict.reward >= HIGHEST_REWARD

    @property
    def followed(self) -> bool:
        return self.success

    @property
    def over(self) -> bool:
        return self.success

    def place(self, camera: str) -> tuple[float, float] | None:
        return self._world.place(camera)

    def demonstrate(self) -> NDArray[np.float64]:
        """Where the plan of this start is one period later: a disturbed arm comes back to it."""
        if self._plan is None:
            self._plan = self._planner.plan(self._world.scene)
        return self._plan.sample(self._world.time_s + self.robot.action_period_s)
