"""A synthetic recording of the demo bundle's robot, message by message, and ways to write it as a bag."""

from __future__ import annotations

import struct
from binascii import crc32
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import lz4.frame
import numpy as np
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from rosbags.rosbag2.storage_mcap import zstd

from ki_vla_ros.messages.decoding import BagMessage, typestore
from ki_vla_ros.messages.type_names import COMPRESSED_IMAGE, IMAGE
from ki_vla_ros.records import NS_PER_S

START_NS = 1_790_000_000 * NS_PER_S
JOINTS = ("shoulder_pan", "shoulder_lift", "elbow", "forearm_roll", "wrist_pitch", "wrist_roll", "gripper")
CAMERAS = ("scene", "wrist")
MIDDLE_J = np.array([0.0, 0.3, 1.5, 0.0, 1.1, 0.0, 0.02])
JOINT_STATE, STRING = "sensor_msgs/msg/JointState", "std_msgs/msg/String"
TRAJECTORY = "trajectory_msgs/msg/JointTrajectory"
JOINT_TOPIC, COMMAND_TOPIC, INSTRUCTION_TOPIC = (
    "/joint_states",
    "/arm_controller/joint_trajectory",
    "/policy/instruction",
)
SCENE = "/camera/scene/image_raw"
SECONDS = 2.0
Messages = list[BagMessage]

_T = typestore().types


