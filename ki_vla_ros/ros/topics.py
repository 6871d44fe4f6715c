"""The topics of a configured node: subscriptions that fill the buffer, and the loop's `Wire`.

Images come in and trajectories go out as serialized bytes: through rclpy's message objects each image is copied three
times, and fifty trajectory points take a millisecond.
"""

from __future__ import annotations

import array
import json
import math
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from geometry_msgs.msg import PoseStamped
from numpy.typing import NDArray
from rclpy.lifecycle import LifecycleNode, LifecyclePublisher
from rclpy.node import Node
from rclpy.qos import QoSPolicyKind, QoSProfile
from rclpy.serialization import deserialize_message
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Float64MultiArray, MultiArrayDimension, MultiArrayLayout, String
from trajectory_msgs.msg import JointTrajectory

from ki_vla_ros.bundle import PolicySpec
from ki_vla_ros.errors import ConfigurationError, InputError, SafetyRefusal
from ki_vla_ros.messages import (
    ENCODINGS,
    decode_compressed,
    decode_raw,
    encode_chunk,
    is_depth,
    read_image,
)
from ki_vla_ros.policy import resize_with_pad
from ki_vla_ros.records import (
    NS_PER_S,
    ActionChunk,
    CameraFrame,
    JointReading,
    Motion,
    MotionInterrupted,
    PoseReading,
    header_ns,
)
from ki_vla_ros.robot import ACTIONS, POSE_STAMPED, TRAJECTORY, CommandSpace, Robot, Signal
from ki_vla_ros.ros.outputs import (
    COMMAND_KINDS,
    MotionOutput,
    StreamTopic,
    as_written,
    open_motion_output,
    open_stream_output,
)
from ki_vla_ros.ros.qos import EVENT, OVERRIDABLE, SENSOR
from ki_vla_ros.ros.releases import SubscriptionEventCallbacks
from ki_vla_ros.ros.stream import MotionStream, Streamed
from ki_vla_ros.runtime import CameraSource, Diagnostics, ObservationBuffer, Report, ShadowComparison
from ki_vla_ros.settings import Settings, shadow_topics

# Least time between two log lines about the same cause.
REPEAT_LOG_S = 5.0
# Two readings of a clock no farther apart than this belong together.
READING_NS = 100_000
# The stages of a tick, and the names of the numbers in ~/tick_numbers, in order (docs/runtime.md).
STAGES = (
    *("observation", "preprocess", "prefill", "denoise", "decode", "safety", "chunking", "verify", "publish"),
    "total",
)
TICK_NUMBERS = (
    *("stamp_s", "chunk_index", "held", "deadline_misses", "observation_to_command_ms", "newest_image_to_command_ms"),
    *(f"{stage}_ms" for stage in STAGES),
)
# What rmw calls the node of a publisher that was discovered before its node, or that has none (a bare DDS writer).
UNKNOWN_NAME = "_NODE_NAME_UNKNOWN_"


