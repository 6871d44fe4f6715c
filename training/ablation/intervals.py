"""How certain the figures of a comparison are: a bootstrap over runs, and over the episodes within each.

Runs that differ by their seed alone are drawn first, then episodes within each drawn run. Of n runs n - 1 are drawn:
the mean of n drawn ones would vary by (n - 1) / n of what it should (Rao and Wu 1988), which with three runs is a third
too little. Of a single run only the episodes are drawn: such an interval does not hold for another seed.

Where all episodes end alike, drawing them anew shows nothing of what others would do. So no interval is narrower than
that of as many independent episodes: Wilson's of a share, Agresti and Min's (2005) of a difference of pairs.

Legend: S runs (seeds), E episodes, R draws, P points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.statistics import wilson_95

Array = NDArray[np.float64]
DRAWS: Final = 4000
Z: Final = 1.959964  # of 95 %


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval; infinite where it was never reached. `runs` is how many it is of."""

    value: float
    low: float
    high: float
    runs: int = 1

    def beside(self, expected: str, same_within: float) -> str:
        """Whether this difference, as larger is better, agrees with what is expected: worse, same or better.

        It does, or disagrees, if the whole interval does; of one run it cannot: another seed may say otherwise.
        """
        if self.runs < 2:
            return "cannot tell (one seed)"
        if expected == "same":
            if -same_within <= self.low and self.high <= same_within:
                return "agrees"
            return "disagrees" if self.low > same_within or self.high < -same_within else "cannot tell"
        low, high = (self.low, self.high) if expected == "better" else (-self.high, -self.low)
        return "agrees" if low > 0 else "disagrees" if high < 0 else "cannot tell"


def draw_runs(runs: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """[R, K]: which runs each draw is of."""
    return rng.integers(0, runs, (DRAWS, max(1, runs - 1)))


def draw_means(values_SE: Array, chosen_RK: NDArray[np.int64], rng: np.random.Generator) -> Array:
    """[R]: means over the chosen runs, of episodes that are drawn anew in each."""
    episodes, total_R = values_SE.shape[1], np.zeros(len(chosen_RK))
    for chosen_R in chosen_RK.T:
        weight_RE = rng.multinomial(episodes, np.full(episodes, 1.0 / episodes), len(chosen_RK))
        total_R += (values_SE[chosen_R] * weight_RE).sum(axis=1) / episodes
    return total_R / chosen_RK.shape[1]


def mean(values_SE: Array, seed: int = 0) -> Estimate:
    """A share, of runs with equally many episodes."""
    return _estimate(values_SE, wilson_95(float(values_SE.sum()), values_SE.size), seed)


def difference(ours_SE: Array, theirs_SE: Array, seed: int = 0) -> Estimate:
    """Ours minus theirs, where row and column are the same seed and the same episode of both."""
    if ours_SE.shape != theirs_SE.shape:
        raise ValueError(
            f"difference: expected the same runs and episodes of both, got {ours_SE.shape}, {theirs_SE.shape}"
        )
    pairs_SE = ours_SE - theirs_SE
    return _estimate(pairs_SE, _agresti_min(pairs_SE), seed)


def _estimate(values_SE: Array, least: Sequence[float], seed: int) -> Estimate:
    """The bootstrap's, and at least from `least[0]` to `least[1]`."""
    rng = np.random.default_rng(seed)
    low, high = np.percentile(draw_means(values_SE, draw_runs(len(values_SE), rng), rng), [2.5, 97.5])
    return Estimate(float(values_SE.mean()), min(float(low), least[0]), max(float(high), least[1]), runs=len(values_SE))


def _agresti_min(pairs_SE: Array) -> tuple[float, float]:
    """Wald's interval after one pair more of each kind that differs has half been seen."""
    count, total = pairs_SE.size + 2, float(pairs_SE.sum())
    half = Z * math.sqrt(float((pairs_SE**2).sum()) + 1 - total**2 / count) / count
    return total / count - half, total / count + half


def crossing(at_P: Sequence[float], value_P: Sequence[float], level: float) -> float:
    """Where a line through (0, 0) and these points first comes to a level; infinite if it does not."""
    before_x, before_y = 0.0, 0.0
    for x, y in zip(at_P, value_P, strict=True):
        if y >= level:
            return before_x + (x - before_x) * (level - before_y) / (y - before_y)
        before_x, before_y = x, y
    return math.inf


def time_to(at_P: Sequence[float], values_PSE: Sequence[Array], level: float) -> Estimate:
    """Where the mean over runs and episodes comes to a level; the points may have different numbers of episodes.

    The interval is from where the points' upper ends come to it to where their lower ends do.
    """
    points = [mean(values_SE) for values_SE in values_PSE]
    value, first, last = (
        crossing(at_P, ends, level)
        for ends in ([p.value for p in points], [p.high for p in points], [p.low for p in points])
    )
    return Estimate(value, first, last, len(values_PSE[0]))


def at(x: float, at_P: Sequence[float], values_PSE: Sequence[Array]) -> Array:
    """[S, E] of what lies between two points (the first is (0, 0)): on a line, over the episodes that both have."""
    after = next((p for p, place in enumerate(at_P) if place >= x - 1e-9), len(at_P) - 1)
    if x >= at_P[after] - 1e-9:
        return values_PSE[after]
    if after == 0:
        return values_PSE[0] * (x / at_P[0])
    share = (x - at_P[after - 1]) / (at_P[after] - at_P[after - 1])
    both = min(values_PSE[after - 1].shape[1], values_PSE[after].shape[1])
    return (1 - share) * values_PSE[after - 1][:, :both] + share * values_PSE[after][:, :both]
