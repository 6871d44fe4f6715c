"""ROS messages <-> records. With node.py and sim/ the only file that imports ROS.

Legend: H image height or horizon (by name), W width, C channel, J joints.
"""

from __future__ import annotations

import array
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from builtin_interfaces.msg import Duration, Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from numpy.typing import NDArray
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from ki_vla_ros.diagnostics import Report
from ki_vla_ros.errors import InputError
from ki_vla_ros.records import NS_PER_S, ActionChunk, CameraFrame, JointReading

# Channels per pixel and the place of red, green and blue among them, by sensor_msgs encoding.
_ENCODINGS: Mapping[str, tuple[int, tuple[int, int, int]]] = {
    "rgb8": (3, (0, 1, 2)),
    "bgr8": (3, (2, 1, 0)),
    "rgba8": (4, (0, 1, 2)),
    "bgra8": (4, (2, 1, 0)),
    "mono8": (1, (0, 0, 0)),
}


def stamp_to_ns(stamp: Time) -> int:
    return int(stamp.sec) * NS_PER_S + int(stamp.nanosec)


def ns_to_stamp(time_ns: int) -> Time:
    return Time(sec=time_ns // NS_PER_S, nanosec=time_ns % NS_PER_S)


def frame_from_message(message: Image, camera: str) -> CameraFrame:
    """An rgb8 image without row padding is not copied: the frame then shares the message's memory.

    InputError for an encoding we do not read, or where height, width, step and data do not fit.
    """
    known = _ENCODINGS.get(message.encoding)
    if known is None:
        raise InputError(
            f"camera {camera!r}: image encoding {message.encoding!r} is not read, expected one of "
            f"{', '.join(_ENCODINGS)}"
        )
    channels, order = known
    height, width, step = int(message.height), int(message.width), int(message.step)
    size = len(message.data)
    if height < 1 or width < 1 or step < width * channels or size != height * step:
        raise InputError(
            f"camera {camera!r}: an image of {width} x {height} {message.encoding} needs step >= {width * channels} "
            "and "
            f"height * step bytes, got step {step} and {size} bytes"
        )
    rows = np.frombuffer(message.data, dtype=np.uint8).reshape(height, step)
    pixels = rows[:, : width * channels].reshape(height, width, channels)
    rgb_HWC = np.ascontiguousarray(pixels if order == (0, 1, 2) and channels == 3 else pixels[..., order])
    rgb_HWC.flags.writeable = False
    return CameraFrame(camera, stamp_to_ns(message.header.stamp), rgb_HWC)


def reading_from_message(message: JointState) -> JointReading:
    """InputError where names and positions do not fit; what the values must be is for the observation to say."""
    names = tuple(message.name)
    if len(names) != len(message.position):
        raise InputError(
            f"joint state: expected one position per name, got {len(names)} names, {len(message.position)} positions"
        )
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise InputError(f"joint state: expected each joint once, got {', '.join(twice)} more than once")
    return JointReading(stamp_to_ns(message.header.stamp), names, np.array(message.position, dtype=np.float64))


def command_message(command: ActionChunk, now_ns: int) -> JointTrajectory:
    """For joint_trajectory_controller: stamp 0 (start now), each point as far ahead of `now_ns` as it is due."""
    return _trajectory(command, Time(), now_ns)


def chunk_message(chunk: ActionChunk) -> JointTrajectory:
    """The predicted chunk as a record of it: stamped with its observation, nothing dropped."""
    return _trajectory(chunk, ns_to_stamp(chunk.start_ns), chunk.start_ns)


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


def _trajectory(chunk: ActionChunk, stamp: Time, start_ns: int) -> JointTrajectory:
    message = JointTrajectory(joint_names=list(chunk.joints))
    message.header.stamp = stamp
    message.points = [
        _point(position_J, velocity_J, chunk.due_ns(k) - start_ns)
        for k, (position_J, velocity_J) in enumerate(zip(chunk.position_HJ, chunk.velocity_HJ, strict=True))
    ]
    return message


def _point(
    position_J: NDArray[np.float64], velocity_J: NDArray[np.float64], from_start_ns: int
) -> JointTrajectoryPoint:
    return JointTrajectoryPoint(
        positions=_doubles(position_J),
        velocities=_doubles(velocity_J),
        time_from_start=Duration(sec=from_start_ns // NS_PER_S, nanosec=from_start_ns % NS_PER_S),
    )


def _doubles(values: NDArray[np.float64] | Sequence[float]) -> Any:
    """The array type that message setters take without looking at each element."""
    return array.array("d", np.asarray(values, dtype=np.float64).tobytes())
