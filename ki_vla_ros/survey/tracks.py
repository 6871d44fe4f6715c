"""Numbers over time, as a recording shows them: their range, how fast they change, and whether two go together."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.records import NS_PER_S

# Speeds are taken over at least this time, so that they are of the motion and not of the noise.
SPEED_OVER_NS = 50_000_000
# A jump is a single step so many times as large as those before and after it, and as nearly all others.
OUTLYING, NEARLY_ALL = 5.0, 0.995
# A smaller step is no jump but a servo's count, or a joint that came loose: a share of the range, and what the fastest
# joint does in a while.
LEAST_JUMP, LEAST_JUMP_S = 0.05, 1e-3
# Of a joint of which no speed is known (rad/s or m/s). In a step and JUMP_NS it goes no farther, whatever the others
# were: as the node has it.
FASTEST, JUMP_NS = 10.0, 100_000_000
# Two numbers that are compared must share this many points in time.
LEAST_POINTS = 10
# So many goals that came one by one, each this long after the one before it, show which way a joint goes.
LEAST_GOALS, SINGLE_NS = 5, 500_000_000
# A goal is not held for longer: later somebody else may have moved the robot.
LONGEST_HOLD_NS = 5_000_000_000
# A stream of commands may lead what follows by this.
LONGEST_LAG_NS = 800_000_000


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

    def jumps(self, fastest: float = FASTEST) -> NDArray[np.int64]:
        """Indices of the values before steps that no motion explains: put back by hand or simulator between episodes.

        `fastest`: per second, in the track's unit; no joint is faster.
        """
        times, values = self.arrays()
        apart_N, step_N = np.diff(times), np.abs(np.diff(values))
        # Values that are repeated say nothing: some drivers send each of them ten times.
        changed = np.flatnonzero(step_N > 0.0)
        if not len(changed):
            return changed
        too_far = step_N[changed] > fastest * (np.maximum(apart_N[changed], 0) + JUMP_NS) / NS_PER_S
        if len(changed) >= LEAST_POINTS:
            # After lost messages a step is as much larger. Messages that came at once were as far apart as others.
            usual = max(float(np.median(apart_N)), 1.0)
            size_N = step_N[changed] * usual / np.clip(apart_N[changed], usual, max(usual, JUMP_NS))
            beside_N = np.concatenate(([0.0], size_N, [0.0]))
            alone = size_N > OUTLYING * np.maximum(beside_N[:-2], beside_N[2:])
            if not alone.all():
                far = size_N > OUTLYING * float(np.quantile(size_N[~alone], NEARLY_ALL))
                too_far |= alone & far & (step_N[changed] > max(LEAST_JUMP * self.moved, LEAST_JUMP_S * fastest))
        return changed[too_far]

    def speed(self, fastest: float = FASTEST) -> float:
        """The highest speed, per second, without jumps (which `fastest` is for); 0 where there are too few values."""
        times, values = self.arrays()
        later = np.searchsorted(times, times + SPEED_OVER_NS)
        first = np.flatnonzero(later < len(times))
        if not len(first):
            return 0.0
        # Messages that were logged late and at once were made as far apart as the others.
        made_N = (later[first] - first) * float(np.median(np.diff(times)))
        elapsed_N = np.maximum(times[later[first]] - times[first], made_N) / NS_PER_S
        jumps = self.jumps(fastest)
        whole = np.searchsorted(jumps, first) == np.searchsorted(jumps, later[first])
        usable = whole & (elapsed_N < 0.5)  # the arm may have been put elsewhere while nobody looked
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


def held(times: NDArray[np.int64], values: NDArray[np.float64]) -> Track:
    """Each value at the time when the next one replaced it, which is when the robot had longest to follow it."""
    track = Track()
    for time_ns, after_ns, value in zip(times[:-1].tolist(), times[1:].tolist(), values[:-1].tolist(), strict=True):
        track.add(min(after_ns, time_ns + LONGEST_HOLD_NS), value)
    return track


def following(path: Track, state: Track) -> float | None:
    """Correlation of a commanded path with the state, negative where they go opposite ways; None: too little to say.

    `path` has each value at the time when the state should have come to it. Goals that come one by one are judged by
    those that stood long enough; a stream may lead the state by up to `LONGEST_LAG_NS`, so only what is opposite at any
    such lag is said to be.
    """
    due, wanted = path.arrays()
    times, was = state.arrays()
    if len(due) < LEAST_GOALS or len(times) < LEAST_POINTS:
        return None
    apart = np.diff(due)
    single = bool(np.median(apart) > SINGLE_NS)
    if single:
        stood = np.concatenate(([True], apart > SINGLE_NS))
        due, wanted = due[stood], wanted[stood]
    fits = []
    for lag_ns in (0,) if single else range(0, LONGEST_LAG_NS + 1, LONGEST_LAG_NS // 8):
        inside = (due + lag_ns >= times[0]) & (due + lag_ns <= times[-1])
        wanted_N, was_N = wanted[inside], np.interp(due[inside] + lag_ns, times, was)
        if inside.sum() >= (LEAST_GOALS if single else LEAST_POINTS) and np.ptp(was_N) > 0.0 and np.ptp(wanted_N) > 0.0:
            fits.append(float(np.corrcoef(was_N, wanted_N)[0, 1]))
    if not fits:
        return None
    return min(fits) if max(fits) < -min(fits) / 2.0 else max(fits)


def period_s(times: array[int]) -> float | None:
    """The median time between messages; None for fewer than three, or where all came at once."""
    if len(times) < 3:
        return None
    return float(np.median(np.diff(np.sort(np.array(times, dtype=np.int64))))) / NS_PER_S or None
