"""Plots: what is drawn is where the values are, and nothing that stands out is thinned away."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ki_vla_ros.report.plots import HEIGHT, MOST_POINTS, WIDTH, Axes, Span, clock, number, thinned

FINITE = st.floats(-1e6, 1e6)


@given(FINITE, st.floats(1e-3, 1e6))
def test_ticks_are_round_and_within(low: float, wide: float) -> None:
    span = Span(low, low + wide)
    ticks = span.ticks(6)
    assert 2 <= len(ticks) <= 13
    slack = 1e-6 * wide
    assert all(low - slack <= tick <= low + wide + slack for tick in ticks)
    step = f"{ticks[1] - ticks[0]:.0e}" if len(ticks) > 1 else "1e"
    assert step[0] in "125"


@given(st.lists(st.one_of(FINITE, st.just(float("nan")), st.just(float("inf"))), max_size=20))
def test_span_holds_all_finite_values(values: list[float]) -> None:
    span = Span.of(values)
    assert span.low < span.high
    finite = [value for value in values if np.isfinite(value)]
    assert all(span.low <= value <= span.high for value in finite)


def test_single_peak_survives_thinning() -> None:
    x_N, y_N = np.linspace(0.0, 10.0, 100_000), np.zeros(100_000)
    y_N[54_321], y_N[70_000] = 1.0, -2.0
    few_x, few_y = thinned(x_N, y_N, Span(0.0, 10.0))
    assert len(few_x) <= MOST_POINTS
    assert few_y.max() == 1.0 and few_y.min() == -2.0
    assert few_x[np.argmax(few_y)] == x_N[54_321]
    assert np.all(np.diff(few_x) > 0.0)


def test_gap_survives_thinning() -> None:
    x_N, y_N = np.linspace(0.0, 10.0, 10_000), np.ones(10_000)
    y_N[4_000:6_000] = np.nan
    assert Axes(Span(0.0, 10.0), Span(0.0, 2.0)).line(x_N, y_N, "c0").count("M") == 2


def test_points_lie_where_they_belong() -> None:
    drawn = Axes(Span(-1.0, 1.0), Span(0.0, 4.0)).line([-1.0, 0.0, 1.0], [4.0, 1.0, 0.0], "c0")
    points = [tuple(map(float, pair)) for pair in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", drawn)]
    assert points == [(0.0, 0.0), (WIDTH / 2, 0.75 * HEIGHT), (float(WIDTH), float(HEIGHT))]


@pytest.mark.parametrize(
    ("seconds", "span", "told"), [(12.5, 30.0, "12.5"), (65.0, 90.0, "1:05"), (3725.0, 9000.0, "1:02:05")]
)
def test_clock(seconds: float, span: float, told: str) -> None:
    assert clock(seconds, span) == told


@pytest.mark.parametrize(
    ("value", "span", "told"),
    [(0.1 + 0.2, 1.0, "0.3"), (-1e-17, 1.0, "0"), (1500.0, 4000.0, "1500"), (1e-4, 1e-3, "0.0001")],
)
def test_number(value: float, span: float, told: str) -> None:
    assert number(value, span) == told
