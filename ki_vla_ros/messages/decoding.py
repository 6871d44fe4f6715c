"""Serialized ROS messages, as bags hold them, to records; without ROS."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from ki_vla_ros.errors import InputError
from ki_vla_ros.messages.pixels import decode_compressed, decode_raw, read_image
from ki_vla_ros.messages.type_names import COMPRESSED_IMAGE, IMAGE, JOINT_STATE, POSE
from ki_vla_ros.records import CameraFrame, JointReading, PoseReading, header_ns, stamp_to_ns

if TYPE_CHECKING:
    from rosbags.typesys.store import Typestore


@cache
def typestore() -> Typestore:
    """The definitions of ROS's own messages, loaded on first use: that takes 100 ms, and the node needs none."""
    from rosbags.typesys import Stores, get_typestore

    return get_typestore(Stores.ROS2_JAZZY)


@dataclass(frozen=True, slots=True, eq=False)
class BagMessage:
    """`data` is CDR as it was received at `log_ns` (the recorder's clock); `type` as "sensor_msgs/msg/Image"."""

    topic: str
    type: str
    log_ns: int
    data: bytes


def decode(message: BagMessage, *expected: str) -> Any:
    """The message as an object with ROS's field names; bytes after it, as rclpy writes them, are ignored.

    InputError if its type is unknown or not among `expected` (a topic may have messages of several types), or if the
    bytes are not such a message. For images use `camera_frame`.
    """
    where = f"{message.topic}: message of {message.log_ns} ns"
    if expected and message.type not in expected:
        raise InputError(f"{message.topic}: expected {' or '.join(expected)}, got a message of {message.type}")
    if message.data[:2] not in (b"\0\0", b"\0\1") or len(message.data) < 4:
        raise InputError(f"{where}: expected CDR, got bytes that begin with {message.data[:4].hex()!r}")
    try:
        definition = typestore().get_msgdef(message.type)
    except Exception as error:  # the library's own errors, and KeyError
        raise InputError(f"{where}: message type {message.type!r} is not known") from error
    read = definition.deserialize_cdr_le if message.data[1] else definition.deserialize_cdr_be
    try:
        return read(message.data[4:], 0, definition.cls, typestore())[0]
    except Exception as error:  # from generated code, which raises whatever a wrong length leads to
        raise InputError(f"{where}: expected a {message.type}, got {len(message.data)} bytes: {error}") from error


def camera_frame(message: BagMessage, camera: str) -> CameraFrame:
    """An Image or CompressedImage as the node sees it, with the same InputError."""
    where = f"camera {camera!r}"
    if message.type == IMAGE:
        image = read_image(where, message.data)
        size = (image.height, image.width, image.step)
        pixels = decode_raw(where, image.encoding, *size, image.data)
        return CameraFrame(camera, image.stamp_ns, pixels)
    if message.type == COMPRESSED_IMAGE:
        compressed = decode(message)
        return CameraFrame(camera, header_ns(compressed), decode_compressed(where, compressed.data, compressed.format))
    raise InputError(f"{where}: expected {IMAGE} or {COMPRESSED_IMAGE} on {message.topic}, got {message.type}")


def joint_reading(message: BagMessage) -> JointReading:
    """A JointState as the node sees it, with the same InputError."""
    state = decode(message, JOINT_STATE)
    return JointReading.from_fields(header_ns(state), state.name, state.position, state.velocity, state.effort)


def pose_reading(message: BagMessage) -> PoseReading:
    """A PoseStamped as the node sees it, with the same InputError."""
    return PoseReading.from_message(decode(message, POSE))


def read_stamp_ns(message: BagMessage) -> int:
    """The stamp of a message that begins with a header, without reading the rest; InputError if it is too short."""
    try:
        sec, nanosec = struct.unpack_from("<iI" if message.data[1] else ">iI", message.data, 4)
    except (struct.error, IndexError) as error:
        raise InputError(f"{message.topic}: expected a header, got {len(message.data)} bytes") from error
    return stamp_to_ns(sec, nanosec)
