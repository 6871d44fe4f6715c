"""Faults of inputs, engine and surroundings, each against the node in its own process and an arm that follows it.

For each fault, every command keeps the joints' limits, the arm comes to rest in time, the cause is named, and the node
continues when the fault is over. KI_VLA_FAULT_TIMES=FILE collects the times to hold (docs/results/node.md).
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rclpy.event_handler import PublisherEventCallbacks
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Empty, String
from support import ROOT
from support.bundles import JOINTS, TASK, demo_policy
from support.robots import PolicyProcess, Robot, ns_of, stamp_of
from support.waiting import until

from ki_vla_ros.runtime.paths import CommandedPath

FAULTY = (str(ROOT / "test" / "support" / "faulty_node.py"),)
# The test bundle's chunks lead anywhere, in the end to a limit: the arm must stay there without refusals.
NODE = {"autostart": True, "instruction": TASK, "limits__on_position": "clamp"}
Start = Callable[..., PolicyProcess]


@pytest.fixture
def fault(tmp_path: Path, ros_environment: dict[str, str]) -> Callable[[str], None]:
    """A function that sets the engine's fault; "" ends it."""
    file = tmp_path / "fault"
    file.write_text("")
    os.environ["FAULT_FILE"] = ros_environment["FAULT_FILE"] = str(file)

    def set_fault(name: str) -> None:
        new = tmp_path / "new"
        new.write_text(name)
        new.replace(file)

    return set_fault


@pytest.fixture
def moving(robot: Robot, start: Start, bundle_path: str, fault: Any) -> Iterator[PolicyProcess]:
    """A node that moves an arm; at the end every command is checked."""
    robot.follows = True
    policy = start(program=FAULTY, **NODE, bundle=bundle_path, ramp_in_s=0.0)
    until(lambda: moves(robot) and not rest(robot))
    yield policy
    assert_commands_within_limits(robot)
    assert robot.refused == []


def moves(robot: Robot) -> bool:
    fresh = robot.times_s and time.monotonic() - robot.times_s[-1] < 0.3
    return bool(fresh and robot.ticks and robot.ticks[-1]["hold"] is None)


def rest(robot: Robot) -> bool:
    """Whether the arm is commanded to stand still, now and for the next quarter of a second."""
    now_ns = robot.now_ns()
    speeds = [robot.controller.sample(now_ns + ms * 1_000_000)[1] for ms in (0, 60, 120, 250)]
    return not np.any(np.abs(speeds) > 1e-3)


def comes_to_rest(robot: Robot, name: str, start_s: float) -> None:
    """Waits until the arm rests; test/unit/runtime/test_loop_holds.py checks how soon, as this machine may be busy."""
    until(lambda: rest(robot), "the arm to rest")
    if file := os.environ.get("KI_VLA_FAULT_TIMES"):
        with open(file, "a") as times:
            times.write(f"{name}\t{time.monotonic() - start_s:.2f}\n")


def assert_commands_within_limits(robot: Robot) -> None:
    joints = demo_policy().axes
    lower, upper = np.array([j.lower for j in joints]), np.array([j.upper for j in joints])
    speed = np.array([j.max_velocity for j in joints])
    assert robot.commands
    for command in robot.commands:
        position = np.array([p.positions for p in command.points])
        velocity = np.array([p.velocities for p in command.points])
        assert np.all(position >= lower - 1e-6) and np.all(position <= upper + 1e-6)
        assert np.all(np.abs(velocity) <= speed * (1 + 1e-6)) and not velocity[-1].any()


# --- cameras and joints

INPUTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "cameras stop": ({"imaging": False}, {"imaging": True}, "max_age_s); is /"),
    "cameras lag by 400 ms": ({"image_delay_ns": 400_000_000}, {"image_delay_ns": 0}, "ms old, limit 250 ms"),
    "an encoding nobody reads": (
        {"encoding": "32FC1"},
        {"encoding": "rgb8"},
        "image encoding '32FC1'",  # cv_bridge, where it is installed, refuses it in other words
    ),
    "joint states stop": ({"stating": False}, {"stating": True}, "joint state: "),
    "a joint is missing": ({"joint_names": list(JOINTS[:-1])}, {"joint_names": list(JOINTS)}, "gripper missing among"),
    "joints of another robot": ({"joint_names": list("abcdefg")}, {"joint_names": list(JOINTS)}, "missing among a, b"),
}


@pytest.mark.parametrize("name", INPUTS)
def test_failing_inputs(moving: PolicyProcess, robot: Robot, name: str) -> None:
    broken, mended, cause = INPUTS[name]
    start_s = time.monotonic()
    for field, value in broken.items():
        setattr(robot, field, value)
    comes_to_rest(robot, name, start_s)
    robot.wait_for_hold(cause)
    until(lambda: robot.diagnostics and any("refused" in v.key for v in robot.diagnostics[-1].status[0].values))
    for field, value in mended.items():
        setattr(robot, field, value)
    until(lambda: moves(robot))


