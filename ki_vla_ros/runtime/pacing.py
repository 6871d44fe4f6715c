"""When the next tick is due: absolute deadlines, so that lateness does not add up, and a count of the missed ones."""

from __future__ import annotations

# The largest step by which ticks move towards the cameras' frames, and how differently two ticks may lie to them.
LARGEST_SHIFT_NS, STEADY_NS = 2_000_000, 3_000_000


class Pacer:
    """Deadlines at whole periods after a start. Times in ns on one clock, given by the caller."""

    def __init__(self, start_ns: int) -> None:
        self.due_ns = start_ns
        self.missed = 0
        self._period_ns = 0

    def advance(self, now_ns: int, period_ns: int) -> None:
        """A tick ended at `now_ns`: on to the first deadline that lies ahead; those passed till then are missed."""
        self._period_ns = period_ns
        self.due_ns += period_ns
        if now_ns > self.due_ns:
            late = -(-(now_ns - self.due_ns) // period_ns)
            self.missed += late
            self.due_ns += late * period_ns

    def shift(self, by_ns: int) -> None:
        """Puts the next deadline, and with it all later ones, off (or, negative, forward)."""
        self.due_ns += by_ns

    def set_back(self, now_ns: int) -> bool:
        """Whether the clock was set back, so that the deadline is farther off than it ever is; then start anew now."""
        if self.due_ns - now_ns <= 2 * self._period_ns:
            return False
        self.due_ns = now_ns
        return True


def alignment_ns(before_ns: int | None, behind_ns: int | None) -> int:
    """How far the next ticks are to move so that they come where a burst of the cameras' frames is expected to end.

    `behind_ns`: how long ago that was when a tick was due (negative: it is still to come); `before_ns`: the same of
    the tick before. Where they differ, the ticks' period is no multiple of the cameras', and moving gains nothing.
    """
    if before_ns is None or behind_ns is None or abs(behind_ns - before_ns) > STEADY_NS:
        return 0
    # Half of it: arrivals tremble, and ticks need not tremble as much.
    return max(-LARGEST_SHIFT_NS, min(LARGEST_SHIFT_NS, -behind_ns // 2))
