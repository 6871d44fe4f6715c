"""The node in a process of its own on real Fast DDS; the test is the robot: cameras, joint states, lifecycle client."""

from __future__ import annotations

import array
import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rclpy
from bundles import CAMERAS, JOINTS, demo_observation, write_test_bundle
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.msg import Parameter as ParameterMessage
from rcl_interfaces.srv import DescribeParameters, SetParametersAtomically
from rclpy.executors import SingleThreadedExecutor
from rclpy.parameter import Parameter
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from trajectory_msgs.msg import JointTrajectory

# rclpy's parser of IDL files, loaded with the first message, uses a module that Python 3.11 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:module 'sre_:DeprecationWarning")

TASK = "touch the red cube"
PATIENCE_S = 60.0
ROOT = Path(__file__).resolve().parents[1]


class Robot:
    """Cameras (20 Hz), joint states (100 Hz) at a fixed position, and clients of everything that the node offers."""

    def __init__(self, domain: int, namespace: str = "") -> None:
        self.context = rclpy.Context()
        rclpy.init(context=self.context, domain_id=domain)
        self.node = rclpy.create_node("robot", context=self.context, namespace=namespace or "/")
        self.commands: list[JointTrajectory] = []
        self.chunks: list[JointTrajectory] = []
        self.ticks: list[dict[str, Any]] = []
        self.diagnostics: list[DiagnosticArray] = []
        subscribe = self.node.create_subscription
        subscribe(JointTrajectory, "arm_controller/joint_trajectory", self.commands.append, 100)
        subscribe(JointTrajectory, "policy/chunk", self.chunks.append, 100)
        subscribe(String, "policy/tick", lambda message: self.ticks.append(json.loads(message.data)), 100)
        subscribe(DiagnosticArray, "/diagnostics", self.diagnostics.append, 100)
        self.instruct = self.node.create_publisher(String, "policy/instruction", 10)
        self.image = {
            name: self.node.create_publisher(Image, f"camera/{name}/image_raw", qos_profile_sensor_data)
            for name in CAMERAS
        }
        self.joints = self.node.create_publisher(JointState, "joint_states", 10)
        self.position = demo_observation().state_J.tolist()
        self.encoding = "rgb8"
        self.joint_names = list(JOINTS)
        self.imaging = True
        self._pixels = array.array("B", demo_observation(image_size=96).frames["scene"].rgb_HWC.tobytes())
        self._count = itertools.count()
        self.node.create_timer(0.01, self._publish)
        self._executor = SingleThreadedExecutor(context=self.context)
        self._executor.add_node(self.node)
        self._thread = threading.Thread(target=self._executor.spin)
        self._thread.start()

    def close(self) -> None:
        self._executor.shutdown()
        self._thread.join()
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)

    def _publish(self) -> None:
        stamp = self.node.get_clock().now().to_msg()
        message = JointState(name=self.joint_names, position=self.position)
        message.header.stamp = stamp
        self.joints.publish(message)
        if next(self._count) % 5 == 0 and self.imaging:
            for publisher in self.image.values():
                image = Image(height=96, width=96, step=288, encoding=self.encoding, data=self._pixels)
                image.header.stamp = stamp
                publisher.publish(image)

    def call(self, service: str, kind: Any, request: Any) -> Any:
        client = self.node.create_client(kind, service)
        try:
            assert client.wait_for_service(PATIENCE_S), f"{service} is not there"
            answered = threading.Event()
            future = client.call_async(request)
            future.add_done_callback(lambda _: answered.set())
            assert answered.wait(PATIENCE_S), f"{service} does not answer"
            return future.result()
        finally:
            self.node.destroy_client(client)

    def change(self, label: str) -> bool:
        request = ChangeState.Request()
        request.transition.label = label
        return bool(self.call("policy/change_state", ChangeState, request).success)

    @property
    def state(self) -> str:
        return str(self.call("policy/get_state", GetState, GetState.Request()).current_state.label)

    def set(self, **values: object) -> str:
        """Atomically; the reason of a refusal, or ""."""
        parameters = [
            Parameter(name.replace("__", "."), value=value).to_parameter_msg() for name, value in values.items()
        ]
        assert all(isinstance(p, ParameterMessage) for p in parameters)
        request = SetParametersAtomically.Request(parameters=parameters)
        result = self.call("policy/set_parameters_atomically", SetParametersAtomically, request).result
        assert result.successful == (not result.reason)
        return str(result.reason)

    def say(self, text: str) -> None:
        until(lambda: self.instruct.get_subscription_count() > 0)
        self.instruct.publish(String(data=text))


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


