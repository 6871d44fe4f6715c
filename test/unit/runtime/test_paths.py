"""What joint_trajectory_controller makes of messages to the arm, and where the arm was."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.bundles import mixed_robot
from support.controller import LiteralController
from support.signals import joint_signal

from ki_vla_ros.errors import InputError
from ki_vla_ros.records import NS_PER_S, Motion, SignalReading
from ki_vla_ros.robot import Robot, plain_joints
from ki_vla_ros.runtime.paths import CommandedPath, MeasuredPath, Trajectory, TrajectoryPoint

MS = 1_000_000
NOW = 1_000_000 * MS
JOINTS = ("a", "b")


def controller() -> CommandedPath:
    return CommandedPath(JOINTS, np.zeros(2))


def point(ms: int, positions: Any, velocities: Any = (), accelerations: Any = ()) -> TrajectoryPoint:
    return TrajectoryPoint(ms * MS, positions, velocities, accelerations)


def message(*points: TrajectoryPoint, stamp_ns: int = 0, joints: Sequence[str] = JOINTS) -> Trajectory:
    return Trajectory(stamp_ns, joints, points)


def assert_position(arm: CommandedPath, expected: list[float], *times_ms: int) -> None:
    for ms in times_ms:
        assert arm.sample(NOW + ms * MS)[0] == pytest.approx(expected, abs=1e-12), f"at {ms} ms"
        assert arm.at(np.array([NOW + ms * MS]))[0] == pytest.approx(expected, abs=1e-12), f"at {ms} ms"


def assert_velocity(arm: CommandedPath, expected: list[float], *times_ms: int) -> None:
    for ms in times_ms:
        assert arm.sample(NOW + ms * MS)[1] == pytest.approx(expected, abs=1e-9), f"at {ms} ms"


def test_holds_where_it_is_until_told() -> None:
    arm = CommandedPath(JOINTS, np.array([0.3, -0.2]))
    assert_position(arm, [0.3, -0.2], 0, 99_999)
    assert_velocity(arm, [0.0, 0.0], 0)


def test_positions_alone_give_straight_lines_and_the_last_point_is_held() -> None:
    arm = controller()
    arm.accept(message(point(100, (1.0, 2.0)), point(300, (2.0, 0.0))), NOW)
    assert_position(arm, [0.5, 1.0], 50)
    assert_velocity(arm, [10.0, 20.0], 50)
    assert_position(arm, [1.0, 2.0], 100)
    assert_position(arm, [1.5, 1.0], 200)
    assert_position(arm, [2.0, 0.0], 300, 5000)
    assert_velocity(arm, [0.0, 0.0], 5000)


def test_positions_with_velocities_give_the_cubic_spline() -> None:
    arm = controller()
    # p(s) = 3 s^2 - 2 s^3 for joint a, whose velocities are 0 at both ends.
    arm.accept(message(point(1000, (1.0, 0.0), (0.0, 0.0))), NOW)
    for ms in (0, 250, 500, 900):
        s = ms / 1000
        assert_position(arm, [3 * s**2 - 2 * s**3, 0.0], ms)
        assert_velocity(arm, [6 * s - 6 * s**2, 0.0], ms)


def test_the_cubic_passes_every_point_with_its_velocity() -> None:
    arm = controller()
    arm.accept(message(point(100, (0.1, 0.2), (1.5, -2.0)), point(250, (0.5, 0.1), (0.0, 0.0))), NOW)
    assert_position(arm, [0.1, 0.2], 100)
    assert_velocity(arm, [1.5, -2.0], 100)
    before, after = arm.sample(NOW + 100 * MS - 1), arm.sample(NOW + 100 * MS + 1)
    assert before[0] == pytest.approx(after[0], abs=1e-7)
    assert before[1] == pytest.approx(after[1], abs=1e-5)


def test_positions_velocities_and_accelerations_give_the_quintic_spline() -> None:
    arm = controller()
    # From rest to rest without acceleration at either end: 10 s^3 - 15 s^4 + 6 s^5.
    arm.accept(message(point(1000, (1.0, 0.0), (0.0, 0.0), (0.0, 0.0))), NOW)
    for ms in (0, 250, 500, 900):
        s = ms / 1000
        assert_position(arm, [10 * s**3 - 15 * s**4 + 6 * s**5, 0.0], ms)
        assert_velocity(arm, [30 * s**2 * (1 - s) ** 2, 0.0], ms)


def test_velocities_on_one_side_only_give_a_straight_line() -> None:
    arm = controller()
    arm.accept(message(point(100, (1.0, 1.0), (5.0, 5.0)), point(200, (2.0, 1.0))), NOW)
    assert_position(arm, [1.25, 1.0], 125)


def test_joints_may_come_in_any_order() -> None:
    arm = controller()
    arm.accept(message(point(100, (2.0, 1.0), (0.0, 0.0)), joints=("b", "a")), NOW)
    assert_position(arm, [1.0, 2.0], 100)


def test_a_new_trajectory_replaces_the_running_one_at_once() -> None:
    arm = controller()
    arm.accept(message(point(1000, (1.0, 1.0))), NOW)
    arm.accept(message(point(100, (0.0, 1.0))), NOW + 500 * MS)
    assert_position(arm, [0.5, 0.5], 500)  # starts from where the command was
    assert_position(arm, [0.25, 0.75], 550)
    assert_position(arm, [0.0, 1.0], 600, 1000)


def test_replacement_while_moving_keeps_the_velocity() -> None:
    arm = controller()
    arm.accept(message(point(1000, (1.0, 0.0), (0.0, 0.0))), NOW)
    before = arm.sample(NOW + 400 * MS)
    arm.accept(message(point(500, (0.8, 0.3), (0.0, 0.0))), NOW + 400 * MS)
    after = arm.sample(NOW + 400 * MS)
    assert before[0] == pytest.approx(after[0])
    assert before[1] == pytest.approx(after[1])
    assert before[1][0] > 1.0


def test_a_future_stamp_lets_the_running_trajectory_continue_until_then() -> None:
    arm = controller()
    arm.accept(message(point(1000, (1.0, 0.0))), NOW)
    arm.accept(message(point(100, (0.0, 0.0)), stamp_ns=NOW + 600 * MS), NOW + 200 * MS)
    assert_position(arm, [0.2, 0.0], 200)
    assert_position(arm, [0.599, 0.0], 599)
    assert_position(arm, [0.3, 0.0], 650)
    assert_position(arm, [0.0, 0.0], 700, 2000)


def test_a_future_stamp_waits_out_a_hold() -> None:
    arm = controller()
    arm.accept(message(point(100, (1.0, 0.0)), stamp_ns=NOW + 50 * MS), NOW)
    assert_position(arm, [0.0, 0.0], 49)
    assert_position(arm, [0.5, 0.0], 100)


def test_a_future_stamp_after_the_running_trajectory_ends_holds_in_between() -> None:
    arm = controller()
    arm.accept(message(point(100, (1.0, 0.0))), NOW)
    arm.accept(message(point(100, (0.0, 0.0)), stamp_ns=NOW + 300 * MS), NOW + 50 * MS)
    assert_position(arm, [0.75, 0.0], 75)
    assert_position(arm, [1.0, 0.0], 100, 299)
    assert_position(arm, [0.5, 0.0], 350)


def test_a_deferred_trajectory_gives_way_to_one_that_starts_now() -> None:
    arm = controller()
    arm.accept(message(point(100, (1.0, 0.0)), stamp_ns=NOW + 500 * MS), NOW)
    arm.accept(message(point(100, (0.0, 1.0))), NOW + 10 * MS)
    assert_position(arm, [0.0, 1.0], 110, 600)


def test_a_deferred_trajectory_runs_until_a_later_one_and_gives_way_to_an_earlier_one() -> None:
    for second_ms, expected in ((500, [3.0, 2.0]), (200, [0.1, 0.0])):
        arm = controller()
        arm.accept(message(point(1000, (1.0, 0.0))), NOW)
        arm.accept(message(point(400, (5.7, 4.0)), stamp_ns=NOW + 300 * MS), NOW)
        arm.accept(message(point(100, (0.0, 0.0)), stamp_ns=NOW + second_ms * MS), NOW + 100 * MS)
        assert_position(arm, [0.19, 0.0], 190)
        assert_position(arm, expected, second_ms + (0 if second_ms == 500 else 50))
        assert_position(arm, [0.0, 0.0], second_ms + 100, 900)


def test_a_trajectory_that_has_already_begun_is_joined_where_it_is_now() -> None:
    arm = controller()
    points = (point(100, (5.0, 5.0)), point(200, (7.0, 7.0)), point(300, (1.0, 2.0)))
    arm.accept(message(*points, stamp_ns=NOW - 250 * MS), NOW)
    assert_position(arm, [4.0, 4.5], 0)
    assert_position(arm, [2.5, 3.25], 25)
    assert_position(arm, [1.0, 2.0], 50, 100)


def test_a_stamp_in_the_past_with_all_points_ahead_starts_from_where_the_arm_is() -> None:
    arm = controller()
    arm.accept(message(point(300, (1.0, 2.0)), stamp_ns=NOW - 200 * MS), NOW)
    assert_position(arm, [0.0, 0.0], 0)
    assert_position(arm, [0.5, 1.0], 50)


def test_a_message_wholly_in_the_past_is_refused_and_changes_nothing() -> None:
    arm = controller()
    arm.accept(message(point(1000, (1.0, 0.0))), NOW)
    with pytest.raises(InputError, match=r"last point was due 100 ms before.*clock"):
        arm.accept(message(point(300, (9.0, 9.0)), stamp_ns=NOW - 300 * MS), NOW + 100 * MS)
    assert_position(arm, [0.5, 0.0], 500)


def test_a_last_point_due_this_very_instant_is_not_past() -> None:
    arm = controller()
    with pytest.raises(InputError, match="due 0 ms before"):
        arm.accept(message(point(100, (5.0, 5.0)), stamp_ns=NOW - 100 * MS - 1), NOW)
    arm.accept(message(point(100, (5.0, 5.0)), stamp_ns=NOW - 100 * MS), NOW)
    assert_position(arm, [5.0, 5.0], 0, 100)


def test_a_first_point_at_time_zero_is_a_step() -> None:
    arm = controller()
    arm.accept(message(point(0, (1.0, 0.0)), point(100, (2.0, 0.0))), NOW)
    assert_position(arm, [1.0, 0.0], 0)
    assert_position(arm, [1.5, 0.0], 50)


def test_hold_drops_the_running_and_the_deferred_trajectory() -> None:
    arm = controller()
    arm.accept(message(point(100, (1.0, 0.0))), NOW)
    arm.accept(message(point(100, (2.0, 0.0)), stamp_ns=NOW + 500 * MS), NOW)
    arm.hold(np.array([0.4, 0.4]))
    assert_position(arm, [0.4, 0.4], 50, 1000)


def with_field(**fields: Any) -> TrajectoryPoint:
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
    "accelerations alone": (message(with_field(accelerations=(0.0, 0.0))), "accelerations without velocities"),
    "effort": (message(with_field(effort=(0.0, 0.0))), "effort is not supported"),
    "moving at the end": (message(point(100, (0.0, 0.0), (0.1, 0.0))), "last point's velocities must be 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_messages_are_refused_with_the_reason(name: str) -> None:
    bad, reason = BAD[name]
    arm = controller()
    arm.accept(message(point(1000, (1.0, 0.0))), NOW)
    with pytest.raises(InputError, match=reason):
        arm.accept(bad, NOW + 100 * MS)
    assert_position(arm, [0.5, 0.0], 500)


def test_a_partial_goal_is_refused_unless_the_controller_allows_it() -> None:
    goal = message(point(100, (1.0,)), joints=("b",))
    with pytest.raises(InputError, match=r"missing \['a'\]"):
        controller().accept(goal, NOW)
    arm = CommandedPath(JOINTS, np.zeros(2), allow_partial_joints_goal=True)
    arm.accept(message(point(100, (1.0, 1.0))), NOW)
    arm.accept(goal, NOW + 50 * MS)
    assert_position(arm, [0.5, 0.75], 100)  # the joint that is left out stays where it was told to be
    with pytest.raises(InputError, match="joint_names"):
        arm.accept(message(point(100, (1.0,)), joints=("z",)), NOW)


def test_a_controller_forgets_what_has_been_replaced() -> None:
    arm = controller()
    for k in range(100):
        arm.accept(message(point(100, (float(k), 0.0))), NOW + k * 10 * MS)
    assert len(arm._pieces) <= 2


offsets = st.integers(-100, 400)
values = st.floats(-2.0, 2.0)


@given(st.lists(st.tuples(st.integers(1, 120), offsets, st.lists(values, min_size=3, max_size=3)), max_size=8))
def test_no_stream_of_messages_makes_the_command_jump(stream: list[tuple[int, int, list[float]]]) -> None:
    """If the first point lies ahead, a trajectory takes over at the position and velocity of the previous one."""
    arm = controller()
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


# --- against a controller written step by step


@st.composite
def commands(draw: st.DrawFn) -> list[tuple[int, Trajectory]]:
    """Messages and their arrival times: starting now, later, already begun or past; all joints or one; all degrees."""
    found, now_ms = [], 0
    for _ in range(draw(st.integers(1, 6))):
        now_ms += draw(st.integers(1, 80))
        stamp_ms = draw(st.sampled_from([0, 0, 0, *range(-120, 160, 20), 7, -7]))
        joints = draw(st.sampled_from([JOINTS, JOINTS, JOINTS[::-1], JOINTS[:1], JOINTS[1:]]))
        fields, points, at_ms = draw(st.sampled_from([1, 2, 3, 0])), [], draw(st.integers(0, 40))
        for _ in range(draw(st.integers(1, 4))):
            given = draw(st.integers(1, 3)) if fields == 0 else fields
            numbers = [draw(st.lists(values, min_size=len(joints), max_size=len(joints))) for _ in range(given)]
            points.append(TrajectoryPoint(at_ms * MS, *numbers))
            at_ms += draw(st.integers(10, 60))
        found.append((now_ms, Trajectory(NOW + (now_ms + stamp_ms) * MS if stamp_ms else 0, joints, points)))
    return found


@settings(max_examples=60, deadline=None)
@given(commands())
def test_the_path_equals_that_of_the_literal_controller(
    stream: list[tuple[int, Trajectory]],
) -> None:
    literal = LiteralController(dict.fromkeys(JOINTS, (0.3, 0.0, 0.0)))
    path = CommandedPath(JOINTS, allow_partial_joints_goal=True)  # keeps all, and lets a motion end at a speed
    path.take(SimpleNamespace(data=[0.3, 0.3]), NOW)
    expected, asked, stream = [], [], list(stream)
    for ms in range(1, 400):
        now_ns = NOW + ms * MS
        literal.step(now_ns)
        while stream and stream[0][0] == ms:
            _, trajectory = stream.pop(0)
            literal.receive(trajectory, now_ns)
            try:
                path.accept(trajectory, now_ns)
            except InputError as refusal:
                assert "before it came" in str(refusal)
        expected.append(literal.step(now_ns))
        asked.append(now_ns)
        np.testing.assert_allclose(path.sample(now_ns)[0], expected[-1], atol=1e-9)
    np.testing.assert_allclose(path.at(np.array(asked)), expected, atol=1e-9)


# --- as an onlooker


def time_of(time_ns: int) -> Any:
    return SimpleNamespace(sec=time_ns // NS_PER_S, nanosec=time_ns % NS_PER_S)


def told(points: Any, stamp_ns: int = 0, names: tuple[str, ...] = JOINTS) -> Any:
    """A message; `points`: (time from start in ns, positions[, velocities])."""
    made = [
        SimpleNamespace(
            time_from_start=time_of(offset),
            positions=position,
            velocities=rest[0] if rest else [],
            accelerations=[],
            effort=[],
        )
        for offset, position, *rest in points
    ]
    return SimpleNamespace(header=SimpleNamespace(stamp=time_of(stamp_ns)), joint_names=list(names), points=made)


def first_joint(path: CommandedPath, *times_ns: int) -> NDArray[np.float64]:
    return path.at(np.array(times_ns))[:, 0]


def test_points_with_velocities_give_back_the_nodes_motion() -> None:
    """Constant acceleration from instant to instant gives the cubic through both ends."""
    rng = np.random.default_rng(0)
    time_N = np.arange(6) * 20 * MS + 10 * MS
    velocity_NJ = rng.normal(size=(6, 2))
    step_NJ = (velocity_NJ[1:] + velocity_NJ[:-1]) / 2 * 0.02
    position_NJ = np.concatenate([[[0.3, -0.2]], np.array([0.3, -0.2]) + np.cumsum(step_NJ, axis=0)])
    motion = Motion(JOINTS, int(time_N[0]), time_N, position_NJ, velocity_NJ)
    path = CommandedPath(("b", "a"))
    path.take(told(list(zip(time_N.tolist(), position_NJ, velocity_NJ, strict=True))), 5 * MS)
    for time_ns in range(15 * MS, 130 * MS, 3 * MS):
        np.testing.assert_allclose(path.at(np.array([time_ns]))[0], motion.at(time_ns - 5 * MS)[0][::-1], atol=1e-12)


def test_a_command_is_in_force_until_the_next_one() -> None:
    path = CommandedPath(JOINTS)
    assert np.isnan(first_joint(path, 0, NOW)).all()
    path.take(told([(100 * MS, [1.0, 0.0]), (200 * MS, [2.0, 0.0])]), NOW)
    assert np.isnan(first_joint(path, NOW - 1, NOW + 50 * MS)).all(), (
        "where it starts on its way to the first point is unknown"
    )
    path.take(told([(50 * MS, [3.0, 8.0])]), NOW + 150 * MS)
    times_ns = [NOW + since_ms * MS for since_ms in (100, 149, 150, 175, 200, 900)]
    np.testing.assert_allclose(first_joint(path, *times_ns), [1.0, 1.49, 1.5, 2.25, 3.0, 3.0])
    path.forget(NOW + 160 * MS)
    np.testing.assert_allclose(first_joint(path, *times_ns[3:]), [2.25, 3.0, 3.0])
    path.clear()
    assert np.isnan(first_joint(path, *times_ns)).all()


def test_a_stamped_command_is_in_force_from_its_stamp_on() -> None:
    path = CommandedPath(JOINTS)
    path.take(told([(0, [1.0, 1.0])], stamp_ns=NOW), NOW - 50 * MS)
    path.take(told([(0, [5.0, 5.0])], stamp_ns=NOW + 20 * MS), NOW + 1)
    times_ns = NOW - 1, NOW, NOW + 20 * MS - 1, NOW + 20 * MS
    np.testing.assert_equal(first_joint(path, *times_ns), [np.nan, 1.0, 1.0, 5.0])
    assert path.known(NOW, NOW + 1) and not path.known(NOW, NOW), "what comes at that instant counts"


def test_single_positions_are_in_force_from_their_arrival_on() -> None:
    path = CommandedPath(JOINTS)
    for k in range(3):
        path.take(SimpleNamespace(data=[float(k), -1.0]), NOW + k * 20 * MS + 1)
    np.testing.assert_equal(first_joint(path, *(NOW + k * 10 * MS + 1 for k in range(6))), [0, 0, 1, 1, 2, 2])


def test_an_onlooker_who_is_told_where_the_arm_is_knows_a_servo_stream() -> None:
    """A point every 20 ms, each due 100 ms later: none is reached, and the arm goes a fifth of the way each time."""
    watched, blind = CommandedPath(JOINTS), CommandedPath(JOINTS)
    place_J = np.array([0.1, -0.1])
    for k in range(50):
        now_ns, target_J = NOW + 20 * k * MS, np.array([1.0 + k / 100, 2.0])
        watched.accept(message(point(100, target_J)), now_ns, np.array([0.1, -0.1]))
        blind.accept(message(point(100, target_J)), now_ns)
        assert watched.sample(now_ns)[0] == pytest.approx(place_J, abs=1e-12)
        place_J = place_J + 0.2 * (target_J - place_J)
        assert np.isnan(blind.sample(now_ns + 19 * MS)[0]).all()
    assert np.isnan(watched.at(np.array([NOW - 1]))).all()


def test_a_joint_that_nobody_measures_is_known_from_its_first_point_on() -> None:
    watched = CommandedPath(JOINTS)
    watched.accept(message(point(100, (1.0, 2.0))), NOW, np.array([0.0, np.nan]))
    middle_J = watched.at(np.array([NOW + 50 * MS]))[0]
    assert middle_J[0] == 0.5 and np.isnan(middle_J[1])
    assert_position(watched, [1.0, 2.0], 100)


def test_an_onlooker_knows_only_what_the_controller_was_sent() -> None:
    """The controller has another joint and lets a trajectory end in motion: the next one begins with that speed."""
    path = CommandedPath(JOINTS)
    path.take(told([(100 * MS, [9.0, 1.0, 0.0], [0.0, 0.0, 2.0])], names=("z", "b", "a")), NOW)
    path.take(told([(1000 * MS, [2.0, 1.0], [0.0, 0.0])]), NOW + 100 * MS)
    assert np.isnan(path.sample(NOW + 99 * MS)[0]).all(), "before its first point"
    np.testing.assert_allclose(path.sample(NOW + 100 * MS), [[0.0, 1.0], [2.0, 0.0]])
    np.testing.assert_allclose(path.sample(NOW + 600 * MS)[0], [2.0 * 0.125 + 2.0 * 0.5, 1.0])
    with pytest.raises(InputError, match=r"unknown \['z'\]"):
        controller().take(told([(MS, [0.0, 0.0, 0.0])], names=("z", "b", "a")), NOW)


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (told([(0, [1.0])], names=("a",)), r"missing \['b'\]"),
        (told([]), "has no points"),
        (told([(0, [1.0, 2.0, 3.0])]), "point 0: expected 2 positions .*got 3"),
        (told([(5, [1.0, 2.0]), (5, [1.0, 2.0])]), "grow strictly"),
        (told([(5, [1.0, np.nan])]), "finite"),
        (SimpleNamespace(data=[1.0]), "expected 2 positions, got 1"),
        (SimpleNamespace(data=[1.0, np.inf]), "finite"),
    ],
)
def test_commands_that_leave_joints_out_are_refused(sent: Any, expected: str) -> None:
    path = CommandedPath(JOINTS)
    with pytest.raises(InputError, match=f"command: .*{expected}"):
        path.take(sent, NOW)
    assert np.isnan(first_joint(path, NOW + MS)).all()


# --- where the arm was


def came(at_ms: float, *value: float, signals: tuple[int, ...] | None = None) -> list[SignalReading]:
    return [SignalReading(round(at_ms * MS), signals or tuple(range(len(value))), np.array(value, dtype=np.float64))]


def test_joint_states_are_interpolated_but_not_over_gaps() -> None:
    path = MeasuredPath(plain_joints(JOINTS, "/joint_states"))
    for at_ms in (0, 100, 200, 700, 800):
        path.add(came(at_ms, at_ms, at_ms + 1.0))
    found_NJ = path.at(np.array([-1, 0, 50, 200, 450, 700, 750, 800, 801]) * MS)
    np.testing.assert_equal(found_NJ[:, 0], [np.nan, 0, 50, 200, np.nan, 700, 750, 800, np.nan])
    np.testing.assert_equal(found_NJ[:, 1], found_NJ[:, 0] + 1.0)
    path.forget(650 * MS)
    assert np.isnan(path.at(np.array([50 * MS]))).all() and np.isfinite(path.at(np.array([750 * MS]))).all()
    path.clear()
    assert np.isnan(path.at(np.array([750 * MS]))).all()


def test_late_joint_states_are_left_out_and_the_gap_is_adjustable() -> None:
    path = MeasuredPath(plain_joints(("b",), "/joint_states"), max_gap_ns=100 * MS)
    for time_ms, value in ((100, 1.0), (150, 2.0), (150, 9.0), (120, 9.0), (300, 3.0)):
        path.add(came(time_ms, value))
    found_N = path.at(np.array([99, 100, 125, 150, 200, 300, 301]) * MS)[:, 0]
    np.testing.assert_equal(found_N, [np.nan, 1.0, 1.5, 2.0, np.nan, 3.0, np.nan])
    assert path.known(300 * MS, 300 * MS) and not path.known(301 * MS, 400 * MS)
    assert path.known(301 * MS, 402 * MS), "nothing will come of it any more"


def test_an_arm_that_is_put_elsewhere_has_not_moved_there() -> None:
    path = MeasuredPath([joint_signal(name, max_velocity=3.0) for name in JOINTS])
    turning = [0.03 * n for n in range(10)]  # at the limit of 3 rad/s
    for n, value in enumerate([*turning, *(2.0 + v for v in turning), *turning]):
        path.add(came(n * 10, value, value))
    assert path.jumps == 2
    between_N = path.at(np.array([85, 95, 105, 195]) * MS)[:, 0]
    np.testing.assert_allclose(between_N, [0.255, np.nan, 2.015, np.nan], err_msg="nothing is between two places")
    since_and_jump = {0: 90, 90: 90, 91: 190, 190: 190, 191: None}
    for since_ms, jump_ms in since_and_jump.items():
        assert path.jump_after(since_ms * MS) == (None if jump_ms is None else jump_ms * MS)
    path.forget(150 * MS)
    assert path.jump_after(0) == 190 * MS


def test_a_part_of_its_own_is_followed_by_itself_and_a_path_is_known_where_all_parts_are() -> None:
    path = MeasuredPath([joint_signal("a", max_velocity=3.0), joint_signal("b", max_velocity=3.0)])
    for at_ms in (0, 100):  # together at first
        path.add(came(at_ms, 0.001 * at_ms, 1.0))
    for at_ms in (200, 300):
        path.add(came(at_ms, 0.001 * at_ms, signals=(0,)))
    assert not path.known(150 * MS, 310 * MS)
    path.add(came(250, 1.1, signals=(1,)))
    assert path.known(250 * MS, 310 * MS) and not path.known(251 * MS, 310 * MS)
    found_NJ = path.at(np.array([50, 150, 250, 300]) * MS)
    np.testing.assert_allclose(found_NJ, [[0.05, 1.0], [0.15, 1.0 + 0.1 / 3.0], [0.25, 1.1], [0.3, np.nan]])
    path.add(came(310, 3.0, signals=(0,)))
    assert path.jumps == 1 and path.jump_after(0) == 300 * MS


def test_where_the_axes_of_a_robot_were() -> None:
    """Rotations count from none, and nobody measures the velocities of its base."""
    robot = Robot.model_validate(mixed_robot())
    names = [signal.part for signal in robot.signals]
    path = MeasuredPath(robot.signals, robot)
    assert np.isnan(path.at(np.array([0]))).all() and path.at(np.array([0])).shape == (1, len(robot.axes))
    tool = {"x": 0.1, "y": 0.2, "z": 0.3, "qx": 0.0, "qy": 0.0, "qz": np.sin(0.2), "qw": np.cos(0.2)}
    values = {"shoulder": 0.5, "elbow": 0.6, "gripper": 0.02, "slide": 0.3, **tool}
    path.add(came(0, *[values[name] for name in names]))
    found = dict(zip(robot.axis_names, path.at(np.array([0]))[0].tolist(), strict=True))
    assert np.isnan([found.pop("forward"), found.pop("turn")]).all()
    expected = {**{name: values[name] for name in ("shoulder", "elbow", "gripper", "slide")}}
    expected |= {"tool.x": 0.1, "tool.y": 0.2, "tool.z": 0.3, "tool.rx": 0.0, "tool.ry": 0.0, "tool.rz": 0.4}
    assert found == pytest.approx(expected)
