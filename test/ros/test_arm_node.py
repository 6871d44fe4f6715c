"""The simulated arm as other nodes see it: a process on ROS topics that executes trajectories as a real arm would."""

from __future__ import annotations

import array
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import SetParametersAtomically
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, qos_profile_sensor_data
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger
from support.waiting import PATIENCE_S
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from ki_vla_ros.ros.children import begin_child
from ki_vla_ros.runtime.paths import trajectory_from_message
from ki_vla_ros.sim.demonstrator import Demonstrator
from ki_vla_ros.sim.simulation import Pace, image_message
from ki_vla_ros.sim.task import Task, sample_scene
from ki_vla_ros.sim.world import HOME_J, JOINTS, World

COMMAND = [sys.executable, "-m", "ki_vla_ros.sim.arm_node"]


# --- without ROS


def test_pace_makes_the_steps_that_are_due() -> None:
    pace = Pace(step_s=0.002, most_s=0.1)
    pace.restart(100.0)
    assert pace.due(100.001) == 0
    assert pace.wait_s(1, 100.001) == pytest.approx(0.001)
    assert pace.wait_s(5, 100.001) == pytest.approx(0.009)
    assert pace.due(100.0101) == 5
    assert pace.due(100.0101) == 0
    assert pace.due(100.0201) == 5
    assert pace.wait_s(1, 100.3) == 0.0
    assert pace.overruns == 0


def test_pace_drops_and_counts_time_that_is_too_far_behind() -> None:
    pace = Pace(step_s=0.002, most_s=0.1)
    pace.restart(100.0)
    assert pace.due(101.0001) == 50
    assert pace.overruns == 1
    assert pace.due(101.0021) == 1  # the lost second is not made up for later
    assert pace.overruns == 1


def test_pace_begins_with_its_first_call_and_again_when_the_clock_is_set_back() -> None:
    pace = Pace(step_s=0.002, most_s=0.1)
    for now_s in (1000.0, 3.0):
        assert pace.due(now_s) == 0
        assert pace.due(now_s + 0.0101) == 5
    assert pace.overruns == 0


def test_an_image_message_carries_the_pixels_as_rgb8() -> None:
    rgb_HWC = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    message = image_message("wrist", rclpy.time.Time(nanoseconds=5).to_msg(), rgb_HWC)
    assert (message.height, message.width, message.step, message.encoding) == (4, 6, 18, "rgb8")
    assert message.header.stamp.nanosec == 5
    assert message.header.frame_id == "wrist_camera"
    assert np.array_equal(np.frombuffer(message.data, np.uint8).reshape(4, 6, 3), rgb_HWC)


def test_a_trajectory_message_is_read_field_by_field() -> None:
    point = JointTrajectoryPoint(positions=[1.0], velocities=[2.0], accelerations=[3.0], effort=[4.0])
    point.time_from_start.sec, point.time_from_start.nanosec = 1, 5
    message = JointTrajectory(joint_names=["a"], points=[point])
    message.header.stamp.sec, message.header.stamp.nanosec = 7, 9
    trajectory = trajectory_from_message(message)
    assert (trajectory.stamp_ns, list(trajectory.joints)) == (7_000_000_009, ["a"])
    (read,) = trajectory.points
    assert read.time_from_start_ns == 1_000_000_005
    values = (read.positions, read.velocities, read.accelerations, read.effort)
    assert [list(value) for value in values] == [[1.0], [2.0], [3.0], [4.0]]


# --- over ROS


