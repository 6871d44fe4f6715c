"""The outputs of a robot: one small class for each way in which a controller is told what to do.

A trajectory or a goal is first made (`prepare`) for every output, so that one that cannot be reached keeps all from
being told, and then sent. Values that follow each other are sent by the stream (ros/stream.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import numpy as np
from geometry_msgs.msg import PoseStamped, Twist, TwistStamped
from rclpy.duration import Duration
from rclpy.lifecycle import LifecycleNode
from rclpy.serialization import deserialize_message
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory

from ki_vla_ros.errors import ConfigurationError, SafetyRefusal
from ki_vla_ros.messages import encode_array, encode_command, encode_stamped, encode_twist
from ki_vla_ros.records import Motion, MotionInterrupted
from ki_vla_ros.robot import (
    ACTIONS,
    ARRAY,
    FOLLOW_TRAJECTORY,
    POSE,
    TRAJECTORY,
    TWIST,
    TWIST_STAMPED,
    Axis,
    CommandSpace,
    Lines,
    Output,
)
from ki_vla_ros.ros.qos import EVENT, OVERRIDABLE
from ki_vla_ros.ros.stream import Sample

# How long activation waits for the server of an action.
SERVER_WAIT_S = 2.0
# A gripper gets a new goal where its end changes by more than this share of its range.
GRIPPER_STEP = 0.01
# What a goal's result says (action_msgs/GoalStatus). A controller that is deactivated cancels its goal itself.
CANCELED, ABORTED = 5, 6

COMMAND_KINDS: Mapping[str, Any] = {
    TRAJECTORY: JointTrajectory,
    ARRAY: Float64MultiArray,
    TWIST: Twist,
    TWIST_STAMPED: TwistStamped,
    POSE: PoseStamped,
}


class MotionOutput(Protocol):
    """An output that takes a whole motion."""

    @property
    def name(self) -> str: ...
    @property
    def axes(self) -> slice: ...

    def prepare(self, motion: Motion, now_ns: int, stamp_ns: int) -> Any:
        """What is to be sent; SafetyRefusal if the controller cannot be reached."""
        ...

    def send(self, prepared: Any, motion: Motion) -> None: ...

    def take_interruption(self) -> MotionInterrupted | None:
        """What became of the last goal, if the controller refused it; said once."""
        ...

    def check_ready(self) -> None:
        """ConfigurationError if the controller's action does not answer."""
        ...

    def end(self) -> None:
        """Waits until the last message was received, as far as one can know."""
        ...

    def close(self) -> None: ...


class _Topic:
    """A topic that is silent unless the node is active."""

    def __init__(self, node: LifecycleNode, kind: str, topic: str, axes: slice) -> None:
        self.axes = axes
        self._node = node
        self._publisher: Any = node.create_lifecycle_publisher(
            COMMAND_KINDS[kind], topic, copy(EVENT), qos_overriding_options=OVERRIDABLE
        )

    def end(self) -> None:
        self._publisher.wait_for_all_acked(Duration(seconds=1))

    def close(self) -> None:
        self._node.destroy_lifecycle_publisher(self._publisher)


class TrajectoryTopic(_Topic):
    """The topic of a joint_trajectory_controller: each message replaces the one before."""

    def __init__(self, node: LifecycleNode, name: str, topic: str, axes: slice) -> None:
        super().__init__(node, TRAJECTORY, topic, axes)
        self.name = name

    def prepare(self, motion: Motion, now_ns: int, stamp_ns: int) -> bytes:
        return encode_command(motion, now_ns, stamp_ns, self.axes)

    def send(self, prepared: bytes, motion: Motion) -> None:
        self._publisher.publish(prepared)

    def take_interruption(self) -> None:
        return None

    def check_ready(self) -> None: ...


class StreamTopic(_Topic):
    """A topic that takes one value after the other."""

    def __init__(
        self, node: LifecycleNode, kind: str, topic: str, axes: slice, encode: Callable[[Sample], bytes]
    ) -> None:
        super().__init__(node, kind, topic, axes)
        self._encode = encode

    def send(self, sample: Sample) -> None:
        self._publisher.publish(self._encode(sample))


