"""ROS messages without ROS: names of types, decoding, encoding, pixels."""

from ki_vla_ros.messages.decoding import (
    BagMessage,
    camera_frame,
    decode,
    joint_reading,
    pose_reading,
    read_stamp_ns,
    typestore,
)
from ki_vla_ros.messages.encoding import encode_array, encode_chunk, encode_command, encode_stamped, encode_twist
from ki_vla_ros.messages.pixels import ENCODINGS, decode_compressed, decode_raw, is_depth, read_image
from ki_vla_ros.messages.type_names import (
    COMPRESSED_IMAGE,
    DIAGNOSTICS,
    IMAGE,
    JOINT_STATE,
    POSE,
    POSITIONS,
    TEXT,
    TRAJECTORY,
)

__all__ = [
    "COMPRESSED_IMAGE",
    "DIAGNOSTICS",
    "ENCODINGS",
    "IMAGE",
    "JOINT_STATE",
    "POSE",
    "POSITIONS",
    "TEXT",
    "TRAJECTORY",
    "BagMessage",
    "camera_frame",
    "decode",
    "decode_compressed",
    "decode_raw",
    "encode_array",
    "encode_chunk",
    "encode_command",
    "encode_stamped",
    "encode_twist",
    "is_depth",
    "joint_reading",
    "pose_reading",
    "read_image",
    "read_stamp_ns",
    "typestore",
]
