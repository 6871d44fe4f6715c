"""Records to serialized ROS messages, without rclpy: for what is sent often, and for bags."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.records import NS_PER_S, ActionChunk, Motion

CDR = b"\0\1\0\0"  # little-endian
ALL = slice(None)


def encode_command(motion: Motion, now_ns: int, stamp_ns: int = 0, axes: slice = ALL) -> bytes:
    """What lies ahead of a motion at `now_ns`, as a serialized JointTrajectory for joint_trajectory_controller.

    The times of its points count from `now_ns`. `stamp_ns` 0 means "from when you get this"; the present time on the
    controller's clock means that they keep their times however long the message takes. `axes` are the controller's.
    """
    # Always keep the last instant: a motion that only says "stay" has no other.
    first = min(int(np.searchsorted(motion.time_N, now_ns, side="right")), len(motion.time_N) - 1)
    return _encode_trajectory(
        stamp_ns,
        motion.joints[axes],
        np.maximum(motion.time_N[first:] - now_ns, 0),
        motion.position_NJ[first:, axes],
        motion.velocity_NJ[first:, axes],
    )


def encode_array(values: NDArray[np.float64]) -> bytes:
    """A serialized Float64MultiArray without layout."""
    return CDR + struct.pack("<III4x", 0, 0, len(values)) + values.astype("<f8").tobytes()


def encode_twist(twist_6: NDArray[np.float64]) -> bytes:
    """A serialized Twist of vx, vy, vz, wx, wy, wz."""
    return CDR + twist_6.astype("<f8").tobytes()


def encode_stamped(stamp_ns: int, frame_id: str, values: NDArray[np.float64]) -> bytes:
    """A serialized TwistStamped (`values` as in `encode_twist`) or PoseStamped (x, y, z, qx, qy, qz, qw)."""
    text = frame_id.encode() + b"\0"
    head = struct.pack("<iII", *divmod(stamp_ns, NS_PER_S), len(text)) + text
    return CDR + head + bytes(-len(head) % 8) + values.astype("<f8").tobytes()


def encode_chunk(chunk: ActionChunk) -> bytes:
    """The whole predicted chunk, for the record: a serialized JointTrajectory with its observation's stamp."""
    due_H = (np.arange(chunk.horizon) + 1) * chunk.period_ns
    return _encode_trajectory(chunk.start_ns, chunk.joints, due_H, chunk.position_HJ, chunk.velocity_HJ)


def _encode_trajectory(
    stamp_ns: int,
    joints: Sequence[str],
    time_N: NDArray[np.int64],
    position_NJ: NDArray[np.float64],
    velocity_NJ: NDArray[np.float64],
) -> bytes:
    """A trajectory_msgs/JointTrajectory as CDR bytes, with times from its start.

    Packed by hand: through message objects, fifty points would add a millisecond between model and arm, half of it in
    rclpy.
    """
    head = bytearray(CDR)
    head += struct.pack("<iII4x", *divmod(stamp_ns, NS_PER_S), 1)  # no frame: an empty string, padded
    head += _encode_names(tuple(joints))
    head += struct.pack("<I", len(time_N))
    points = np.zeros(len(time_N), dtype=_point_type(len(joints)))
    points["joints"] = points["joints_again"] = len(joints)
    points["position"], points["velocity"] = position_NJ, velocity_NJ
    points["sec"], points["nanosec"] = np.divmod(time_N, NS_PER_S)
    body = points.tobytes()
    # CDR aligns doubles to eight bytes, counted from after its four-byte header: the first point's may need no gap.
    return bytes(head) + (body if (len(head) - 4) % 8 == 0 else body[:4] + body[8:])


@cache
def _encode_names(names: tuple[str, ...]) -> bytes:
    """A sequence of strings, each padded to four bytes."""
    parts = [struct.pack("<I", len(names))]
    for text in (name.encode() + b"\0" for name in names):
        parts.append(struct.pack("<I", len(text)) + text + bytes(-len(text) % 4))
    return b"".join(parts)


@cache
def _point_type(joints: int) -> np.dtype[np.void]:
    """A JointTrajectoryPoint with positions and velocities, where it begins at a multiple of eight bytes."""
    return np.dtype(
        [
            ("joints", "<u4"),
            ("gap", "<u4"),
            ("position", "<f8", (joints,)),
            ("joints_again", "<u4"),
            ("gap_again", "<u4"),
            ("velocity", "<f8", (joints,)),
            ("accelerations", "<u4"),
            ("effort", "<u4"),
            ("sec", "<i4"),
            ("nanosec", "<u4"),
        ]
    )
