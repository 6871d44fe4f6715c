"""Intervals of a comparison against cases whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ki_vla_ros.statistics import wilson_95
from training.ablation import intervals
from training.ablation.intervals import Estimate, at, crossing, difference, draw_means, draw_runs, mean, time_to

Array = np.ndarray


def draws(values_SE: Array, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    return draw_means(values_SE, draw_runs(len(values_SE), rng), rng)


def test_one_run_has_the_spread_of_its_episodes() -> None:
    """A share p of n episodes: standard error sqrt(p (1 - p) / n)."""
    values_SE = np.array([[1.0] * 30 + [0.0] * 70])
    assert draws(values_SE).std() == pytest.approx(math.sqrt(0.3 * 0.7 / 100), rel=0.05)
    found = mean(values_SE)
    assert (
        found.value == 0.3
        and found.low == pytest.approx(0.21, abs=0.015)
        and found.high == pytest.approx(0.39, abs=0.015)
    )


@pytest.mark.parametrize("runs", [1, 3])
def test_episodes_that_all_end_alike_are_not_certain(runs: int) -> None:
    """As wide as that of so many independent ones: 3.84 / (n + 3.84) for a share; others may yet differ in pairs."""
    none_SE, all_SE = np.zeros((runs, 40)), np.ones((runs, 40))
    count = runs * 40
    assert mean(none_SE).high == pytest.approx(3.84 / (count + 3.84), rel=0.01) and mean(none_SE).low <= 0.0
    assert mean(all_SE).low == pytest.approx(1 - mean(none_SE).high)
    alike = difference(all_SE, all_SE)
    assert alike.high == pytest.approx(1.96 / (count + 2), rel=0.01) and alike.low == -alike.high
    assert difference(all_SE, none_SE).low < 1.0


def test_an_interval_is_at_least_that_of_independent_episodes() -> None:
    low, high = wilson_95(2, 40)
    found = mean(np.array([[1.0] * 2 + [0.0] * 38]))
    assert found.low <= low and found.high == high  # the bootstrap's ends at 0.125


@pytest.mark.parametrize("runs", [2, 3, 5, 20])
def test_few_runs_spread_as_much_as_their_mean_does(runs: int) -> None:
    """Runs that differ, and episodes that do not: standard error s / sqrt(n), with s over n - 1. n of n gives less."""
    values_S = np.random.default_rng(1).normal(0.5, 0.2, runs)
    spread = values_S.std(ddof=1) / math.sqrt(runs)
    assert draws(np.repeat(values_S[:, None], 50, axis=1)).std() == pytest.approx(spread, rel=0.05)


def test_an_interval_of_several_runs_holds_what_is_true_about_as_often_as_it_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(intervals, "DRAWS", 400)
    rng, hits, times = np.random.default_rng(0), 0, 100
    for n in range(times):
        rate_S = np.clip(rng.normal(0.6, 0.1, 8), 0.0, 1.0)
        found = mean((rng.random((8, 40)) < rate_S[:, None]).astype(float), seed=n)
        hits += found.low <= 0.6 <= found.high
    assert 0.87 <= hits / times <= 0.99


def test_pairs_take_out_what_episodes_have_in_common() -> None:
    """Half of the episodes are hard for everyone. Who does better on some of the others, only pairs tell."""
    hard_SE = np.tile(np.arange(40) % 2 == 0, (3, 1))
    ours_SE = np.where(hard_SE, 0.0, 1.0)
    theirs_SE = ours_SE.copy()
    theirs_SE[:, 1:8:2] = 0.0
    found = difference(ours_SE, theirs_SE)
    assert found.value == pytest.approx(0.1) and found.low > 0.02
    unpaired = draws(ours_SE) - draws(theirs_SE, seed=1)
    assert np.percentile(unpaired, 2.5) < 0.0
    with pytest.raises(ValueError, match="the same runs and episodes"):
        difference(ours_SE, theirs_SE[:2])


@pytest.mark.parametrize(
    ("expected", "interval", "verdict"),
    [
        ("worse", (-0.3, -0.1), "agrees"),
        ("worse", (0.1, 0.3), "disagrees"),
        ("worse", (-0.3, 0.1), "cannot tell"),
        ("better", (0.1, 0.3), "agrees"),
        ("better", (-0.3, -0.1), "disagrees"),
        ("same", (-0.05, 0.08), "agrees"),
        ("same", (0.11, 0.3), "disagrees"),
        ("same", (-0.3, -0.11), "disagrees"),
        ("same", (0.02, 0.3), "cannot tell"),
        ("same", (-0.05, 0.3), "cannot tell"),
    ],
)
def test_a_verdict_needs_the_whole_interval(expected: str, interval: tuple[float, float], verdict: str) -> None:
    assert Estimate(sum(interval) / 2, *interval, runs=2).beside(expected, 0.1) == verdict
    assert Estimate(sum(interval) / 2, *interval).beside(expected, 0.1) == "cannot tell (one seed)"


def test_a_level_is_reached_on_the_line_between_two_points() -> None:
    assert crossing([100, 200, 400], [0.3, 0.45, 0.85], 0.5) == pytest.approx(225.0)
    assert crossing([100, 200], [0.8, 0.9], 0.5) == 62.5, "from nothing at step 0"
    assert crossing([100, 200], [0.2, 0.4], 0.5) == math.inf
    assert crossing([100, 200, 400], [0.6, 0.4, 0.8], 0.5) == pytest.approx(83.3, abs=0.1), "the first time"


def test_a_level_that_some_runs_do_not_reach_has_an_open_end() -> None:
    early_SE, late_SE = np.zeros((3, 10)), np.ones((3, 20))
    found = time_to([100, 200], [early_SE, late_SE], 0.5)
    ends = mean(early_SE).high, mean(late_SE).low  # as of 30 and 60 independent episodes
    first, last = (100 + 100 * (0.5 - ends[0]) / (1 - ends[0]), 100 + 100 * 0.5 / ends[1])
    assert (found.value, found.low, found.high) == pytest.approx((150.0, first, last))
    late_SE[0] = 0.0  # of three runs one never learns; two are drawn, so one draw in nine has nothing
    found = time_to([100, 200], [early_SE, late_SE], 0.5)
    assert found.value == 175.0 and found.low < 150.0 and found.high == math.inf


def test_between_two_points_lies_their_weighted_mean() -> None:
    first_SE, second_SE = np.zeros((2, 3)), np.ones((2, 5))
    np.testing.assert_array_equal(at(150, [100, 200], [first_SE, second_SE]), np.full((2, 3), 0.5))
    np.testing.assert_array_equal(at(200, [100, 200], [first_SE, second_SE]), second_SE)
    np.testing.assert_array_equal(at(50, [100, 200], [second_SE, first_SE]), np.full((2, 5), 0.5))