class Inputs:
    """Subscriptions that put images, joint states and poses into the buffer, and refuse by name what cannot be used."""

    def __init__(
        self,
        node: LifecycleNode,
        manifest: PolicySpec,
        settings: Settings,
        sources: Sequence[CameraSource],
        signals: Sequence[Signal],
        buffer: ObservationBuffer,
        wire: NodeWire,
        diagnostics: Diagnostics,
        shadow: ShadowComparison | None = None,
    ) -> None:
        self._node, self._buffer, self._wire, self._diagnostics, self._shadow = node, buffer, wire, diagnostics, shadow
        self._image_size = manifest.image.size
        self._arrival_counts = settings.use_receive_time
        self._subscriptions: list[Any] = []
        for source in sources:
            raw = settings.camera(source.name).transport == "raw"
            kind, on_image = Image if raw else CompressedImage, partial(self.add_image, source.name)
            self._subscribe(kind, source.topic, on_image, SENSOR, serialized=raw)
        for topic, type_name in {signal.topic: signal.type for signal in signals}.items():
            if type_name == POSE_STAMPED:
                self._subscribe(PoseStamped, topic, partial(self.add_pose, topic=topic), SENSOR)
            else:
                self._subscribe(JointState, topic, partial(self.add_joints, topic=topic), SENSOR)
        if shadow is not None and settings.shadow_reference == "command":
            for name, command in settings.command_topics(manifest.robot).items():
                output = next(output for output in manifest.robot.outputs if output.name == name)
                kind = output.wire_type(settings.publish_mode)
                if kind in COMMAND_KINDS:  # goals cannot be listened to
                    topic = node.resolve_topic_name(command)
                    self._subscribe(COMMAND_KINDS[kind], topic, partial(self._add_command, name), EVENT)

    def add_image(self, camera: str, message: bytes | CompressedImage) -> None:
        """Adds a serialized Image, or a CompressedImage."""
        try:
            frame = frame_from_message(message, camera, self._received_ns())
            # Resized here and not in the tick, where it would delay the command.
            small = replace(frame, rgb_HWC=resize_with_pad(frame.rgb_HWC, self._image_size))
            self._buffer.add_frame(small, self._wire.now_ns())
        except InputError as refusal:
            self._refuse(camera, refusal)

    def add_joints(self, message: JointState, topic: str) -> None:
        try:
            reading = reading_from_message(message, self._received_ns())
            kept = self._buffer.add_joints(reading, self._wire.now_ns(), topic)
            if self._shadow is not None:
                self._shadow.add_readings(kept)
        except InputError as refusal:
            self._refuse(topic, refusal)

    def add_pose(self, message: PoseStamped, topic: str) -> None:
        try:
            reading = PoseReading.from_message(message, self._received_ns())
            kept = self._buffer.add_pose(reading, self._wire.now_ns(), topic)
            if self._shadow is not None:
                self._shadow.add_readings(kept)
        except InputError as refusal:
            self._refuse(topic, refusal)

    def _add_command(self, output: str, message: Any) -> None:
        """Takes, in shadow mode, a command that someone else sends to the arm."""
        assert self._shadow is not None
        try:
            self._shadow.add_command(output, self._wire.now_ns(), message)
        except InputError as refusal:
            self._diagnostics.record_refusal(str(refusal))
            self._wire.log(str(refusal), "message of command")

    def _received_ns(self) -> int | None:
        """The present time, if it is to replace the stamps (use_receive_time)."""
        return self._wire.now_ns() if self._arrival_counts else None

    def _refuse(self, subject: str, refusal: InputError) -> None:
        self._buffer.refuse(subject, str(refusal))
        self._diagnostics.record_refusal(str(refusal))
        self._wire.log(str(refusal), f"message of {subject}")

    def _subscribe(
        self, kind: Any, topic: str, callback: Callable[[Any], None], qos: QoSProfile, serialized: bool = False
    ) -> None:
        self._subscriptions.append(subscribe(self._node, self._diagnostics, kind, topic, callback, qos, serialized))

    def close(self) -> None:
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)


def subscribe(
    node: LifecycleNode,
    diagnostics: Diagnostics,
    kind: Any,
    topic: str,
    callback: Callable[[Any], None],
    qos: QoSProfile,
    serialized: bool = False,
) -> Any:
    """A subscription that logs and counts a publisher whose QoS does not fit, as nothing would arrive from it."""

    def on_incompatible(event: Any) -> None:
        policy = QoSPolicyKind(event.last_policy_kind).name.lower()
        diagnostics.record_refusal(f"incompatible QoS on {topic}: {policy}")
        node.get_logger().error(
            f"{topic}: a publisher's {policy} does not fit this subscription; nothing of it arrives"
        )

    events = SubscriptionEventCallbacks(incompatible_qos=on_incompatible)
    return node.create_subscription(
        kind, topic, callback, copy(qos), event_callbacks=events, qos_overriding_options=OVERRIDABLE, raw=serialized
    )


