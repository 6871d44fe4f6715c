"""What a sweep measures for one setting: how close the arm would have been to the recorded one, and at what price.

The error of the chunks themselves (metrics.json) hardly depends on these settings; which of their actions count does.
So the commanded motion, after executor, gate and governor, is compared with the reference whenever an action is due,
until the next chunk takes over. Legend: J joints, N instants.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.bundle import PolicySpec
from ki_vla_ros.records import NS_PER_S, Motion, to_ns
from ki_vla_ros.replay.figures import Jerk
from ki_vla_ros.replay.ticks import Prediction, Tick
from ki_vla_ros.robot import main_axes

Array = NDArray[np.float64]


@dataclass
class Outcome:
    """The sums for one setting.

    `squares` (of errors) and `jumps`: by segment of time, sums [J] of squares and how many there were. `jerk_rms`: as
    `seam.jerk_rms` in metrics.json. `acted`: actions that counted; `age_s`: the sum of their ages, each since the
    observation it came from.
    """

    ticks: int = 0
    chunks: int = 0
    held: int = 0
    refused: int = 0
    restarts: int = 0
    missed: int = 0
    squares: dict[int, tuple[Array, int]] = field(default_factory=dict)
    jumps: dict[int, tuple[Array, int]] = field(default_factory=dict)
    jerk_rms: float | None = None
    age_s: float = 0.0
    acted: int = 0


class Execution:
    """`add` each tick of one replay, then `finish`."""

    def __init__(self, spec: PolicySpec, segment_s: float) -> None:
        self.outcome = Outcome()
        self._segment_ns = to_ns(segment_s)
        self._joints = len(spec.axes)
        self._first_ns: int | None = None
        self._chunk: Prediction | None = None  # the chunk whose actions count at present
        self._motions: list[Motion] = []  # those since that chunk, and the last one before it
        self._jerk = Jerk(np.flatnonzero(main_axes(spec.axes)[0]))

    def add(self, tick: Tick) -> None:
        outcome = self.outcome
        if self._first_ns is None:
            self._first_ns = tick.stamp_ns
        outcome.ticks += 1
        outcome.held += tick.hold is not None and tick.prediction is None
        outcome.missed = tick.missed
        for motion in tick.motions:
            self._jerk.add(motion)
        chunk = tick.prediction
        if chunk is not None:
            outcome.chunks += 1
            outcome.refused += chunk.command_ns is None
            if (seam := chunk.seam) is not None:
                outcome.restarts += seam.restarted
                _accumulate(outcome.jumps, self._segment(seam.time_ns), seam.jump_J[None] ** 2)
            if tick.motions:
                self._settle(tick.motions[0].from_ns)
                self._chunk, self._motions = chunk, self._motions[-1:]
        self._motions.extend(tick.motions)

    def finish(self) -> Outcome:
        self._settle(None)
        self.outcome.jerk_rms = self._jerk.rms
        return self.outcome

    def _settle(self, until_ns: int | None) -> None:
        """Adds up the present chunk's actions that count, once it is known when it was replaced."""
        chunk = self._chunk
        if chunk is None or not self._motions:
            return
        horizon = len(chunk.position_HJ)
        begin_ns = self._motions[min(1, len(self._motions) - 1)].from_ns
        due_N = np.array([chunk.due_ns(k) for k in range(horizon)])
        counts_N = (due_N >= begin_ns) & np.isfinite(chunk.reference_HJ).all(axis=1)
        if until_ns is not None:
            counts_N &= due_N < until_ns
        if not counts_N.any():
            return
        due_N, reference_NJ = due_N[counts_N], chunk.reference_HJ[counts_N]
        reached_NJ = np.stack([self._motion_at(int(due_ns)).at(int(due_ns))[0] for due_ns in due_N])
        _accumulate(self.outcome.squares, self._segment(chunk.start_ns), (reached_NJ - reference_NJ) ** 2)
        self.outcome.age_s += float(np.sum(due_N - chunk.start_ns)) / NS_PER_S
        self.outcome.acted += len(due_N)

    def _motion_at(self, time_ns: int) -> Motion:
        return next((m for m in reversed(self._motions) if m.from_ns <= time_ns), self._motions[0])

    def _segment(self, time_ns: int) -> int:
        return (time_ns - (self._first_ns or 0)) // self._segment_ns


def _accumulate(sums: dict[int, tuple[Array, int]], segment: int, squares_NJ: Array) -> None:
    total_J, count = sums.get(segment, (np.zeros(squares_NJ.shape[1]), 0))
    sums[segment] = total_J + squares_NJ.sum(axis=0), count + len(squares_NJ)
