"""A robot whose state comes in parts, from two topics of joint states and one of poses, over real ROS."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from geometry_msgs.msg import PoseStamped
from sensor_msgs.msg import JointState
from support import ROOT
from support.bundles import TASK, mixed_policy, mixed_robot, write_test_bundle
from support.robots import PolicyProcess, Robot, stamp_of
from support.waiting import PATIENCE_S, until

from ki_vla_ros.bags.bag import open_bag
from ki_vla_ros.replay.__main__ import main as replay
from ki_vla_ros.ros.children import begin_child
from ki_vla_ros.settings.session import read_session

IMAGES, STATES = ("/camera/scene/image_raw", "/camera/wrist/image_raw"), ("/joint_states", "/hand/states", "/tool_pose")


class Parts:
    """Arm, lift and gripper in messages of their own, the gripper's in mm; and where the tool is."""

    def __init__(self, robot: Robot) -> None:
        self.robot, self.node = robot, robot.node
        robot.stating = False
        self.hand = self.node.create_publisher(JointState, "hand/states", 10)
        self.tool = self.node.create_publisher(PoseStamped, "tool_pose", 10)
        self.silent: set[str] = set()
        self.frame = "world"
        self.number = 0
        self.node.create_timer(0.01, self._publish)

    def _publish(self) -> None:
        self.number += 1
        stamp = stamp_of(self.robot.now_ns())
        for name, publisher, every, position in (
            ("arm", self.robot.joints, 1, {"shoulder": 0.1, "elbow": 0.2}),
            ("slide", self.robot.joints, 5, {"wheel": 9.0, "slide": 0.3}),
            ("hand", self.hand, 2, {"finger": 20.0}),
        ):
            if name not in self.silent and self.number % every == 0:
                message = JointState(name=list(position), position=list(position.values()))
                message.header.stamp = stamp
                publisher.publish(message)
        if "tool" not in self.silent:
            pose = PoseStamped()
            pose.header.stamp, pose.header.frame_id = stamp, self.frame
            pose.pose.position.x, pose.pose.position.z = 0.1, 0.4
            # The tool looks down; its driver does not care for the quaternion's sign.
            pose.pose.orientation.x, pose.pose.orientation.w = 1.0 if self.number % 2 else -1.0, 0.0
            self.tool.publish(pose)


@pytest.fixture(scope="module")
def parts_bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    fields = mixed_robot()
    hand = {"topic": "hand/states", "joint": "finger", "unit": "mm"}
    state = [{**d, "source": hand} if d["name"] == "gripper" else d for d in fields["state"]]
    folder = tmp_path_factory.mktemp("bundle") / "mixed"
    write_test_bundle(folder, mixed_policy(robot={**fields, "state": state}))
    return str(folder)


@pytest.fixture
def recorder(ros_environment: dict[str, str], tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    command = [sys.executable, "-m", "ki_vla_ros.record", "--out", str(tmp_path / "bag"), "--writer", "own"]
    environment = {**ros_environment, "PYTHONPATH": f"{ROOT}:{ros_environment.get('PYTHONPATH', '')}"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, preexec_fn=begin_child) as process:
        yield process, tmp_path / "bag"
        process.kill()


def recorded(folder: Path) -> Counter[str]:
    """How many messages of each topic are on the disk."""
    if not folder.exists() or not any(folder.iterdir()):
        return Counter()
    with open_bag(folder) as bag:
        return Counter(message.topic for message in bag.messages())


@pytest.mark.slow
def test_parts_are_put_together_recorded_and_replayed(
    robot: Robot,
    start: Callable[..., PolicyProcess],
    recorder: tuple[subprocess.Popen[bytes], Path],
    parts_bundle: str,
    tmp_path: Path,
) -> None:
    parts = Parts(robot)
    policy = start(bundle=parts_bundle, autostart=True, instruction=TASK, shadow=True)

    def runs() -> bool:
        return len(robot.ticks) > 3 and [tick["hold"] for tick in robot.ticks[-3:]] == [None] * 3

    def holds(*texts: str) -> Callable[[], bool]:
        return lambda: all(text in robot.hold for text in texts)

    until(runs)
    session = read_session(robot.sessions[-1])
    assert session.topics.states == {"joint_states": "/joint_states", "hand/states": "/hand/states"}
    assert session.topics.poses == {"tool_pose": "/tool_pose"}
    used: Any = next(tick["joint_ns"] for tick in reversed(robot.ticks) if tick["joint_ns"])
    assert 4 <= len(used) <= 8, "of four parts one or two each"
    process, bag = recorder
    until(lambda: all(recorded(bag)[topic] >= 10 for topic in (*IMAGES, *STATES, "/policy/chunk")))
    # The recorder may have met one of the topics late: of the chunks from here on the bag has all inputs.
    before = recorded(bag)["/policy/chunk"]
    until(lambda: recorded(bag)["/policy/chunk"] >= before + 8)
    process.terminate()
    assert process.wait(PATIENCE_S) == 0

    for silent, texts in (
        ("hand", ("joint state: newest of finger on /hand/states", "limit 250 ms", "is /hand/states published?")),
        ("slide", ("joint state: newest of slide on /joint_states", "slide missing among shoulder, elbow, which came")),
        ("tool", ("pose: newest of /tool_pose", "limit 250 ms")),
    ):
        parts.silent = {silent}
        until(holds(*texts), silent)
        parts.silent = set()
        until(runs, f"ticks after {silent}")
    parts.frame = "tool"
    until(holds("pose: newest of /tool_pose", "expected frame 'world' on /tool_pose, as the robot file says, got 'to"))
    parts.frame = "world"
    until(runs)
    assert policy.stop() == 0, policy.output
    assert "Traceback" not in policy.output

    # The bag alone has all that a replay needs, and the chunks are made again, but for where rotations count from.
    assert replay([str(bag), "--ticks", "recorded", "--out", str(tmp_path / "replay")]) == 0
    metrics = json.loads((tmp_path / "replay" / "metrics.json").read_text())
    assert metrics["bag"]["topics"]["state hand/states"] == "/hand/states"
    parity = metrics["parity"]
    assert parity["chunks"] >= 5 and parity["max_difference"] < 1e-3, json.dumps(parity, indent=1)