class PolicyProcess:
    """`python -m ki_vla_ros.node` with parameters; its output goes to a file."""

    def __init__(self, environment: dict[str, str], folder: Path, *arguments: str, **parameters: object) -> None:
        self._log = folder / f"policy-{len(list(folder.glob('policy-*')))}.log"
        # YAML, so that a string stays a string.
        given = [
            part
            for name, value in parameters.items()
            for part in ("-p", f"{name.replace('__', '.')}:={json.dumps(value)}")
        ]
        command = [sys.executable, "-m", "ki_vla_ros.node", "--ros-args", *given, *arguments]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)

    @property
    def output(self) -> str:
        return self._log.read_text()

    def wait(self) -> int:
        return self.process.wait(PATIENCE_S)

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        self.process.send_signal(number)
        return self.wait()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bundle") / "test"
    write_test_bundle(folder)
    return str(folder)


@pytest.fixture
def start(ros_environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., PolicyProcess]]:
    started: list[PolicyProcess] = []

    def start_policy(*arguments: str, **parameters: object) -> PolicyProcess:
        started.append(PolicyProcess(ros_environment, tmp_path, *arguments, **parameters))
        return started[-1]

    yield start_policy
    for policy in started:
        if policy.process.poll() is None:
            policy.process.kill()
            policy.process.wait()


@pytest.fixture
def robot(ros_environment: dict[str, str]) -> Iterator[Robot]:
    robot = Robot(int(ros_environment["ROS_DOMAIN_ID"]))
    yield robot
    robot.close()


