"""ROS messages to records and back: encodings, strides, times; malformed messages are refused by name."""

from __future__ import annotations

import array
import json

import cv2
import numpy as np
import pytest
from builtin_interfaces.msg import Duration, Time
from geometry_msgs.msg import Point, Pose, PoseStamped, Quaternion, Twist, TwistStamped, Vector3
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from rclpy.serialization import deserialize_message, serialize_message
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Float64MultiArray, Header
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from ki_vla_ros.errors import InputError
from ki_vla_ros.messages.encoding import encode_array, encode_chunk, encode_command, encode_stamped, encode_twist
from ki_vla_ros.messages.pixels import ENCODINGS, decode_raw, read_image
from ki_vla_ros.records import ActionChunk, Motion
from ki_vla_ros.ros import topics
from ki_vla_ros.runtime.diagnostics import Level, Report

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
    frame = topics.frame_from_message(serialize_message(image(pixels, encoding, padding)), "scene")
    np.testing.assert_array_equal(frame.rgb_HWC, RGB)
    assert frame.rgb_HWC.dtype == np.uint8 and frame.rgb_HWC.flags.c_contiguous
    assert (frame.camera, frame.stamp_ns) == ("scene", 3_000_000_500)
    assert not frame.rgb_HWC.flags.writeable


def test_grey_becomes_three_equal_channels() -> None:
    frame = topics.frame_from_message(serialize_message(image(RGB[..., :1], "mono8", padding=2)), "scene")
    for channel in range(3):
        np.testing.assert_array_equal(frame.rgb_HWC[..., channel], RGB[..., 0])


def test_rgb8_without_padding_is_not_copied() -> None:
    message = serialize_message(image(RGB, "rgb8"))
    frame = topics.frame_from_message(message, "scene")
    assert np.shares_memory(frame.rgb_HWC, np.frombuffer(message, dtype=np.uint8))


@pytest.mark.parametrize(
    "changes, fault",
    [
        ({"encoding": "32FC1"}, "camera 'scene': image encoding '32FC1' is not supported, .*; it holds depth"),
        ({"step": 8}, "needs step >= 9 and height [*] step bytes, got step 8 and 18 bytes"),
        ({"height": 3}, "3 x 3 rgb8 .* got step 9 and 18 bytes"),
        ({"height": 0}, "got step 9 and 18 bytes"),
        ({"width": 4}, "needs step >= 12"),
        ({"data": array.array("B")}, "got step 9 and 0 bytes"),
    ],
)
def test_malformed_images_are_refused(changes: dict[str, object], fault: str) -> None:
    message = image(RGB, "rgb8")
    for field, value in changes.items():
        setattr(message, field, value)
    with pytest.raises(InputError, match=fault):
        topics.frame_from_message(serialize_message(message), "scene")


@given(
    frame_id=st.text(max_size=9),
    encoding=st.text(st.characters(codec="ascii", exclude_characters="\0"), max_size=9),
    numbers=st.tuples(*[st.integers(0, 2**32 - 1)] * 3),
    stamp=st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 10**9 - 1)),
    data=st.binary(max_size=20),
    big=st.booleans(),
)
def test_a_serialized_image_is_read_as_rclpy_reads_it(
    frame_id: str, encoding: str, numbers: tuple[int, int, int], stamp: tuple[int, int], data: bytes, big: bool
) -> None:
    message = Image(encoding=encoding, is_bigendian=int(big), data=array.array("B", data))
    message.height, message.width, message.step = numbers
    message.header.frame_id = frame_id.replace("\0", "")
    message.header.stamp = Time(sec=stamp[0], nanosec=stamp[1])
    wire = serialize_message(message)
    found = read_image("a test", wire)
    assert (found.height, found.width, found.step) == numbers
    assert (found.encoding, bytes(found.data)) == (encoding, data)
    assert found.stamp_ns == stamp[0] * 10**9 + stamp[1]
    for size in range(len(wire) - len(data) if data else 0):
        with pytest.raises(InputError, match="a test: expected "):
            read_image("a test", wire[:size])


def test_an_image_cut_off_in_its_pixels_is_refused() -> None:
    message = image(RGB, "rgb8")
    wire = serialize_message(message)
    start = wire.index(bytes(message.data))
    with pytest.raises(InputError, match="18 bytes of pixels announced, 5 present"):
        read_image("a test", wire[: start + 5])


def test_a_message_in_another_serialization_is_refused() -> None:
    with pytest.raises(InputError, match="serialized as CDR, got bytes that begin with 00030000"):
        read_image("a test", b"\0\3" + serialize_message(image(RGB, "rgb8"))[2:])


