"""A robot's outputs on real Fast DDS: each gets its part, one that fails stops all, velocities end at 0."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import rclpy
from geometry_msgs.msg import PoseStamped, TwistStamped
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode
from rclpy.serialization import deserialize_message
from std_msgs.msg import Float64MultiArray
from support.bundles import TASK, mixed_policy, mixed_robot, write_test_bundle
from support.robots import PolicyProcess, is_hold, stamp_of
from support.robots import Robot as World
from support.waiting import until
from trajectory_msgs.msg import JointTrajectory

from ki_vla_ros.errors import ConfigurationError, SafetyRefusal
from ki_vla_ros.messages.encoding import encode_command
from ki_vla_ros.records import Motion, MotionInterrupted
from ki_vla_ros.robot.commands import CommandSpace
from ki_vla_ros.robot.robot import Robot
from ki_vla_ros.robot.rotations import from_vector, multiply
from ki_vla_ros.ros.outputs import as_written, open_stream_output
from ki_vla_ros.ros.stream import Sample
from ki_vla_ros.ros.topics import NodeWire
from ki_vla_ros.runtime.paths import CommandedAxes
from ki_vla_ros.runtime.shadow import ShadowComparison
from ki_vla_ros.settings.names import settings_from_parameters
from ki_vla_ros.settings.session import read_session

MS = 1_000_000
PERIOD_S = 0.02
TOPICS: dict[str, tuple[str, Any]] = {
    "arm": ("arm/joint_trajectory", JointTrajectory),
    "hand": ("hand/joint_trajectory", JointTrajectory),
    "slide": ("slide/commands", Float64MultiArray),
    "base": ("cmd_vel", TwistStamped),
    "tool": ("tool/target", PoseStamped),
}
ROBOT = Robot.model_validate(mixed_robot())
ACCELERATION_J = np.where([axis.kind == "velocity" for axis in ROBOT.axes], 4.0, 10.0)
REFERENCE = from_vector(np.array([0.3, 0.0, 0.0]))
SLIDE_SPEED, FORWARD_SPEED = 0.4, -0.3


def motion(at_ns: int, seconds: float = 0.4) -> Motion:
    """Every axis moves: joints and tool at 0.1 per second, the slide and the base up to their speeds."""
    ramp, whole = round(0.1e9), round(seconds * 1e9)
    time_N = at_ns + np.array([0, ramp, whole - ramp, whole])
    speed_J = np.full(len(ROBOT.axes), 0.1)
    speed_J[3:6] = SLIDE_SPEED, FORWARD_SPEED, 0.0
    velocity_NJ = np.outer([0, 1, 1, 0], speed_J)
    gone_N = np.cumsum(np.concatenate([[0.0], (np.array([1, 2, 1]) / 2 * np.diff(time_N)) / 1e9]))
    position_NJ = np.outer(gone_N, speed_J)
    return Motion(ROBOT.axis_names, at_ns, time_N, position_NJ, velocity_NJ, REFERENCE[None])


class Rig:
    """A lifecycle node with the wire, and a subscriber of each of the robot's topics."""

    def __init__(self, domain: int) -> None:
        self.context = rclpy.Context()
        rclpy.init(context=self.context, domain_id=domain)
        self.node = LifecycleNode("policy", context=self.context)
        self.robot = rclpy.create_node("robot", context=self.context)
        self.got: dict[str, list[Any]] = {name: [] for name in TOPICS}
        for name, (topic, kind) in TOPICS.items():
            self.robot.create_subscription(kind, topic, self.got[name].append, 500)
        self.refused: list[str] = []
        self.wires: list[NodeWire] = []
        self._executor = SingleThreadedExecutor(context=self.context)
        self._executor.add_node(self.robot)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._spin)
        self._thread.start()

    def _spin(self) -> None:
        while not self._closing.is_set():
            self._executor.spin_once(timeout_sec=0.05)

    def wire(self, robot: Robot = ROBOT, **parameters: object) -> NodeWire:
        """The wire of an active node."""
        settings = settings_from_parameters({"command_period_s": PERIOD_S, **parameters})
        shadow = ShadowComparison(CommandSpace(robot), "command") if settings.shadow else None
        wire = NodeWire(self.node, robot, settings, ACCELERATION_J[: len(robot.axes)], shadow, self.refused.append)
        self.wires.append(wire)
        self.node.trigger_configure()
        self.node.trigger_activate()
        return wire

    def discovered(self) -> None:
        until(lambda: all(self.node.count_subscribers(topic) for topic, _ in TOPICS.values()))
        time.sleep(0.2)  # discovery is not done on both sides at once

    def close(self) -> None:
        for wire in self.wires:
            wire.close()
        self._closing.set()
        self._thread.join()
        self._executor.shutdown()
        self.node.destroy_node()
        self.robot.destroy_node()
        rclpy.shutdown(context=self.context)


