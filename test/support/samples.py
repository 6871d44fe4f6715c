"""Data sets in memory, for tests of what is made of them: robots that exist nowhere, and questions about nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.robot import Robot
from training.data import Labels, LanguageSample, RobotSample

SIDE = 8


def make_robot(
    name: str, joints: int, *, cameras: Sequence[str] = ("top",), relative: bool = True, reach: float = 2.0, **more: Any
) -> Robot:
    """An arm with so many joints, from -reach to reach (rad) each."""
    state = [{"name": f"{name}_{j}", "kind": "joint_position", "unit": "rad"} for j in range(joints)]
    actions = [
        {**dimension, "lower": -reach, "upper": reach, "max_velocity": reach, "relative": relative, "output": "arm"}
        for dimension in state
    ]
    fields: dict[str, Any] = {
        "name": name,
        "cameras": [{"name": camera} for camera in cameras],
        "state": state,
        "actions": actions,
        "outputs": [{"name": "arm", "topic": "arm_controller/joint_trajectory"}],
        "action_period_s": 0.1,
        "horizon": 4,
    }
    return Robot.model_validate(fields | more)


class ArmSamples:
    """Frames of `make_robot`'s arms: joints swing, and each chunk is known but for the last rows' ends."""

    def __init__(
        self, robot: Robot, count: int = 40, task: str = "wave", place: tuple[float, float] | None = None
    ) -> None:
        self.robot, self.name, self.task, self.place = robot, f"{robot.name} in memory", task, place
        time_N = np.arange(count + robot.horizon) * robot.action_period_s
        self.position_NS = np.sin(time_N[:, None] * (1.0 + np.arange(len(robot.state))))
        self.count = count

    def __len__(self) -> int:
        return self.count

    def take(self, rows: Sequence[int]) -> list[RobotSample]:
        return [self._sample(row) for row in rows]

    def texts(self) -> Iterator[str]:
        yield self.task

    def numbers(self) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]]:
        samples = self.take(range(self.count))
        yield (
            np.stack([sample.state_S for sample in samples]),
            np.stack([sample.chunk_HD for sample in samples]),
            np.stack([sample.known_H for sample in samples]),
        )

    def _sample(self, row: int) -> RobotSample:
        horizon = self.robot.horizon
        return RobotSample(
            images=tuple(np.full((SIDE, SIDE, 3), row, np.uint8) for _ in self.robot.cameras),
            task=self.task,
            state_S=self.position_NS[row],
            chunk_HD=self.position_NS[row + 1 : row + 1 + horizon],
            known_H=row + np.arange(horizon) < self.count,
            labels=Labels(place=self.place),
        )


class Questions:
    """Questions about grey images."""

    name = "questions in memory"

    def __init__(self, count: int = 10, suffix: str = "<loc0512> <loc0100> a ball", **labels: Any) -> None:
        self.count, self.suffix, self.labels = count, suffix, Labels(**labels)

    def __len__(self) -> int:
        return self.count

    def take(self, rows: Sequence[int]) -> list[LanguageSample]:
        image = np.full((SIDE, SIDE, 3), 100, np.uint8)
        return [LanguageSample((image,), f"where is ball {row} ?", self.suffix, self.labels) for row in rows]

    def texts(self) -> Iterator[str]:
        for sample in self.take(range(self.count)):
            yield sample.prefix
            yield sample.suffix
