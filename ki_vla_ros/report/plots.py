"""Plots as inline SVG that stretch to any width: the drawing is scaled, strokes and labels are not.

A plot is a box of HTML: an SVG of `WIDTH` by `HEIGHT` units with `preserveAspectRatio="none"`, and labels placed in per
cent of it, so that they are as large on a phone as on a desk.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

WIDTH, HEIGHT = 1000, 300
# Points of one line over the whole width: more cannot be seen and only make the page larger.
MOST_POINTS = 1000


@dataclass(frozen=True, slots=True)
class Span:
    """A range of values that an axis shows; `high` is above `low`."""

    low: float
    high: float

    @staticmethod
    def of(*values: ArrayLike, margin: float = 0.0, zero: bool = False) -> Span:
        """Holds all finite values, wider by the share `margin`, and 0 if asked for; 0..1 if there are none."""
        flat = np.concatenate([np.asarray(part, dtype=np.float64).ravel() for part in values] or [np.empty(0)])
        flat = flat[np.isfinite(flat)]
        if not len(flat):
            return Span(0.0, 1.0)
        low, high = float(flat.min()), float(flat.max())
        if zero:
            low, high = min(low, 0.0), max(high, 0.0)
        room = (high - low) * margin
        # Otherwise the rounding noise of a still joint would fill the plot.
        least = max(1e-9, 1e-6 * max(abs(low), abs(high)))
        if high - low < least:
            room = max(least, 0.05 * abs(high))
        return Span(low if zero and low == 0.0 else low - room, high + room)

    def ticks(self, about: int) -> list[float]:
        """Round numbers within the span, 1, 2 or 5 times a power of ten apart."""
        step = _round_step((self.high - self.low) / about)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [k * step for k in range(first, last + 1)]


def _round_step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= least * (1.0 - 1e-9))


@dataclass(frozen=True, slots=True)
class Axes:
    """From values to the SVG's units."""

    x: Span
    y: Span

    def line(self, x_N: ArrayLike, y_N: ArrayLike, kind: str) -> str:
        """A line through the finite points, broken at the others."""
        x_N, y_N = thinned(np.asarray(x_N, dtype=np.float64), np.asarray(y_N, dtype=np.float64), self.x)
        return f'<path class="{kind}" d="{self._path(x_N, y_N)}"/>' if len(x_N) else ""

    def lines(self, curves: Iterable[tuple[ArrayLike, ArrayLike]], kind: str) -> str:
        """Several lines of one kind in one path."""
        paths = (self._path(np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)) for x, y in curves)
        return f'<path class="{kind}" d="{"".join(paths)}"/>'

    def band(self, x_N: ArrayLike, low_N: ArrayLike, high_N: ArrayLike) -> str:
        """The area between two lines of finite values."""
        x_N = np.asarray(x_N, dtype=np.float64)
        around_x = np.concatenate([x_N, x_N[::-1]])
        around_y = np.concatenate([np.asarray(low_N, dtype=np.float64), np.asarray(high_N, dtype=np.float64)[::-1]])
        return f'<path class="band" d="{self._path(around_x, around_y)}Z"/>'

    def across(self, y: float, kind: str) -> str:
        height = self._y(y)
        return f'<line class="{kind}" x1="0" x2="{WIDTH}" y1="{height:.1f}" y2="{height:.1f}"/>'

    def marks(self, x_N: ArrayLike, kind: str) -> str:
        """Vertical lines from bottom to top."""
        seen = dict.fromkeys(f"M{self._x(x):.0f} 0V{HEIGHT}" for x in np.asarray(x_N, dtype=np.float64))
        return f'<path class="{kind}" d="{"".join(seen)}"/>' if seen else ""

    def dot(self, x: float, y: float, kind: str, title: str) -> str:
        """A line without length, because a circle would be stretched."""
        place = f"M{self._x(x):.1f} {self._y(y):.1f}h0"
        return f'<path class="dot {kind}" d="{place}"><title>{html.escape(title)}</title></path>'

    def _path(self, x_N: NDArray[np.float64], y_N: NDArray[np.float64]) -> str:
        parts, pen_down = [], False
        for x, y in zip(x_N.tolist(), y_N.tolist(), strict=True):
            if not math.isfinite(y):
                pen_down = False
                continue
            parts.append(f"{'L' if pen_down else 'M'}{_short(self._x(x))} {_short(self._y(y))}")
            pen_down = True
        return "".join(parts)

    def _x(self, x: float) -> float:
        return WIDTH * (x - self.x.low) / (self.x.high - self.x.low)

    def _y(self, y: float) -> float:
        return HEIGHT * (self.y.high - y) / (self.y.high - self.y.low)