def test_frozen_cameras(moving: PolicyProcess, robot: Robot) -> None:
    """The cameras go on sending, always with the same stamp."""
    start_s = time.monotonic()
    robot.frozen = robot.node.get_clock().now().to_msg()
    comes_to_rest(robot, "cameras freeze", start_s)
    robot.wait_for_hold("newest frame")
    robot.frozen = None
    until(lambda: moves(robot))


@pytest.mark.parametrize("value, cause", [(float("nan"), "expected a finite position, got nan"), (57.3, "in degrees?")])
def test_impossible_joint_states(moving: PolicyProcess, robot: Robot, value: float, cause: str) -> None:
    robot.follows = False
    good, start_s = list(robot.position), time.monotonic()
    robot.position = [value, *good[1:]]
    comes_to_rest(robot, f"joint position {value}", start_s)
    robot.wait_for_hold(cause)
    robot.position = good
    robot.follows = True
    until(lambda: moves(robot))


def test_a_second_publisher_of_joint_states(moving: PolicyProcess, robot: Robot) -> None:
    """A forgotten joint_state_publisher sends zeros, as often as the arm is read."""
    publisher = robot.node.create_publisher(JointState, "joint_states", 10)
    start_s = time.monotonic()

    def send_zeros() -> None:
        message = JointState(name=list(JOINTS), position=[0.0] * len(JOINTS))
        message.header.stamp = robot.node.get_clock().now().to_msg()
        publisher.publish(message)

    timer = robot.node.create_timer(0.01, send_zeros)
    robot.wait_for_hold("expected one arm on /joint_states, got readings of two places in turn")
    comes_to_rest(robot, "a second publisher of joint states", start_s)
    until(lambda: robot.diagnosed("refused joint state that jumps"))
    timer.cancel()
    until(lambda: moves(robot))


def test_stamps_from_the_future(moving: PolicyProcess, robot: Robot) -> None:
    """One joint state and nine images of an hour ahead: counted, and nothing is held because of them."""
    ahead = stamp_of(robot.now_ns() + 3_600_000_000_000)
    state = JointState(name=list(JOINTS), position=[0.0] * len(JOINTS))
    image = Image(height=96, width=96, step=288, encoding="rgb8", data=bytes(96 * 96 * 3))
    state.header.stamp = image.header.stamp = ahead
    robot.joints.publish(state)
    for _ in range(9):
        robot.image["scene"].publish(image)
        time.sleep(0.01)
    for subject in ("joint state", "camera 'scene'"):
        until(lambda subject=subject: robot.diagnosed(f"refused {subject} from the future"))
    until(lambda: [tick["hold"] for tick in robot.ticks[-5:]] == [None] * 5, "five ticks without a hold")


def test_joints_and_frames_may_come_in_another_order(moving: PolicyProcess, robot: Robot) -> None:
    robot.follows = False
    order = list(range(7))[::-1]
    robot.position, robot.joint_names = [robot.position[i] for i in order], [JOINTS[i] for i in order]
    since, draw = len(robot.ticks), random.Random(0)

    def eight_ticks_without_a_hold() -> bool:
        robot.image_delay_ns = 60_000_000 * draw.randrange(3)
        return [tick["hold"] for tick in robot.ticks[since:][-8:]] == [None] * 8

    until(eight_ticks_without_a_hold, "eight ticks without a hold")


# --- the engine


@pytest.mark.parametrize(
    "name, cause",
    [
        ("raises", "engine: it broke"),
        ("crashes", "internal error: ZeroDivisionError"),
        ("nan", "NaN or infinity"),
        ("shape", "internal error"),
        ("hangs", ""),
    ],
)
def test_engine_faults(moving: PolicyProcess, robot: Robot, fault: Any, name: str, cause: str) -> None:
    start_s = time.monotonic()
    fault(name)
    comes_to_rest(robot, f"engine {name}", start_s)
    if cause:
        robot.wait_for_hold(cause)
    else:
        until(lambda: robot.diagnosed("refused watchdog"))
    fault("")
    until(lambda: moves(robot))


def test_inference_slower_than_the_period_continues_and_is_counted(
    moving: PolicyProcess, robot: Robot, fault: Any
) -> None:
    fault("slow")
    count = len(robot.commands)
    until(lambda: len(robot.commands) > count + 5 and robot.ticks[-1]["deadline_misses"] > 0)
    until(lambda: {tick["hold"] for tick in robot.ticks[-4:]} == {None}, "four ticks without a hold")


# --- stop, reset, death


