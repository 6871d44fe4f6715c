"""One figure as an SVG file of its own, for a page in Markdown: dots with intervals by arm, and curves over steps."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

COLOURS: Final = (
    "#2f6fde", "#d9480f", "#15803d", "#7a3fc4", "#c2255c", "#0b7285", "#a16207", "#475569", "#db2777", "#65a30d",
)  # fmt: skip
WIDTH, ROW, TOP, NAMES, PANEL, GAP = 1080, 20, 54, 160, 170, 40
PLOT_HEIGHT: Final = 210


@dataclass(frozen=True)
class Dot:
    """A share with its interval."""

    name: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """Shares after so many steps; NaN is left out."""

    name: str
    steps: Sequence[float]
    shares: Sequence[float]


def draw_story(
    title: str,
    dots: Mapping[str, Sequence[Dot]],
    curves: tuple[str, Sequence[Curve]],
    kept: tuple[str, Sequence[Curve]] | None,
) -> str:
    """A row of dots for each arm, a column for each split; beside them the curves, one above the other."""
    arms = [dot.name for dot in next(iter(dots.values()))]
    colour = {arm: COLOURS[n % len(COLOURS)] for n, arm in enumerate(arms)}
    right = NAMES + len(dots) * (PANEL + GAP)
    height = max(TOP + len(arms) * ROW + 40, TOP + (2 if kept else 1) * (PLOT_HEIGHT + 46))
    width = max(WIDTH, right + 330)
    parts = [_text(12, 22, title, size=16, weight="bold")]
    for row, arm in enumerate(arms):
        parts.append(_text(NAMES - 8, TOP + row * ROW + 14, arm, anchor="end", colour=colour[arm]))
    for column, (split, shown) in enumerate(dots.items()):
        left, bottom = NAMES + column * (PANEL + GAP), TOP + len(arms) * ROW
        parts.append(_text(left + PANEL / 2, TOP - 8, split, anchor="middle", weight="bold"))
        for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
            x = left + tick * PANEL
            parts.append(_line(x, TOP, x, bottom, "#dde2e8"))
            parts.append(_text(x, bottom + 14, f"{tick:.0%}", anchor="middle", size=10, colour="#5f6875"))
        for row, dot in enumerate(shown):
            y = TOP + row * ROW + 10
            parts.append(_line(left + dot.low * PANEL, y, left + dot.high * PANEL, y, colour[dot.name], 2))
            told = f"{dot.name}, {split}: {dot.value:.0%} [{dot.low:.0%}, {dot.high:.0%}]"
            parts.append(
                f'<circle cx="{left + dot.value * PANEL:.1f}" cy="{y}" r="4" fill="{colour[dot.name]}">'
                f"<title>{html.escape(told)}</title></circle>"
            )
    for number, plot in enumerate(filter(None, (curves, kept))):
        parts.append(_plot(right + 30, TOP + number * (PLOT_HEIGHT + 46), width - right - 50, plot, colour))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="12">\n<rect width="100%" height="100%" fill="#ffffff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _plot(left: float, top: float, width: float, plot: tuple[str, Sequence[Curve]], colour: Mapping[str, str]) -> str:
    title, curves = plot
    last = max((max(curve.steps) for curve in curves), default=1.0)
    bottom = top + PLOT_HEIGHT
    parts = [_text(left, top - 8, title, weight="bold")]
    for tick in (0.0, 0.5, 1.0):
        y = bottom - tick * PLOT_HEIGHT
        parts += [
            _line(left, y, left + width, y, "#dde2e8"),
            _text(left - 5, y + 4, f"{tick:.0%}", "end", 10, "#5f6875"),
        ]
    for step in sorted({step for curve in curves for step in curve.steps}):
        parts.append(_text(left + width * step / last, bottom + 14, f"{step:g}", "middle", 10, "#5f6875"))
    for curve in curves:
        known = [(x, y) for x, y in zip(curve.steps, curve.shares, strict=True) if math.isfinite(y)]
        places = " ".join(f"{left + width * x / last:.1f},{bottom - y * PLOT_HEIGHT:.1f}" for x, y in known)
        parts.append(
            f'<polyline points="{places}" fill="none" stroke="{colour[curve.name]}" stroke-width="2">'
            f"<title>{html.escape(curve.name)}</title></polyline>"
        )
    return "\n".join(parts)


def _text(
    x: float,
    y: float,
    text: str,
    anchor: str = "start",
    size: int = 12,
    colour: str = "#1c2430",
    weight: str = "normal",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}" '
        f'font-weight="{weight}">{html.escape(text)}</text>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, thickness: float = 1) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{thickness}"/>'
    )
