"""ROS messages <-> records. With ros/node.py and sim/ the only file that imports ROS.

Legend: H image height or horizon (by name), W width, C channel, J joints.
"""

from __future__ import annotations

import array
import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from numpy.typing import NDArray
from rclpy.serialization import deserialize_message
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Float64MultiArray, String

from ki_vla_ros.errors import InputError
from ki_vla_ros.messages.decode import header_ns
from ki_vla_ros.messages.encode import encode_trajectory
from ki_vla_ros.messages.pixels import ENCODINGS, decode_compressed, decode_raw, read_image
from ki_vla_ros.records import NS_PER_S, ActionChunk, CameraFrame, JointReading, Motion
from ki_vla_ros.runtime.diagnostics import Report


def ns_to_stamp(time_ns: int) -> Time:
    return Time(sec=time_ns // NS_PER_S, nanosec=time_ns % NS_PER_S)


def frame_from_message(message: bytes | CompressedImage, camera: str, received_ns: int | None = None) -> CameraFrame:
    """A frame from a serialized Image, or from a CompressedImage.

    An rgb8 image without row padding is not copied: the frame then shares the bytes' memory. `received_ns` takes the
    place of the header's stamp. InputError for an image that cannot be read; an encoding that we do not know is left to
    cv_bridge where that is installed.
    """
    where = f"camera {camera!r}"
    if isinstance(message, CompressedImage):
        stamp_ns = header_ns(message) if received_ns is None else received_ns
        return CameraFrame(camera, stamp_ns, decode_compressed(where, message.data))
    image = read_image(where, message)
    stamp_ns = image.stamp_ns if received_ns is None else received_ns
    if image.encoding not in ENCODINGS and (bridge := _cv_bridge()) is not None:
        try:
            return CameraFrame(camera, stamp_ns, bridge.imgmsg_to_cv2(deserialize_message(message, Image), "rgb8"))
        except Exception as error:  # cv_bridge's own and OpenCV's, which share no base but this
            raise InputError(f"{where}: image encoding {image.encoding!r}: cv_bridge says {error}") from error
    size = (image.height, image.width, image.step)
    return CameraFrame(camera, stamp_ns, decode_raw(where, image.encoding, *size, image.is_bigendian, image.data))


@cache
def _cv_bridge() -> Any:
    """None where it is not installed: among the wheels there is none."""
    try:
        from cv_bridge import CvBridge
    except ImportError:
        return None
    return CvBridge()


def reading_from_message(message: JointState, received_ns: int | None = None) -> JointReading:
    """InputError as JointReading.from_fields."""
    stamp_ns = header_ns(message) if received_ns is None else received_ns
    return JointReading.from_fields(stamp_ns, message.name, message.position)


def command_message(motion: Motion, now_ns: int, splice: bool = False) -> bytes:
    """A JointTrajectory for joint_trajectory_controller, serialized: what of the motion lies ahead.

    With stamp 0, "start now", everything after `now_ns`. With `splice` the stamp is the instant from which the motion
    is new; until then a controller that can goes on with what it has.
    """
    start_ns = motion.from_ns if splice else now_ns
    # The last instant always: a motion that only says "stay" has no other.
    first = min(int(np.searchsorted(motion.time_N, start_ns, side="right")), len(motion.time_N) - 1)
    return encode_trajectory(
        start_ns if splice else 0,
        motion.joints,
        motion.time_N[first:] - start_ns,
        motion.position_NJ[first:],
        motion.velocity_NJ[first:],
    )


def stream_message(position_J: NDArray[np.float64]) -> Float64MultiArray:
    """For forward_command_controller: positions in the bundle's joint order."""
    return Float64MultiArray(data=_doubles(position_J))


def chunk_message(chunk: ActionChunk) -> bytes:
    """The predicted chunk as a record of it, a serialized JointTrajectory: stamped with its observation, all of it."""
    due_H = (np.arange(chunk.horizon) + 1) * chunk.period_ns
    return encode_trajectory(chunk.start_ns, chunk.joints, due_H, chunk.position_HJ, chunk.velocity_HJ)


def text_message(fields: Mapping[str, object]) -> String:
    """JSON without NaN, which many readers do not take."""
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


def _doubles(values: NDArray[np.float64] | Sequence[float]) -> Any:
    """The array type that message setters take without looking at each element."""
    return array.array("d", np.asarray(values, dtype=np.float64).tobytes())