def is_hold(command: JointTrajectory, position: list[float]) -> bool:
    return (
        len(command.points) == 1
        and np.allclose(command.points[0].positions, position)
        and not any(command.points[0].velocities)
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_from_messages_to_commands_until_a_signal(
    robot: Robot, start: Callable[..., PolicyProcess], bundle: str, number: signal.Signals
) -> None:
    policy = start(bundle=bundle, autostart=True, instruction=TASK)
    until(lambda: len(robot.commands) >= 5 and len(robot.chunks) >= 5 and robot.diagnostics)
    for command in list(robot.commands):
        assert command.joint_names == list(JOINTS)
        assert (command.header.stamp.sec, command.header.stamp.nanosec) == (0, 0)
        times = [p.time_from_start.sec + p.time_from_start.nanosec * 1e-9 for p in command.points]
        assert times[0] > 0 and np.all(np.diff(times) > 0)
        assert not any(command.points[-1].velocities)
    chunk = robot.chunks[-1]
    assert len(chunk.points) == 16 and chunk.points[0].time_from_start.nanosec == 50_000_000
    tick = robot.ticks[-1]
    assert tick["instruction"] == TASK and tick["hold"] is None
    assert set(tick["stage_ms"]) == {
        "observation", "preprocess", "prefill", "denoise", "chunking", "safety", "publish", "total",
    }  # fmt: skip
    assert robot.diagnostics[-1].status[0].name == "/policy"
    before = len(robot.commands)
    assert policy.stop(number) == 0, policy.output
    until(lambda: len(robot.commands) > before and is_hold(robot.commands[-1], robot.position))


def test_a_lifecycle(robot: Robot, start: Callable[..., PolicyProcess], bundle: str) -> None:
    policy = start(instruction=TASK)
    assert robot.state == "unconfigured"
    assert not robot.change("configure")
    until(lambda: "cannot configure: parameter 'bundle': expected the folder of a model bundle" in policy.output)
    assert robot.state == "unconfigured"

    assert robot.set(bundle=bundle) == ""
    for _ in range(2):
        assert robot.change("configure") and robot.state == "inactive"
        assert "changes only while the node is unconfigured" in robot.set(bundle="/elsewhere")
        assert robot.change("activate") and robot.state == "active"
        first = len(robot.commands)
        until(lambda first=first: len(robot.commands) > first + 2)
        assert robot.change("deactivate") and robot.state == "inactive"
        until(lambda: is_hold(robot.commands[-1], robot.position))
        count, ticks = len(robot.commands), len(robot.ticks)
        time.sleep(0.5)
        assert (len(robot.commands), len(robot.ticks)) == (count, ticks)
        assert robot.change("cleanup") and robot.state == "unconfigured"
        until(lambda: robot.node.count_publishers("policy/chunk") == 0)
        until(lambda: robot.image["scene"].get_subscription_count() == 0)

    assert robot.change("configure") and robot.change("activate")
    count = len(robot.commands)
    until(lambda: len(robot.commands) > count)
    assert robot.change("shutdown") and robot.state == "finalized"
    until(lambda: is_hold(robot.commands[-1], robot.position))
    assert policy.stop() == 0, policy.output


@pytest.mark.parametrize(
    "parameters, fault",
    [
        ({"execution_horizon": 0.2}, "no such parameter; did you mean 'execution_horizon_s'?"),
        ({"rate_hz": 10}, "parameter 'rate_hz': expected float from 0.5 to 50, got int 10"),
        ({"autostart": True, "bundle": "/not/there"}, "expected a folder, got /not/there, which is not there"),
        ({"autostart": True, "cameras__wrst__topic": "/w"}, "no camera 'wrst', only scene, wrist; did you mean"),
        ({"autostart": True, "instruction": "juggle the red cube"}, "does not know 'juggle'"),
    ],
)  # fmt: skip
def test_what_cannot_start_says_why_and_exits(
    start: Callable[..., PolicyProcess], bundle: str, parameters: dict[str, object], fault: str
) -> None:
    policy = start(**{"bundle": bundle, **parameters})
    assert policy.wait() == 1
    assert fault in policy.output
    assert "Traceback" not in policy.output


def test_ros_itself_cannot_start(
    start: Callable[..., PolicyProcess], ros_environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    domain = ros_environment["ROS_DOMAIN_ID"]
    for variable, value, message in [
        ("ROS_DOMAIN_ID", "4000", "policy_node: ROS_DOMAIN_ID: expected 0 to 232, got '4000'"),
        ("ROS_LOG_DIR", str(tmp_path / "file" / "log"), "policy_node: ROS 2 cannot start: "),
    ]:
        ros_environment.update({"ROS_DOMAIN_ID": domain, variable: value})
        policy = start()
        assert policy.wait() == 1
        assert message in policy.output and "Traceback" not in policy.output


def test_instructions(robot: Robot, start: Callable[..., PolicyProcess], bundle: str) -> None:
    policy = start(bundle=bundle, autostart=True)
    until(lambda: any(str(tick["hold"]).startswith("instruction: none yet") for tick in robot.ticks))
    robot.say(TASK)
    until(lambda: robot.commands)
    for bad, why in [
        ("", "expected some words, got ''"),
        ("juggle the red cube", "does not know 'juggle'"),
        ("touch the red cube " * 40, "expected at most"),
    ]:
        robot.say(bad)
        until(
            lambda why=why: f"instruction refused, '{TASK}' stays in force: " in policy.output and why in policy.output
        )
    count = len(robot.ticks)
    until(lambda: len(robot.ticks) > count + 2)
    assert robot.ticks[-1]["instruction"] == TASK and robot.ticks[-1]["hold"] is None
    robot.say("point at the blue ball")
    until(lambda: robot.ticks[-1]["instruction"] == "point at the blue ball" and robot.ticks[-1]["hold"] is None)
    until(
        lambda: (
            robot.diagnostics and any(v.key == "refused instruction" for v in robot.diagnostics[-1].status[0].values)
        )
    )


def test_parameters_while_active(robot: Robot, start: Callable[..., PolicyProcess], bundle: str) -> None:
    start(bundle=bundle, autostart=True, instruction=TASK)
    until(lambda: len(robot.chunks) >= 2)
    described = robot.call(
        "policy/describe_parameters",
        DescribeParameters,
        DescribeParameters.Request(names=["execution_horizon_s", "threads"]),
    ).descriptors
    assert "how long a chunk is executed" in described[0].description
    assert described[0].floating_point_range[0].to_value == 10.0 and described[1].integer_range[0].to_value == 64

    # Each alone would not fit the 0.8 s chunk at the other's old value; together they are judged as one.
    assert "'execution_horizon_s': got 0.75 s at rate_hz 10" in robot.set(execution_horizon_s=0.75)
    assert robot.set(execution_horizon_s=0.75, rate_hz=20.0) == ""
    assert "must outlast" in robot.set(rate_hz=10.0)
    assert "changes only while the node is unconfigured" in robot.set(command_topic="/elsewhere", rate_hz=5.0)
    assert robot.set(limits__velocity_scale=5.0) != ""
    count = len(robot.ticks)
    until(lambda: len(robot.ticks) > count + 40)
    new = [tick["chunk_index"] is not None for tick in robot.ticks[count + 2 :]]
    # 15 ticks of 0.05 s make 0.75 s; late ticks may take a few away, but it was one tick per chunk before.
    gaps = np.diff(np.flatnonzero(new))
    assert len(gaps) and gaps.min() >= 10


def test_inputs_that_fail_bring_the_arm_to_rest_and_are_named(
    robot: Robot, start: Callable[..., PolicyProcess], bundle: str
) -> None:
    start(bundle=bundle, autostart=True, instruction=TASK)

    def held_because(text: str) -> Callable[[], bool]:
        return lambda: text in str(robot.ticks[-1]["hold"]) and is_hold(robot.commands[-1], robot.position)

    def moves() -> bool:
        return robot.ticks[-1]["hold"] is None and len(robot.commands[-1].points) > 1

    until(lambda: robot.ticks and robot.commands and moves())
    robot.imaging = False
    until(held_because("limit 250 ms (max_age_s); is /"))
    robot.imaging = True
    until(moves)
    robot.encoding = "32FC1"
    until(held_because("last message refused: camera 'scene': image encoding '32FC1' is not read"))
    robot.encoding = "rgb8"
    until(moves)
    robot.joint_names = ["a", "b", "c", "d", "e", "f", "g"]
    until(
        lambda: "shoulder_pan" in str(robot.ticks[-1]["hold"]) and "missing among a, b" in str(robot.ticks[-1]["hold"])
    )
    assert len(robot.commands[-1].points) == 1
    robot.joint_names = list(JOINTS)
    until(moves)
    until(
        lambda: (
            robot.diagnostics and any(v.key == "refused camera 'scene'" for v in robot.diagnostics[-1].status[0].values)
        )
    )


def test_two_nodes_of_one_name_do_not_both_move_the_arm(
    robot: Robot, start: Callable[..., PolicyProcess], bundle: str
) -> None:
    first = start(bundle=bundle, autostart=True, instruction=TASK)
    until(lambda: robot.commands and len(robot.ticks) >= 60)  # 6 s
    second = start(bundle=bundle, autostart=True, instruction=TASK)
    # At activation, when discovery was quick, otherwise shortly afterwards.
    until(lambda: "another node of this name runs in the same ROS domain" in second.output)
    until(lambda: second.process.poll() == 1 or "cannot stay active" in second.output)
    assert "ROS domain" not in first.output
    assert first.stop() == 0


def test_the_demo_file_and_a_namespace(
    ros_environment: dict[str, str], start: Callable[..., PolicyProcess], bundle: str
) -> None:
    policy = start(
        "--params-file", "config/demo.yaml", "-r", "__ns:=/left", "-p", f"bundle:={bundle}", "-p", "autostart:=true",
    )  # fmt: skip
    robot = Robot(int(ros_environment["ROS_DOMAIN_ID"]), "/left")
    try:
        robot.say(TASK)
        until(lambda: robot.commands)
        assert policy.stop() == 0
    finally:
        robot.close()


def test_the_node_needs_neither_simulator_nor_trainer() -> None:
    modules = "ki_vla_ros.node, ki_vla_ros.engines.onnx_engine"
    code = f"import sys, {modules}; print({{'mujoco', 'torch'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
