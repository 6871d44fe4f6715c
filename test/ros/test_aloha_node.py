"""The simulated ALOHA as other nodes see it: four controllers, joint states in parts, and a clock of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, qos_profile_sensor_data
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from support import ROOT
from support.aloha import needs_aloha
from support.waiting import PATIENCE_S
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from ki_vla_ros.robot.robot import find_robot, read_robot
from ki_vla_ros.ros.children import begin_child
from ki_vla_ros.sim.aloha.demonstrator import Demonstrator
from ki_vla_ros.sim.aloha.node import PARTS
from ki_vla_ros.sim.aloha.teleoperator import Teleoperator
from ki_vla_ros.sim.aloha.world import CAMERAS, HOME_J, JOINTS, OPEN_M, AlohaWorld

pytestmark = needs_aloha

SMALL = ("-p", "image_width:=64", "-p", "image_height:=48", "-p", "camera_rate_hz:=5.0", "-p", "publish_clock:=true")
LEFT_ARM, LEFT_GRIPPER, RIGHT_ARM, RIGHT_GRIPPER = (part.command for part in PARTS)


class Client:
    """Another node in ALOHA's domain: it keeps every joint state, and each other topic's newest message."""

    def __init__(self) -> None:
        self._context = Context()
        rclpy.init(context=self._context)
        self.node = Node("client", context=self._context)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self.node)
        self.newest: dict[str, Any] = {}
        self.parts: defaultdict[str, set[tuple[str, ...]]] = defaultdict(set)
        self.position: dict[str, float] = {}
        for topic in {part.joint_states for part in PARTS}:
            self.node.create_subscription(
                JointState, topic, lambda message, topic=topic: self._take(topic, message), QoSProfile(depth=50)
            )
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        others = {f"camera/{camera}/image_raw": (Image, qos_profile_sensor_data) for camera in CAMERAS}
        others |= {"sim_aloha/status": (String, latched), "/diagnostics": (DiagnosticArray, QoSProfile(depth=10))}
        others["/clock"] = (Clock, QoSProfile(depth=10))
        for topic, (kind, qos) in others.items():
            self.node.create_subscription(
                kind, topic, lambda message, topic=topic: self.newest.update({topic: message}), qos
            )
        self._commands = {p.command: self.node.create_publisher(JointTrajectory, p.command, 10) for p in PARTS}
        self.until(lambda: len(self.newest) == 6 and len(self.position) == 14, "message on every topic")
        self.until(lambda: all(c.get_subscription_count() for c in self._commands.values()), "controllers")

    def close(self) -> None:
        self.node.destroy_node()
        self._executor.shutdown()
        rclpy.shutdown(context=self._context)

    def _take(self, topic: str, message: JointState) -> None:
        self.parts[topic].add(tuple(message.name))
        self.position.update(zip(message.name, message.position, strict=True))

    def until(self, condition: Callable[[], bool], what: str) -> None:
        end_s = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < end_s, f"no {what} within {PATIENCE_S} s"
            self._executor.spin_once(timeout_sec=0.1)

    def send(self, topic: str, joints: list[str], positions: list[float], time_s: float) -> None:
        point = JointTrajectoryPoint(positions=positions)
        point.time_from_start.nanosec = int(time_s * 1e9)
        self._commands[topic].publish(JointTrajectory(joint_names=joints, points=[point]))

    @property
    def moved_J(self) -> np.ndarray:
        return np.array([self.position[joint] for joint in JOINTS]) - HOME_J

    @property
    def status(self) -> dict[str, Any]:
        return json.loads(self.newest["sim_aloha/status"].data)

    def diagnostic(self, key: str) -> int:
        (status,) = self.newest["/diagnostics"].status
        return int({entry.key: entry.value for entry in status.values}[key])


def test_the_robot_file_names_what_the_node_has() -> None:
    robot = read_robot(find_robot("aloha"))
    assert robot.axis_names == JOINTS == tuple(dimension.name for dimension in robot.state)
    assert robot.camera_names == CAMERAS and robot.cameras[0].key == "observation.images.top"
    topics = {signal.name: signal.topic for signal in robot.signals}
    assert topics == {joint: part.joint_states for part in PARTS for joint in part.joints}
    outputs = {output.topic: tuple(a.target for a in robot.actions_of(output)) for output in robot.outputs}
    assert outputs == {part.command: part.joints for part in PARTS}
    world = AlohaWorld(render=False)
    np.testing.assert_array_equal([axis.lower for axis in robot.axes], world.lower_J)
    np.testing.assert_array_equal([axis.upper for axis in robot.axes], world.upper_J)
    # gym_aloha.constants.START_ARM_POSE, as its task normalises a gripper.
    start = [0.0, -0.96, 1.16, 0.0, -0.3, 0.0, (0.02239 - 0.01844) / (0.05800 - 0.01844)] * 2
    for lines in (robot.state_lines, robot.action_lines):
        np.testing.assert_allclose(lines.to_foreign(HOME_J), start, atol=1e-12)


@pytest.fixture
def aloha(ros_environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "ki_vla_ros.sim.aloha.node", "--ros-args", "-p", "scene_seed:=5", *SMALL]
    process = subprocess.Popen(command, env=ros_environment, stderr=subprocess.PIPE, text=True, preexec_fn=begin_child)
    with process:
        yield process
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 0


@pytest.fixture
def client(aloha: subprocess.Popen[str]) -> Iterator[Client]:
    client = Client()
    yield client
    client.close()


def test_four_controllers_and_joint_states_in_parts(client: Client) -> None:
    assert client.parts == {
        "follower_left/joint_states": {PARTS[0].joints, PARTS[1].joints},
        "follower_right/joint_states": {PARTS[2].joints, PARTS[3].joints},
    }
    assert client.moved_J == pytest.approx(np.zeros(14), abs=0.02)
    for camera in CAMERAS:
        image = client.newest[f"camera/{camera}/image_raw"]
        assert (image.height, image.width, image.encoding) == (48, 64, "rgb8")
        assert np.frombuffer(image.data, np.uint8).std() > 10.0
    clock, stamp = client.newest["/clock"].clock, client.newest["camera/top/image_raw"].header.stamp
    assert abs((clock.sec - stamp.sec) + (clock.nanosec - stamp.nanosec) / 1e9) < 5.0, "the clock that it publishes"
    (cube,) = client.status["objects"]
    assert (client.status["scene_seed"], client.status["reward"], client.status["success"]) == (5, 0, False)
    assert (cube["x"], cube["y"]) == pytest.approx((0.0444, 0.5741), abs=1e-4)

    client.send(LEFT_GRIPPER, ["left_gripper"], [OPEN_M], 0.3)
    client.until(lambda: abs(client.position["left_gripper"] - OPEN_M) < 2e-3, "open gripper")
    others = [joint != "left_gripper" for joint in JOINTS]
    assert np.abs(client.moved_J[others]).max() < 0.02
    names = list(PARTS[2].joints)[::-1]  # in any order
    client.send(RIGHT_ARM, names, [0.0, -0.3, 0.0, 1.16, -0.96, 0.4], 0.5)
    client.until(lambda: abs(client.position["right_waist"] - 0.4) < 0.02, "turned arm")
    assert abs(client.position["left_waist"]) < 0.02

    # One controller's joints are nothing to another, nor is a part of its own.
    client.send(RIGHT_ARM, [*PARTS[2].joints, "right_gripper"], [0.0] * 7, 0.5)
    client.send(RIGHT_GRIPPER, ["left_gripper"], [OPEN_M], 0.5)
    client.send(LEFT_ARM, ["left_waist"], [0.0], 0.5)
    client.until(lambda: client.diagnostic("refused_trajectories") == 3, "count of refusals")
    assert client.position["right_waist"] == pytest.approx(0.4, abs=0.02)


def test_bad_starts_end_with_one_message(ros_environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "gym_aloha").mkdir()  # another package of that name
    (tmp_path / "gym_aloha" / "__init__.py").touch()
    cases = {
        "publish_clock: expected false with use_sim_time": (
            ["node", "--ros-args", "-p", "publish_clock:=true", "-p", "use_sim_time:=true"]
        ),
        "--episodes: expected 1 to 100000, got 0": ["teleoperator", "--episodes", "0"],
        "found it without assets/": ["teleoperator"],
    }
    environment = {**ros_environment, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    processes = {
        message: subprocess.Popen(
            [sys.executable, "-m", f"ki_vla_ros.sim.aloha.{arguments[0]}", *arguments[1:]],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for message, arguments in cases.items()
    }
    for message, process in processes.items():
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 2 and message in errors and "Traceback" not in errors, errors


@pytest.mark.parametrize("policy", [False, True])
@pytest.mark.usefixtures("ros_environment")
def test_beside_a_policy_the_teleoperator_commands_nothing(policy: bool) -> None:
    rclpy.init()
    try:
        teleoperator = Teleoperator(None if policy else Demonstrator(), threading.Event())
        published = teleoperator.get_publisher_names_and_types_by_node(teleoperator.get_name(), "/")
        commands = [name for name, types in published if types == ["trajectory_msgs/msg/JointTrajectory"]]
        assert len(commands) == (0 if policy else len(PARTS))
        teleoperator.close()
    finally:
        rclpy.shutdown()
