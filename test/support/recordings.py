"""Bags for replay tests: the node's own loop runs without ROS on a made-up robot, and all it reads and sends is kept.

The recorder gets every message 3 ms after the node did, as a real one would.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rosbags.rosbag2 import StoragePlugin, Writer

from ki_vla_ros.bundle.folder import Bundle
from ki_vla_ros.messages.decoding import typestore
from ki_vla_ros.records import NS_PER_S, ActionChunk, CameraFrame, JointReading
from support.bundles import CAMERAS, JOINTS, TASK, demo_observation
from support.loop_rig import START, FakeWire, Rig

MS = 1_000_000
IMAGE, JPEG = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"
RECORDER_LAG_NS = 3 * MS
CAMERA_DELAY_NS, TICK_NS = 8 * MS, 30 * MS
SIZE = 48


class RecordingWriter:
    """A rosbag2 folder, mcap."""

    def __init__(self, folder: Path) -> None:
        self._writer = Writer(folder, version=Writer.VERSION_LATEST, storage_plugin=StoragePlugin.MCAP)
        self._writer.open()
        self._connections: dict[str, Any] = {}

    def write(self, topic: str, kind: str, log_ns: int, **fields: Any) -> None:
        if topic not in self._connections:
            self._connections[topic] = self._writer.add_connection(topic, kind, typestore=typestore())
        message = typestore().types[kind](**fields)
        self._writer.write(self._connections[topic], log_ns, bytes(typestore().serialize_cdr(message, kind)))

    def close(self) -> None:
        self._writer.close()

    def joints(self, log_ns: int, stamp_ns: int, position_J: Any) -> None:
        position_J, nothing = np.asarray(position_J, dtype=np.float64), np.array([], dtype=np.float64)
        fields = {"name": list(JOINTS), "position": position_J, "velocity": nothing, "effort": nothing}
        self.write("/joint_states", "sensor_msgs/msg/JointState", log_ns, header=header(stamp_ns), **fields)

    def image(self, camera: str, log_ns: int, stamp_ns: int, rgb_HWC: Any) -> None:
        height, width = rgb_HWC.shape[:2]
        fields = {"height": height, "width": width, "encoding": "rgb8", "is_bigendian": 0, "step": 3 * width}
        data = np.ascontiguousarray(rgb_HWC).ravel()
        self.write(f"/camera/{camera}/image_raw", IMAGE, log_ns, header=header(stamp_ns), **fields, data=data)

    def jpeg(self, camera: str, log_ns: int, stamp_ns: int, rgb_HWC: Any, broken: bool = False) -> None:
        data = np.arange(200, dtype=np.uint8) if broken else cv2.imencode(".png", rgb_HWC[..., ::-1])[1].ravel()
        topic = f"/camera/{camera}/image_raw/compressed"
        self.write(topic, JPEG, log_ns, header=header(stamp_ns), format="png", data=data)

    def text(self, topic: str, log_ns: int, text: str) -> None:
        self.write(topic, "std_msgs/msg/String", log_ns, data=text)

    def chunk(self, log_ns: int, chunk: ActionChunk, topic: str = "/policy/chunk") -> None:
        nothing = np.array([], dtype=np.float64)
        points = [
            typestore().types["trajectory_msgs/msg/JointTrajectoryPoint"](
                positions=position_J,
                velocities=velocity_J,
                accelerations=nothing,
                effort=nothing,
                time_from_start=typestore().types["builtin_interfaces/msg/Duration"](
                    *divmod((k + 1) * chunk.period_ns, NS_PER_S)
                ),
            )
            for k, (position_J, velocity_J) in enumerate(zip(chunk.position_HJ, chunk.velocity_HJ, strict=True))
        ]
        kind = "trajectory_msgs/msg/JointTrajectory"
        self.write(topic, kind, log_ns, header=header(chunk.start_ns), joint_names=list(chunk.joints), points=points)


def header(stamp_ns: int) -> Any:
    stamp = typestore().types["builtin_interfaces/msg/Time"](*divmod(stamp_ns, NS_PER_S))
    return typestore().types["std_msgs/msg/Header"](stamp=stamp, frame_id="")


def path_J(time_ns: int) -> Any:
    """Where the robot's joints are: slow sines around the demo's pose."""
    phase = 2.0 * np.pi * (time_ns - START) / NS_PER_S * np.linspace(0.2, 0.5, len(JOINTS))
    return demo_observation().state_S + np.array([0.05] * 6 + [0.005]) * np.sin(phase) + np.array([0.0] * 6 + [0.01])


def picture(camera: str, number: int) -> Any:
    rng = np.random.default_rng((CAMERAS.index(camera), number))
    return rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


class _SlowWire(FakeWire):
    def moves_arm(self) -> bool:
        return False

    def now_ns(self) -> int:
        return self.time_ns + TICK_NS


def record_run(folder: Path, bundle: Bundle, seconds: float, settings: Mapping[str, object]) -> list[ActionChunk]:
    """Runs a node's loop with these settings and records inputs and outputs in `folder`; its chunks as published."""
    rig = Rig(bundle)
    rig.wire = rig.loop.wire = _SlowWire()  # type: ignore[assignment]
    rig.change(**settings)
    rig.loop.begin()
    writer = RecordingWriter(folder)
    writer.text("/policy/instruction", START - MS, TASK)
    for number in range(round(seconds * 100)):
        now_ns = rig.wire.time_ns = START + number * 10 * MS
        log_ns = now_ns + RECORDER_LAG_NS
        if number % 5 == 0:
            for camera in CAMERAS:
                stamp_ns, rgb_HWC = now_ns - CAMERA_DELAY_NS, picture(camera, number)
                rig.buffer.add_frame(CameraFrame(camera, stamp_ns, rgb_HWC), now_ns)
                writer.image(camera, log_ns, stamp_ns, rgb_HWC)
        rig.buffer.add_joints(JointReading(now_ns, JOINTS, path_J(now_ns)))
        writer.joints(log_ns, now_ns, path_J(now_ns))
        if number % 10 == 5 and number > 10:
            made = len(rig.wire.chunks)
            rig.loop.step(rig.settings, now_ns, 0)
            writer.text("/policy/tick", log_ns + TICK_NS, json.dumps(rig.wire.ticks[-1]))
            for chunk in rig.wire.chunks[made:]:
                writer.chunk(log_ns + TICK_NS, chunk)
    writer.close()
    return rig.wire.chunks


def record_inputs(folder: Path, seconds: float, instruction: str = TASK) -> None:
    """Only what a robot's drivers publish, and the task; the arm follows `path_J`."""
    writer = RecordingWriter(folder)
    if instruction:
        writer.text("/policy/instruction", START - MS, instruction)
    for number in range(round(seconds * 100)):
        now_ns = START + number * 10 * MS
        if number % 5 == 0:
            for camera in CAMERAS:
                writer.image(camera, now_ns + CAMERA_DELAY_NS, now_ns, picture(camera, number))
        writer.joints(now_ns + MS, now_ns, path_J(now_ns))
    writer.close()
