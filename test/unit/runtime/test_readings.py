"""Joint readings that the arm cannot have made are refused; an arm that was really put elsewhere is found again."""

from __future__ import annotations

import re

import numpy as np
import pytest
from support.signals import joint_signal

from ki_vla_ros.errors import InputError, StaleInput
from ki_vla_ros.records import CameraFrame, JointReading
from ki_vla_ros.robot import Signal, plain_joints
from ki_vla_ros.runtime.observation import CameraSource, ObservationBuffer

MS = 1_000_000
NOW = 1_000_000 * MS
NAMES = ("a", "b", "c")
JOINTS = tuple(joint_signal(name, -3.2, 3.2, 2.0) for name in NAMES)
REAL, ZERO = (1.0, -1.5, 2.0), (0.0, 0.0, 0.0)


def make_buffer(*joints: Signal) -> ObservationBuffer:
    return ObservationBuffer([CameraSource("scene", "/scene")], joints or JOINTS)


def add(buffer: ObservationBuffer, at_ms: float, *position: float) -> bool:
    """Whether a reading is accepted."""
    stamp_ns = NOW + round(at_ms * MS)
    try:
        buffer.add_joints(JointReading(stamp_ns, NAMES[: len(position)], np.array(position)), stamp_ns)
    except InputError as refusal:
        buffer.refuse("/joint_states", str(refusal))
        return False
    return True


def where(buffer: ObservationBuffer, at_ms: float) -> tuple[float, ...]:
    return tuple(buffer.measured(NOW + round(at_ms * MS), 250 * MS)[1])


def test_two_swapped_values_are_refused_and_named_and_hold_nothing() -> None:
    buffer = make_buffer()
    for n in range(100):
        assert add(buffer, n, *REAL)
    stamp_ns = NOW + 100 * MS
    fault = (
        r"^joint state that jumps: joint 'a': at -1\.500 rad on /joint_states, 2\.500 from the reading 1 ms before, "
        r"expected at most 0\.202 \(max_velocity 2\); do two programs publish it, or do two joints change places\?"
    )
    with pytest.raises(InputError, match=fault):
        buffer.add_joints(JointReading(stamp_ns, NAMES, np.array([-1.5, 1.0, 2.0])))
    assert where(buffer, 100) == REAL
    assert add(buffer, 101, *REAL) and where(buffer, 101) == REAL