class _Action:
    """An action whose goals replace each other; what becomes of them is told from the executor's thread."""

    def __init__(
        self, node: LifecycleNode, output: Output, topic: str, axes: slice, refused: Callable[[str], None]
    ) -> None:
        from rclpy.action.client import ActionClient  # what no robot without actions needs

        self.name, self.axes = output.name, axes
        self._where = f"output {output.name!r}: {topic}"
        self._kind = action_type(output)
        self._client: Any = ActionClient(node, self._kind, topic)
        self._refused = refused
        self._lock = threading.Lock()
        self._told: Motion | None = None  # what the controller has accepted, as far as is known
        self._number = 0  # of the newest goal
        self._interruption: MotionInterrupted | None = None

    def check_ready(self) -> None:
        if not self._client.wait_for_server(SERVER_WAIT_S):
            raise ConfigurationError(
                f"{self._where}: no server of this action answers within {SERVER_WAIT_S:g} s; start the controller, or "
                "correct the output's topic in the robot file"
            )

    def take_interruption(self) -> MotionInterrupted | None:
        with self._lock:
            interruption, self._interruption = self._interruption, None
        return interruption

    def end(self) -> None: ...

    def close(self) -> None:
        with self._lock:
            self._number += 1  # nobody wants to know what becomes of the last one
        self._client.destroy()

    def _check_server(self) -> None:
        if not self._client.server_is_ready():
            raise SafetyRefusal(f"{self._where}: its server is gone, so no motion begins; is it running?")

    def _send_goal(self, goal: Any, motion: Motion) -> None:
        with self._lock:
            self._number += 1
            number = self._number
        self._client.send_goal_async(goal).add_done_callback(partial(self._on_answer, number, motion))

    def _on_answer(self, number: int, motion: Motion, future: Any) -> None:
        handle = future.result()
        if handle is not None and handle.accepted:
            self._told = motion
            handle.get_result_async().add_done_callback(partial(self._on_result, number, motion))
        else:
            self._interrupt(number, "rejected", self._told or _standing(motion))

    def _on_result(self, number: int, motion: Motion, future: Any) -> None:
        answer = future.result()
        if answer is not None and answer.status in (CANCELED, ABORTED):
            what = "aborted" if answer.status == ABORTED else "canceled"
            reason = getattr(answer.result, "error_string", "")  # a gripper's has none
            self._on_end(number, f"{what}{f' ({reason})' if reason else ''}", motion)

    def _on_end(self, number: int, what: str, motion: Motion) -> None:
        """A goal was aborted, or canceled though no newer one replaces it."""
        raise NotImplementedError

    def _interrupt(self, number: int, what: str, instead: Motion) -> None:
        with self._lock:
            if number != self._number:
                return  # a newer goal has replaced it
            axis_J = np.zeros(len(instead.joints), dtype=np.bool_)
            axis_J[self.axes] = True
            self._interruption = MotionInterrupted(f"{self._where}: goal {what} by the controller", instead, axis_J)


class TrajectoryAction(_Action):
    """FollowJointTrajectory: each motion is a goal that takes over from the one before.

    A controller that rejects a goal goes on with the one before; one that aborts it stands still.
    """

    def prepare(self, motion: Motion, now_ns: int, stamp_ns: int) -> Any:
        self._check_server()
        goal = self._kind.Goal()
        goal.trajectory = deserialize_message(encode_command(motion, now_ns, stamp_ns, self.axes), JointTrajectory)
        return goal

    def send(self, prepared: Any, motion: Motion) -> None:
        self._send_goal(prepared, motion)

    def _on_end(self, number: int, what: str, motion: Motion) -> None:
        # Nobody says where it stopped.
        standing = _standing(motion, np.nan)
        if self._told is motion:
            self._told = standing
        self._interrupt(number, what, standing)


