"""Summaries of many values: their spread, ratios and means over time, and how certain these are.

Means over time come from sums per segment of time, their intervals from a bootstrap over whole segments. Neighbouring
ticks see nearly the same input and make nearly the same error, so drawing single ticks would give far too narrow an
interval; segments longer than a chunk are nearly independent (block bootstrap, Kuensch 1989).

Legend: G segments, R draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.records import NS_PER_S

Array = NDArray[np.float64]
Interval = list[float] | None
Figure = Callable[[Array, Array], Array]

RESAMPLES = 1000
# More than for segments: a resampled median takes only a few distinct values, and a draw is cheap.
RATIO_RESAMPLES = 2000
FEWEST_SEGMENTS = 3


def spread(values: Sequence[float] | NDArray[Any]) -> dict[str, float]:
    """`p50`, `p90`, `p99` and `max` of at least one value, interpolated linearly between values."""
    names = ("p50", "p90", "p99", "max")
    return dict(zip(names, np.percentile(values, [50, 90, 99, 100]).tolist(), strict=True))


def interval_95(drawn_R: Array) -> list[float]:
    """The ends of a figure's 95 % interval, from its values in all draws.

    Values that are not finite are left out: nothing counted in their draws.
    """
    low, high = np.percentile(drawn_R[np.isfinite(drawn_R)], [2.5, 97.5]).tolist()
    return [low, high]


def wilson_95(successes: float, count: int) -> list[float]:
    """The ends of a success rate's 95 % interval, which is useful near 0 and 1, too (Wilson 1927)."""
    z, rate = 1.959964, successes / count
    middle = (rate + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(rate * (1 - rate) / count + z**2 / (4 * count**2))
    return [round(float(end), 9) + 0.0 for end in (middle - half, middle + half)]  # 0 and 1 without rounding errors


def ratio_of_medians(numerator_ms: Array, denominator_ms: Array, seed: int = 0) -> dict[str, float]:
    """The `ratio` of two medians, and the ends of its 95 % interval, `low` and `high`.

    The interval is a bootstrap over rounds (Efron 1979, percentiles): both calls of a drawn round go in together, since
    what slowed one down is likely to have slowed down the other.
    """
    if numerator_ms.shape != denominator_ms.shape:
        raise ConfigurationError(
            f"ratio: expected equally many rounds of both, got {len(numerator_ms)} and {len(denominator_ms)}"
        )
    rounds = len(numerator_ms)
    drawn = np.random.default_rng(seed).integers(0, rounds, (RATIO_RESAMPLES, rounds))
    ratio_R = np.median(numerator_ms[drawn], axis=1) / np.median(denominator_ms[drawn], axis=1)
    low, high = interval_95(ratio_R)
    return {"ratio": float(np.median(numerator_ms) / np.median(denominator_ms)), "low": low, "high": high}


class SegmentSums:
    """Sums of arrays [K, J] of one shape per segment of `segment_s`, from the first time on; NaN is left out."""

    def __init__(self, segment_s: float) -> None:
        self.segment_s = segment_s
        self._segments: dict[int, tuple[Array, Array]] = {}
        self._first_ns: int | None = None

    def add(self, time_ns: int, values: Array) -> None:
        if self._first_ns is None:
            self._first_ns = time_ns
        number = int((time_ns - self._first_ns) / NS_PER_S // self.segment_s)
        known = np.isfinite(values)
        if not known.any():
            return
        if number not in self._segments:
            self._segments[number] = np.zeros(values.shape), np.zeros(values.shape)
        total, count = self._segments[number]
        total += np.where(known, values, 0.0)
        count += known

    def __len__(self) -> int:
        return len(self._segments)

    def drawn(self, seed: int) -> Draws | None:
        """The sums so far, with bootstrap draws of them; None if there are none."""
        if not self._segments:
            return None
        totals, counts = zip(*(self._segments[number] for number in sorted(self._segments)), strict=True)
        return Draws(np.stack(totals), np.stack(counts), seed)


class Draws:
    """Sums and counts over all segments (the estimate) and over drawn ones (its spread)."""

    def __init__(self, total_G: Array, count_G: Array, seed: int) -> None:
        self.total, self.count = total_G.sum(axis=0), count_G.sum(axis=0)
        segments, shape = len(total_G), total_G.shape[1:]
        self.drawn: tuple[Array, Array] | None = None
        if segments >= FEWEST_SEGMENTS:
            weight_RG = np.random.default_rng(seed).multinomial(segments, [1 / segments] * segments, RESAMPLES)
            flat = (array.reshape(segments, -1) for array in (total_G, count_G))
            total_R, count_R = ((weight_RG @ array).reshape(RESAMPLES, *shape) for array in flat)
            self.drawn = total_R, count_R

    def of(self, figure: Figure) -> tuple[float | None, Interval]:
        """A figure of sums and counts, and its 95 % interval (percentiles); None where nothing counted."""
        with np.errstate(invalid="ignore", divide="ignore"):
            value = float(figure(self.total, self.count))
            if not np.isfinite(value):
                return None, None
            if self.drawn is None:
                return value, None
            values_R = figure(*self.drawn)
        return value, interval_95(values_R)


def root_mean(rows: Any = slice(None), columns: Any = slice(None), weight_J: Array | float = 1.0) -> Figure:
    """A figure of sums of squares [..., K, J]: root mean square of the chosen rows and columns, joints weighted."""

    def figure(total: Array, count: Array) -> Array:
        chosen, counted = (total * weight_J)[..., rows, :][..., columns], count[..., rows, :][..., columns]
        return np.asarray(np.sqrt(chosen.sum(axis=(-2, -1)) / counted.sum(axis=(-2, -1))))

    return figure
