"""Numbers over time, as a recording shows them: their range, how fast they change, and whether two go together."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.records import NS_PER_S

# Speeds are taken over at least this time, so that they are of the motion and not of the noise.
SPEED_OVER_NS = 50_000_000
# Two numbers that are compared must share this many points in time.
LEAST_POINTS = 10


@dataclass
class Track:
    """One number: when (ns) and what."""

    times: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def add(self, time_ns: int, value: float) -> None:
        self.times.append(time_ns)
        self.values.append(value)

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)

    @property
    def moved(self) -> float:
        return self.high - self.low

    def arrays(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        return np.array(self.times, dtype=np.int64), np.array(self.values, dtype=np.float64)

    def speed(self) -> float:
        """The highest speed, per second; 0 where there are too few values."""
        times, values = self.arrays()
        later = np.searchsorted(times, times + SPEED_OVER_NS)
        first = np.flatnonzero(later < len(times))
        if not len(first):
            return 0.0
        elapsed_N = (times[later[first]] - times[first]) / NS_PER_S
        usable = elapsed_N < 0.5  # the arm may have been put elsewhere while nobody looked
        if not usable.any():
            return 0.0
        return float((np.abs(values[later[first]] - values[first])[usable] / elapsed_N[usable]).max())


def together(command: Track, state: Track) -> tuple[float, float] | None:
    """Correlation of a command with what followed, and their mean distance; None: too little to say.

    A constant on either side says nothing.
    """
    due, wanted = command.arrays()
    times, was = state.arrays()
    if len(due) < LEAST_POINTS or len(times) < LEAST_POINTS:
        return None
    inside = (due >= times[0]) & (due <= times[-1])
    if inside.sum() < LEAST_POINTS:
        return None
    was_N, wanted_N = np.interp(due[inside], times, was), wanted[inside]
    if not np.ptp(was_N) > 0.0 or not np.ptp(wanted_N) > 0.0:
        return None
    return float(np.corrcoef(was_N, wanted_N)[0, 1]), float(np.abs(was_N - wanted_N).mean())


def period_s(times: array[int]) -> float | None:
    """The median time between messages; None for fewer than three, or where all came at once."""
    if len(times) < 3:
        return None
    return float(np.median(np.diff(np.sort(np.array(times, dtype=np.int64))))) / NS_PER_S or None
