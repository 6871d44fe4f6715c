"""A motion streamed in steps that no lateness lengthens."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from numpy.typing import NDArray
from support.loop_rig import MS, START
from support.waiting import PATIENCE_S

from ki_vla_ros.errors import MotionInterrupted
from ki_vla_ros.records import Motion
from ki_vla_ros.ros.stream import MotionStream, Player

PERIOD_MS, SPEED = 20, 1.5


def steady_motion(seconds: float = 2.0) -> Motion:
    """At full speed for a while, then at rest (at once: the stream does not judge)."""
    time_N = START + np.array([0, round(seconds * 1000)]) * MS
    return Motion(("a",), START, time_N, np.array([[0.0], [SPEED * seconds]]), np.array([[SPEED], [SPEED]]))


def play(late_ms: dict[int, int], count: int = 30) -> tuple[Player, list[float], int]:
    """Positions as they go out, with these lateness of some of them, and the time at the end."""
    player, now_ns, found = Player(PERIOD_MS * MS), START, []
    player.play(steady_motion(), now_ns)
    for k in range(count):
        now_ns = player.due_ns() + late_ms.get(k, 0) * MS
        position_J = player.next(now_ns)
        if position_J is None:
            break
        found.append(float(position_J[0]))
    return player, found, now_ns


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
    np.testing.assert_allclose(stopped.value.position_J, found[-1])
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
    np.testing.assert_allclose(stopped.value.position_J, found[-1])


def test_a_thread_that_starts_late_does_not_skip_the_beginning() -> None:
    player = Player(PERIOD_MS * MS)
    player.play(steady_motion(), START)
    assert player.next(START + 39 * MS) == pytest.approx(SPEED * PERIOD_MS / 1000)


def test_the_last_position_goes_out_once() -> None:
    player, found, now_ns = play({}, count=100)
    assert len(found) == 100 and found[-1] == pytest.approx(2.0 * SPEED)
    assert player.motion is None and player.motion_ns(now_ns) == now_ns


def test_simulated_time_that_is_set_back_does_not_stop_the_stream() -> None:
    player, _, _ = play({})
    player.play(steady_motion(), START)
    assert player.due_ns() == START + PERIOD_MS * MS


def test_a_position_that_cannot_be_sent_does_not_end_the_stream() -> None:
    clock, tried, fails = [START], threading.Event(), [True]

    def send(position_J: NDArray[np.float64]) -> None:
        tried.set()
        if fails[0]:
            raise RuntimeError("the middleware is gone")

    stream = MotionStream(send, lambda: clock[0], PERIOD_MS / 1000)
    try:
        stream.play(steady_motion())
        clock[0] += PERIOD_MS * MS
        assert tried.wait(PATIENCE_S)
        stream.wait_until_ended()
        with pytest.raises(MotionInterrupted):
            stream.play(steady_motion())
        fails[0] = False
        tried.clear()
        stream.play(steady_motion())
        clock[0] += PERIOD_MS * MS
        assert tried.wait(PATIENCE_S)
    finally:
        stream.close()


def test_simulated_time_may_run_in_large_steps() -> None:
    """Positions then come in bursts, each still no farther from the one before."""
    clock, found, ended = [START], [0.0], threading.Event()

    def take(position_J: NDArray[np.float64]) -> None:
        found.append(float(position_J[0]))
        if found[-1] >= 2.0 * SPEED - 1e-9:
            ended.set()

    stream = MotionStream(take, lambda: clock[0], PERIOD_MS / 1000, simulated=True)
    try:
        stream.play(steady_motion())
        for _ in range(5):
            clock[0] += 500 * MS
            threading.Event().wait(0.03)
        assert ended.wait(PATIENCE_S)
    finally:
        stream.close()
    np.testing.assert_allclose(np.diff(found), SPEED * PERIOD_MS / 1000)