class Client:
    """Another node in the arm's domain; it keeps each topic's newest message and the number of messages.

    With `clock_ns` it publishes simulated time, which runs at half the real speed while it spins.
    """

    def __init__(self, clock_ns: int | None = None) -> None:
        self._context = Context()
        rclpy.init(context=self._context)
        self.node = Node("client", context=self._context)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self.node)
        self.clock_ns, self._clock = clock_ns, self.node.create_publisher(Clock, "/clock", 10)
        if clock_ns is not None:
            self.node.create_timer(0.01, self._tick)
        self.newest: dict[str, Any] = {}
        self.count: dict[str, int] = {}
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        for topic, kind, qos in (
            ("/camera/scene/image_raw", Image, qos_profile_sensor_data),
            ("/camera/wrist/image_raw", Image, qos_profile_sensor_data),
            ("/joint_states", JointState, QoSProfile(depth=10)),
            ("/sim_arm/status", String, latched),
            ("/diagnostics", DiagnosticArray, QoSProfile(depth=10)),
        ):
            self.node.create_subscription(kind, topic, lambda message, topic=topic: self._keep(topic, message), qos)
        self._command = self.node.create_publisher(JointTrajectory, "/arm_controller/joint_trajectory", 10)
        self._reset = self.node.create_client(Trigger, "/sim_arm/reset")
        self._parameters = self.node.create_client(SetParametersAtomically, "/sim_arm/set_parameters_atomically")
        self.until(lambda: self._reset.service_is_ready() and self._parameters.service_is_ready(), "services")
        self.until(lambda: self._command.get_subscription_count() == 1, "subscriber to the command")
        self.until(lambda: len(self.newest) == 5, "a message on every topic")

    def close(self) -> None:
        self.node.destroy_node()
        self._executor.shutdown()
        rclpy.shutdown(context=self._context)

    def _tick(self) -> None:
        self.clock_ns += 5_000_000
        self._clock.publish(Clock(clock=rclpy.time.Time(nanoseconds=self.clock_ns).to_msg()))

    def _keep(self, topic: str, message: Any) -> None:
        self.newest[topic] = message
        self.count[topic] = self.count.get(topic, 0) + 1

    def until(self, condition: Callable[[], bool], what: str) -> None:
        end_s = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < end_s, f"no {what} within {PATIENCE_S} s"
            self._executor.spin_once(timeout_sec=0.1)

    def call(self, client: Any, request: Any) -> Any:
        future = client.call_async(request)
        self.until(future.done, f"answer from {client.srv_name}")
        return future.result()

    def reset(self) -> Any:
        return self.call(self._reset, Trigger.Request())

    def set_scene(self, seed: int = 0, split: str = "all", task: str = "") -> Any:
        values = {
            "scene_seed": ParameterValue(type=ParameterType.PARAMETER_INTEGER, integer_value=seed),
            "split": ParameterValue(type=ParameterType.PARAMETER_STRING, string_value=split),
            "task": ParameterValue(type=ParameterType.PARAMETER_STRING, string_value=task),
        }
        parameters = [Parameter(name=name, value=value) for name, value in values.items()]
        return self.call(self._parameters, SetParametersAtomically.Request(parameters=parameters)).result

    def send(self, names: list[str], points: list[tuple[float, Any]]) -> None:
        message = JointTrajectory(joint_names=names)
        for time_s, position_J in points:
            point = JointTrajectoryPoint(positions=array.array("d", position_J))
            point.time_from_start.sec, point.time_from_start.nanosec = int(time_s), int(time_s % 1.0 * 1e9)
            message.points.append(point)
        self._command.publish(message)

    @property
    def stamp_ns(self) -> int:
        """That of the newest joint state."""
        return rclpy.time.Time.from_msg(self.newest["/joint_states"].header.stamp).nanoseconds

    @property
    def position_J(self) -> np.ndarray:
        return np.array(self.newest["/joint_states"].position)

    @property
    def status(self) -> dict[str, Any]:
        return json.loads(self.newest["/sim_arm/status"].data)

    def diagnostic(self, key: str) -> int:
        (status,) = self.newest["/diagnostics"].status
        return int({entry.key: entry.value for entry in status.values}[key])


