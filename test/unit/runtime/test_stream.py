"""A motion streamed in steps that no lateness lengthens."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from support.loop_rig import MS, START
from support.waiting import PATIENCE_S, until

from ki_vla_ros.records import Motion, MotionInterrupted
from ki_vla_ros.ros.stream import MotionStream, Player, Sample, Streamed

PERIOD_MS, SPEED = 20, 1.5


def steady_motion(seconds: float = 2.0) -> Motion:
    """At full speed for a while, then at rest (at once: the stream does not judge)."""
    time_N = START + np.array([0, round(seconds * 1000)]) * MS
    return Motion(("a",), START, time_N, np.array([[0.0], [SPEED * seconds]]), np.array([[SPEED], [SPEED]]))


def play(late_ms: dict[int, int], count: int = 30) -> tuple[Player, list[float], int]:
    """Positions as they go out, with these lateness of some of them, and the time at the end."""
    player, now_ns, found = Player(PERIOD_MS * MS, Streamed.positions(1)), START, []
    player.play(steady_motion(), now_ns)
    for k in range(count):
        now_ns = player.due_ns() + late_ms.get(k, 0) * MS
        sample = player.next(now_ns)
        if sample is None:
            break
        player.sent(sample, slice(0, 1))
        found.append(float(sample.position_J[0]))
    return player, found, now_ns


class Output:
    """One that keeps what it is sent, or fails."""

    def __init__(self, axes: slice = slice(0, 1)) -> None:
        self.axes = axes
        self.sent: list[Sample] = []
        self.tried, self.fails = threading.Event(), False

    def send(self, sample: Sample) -> None:
        self.tried.set()
        if self.fails:
            raise RuntimeError("the middleware is gone")
        self.sent.append(sample)


def test_on_time_the_motion_is_played_as_it_is() -> None:
    _, found, _ = play({})
    np.testing.assert_allclose(np.diff(found), SPEED * PERIOD_MS / 1000)


@pytest.mark.parametrize("late_ms", [1, 10, 19, 20])
def test_a_late_position_makes_no_longer_step(late_ms: int) -> None:
    player, found, now_ns = play({10: late_ms, 15: late_ms})
    assert len(found) == 30
    np.testing.assert_allclose(np.diff(found), SPEED * PERIOD_MS / 1000)
    # The loop asks where the motion has got to: as much behind as the positions were late.
    assert player.motion_ns(now_ns) == now_ns - 2 * late_ms * MS


@pytest.mark.parametrize("late_ms", [21, 240, 5_000])
def test_after_a_gap_the_motion_is_dropped_and_the_next_starts_where_it_stopped(late_ms: int) -> None:
    player, found, now_ns = play({10: late_ms})
    assert len(found) == 10 and player.motion is None
    assert player.motion_ns(now_ns) == player.motion_ns(now_ns + 100 * MS) == START + 10 * PERIOD_MS * MS
    with pytest.raises(MotionInterrupted, match=f"no position went out for {late_ms + PERIOD_MS} ms") as stopped:
        player.play(steady_motion(), now_ns)
    np.testing.assert_allclose(stopped.value.motion.position_NJ, [[found[-1]]])
    assert player.motion is None and player.motion_ns(now_ns) == now_ns
    player.play(steady_motion(), now_ns)  # it knows now
    assert player.motion is not None


def test_a_gap_after_a_motion_was_replaced_ends_where_the_last_position_was() -> None:
    player, found, now_ns = play({}, count=10)
    later = Motion(("a",), START, START + np.array([215, 400]) * MS, np.array([[0.4], [0.6]]), np.zeros((2, 1)))
    player.play(later, now_ns + 5 * MS)  # it begins between two positions
    assert player.next(now_ns + 100 * MS) is None
    with pytest.raises(MotionInterrupted) as stopped:
        player.play(later, now_ns + 100 * MS)
    np.testing.assert_allclose(stopped.value.motion.position_NJ, [[found[-1]]])


def test_a_thread_that_starts_late_does_not_skip_the_beginning() -> None:
    player = Player(PERIOD_MS * MS, Streamed.positions(1))
    player.play(steady_motion(), START)
    sample = player.next(START + 39 * MS)
    assert sample is not None and sample.position_J == pytest.approx(SPEED * PERIOD_MS / 1000)


def test_the_last_position_goes_out_once() -> None:
    player, found, now_ns = play({}, count=100)
    assert len(found) == 100 and found[-1] == pytest.approx(2.0 * SPEED)
    assert player.motion is None and player.motion_ns(now_ns) == now_ns


def test_simulated_time_that_is_set_back_does_not_stop_the_stream() -> None:
    player, _, _ = play({})
    player.play(steady_motion(), START)
    assert player.due_ns() == START + PERIOD_MS * MS


def test_a_position_that_cannot_be_sent_does_not_end_the_stream() -> None:
    clock, output = [START], Output()
    output.fails = True
    stream = MotionStream([output], Streamed.positions(1), lambda: clock[0], PERIOD_MS / 1000)
    try:
        stream.play(steady_motion())
        clock[0] += PERIOD_MS * MS
        assert output.tried.wait(PATIENCE_S)
        stream.wait_until_ended()
        with pytest.raises(MotionInterrupted, match=r"could not be sent: .*the middleware is gone"):
            stream.play(steady_motion())
        output.fails = False
        output.tried.clear()
        stream.play(steady_motion())
        clock[0] += PERIOD_MS * MS
        assert output.tried.wait(PATIENCE_S)
    finally:
        stream.close()


def test_simulated_time_may_run_in_large_steps() -> None:
    """Positions then come in bursts, each still no farther from the one before."""
    clock, output = [START], Output()
    stream = MotionStream([output], Streamed.positions(1), lambda: clock[0], PERIOD_MS / 1000, simulated=True)
    try:
        stream.play(steady_motion())
        for _ in range(5):
            clock[0] += 500 * MS
            threading.Event().wait(0.03)
        stream.wait_until_ended()
    finally:
        stream.close()
    found = [0.0, *(float(sample.position_J[0]) for sample in output.sent)]
    assert found[-1] == pytest.approx(2.0 * SPEED)
    np.testing.assert_allclose(np.diff(found), SPEED * PERIOD_MS / 1000)


# --- velocities, and robots that also have trajectories

VELOCITY, ACCELERATION = 0.6, 3.0  # 0.06 per period, so ten periods to rest


def mixed(acceleration: float = ACCELERATION) -> Streamed:
    """A trajectory's axis, a streamed position and a velocity."""
    yes, no = True, False
    return Streamed(np.array([no, yes, yes]), np.array([no, no, yes]), np.array([np.inf, np.inf, acceleration]))


