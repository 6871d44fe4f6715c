"""Frames of LeRobot datasets read at random, against all of them read one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.foreign_datasets import ACTION, SHAPES, STATE, Camera, Column, Shape, build, value

from ki_vla_ros.policy import resize_with_pad
from ki_vla_ros.robot import Robot
from training.data.lerobot import Dataset, LeRobotSamples, read_robot_columns
from training.data.samples import RobotSample

SIZE = 24
ARRAY, POSE = "std_msgs/msg/Float64MultiArray", "geometry_msgs/msg/PoseStamped"


def robot_of(
    cameras: Mapping[str, str], state: Column, action: Column, fps: float, horizon: int = 4, **first: Any
) -> Robot:
    """A robot with these cameras (by key) and columns, in the order that the dataset has; state in degrees."""

    def column(one: Column, i: int, **units: Any) -> dict[str, Any]:
        return {"column": one.key, "index": i, **units}

    joint = {"kind": "joint_position", "unit": "rad", "lower": -3.0, "upper": 3.0}
    actions: list[dict[str, Any]] = [
        {"name": f"a{i}", **joint, "max_velocity": 1.0, "output": "arm", "dataset": column(action, i)}
        for i in range(action.width)
    ]
    for one in actions:  # what measures it is beside the point here
        one["source"] = {"joint": one["name"]}
    actions[0] |= first
    return Robot.model_validate(
        {
            "name": "some",
            "cameras": [{"name": name, "dataset": key} for name, key in cameras.items()],
            "state": [{"name": f"s{i}", **joint, "dataset": column(state, i, unit="deg")} for i in range(state.width)],
            "actions": actions,
            "outputs": [{"name": "arm", "topic": "arm/commands", "type": ARRAY}],
            "action_period_s": 1.0 / fps,
            "horizon": horizon,
        }
    )


def robot_for(shape: Shape, dataset: Dataset, **more: Any) -> Robot:
    columns = {column.key: column for column in shape.columns}
    state = columns[dataset.state_key] if dataset.state_key else next(iter(columns.values()))
    action = columns[str(dataset.action_key)]
    return robot_of({f"c{v}": key for v, key in enumerate(dataset.info.cameras)}, state, action, shape.fps, **more)


def read_in_order(dataset: Dataset, robot: Robot, horizon: int) -> list[RobotSample]:
    """The slow way: every file from its beginning, every image decoded."""
    samples = []
    for episode in dataset.episodes:
        columns = dataset.columns(episode)
        state_FS, action_FD = read_robot_columns(dataset, robot, columns)
        assert action_FD is not None
        tasks = dataset.task_of(columns)
        views = [list(dataset.images(episode, camera.key)) for camera in robot.cameras]
        for i in range(episode.length):
            after = [i + h for h in range(horizon)]
            samples.append(
                RobotSample(
                    images=tuple(resize_with_pad(view[i], SIZE) for view in views),
                    task=tasks[i],
                    state_S=state_FS[i],
                    chunk_HD=np.stack([action_FD[min(j, episode.length - 1)] for j in after]),
                    known_H=np.array([j < episode.length for j in after]),
                )
            )
    return samples


def check_same(got: RobotSample, expected: RobotSample) -> None:
    assert len(got.images) == len(expected.images) and got.task == expected.task
    for image, true in zip(got.images, expected.images, strict=True):
        assert image is not None and true is not None
        np.testing.assert_array_equal(image, true)
    for name in ("state_S", "chunk_HD", "known_H"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))


@pytest.mark.parametrize(
    "name", [name for name, shape in SHAPES.items() if shape.cameras and name not in ("files v3.0", "kinect v2.1")]
)
def test_frames_at_random_are_those_read_in_order(name: str, tmp_path: Path) -> None:
    """h264 with frames that refer to later ones, hevc, av1, mpeg4, png, jpeg, files; several episodes in a file."""
    lengths = {e: n + 9 for e, n in SHAPES[name].lengths.items()}
    shape = replace(SHAPES[name], lengths=lengths)
    dataset = Dataset(build(tmp_path / "dataset", shape))
    robot = robot_for(shape, dataset)
    expected = read_in_order(dataset, robot, robot.horizon)
    samples = LeRobotSamples(dataset, robot, image_size=SIZE)
    assert len(samples) == len(expected) == sum(lengths.values())
    rng = np.random.default_rng(3)
    for _ in range(4):
        rows = rng.integers(0, len(samples), size=7).tolist()
        for row, got in zip(rows, samples.take(rows), strict=True):
            check_same(got, expected[row])
    assert sorted(samples.texts()) == sorted({sample.task for sample in expected})
    state_FS, chunk_FHD, known_FH = (np.concatenate(part) for part in zip(*samples.numbers(), strict=True))
    np.testing.assert_array_equal(state_FS, [sample.state_S for sample in expected])
    np.testing.assert_array_equal(chunk_FHD, [sample.chunk_HD for sample in expected])
    np.testing.assert_array_equal(known_FH, [sample.known_H for sample in expected])


JOINT = Column(STATE, ["s0", "s1"], 2)
COMMAND = Column(ACTION, ["a0", "a1"], 2)
TWO = Shape("v3.0", [JOINT, COMMAND], [Camera("wrist", "png", 24, 24)], fps=50, lengths={2: 12, 5: 31, 6: 9})


def open_two(folder: Path, shape: Shape = TWO, fps: float = 50, **more: Any) -> LeRobotSamples:
    """Samples of a dataset of two joints, whose robot acts `fps` times per second."""
    first = {key: more.pop(key) for key in ("kind", "unit", "lower", "upper") if key in more}
    cameras = more.pop("cameras", {"wrist": "wrist"})
    robot = robot_of(cameras, JOINT, COMMAND, fps, **first)
    dataset = Dataset(build(folder / "dataset", shape))
    return LeRobotSamples(dataset, more.pop("robot", robot), **{"image_size": SIZE} | more)


@pytest.mark.parametrize("stride", [1, 5])
@pytest.mark.parametrize("ends", ["mask", "hold", "drop"])
def test_a_chunk_has_the_action_at_each_periods_end(stride: int, ends: Any, tmp_path: Path) -> None:
    """Of a dataset at 50 frames per second for a robot at 10, every fifth; past the end the last one."""
    samples = open_two(tmp_path, fps=50 / stride, ends=ends)
    row = 0
    for episode, length in TWO.lengths.items():
        action_FD = value(TWO, ACTION, episode).astype(np.float64)
        for i in range(length):
            due = [i + (h + 1) * stride - 1 for h in range(4)]
            if ends == "drop" and due[-1] >= length:
                continue
            got = samples.take([row])[0]
            np.testing.assert_array_equal(got.chunk_HD, [action_FD[min(j, length - 1)] for j in due])
            assert got.known_H.tolist() == [j < length or ends == "hold" for j in due]
            np.testing.assert_allclose(got.state_S, np.deg2rad(value(TWO, STATE, episode)[i]))
            row += 1
    assert row == len(samples)
