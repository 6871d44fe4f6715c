"""A recording as DROID makes them, 15 times per second: replayed with a bundle of config/robots/droid.yaml."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bundles import write_test_bundle
from support.robot_bags import arrays, at, join, joints, sort, times, wave
from support.sample_bags import Messages, image, text, write_bag

from ki_vla_ros.bags import open_bag
from ki_vla_ros.bundle import Bundle
from ki_vla_ros.messages import decode
from ki_vla_ros.messages.decoding import BagMessage
from ki_vla_ros.replay.__main__ import main
from ki_vla_ros.robot import find_robot, read_robot
from training.export.tiny import robot_policy

ROBOT = read_robot(find_robot("droid"))
RATE_HZ, SECONDS = 15.0, 4.0
OPEN_LOOP_S = 8 / RATE_HZ
"""openpi's client executes eight actions of a chunk before it asks for the next."""
JOINTS = [*(f"panda_joint{k}" for k in range(1, 8)), "robotiq_85_left_knuckle_joint"]
MIDDLE = (0.0, -0.3, 0.0, -2.0, 0.0, 2.0, 0.8)
EXTERIOR, WRIST = (f"/{camera.topic}" for camera in ROBOT.cameras)
COMMANDS = "/forward_velocity_controller/commands"


def recording() -> Messages:
    """Three cameras, of which the robot file has two, joint positions with the gripper's knuckle, and velocities."""
    arm, knuckle, speed = wave(7, 0.2, MIDDLE), wave(1, 0.3, 0.4), wave(7, 0.26, phase=np.pi / 2)
    cameras = [
        at(topic, "sensor_msgs/msg/Image", t, image)
        for topic in (EXTERIOR, WRIST, "/exterior_camera_2/left/image_rect_color")
        for t in times(RATE_HZ, seconds=SECONDS)
    ]
    told = BagMessage("/policy/instruction", "std_msgs/msg/String", cameras[0].log_ns - 3_000_000, text("touch red"))
    return sort(
        [told],
        cameras,
        joints("/joint_states", JOINTS, join(arm, knuckle), RATE_HZ, seconds=SECONDS),
        arrays(COMMANDS, speed, RATE_HZ, seconds=SECONDS),
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_test_bundle(tmp_path_factory.mktemp("droid") / "bundle", robot_policy(ROBOT))


@pytest.fixture(scope="module")
def bag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bag(tmp_path_factory.mktemp("recorded") / "bag", recording(), "sqlite3")


def replay(bag: Path, bundle: Bundle, out: Path, *more: str, code: int = 0) -> dict[str, Any]:
    horizon = ("--set", f"execution_horizon_s={OPEN_LOOP_S}")
    assert main([str(bag), "--bundle", str(bundle.path), "--out", str(out), *horizon, *more]) == code
    found: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return found


def test_eight_of_fifteen_actions_are_executed_before_the_next_chunk(bundle: Bundle, bag: Path, tmp_path: Path) -> None:
    found = replay(bag, bundle, tmp_path)
    ticks, period_s = found["ticks"], ROBOT.action_period_s
    assert (ticks["held"], ticks["refused"]) == (0, 0) and found["bag"]["faults"] == []
    assert SECONDS / OPEN_LOOP_S - 1 < ticks["chunks"] < SECONDS / OPEN_LOOP_S + 2
    assert set(found["bag"]["messages"]) == {EXTERIOR, WRIST, "/joint_states", "/policy/instruction"}
    with open_bag(tmp_path / "predicted") as written:
        chunks = [decode(message) for message in written.messages(["/policy/replay/chunk"])]
    assert len(chunks) == ticks["chunks"]
    for chunk in chunks:
        assert chunk.joint_names == JOINTS and len(chunk.points) == ROBOT.horizon == 15
        due_s = [point.time_from_start.sec + 1e-9 * point.time_from_start.nanosec for point in chunk.points]
        np.testing.assert_allclose(np.diff(due_s), period_s, atol=1e-6)
        # Places that the velocities lead to, none faster than the robot file allows; the gripper is open or closed.
        place_HJ = np.array([point.positions for point in chunk.points])
        limit_J = [action.max_velocity for action in ROBOT.actions[:7]]
        assert np.all(np.abs(np.diff(place_HJ[:, :7], axis=0)) <= np.array(limit_J) * period_s + 1e-9)
        assert set(np.round(place_HJ[:, 7], 4)) <= {0.0, 0.7929}
    error = found["error"]["by_joint"]
    assert list(error) == JOINTS and all(np.isfinite(figures["rms"]) for figures in error.values())


def test_the_recorded_velocities_are_a_reference(bundle: Bundle, bag: Path, tmp_path: Path) -> None:
    """The gripper takes an action of ROS, which bags do not have: it is named, and not compared."""
    found = replay(bag, bundle, tmp_path, "--reference", "command", "--no-mcap")["error"]
    assert found["reference"] == "command" and found["what"] == "integral of the velocity"
    assert [joint for joint, figures in found["by_joint"].items() if figures["rms"] is None] == JOINTS[7:]


@pytest.mark.parametrize(
    ("topic", "said"),
    [
        (WRIST, "camera 'wrist': expected sensor_msgs/.* on /wrist_camera/left/image_rect_color"),
        ("/joint_states", "/joint_states"),
    ],
)
def test_what_is_missing_is_named(
    topic: str, said: str, bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bag = write_bag(tmp_path / "bag", [message for message in recording() if message.topic != topic])
    assert main([str(bag), "--bundle", str(bundle.path), "--out", str(tmp_path / "out"), "--no-mcap"]) == 2
    assert re.search(said, capsys.readouterr().err)
