"""The policy loop's way out of the node: its publishers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rclpy.duration import Duration
from rclpy.lifecycle import LifecycleNode, LifecyclePublisher
from std_msgs.msg import Float64MultiArray, String
from trajectory_msgs.msg import JointTrajectory

from ki_vla_ros.records import ActionChunk, Motion
from ki_vla_ros.ros import convert
from ki_vla_ros.ros.qos import EVENT
from ki_vla_ros.ros.stream import MotionStream
from ki_vla_ros.runtime.shadow import ShadowComparison
from ki_vla_ros.settings.settings import Settings

# Seconds between two log lines about one and the same cause.
REPEAT_LOG_S = 5.0
SHADOW_COMMAND = "~/shadow/command"


class NodeWire:
    """The loop's way out: publishers that are silent unless the node is active.

    With `shadow` there is no publisher to the arm: commands go to SHADOW_COMMAND, chunks to the comparison as well.
    """

    def __init__(self, node: LifecycleNode, settings: Settings, shadow: ShadowComparison | None = None) -> None:
        self._node, self._shadow = node, shadow
        self._mode = settings.publish_mode
        kind = Float64MultiArray if self._mode == "stream" else JointTrajectory
        topic = settings.command_topic if shadow is None else SHADOW_COMMAND
        self._command: LifecyclePublisher[Any] = node.create_lifecycle_publisher(kind, topic, EVENT)
        self._stream = MotionStream(self._publish_positions, self.now_ns, settings.command_period_s)
        self._chunk: LifecyclePublisher[JointTrajectory] = node.create_lifecycle_publisher(
            JointTrajectory, "~/chunk", EVENT
        )
        self._tick: LifecyclePublisher[String] = node.create_lifecycle_publisher(String, "~/tick", EVENT)
        self._logged_s: dict[str, float] = {}

    def now_ns(self) -> int:
        return int(self._node.get_clock().now().nanoseconds)

    def simulated_clock(self) -> bool:
        return bool(self._node.get_parameter("use_sim_time").value)

    def send_command(self, motion: Motion, now_ns: int) -> None:
        if self._mode == "stream":
            self._stream.play(motion)
        else:
            self._command.publish(convert.command_message(motion, now_ns, splice=self._mode == "splice"))

    def _publish_positions(self, position_J: NDArray[np.float64]) -> None:
        self._command.publish(convert.stream_message(position_J))

    def report_chunk(self, chunk: ActionChunk) -> None:
        self._chunk.publish(convert.chunk_message(chunk))
        if self._shadow is not None:
            self._shadow.add_chunk(chunk)

    def report_tick(self, fields: Mapping[str, object]) -> None:
        self._tick.publish(convert.text_message(fields))

    def log(self, message: str, cause: str) -> None:
        if self._shadow is not None and cause == "moved":
            return  # of course: someone else moves the arm
        now_s = time.monotonic()
        if now_s - self._logged_s.get(cause, -REPEAT_LOG_S) >= REPEAT_LOG_S:
            self._logged_s[cause] = now_s
            self._node.get_logger().warning(message)

    def wait_until_received(self) -> None:
        """Until a streamed motion has ended and every subscriber has acknowledged the last command."""
        self._stream.wait_until_ended()
        self._command.wait_for_all_acked(Duration(seconds=1))

    def close(self) -> None:
        self._stream.close()
        for publisher in (self._command, self._chunk, self._tick):
            self._node.destroy_lifecycle_publisher(publisher)
