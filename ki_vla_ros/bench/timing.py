"""Durations of calls that take turns; statistics.py summarises them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.errors import ConfigurationError

Durations = NDArray[np.float64]


def alternating(names: Sequence[str], rounds: int) -> Iterator[tuple[str, ...]]:
    """The order of the calls in each round: forwards, backwards, ..., so that none always follows the same one."""
    for n in range(rounds):
        yield tuple(names) if n % 2 == 0 else tuple(reversed(names))


def time_alternating(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    warm_up: int,
    after_round: Callable[[int], None] = lambda n: None,
    clock_ns: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, Durations]:
    """ms of every call in every round, without those of the warm-up.

    What disturbs the machine for longer than a round disturbs all calls equally.
    """
    if rounds < 1 or warm_up < 0:
        raise ConfigurationError(f"timing: expected at least 1 round and 0 of warm-up, got {rounds} and {warm_up}")
    taken_ms = {name: np.empty(rounds) for name in calls}
    for n, order in enumerate(alternating(list(calls), warm_up + rounds)):
        for name in order:
            began_ns = clock_ns()
            calls[name]()
            if n >= warm_up:
                taken_ms[name][n - warm_up] = (clock_ns() - began_ns) / 1e6
        if n >= warm_up:
            after_round(n - warm_up + 1)
    return taken_ms


def every_tenth(rounds: int, say: Callable[[str], None]) -> Callable[[int], None]:
    """For `after_round`: about ten lines in all say how far it is."""
    return lambda n: say(f"{n} of {rounds}") if n % max(1, rounds // 10) == 0 else None


def choose_clock(processor_time: bool, threads: int) -> Callable[[], int]:
    """The wall clock, or this process's processor time, for a machine that others use at the same time.

    The latter needs a single thread: the times of several add up, waiting included.
    """
    if processor_time and threads != 1:
        raise ConfigurationError(f"--processor-time: expected one thread, got {threads}; their times would add up")
    return time.process_time_ns if processor_time else time.perf_counter_ns
