"""The simulated controller must take and refuse exactly what joint_trajectory_controller takes and refuses."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ki_vla_ros.errors import InputError
from ki_vla_ros.runtime.controller import Trajectory, TrajectoryExecutor, TrajectoryPoint

MS = 1_000_000
NOW = 1_000_000 * MS
JOINTS = ("a", "b")


def executor() -> TrajectoryExecutor:
    return TrajectoryExecutor(JOINTS, np.zeros(2))


def point(ms: int, positions, velocities=()) -> TrajectoryPoint:
    return TrajectoryPoint(ms * MS, positions, velocities)


def message(*points: TrajectoryPoint, stamp_ns: int = 0, joints=JOINTS) -> Trajectory:
    return Trajectory(stamp_ns, joints, points)


def assert_position(arm: TrajectoryExecutor, expected: list[float], *times_ms: int) -> None:
    for ms in times_ms:
        assert arm.sample(NOW + ms * MS)[0] == pytest.approx(expected, abs=1e-12), f"at {ms} ms"


def assert_velocity(arm: TrajectoryExecutor, expected: list[float], *times_ms: int) -> None:
    for ms in times_ms:
        assert arm.sample(NOW + ms * MS)[1] == pytest.approx(expected, abs=1e-9), f"at {ms} ms"


def test_holds_where_it_is_until_told() -> None:
    arm = TrajectoryExecutor(JOINTS, np.array([0.3, -0.2]))
    assert_position(arm, [0.3, -0.2], 0, 99_999)
    assert_velocity(arm, [0.0, 0.0], 0)


def test_positions_alone_give_straight_lines_and_the_last_point_is_held() -> None:
    arm = executor()
    arm.accept(message(point(100, (1.0, 2.0)), point(300, (2.0, 0.0))), NOW)
    assert_position(arm, [0.5, 1.0], 50)
    assert_velocity(arm, [10.0, 20.0], 50)
    assert_position(arm, [1.0, 2.0], 100)
    assert_position(arm, [1.5, 1.0], 200)
    assert_position(arm, [2.0, 0.0], 300, 5000)
    assert_velocity(arm, [0.0, 0.0], 5000)


def test_positions_with_velocities_give_the_cubic_spline() -> None:
    arm = executor()
    # p(s) = 3 s^2 - 2 s^3 for joint a, whose velocities are 0 at both ends.
    arm.accept(message(point(1000, (1.0, 0.0), (0.0, 0.0))), NOW)
    for ms in (0, 250, 500, 900):
        s = ms / 1000
        assert_position(arm, [3 * s**2 - 2 * s**3, 0.0], ms)
        assert_velocity(arm, [6 * s - 6 * s**2, 0.0], ms)


def test_the_cubic_passes_every_point_with_its_velocity() -> None:
    arm = executor()
    arm.accept(message(point(100, (0.1, 0.2), (1.5, -2.0)), point(250, (0.5, 0.1), (0.0, 0.0))), NOW)
    assert_position(arm, [0.1, 0.2], 100)
    assert_velocity(arm, [1.5, -2.0], 100)
    before, after = arm.sample(NOW + 100 * MS - 1), arm.sample(NOW + 100 * MS + 1)
    assert before[0] == pytest.approx(after[0], abs=1e-7)
    assert before[1] == pytest.approx(after[1], abs=1e-5)


def test_velocities_on_one_side_only_give_a_straight_line() -> None:
    arm = executor()
    arm.accept(message(point(100, (1.0, 1.0), (5.0, 5.0)), point(200, (2.0, 1.0))), NOW)
    assert_position(arm, [1.25, 1.0], 125)


def test_names_in_any_order() -> None:
    arm = executor()
    arm.accept(message(point(100, (2.0, 1.0), (0.0, 0.0)), joints=("b", "a")), NOW)
    assert_position(arm, [1.0, 2.0], 100)


def test_a_new_trajectory_replaces_the_running_one_at_once() -> None:
    arm = executor()
    arm.accept(message(point(1000, (1.0, 1.0))), NOW)
    arm.accept(message(point(100, (0.0, 1.0))), NOW + 500 * MS)
    assert_position(arm, [0.5, 0.5], 500)  # starts from where the command was
    assert_position(arm, [0.25, 0.75], 550)
    assert_position(arm, [0.0, 1.0], 600, 1000)


def test_replacement_while_moving_keeps_the_velocity() -> None:
    arm = executor()
    arm.accept(message(point(1000, (1.0, 0.0), (0.0, 0.0))), NOW)
    before = arm.sample(NOW + 400 * MS)
    arm.accept(message(point(500, (0.8, 0.3), (0.0, 0.0))), NOW + 400 * MS)
    after = arm.sample(NOW + 400 * MS)
    assert before[0] == pytest.approx(after[0])
    assert before[1] == pytest.approx(after[1])
    assert before[1][0] > 1.0


def test_a_future_stamp_lets_the_running_trajectory_continue_until_then() -> None:
    arm = executor()
    arm.accept(message(point(1000, (1.0, 0.0))), NOW)
    arm.accept(message(point(100, (0.0, 0.0)), stamp_ns=NOW + 600 * MS), NOW + 200 * MS)
    assert_position(arm, [0.2, 0.0], 200)
    assert_position(arm, [0.599, 0.0], 599)
    assert_position(arm, [0.3, 0.0], 650)
    assert_position(arm, [0.0, 0.0], 700, 2000)


def test_a_future_stamp_waits_out_a_hold() -> None:
    arm = executor()
    arm.accept(message(point(100, (1.0, 0.0)), stamp_ns=NOW + 50 * MS), NOW)
    assert_position(arm, [0.0, 0.0], 49)
    assert_position(arm, [0.5, 0.0], 100)


def test_a_future_stamp_after_the_running_trajectory_ends_holds_in_between() -> None:
    arm = executor()
    arm.accept(message(point(100, (1.0, 0.0))), NOW)
    arm.accept(message(point(100, (0.0, 0.0)), stamp_ns=NOW + 300 * MS), NOW + 50 * MS)
    assert_position(arm, [0.75, 0.0], 75)
    assert_position(arm, [1.0, 0.0], 100, 299)
    assert_position(arm, [0.5, 0.0], 350)


def test_a_deferred_trajectory_gives_way_to_one_that_starts_now() -> None:
    arm = executor()
    arm.accept(message(point(100, (1.0, 0.0)), stamp_ns=NOW + 500 * MS), NOW)
    arm.accept(message(point(100, (0.0, 1.0))), NOW + 10 * MS)
    assert_position(arm, [0.0, 1.0], 110, 600)


def test_points_in_the_past_are_dropped() -> None:
    arm = executor()
    points = (point(100, (5.0, 5.0)), point(200, (7.0, 7.0)), point(300, (1.0, 2.0)))
    arm.accept(message(*points, stamp_ns=NOW - 200 * MS - 1), NOW)
    # The way leads from the commanded state to the first point ahead; the dropped ones leave no trace.
    assert_position(arm, [0.0, 0.0], 0)
    assert arm.sample(NOW + 50 * MS)[0] == pytest.approx([0.5, 1.0], abs=1e-6)
    assert_position(arm, [1.0, 2.0], 100)


def test_a_message_wholly_in_the_past_is_refused_and_changes_nothing() -> None:
    arm = executor()
    arm.accept(message(point(1000, (1.0, 0.0))), NOW)
    with pytest.raises(InputError, match=r"last point was due 100 ms ago.*clock"):
        arm.accept(message(point(300, (9.0, 9.0)), stamp_ns=NOW - 300 * MS), NOW + 100 * MS)
    assert_position(arm, [0.5, 0.0], 500)


def test_a_point_due_this_very_instant_is_past() -> None:
    arm = executor()
    arm.accept(message(point(100, (5.0, 5.0)), point(200, (1.0, 1.0)), stamp_ns=NOW - 100 * MS), NOW)
    assert_position(arm, [0.0, 0.0], 0)
    with pytest.raises(InputError, match="due 0 ms ago"):
        arm.accept(message(point(100, (5.0, 5.0)), stamp_ns=NOW - 100 * MS), NOW)


def test_a_first_point_at_time_zero_is_a_step() -> None:
    arm = executor()
    arm.accept(message(point(0, (1.0, 0.0)), point(100, (2.0, 0.0))), NOW)
    assert_position(arm, [1.0, 0.0], 0)
    assert_position(arm, [1.5, 0.0], 50)


def test_hold_drops_what_runs_and_what_is_deferred() -> None:
    arm = executor()
    arm.accept(message(point(100, (1.0, 0.0))), NOW)
    arm.accept(message(point(100, (2.0, 0.0)), stamp_ns=NOW + 500 * MS), NOW)
    arm.hold(np.array([0.4, 0.4]))
    assert_position(arm, [0.4, 0.4], 50, 1000)


def with_field(**fields) -> TrajectoryPoint:
    return TrajectoryPoint(**{"time_from_start_ns": 100 * MS, "positions": (0.0, 0.0), **fields})


BAD = {
    "missing joint": (message(point(100, (0.0,)), joints=("a",)), r"missing \['b'\]"),
    "unknown joint": (message(point(100, (0.0, 0.0)), joints=("a", "z")), r"unknown \['z'\]"),
    "joint named twice": (message(point(100, (0.0, 0.0, 0.0)), joints=("a", "b", "a")), "once"),
    "no joint names": (message(point(100, (0.0, 0.0)), joints=()), "joint_names"),
    "no points": (message(), "no points"),
    "too few positions": (message(point(100, (0.0,))), "point 0: expected 2 positions"),
    "no positions": (message(with_field(positions=(), velocities=(0.0, 0.0))), "expected 2 positions"),
    "too many velocities": (message(point(100, (0.0, 0.0), (0.0, 0.0, 0.0))), "expected 2 velocities"),
    "NaN position": (message(point(100, (0.0, float("nan")))), "positions must be finite"),
    "infinite velocity": (message(point(100, (0.0, 0.0), (float("inf"), 0.0))), "velocities must be finite"),
    "times equal": (message(point(100, (0.0, 0.0)), point(100, (1.0, 1.0))), "point 1: time_from_start"),
    "times decreasing": (message(point(200, (0.0, 0.0)), point(100, (1.0, 1.0))), "grow strictly"),
    "negative time": (message(point(-100, (0.0, 0.0))), "time_from_start must be >= 0"),
    "accelerations": (message(with_field(accelerations=(0.0, 0.0))), "accelerations are not supported"),
    "effort": (message(with_field(effort=(0.0, 0.0))), "effort are not supported"),
    "moving at the end": (message(point(100, (0.0, 0.0), (0.1, 0.0))), "last point's velocities must be 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_messages_are_refused_with_the_reason(name: str) -> None:
    bad, reason = BAD[name]
    arm = executor()
    arm.accept(message(point(1000, (1.0, 0.0))), NOW)
    with pytest.raises(InputError, match=reason):
        arm.accept(bad, NOW + 100 * MS)
    assert_position(arm, [0.5, 0.0], 500)


offsets = st.integers(-150, 400)
values = st.floats(-2.0, 2.0)


@given(st.lists(st.tuples(st.integers(1, 120), offsets, st.lists(values, min_size=3, max_size=3)), max_size=8))
def test_no_stream_of_messages_makes_the_command_jump(stream: list[tuple[int, int, list[float]]]) -> None:
    """Without a point at time 0, replacement never steps:

    position and velocity at a take-over are those from before.
    """
    arm = executor()
    now = NOW
    for wait_ms, offset_ms, targets in stream:
        now += wait_ms * MS
        points = [point(100 * (k + 1) + 1, (target, -target), (0.0, 0.0)) for k, target in enumerate(targets)]
        before = arm.sample(now)
        arm.accept(message(*points, stamp_ns=now + offset_ms * MS), now)
        after = arm.sample(now)
        np.testing.assert_allclose(after[0], before[0], atol=1e-9)
        np.testing.assert_allclose(after[1], before[1], atol=1e-6)
        end = now + max(offset_ms, -offset_ms) * MS + 302 * MS
        assert arm.sample(end)[0] == pytest.approx([targets[-1], -targets[-1]])
