"""Asynchronous execution: when to infer, and what is left of a chunk when it is done."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ki_vla_ros.chunking import AsynchronousExecutor, Reach, drop_actions
from ki_vla_ros.errors import SafetyRefusal
from ki_vla_ros.records import ActionChunk

MS = 1_000_000
PERIOD = 50 * MS
FAR = Reach(np.zeros(1), np.array([1e9]), 10_000 * MS)


def ramp(horizon: int = 16, start_ns: int = 0, slope: float = 1.0) -> ActionChunk:
    """Action k at slope * (k + 1)."""
    position_HJ = slope * np.arange(1.0, horizon + 1)[:, None]
    return ActionChunk(start_ns, PERIOD, ("a",), position_HJ, np.full_like(position_HJ, slope / 0.05))


def test_actions_that_time_has_consumed_are_dropped_and_the_rest_keep_their_times() -> None:
    left = AsynchronousExecutor().join(ramp(), 120 * MS, 10 * MS, FAR)
    assert left.horizon == 14
    assert left.position_HJ[0, 0] == 3.0
    assert left.due_ns(0) == 150 * MS
    assert left.due_ns(13) == ramp().due_ns(15)


def test_an_action_due_within_the_lead_counts_as_consumed() -> None:
    executor = AsynchronousExecutor()
    assert executor.join(ramp(), 140 * MS, 10 * MS, FAR).position_HJ[0, 0] == 3.0
    assert executor.join(ramp(), 140 * MS + 1, 10 * MS, FAR).position_HJ[0, 0] == 4.0


def test_a_chunk_consumed_whole_is_refused() -> None:
    executor = AsynchronousExecutor()
    assert executor.join(ramp(), 790 * MS, 10 * MS, FAR).horizon == 1
    with pytest.raises(SafetyRefusal, match="chunk: its last action was due 100 ms ago"):
        executor.join(ramp(), 900 * MS, 10 * MS, FAR)


def test_the_chunk_is_joined_at_the_first_action_within_reach() -> None:
    # From 0 at 50 per second: action 1 (at 1) is due in 10 ms, 0.5 away at most; action 2 in 60 ms, 3 away at most.
    reach = Reach(np.zeros(1), np.array([50.0]), 250 * MS)
    assert AsynchronousExecutor().join(ramp(), 40 * MS, 0, reach).position_HJ[0, 0] == 2.0


def test_every_joint_must_be_within_reach() -> None:
    chunk = ActionChunk(0, PERIOD, ("a", "b"), np.array([[0.0, 1.0], [0.0, 1.0]]), np.zeros((2, 2)))
    reach = Reach(np.zeros(2), np.array([50.0, 50.0]), 250 * MS)
    assert AsynchronousExecutor().join(chunk, 40 * MS, 0, reach).horizon == 1


def test_without_an_action_within_reach_nothing_is_skipped() -> None:
    slow = Reach(np.zeros(1), np.array([0.1]), 250 * MS)
    assert AsynchronousExecutor().join(ramp(), 0, 0, slow).horizon == 16
    # Actions recede at 20 per second; an arm at 22 per second makes up for one that it is behind only after a while.
    late = Reach(np.array([-1.0]), np.array([22.0]), 250 * MS)
    assert AsynchronousExecutor().join(ramp(), 0, 0, late).horizon == 16
    assert AsynchronousExecutor().join(ramp(), 0, 0, Reach(late.measured_J, late.speed_J, 600 * MS)).horizon == 7


def test_a_chunk_with_nan_is_left_to_the_gate() -> None:
    chunk = ActionChunk(0, PERIOD, ("a",), np.full((4, 1), np.nan), np.zeros((4, 1)))
    assert AsynchronousExecutor().join(chunk, 0, 0, FAR).horizon == 4


@pytest.mark.parametrize(
    "execution_horizon_ms, wanted_ticks",
    [(20, [1, 2, 3]), (100, [1, 2, 3]), (140, [1, 2, 3]), (200, [2, 3]), (260, [3])],
)
def test_execution_horizon_in_whole_ticks(execution_horizon_ms: int, wanted_ticks: list[int]) -> None:
    executor = AsynchronousExecutor()
    assert executor.wants_chunk(0, execution_horizon_ms * MS, 100 * MS)
    executor.accept(ramp(), 0)
    jitter = 3 * MS
    ticks = [n for n in (1, 2, 3) if executor.wants_chunk(n * 100 * MS - jitter, execution_horizon_ms * MS, 100 * MS)]
    assert ticks == wanted_ticks


def test_after_a_hold_the_next_tick_may_infer() -> None:
    executor = AsynchronousExecutor()
    executor.accept(ramp(), 0)
    assert not executor.wants_chunk(100 * MS, 500 * MS, 100 * MS)
    executor.stop()
    assert executor.wants_chunk(100 * MS, 500 * MS, 100 * MS)


def test_commanded_position() -> None:
    executor = AsynchronousExecutor()
    assert executor.commanded_J(0) is None
    executor.accept(ramp(), 0)
    np.testing.assert_allclose(executor.commanded_J(75 * MS), [1.5])
    assert executor.commanded_J(800 * MS) is None
    executor.stop()
    assert executor.commanded_J(75 * MS) is None


@settings(deadline=None)
@given(
    now_ms=st.integers(0, 1000),
    lead_ms=st.integers(0, 200),
    speed=st.floats(0.01, 1e3),
    measured=st.floats(-20, 20),
    within_ms=st.integers(0, 2000),
)
def test_what_is_left_is_a_tail_of_the_chunk_in_the_future(
    now_ms: int, lead_ms: int, speed: float, measured: float, within_ms: int
) -> None:
    chunk, now_ns = ramp(), now_ms * MS
    reach = Reach(np.array([measured]), np.array([speed]), within_ms * MS)
    try:
        left = AsynchronousExecutor().join(chunk, now_ns, lead_ms * MS, reach)
    except SafetyRefusal:
        assert chunk.due_ns(15) < now_ns + lead_ms * MS
        return
    count = chunk.horizon - left.horizon
    np.testing.assert_array_equal(left.position_HJ, chunk.position_HJ[count:])
    np.testing.assert_array_equal(left.velocity_HJ, chunk.velocity_HJ[count:])
    assert [left.due_ns(k) for k in range(left.horizon)] == [chunk.due_ns(k) for k in range(count, chunk.horizon)]
    assert left.due_ns(0) >= now_ns + lead_ms * MS
    skipped_ns = left.due_ns(0) - max(now_ns + lead_ms * MS, chunk.due_ns(0))
    assert skipped_ns < max(reach.within_ns, PERIOD)


def test_drop_nothing() -> None:
    assert drop_actions(ramp(), 0).due_ns(0) == PERIOD
