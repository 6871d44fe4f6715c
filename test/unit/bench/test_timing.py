"""Order and arithmetic of durations, on the test's own clock; no real time is judged."""

from __future__ import annotations

import time

import pytest

from ki_vla_ros.bench.timing import alternating, choose_clock, time_alternating
from ki_vla_ros.errors import ConfigurationError


def test_every_other_round_runs_backwards() -> None:
    assert list(alternating("abc", 3)) == [("a", "b", "c"), ("c", "b", "a"), ("a", "b", "c")]


def test_calls_are_timed_in_turns_without_the_warm_up() -> None:
    now_ns, order, rounds = [0], [], []

    def call(name: str, first_ms: int) -> None:
        order.append(name)
        # The n-th call of each takes n ms more than its first.
        now_ns[0] += (first_ms + order.count(name) - 1) * 1_000_000

    taken_ms = time_alternating(
        {"a": lambda: call("a", 10), "b": lambda: call("b", 100)}, 3, 2, rounds.append, lambda: now_ns[0]
    )
    assert order == list("abbaabbaab") and rounds == [1, 2, 3]
    assert taken_ms["a"].tolist() == [12, 13, 14] and taken_ms["b"].tolist() == [102, 103, 104]
    with pytest.raises(ConfigurationError, match="at least 1 round"):
        time_alternating({}, 0, 0)


def test_processor_time_needs_a_single_thread() -> None:
    assert choose_clock(True, 1) is time.process_time_ns and choose_clock(False, 2) is time.perf_counter_ns
    with pytest.raises(ConfigurationError, match="expected one thread, got 2"):
        choose_clock(True, 2)