@pytest.fixture
def rig(ros_environment: dict[str, str]) -> Iterator[Rig]:
    rig = Rig(int(ros_environment["ROS_DOMAIN_ID"]))
    yield rig
    rig.close()


def velocities(rig: Rig) -> tuple[list[float], list[float]]:
    return velocities_of(rig.got)


def assert_gentle(values: list[float]) -> None:
    assert np.abs(np.diff([0.0, *values])).max() <= 4.0 * PERIOD_S * (1 + 1e-5)


def test_every_output_gets_its_part_of_a_motion(rig: Rig) -> None:
    wire = rig.wire()
    rig.discovered()
    told = motion(wire.motion_ns())
    wire.send_command(told, wire.motion_ns())
    wire.wait_until_received()
    until(lambda: all(rig.got.values()) and velocities(rig)[1][-3:] == [0.0] * 3)
    (arm,), (hand,) = rig.got["arm"], rig.got["hand"]
    assert arm.joint_names == ["shoulder", "elbow"] and hand.joint_names == ["gripper"]
    for message, columns in ((arm, slice(0, 2)), (hand, slice(2, 3))):
        np.testing.assert_allclose([p.positions for p in message.points], told.position_NJ[1:, columns])
        np.testing.assert_allclose([p.velocities for p in message.points], told.velocity_NJ[1:, columns])
    slide, forward = velocities(rig)
    assert max(slide) == pytest.approx(SLIDE_SPEED) and min(forward) == pytest.approx(FORWARD_SPEED)
    for values in (slide, forward):
        assert_gentle(values)
        assert values[-3:] == [0.0] * 3
    twist = rig.got["base"][len(forward) // 2]
    assert twist.header.frame_id == "base" and twist.header.stamp.sec > 0
    assert twist.twist.linear.y == twist.twist.angular.x == 0.0
    pose = rig.got["tool"][-1]
    assert pose.header.frame_id == "world"
    place, turned = pose.pose.position, pose.pose.orientation
    np.testing.assert_allclose([place.x, place.y, place.z], told.position_NJ[-1, 6:9])
    expected = multiply(REFERENCE, from_vector(told.position_NJ[-1, 9:12]))
    np.testing.assert_allclose([turned.x, turned.y, turned.z, turned.w], expected, atol=1e-9)


def test_what_goes_out_in_other_units_means_the_same(rig: Rig) -> None:
    """Motion to messages and, by an onlooker of the same robot file, back."""
    fields, writing = mixed_robot(), {"shoulder": {"unit": "deg"}, "elbow": {"unit": "deg", "sign": -1, "offset": 0.5}}
    writing |= {"gripper": {"unit": "mm"}, "slide": {"unit": "mm/s"}, "forward": {"sign": -1}}
    for action in fields["actions"]:
        action |= {"command": writing[action["name"]]} if action["name"] in writing else {}
    robot, told = Robot.model_validate(fields), motion(0)
    space, axes, k = CommandSpace(robot), CommandedAxes(robot), len(told.time_N) // 2
    written = as_written(told, robot.command_lines)
    np.testing.assert_allclose(np.degrees(told.position_NJ[:, 0]), written.position_NJ[:, 0])
    for output, kind in (("arm", JointTrajectory), ("hand", JointTrajectory)):
        place = robot.axes_of(next(o for o in robot.outputs if o.name == output))
        message = deserialize_message(encode_command(written, int(told.time_N[0]), 0, place), kind)
        axes.take(output, message, int(told.time_N[0]), told.position_NJ[0])
    np.testing.assert_allclose(axes.at(told.time_N[[k]])[0, :3], told.position_NJ[k, :3], atol=1e-9)
    position_J, velocity_J = told.at(int(told.time_N[k]))
    for name, kind in (("slide", Float64MultiArray), ("base", TwistStamped)):
        output = next(o for o in robot.outputs if o.name == name)
        stream = open_stream_output(rig.node, output, str(output.type), f"written/{name}", space, lambda: 7)
        message = deserialize_message(stream._encode(Sample(position_J, velocity_J, told.reference_P4)), kind)
        axes.take(name, message, 0)
        stream.close()
    np.testing.assert_allclose(axes.velocities(np.array([1]))[0, 3:6], velocity_J[3:6], atol=1e-12)


def test_while_a_velocity_is_not_0_the_node_brakes_it_before_it_lets_go(rig: Rig) -> None:
    wire = rig.wire()
    rig.discovered()
    wire.send_command(motion(wire.motion_ns(), seconds=30.0), wire.motion_ns())
    until(lambda: velocities(rig)[0][-1:] == [pytest.approx(SLIDE_SPEED)])
    wire.close()
    rig.wires.clear()
    until(lambda: velocities(rig)[1][-3:] == [0.0] * 3 and velocities(rig)[0][-3:] == [0.0] * 3)
    for values in velocities(rig):
        assert_gentle(values)


def test_if_an_output_cannot_be_told_after_another_was_that_is_said_of_each_axis(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire = rig.wire()
    _, hand = wire._motions

    def broken(prepared: bytes, motion: Motion) -> None:
        raise RuntimeError("the middleware is gone")

    monkeypatch.setattr(hand, "send", broken)
    told = motion(wire.motion_ns())
    with pytest.raises(MotionInterrupted, match="output 'hand': not told: RuntimeError") as raised:
        wire.send_command(told, wire.motion_ns())
    assert raised.value.motion is told
    names = [axis.name for axis, there in zip(ROBOT.axes, raised.value.axis_J, strict=True) if there]
    assert names == [axis.name for axis in ROBOT.axes if axis.name != "gripper"]
    # A hold goes to those behind it all the same.
    rig.discovered()
    monkeypatch.undo()
    arm, hand = wire._motions
    monkeypatch.setattr(arm, "send", broken)
    before = len(rig.got["hand"])
    with pytest.raises(MotionInterrupted, match="output 'arm': not told"):
        wire.send_command(told, wire.motion_ns(), hold=True)
    until(lambda: len(rig.got["hand"]) == before + 1)


def test_a_stream_that_fails_interrupts_every_streamed_axis(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    wire = rig.wire()
    rig.discovered()
    wire.send_command(motion(wire.motion_ns(), seconds=30.0), wire.motion_ns())
    until(lambda: velocities(rig)[0][-1:] == [pytest.approx(SLIDE_SPEED)])
    slide = next(output for output in wire._outputs if output.axes == slice(3, 4))
    send, broken = slide.send, [True]

    def fail(sample: Any) -> None:
        if broken[0]:
            raise RuntimeError("the middleware is gone")
        send(sample)

    monkeypatch.setattr(slide, "send", fail)
    found: list[MotionInterrupted] = []
    until(lambda: found or [found.append(i) for i in [wire.take_interruption()] if i is not None])
    assert found[0].axis_J.tolist() == [False] * 3 + [True] * 9
    # Those behind it are braked all the same, and it is as soon as it can be.
    until(lambda: velocities(rig)[1][-3:] == [0.0] * 3)
    assert velocities(rig)[0][-1] == pytest.approx(SLIDE_SPEED)
    broken[0] = False
    until(lambda: velocities(rig)[0][-3:] == [0.0] * 3)
    for values in velocities(rig):
        assert_gentle(values)


@pytest.mark.parametrize(
    ("output", "topic", "other"),
    [
        (4, "/tool_pose", "'tool': expected a topic of its own, got /tool_pose, but the robot's state is read from it"),
        (1, "/arm/joint_trajectory", "'arm': .* got /arm/joint_trajectory, but output 'hand' has it, too"),
    ],
)
def test_topics_that_only_differ_as_written_are_refused(rig: Rig, output: int, topic: str, other: str) -> None:
    fields = mixed_robot()
    fields["outputs"][output]["topic"] = topic
    with pytest.raises(ConfigurationError, match=other):
        rig.wire(Robot.model_validate(fields))
    assert not rig.node.count_publishers("cmd_vel")


def test_a_shadow_says_each_output_apart_and_tells_no_controller(rig: Rig) -> None:
    fields = mixed_robot()
    fields["outputs"][1] |= {"topic": "hand/grip", "type": "control_msgs/action/GripperCommand"}
    robot = Robot.model_validate(fields)  # a shadow has no use for control_msgs
    heard: dict[str, list[Any]] = {name: [] for name in TOPICS}
    for name, (_, kind) in TOPICS.items():
        rig.robot.create_subscription(kind, f"policy/shadow/{name}", heard[name].append, 500)
    wire = rig.wire(robot, shadow=True)
    until(lambda: all(rig.node.count_subscribers(f"policy/shadow/{name}") for name in TOPICS))
    time.sleep(0.2)
    wire.send_command(motion(wire.motion_ns()), wire.motion_ns())
    wire.wait_until_received()
    until(lambda: all(heard.values()))
    assert heard["hand"][0].joint_names == ["gripper"]
    assert not any(rig.node.count_publishers(topic) for topic, _ in TOPICS.values())
    assert not any(rig.got.values())


# --- the whole node


def test_one_tick_fills_all_outputs_and_a_hold_and_the_end_reach_all(
    ros_environment: dict[str, str], start: Callable[..., PolicyProcess], tmp_path: Path
) -> None:
    write_test_bundle(tmp_path / "bundle", mixed_policy())
    world = World(int(ros_environment["ROS_DOMAIN_ID"]))
    got: dict[str, list[Any]] = {name: [] for name in TOPICS}
    for name, (topic, kind) in TOPICS.items():
        world.node.create_subscription(kind, topic, got[name].append, 500)
    world.joint_names, world.position = ["slide", "gripper", "elbow", "shoulder"], [0.0, 0.02, 0.3, -0.3]
    pose = world.node.create_publisher(PoseStamped, "tool_pose", 10)

    def say_pose() -> None:
        message = PoseStamped()
        message.header.stamp = stamp_of(world.now_ns())
        message.pose.position.z, message.pose.orientation.w = 0.5, 1.0
        pose.publish(message)

    world.node.create_timer(0.01, say_pose)
    try:
        settings = {"limits.max_jump_s": 10.0, "limits.velocity_scale": 0.5}
        policy = start(bundle=str(tmp_path / "bundle"), autostart=True, instruction=TASK, **settings)
        until(lambda: all(len(messages) > 5 for messages in got.values()), policy.output)
        arm, hand = list(got["arm"]), list(got["hand"])
        assert arm[0].joint_names == ["shoulder", "elbow"] and hand[0].joint_names == ["gripper"]
        # One tick fills both: their trajectories have the same points in time.
        for one, other in zip(arm, hand, strict=False):
            assert [p.time_from_start for p in one.points] == [p.time_from_start for p in other.points]
        until(lambda: any(abs(message.data[0]) > 1e-3 for message in got["slide"]))
        assert world.trigger("stop")[0]
        until(lambda: velocities_of(got)[0][-3:] == [0.0] * 3 and velocities_of(got)[1][-3:] == [0.0] * 3)
        assert is_hold(got["arm"][-1]) and is_hold(got["hand"][-1])
        assert world.trigger("reset")[0]
        count = len(got["slide"])
        until(lambda: len(got["slide"]) > count + 20 and abs(got["slide"][-1].data[0]) > 1e-3)
        until(lambda: world.sessions)
        commands = read_session(world.sessions[-1]).topics.commands
        assert {name: f"/{topic}" for name, (topic, _) in TOPICS.items()} == {n: c.topic for n, c in commands.items()}
        until(lambda: world.diagnosed("output base") == "/cmd_vel")
        assert world.change("deactivate")
        until(lambda: velocities_of(got)[0][-3:] == [0.0] * 3 and velocities_of(got)[1][-3:] == [0.0] * 3)
        for values in velocities_of(got):
            assert np.abs(np.diff(values)).max() <= 0.6 / 0.15 * PERIOD_S * (1 + 1e-5)
        assert policy.stop() == 0, policy.output
        assert "takes velocities: if this process dies" in policy.output
    finally:
        world.close()


def velocities_of(got: dict[str, list[Any]]) -> tuple[list[float], list[float]]:
    return [m.data[0] for m in got["slide"]], [m.twist.linear.x for m in got["base"]]


# --- actions, whose messages (control_msgs) are not among the wheels


class Goal:
    def __init__(self) -> None:
        self.trajectory: Any = None
        self.command = SimpleNamespace(position=0.0, max_effort=0.0)


class Client:
    """Stands in for rclpy's ActionClient: the test answers."""

    made: dict[str, Client]

    def __init__(self, node: LifecycleNode, kind: Any, name: str) -> None:
        self.ready, self.goals = True, []  # type: ignore[var-annotated]
        self.answer: list[Callable[[Any], None]] = []
        self.result: list[Callable[[Any], None]] = []
        Client.made[name] = self

    def server_is_ready(self) -> bool:
        return self.ready

    def wait_for_server(self, seconds: float) -> bool:
        return self.ready

    def send_goal_async(self, goal: Goal) -> Any:
        self.goals.append(goal)
        return SimpleNamespace(add_done_callback=self.answer.append)

    def respond(self, accepted: bool) -> None:
        future = SimpleNamespace(add_done_callback=self.result.append)
        handle = SimpleNamespace(accepted=accepted, get_result_async=lambda: future)
        self.answer[-1](SimpleNamespace(result=lambda: handle))

    def finish(self, status: int) -> None:
        answer = SimpleNamespace(status=status, result=SimpleNamespace(error_string="path tolerance"))
        self.result[-1](SimpleNamespace(result=lambda: answer))

    def destroy(self) -> None: ...


def action_robot() -> Robot:
    """The mixed robot's arm and gripper, by actions."""
    fields = mixed_robot()
    fields["outputs"] = [
        {"name": "arm", "topic": "arm/follow", "type": "control_msgs/action/FollowJointTrajectory"},
        {"name": "hand", "topic": "hand/grip", "type": "control_msgs/action/GripperCommand", "max_effort": 5.0},
    ]
    fields["actions"] = fields["actions"][:3]
    return Robot.model_validate(fields)


@pytest.fixture
def control_msgs(monkeypatch: pytest.MonkeyPatch) -> None:
    package, action = ModuleType("control_msgs"), ModuleType("control_msgs.action")
    kind = SimpleNamespace(Goal=Goal)
    package.action = action  # type: ignore[attr-defined]
    action.FollowJointTrajectory = action.GripperCommand = kind  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "control_msgs", package)
    monkeypatch.setitem(sys.modules, "control_msgs.action", action)
    monkeypatch.setattr("rclpy.action.client.ActionClient", Client)
    Client.made = {}


def first_three(seconds: float = 0.4, at_ns: int = 1_000 * MS, share: float = 1.0) -> Motion:
    whole = motion(at_ns, seconds)
    position_NJ, velocity_NJ = (part[:, :3] * share for part in (whole.position_NJ, whole.velocity_NJ))
    return Motion(whole.joints[:3], at_ns, whole.time_N, position_NJ, velocity_NJ)


@pytest.mark.usefixtures("control_msgs")
def test_goals_go_to_actions_and_a_gripper_gets_one_only_when_its_end_changes(rig: Rig) -> None:
    wire = rig.wire(action_robot())
    arm, hand = Client.made["arm/follow"], Client.made["hand/grip"]
    told = first_three()
    wire.send_command(told, 1_000 * MS)
    wire.send_command(first_three(share=1.001), 1_000 * MS)
    wire.send_command(first_three(share=1.1), 1_000 * MS)
    assert len(arm.goals) == 3 and len(hand.goals) == 2
    assert arm.goals[0].trajectory.joint_names == ["shoulder", "elbow"]
    np.testing.assert_allclose([p.positions for p in arm.goals[0].trajectory.points], told.position_NJ[1:, :2])
    assert hand.goals[0].command.position == pytest.approx(told.position_NJ[-1, 2])
    assert hand.goals[1].command.max_effort == 5.0
    wire.wait_until_received()
    wire.send_command(first_three(share=1.1), 1_000 * MS)
    assert len(hand.goals) == 3  # after a deactivation nobody knows where it is


@pytest.mark.usefixtures("control_msgs")
def test_a_rejected_goal_leaves_the_one_before_in_force(rig: Rig) -> None:
    wire = rig.wire(action_robot())
    arm, hand = Client.made["arm/follow"], Client.made["hand/grip"]
    before = first_three()
    wire.send_command(before, 1_000 * MS)
    arm.respond(accepted=True)
    hand.respond(accepted=True)
    assert wire.take_interruption() is None
    wire.send_command(first_three(share=0.5), 1_000 * MS)
    arm.respond(accepted=False)
    found = wire.take_interruption()
    assert found is not None and str(found) == "output 'arm': arm/follow: goal rejected by the controller"
    assert found.motion is before and found.axis_J.tolist() == [True, True, False]
    assert wire.take_interruption() is None
    wire.send_command(first_three(share=0.7), 1_000 * MS)
    hand.respond(accepted=False)
    with pytest.raises(MotionInterrupted, match="output 'hand': hand/grip: goal rejected"):  # and nobody is told
        wire.send_command(first_three(share=0.8), 1_000 * MS)
    assert len(arm.goals) == 3
    wire.send_command(first_three(share=0.7), 1_000 * MS)
    assert len(hand.goals) == 4  # tried again


@pytest.mark.usefixtures("control_msgs")
def test_an_aborted_trajectory_stops_all_but_a_gripper_may_hold_something(rig: Rig) -> None:
    wire = rig.wire(action_robot())
    arm, hand = Client.made["arm/follow"], Client.made["hand/grip"]
    wire.send_command(first_three(), 1_000 * MS)
    for client in (arm, hand):
        client.respond(accepted=True)
    hand.finish(6)
    assert wire.take_interruption() is None
    assert len(rig.refused) == 1 and "output 'hand': hand/grip: goal aborted" in rig.refused[0]
    assert rig.refused[0].endswith("; does the gripper hold something?")
    arm.finish(6)
    found = wire.take_interruption()
    assert found is not None and "goal aborted (path tolerance) by the controller" in str(found)
    np.testing.assert_array_equal(found.motion.velocity_NJ, 0.0)
    assert np.isnan(found.motion.position_NJ).all()  # nobody says where it stopped
    wire.send_command(first_three(share=0.5), 1_000 * MS)
    arm.respond(accepted=True)
    wire.send_command(first_three(share=0.6), 1_000 * MS)
    arm.finish(5)  # of the one that was replaced
    arm.finish(6)
    assert wire.take_interruption() is None


@pytest.mark.usefixtures("control_msgs")
def test_a_trajectory_that_the_controller_cancels_stops_all(rig: Rig) -> None:
    wire = rig.wire(action_robot())
    arm, hand = Client.made["arm/follow"], Client.made["hand/grip"]
    wire.send_command(first_three(), 1_000 * MS)
    for client in (arm, hand):
        client.respond(accepted=True)
    hand.finish(5)
    assert rig.refused[0].startswith("output 'hand': hand/grip: goal canceled")
    assert wire.take_interruption() is None
    arm.finish(5)
    found = wire.take_interruption()
    assert found is not None and "goal canceled (path tolerance) by the controller" in str(found)
    assert found.axis_J.tolist() == [True, True, False]
    # It is not active any more, and rejects what comes.
    wire.send_command(first_three(), 1_000 * MS)
    arm.respond(accepted=False)
    found = wire.take_interruption()
    assert found is not None and np.isnan(found.motion.position_NJ).all()


@pytest.mark.usefixtures("control_msgs")
def test_of_two_goals_that_are_rejected_neither_is_in_force(rig: Rig) -> None:
    wire = rig.wire(action_robot())
    arm = Client.made["arm/follow"]
    told = [first_three(share=share) for share in (1.0, 0.9, 0.8)]
    wire.send_command(told[0], 1_000 * MS)
    arm.respond(accepted=True)
    for motion in told[1:]:
        wire.send_command(motion, 1_000 * MS)
    for accepted in (-2, -1):
        arm.answer[accepted](SimpleNamespace(result=lambda: SimpleNamespace(accepted=False)))
    found = wire.take_interruption()
    assert found is not None and found.motion is told[0]


@pytest.mark.usefixtures("control_msgs")
def test_a_hold_goes_to_all_that_can_be_reached(rig: Rig) -> None:
    fields = mixed_robot()
    fields["outputs"][1] |= {"topic": "hand/grip", "type": "control_msgs/action/GripperCommand"}
    wire = rig.wire(Robot.model_validate(fields))
    until(lambda: rig.node.count_subscribers("arm/joint_trajectory") and rig.node.count_subscribers("cmd_vel"))
    time.sleep(0.2)
    told = motion(wire.motion_ns(), seconds=30.0)
    wire.send_command(told, wire.motion_ns())
    until(lambda: velocities(rig)[1][-1:] == [pytest.approx(FORWARD_SPEED)])
    Client.made["hand/grip"].ready = False
    brake = motion(wire.motion_ns() - 300 * MS)  # comes to rest soon
    with pytest.raises(SafetyRefusal, match="its server is gone") as raised:
        wire.send_command(brake, wire.motion_ns())
    assert not isinstance(raised.value, MotionInterrupted)
    with pytest.raises(MotionInterrupted, match="its server is gone") as interrupted:
        wire.send_command(brake, wire.motion_ns(), hold=True)
    assert [axis.name for axis, there in zip(ROBOT.axes, interrupted.value.axis_J, strict=True) if not there] == [
        "gripper"
    ]
    until(lambda: velocities(rig)[1][-3:] == [0.0] * 3 and len(rig.got["arm"]) == 2)
    assert_gentle(velocities(rig)[1])


@pytest.mark.usefixtures("control_msgs")
def test_without_a_server_nobody_is_told_anything(rig: Rig) -> None:
    wire = rig.wire(action_robot())
    arm, hand = Client.made["arm/follow"], Client.made["hand/grip"]
    wire.check_ready()
    hand.ready = False
    with pytest.raises(ConfigurationError, match=r"output 'hand': hand/grip: no server of this action answers"):
        wire.check_ready()
    with pytest.raises(SafetyRefusal, match=r"output 'hand': hand/grip: its server is gone, so no motion begins"):
        wire.send_command(first_three(), 1_000 * MS)
    hand.ready = True
    wire.send_command(first_three(), 1_000 * MS)
    hand.ready = False
    with pytest.raises(SafetyRefusal):
        wire.send_command(first_three(), 1_000 * MS)
    hand.ready = True
    wire.send_command(first_three(), 1_000 * MS)
    assert len(arm.goals) == len(hand.goals) == 2  # a server that is new is told where the gripper is to be
    arm.goals.clear(), hand.goals.clear()
    arm.ready, hand.ready = False, True
    with pytest.raises(SafetyRefusal, match=r"output 'arm': arm/follow: its server is gone"):
        wire.send_command(first_three(), 1_000 * MS)
    assert arm.goals == hand.goals == []


def test_without_control_msgs_an_action_is_refused_by_name(rig: Rig) -> None:
    pytest.importorskip("rclpy")
    if "control_msgs" in sys.modules:
        pytest.skip("control_msgs is installed")
    with pytest.raises(ConfigurationError, match=r"output 'arm': type control_msgs/action/FollowJointTrajectory needs"):
        rig.wire(action_robot())
