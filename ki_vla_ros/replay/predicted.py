"""What a replay predicted, beside what was recorded, as a rosbag2 folder that Foxglove opens.

Recorded topics are copied, except for images: only the frames that the policy used are kept, as JPEG of at most 480
pixels a side, so a bag of gigabytes becomes one of megabytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ki_vla_ros.bags.writer import BagFile
from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.messages import (
    COMPRESSED_IMAGE,
    IMAGE,
    JOINT_STATE,
    TEXT,
    TRAJECTORY,
    BagMessage,
    camera_frame,
    typestore,
)
from ki_vla_ros.records import NS_PER_S, CameraFrame, Motion, Observation
from ki_vla_ros.replay.frames import BagFrame
from ki_vla_ros.replay.ticks import Prediction, Tick
from ki_vla_ros.replay.topics import ReplayTopics
from ki_vla_ros.robot import Robot

LARGEST_SIDE, JPEG_QUALITY = 480, 85
# Sampling period of the commanded motion, written as joint states.
SAMPLE_NS = 20_000_000


class PredictionBag:
    """Writes chunks, ticks and the commanded motion, of several outputs each on its topic, below `<node>/replay`.

    Replaces what an earlier replay wrote to `folder`; ConfigurationError if there is anything else in it.
    """

    def __init__(self, folder: Path, topics: ReplayTopics, node: str, robot: Robot) -> None:
        try:
            for name in ("metadata.yaml", f"{folder.name}.mcap"):
                (folder / name).unlink(missing_ok=True)
            if folder.exists():
                folder.rmdir()
        except OSError as error:
            raise ConfigurationError(
                f"--out: expected only an earlier replay's files in {folder}, got {error}; choose another --out"
            ) from error
        self._file = BagFile(folder)
        self._cameras, self._joints = topics.cameras, robot.axis_names
        self._names = {name: f"{node}/replay/{name}" for name in ("chunk", "tick")}
        commanded, tokens = f"{node}/replay/commanded", robot.output_tokens
        self._commanded = {
            commanded if len(tokens) == 1 else f"{commanded}/{tokens[output.name]}": robot.axes_of(output)
            for output in robot.outputs
        }
        for name, kind in (("chunk", TRAJECTORY), ("tick", TEXT)):
            self._file.add_topic(self._names[name], kind)
        for topic in self._commanded:
            self._file.add_topic(topic, JOINT_STATE)
        self._written: dict[str, int] = {}
        self._motion: Motion | None = None
        self._sampled_ns = 0

    def copy(self, message: BagMessage) -> None:
        """Copies a recorded message, unless it is an image: those are written when a tick has used them."""
        if message.type in (IMAGE, COMPRESSED_IMAGE):
            return
        self._file.write(message.topic, message.type, message.log_ns, message.data)

    def add(self, tick: Tick, observation: Observation | None) -> None:
        ended_ns = tick.stamp_ns + tick.latency_ns
        if observation is not None:
            for frame in observation.frames.values():
                self._add_frame(frame, tick.stamp_ns)
        for motion in tick.motions:
            self._sample(motion.from_ns)
            self._motion = motion
        if tick.prediction is not None:
            self._add_chunk(tick.prediction, ended_ns)
        fields = {
            "number": tick.number,
            "instruction": tick.instruction,
            "hold": tick.hold,
            "chunk_index": None if tick.prediction is None else tick.prediction.index,
            "latency_ms": tick.latency_ns / 1e6,
            "deadline_misses": tick.missed,
        }
        self._message(self._names["tick"], TEXT, ended_ns, data=json.dumps(fields))

    def close(self) -> None:
        if self._motion is not None:
            self._sample(self._motion.end_ns)
        self._file.close()

    def _add_chunk(self, chunk: Prediction, log_ns: int) -> None:
        types = typestore().types
        empty = np.array([], dtype=np.float64)
        points = []
        for k, position_J in enumerate(chunk.position_HJ):
            sec, nanosec = divmod((k + 1) * chunk.period_ns, NS_PER_S)
            duration = types["builtin_interfaces/msg/Duration"](sec=sec, nanosec=nanosec)
            point = types["trajectory_msgs/msg/JointTrajectoryPoint"]
            points.append(
                point(
                    positions=position_J, velocities=empty, accelerations=empty, effort=empty, time_from_start=duration
                )
            )
        joints = list(self._joints)
        header = self._header(chunk.start_ns)
        self._message(self._names["chunk"], TRAJECTORY, log_ns, header=header, joint_names=joints, points=points)

    def _sample(self, until_ns: int) -> None:
        """Writes the motion in force, until `until_ns`, when the next one takes over."""
        motion = self._motion
        if motion is None:
            return
        for at_ns in range(max(motion.from_ns, self._sampled_ns), min(until_ns, motion.end_ns + 1), SAMPLE_NS):
            position_J, velocity_J = motion.at(at_ns)
            for topic, axes in self._commanded.items():
                self._message(
                    topic,
                    JOINT_STATE,
                    at_ns,
                    header=self._header(at_ns),
                    name=list(motion.joints[axes]),
                    position=position_J[axes],
                    velocity=velocity_J[axes],
                    effort=np.array([], dtype=np.float64),
                )
            self._sampled_ns = at_ns + SAMPLE_NS

    def _add_frame(self, frame: CameraFrame, log_ns: int) -> None:
        if self._written.get(frame.camera) == frame.stamp_ns:
            return
        self._written[frame.camera] = frame.stamp_ns
        assert isinstance(frame, BagFrame)
        if frame.message.type == COMPRESSED_IMAGE:
            self._file.write(frame.message.topic, COMPRESSED_IMAGE, log_ns, frame.message.data)
            return
        rgb_HWC = camera_frame(frame.message, frame.camera).rgb_HWC
        height, width = rgb_HWC.shape[:2]
        if (scale := LARGEST_SIDE / max(height, width)) < 1.0:
            size = max(1, round(width * scale)), max(1, round(height * scale))
            rgb_HWC = np.asarray(cv2.resize(rgb_HWC, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
        bgr_HWC = cv2.cvtColor(rgb_HWC, cv2.COLOR_RGB2BGR)
        _, jpeg = cv2.imencode(".jpg", bgr_HWC, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        header, topic = self._header(frame.stamp_ns), f"{self._cameras[frame.camera]}/compressed"
        self._message(topic, COMPRESSED_IMAGE, log_ns, header=header, format="jpeg", data=jpeg.ravel())

    def _header(self, stamp_ns: int) -> Any:
        sec, nanosec = divmod(stamp_ns, NS_PER_S)
        stamp = typestore().types["builtin_interfaces/msg/Time"](sec=sec, nanosec=nanosec)
        return typestore().types["std_msgs/msg/Header"](stamp=stamp, frame_id="")

    def _message(self, topic: str, kind: str, log_ns: int, **fields: Any) -> None:
        message = typestore().types[kind](**fields)
        self._file.write(topic, kind, log_ns, bytes(typestore().serialize_cdr(message, kind)))
