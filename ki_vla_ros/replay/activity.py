"""When the node that was recorded was active, from the stamps of its ticks."""

from __future__ import annotations

from ki_vla_ros.records import NS_PER_S

# A node that ticked is taken to have been inactive where its ticks are farther apart than both.
INACTIVE_NS, INACTIVE_PERIODS = 500_000_000, 3


class Activity:
    """Spans from a first tick to a last one, known as far as ticks have been read."""

    def __init__(self, rate_hz: float) -> None:
        self.gap_ns = max(INACTIVE_NS, round(INACTIVE_PERIODS * NS_PER_S / rate_hz))
        self._spans: list[list[int]] = []
        self._begun = 0

    def add(self, stamp_ns: int) -> None:
        if self._spans and stamp_ns - self._spans[-1][1] <= self.gap_ns:
            self._spans[-1][1] = max(self._spans[-1][1], stamp_ns)
        else:
            self._spans.append([stamp_ns, stamp_ns])

    def begin_next(self) -> int | None:
        """When the next span starts, which is then the present one; None: not known of any."""
        if self._begun == len(self._spans):
            return None
        self._begun += 1
        return self._spans[self._begun - 1][0]

    @property
    def end_ns(self) -> int:
        """Of the present span, as far as is known."""
        return self._spans[self._begun - 1][1]

    def end_of(self, stamp_ns: int) -> int:
        """The end of the span that a tick belongs to."""
        return next((end for start, end in reversed(self._spans) if start <= stamp_ns), stamp_ns)