@pytest.mark.parametrize("first", [REAL, ZERO])
@pytest.mark.parametrize("period_ms, every", [(4, 2), (5, 4), (20, 3)])
def test_two_publishers_are_never_believed(first: tuple[float, ...], period_ms: int, every: int) -> None:
    """One publishes zeros. Whichever comes first, and for 20 s: nobody knows where the arm is."""
    buffer = make_buffer()
    second = ZERO if first == REAL else REAL
    for n in range(20_000 // period_ms):
        add(buffer, n * period_ms, *(second if n % every == every - 1 else first))
        if n > 100 * every:
            with pytest.raises(
                StaleInput, match="expected one arm on /joint_states, got readings of two places in turn"
            ):
                where(buffer, n * period_ms)
    end_ms = 20_000
    # The other one stops: the arm is known again, at once where it was believed to be, after a while elsewhere.
    assert all(add(buffer, end_ms + n * period_ms, *first) for n in range(40))
    assert where(buffer, end_ms + 39 * period_ms) == first
    found = [add(buffer, end_ms + 1000 + n * period_ms, *second) for n in range(12_000 // period_ms)]
    assert found.index(True) * period_ms > 9_000 and all(found[found.index(True) :])


def test_a_rare_stranger_holds_nothing() -> None:
    """Zeros at 10 Hz beside an arm at 200 Hz: refused, each one, and the arm goes on."""
    buffer = make_buffer()
    for n in range(2000):
        assert add(buffer, 5 * n, *REAL)
        if n % 20 == 10:
            assert not add(buffer, 5 * n + 1, *ZERO)
        assert where(buffer, 5 * n + 2) == REAL
    with pytest.raises(StaleInput, match="last message refused: joint state that jumps"):
        add(buffer, 10_000, *ZERO)
        where(buffer, 10_300)


@pytest.mark.parametrize("silent_ms", [1, 3000])
@pytest.mark.parametrize("period_ms", [1, 20, 100])
def test_an_arm_that_was_put_elsewhere_is_found_again(period_ms: int, silent_ms: int) -> None:
    """A simulator's reset, a driver's restart, or an arm pushed while no readings came."""
    buffer = make_buffer()
    for n in range(100):
        assert add(buffer, n * period_ms, *REAL)
    begin_ms = 99 * period_ms + silent_ms
    found = [add(buffer, begin_ms + n * period_ms, *ZERO) for n in range(2000 // period_ms)]
    assert found.index(True) * period_ms == 500 and all(found[found.index(True) :])
    assert where(buffer, begin_ms + (len(found) - 1) * period_ms) == ZERO
    assert buffer._parts[0].kept[0][0] >= NOW + (begin_ms + 500) * MS, "nothing may be interpolated between two places"


def test_an_arm_elsewhere_may_move_but_not_jump() -> None:
    buffer = make_buffer()
    add(buffer, 0, *REAL)
    assert [add(buffer, 10 * n, 0.0, 0.015 * n, 0.0) for n in range(1, 80)].count(True) == 29
    buffer = make_buffer()
    add(buffer, 0, *REAL)
    assert not any(add(buffer, 10 * n, 0.0, 0.5 * (n % 2), 0.0) for n in range(1, 500))


def test_two_readings_elsewhere_are_not_enough() -> None:
    buffer = make_buffer()
    add(buffer, 0, *REAL)
    assert [add(buffer, 200 * n, *ZERO) for n in range(1, 7)] == [False] * 4 + [True] * 2


def test_late_readings_are_put_in_order_and_contradict_nothing() -> None:
    buffer = make_buffer()
    for n in range(0, 100, 10):
        add(buffer, n, *REAL)
    assert not add(buffer, 100, *ZERO)
    assert add(buffer, 85, *REAL)
    found = [add(buffer, 100 + 10 * n, *ZERO) for n in range(1, 60)]
    assert found.index(True) == 49
    assert not add(buffer, 605, *REAL)


def test_no_reach_is_known_without_the_joints() -> None:
    buffer = ObservationBuffer([], plain_joints(NAMES, "/joint_states"))
    assert add(buffer, 0, *REAL) and add(buffer, 1, 500.0, 0.0, 0.0)


def test_an_open_gripper_is_no_other_unit() -> None:
    """Open in 5 % of the training data: quantiles ended at 1 mm. What lies within the limits is never refused."""
    gripper = joint_signal("a", 0.0, 0.08, 0.4, unit="m")
    for position in (0.0, 0.04, 0.08):
        assert add(make_buffer(gripper), 0, position)
    buffer = make_buffer(gripper)
    with pytest.raises(
        InputError, match=r"joint 'a': expected about 0.000 to 0.080 m, its limits, got 0.5 on /joint_s"
    ):
        buffer.add_joints(JointReading(NOW, ("a",), np.array([0.5])))


# --- joints that turn without end


def turning(continuous: bool) -> Signal:
    return joint_signal("a", -10.0, 10.0, 2.0, continuous=continuous)


def test_a_continuous_joint_is_interpolated_the_shortest_way_round() -> None:
    buffer = make_buffer(turning(True))
    assert add(buffer, 0, 3.13) and add(buffer, 20, -3.13)
    buffer.add_frame(CameraFrame("scene", NOW + 10 * MS, np.zeros((1, 1, 3), np.uint8)))
    assert buffer.observe(NOW + 20 * MS, 250 * MS, 50 * MS).state_S[0] == pytest.approx(np.pi)
    assert where(buffer, 20)[0] == pytest.approx(2 * np.pi - 3.13)
    for n in range(2000):  # three turns later
        assert add(buffer, 30 + 10 * n, (3.15 + 0.01 * n + np.pi) % (2 * np.pi) - np.pi)
    assert where(buffer, 20_020)[0] == pytest.approx(3.15 + 19.99)


def test_a_turn_of_another_joint_is_refused_and_not_averaged() -> None:
    buffer = make_buffer(turning(False))
    assert add(buffer, 0, 3.13)
    fault = "that is about a whole turn: if the joint turns without end, its robot file or URDF must say continuous"
    with pytest.raises(InputError, match=f"joint 'a': at -3.130 rad.*{re.escape(fault)}"):
        buffer.add_joints(JointReading(NOW + 20 * MS, ("a",), np.array([-3.13])))
    # Nor where nothing is known of the joint.
    buffer = make_buffer(*plain_joints(["a"], "/joint_states"))
    assert add(buffer, 0, 3.13) and add(buffer, 20, -3.13)
    buffer.add_frame(CameraFrame("scene", NOW + 10 * MS, np.zeros((1, 1, 3), np.uint8)))
    with pytest.raises(StaleInput, match=r"joint 'a' goes from 3.130 to -3.130 around the images.*must say continuous"):
        buffer.observe(NOW + 20 * MS, 250 * MS, 50 * MS)


@pytest.mark.parametrize("period_ms", [100, 200])
def test_rare_readings_of_an_arm_put_elsewhere_are_not_outlived_by_the_last_believed_one(period_ms: int) -> None:
    """An age limit of a second would let a motion start from where the arm was before."""
    buffer = make_buffer()
    assert add(buffer, 0, *REAL)
    assert not add(buffer, period_ms, *ZERO)
    with pytest.raises(StaleInput, match="readings of two places in turn; the last: joint state that jumps"):
        buffer.measured(NOW + (period_ms + 10) * MS, 1000 * MS)
    assert add(buffer, 2 * period_ms, *REAL)
    assert tuple(buffer.measured(NOW + 2 * period_ms * MS, 1000 * MS)[1]) == REAL