class GripperAction(_Action):
    """GripperCommand: a goal where the end of the motion is another than that of the last goal.

    The gripper goes there at its own speed. It may hold something and never get there, so a goal that is aborted is
    told and no more.
    """

    def __init__(
        self,
        node: LifecycleNode,
        output: Output,
        topic: str,
        axes: slice,
        refused: Callable[[str], None],
        axis: Axis,
    ) -> None:
        super().__init__(node, output, topic, axes, refused)
        range_ = axis.upper - axis.lower
        self._step = GRIPPER_STEP * (range_ if np.isfinite(range_) else 0.1) / abs(axis.scale)
        self._max_effort = output.max_effort or 0.0
        self._wanted: float | None = None

    def prepare(self, motion: Motion, now_ns: int, stamp_ns: int) -> Any:
        try:
            self._check_server()
        except SafetyRefusal:
            self._wanted = None  # the next server knows nothing of it
            raise
        wanted = float(motion.position_NJ[-1, self.axes.start])
        if self._wanted is not None and abs(wanted - self._wanted) <= self._step:
            return None
        goal = self._kind.Goal()
        goal.command.position, goal.command.max_effort = wanted, self._max_effort
        return goal

    def send(self, prepared: Any, motion: Motion) -> None:
        if prepared is not None:
            self._wanted = prepared.command.position
            self._send_goal(prepared, motion)

    def end(self) -> None:
        self._wanted = None  # until the next activation someone else may move it

    def _on_end(self, number: int, what: str, motion: Motion) -> None:
        if number == self._number:
            self._refused(f"{self._where}: goal {what} by the controller; does the gripper hold something?")

    def _interrupt(self, number: int, what: str, instead: Motion) -> None:
        self._wanted = None
        super()._interrupt(number, what, instead)


def as_written(motion: Motion, lines: Lines) -> Motion:
    """The motion with the numbers that the outputs' messages have."""
    if lines.is_identity:
        return motion
    position_NJ, velocity_NJ = lines.to_foreign(motion.position_NJ), motion.velocity_NJ / lines.scale_D
    return replace(motion, position_NJ=position_NJ, velocity_NJ=velocity_NJ)


def _standing(motion: Motion, share: float = 1.0) -> Motion:
    """At rest where the motion begins; with a `share` of NaN, where it is measured."""
    still, time_N = np.zeros((1, len(motion.joints))), motion.time_N[[0]]
    return Motion(motion.joints, int(time_N[0]), time_N, motion.position_NJ[[0]] * share, still, motion.reference_P4)


def action_type(output: Output) -> Any:
    """The action's class; ConfigurationError where control_msgs is not installed."""
    try:
        from control_msgs import action
    except ImportError:
        raise ConfigurationError(
            f"output {output.name!r}: type {output.type} needs the package control_msgs, which is not installed here; "
            "install it (apt: ros-DISTRO-control-msgs), or use a topic: trajectory_msgs/msg/JointTrajectory"
        ) from None
    return getattr(action, str(output.type).rpartition("/")[2])


def open_motion_output(
    node: LifecycleNode, output: Output, kind: str, topic: str, axes: slice, axis: Axis, refused: Callable[[str], None]
) -> MotionOutput:
    """An output that takes whole motions, of type `kind`; ConfigurationError where its package is missing."""
    if kind not in ACTIONS:
        return TrajectoryTopic(node, output.name, topic, axes)
    if kind == FOLLOW_TRAJECTORY:
        return TrajectoryAction(node, output, topic, axes, refused)
    return GripperAction(node, output, topic, axes, refused, axis)


def open_stream_output(
    node: LifecycleNode, output: Output, kind: str, topic: str, space: CommandSpace, now_ns: Callable[[], int]
) -> StreamTopic:
    """An output that takes one value after the other; `now_ns` is the time that stamps are on."""
    robot, axes = space.robot, space.robot.axes_of(output)
    scale, offset = robot.command_lines.scale_D[axes], robot.command_lines.offset_D[axes]
    number, frame_id = robot.outputs.index(output), output.frame_id
    if kind == ARRAY:
        velocities = robot.axes[axes.start].kind == "velocity"

        def encode(sample: Sample) -> bytes:
            value = sample.velocity_J[axes] if velocities else sample.position_J[axes] - offset
            return encode_array(value / scale)

    elif kind == POSE:
        pose = next(pose for pose in space.poses if pose.output == number)

        def encode(sample: Sample) -> bytes:
            quaternion = space.quaternions(pose, sample.position_J, sample.reference_P4)
            place = sample.position_J[axes][:3]
            return encode_stamped(now_ns(), frame_id, np.concatenate([place, quaternion]))

    else:
        parts, stamped = robot.twist_parts(output), kind == TWIST_STAMPED

        def encode(sample: Sample) -> bytes:
            twist_6 = np.zeros(6)
            twist_6[parts] = sample.velocity_J[axes] / scale
            return encode_stamped(now_ns(), frame_id, twist_6) if stamped else encode_twist(twist_6)

    return StreamTopic(node, kind, topic, axes, encode)