def test_a_stop_is_latched(moving: PolicyProcess, robot: Robot) -> None:
    start_s = time.monotonic()
    assert robot.trigger("stop") == (True, "stopped until ~/reset")
    comes_to_rest(robot, "~/stop (service)", start_s)
    robot.wait_for_hold("stopped: by the service ~/stop")
    time.sleep(0.5)
    assert rest(robot)
    assert robot.trigger("reset") == (True, "released")
    assert robot.trigger("reset") == (False, "no stop was in force")
    until(lambda: moves(robot))
    publisher = robot.node.create_publisher(Empty, "policy/stop", 10)
    until(lambda: publisher.get_subscription_count())
    start_s = time.monotonic()
    publisher.publish(Empty())
    comes_to_rest(robot, "~/stop (topic)", start_s)
    robot.wait_for_hold("stopped: by the topic ~/stop")


@pytest.mark.parametrize("stopped_while", ["active", "unconfigured"])
def test_a_stop_outlives_every_transition(moving: PolicyProcess, robot: Robot, stopped_while: str) -> None:
    for state, step in (("active", "deactivate"), ("inactive", "cleanup"), ("unconfigured", "configure")):
        if state == stopped_while:
            assert robot.trigger("stop") == (True, "stopped until ~/reset")
        assert robot.change(step)
    until(lambda: "stopped: by the service ~/stop; call ~/reset" in robot.diagnostics[-1].status[0].message)
    assert robot.change("activate")
    count, ticks = len(robot.commands), len(robot.ticks)
    until(lambda: len(robot.ticks) > ticks + 5)
    assert "stopped: by the service ~/stop" in robot.hold and len(robot.commands) == count
    assert robot.trigger("reset") == (True, "released")
    until(lambda: moves(robot))


def test_killed_and_started_again(moving: PolicyProcess, robot: Robot, start: Start, bundle_path: str) -> None:
    """No node is left to hold the arm, but each command ends at rest by itself."""
    start_s = time.monotonic()
    moving.process.send_signal(signal.SIGKILL)
    comes_to_rest(robot, "SIGKILL", start_s)
    moving.wait()
    count = len(robot.commands)
    start(**NODE, bundle=bundle_path)
    until(lambda: len(robot.commands) > count + 3 and moves(robot))


def test_log_output_to_a_full_disk(robot: Robot, start: Start, bundle_path: str, fault: Any) -> None:
    robot.follows = True
    start(program=FAULTY, output=Path("/dev/full"), **NODE, bundle=bundle_path)
    until(lambda: moves(robot))
    fault("raises")  # now it wants to log
    robot.wait_for_hold("engine: it broke")
    fault("")
    until(lambda: moves(robot))
    assert_commands_within_limits(robot)


# --- floods, transitions, clocks


def test_floods_of_instructions_and_parameters(moving: PolicyProcess, robot: Robot) -> None:
    publisher = robot.node.create_publisher(String, "policy/instruction", 10)
    until(lambda: publisher.get_subscription_count())
    count = len(robot.commands)
    for n in range(2000):
        publisher.publish(String(data=TASK if n % 2 else "touch the " + "red " * (n % 60) + "cube"))
        time.sleep(0.001)
    for n in range(60):
        robot.set(execution_horizon_s=0.1 + 0.1 * (n % 3), limits__velocity_scale=1.0 if n % 2 else 0.5)
    until(lambda: len(robot.commands) > count + 10 and moves(robot))


def test_transitions_in_every_order(robot: Robot, start: Start, bundle_path: str) -> None:
    robot.follows = True
    policy = start(bundle=bundle_path, instruction=TASK, limits__on_position="clamp")
    may = {
        "unconfigured": {"configure": "inactive"},
        "inactive": {"activate": "active", "cleanup": "unconfigured"},
        "active": {"deactivate": "inactive"},
    }
    state, draw = "unconfigured", random.Random(0)
    for _ in range(30):
        label = draw.choice(["configure", "activate", "deactivate", "cleanup"])
        allowed = label in may[state]
        assert robot.change(label) == allowed, (state, label)
        state = may[state].get(label, state)
        assert robot.state == state
        if state == "active":
            time.sleep(0.25)
    assert policy.stop() == 0, policy.output
    until(lambda: rest(robot))
    assert_commands_within_limits(robot)


def test_clock_jumps(robot: Robot, start: Start, bundle_path: str) -> None:
    robot.follows = True
    robot.clock_ns = 10**12
    policy = start(**NODE, bundle=bundle_path, use_sim_time=True)
    until(lambda: moves(robot))
    robot.clock_ns -= 100 * 10**9
    robot.controller.hold(np.array(robot.position))
    until(lambda: "clock: it was set back" in policy.output)
    count = len(robot.commands)
    until(lambda: len(robot.commands) > count + 5 and moves(robot))
    robot.clock_ns += 100 * 10**9
    count = len(robot.commands)
    until(lambda: len(robot.commands) > count + 5 and moves(robot))
    assert_commands_within_limits(robot)


