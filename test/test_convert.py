"""ROS messages <-> records: encodings, strides, times; messages that do not fit are refused by name."""

from __future__ import annotations

import array
import json

import numpy as np
import pytest
from builtin_interfaces.msg import Time
from numpy.typing import NDArray
from sensor_msgs.msg import Image, JointState

from ki_vla_ros import convert
from ki_vla_ros.diagnostics import Level, Report
from ki_vla_ros.errors import InputError
from ki_vla_ros.records import ActionChunk

RGB = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)


def image(pixels: NDArray[np.uint8], encoding: str, padding: int = 0) -> Image:
    """`pixels` [H, W, C] as a message whose rows end in `padding` bytes of 255."""
    height, width, channels = pixels.shape
    rows = np.full((height, width * channels + padding), 255, dtype=np.uint8)
    rows[:, : width * channels] = pixels.reshape(height, -1)
    message = Image(height=height, width=width, encoding=encoding, step=rows.shape[1])
    message.header.stamp = Time(sec=3, nanosec=500)
    message.data = array.array("B", rows.tobytes())
    return message


def with_alpha(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.concatenate([rgb, np.full((*rgb.shape[:2], 1), 77, dtype=np.uint8)], axis=2)


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize(
    "encoding, pixels",
    [
        ("rgb8", RGB),
        ("bgr8", RGB[..., ::-1]),
        ("rgba8", with_alpha(RGB)),
        ("bgra8", with_alpha(RGB[..., ::-1])),
    ],
)
def test_colour_encodings_and_row_padding(encoding: str, pixels: NDArray[np.uint8], padding: int) -> None:
    frame = convert.frame_from_message(image(pixels, encoding, padding), "scene")
    np.testing.assert_array_equal(frame.rgb_HWC, RGB)
    assert frame.rgb_HWC.dtype == np.uint8 and frame.rgb_HWC.flags.c_contiguous
    assert (frame.camera, frame.stamp_ns) == ("scene", 3_000_000_500)
    assert not frame.rgb_HWC.flags.writeable


def test_grey_becomes_three_equal_channels() -> None:
    frame = convert.frame_from_message(image(RGB[..., :1], "mono8", padding=2), "scene")
    for channel in range(3):
        np.testing.assert_array_equal(frame.rgb_HWC[..., channel], RGB[..., 0])


def test_rgb8_without_padding_is_not_copied() -> None:
    message = image(RGB, "rgb8")
    frame = convert.frame_from_message(message, "scene")
    assert np.shares_memory(frame.rgb_HWC, np.frombuffer(message.data, dtype=np.uint8))


@pytest.mark.parametrize(
    "changes, fault",
    [
        ({"encoding": "32FC1"}, "camera 'scene': image encoding '32FC1' is not read, expected one of rgb8, bgr8"),
        ({"step": 8}, "needs step >= 9 and height [*] step bytes, got step 8 and 18 bytes"),
        ({"height": 3}, "3 x 3 rgb8 .* got step 9 and 18 bytes"),
        ({"height": 0}, "got step 9 and 18 bytes"),
        ({"width": 4}, "needs step >= 12"),
        ({"data": array.array("B")}, "got step 9 and 0 bytes"),
    ],
)
def test_images_that_do_not_fit_are_refused(changes: dict[str, object], fault: str) -> None:
    message = image(RGB, "rgb8")
    for field, value in changes.items():
        setattr(message, field, value)
    with pytest.raises(InputError, match=fault):
        convert.frame_from_message(message, "scene")


def test_joint_state() -> None:
    message = JointState(name=["b", "a"], position=[1.0, 2.0])
    message.header.stamp = Time(sec=1, nanosec=2)
    reading = convert.reading_from_message(message)
    assert (reading.stamp_ns, reading.names) == (1_000_000_002, ("b", "a"))
    np.testing.assert_array_equal(reading.position_J, [1.0, 2.0])


@pytest.mark.parametrize(
    "names, positions, fault",
    [
        (["a", "b"], [1.0], "expected one position per name, got 2 names, 1 positions"),
        (["a", "b", "a"], [1.0, 2.0, 3.0], "expected each joint once, got a more than once"),
    ],
)
def test_joint_states_that_do_not_fit_are_refused(names: list[str], positions: list[float], fault: str) -> None:
    with pytest.raises(InputError, match=f"joint state: {fault}"):
        convert.reading_from_message(JointState(name=names, position=positions))


def test_command_starts_now_and_points_are_due_relative_to_now() -> None:
    chunk = ActionChunk(
        start_ns=10_000_000_000,
        period_ns=50_000_000,
        joints=("a", "b"),
        position_HJ=np.array([[1.0, 2.0], [3.0, 4.0]]),
        velocity_HJ=np.array([[0.5, 0.0], [0.0, 0.0]]),
    )
    message = convert.command_message(chunk, now_ns=9_020_000_000)
    assert message.header.stamp == Time()
    assert message.joint_names == ["a", "b"]
    assert [(p.time_from_start.sec, p.time_from_start.nanosec) for p in message.points] == [
        (1, 30_000_000),
        (1, 80_000_000),
    ]
    assert [list(p.positions) for p in message.points] == [[1.0, 2.0], [3.0, 4.0]]
    assert [list(p.velocities) for p in message.points] == [[0.5, 0.0], [0.0, 0.0]]

    record = convert.chunk_message(chunk)
    assert record.header.stamp == Time(sec=10)
    assert [p.time_from_start.nanosec for p in record.points] == [50_000_000, 100_000_000]


def test_text_refuses_nan_which_is_not_json() -> None:
    assert json.loads(convert.text_message({"hold": None, "n": 1.5}).data) == {"hold": None, "n": 1.5}
    with pytest.raises(ValueError, match="not JSON compliant"):
        convert.text_message({"n": float("nan")})


def test_diagnostics() -> None:
    report = Report(Level.WARNING, "holding: why", {"chunks": "3"})
    message = convert.diagnostics_message("/policy", "demo", report, 2_000_000_001)
    status = message.status[0]
    assert (status.level, status.name, status.hardware_id, status.message) == (
        b"\x01",
        "/policy",
        "demo",
        "holding: why",
    )
    assert [(v.key, v.value) for v in status.values] == [("chunks", "3")]
    assert message.header.stamp == Time(sec=2, nanosec=1)