def header(stamp_ns: int) -> Any:
    stamp = _T["builtin_interfaces/msg/Time"](sec=stamp_ns // NS_PER_S, nanosec=stamp_ns % NS_PER_S)
    return _T["std_msgs/msg/Header"](stamp=stamp, frame_id="")


def serialize(message: Any, kind: str) -> bytes:
    return bytes(typestore().serialize_cdr(message, kind))


def image(stamp_ns: int, encoding: str = "rgb8", size: int = 32) -> bytes:
    channels = {"rgb8": 3, "bgr8": 3, "mono8": 1}[encoding]
    pixels = np.full(size * size * channels, stamp_ns // 10**7 % 251, dtype=np.uint8)
    fields = {"height": size, "width": size, "encoding": encoding, "is_bigendian": 0, "step": size * channels}
    return serialize(_T[IMAGE](header=header(stamp_ns), data=pixels, **fields), IMAGE)


def jpeg(stamp_ns: int, content: bytes | None = None) -> bytes:
    if content is None:
        pixels = np.full((32, 32, 3), stamp_ns // 10**7 % 251, dtype=np.uint8)
        content = cv2.imencode(".jpg", pixels)[1].tobytes()
    data = np.frombuffer(content, dtype=np.uint8)
    return serialize(_T[COMPRESSED_IMAGE](header=header(stamp_ns), format="jpeg", data=data), COMPRESSED_IMAGE)


def joint_state(stamp_ns: int, position_J: np.ndarray, names: Sequence[str] = JOINTS) -> bytes:
    none = np.zeros(0)
    fields = {"name": list(names), "position": np.array(position_J, dtype=np.float64), "velocity": none, "effort": none}
    return serialize(_T[JOINT_STATE](header=header(stamp_ns), **fields), JOINT_STATE)


def command(position_J: np.ndarray, names: Sequence[str] = JOINTS) -> bytes:
    none = np.zeros(0)
    duration = _T["builtin_interfaces/msg/Duration"](sec=0, nanosec=100_000_000)
    fields = {"velocities": none, "accelerations": none, "effort": none, "time_from_start": duration}
    point = _T["trajectory_msgs/msg/JointTrajectoryPoint"](positions=np.array(position_J), **fields)
    return serialize(_T[TRAJECTORY](header=header(0), joint_names=list(names), points=[point]), TRAJECTORY)


def text(content: str) -> bytes:
    return serialize(_T[STRING](data=content), STRING)


def where(time_s: float) -> np.ndarray:
    """Joint positions of the recorded motion."""
    wave_J = np.array([0.3, 0.2, 0.2, 0.1, 0.2, 0.1, 0.015]) * np.sin(2.0 * time_s + np.arange(7))
    return MIDDLE_J + wave_J


def recording(
    seconds: float = SECONDS,
    start_ns: int = START_NS,
    transport: str = "raw",
    joint_hz: float = 100.0,
    fps: float = 20.0,
) -> Messages:
    """Two cameras, joint states, a command per tick and one instruction; received 2 ms after their stamps."""
    found = [BagMessage(INSTRUCTION_TOPIC, STRING, start_ns, text("touch the red cube"))]
    for k in range(round(seconds * fps)):
        stamp_ns = start_ns + round(k * NS_PER_S / fps)
        for name in CAMERAS:
            topic = f"/camera/{name}/image_raw"
            kind, data = (IMAGE, image(stamp_ns)) if transport == "raw" else (COMPRESSED_IMAGE, jpeg(stamp_ns))
            suffix = "" if transport == "raw" else "/compressed"
            found.append(BagMessage(topic + suffix, kind, stamp_ns + 2_000_000, data))
    for k in range(round(seconds * joint_hz)):
        stamp_ns = start_ns + round(k * NS_PER_S / joint_hz)
        data = joint_state(stamp_ns, where((stamp_ns - start_ns) / NS_PER_S))
        found.append(BagMessage(JOINT_TOPIC, JOINT_STATE, stamp_ns + 2_000_000, data))
    for k in range(round(seconds * 10)):
        at_ns = start_ns + k * NS_PER_S // 10
        # What the arm does a tenth of a second later.
        found.append(BagMessage(COMMAND_TOPIC, TRAJECTORY, at_ns, command(where(k / 10 + 0.1))))
    return sorted(found, key=lambda message: message.log_ns)


# --- writers


def write_bag(
    folder: Path,
    messages: Messages,
    storage: str = "mcap",
    compression: CompressionMode | None = None,
    silent: Sequence[tuple[str, str]] = (),
) -> Path:
    """A folder with metadata.yaml, as the rosbags library writes it; `silent`: topics and types without a message."""
    plugin = StoragePlugin.MCAP if storage == "mcap" else StoragePlugin.SQLITE3
    writer = Writer(folder, version=9, storage_plugin=plugin)
    if compression is not None:
        writer.set_compression(compression, CompressionFormat.ZSTD)
    with writer:
        connections = {key: writer.add_connection(*key, typestore=typestore()) for key in silent}
        for message in messages:
            key = (message.topic, message.type)
            if key not in connections:
                connections[key] = writer.add_connection(*key, typestore=typestore())
            writer.write(connections[key], message.log_ns, message.data)
    return folder


def record(kind: int, content: bytes) -> bytes:
    return struct.pack("<BQ", kind, len(content)) + content


def sized(content: str | bytes) -> bytes:
    content = content.encode() if isinstance(content, str) else content
    return struct.pack("<I", len(content)) + content


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {"": bytes, "zstd": zstd.compress, "lz4": lz4.frame.compress}


def write_mcap(
    path: Path,
    messages: Messages,
    compression: str = "zstd",
    per_chunk: int = 50,
    index: bool = True,
    summary: bool = True,
    encoding: str = "cdr",
) -> Path:
    """Written as a recorder on a robot does it: many chunks with checksums; `per_chunk` 0: messages without chunks."""
    kinds = list(dict.fromkeys((message.topic, message.type) for message in messages))
    schemas = b"".join(
        record(3, struct.pack("<H", i + 1) + sized(kind) + sized("ros2msg") + sized(""))
        for i, (_, kind) in enumerate(kinds)
    )
    channels = b"".join(
        record(4, struct.pack("<HH", i + 1, i + 1) + sized(topic) + sized(encoding) + sized(b""))
        for i, (topic, _) in enumerate(kinds)
    )
    out = bytearray(b"\x89MCAP0\r\n" + record(1, sized("ros2") + sized("test")))
    chunk_indexes = b""
    definitions = schemas + channels

    def put(message: BagMessage) -> bytes:
        key = kinds.index((message.topic, message.type)) + 1
        return record(5, struct.pack("<HIQQ", key, 0, message.log_ns, message.log_ns) + message.data)

    if not per_chunk:
        out += definitions + b"".join(map(put, messages))
    for first in range(0, len(messages) if per_chunk else 0, per_chunk or 1):
        part = messages[first : first + per_chunk]
        content, offsets = bytearray(definitions if first == 0 else b""), {}
        for message in part:
            key = kinds.index((message.topic, message.type)) + 1
            offsets.setdefault(key, []).append((message.log_ns, len(content)))
            content += put(message)
        times = min(m.log_ns for m in part), max(m.log_ns for m in part)
        stored = COMPRESSORS[compression](bytes(content))
        begin = len(out)
        head = struct.pack("<QQQI", *times, len(content), crc32(content)) + sized(compression)
        out += record(6, head + struct.pack("<Q", len(stored)) + stored)
        length, index_begin = len(out) - begin, len(out)
        if index:
            for key, entries in offsets.items():
                packed = b"".join(struct.pack("<QQ", *entry) for entry in entries)
                out += record(7, struct.pack("<H", key) + sized(packed))
        chunk_indexes += record(
            8,
            struct.pack("<QQQQ", *times, begin, length)
            + sized(b"")
            + struct.pack("<Q", len(out) - index_begin)
            + sized(compression)
            + struct.pack("<QQ", len(stored), len(content)),
        )
    out += record(15, struct.pack("<I", 0))
    summary_at = len(out) if summary else 0
    if summary:
        statistics = struct.pack("<QHIIIIQQ", len(messages), len(kinds), len(kinds), 0, 0, 0, 0, 0) + sized(b"")
        out += schemas + channels + chunk_indexes + record(11, statistics)
    out += record(2, struct.pack("<QQI", summary_at, 0, 0)) + b"\x89MCAP0\r\n"
    path.write_bytes(out)
    return path