def test_a_process_that_stands_still_sends_no_step(robot: Robot, start: Start, bundle_path: str) -> None:
    """Stopped at any moment and for any time: what it sends then goes on from what the controller did meanwhile.

    The stamps of `splice` say when each command counts from, so the machine's own delays are not in the way.
    """
    robot.follows = True
    policy = start(**NODE, bundle=bundle_path, publish_mode="splice", ramp_in_s=0.0)
    until(lambda: moves(robot))
    draw = random.Random(0)
    for _ in range(20):
        time.sleep(draw.uniform(0.05, 0.35))
        policy.process.send_signal(signal.SIGSTOP)
        time.sleep(draw.choice([0.005, 0.02, 0.05, 0.15, 0.3]))
        policy.process.send_signal(signal.SIGCONT)
    count = len(robot.commands)
    until(lambda: len(robot.commands) > count + 3 and moves(robot))
    assert_commands_within_limits(robot)
    path, continued = CommandedPath(JOINTS, np.array(robot.commands[0].points[0].positions)), 0
    for command in list(robot.commands):
        first_ns = ns_of(command.header.stamp) + ns_of(command.points[0].time_from_start)
        position_J, velocity_J = path.sample(first_ns)
        if np.any(velocity_J):  # otherwise it may lead to where the arm is
            continued += 1
            np.testing.assert_allclose(command.points[0].positions, position_J, atol=3e-4)  # 0.1 ms
            np.testing.assert_allclose(command.points[0].velocities, velocity_J, atol=2e-3)
        path.take(command, ns_of(command.header.stamp))
    assert continued > 20


def test_an_incompatible_publisher_is_named(moving: PolicyProcess, robot: Robot) -> None:
    unreliable = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
    quiet = PublisherEventCallbacks(use_default_callbacks=False)  # rclpy's own callback uses what rclpy deprecates
    robot.node.create_publisher(String, "policy/instruction", unreliable, event_callbacks=quiet)
    until(lambda: "/policy/instruction: a publisher's reliability does not fit" in moving.output)
    until(lambda: robot.diagnosed("refused incompatible QoS on /policy/instruction"))


# --- what else a node can be told


def test_streamed_positions_move_the_arm(robot: Robot, start: Start, bundle_path: str) -> None:
    from std_msgs.msg import Float64MultiArray

    got: list[list[float]] = []

    def take(message: Float64MultiArray) -> None:
        got.append(list(message.data))
        robot.controller.take(message, robot.now_ns())

    robot.follows = True  # after an interruption, which a busy machine may cause, it must be where it was sent
    robot.node.create_subscription(Float64MultiArray, "forward", take, 100)
    policy = start(**NODE, bundle=bundle_path, publish_mode="stream", command_topic="forward")
    until(lambda: len(got) > 100)
    assert len(got) > 2 * len(robot.ticks), "50 positions per second between 10 ticks"
    # A busy machine skips some positions, and the next step is then longer; test_seams.py checks every step.
    steps = np.quantile(np.abs(np.diff(got, axis=0)), 0.9, axis=0)
    assert np.any(steps > 0) and np.all(steps <= np.array([j.max_velocity for j in demo_policy().axes]) * 0.12)
    assert policy.stop() == 0, policy.output


def test_spliced_commands_say_when_their_times_begin(robot: Robot, start: Start, bundle_path: str) -> None:
    robot.follows = True
    start(**NODE, bundle=bundle_path, publish_mode="splice")
    until(lambda: len(robot.commands) > 10)
    for command in robot.commands:
        assert ns_of(command.header.stamp) > 0
    assert_commands_within_limits(robot)


def test_compressed_images_and_receive_time(robot: Robot, start: Start, bundle_path: str) -> None:
    import cv2
    from rclpy.qos import qos_profile_sensor_data
    from sensor_msgs.msg import CompressedImage

    robot.imaging = False
    _, jpeg = cv2.imencode(".jpg", np.full((96, 96, 3), 90, np.uint8))
    wrist = robot.node.create_publisher(CompressedImage, "camera/wrist/image_raw/compressed", qos_profile_sensor_data)
    scene = robot.node.create_publisher(CompressedImage, "scene_jpeg", qos_profile_sensor_data)
    robot.node.create_timer(
        0.05, lambda: [p.publish(CompressedImage(format="jpeg", data=jpeg.tobytes())) for p in (wrist, scene)]
    )  # without stamps
    start(
        **NODE, bundle=bundle_path, use_receive_time=True,
        cameras__wrist__transport="compressed", cameras__scene__transport="compressed",
        cameras__scene__topic="scene_jpeg",
    )  # fmt: skip
    until(lambda: moves(robot))