@pytest.fixture
def arm(ros_environment: dict[str, str], request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    arguments = ["--ros-args", "-p", "image_size:=64", "-p", "scene_seed:=5", *getattr(request, "param", ())]
    process = subprocess.Popen(
        [*COMMAND, *arguments], env=ros_environment, stderr=subprocess.PIPE, text=True, preexec_fn=begin_child
    )
    with process:
        yield process
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0


@pytest.fixture
def client(arm: subprocess.Popen[str]) -> Iterator[Client]:
    client = Client()
    yield client
    client.close()


def test_it_publishes_cameras_joints_status_and_diagnostics(client: Client) -> None:
    client.until(
        lambda: min(client.count.get(f"/camera/{name}/image_raw", 0) for name in ("scene", "wrist")) > 3, "images"
    )
    pictures = []
    for camera in ("scene", "wrist"):
        image = client.newest[f"/camera/{camera}/image_raw"]
        assert (image.height, image.width, image.encoding, image.header.frame_id) == (
            64,
            64,
            "rgb8",
            f"{camera}_camera",
        )
        pictures.append(np.frombuffer(image.data, np.uint8))
        assert pictures[-1].std() > 10.0
    assert not np.array_equal(*pictures)
    joints = client.newest["/joint_states"]
    assert tuple(joints.name) == JOINTS
    assert client.position_J == pytest.approx(HOME_J, abs=1e-3)
    assert np.array(joints.velocity) == pytest.approx(np.zeros(7), abs=1e-2)
    age_s = time.time() - (joints.header.stamp.sec + joints.header.stamp.nanosec / 1e9)
    assert abs(age_s) < PATIENCE_S, "the same clock"
    scene = sample_scene(5, split="all")
    assert client.status["instruction"] == scene.task.instruction
    assert client.status["target"] == scene.target
    assert [(o["colour"], o["shape"]) for o in client.status["objects"]] == [(o.colour, o.shape) for o in scene.objects]
    assert (client.status["reset_id"], client.status["reached"], client.status["done"]) == (1, None, False)
    assert client.diagnostic("resets") == 1


@pytest.mark.parametrize("arm", [("-p", "use_sim_time:=true")], indirect=True)
def test_in_simulated_time_it_moves_by_the_clock(arm: subprocess.Popen[str]) -> None:
    client = Client(clock_ns=10**12)
    try:
        assert 10**12 < client.stamp_ns <= client.clock_ns
        goal_J = HOME_J + np.array([0.3, -0.1, 0.1, 0.0, 0.1, 0.2, 0.005])
        sent_ns = client.clock_ns
        client.send(list(JOINTS), [(0.3, goal_J)])
        client.until(lambda: bool(np.abs(client.position_J - goal_J).max() < 2e-3), "arrival")
        assert client.stamp_ns > sent_ns + 250_000_000
        client.send(list(JOINTS), [(30.0, HOME_J)])  # on its way when the clock is set back
        client.until(lambda: bool(np.abs(client.position_J - goal_J).max() > 3e-3), "motion")
        client.clock_ns = 10**11
        client.until(lambda: 10**11 + 500_000_000 < client.stamp_ns < 10**12, "half a second of the new time")
        assert client.position_J == pytest.approx(goal_J, abs=2e-2)
        values = [Parameter(name="use_sim_time", value=ParameterValue(type=ParameterType.PARAMETER_BOOL))]
        answer = client.call(client._parameters, SetParametersAtomically.Request(parameters=values)).result
        assert (answer.successful, answer.reason) == (False, "parameter 'use_sim_time': changes only at start")
        seen = client.count["/joint_states"]
        client.until(lambda: client.count["/joint_states"] > seen + 10, "joint states by the same clock")
        assert client.stamp_ns < 10**12
    finally:
        client.close()


def test_it_follows_a_trajectory_and_refuses_a_bad_one(client: Client) -> None:
    goal_J = HOME_J + np.array([0.3, -0.1, 0.1, 0.0, 0.1, 0.2, 0.005])
    order = list(reversed(range(7)))
    client.send([JOINTS[j] for j in order], [(0.3, goal_J[order])])
    client.until(lambda: bool(np.abs(client.position_J - goal_J).max() < 2e-3), "arrival")
    # At least one sample in motion was seen on the way: the velocities are published too.
    client.send([*JOINTS[:-1], "thumb"], [(0.3, HOME_J)])
    client.send(list(JOINTS), [])
    client.until(lambda: client.diagnostic("refused_trajectories") == 2, "count of refusals")
    assert client.position_J == pytest.approx(goal_J, abs=2e-3)


def test_a_reset_builds_the_wanted_scene_and_drops_the_running_trajectory(client: Client) -> None:
    client.send(list(JOINTS), [(1.0, HOME_J + 0.3), (30.0, HOME_J)])
    client.until(lambda: bool(np.abs(client.position_J - HOME_J).max() > 0.1), "motion")
    assert client.set_scene(seed=2**45 + 9, split="train", task="touch the red cube").successful
    answer = client.reset()
    assert answer.success
    status = json.loads(answer.message)
    assert (status["scene_seed"], status["split"], status["instruction"]) == (2**45 + 9, "train", "touch the red cube")
    assert (status["reset_id"], status["time_s"]) == (2, 0.0)
    client.until(lambda: client.status == status, "the same status on the topic")
    seen = client.count["/joint_states"]
    client.until(lambda: client.count["/joint_states"] > seen + 50, "half a second of joint states")
    assert client.position_J == pytest.approx(HOME_J, abs=1e-3)


def test_impossible_scenes_are_refused_and_the_old_one_stays(client: Client) -> None:
    for scene, reason in (
        ({"split": "some"}, "expected one of train, held_out, all"),
        ({"task": "fetch beer"}, "'fetch beer'"),
        ({"seed": -1}, "out of range"),
    ):
        result = client.set_scene(**scene)
        assert not result.successful
        assert reason in result.reason
    assert client.set_scene(split="train", task="touch the red disc").successful  # each alone would be possible
    answer = client.reset()
    assert not answer.success
    assert "never commanded in split 'train'" in answer.message
    assert client.status["reset_id"] == 1


def test_the_judge_sees_what_a_trajectory_touches(client: Client) -> None:
    assert client.set_scene(seed=3, task="touch the blue ball").successful
    assert client.reset().success
    scene = sample_scene(3, split="all", task=Task.parse("touch the blue ball"))
    reference = Demonstrator(World(render=False)).plan(HOME_J, None, scene)
    times_s = np.arange(0.05, reference.duration_s + 0.5, 0.05)
    client.send(list(JOINTS), list(zip(times_s + 0.1, reference.sample(times_s), strict=True)))
    client.until(lambda: client.status["done"], "verdict")
    assert client.status["success"]
    assert client.status["reached"] == client.status["target"]
    assert 0.0 < client.status["time_s"] < 8.0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly(arm: subprocess.Popen[str], client: Client, number: signal.Signals) -> None:
    arm.send_signal(number)
    assert arm.wait(PATIENCE_S) == 0
    assert arm.stderr is not None
    assert arm.stderr.read() == ""


BAD = {
    "unknown parameter": (["-p", "camera_rate:=20.0"], "parameter 'camera_rate' does not exist; expected one of"),
    "whole number for a rate": (["-p", "camera_rate_hz:=20"], "expecting type 'DOUBLE'"),
    "too large an image": (["-p", "image_size:=5000"], "image_size out of range"),
    "unknown split": (["-p", "split:=test"], "split 'test': expected one of train, held_out, all"),
    "unknown task": (["-p", "task:=dance"], "instruction 'dance'"),
    "task against the split": (["-p", "split:=train", "-p", "task:=touch the red disc"], "never commanded"),
    "no such file": (["--params-file", "nowhere.yaml"], "nowhere.yaml"),
    "unknown argument for ROS": (["--fast"], "--fast"),
    "unknown argument": (["-r", "__node:=arm", "--", "--fast"], "error: unrecognized arguments: --fast"),
}


@pytest.fixture(scope="module")
def bad_starts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Exit code and stderr by case; all run at the same time, as starting Python takes longer than failing."""
    environment = {**os.environ, "ROS_LOG_DIR": str(tmp_path_factory.mktemp("log"))}
    processes = {
        name: subprocess.Popen(
            [*COMMAND, "--ros-args", *arguments],
            env=environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for name, (arguments, _) in BAD.items()
    }
    processes["no GL"] = subprocess.Popen(
        COMMAND, env={**environment, "MUJOCO_GL": "crt"}, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    results = {}
    try:
        for name, process in processes.items():
            _, errors = process.communicate()
            results[name] = (process.returncode, errors)
    finally:
        for process in processes.values():
            process.kill()
    return results


@pytest.mark.parametrize("name", [*BAD, "no GL"])
def test_bad_starts_end_with_one_message(bad_starts: dict[str, tuple[int, str]], name: str) -> None:
    code, errors = bad_starts[name]
    message = BAD[name][1] if name in BAD else "MUJOCO_GL='crt'"
    assert code == 2
    assert "Traceback" not in errors
    (line,) = [line for line in errors.splitlines() if line.startswith("sim_arm: ")]
    assert message in line