def cruise(end_ms: int = 2000) -> Motion:
    """The velocity rises as fast as it may, stays, and falls as fast as it may; the position moves steadily."""
    ramp = round(VELOCITY / ACCELERATION * 1000)
    time_N = START + np.array([0, ramp, end_ms - ramp, end_ms]) * MS
    velocity_NJ = np.array([[0, 1, 0], [0, 1, VELOCITY], [0, 1, VELOCITY], [0, 0, 0]], dtype=np.float64)
    gone_N = np.cumsum([0, VELOCITY * ramp / 2000, VELOCITY * (end_ms - 2 * ramp) / 1000, VELOCITY * ramp / 2000])
    position_NJ = np.stack([np.zeros(4), (time_N - START) / 1e9, gone_N], axis=1)
    return Motion(("t", "p", "v"), START, time_N, position_NJ, velocity_NJ)


def play_mixed(
    late_ms: dict[int, int], count: int = 200, on_grid: bool = True
) -> tuple[Player, list[tuple[int, float, float]]]:
    """When each value went out, position and velocity, until nothing is due any more."""
    player, found = Player(PERIOD_MS * MS, mixed(), on_grid), []
    player.play(cruise(), START)
    for k in range(count):
        if player.motion is None:
            break
        now_ns = player.due_ns() + late_ms.get(k, 0) * MS
        sample = player.next(now_ns)
        if sample is None:
            break
        player.sent(sample, slice(1, 3))
        found.append(((now_ns - START) // MS, float(sample.position_J[1]), float(sample.velocity_J[2])))
    return player, found


def assert_gentle(velocities: list[float]) -> None:
    steps = np.abs(np.diff([0.0, *velocities]))
    assert steps.max() <= ACCELERATION * PERIOD_MS / 1000 * (1 + 1e-5)


@pytest.mark.parametrize("on_grid", [True, False])
def test_a_velocity_ends_at_0_several_times_and_nothing_follows(on_grid: bool) -> None:
    player, found = play_mixed({}, on_grid=on_grid)
    assert player.motion is None and player.take_interruption() is None
    velocities = [v for _, _, v in found]
    assert_gentle(velocities)
    assert max(velocities) == pytest.approx(VELOCITY)
    assert velocities[-3:] == [0.0, 0.0, 0.0] and velocities[-5] > 0.0


def test_beside_trajectories_a_late_value_does_not_delay_the_next() -> None:
    _, on_time = play_mixed({})
    _, late = play_mixed({10: 15, 40: 15})
    assert [ms for ms, _, _ in late if ms % PERIOD_MS] == [10 * 20 + 35, 40 * 20 + 35]
    assert [(p, v) for _, p, v in late] == [(p, v) for _, p, v in on_time]


def test_beside_trajectories_a_missed_instant_is_left_out_and_a_velocity_makes_no_larger_step() -> None:
    player, found = play_mixed({5: 25})  # the velocity is rising
    assert player.take_interruption() is None
    assert_gentle([v for _, _, v in found])
    np.testing.assert_allclose(np.diff([p for _, p, _ in found[:8]]), [0.02] * 4 + [0.04] + [0.02] * 2)
    player, found = play_mixed({95: 25})  # it is falling
    assert_gentle([v for _, _, v in found])
    assert found[-1][2] == 0.0


@pytest.mark.parametrize("on_grid", [True, False])
@pytest.mark.parametrize("late_ms", [45, 400])
def test_after_a_gap_velocities_brake_from_the_last_one_that_was_sent(on_grid: bool, late_ms: int) -> None:
    player, found = play_mixed({30: late_ms}, on_grid=on_grid)
    interruption = player.take_interruption()
    assert interruption is not None and f"no position went out for {late_ms + PERIOD_MS} ms" in str(interruption)
    assert interruption.axis_J.tolist() == [False, True, True]
    velocities = [v for _, _, v in found]
    assert_gentle(velocities)
    np.testing.assert_allclose(velocities[29:41], [VELOCITY] + [0.06 * k for k in range(9, -1, -1)] + [0.0], atol=1e-12)
    # The streamed position stays where it was sent, and what is said of the axes is what then went out.
    assert len({p for _, p, _ in found[29:]}) == 1
    told = interruption.motion
    np.testing.assert_allclose(told.velocity_NJ[:, 2], velocities[29:40], atol=1e-12)
    assert told.position_NJ[:, 1] == pytest.approx(found[29][1])
    assert told.velocity_NJ[:, :2].tolist() == [[0.0, 0.0]] * 11


def test_one_output_that_fails_stops_all_and_its_velocity_is_tried_until_it_is_0() -> None:
    clock, first, second = [START], Output(slice(1, 2)), Output(slice(2, 3))
    stream = MotionStream([first, second], mixed(), lambda: clock[0], PERIOD_MS / 1000, simulated=True)
    try:
        stream.play(cruise())
        clock[0] += 500 * MS
        until(lambda: len(second.sent) >= 25)
        second.fails = True
        clock[0] += PERIOD_MS * MS
        assert second.tried.wait(PATIENCE_S)
        found: list[MotionInterrupted] = []
        until(lambda: found or [found.append(i) for i in [stream.take_interruption()] if i is not None])
        (interruption,) = found
        # The first one got one value more.
        assert interruption.motion.position_NJ[0, 1] == pytest.approx(0.52)
        assert interruption.motion.velocity_NJ[0, 2] == pytest.approx(VELOCITY)
        second.fails = False
        clock[0] += 500 * MS
        stream.wait_until_ended()
        velocities = [float(sample.velocity_J[2]) for sample in second.sent]
        assert_gentle(velocities)
        assert velocities[-3:] == [0.0] * 3
        assert float(first.sent[-1].position_J[1]) == pytest.approx(0.52)
    finally:
        stream.close()


@pytest.mark.parametrize("how", ["wait", "close"])
def test_velocities_are_braked_even_if_simulated_time_stands_still(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ki_vla_ros.ros.stream.LONGEST_WAIT_S", 0.05)
    clock, output = [START], Output(slice(2, 3))
    stream = MotionStream([output], mixed(), lambda: clock[0], PERIOD_MS / 1000, simulated=True)
    stream.play(cruise())
    clock[0] += 500 * MS
    until(lambda: len(output.sent) >= 25)
    if how == "wait":
        stream.wait_until_ended()
        assert float(output.sent[-1].velocity_J[2]) == 0.0
    stream.close()
    velocities = [float(sample.velocity_J[2]) for sample in output.sent]
    assert_gentle(velocities)
    assert velocities[-3:] == [0.0] * 3 and velocities[24] == pytest.approx(VELOCITY)


@pytest.mark.parametrize("on_grid", [True, False])
def test_simulated_time_that_is_set_back_leaves_no_velocity_behind(on_grid: bool) -> None:
    clock, output = [START], Output(slice(2, 3))
    stream = MotionStream([output], mixed(), lambda: clock[0], PERIOD_MS / 1000, simulated=True, on_grid=on_grid)
    try:
        stream.play(cruise())
        clock[0] += 500 * MS
        until(lambda: len(output.sent) >= 25)
        clock[0] -= 400 * MS
        until(lambda: len(output.sent) >= 26)
        clock[0] += 300 * MS
        until(lambda: len(output.sent) >= 37)
        velocities = [float(sample.velocity_J[2]) for sample in output.sent]
        assert_gentle(velocities)
        assert velocities[24] == pytest.approx(VELOCITY) and velocities[-3:] == [0.0] * 3
        assert stream.take_interruption() is None
        stream.play(cruise())
    finally:
        stream.close()
