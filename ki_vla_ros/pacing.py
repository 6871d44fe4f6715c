"""When the next tick is due: absolute deadlines, so that lateness does not add up, and a count of the missed ones."""

from __future__ import annotations


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
