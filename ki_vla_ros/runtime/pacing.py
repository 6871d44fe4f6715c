"""When the next tick is due: absolute deadlines, so that lateness does not add up, and a count of those missed."""

from __future__ import annotations

# The largest step by which ticks move towards the cameras' frames, and how much the offset to them may differ between
# two ticks that still count as steady.
LARGEST_SHIFT_NS, STEADY_NS = 2_000_000, 3_000_000


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

    def set_back(self, now_ns: int) -> bool:
        """Whether the clock was set back, which shows in a deadline too far ahead; if so, the next tick is due now."""
        if self.due_ns - now_ns <= 2 * self._period_ns:
            return False
        self.due_ns = now_ns
        return True


def alignment_ns(before_ns: int | None, behind_ns: int | None) -> int:
    """How far to move the next ticks so that each falls where a burst of camera frames is expected to end.

    `behind_ns`: how long before the tick the burst ended (negative: it is still to come); `before_ns`: the same for the
    previous tick. Where the two differ, the ticks' period is no multiple of the cameras', and moving gains nothing.
    """
    if before_ns is None or behind_ns is None or abs(behind_ns - before_ns) > STEADY_NS:
        return 0
    # Half of the offset: arrivals jitter, and the ticks should jitter less than they do.
    return max(-LARGEST_SHIFT_NS, min(LARGEST_SHIFT_NS, -behind_ns // 2))
