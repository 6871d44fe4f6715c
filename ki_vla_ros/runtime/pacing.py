"""When the next tick is due: absolute deadlines, so that lateness does not add up, and a count of those missed."""

from __future__ import annotations

import time
from collections.abc import Callable

from ki_vla_ros.records import NS_PER_S

# The largest step by which ticks move towards the cameras' frames, and how much the offset to them may differ between
# two ticks that still count as steady.
LARGEST_SHIFT_NS, STEADY_NS = 2_000_000, 3_000_000
# A difference below this is no step of a clock but its drift, or that of reading two clocks one after the other.
SMALLEST_STEP_NS, READING_NS = 20_000_000, 1_000_000
# Simulated time may run this many times as fast as real time.
FASTEST_SIMULATION = 10


class Pacer:
    """Deadlines at whole periods after a start; times in ns on one clock, given by the caller."""

    def __init__(self, start_ns: int) -> None:
        self.due_ns = start_ns
        self.missed = 0
        self._period_ns = 0

    def advance(self, now_ns: int, period_ns: int) -> None:
        """After a tick that ended at `now_ns`, moves to the first deadline ahead; those already passed are missed."""
        self._period_ns = period_ns
        self.due_ns += period_ns
        if now_ns > self.due_ns:
            late = -(-(now_ns - self.due_ns) // period_ns)
            self.missed += late
            self.due_ns += late * period_ns

    def shift(self, by_ns: int) -> None:
        """Delays the next deadline and all later ones by `by_ns` (negative: brings them forward)."""
        self.due_ns += by_ns

    def restart(self, now_ns: int) -> None:
        """Makes the next tick due now, because the clock jumped: what lay between is not missed."""
        self.due_ns = now_ns


class ClockWatch:
    """Notices steps of the node's clock, which the steady clock does not take part in."""

    def __init__(self, node_ns: Callable[[], int], simulated: bool) -> None:
        self._node_ns, self._simulated = node_ns, simulated
        self._last: tuple[int, int] | None = None  # the node's time and the steady time

    def step_ns(self) -> int:
        """By how much the clock has stepped since the last call; 0: not at all.

        Simulated time may run at any speed: only going back, or ahead by far more than the time that passed, is a step.
        """
        before_ns = time.monotonic_ns()
        now_ns, after_ns = self._node_ns(), time.monotonic_ns()
        if now_ns == 0:
            return 0  # there is no simulated time yet
        if after_ns - before_ns > READING_NS:
            return 0  # the process was stopped between the two readings, so they do not belong together
        last, self._last = self._last, (now_ns, after_ns)
        if last is None:
            return 0
        moved_ns, passed_ns = now_ns - last[0], after_ns - last[1]
        if self._simulated:
            return moved_ns if moved_ns < 0 or moved_ns > FASTEST_SIMULATION * passed_ns + NS_PER_S else 0
        step_ns = moved_ns - passed_ns
        return step_ns if abs(step_ns) > SMALLEST_STEP_NS else 0


def alignment_ns(before_ns: int | None, behind_ns: int | None) -> int:
    """How far to move the next ticks so that each falls where a burst of camera frames is expected to end.

    `behind_ns`: how long before the tick the burst ended (negative: it is still to come); `before_ns`: the same for the
    previous tick. Where the two differ, the ticks' period is no multiple of the cameras', and moving gains nothing.
    """
    if before_ns is None or behind_ns is None or abs(behind_ns - before_ns) > STEADY_NS:
        return 0
    # Half of the offset: arrivals jitter, and the ticks should jitter less than they do.
    return max(-LARGEST_SHIFT_NS, min(LARGEST_SHIFT_NS, -behind_ns // 2))