def test_joint_state() -> None:
    message = JointState(name=["b", "a"], position=[1.0, 2.0])
    message.header.stamp = Time(sec=1, nanosec=2)
    reading = topics.reading_from_message(message)
    assert (reading.stamp_ns, reading.names) == (1_000_000_002, ("b", "a"))
    np.testing.assert_array_equal(reading.position_J, [1.0, 2.0])


@pytest.mark.parametrize(
    "names, positions, fault",
    [
        (["a", "b"], [1.0], "expected one position per name, got 2 names, 1 positions"),
        (["a", "b", "a"], [1.0, 2.0, 3.0], "expected each joint once, got a more than once"),
    ],
)
def test_malformed_joint_states_are_refused(names: list[str], positions: list[float], fault: str) -> None:
    with pytest.raises(InputError, match=f"joint state: {fault}"):
        topics.reading_from_message(JointState(name=names, position=positions))


def motion() -> Motion:
    """A motion that is new from 9.05 s on; its first part repeats the previous motion."""
    return Motion(
        joints=("a", "b"),
        from_ns=9_050_000_000,
        time_N=np.array([9_000_000_000, 9_050_000_000, 9_100_000_000, 9_150_000_000]),
        position_NJ=np.array([[0.0, 1.0], [1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
        velocity_NJ=np.array([[0.5, 0.0], [0.25, 0.0], [0.125, 0.0], [0.0, 0.0]]),
    )


def due(message: JointTrajectory) -> list[int]:
    return [p.time_from_start.sec * 1_000_000_000 + p.time_from_start.nanosec for p in message.points]


def test_command_starts_now_and_points_are_due_relative_to_now() -> None:
    message = trajectory(encode_command(motion(), now_ns=9_020_000_000))
    assert message.header.stamp == Time()
    assert message.joint_names == ["a", "b"]
    assert due(message) == [30_000_000, 80_000_000, 130_000_000]
    assert [list(p.positions) for p in message.points] == [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    assert [list(p.velocities) for p in message.points] == [[0.25, 0.0], [0.125, 0.0], [0.0, 0.0]]


def test_a_spliced_command_says_when_its_times_begin() -> None:
    """On the controller's clock, which is not the one by which the motion was made."""
    message = trajectory(encode_command(motion(), now_ns=9_020_000_000, stamp_ns=70_000_000_001))
    assert message.header.stamp == Time(sec=70, nanosec=1)
    assert due(message) == [30_000_000, 80_000_000, 130_000_000]


def test_a_motion_of_one_instant_is_still_a_command() -> None:
    whole = motion()
    rest = Motion(whole.joints, whole.from_ns, np.array([whole.from_ns]), whole.position_NJ[:1], np.zeros((1, 2)))
    assert due(trajectory(encode_command(rest, now_ns=9_020_000_000))) == [30_000_000]
    assert due(trajectory(encode_command(rest, now_ns=9_060_000_000))) == [0]


def test_a_controller_gets_its_own_axes_only() -> None:
    message = trajectory(encode_command(motion(), now_ns=9_020_000_000, axes=slice(1, 2)))
    assert message.joint_names == ["b"]
    assert [list(p.positions) for p in message.points] == [[2.0], [4.0], [6.0]]
    assert [list(p.velocities) for p in message.points] == [[0.0]] * 3


@given(
    numbers=st.lists(st.floats(allow_nan=False), max_size=9),
    frame_id=st.text(max_size=9).filter(lambda text: "\0" not in text),
    stamp=st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 10**9 - 1)),
)
def test_serialized_streams_equal_rclpys(numbers: list[float], frame_id: str, stamp: tuple[int, int]) -> None:
    stamp_ns = stamp[0] * 10**9 + stamp[1]
    array_message = Float64MultiArray(data=array.array("d", numbers))
    assert deserialize_message(encode_array(np.array(numbers)), Float64MultiArray) == array_message
    vx, vy, vz, wx, wy, wz, w = (numbers + [0.5] * 7)[:7]
    seven = np.array([vx, vy, vz, wx, wy, wz, w])
    linear, angular = Vector3(x=vx, y=vy, z=vz), Vector3(x=wx, y=wy, z=wz)
    twist, header = Twist(linear=linear, angular=angular), Header(frame_id=frame_id)
    header.stamp = topics.ns_to_stamp(stamp_ns)
    assert deserialize_message(encode_twist(seven[:6]), Twist) == twist
    stamped = TwistStamped(header=header, twist=twist)
    assert deserialize_message(encode_stamped(stamp_ns, frame_id, seven[:6]), TwistStamped) == stamped
    turned = Quaternion(x=wx, y=wy, z=wz, w=w)
    pose = PoseStamped(header=header, pose=Pose(position=Point(x=vx, y=vy, z=vz), orientation=turned))
    assert deserialize_message(encode_stamped(stamp_ns, frame_id, seven), PoseStamped) == pose


def test_chunk_record() -> None:
    chunk = ActionChunk(10_000_000_000, 50_000_000, ("a",), np.array([[1.0], [3.0]]), np.array([[0.5], [0.0]]))
    record = trajectory(encode_chunk(chunk))
    assert record.header.stamp == Time(sec=10)
    assert due(record) == [50_000_000, 100_000_000]
    assert [list(p.positions) for p in record.points] == [[1.0], [3.0]]


def test_compressed_images_and_receive_time() -> None:
    _, png = cv2.imencode(".png", RGB[..., ::-1])
    message = CompressedImage(format="rgb8; png compressed bgr8", data=array.array("B", png.tobytes()))
    message.header.stamp = Time(sec=3)
    frame = topics.frame_from_message(message, "scene")
    np.testing.assert_array_equal(frame.rgb_HWC, RGB)
    assert frame.stamp_ns == 3_000_000_000
    assert topics.frame_from_message(message, "scene", received_ns=7).stamp_ns == 7
    assert topics.frame_from_message(serialize_message(image(RGB, "rgb8")), "scene", received_ns=7).stamp_ns == 7
    assert topics.reading_from_message(JointState(name=["a"], position=[1.0]), received_ns=7).stamp_ns == 7
    message.data = array.array("B", b"neither")
    with pytest.raises(InputError, match="camera 'scene': expected a jpeg or png image, got 7 bytes"):
        topics.frame_from_message(message, "scene")


def test_text_refuses_nan_which_is_not_json() -> None:
    assert json.loads(topics.text_message({"hold": None, "n": 1.5}).data) == {"hold": None, "n": 1.5}
    with pytest.raises(ValueError, match="not JSON compliant"):
        topics.text_message({"n": float("nan")})


def test_diagnostics() -> None:
    report = Report(Level.WARNING, "holding: why", {"chunks": "3"})
    message = topics.diagnostics_message("/policy", "demo", report, 2_000_000_001)
    status = message.status[0]
    assert (status.level, status.name, status.hardware_id, status.message) == (
        b"\x01",
        "/policy",
        "demo",
        "holding: why",
    )
    assert [(v.key, v.value) for v in status.values] == [("chunks", "3")]
    assert message.header.stamp == Time(sec=2, nanosec=1)


def trajectory(serialized: bytes) -> JointTrajectory:
    return deserialize_message(serialized, JointTrajectory)


@given(
    joints=st.lists(st.text(min_size=1, max_size=9).filter(lambda name: "\0" not in name), min_size=1, max_size=9),
    points=st.integers(1, 60),
    seed=st.integers(0, 99),
)
def test_a_serialized_trajectory_equals_rclpys(joints: list[str], points: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((2, points, len(joints)))
    times = np.cumsum(rng.integers(1, 3_000_000_000, points))
    start_ns = int(rng.integers(0, 2**60))
    made = Motion(tuple(joints), start_ns, start_ns + times, *values)
    message = JointTrajectory(joint_names=joints)
    message.header.stamp = topics.ns_to_stamp(start_ns)
    message.points = [
        JointTrajectoryPoint(
            positions=array.array("d", values[0, k].tobytes()),
            velocities=array.array("d", values[1, k].tobytes()),
            time_from_start=Duration(sec=int(times[k]) // 10**9, nanosec=int(times[k]) % 10**9),
        )
        for k in range(points)
    ]
    serialized = encode_command(made, now_ns=start_ns, stamp_ns=start_ns)
    assert trajectory(serialized) == message


@pytest.mark.parametrize("encoding", [name for name in ENCODINGS if "UC" not in name])  # cv_bridge refuses plain types
def test_the_same_pixels_as_cv_bridge(encoding: str) -> None:
    """Runs only with a ROS installation: cv_bridge is not among the wheels."""
    bridge = pytest.importorskip("cv_bridge").CvBridge()
    # cv_bridge does not know ROS's newer names of these two (vision_opencv 4.1); their older ones say the same.
    theirs = {"uyvy": "yuv422", "yuyv": "yuv422_yuy2"}.get(encoding, encoding)
    height, width = 6, 8
    row = width * ENCODINGS[encoding].bytes_per_pixel
    pixels = np.random.default_rng(0).integers(0, 256, (height, row), dtype=np.uint8)
    data = array.array("B", pixels.tobytes())
    message = Image(height=height, width=width, encoding=theirs, step=row, data=data)
    got = decode_raw("camera", encoding, height, width, row, data)
    np.testing.assert_array_equal(got, bridge.imgmsg_to_cv2(message, "rgb8"))
