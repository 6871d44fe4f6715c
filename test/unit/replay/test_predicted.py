"""The mcap of a replay has the commanded motion of each output on its own topic."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.bundles import demo_policy, mixed_robot

from ki_vla_ros.bags import open_bag
from ki_vla_ros.messages import decode
from ki_vla_ros.records import NS_PER_S, Motion
from ki_vla_ros.replay.predicted import PredictionBag
from ki_vla_ros.replay.ticks import Tick
from ki_vla_ros.robot.robot import Robot

MIXED = Robot.model_validate(mixed_robot())


WIDTHS = {"arm": 2, "hand": 1, "slide": 1, "base": 2, "tool": 6}


@pytest.mark.parametrize(
    ("robot", "topics"),
    [
        (demo_policy().robot, {"/p/replay/commanded": 7}),
        (MIXED, {f"/p/replay/commanded/{output}": width for output, width in WIDTHS.items()}),
    ],
)
def test_each_output_has_its_topic(tmp_path: Path, robot: Robot, topics: dict[str, int]) -> None:
    names: Any = SimpleNamespace(cameras={})
    count = len(robot.axes)
    place_NJ = np.stack([np.arange(count, dtype=np.float64), np.arange(count) + 1.0])
    motion = Motion(robot.axis_names, NS_PER_S, np.array([1, 2]) * NS_PER_S, place_NJ, np.zeros((2, count)))
    bag = PredictionBag(tmp_path / "predicted", names, "/p", robot)
    bag.add(Tick(0, NS_PER_S, "", None, {}, 0, 0, {}, (motion,), None), None)
    bag.close()
    with open_bag(tmp_path / "predicted") as written:
        found: dict[str, Any] = {}
        for message in written.messages(list(topics)):
            found.setdefault(message.topic, decode(message))
    assert {topic: len(message.name) for topic, message in found.items()} == topics
    assert [name for topic in topics for name in found[topic].name] == list(robot.axis_names)
    np.testing.assert_array_equal(np.concatenate([found[topic].position for topic in topics]), np.arange(count))