def publishers(node: Node, topic: str) -> list[str]:
    """The full names of the nodes that publish on a topic, one for each publisher."""
    return sorted(endpoint_name(end) for end in node.get_publishers_info_by_topic(topic))


def endpoint_name(end: Any) -> str:
    """The full name of the node that a publisher or subscription belongs to, as far as discovery knows it."""
    if UNKNOWN_NAME in end.node_name:
        return "a node whose name is unknown"
    return f"{end.node_namespace.rstrip('/')}/{end.node_name}"


class NodeWire:
    """The loop's `Wire`: publishers that are silent unless the node is active.

    With `shadow` nothing is published to the robot: commands go to the topics of `shadow_topics`, and chunks also to
    the comparison. `acceleration_J` are the limits by which velocities brake; `refused` is told what a controller did
    not do. ConfigurationError where the package of an output's messages is missing.
    """

    def __init__(
        self,
        node: LifecycleNode,
        robot: Robot,
        settings: Settings,
        acceleration_J: NDArray[np.float64],
        shadow: ShadowComparison | None = None,
        refused: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self._node, self._shadow = node, shadow
        self._stamped = settings.publish_mode == "splice"
        # Fixed, because use_sim_time does not change while a bundle is loaded.
        self._simulated = bool(node.get_parameter("use_sim_time").value)
        self._steady_ns = self.now_ns if self._simulated else time.monotonic_ns
        space, axes, self._lines = CommandSpace(robot), robot.axes, robot.command_lines
        shadows, topics = shadow_topics(robot), settings.command_topics(robot)
        self._motions: list[MotionOutput] = []
        streams: list[StreamTopic] = []
        self._streamed_J = np.zeros(len(axes), dtype=np.bool_)
        # Where each output's commands go, in full.
        self.topics = {
            name: node.resolve_topic_name(shadows[name] if shadow is not None else topic)
            for name, topic in topics.items()
        }
        _check_distinct(self.topics, {node.resolve_topic_name(t) for t in settings.signal_topics(robot).values()})
        for output in robot.outputs:
            kind, topic, place = output.wire_type(settings.publish_mode), topics[output.name], robot.axes_of(output)
            if shadow is not None:
                kind, topic = TRAJECTORY if kind in ACTIONS else kind, shadows[output.name]
            if output.streams(settings.publish_mode):
                streams.append(open_stream_output(node, output, kind, topic, space, self.now_ns))
                self._streamed_J[place] = True
            else:
                self._motions.append(open_motion_output(node, output, kind, topic, place, axes[place.start], refused))
        self._outputs: tuple[MotionOutput | StreamTopic, ...] = (*self._motions, *streams)
        self._stream: MotionStream | None = None
        if streams:
            self._stream = MotionStream(
                streams,
                Streamed(self._streamed_J, space.velocity_J, np.where(space.velocity_J, acceleration_J, np.inf)),
                self._steady_ns,
                settings.command_period_s,
                simulated=self._simulated,
                on_grid=bool(self._motions),
                failed=self._log_failure,
            )
        self._chunk: LifecyclePublisher[JointTrajectory] = self._publisher(JointTrajectory, "~/chunk")
        self._tick: LifecyclePublisher[String] = self._publisher(String, "~/tick")
        self._tick_numbers: LifecyclePublisher[Float64MultiArray] = self._publisher(Float64MultiArray, "~/tick_numbers")
        names = MultiArrayDimension(label=",".join(TICK_NUMBERS), size=len(TICK_NUMBERS), stride=len(TICK_NUMBERS))
        self._numbers = Float64MultiArray(layout=MultiArrayLayout(dim=[names]))
        self._logged_s: dict[str, float] = {}

    def _publisher(self, kind: Any, topic: str) -> Any:
        return self._node.create_lifecycle_publisher(kind, topic, copy(EVENT), qos_overriding_options=OVERRIDABLE)

    def now_ns(self) -> int:
        return int(self._node.get_clock().now().nanoseconds)

    def motion_ns(self) -> int:
        # Where some axes move by trajectories, their time is that of all.
        return self._steady_ns() if self._stream is None or self._motions else self._stream.motion_ns()

    def simulated_clock(self) -> bool:
        return self._simulated

    def moves_arm(self) -> bool:
        return self._shadow is None

    def check_ready(self) -> None:
        """ConfigurationError if an output's controller does not answer."""
        for output in self._motions:
            output.check_ready()

    def send_command(self, motion: Motion, now_ns: int, hold: bool = False) -> None:
        if (interruption := self._goal_interruption()) is not None:
            raise interruption
        stamp_ns = self._stamp_of(now_ns) if self._stamped else 0
        written = as_written(motion, self._lines)
        prepared: list[tuple[MotionOutput, Any]] = []
        fault: SafetyRefusal | None = None
        for output in self._motions:
            try:
                prepared.append((output, output.prepare(written, now_ns, stamp_ns)))
            except SafetyRefusal as refusal:
                if not hold:
                    raise
                fault = refusal
        if self._stream is not None:
            self._stream.play(motion)
        told_J = self._streamed_J.copy()
        for output, message in prepared:
            try:
                output.send(message, motion)
                told_J[output.axes] = True
            except Exception as error:
                self._log_failure(error)
                fault = SafetyRefusal(f"output {output.name!r}: not told: {error!r}")
                if not hold:
                    break
        if fault is not None:
            raise MotionInterrupted(str(fault), motion, told_J) if told_J.any() else fault

    def take_interruption(self) -> MotionInterrupted | None:
        """What some axes do instead of what they were told, if they do; said once."""
        found = None if self._stream is None else self._stream.take_interruption()
        return found or self._goal_interruption()

    def _goal_interruption(self) -> MotionInterrupted | None:
        return next((found for output in self._motions if (found := output.take_interruption()) is not None), None)

    def _stamp_of(self, motion_ns: int) -> int:
        """A time on the clock of the motion, on the node's clock.

        Both clocks are read until nothing has come between the readings: the process may be stopped at any moment.
        """
        while True:
            before_ns, now_ns, after_ns = self._steady_ns(), self.now_ns(), self._steady_ns()
            if self._simulated or after_ns - before_ns < READING_NS:
                return now_ns - (after_ns - motion_ns)

    def _log_failure(self, error: Exception) -> None:
        self.log("".join(traceback.format_exception(error)), "internal error")

    def report_chunk(self, chunk: ActionChunk) -> None:
        self._chunk.publish(encode_chunk(chunk))
        if self._shadow is not None:
            self._shadow.add_chunk(chunk)

    def report_tick(self, fields: Mapping[str, object]) -> None:
        self._tick.publish(text_message(fields))
        self._numbers.data = _doubles(tick_numbers(fields))
        self._tick_numbers.publish(self._numbers)

    def log(self, message: str, cause: str) -> None:
        now_s = time.monotonic()
        if now_s - self._logged_s.get(cause, -REPEAT_LOG_S) >= REPEAT_LOG_S:
            self._logged_s[cause] = now_s
            self._node.get_logger().warning(message)

    def wait_until_received(self) -> None:
        """Waits until a streamed motion has ended and every subscriber has acknowledged the last command."""
        if self._stream is not None:
            self._stream.wait_until_ended()
        for output in self._outputs:
            output.end()

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        for output in self._outputs:
            output.close()
        for publisher in (self._chunk, self._tick, self._tick_numbers):
            self._node.destroy_lifecycle_publisher(publisher)


def _check_distinct(topics: Mapping[str, str], read: Collection[str]) -> None:
    """ConfigurationError if, by their full names, two outputs share a topic, or one commands what is read."""
    names = {topic: name for name, topic in topics.items()}
    for name, topic in topics.items():
        if topic in read or names[topic] != name:
            other = "the robot's state is read from it" if topic in read else f"output {names[topic]!r} has it, too"
            raise ConfigurationError(
                f"output {name!r}: expected a topic of its own, got {topic}, but {other}; correct the robot file or "
                "the remapping"
            )


def frame_from_message(message: bytes | CompressedImage, camera: str, received_ns: int | None = None) -> CameraFrame:
    """A frame from a serialized Image, or from a CompressedImage.

    An rgb8 image without row padding is not copied: the frame shares the memory of the bytes. `received_ns`, if given,
    replaces the header's stamp. InputError for an image that cannot be read; an encoding that we do not know is left to
    cv_bridge where it is installed.
    """
    where = f"camera {camera!r}"
    if isinstance(message, CompressedImage):
        stamp_ns = header_ns(message) if received_ns is None else received_ns
        return CameraFrame(camera, stamp_ns, decode_compressed(where, message.data, message.format))
    image = read_image(where, message)
    stamp_ns = image.stamp_ns if received_ns is None else received_ns
    ours = image.encoding in ENCODINGS or is_depth(image.encoding)  # cv_bridge would make depth a grey image
    if not ours and (bridge := _cv_bridge()) is not None:
        try:
            return CameraFrame(camera, stamp_ns, bridge.imgmsg_to_cv2(deserialize_message(message, Image), "rgb8"))
        except Exception as error:  # cv_bridge's errors and OpenCV's have no other common base
            raise InputError(f"{where}: image encoding {image.encoding!r}: cv_bridge says {error}") from error
    size = (image.height, image.width, image.step)
    return CameraFrame(camera, stamp_ns, decode_raw(where, image.encoding, *size, image.data))


@cache
def _cv_bridge() -> Any:
    """A CvBridge; None where it is not installed, as with ROS from wheels."""
    try:
        from cv_bridge import CvBridge
    except ImportError:
        return None
    return CvBridge()


def reading_from_message(message: JointState, received_ns: int | None = None) -> JointReading:
    """A reading from a JointState, stamped `received_ns` if given; InputError as in JointReading.from_fields."""
    stamp_ns = header_ns(message) if received_ns is None else received_ns
    return JointReading.from_fields(stamp_ns, message.name, message.position, message.velocity, message.effort)


def tick_numbers(fields: Mapping[str, Any]) -> list[float]:
    """A tick's fields as TICK_NUMBERS; NaN for what it does not have, such as a stage that did not run."""
    chunk_index, sent_ns = fields["chunk_index"], fields["command_ns"]
    stage_ms = fields["stage_ms"]
    return [
        fields["stamp_ns"] / NS_PER_S,
        math.nan if chunk_index is None else float(chunk_index),
        float(fields["hold"] is not None),
        float(fields["deadline_misses"]),
        math.nan if sent_ns is None else (sent_ns - fields["observation_ns"]) / 1e6,
        math.nan if sent_ns is None else (sent_ns - fields["newest_image_ns"]) / 1e6,
        *(stage_ms.get(stage, math.nan) for stage in STAGES),
    ]


def text_message(fields: Mapping[str, object]) -> String:
    """A String with JSON; ValueError for NaN, which many JSON readers refuse."""
    return String(data=json.dumps(fields, allow_nan=False))


def diagnostics_message(name: str, hardware: str, report: Report, now_ns: int) -> DiagnosticArray:
    status = DiagnosticStatus(
        level=bytes([report.level]),
        name=name,
        hardware_id=hardware,
        message=report.summary,
        values=[KeyValue(key=key, value=value) for key, value in report.values.items()],
    )
    message = DiagnosticArray(status=[status])
    message.header.stamp = ns_to_stamp(now_ns)
    return message


def ns_to_stamp(time_ns: int) -> Time:
    return Time(sec=time_ns // NS_PER_S, nanosec=time_ns % NS_PER_S)


def _doubles(values: NDArray[np.float64] | Sequence[float]) -> Any:
    """An `array.array`, which message setters take without checking each element."""
    return array.array("d", np.asarray(values, dtype=np.float64).tobytes())
