"""The observation buffer: which inputs belong together, and refusals that name topic, age and limit."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
from support.signals import joint_signal

from ki_vla_ros.errors import InputError, StaleInput
from ki_vla_ros.records import CameraFrame, JointReading
from ki_vla_ros.robot import plain_joints
from ki_vla_ros.runtime.observation import FRAMES_KEPT, CameraSource, ObservationBuffer

MS = 1_000_000
NOW = 10_000 * MS
MAX_AGE, SLOP = 200 * MS, 50 * MS
JOINTS = ("a", "b")


def frame(camera: str, stamp_ms: float) -> CameraFrame:
    return CameraFrame(camera, int(stamp_ms * MS), np.zeros((2, 2, 3), dtype=np.uint8))


def reading(stamp_ms: float, *position: float, names: tuple[str, ...] = JOINTS) -> JointReading:
    return JointReading(int(stamp_ms * MS), names, np.array(position))


def make_buffer(optional: bool = False) -> ObservationBuffer:
    cameras = [CameraSource("scene", "/scene/image_raw"), CameraSource("wrist", "/wrist/image_raw", optional)]
    return ObservationBuffer(cameras, plain_joints(JOINTS, "/joint_states"))


def filled(scene_ms: list[float], wrist_ms: list[float], optional: bool = False) -> ObservationBuffer:
    buffer = make_buffer(optional)
    for stamp_ms in scene_ms:
        buffer.add_frame(frame("scene", stamp_ms))
    for stamp_ms in wrist_ms:
        buffer.add_frame(frame("wrist", stamp_ms))
    for stamp_ms in range(9500, 10000, 10):
        buffer.add_joints(reading(stamp_ms, stamp_ms / 1000, -stamp_ms / 1000))
    return buffer


def chosen_ms(buffer: ObservationBuffer, slop: int = SLOP) -> dict[str, float]:
    observation = buffer.observe(NOW, MAX_AGE, slop)
    return {name: taken.stamp_ns / MS for name, taken in observation.frames.items()}


def test_newest_matching_set_and_its_oldest_stamp() -> None:
    buffer = filled([9850, 9900, 9950], [9860, 9910, 9960])
    observation = buffer.observe(NOW, MAX_AGE, SLOP)
    assert observation.stamp_ns == 9950 * MS
    assert chosen_ms(buffer) == {"scene": 9950, "wrist": 9960}


def test_a_newer_frame_without_a_partner_waits() -> None:
    assert chosen_ms(filled([9850, 9990], [9860]), slop=20 * MS) == {"scene": 9850, "wrist": 9860}


def test_the_nearest_of_several_partners_is_taken() -> None:
    assert chosen_ms(filled([9900], [9905, 9920, 9940])) == {"scene": 9900, "wrist": 9905}


def test_reordered_frames_are_put_in_order() -> None:
    assert chosen_ms(filled([9950, 9850], [9960, 9860])) == {"scene": 9950, "wrist": 9960}


def test_a_frozen_camera_goes_stale() -> None:
    buffer = filled([9950], [9700] * 20)
    with pytest.raises(StaleInput, match=r"camera 'wrist': newest frame 300 ms old, limit 200 ms \(max_age_s\)"):
        buffer.observe(NOW, MAX_AGE, SLOP)


def test_a_repeated_stamp_does_not_push_older_frames_out() -> None:
    assert chosen_ms(filled([9850], [9855] + [9990] * 20)) == {"scene": 9850, "wrist": 9855}


def test_a_missing_camera_names_its_topic() -> None:
    with pytest.raises(StaleInput, match=r"camera 'wrist': no image yet; is /wrist/image_raw published\?"):
        filled([9950], []).observe(NOW, MAX_AGE, SLOP)


def test_cameras_out_of_step_name_gap_and_limit() -> None:
    with pytest.raises(StaleInput, match="'scene' and 'wrist': nearest stamps 90 ms apart, limit 50 ms"):
        filled([9990], [9900]).observe(NOW, MAX_AGE, SLOP)


def test_a_matching_set_that_is_too_old_is_refused() -> None:
    with pytest.raises(StaleInput, match="250 ms old, limit 200 ms"):
        filled([9750, 9990], [9750, 9900]).observe(NOW, MAX_AGE, SLOP)


def test_stamps_of_another_clock_are_named() -> None:
    with pytest.raises(StaleInput, match=r"camera 'scene': stamps .* ahead of the node's clock by 5000 ms"):
        filled([15000], [9950]).observe(NOW, MAX_AGE, SLOP)
    buffer = filled([9950], [9950])
    buffer.add_joints(reading(15000, 0.0, 0.0))
    with pytest.raises(StaleInput, match=r"joint state: stamps .* ahead of the node's clock by 5000 ms"):
        buffer.observe(NOW, MAX_AGE, SLOP)


@pytest.mark.parametrize("count", [1, 9])
def test_messages_from_the_future_are_refused_on_arrival(count: int) -> None:
    """One joint state, or nine images, of an hour ahead would hold the arm until then."""
    buffer = filled([9950], [9950])
    for n in range(count):
        ahead = 3_600_000 + 9950 + n
        with pytest.raises(InputError, match=r"^camera 'scene' from the future: stamped 359995\d ms ahead .*/scene/"):
            buffer.add_frame(frame("scene", ahead), NOW)
        with pytest.raises(InputError, match=r"^joint state from the future: stamped 359995\d ms .* limit 250 ms"):
            buffer.add_joints(reading(ahead, 0.0, 0.0), NOW)
    assert chosen_ms(buffer) == {"scene": 9950, "wrist": 9950}
    np.testing.assert_array_equal(buffer.measured(NOW, MAX_AGE)[1], [9.99, -9.99])
    # Clocks that differ a little are none of another time.
    buffer.add_frame(frame("scene", 10_040), NOW)
    buffer.add_joints(reading(10_200, 1.0, 2.0), NOW)
    np.testing.assert_array_equal(buffer.measured(NOW, MAX_AGE)[1], [1.0, 2.0])


@pytest.mark.parametrize("stamp_ms", [0, -5])
def test_messages_without_a_stamp_are_refused(stamp_ms: float) -> None:
    buffer = make_buffer()
    with pytest.raises(InputError, match=r"^camera 'scene' without a stamp: .*set use_receive_time"):
        buffer.add_frame(frame("scene", stamp_ms), NOW)
    with pytest.raises(InputError, match=r"^joint state without a stamp: .*/joint_states.*set use_receive_time"):
        buffer.add_joints(reading(stamp_ms, 0.0, 0.0), NOW)


def test_joint_states_of_one_stamp_are_named() -> None:
    buffer = make_buffer()
    for _ in range(3):
        buffer.add_joints(reading(9000, 0.0, 0.0), NOW)
    with pytest.raises(StaleInput, match=r"newest 1000 ms old.*all have one stamp: is it frozen, or does it not stamp"):
        buffer.measured(NOW, MAX_AGE)


def test_readings_of_long_ago_change_nothing() -> None:
    buffer = filled([9950], [9950])
    buffer.add_joints(reading(1, 7.0, 7.0), NOW)
    np.testing.assert_array_equal(buffer.measured(NOW, MAX_AGE)[1], [9.99, -9.99])


def test_one_frame_from_the_future_does_not_hide_the_others() -> None:
    assert chosen_ms(filled([15000, 9950], [9950])) == {"scene": 9950, "wrist": 9950}


def test_an_optional_camera_may_be_absent_and_joins_within_the_slop() -> None:
    assert chosen_ms(filled([9950], [], optional=True)) == {"scene": 9950}
    assert chosen_ms(filled([9950], [9800], optional=True)) == {"scene": 9950}
    assert chosen_ms(filled([9950], [9960], optional=True)) == {"scene": 9950, "wrist": 9960}


def test_only_the_newest_frames_are_kept() -> None:
    buffer = filled([9000 + i for i in range(100)], [])
    assert [kept.stamp_ns // MS for kept in buffer._cameras["scene"].frames] == list(range(9100 - FRAMES_KEPT, 9100))
    buffer.add_frame(frame("scene", 8000))
    assert buffer._cameras["scene"].frames[0].stamp_ns == (9100 - FRAMES_KEPT) * MS


def test_joint_state_is_interpolated_to_the_frames_time() -> None:
    observation = filled([9947.5], [9950]).observe(NOW, MAX_AGE, SLOP)
    np.testing.assert_allclose(observation.state_S, [9.9475, -9.9475], rtol=0, atol=1e-12)


def test_a_joint_state_at_the_frames_stamp_is_taken_whatever_came_before() -> None:
    buffer = make_buffer()
    for name in ("scene", "wrist"):
        buffer.add_frame(frame(name, 9950))
    buffer.add_joints(reading(9000, 0.0, 0.0))
    buffer.add_joints(reading(9950, 1.0, 2.0))
    np.testing.assert_array_equal(buffer.observe(NOW, MAX_AGE, SLOP).state_S, [1.0, 2.0])


def test_joint_state_is_not_extrapolated() -> None:
    observation = filled([9996], [9996]).observe(NOW, MAX_AGE, SLOP)
    np.testing.assert_array_equal(observation.state_S, [9.99, -9.99])


def test_joint_state_must_reach_back_to_the_frames() -> None:
    buffer = make_buffer()
    for name in ("scene", "wrist"):
        buffer.add_frame(frame(name, 9900))
    buffer.add_joints(reading(9950, 0.0, 0.0))
    with pytest.raises(StaleInput, match="joint state: the oldest kept is 50 ms newer than the images"):
        buffer.observe(NOW, MAX_AGE, SLOP)


def test_joint_states_that_stall_around_the_frame_are_not_bridged() -> None:
    buffer = make_buffer()
    for name in ("scene", "wrist"):
        buffer.add_frame(frame(name, 9900))
    buffer.add_joints(reading(9600, 0.0, 0.0))
    buffer.add_joints(reading(9990, 1.0, 1.0))
    with pytest.raises(StaleInput, match="joint state: none within 200 ms"):
        buffer.observe(NOW, MAX_AGE, SLOP)


def test_stale_and_missing_joint_state() -> None:
    with pytest.raises(StaleInput, match=r"joint state: none yet; is /joint_states published\?"):
        make_buffer().measured(NOW, MAX_AGE)
    buffer = make_buffer()
    buffer.add_joints(reading(9700, 1.0, 2.0))
    with pytest.raises(StaleInput, match="joint state: newest 300 ms old, limit 200 ms"):
        buffer.measured(NOW, MAX_AGE)
    np.testing.assert_array_equal(buffer.measured(NOW, 400 * MS)[1], [1.0, 2.0])


def test_joints_are_taken_by_name() -> None:
    buffer = make_buffer()
    buffer.add_joints(reading(9990, 3.0, 2.0, 1.0, names=("c", "b", "a")))
    np.testing.assert_array_equal(buffer.measured(NOW, MAX_AGE)[1], [1.0, 2.0])


@pytest.mark.parametrize(
    "bad, fault",
    [
        (reading(9990, 1.0, float("nan")), "joint 'b': expected a finite position, got nan"),
        (reading(9990, float("inf"), 1.0), "joint 'a': expected a finite position, got inf"),
    ],
)
def test_bad_joint_states_are_refused_by_name_and_not_kept(bad: JointReading, fault: str) -> None:
    buffer = make_buffer()
    with pytest.raises(InputError, match=fault):
        buffer.add_joints(bad)
    buffer.refuse("/joint_states", fault)
    with pytest.raises(StaleInput, match=f"none yet; last message refused: {fault}"):
        buffer.measured(NOW, MAX_AGE)


def test_a_nan_in_a_joint_that_the_bundle_does_not_have_does_no_harm() -> None:
    buffer = make_buffer()
    buffer.add_joints(reading(9990, 1.0, 2.0, float("nan"), names=("a", "b", "c")))
    np.testing.assert_array_equal(buffer.measured(NOW, MAX_AGE)[1], [1.0, 2.0])


def test_a_refused_messages_reason_is_repeated_until_a_good_one_comes() -> None:
    buffer = filled([9950], [])
    buffer.refuse("wrist", "encoding 'weird' is not supported")
    with pytest.raises(StaleInput, match="no image yet; last message refused: encoding 'weird' is not supported"):
        buffer.observe(NOW, MAX_AGE, SLOP)
    buffer.add_frame(frame("wrist", 9950))
    assert chosen_ms(buffer) == {"scene": 9950, "wrist": 9950}


def test_clear_forgets_everything() -> None:
    buffer = filled([9950], [9950])
    buffer.clear()
    with pytest.raises(StaleInput, match="no image yet"):
        buffer.observe(NOW, MAX_AGE, SLOP)
    with pytest.raises(StaleInput, match="none yet"):
        buffer.measured(NOW, MAX_AGE)


@pytest.mark.parametrize(
    "use",
    [
        lambda buffer: buffer.add_frame(frame("scene", 9960)),
        lambda buffer: buffer.add_joints(reading(9999, 0.0, 0.0)),
        lambda buffer: buffer.refuse("scene", "why"),
        lambda buffer: buffer.observe(NOW, MAX_AGE, SLOP),
        lambda buffer: buffer.measured(NOW, MAX_AGE),
        lambda buffer: buffer.clear(),
    ],
)
def test_one_thread_at_a_time(use: Callable[[ObservationBuffer], object]) -> None:
    buffer = filled([9950], [9950])
    done = threading.Event()
    thread = threading.Thread(target=lambda: (use(buffer), done.set()))
    with buffer._lock:
        thread.start()
        assert not done.wait(0.1)
    thread.join(60.0)
    assert done.is_set()


def test_degrees_are_told_from_radians() -> None:
    joints = [joint_signal("arm", -1.0, 1.0, 9.0), joint_signal("gripper", 0.0, 0.04, 9.0, unit="m")]
    buffer = ObservationBuffer([CameraSource("scene", "/scene")], joints)
    buffer.add_joints(JointReading(1, ("arm", "gripper"), np.array([2.9, 0.05])))
    with pytest.raises(
        InputError, match=r"joint 'arm': expected about -1.000 to 1.000 rad.*as degrees it would be 0.785 rad"
    ):
        buffer.add_joints(JointReading(2, ("arm", "gripper"), np.array([45.0, 0.02])))
    with pytest.raises(InputError, match=r"joint 'gripper': expected about 0.000 to 0.040 m, its limits, got 90"):
        buffer.add_joints(JointReading(2, ("arm", "gripper"), np.array([0.5, 90.0])))


def test_an_input_may_have_its_own_limit() -> None:
    cameras = [CameraSource("scene", "/s", max_age_ns=30 * MS), CameraSource("wrist", "/w", max_age_ns=1000 * MS)]
    buffer = ObservationBuffer(cameras, plain_joints(JOINTS, "/joint_states"), joint_max_age_ns=400 * MS)
    buffer.add_joints(reading(9650, 0.0, 0.0))
    buffer.add_joints(reading(9700, 0.0, 0.0))
    assert buffer.latest(NOW, 100 * MS)[0] == 9700 * MS
    with pytest.raises(StaleInput, match=r"joint state: newest 500 ms old, limit 400 ms"):
        buffer.measured(NOW + 200 * MS, 10_000 * MS)
    buffer.add_frame(frame("wrist", 9690))
    buffer.add_frame(frame("scene", 9690))
    with pytest.raises(StaleInput, match=r"camera 'scene': newest frame 310 ms old, limit 30 ms"):
        buffer.observe(NOW, MAX_AGE, SLOP)
    buffer.add_frame(frame("scene", 9980))
    with pytest.raises(
        StaleInput, match=r"match within sync_slop_s are 310 ms old, limit 30 ms .max_age_s, for 'scene'"
    ):
        buffer.observe(NOW, MAX_AGE, SLOP)
    buffer.add_frame(frame("wrist", 9970))
    buffer.add_joints(reading(9960, 0.0, 0.0))
    assert buffer.observe(NOW, MAX_AGE * 2, SLOP).stamp_ns == 9970 * MS


def test_status_counts_inputs_and_gives_their_age() -> None:
    buffer = filled([9900, 9950, 9950], [9960])
    status = buffer.status(NOW)
    assert (status["scene"].count, status["scene"].age_ns) == (3, 50 * MS)
    assert (status["wrist"].count, status["joint state"].count) == (1, 50)
    buffer.clear()
    assert buffer.status(NOW)["scene"].age_ns is None


def test_time_since_the_nearest_end_of_a_burst() -> None:
    buffer = make_buffer()
    assert buffer.since_burst_ns(NOW) is None
    for n in range(3):
        for camera, offset_ms in (("scene", 0), ("wrist", 3)):
            arrived_ns = (9900 + 30 * n + offset_ms) * MS
            buffer.add_frame(frame(camera, arrived_ns / MS), arrived_ns)
        if n == 0:
            assert buffer.since_burst_ns(9910 * MS) is None
    for at_ms, since_ms in [(9970, 7), (9964, 1), (9962, -1), (9981, -12), (9994, 1)]:
        assert buffer.since_burst_ns(at_ms * MS) == since_ms * MS


def test_images_with_one_stamp_are_not_reported_as_missing() -> None:
    buffer = filled([9950], [0, 0, 0])
    with pytest.raises(StaleInput, match=r"images on /wrist/image_raw all have one stamp: is it frozen, or does it"):
        buffer.observe(NOW, MAX_AGE, SLOP)
