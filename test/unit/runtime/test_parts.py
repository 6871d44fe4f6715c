"""Signals that come in parts, from several topics, in other units and as poses: each part has its own age."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from support.signals import joint_signal, pose_signals

from ki_vla_ros.errors import InputError, StaleInput
from ki_vla_ros.records import CameraFrame, JointReading, PoseReading, SignalReading
from ki_vla_ros.robot import Signal, rotations
from ki_vla_ros.runtime.observation import CameraSource, ObservationBuffer

MS = 1_000_000
NOW = 1_000_000 * MS
ARM = (joint_signal("a", -3.2, 3.2, 2.0), joint_signal("b", -3.2, 3.2, 2.0))
GRIPPER = joint_signal("grip", 0.0, 0.08, 0.2, unit="m")
AGE, SLOP = 250 * MS, 50 * MS


def make_buffer(*signals: Signal) -> ObservationBuffer:
    return ObservationBuffer([CameraSource("scene", "/scene")], signals or (*ARM, GRIPPER))


def add(
    buffer: ObservationBuffer, at_ms: float, topic: str = "/joint_states", **position: float
) -> tuple[SignalReading, ...]:
    stamp_ns = NOW + round(at_ms * MS)
    reading = JointReading(stamp_ns, tuple(position), np.array(list(position.values())))
    try:
        return buffer.add_joints(reading, stamp_ns, topic)
    except InputError as refusal:
        buffer.refuse(topic, str(refusal))
        raise


def at(buffer: ObservationBuffer, image_ms: float, now_ms: float | None = None) -> list[float]:
    buffer.add_frame(CameraFrame("scene", NOW + round(image_ms * MS), np.zeros((1, 1, 3), np.uint8)))
    observation = buffer.observe(NOW + round((image_ms if now_ms is None else now_ms) * MS), AGE, SLOP)
    return [round(value, 9) for value in observation.state_S.tolist()]


def fault(buffer: ObservationBuffer, at_ms: float) -> str:
    with pytest.raises(StaleInput) as found:
        buffer.measured(NOW + round(at_ms * MS), AGE)
    return str(found.value)


# --- parts


def test_each_part_is_as_it_was_at_the_images() -> None:
    """The arm at 100 Hz, its gripper at 20 Hz in messages of its own, on one topic."""
    buffer = make_buffer()
    for n in range(30):
        add(buffer, 10 * n, a=0.01 * n, b=-0.01 * n)
        if n % 5 == 2:
            add(buffer, 10 * n + 1, grip=0.001 * (10 * n + 1) / 10)
    assert at(buffer, 245) == [0.245, -0.245, 0.0245]
    buffer.add_frame(CameraFrame("scene", NOW + 250 * MS, np.zeros((1, 1, 3), np.uint8)))
    observation = buffer.observe(NOW + 250 * MS, AGE, SLOP)
    assert observation.joint_ns == (NOW + 250 * MS, NOW + 221 * MS, NOW + 271 * MS)
    stamp_ns, signal_M, joint_ns, _ = buffer.latest(NOW + 300 * MS, AGE)
    assert stamp_ns == NOW + 271 * MS, "the oldest of the parts"
    assert joint_ns == (NOW + 290 * MS, NOW + 271 * MS)
    np.testing.assert_allclose(signal_M, [0.29, -0.29, 0.0271])
    status = buffer.status(NOW + 300 * MS)["joint state"]
    assert (status.count, status.age_ns) == (6, 29 * MS), "of the part that is behind"


@pytest.mark.parametrize("first", [["a", "b", "grip"], ["grip", "b", "a"], ["b", "grip", "a"], ["grip", "a", "b"]])
def test_parts_have_one_order_whichever_came_first(first: list[str]) -> None:
    """A replay, whose bag may begin with another part than the node, tells their stamps apart by their order."""
    buffer = make_buffer()
    for n, name in enumerate([*first, *first]):
        add(buffer, 10 + n, **{name: 0.01})
    came = {name: NOW + (10 + len(first) + n) * MS for n, name in enumerate(first)}
    assert buffer.latest(NOW + 20 * MS, AGE).joint_ns == (came["a"], came["b"], came["grip"])


def test_parts_from_two_topics_and_fields() -> None:
    """The same name on two topics is two signals; a third is a velocity."""
    signals = (
        replace(joint_signal("slide", unit="m/s"), field="velocity", topic="/base"),
        *ARM,
        replace(GRIPPER, topic="/hand", part="finger"),
        replace(joint_signal("a"), topic="/hand"),
    )
    buffer = make_buffer(*signals)
    add(buffer, 0, a=1.0, b=2.0)
    add(buffer, 0, "/hand", finger=0.02, a=9.0)
    stamp_ns = NOW + 10 * MS
    buffer.add_joints(JointReading(stamp_ns, ("slide",), np.zeros(1), [0.25], [7.0]), stamp_ns, "/base")
    assert at(buffer, 10) == [0.25, 1.0, 2.0, 0.02, 9.0]


def test_a_position_and_a_velocity_of_one_message() -> None:
    velocity = replace(joint_signal("a.velocity", unit="rad/s"), part="a", field="velocity")
    buffer = make_buffer(ARM[0], velocity, ARM[1])
    for n in range(2):
        stamp_ns = NOW + 10 * n * MS
        buffer.add_joints(JointReading(stamp_ns, ("b", "a"), np.array([2.0, 1.0]), [0.5 + n, -0.5 - n]), stamp_ns)
    assert at(buffer, 5) == [1.0, -1.0, 2.0]
    no_velocity = "expected one velocity per name on /joint_states, which 'a.velocity' is read from, got 2 names and 0"
    with pytest.raises(InputError, match=no_velocity):
        add(buffer, 20, a=1.0, b=2.0)
    # Where nobody needs the field, it may be empty, and so may the positions.
    buffer = make_buffer(velocity)
    buffer.add_joints(JointReading.from_fields(NOW, ["a"], [], [0.5]), NOW)
    assert at(buffer, 0) == [0.5]


def test_a_part_that_stalls_is_named_with_its_age_and_what_still_comes() -> None:
    buffer = make_buffer()
    for n in range(60):
        add(buffer, 10 * n, a=0.0, b=0.0)
        if n < 10:
            add(buffer, 10 * n, grip=0.01)
    assert fault(buffer, 591) == (
        "joint state: newest of grip on /joint_states 501 ms old, limit 250 ms (max_age_s); grip missing among a, b, "
        "which came last on /joint_states"
    )
    with pytest.raises(StaleInput, match=r"^joint state: newest of grip on /joint_states 501 ms old"):
        at(buffer, 591)
    for n in range(100):
        add(buffer, 600 + 10 * n, grip=0.01)
    assert fault(buffer, 1591).startswith("joint state: newest of a, b on /joint_states 1001 ms old, limit 250 ms")


def test_a_part_whose_stamp_does_not_change_is_named() -> None:
    buffer = make_buffer()
    for n in range(60):
        add(buffer, 10 * n, a=0.0, b=0.0)
        add(buffer, min(10 * n, 100), grip=0.01)
    assert fault(buffer, 590) == (
        "joint state: newest of grip on /joint_states 490 ms old, limit 250 ms (max_age_s); those on /joint_states all "
        "have one stamp: is it frozen, or does it not stamp (use_receive_time)?"
    )


def test_joints_that_never_come_are_named_with_what_came_instead() -> None:
    buffer = make_buffer()
    assert fault(buffer, 0) == "joint state: none yet; is /joint_states published?"
    assert add(buffer, 0, wheel_left=1.0, wheel_right=2.0) == ()
    missing = "joint state: expected joints a, b, grip, but {} missing among {} on /joint_states; is this the robot"
    assert fault(buffer, 0).startswith(missing.format("a, b, grip", "wheel_left, wheel_right"))
    add(buffer, 0, a=1.0, wheel_left=1.0)
    assert fault(buffer, 0).startswith(missing.format("b, grip", "a, wheel_left, wheel_right"))
    add(buffer, 0, b=1.0, grip=0.0)
    for n in range(100):  # a base beside the arm is no fault
        add(buffer, n, a=1.0)
        add(buffer, n, b=1.0, grip=0.0)
        assert add(buffer, n, wheel_left=1.0, wheel_right=2.0) == ()
    assert at(buffer, 99) == [1.0, 1.0, 0.0]


def test_an_impossible_part_holds_nothing_back_of_the_other_and_is_named() -> None:
    buffer = make_buffer()
    for n in range(60):
        add(buffer, 10 * n, a=0.0, b=0.0)
        if n < 10:
            add(buffer, 10 * n, grip=0.01)
        else:
            with pytest.raises(InputError, match="joint 'grip': expected a finite position, got nan on /joint_states"):
                add(buffer, 10 * n, grip=math.nan)
        assert buffer._parts[0].kept[-1][0] == NOW + 10 * n * MS
    add(buffer, 591, a=0.0, b=0.0)
    found = fault(buffer, 600)
    assert found.startswith("joint state: newest of grip on /joint_states 510 ms old")
    assert found.endswith("last message refused: joint 'grip': expected a finite position, got nan on /joint_states")
    with pytest.raises(InputError, match="joint 'grip'"):
        add(buffer, 900, grip=math.nan)
    found = fault(buffer, 900)
    assert found.startswith("joint state: newest of a, b on /joint_states 309 ms old")
    assert "refused" not in found, "the gripper's fault explains nothing of the arm's"


def test_two_programs_in_turn_are_not_believed_even_if_one_sends_only_a_part() -> None:
    """The second sends zeros for one of the joints: that one is doubted, and nothing is acted upon."""
    buffer = make_buffer()
    for n in range(100):
        add(buffer, 10 * n, a=1.0, b=1.0, grip=0.0)
        if n > 10:
            with pytest.raises(InputError, match=r"joint state that jumps: joint 'a': at 0\.000 rad"):
                add(buffer, 10 * n + 5, a=0.0)
    found = fault(buffer, 995)
    assert found.startswith("joint state: expected one arm on /joint_states, got readings of two places in turn of a")


def test_stamps_of_parts_out_of_order_are_put_in_order() -> None:
    buffer = make_buffer()
    for late_ms, n in zip((0, 40, 0, 20) * 5, range(20), strict=True):
        stamp_ns = NOW + (10 * n - late_ms) * MS
        names, values = (("a", "b"), [0.001 * (10 * n - late_ms)] * 2) if n % 2 else (("grip",), [0.01])
        buffer.add_joints(JointReading(stamp_ns, names, np.array(values)), NOW + 10 * n * MS)
    stamps = [stamp for stamp, _ in buffer._parts[0].kept]
    assert stamps == sorted(stamps)
    assert at(buffer, 140)[:2] == [0.14, 0.14]


def test_a_joint_that_is_missing_once_ages_alone() -> None:
    """What is divided keeps its readings: an observation between the two is still made."""
    buffer = make_buffer()
    add(buffer, 0, a=0.0, b=0.0, grip=0.0)
    add(buffer, 100, a=0.1, b=0.1)
    add(buffer, 200, a=0.2, b=0.2, grip=0.02)
    assert at(buffer, 150, 200) == [0.15, 0.15, 0.015]
    assert [len(part.kept) for part in buffer._parts] == [3, 2]


def test_kinds_tell_a_second_publisher_of_the_same_joints_from_one_of_others() -> None:
    buffer = make_buffer()
    for n in range(10):
        add(buffer, 10 * n, a=1.0, b=1.0)
        add(buffer, 10 * n, b=1.0, a=1.0)
        add(buffer, 10 * n, grip=0.0)
    assert buffer.kinds == {"/joint_states": 2}


def test_memory_is_bounded_whatever_names_come() -> None:
    buffer = make_buffer()
    for n in range(500):
        add(buffer, n, **{"a": 0.0, "b": 0.0, "grip": 0.0, f"other_{n}": 1.0})
    known = buffer._topics["/joint_states"]
    assert max(len(known.plans), len(known.kinds), len(known.others)) <= 64


# --- units


def test_degrees_and_percent_are_mapped_once_on_arrival() -> None:
    degrees = replace(ARM[0], scale=math.pi / 180.0)
    percent = replace(GRIPPER, scale=0.0008, offset=0.0)
    inverted = replace(ARM[1], scale=-math.pi / 180.0, offset=math.pi / 2)
    buffer = make_buffer(degrees, inverted, percent)
    (kept,) = add(buffer, 0, a=90.0, b=90.0, grip=50.0)
    np.testing.assert_allclose(kept.value_G, [math.pi / 2, 0.0, 0.04])
    assert at(buffer, 0) == [round(math.pi / 2, 9), 0.0, 0.04]
    # Limits and jumps are in the robot's unit.
    with pytest.raises(InputError, match=r"joint 'grip': expected about 0.000 to 0.080 m, its limits, got 400 on"):
        add(buffer, 10, a=90.0, b=90.0, grip=400.0)
    with pytest.raises(InputError, match=r"joint state that jumps: joint 'a': at 0.000 rad"):
        add(buffer, 10, a=0.0, b=90.0, grip=50.0)


def test_a_value_that_is_mapped_twice_is_suspected() -> None:
    """The robot file says degrees, but the driver publishes radians with another scale."""
    steps = replace(ARM[0], scale=100.0)
    with pytest.raises(
        InputError, match=r"got 1\.5 on /joint_states, which the robot file makes 150 rad; as it came it would fit"
    ):
        add(make_buffer(steps), 0, a=1.5)


def test_what_is_no_angle_may_change_by_more_than_half_a_turn_between_two_readings() -> None:
    """A lift of 5 m, and an effort: nothing there goes round."""
    buffer = make_buffer(joint_signal("lift", unit="m"), replace(joint_signal("f", unit="ratio"), field="effort"))
    for n, value in enumerate((0.0, 8.0)):
        stamp_ns = NOW + 100 * n * MS
        buffer.add_joints(JointReading(stamp_ns, ("lift", "f"), np.array([value, 0.0]), (), [0.0, 10.0 * n]), stamp_ns)
    assert at(buffer, 50, 100) == [4.0, 5.0]


# --- poses


def pose(
    buffer: ObservationBuffer, at_ms: float, x: float = 0.0, turned: float = 0.0, sign: float = 1.0, frame: str = "base"
) -> tuple[SignalReading, ...]:
    """At x, turned about z."""
    quaternion = sign * rotations.from_vector(np.array([0.0, 0.0, turned]))
    stamp_ns = NOW + round(at_ms * MS)
    reading = PoseReading(stamp_ns, frame, np.concatenate([[x, 0.0, 0.0], quaternion]))
    return buffer.add_pose(reading, stamp_ns, "/tool")


def test_a_pose_and_joints_are_interpolated_each_by_itself() -> None:
    buffer = make_buffer(*ARM, *pose_signals())
    add(buffer, 0, a=0.0, b=0.0)
    add(buffer, 20, a=0.2, b=0.0)
    pose(buffer, 0, 0.0, 0.0)
    pose(buffer, 40, 0.4, 0.4)
    found = at(buffer, 10, 40)
    assert found[:3] == [0.1, 0.0, 0.1]
    np.testing.assert_allclose(rotations.to_vector(np.array(found[5:])), [0.0, 0.0, 0.1], atol=3e-4)
    assert np.linalg.norm(found[5:]) == pytest.approx(1.0)


@pytest.mark.parametrize("turned", [0.0, 3.0, math.pi, -3.0])
def test_the_sign_of_a_quaternion_does_not_change(turned: float) -> None:
    """A driver that keeps w positive flips all four numbers as the tool turns past half a turn: one orientation."""
    buffer = make_buffer(*pose_signals(max_angular_velocity=2.0))
    for n in range(41):
        pose(buffer, 10 * n, 0.0, turned + 0.01 * n, sign=-1.0 if n % 2 else 1.0)
    kept = np.array([value_G[3:] for _, value_G in buffer._parts[0].kept])
    assert (np.abs(np.diff(kept, axis=0)) < 0.01).all()
    found = np.array(at(buffer, 395, 400)[3:])
    expected = rotations.from_vector(np.array([0.0, 0.0, turned + 0.395]))
    assert abs(found @ expected) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize(
    ("pose_7", "expected"),
    [
        ([0, 0, 0, 0, 0, 0, 0], "expected an orientation of length 1 on /tool, got the quaternion .* of length 0;"),
        ([0, 0, 0, 0, 0, 0, 1.1], "of length 1.1"),
        ([math.nan, 0, 0, 0, 0, 0, 1], "pose: expected finite numbers"),
        ([0, 0, math.inf, 0, 0, 0, 1], "pose: expected finite numbers"),
        ([0, 0, 0, math.nan, 0, 0, 1], "pose: expected finite numbers"),
    ],
)
def test_a_pose_that_is_none_is_refused_by_name(pose_7: list[float], expected: str) -> None:
    buffer = make_buffer(*pose_signals())
    with pytest.raises(InputError, match=expected):
        buffer.add_pose(PoseReading(NOW, "base", np.array(pose_7, dtype=np.float64)), NOW)
    buffer.refuse("/tool", "why")
    assert fault(buffer, 0) == "pose: none yet; last message refused: why"


def test_a_quaternion_of_nearly_length_1_is_made_one() -> None:
    buffer = make_buffer(*pose_signals())
    (kept,) = buffer.add_pose(PoseReading(NOW, "base", np.array([0, 0, 0, 0, 0, 0.707, 0.707])), NOW)
    assert np.linalg.norm(kept.value_G[3:]) == pytest.approx(1.0, abs=1e-12)


def test_another_frame_is_refused_with_both() -> None:
    buffer = make_buffer(*pose_signals(frame="base"))
    with pytest.raises(InputError, match="pose: expected frame 'base' on /tool, as the robot file says, got 'world'"):
        pose(buffer, 0, frame="world")
    pose(buffer, 0, frame="")  # a driver that names none
    buffer = make_buffer(*pose_signals())
    pose(buffer, 0, frame="world")
    with pytest.raises(
        InputError, match="pose: expected frame 'world' on /tool, as in its messages before, got 'base'"
    ):
        pose(buffer, 10, frame="base")
    buffer.clear()
    pose(buffer, 20, frame="base")


def test_a_pose_that_jumps_and_one_that_stalls_are_named() -> None:
    buffer = make_buffer(*ARM, *pose_signals(max_linear_velocity=1.0, max_angular_velocity=1.0))
    for n in range(50):
        add(buffer, 10 * n, a=0.0, b=0.0)
        pose(buffer, 10 * n)
    with pytest.raises(InputError, match=r"^pose that jumps: x: at 0.500 m on /tool, 0.500 from the reading 10 ms"):
        pose(buffer, 500, x=0.5)
    with pytest.raises(InputError, match=r"^pose that jumps: qz: .*; do two programs publish it\?"):
        pose(buffer, 500, turned=1.0)
    for n in range(50, 90):
        add(buffer, 10 * n, a=0.0, b=0.0)
    buffer.clear()
    for n in range(60):
        add(buffer, 10 * n, a=0.0, b=0.0)
        if n < 10:
            pose(buffer, 10 * n)
    assert fault(buffer, 590) == "pose: newest of /tool 500 ms old, limit 250 ms (max_age_s); is /tool published?"


def test_poses_of_two_programs_in_turn_are_not_believed() -> None:
    buffer = make_buffer(*pose_signals(max_linear_velocity=1.0, max_angular_velocity=1.0))
    for n in range(500):
        for place, half in ((0.0, 0), (0.8, 5)):
            try:
                pose(buffer, 10 * n + half, x=place)
            except InputError as refusal:
                buffer.refuse("/tool", str(refusal))
        if n > 100:
            assert "expected one arm on /tool, got readings of two places in turn" in fault(buffer, 10 * n + 5)
