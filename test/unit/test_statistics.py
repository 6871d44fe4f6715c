"""Spreads, ratios and their intervals."""

from __future__ import annotations

import numpy as np
import pytest

from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.statistics import interval_95, ratio_of_medians, spread, wilson_95


def test_spread_is_percentiles() -> None:
    found = spread(np.arange(1001.0))
    assert found == pytest.approx({"p50": 500.0, "p90": 900.0, "p99": 990.0, "max": 1000.0})


def test_the_interval_leaves_out_values_that_are_not_finite() -> None:
    drawn_R = np.arange(1001.0)
    assert interval_95(drawn_R) == pytest.approx([25.0, 975.0])
    assert interval_95(np.append(drawn_R, [np.nan, np.inf])) == pytest.approx([25.0, 975.0])


def test_the_interval_of_a_rate_is_wilsons() -> None:
    """Values of R's prop.test(..., correct = FALSE)."""
    assert wilson_95(93, 100) == pytest.approx([0.8625, 0.9657], abs=1e-4)
    assert wilson_95(0, 50) == pytest.approx([0.0, 0.0713], abs=1e-4)
    assert wilson_95(50, 50) == pytest.approx([0.9287, 1.0], abs=1e-4)


def test_the_interval_holds_the_ratio_and_cancels_common_disturbance() -> None:
    rng = np.random.default_rng(1)
    disturbance = rng.lognormal(0.0, 1.0, 400)
    fast = disturbance * rng.normal(10.0, 0.1, 400)
    found = ratio_of_medians(2.0 * disturbance * rng.normal(10.0, 0.1, 400), fast)
    assert found["low"] < found["ratio"] < found["high"]
    assert found["ratio"] == pytest.approx(2.0, rel=0.02)
    # Drawn apart, the disturbance would not cancel.
    apart = ratio_of_medians(2.0 * rng.permutation(fast), fast)
    assert found["high"] - found["low"] < 0.3 * (apart["high"] - apart["low"])
    assert ratio_of_medians(fast, fast) == {"ratio": 1.0, "low": 1.0, "high": 1.0}
    assert ratio_of_medians(apart_a := fast[:50], fast[50:100], seed=3) == ratio_of_medians(apart_a, fast[50:100], 3)
    with pytest.raises(ConfigurationError, match="got 3 and 4"):
        ratio_of_medians(np.ones(3), np.ones(4))