def figure(
    title: str, note: str, axes: Axes, layers: Sequence[str], x_unit: str = "s", height: int = 150, times: bool = False
) -> str:
    """A plot with its labels; `times`: the x axis is in seconds, shown as minutes and seconds from one minute on."""
    x_ticks, y_ticks = axes.x.ticks(6), axes.y.ticks(6)
    grid = "".join(axes.across(value, "axis" if value == 0.0 else "grid") for value in y_ticks)
    y_span, x_span = axes.y.high - axes.y.low, axes.x.high - axes.x.low
    labels = [
        f'<span class="y" style="bottom:{100 * (value - axes.y.low) / y_span:.1f}%">{number(value, y_span)}</span>'
        for value in y_ticks
    ]
    for k, value in enumerate(x_ticks):
        share = (value - axes.x.low) / x_span
        edge = " first" if share < 0.03 else " last" if share > 0.95 else ""
        told = clock(value, x_span) if times else number(value, x_span)
        unit = f" {x_unit}" if k == len(x_ticks) - 1 and not (times and axes.x.high >= 60.0) else ""
        labels.append(f'<span class="x{edge}" style="left:{100 * share:.1f}%">{told}{unit}</span>')
    return (
        f"<figure><figcaption>{html.escape(title)}{f' <small>{html.escape(note)}</small>' if note else ''}</figcaption>"
        f'<div class="plot" style="height:{height}px">{svg([grid, *layers])}{"".join(labels)}</div></figure>'
    )


def svg(layers: Iterable[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none">{"".join(layers)}</svg>'


def lanes(rows: Sequence[tuple[str, Sequence[float], str]], span: Span) -> str:
    """One lane per row of (label as plain text, instants in s, kind), with a common time axis below."""
    axes = Axes(span, Span(0.0, 1.0))
    cells = [
        f'<div>{html.escape(label)}</div><div class="plot">{svg([axes.marks(instants, kind + " mark")])}</div>'
        for label, instants, kind in rows
    ]
    labels = []
    for value in span.ticks(6):
        share = (value - span.low) / (span.high - span.low)
        shift = 0 if share < 0.03 else 100 if share > 0.95 else 50
        place = f"left:{100 * share:.1f}%;transform:translateX(-{shift}%)"
        labels.append(f'<span style="{place}">{clock(value, span.high - span.low)}</span>')
    return f'<div class="lane">{"".join(cells)}<div></div><div class="plot scale">{"".join(labels)}</div></div>'


def spark(values: Sequence[float]) -> str:
    """A line without labels, from 0 up, for a table's cell."""
    axes = Axes(Span(0.0, max(len(values) - 1, 1)), Span.of(values, margin=0.1, zero=True))
    return (
        f'<span class="spark">{svg([axes.across(0.0, "axis"), axes.line(range(len(values)), values, "mean")])}</span>'
    )


def thinned(
    x_N: NDArray[np.float64], y_N: NDArray[np.float64], span: Span
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The points, or if there are too many, the lowest and highest of each slice of the x axis, in order."""
    if len(x_N) <= MOST_POINTS:
        return x_N, y_N
    slices = MOST_POINTS // 2
    slice_N = np.clip(((x_N - span.low) / (span.high - span.low) * slices).astype(np.int64), 0, slices - 1)
    kept: list[int] = []
    starts = np.concatenate([[0], np.flatnonzero(np.diff(slice_N)) + 1, [len(x_N)]])
    for first, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        part = y_N[first:end]
        if np.all(np.isnan(part)):
            kept.append(first)
        else:
            kept.extend(sorted({first + int(np.nanargmin(part)), first + int(np.nanargmax(part))}))
    return x_N[kept], y_N[kept]


def number(value: float, span: float) -> str:
    """As text, with the digits that tell neighbouring labels apart on an axis of this span."""
    told = f"{value:.{min(max(0, 2 - math.floor(math.log10(span))), 9)}f}"
    told = told.rstrip("0").rstrip(".") if "." in told else told
    return "0" if told == "-0" else told


def clock(seconds: float, span: float) -> str:
    """As seconds, or as hours, minutes and seconds if the axis spans a minute or more."""
    if span < 60.0:
        return number(seconds, span)
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _short(value: float) -> str:
    """With one decimal, or none if that would be 0."""
    told = f"{value:.1f}"
    return told[:-2] if told.endswith(".0") else told
