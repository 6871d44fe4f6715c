"""What a sweep tries: every behaviour once, nothing that a node would refuse."""

from __future__ import annotations

import pytest
from support.bundles import demo_policy

from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.replay.sweep.grid import Grid, make_grid
from ki_vla_ros.settings.names import settings_from_parameters
from ki_vla_ros.settings.settings import Settings


def grid(*texts: str, base: Settings | None = None) -> Grid:
    return make_grid(texts, base or Settings(), demo_policy())


def changes(found: Grid) -> list[dict[str, object]]:
    return [dict(candidate.changes) for candidate in found.candidates]


def test_given_settings_come_first() -> None:
    assert changes(grid("execution_horizon=4,6")) == [{}, {"execution_horizon_s": 0.2}, {"execution_horizon_s": 0.3}]


def test_horizon_counts_actions_and_understands_h() -> None:
    found = grid("execution_horizon=1..H", base=settings_from_parameters({"executor": "synchronous"}))
    horizons = [candidate.settings.execution_horizon_s for candidate in found.candidates]
    # 16 actions of 0.05 s; a chunk must outlast the horizon by a tick of 0.1 s.
    assert sorted(horizons) == pytest.approx([0.05 * k for k in range(1, 15)])
    assert found.asked == 16 and sum(found.refused.values()) == 2
    assert "outlast" in next(iter(found.refused))


def test_ranges_with_a_step_and_lists() -> None:
    found = grid("guidance_weight=1..5/2,7", "executor=rtc")
    assert [c.settings.guidance_weight for c in found.candidates[1:]] == [1.0, 3.0, 5.0, 7.0]


def test_horizons_within_one_tick_are_one_setting() -> None:
    found = grid("execution_horizon=1..4")  # at 10 Hz a tick is two actions; three are between one and two ticks
    assert [c.get("execution_horizon_s") for c in changes(found)] == [None, 0.15, 0.2]
    assert found.same == 2
    with pytest.raises(ConfigurationError, match="all do the same"):
        grid("execution_horizon=1,2")


def test_parameters_that_an_executor_ignores_are_not_varied() -> None:
    found = grid("executor=asynchronous,temporal_ensemble,rtc", "inference_delay=0..1", "execution_horizon=2,4")
    assert [c for c in changes(found) if c.get("executor") == "temporal_ensemble"] == [
        {"executor": "temporal_ensemble"}
    ]
    assert all("inference_delay" not in c for c in changes(found) if c.get("executor") != "rtc")
    assert sum(c.get("executor") == "rtc" for c in changes(found)) == 4
    assert found.asked == 12 and not found.refused and found.same == 6


def test_impossible_pairs_are_refused_and_counted() -> None:
    found = grid("executor=rtc", "execution_horizon=2", "inference_delay=0..4")
    assert [c.get("inference_delay") for c in changes(found)[1:]] == [0, 1, 2]
    assert list(found.refused.values()) == [2]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("execution_horizon", "NAME=VALUES"),
        ("execution_horizn=2", "did you mean"),
        ("execution_horizon=9..2", "rising"),
        ("inference_delay=1.5", "expected ints"),
        ("executor=fast", "executor"),
        ("guidance_weight=1000", "guidance_weight"),
        ("bundle=demo", "cannot be swept"),
        ("torch_mode=eager,graph", "cannot be swept"),
        ("joint_states_topic=a", "cannot be swept"),
        ("execution_horizon=1.2.3..4", "expected LOW..HIGH"),
        ("execution_horizon=" + "9" * 400 + ".." + "9" * 400, "expected LOW..HIGH"),
        ("execution_horizon=1..2/" + "0." + "0" * 400 + "1", "expected LOW..HIGH"),
    ],
)
def test_nonsense_is_refused_by_name(text: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        grid(text, "execution_horizon=4,6" if not text.startswith("execution_horizon=") else "executor=rtc")


def test_a_grid_that_nobody_could_wait_for_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="expected at most 100000 settings, got 1030301000"):
        grid("max_age_s=0.1..1.1/0.01", "sync_slop_s=0..1/0.01", "hold_after_s=1..2/0.01", "noise_seed=1..1000")
