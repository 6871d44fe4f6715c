"""Which settings are recommended, and the reason given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.bundles import demo_policy

from ki_vla_ros.replay.sweep.advice import Advice, advise, recommended_yaml, sweep_section
from ki_vla_ros.replay.sweep.figures import Outcome
from ki_vla_ros.replay.sweep.grid import make_grid
from ki_vla_ros.settings.parameter_file import load_parameters
from ki_vla_ros.settings.settings import Settings

SPEC = demo_policy()
# Given, rtc with 2, 4 and 6 actions.
GRID = make_grid(("executor=rtc", "execution_horizon=2..6/2"), Settings(), SPEC)


def outcome(
    error: float = 0.01, jump: float | None = 0.01, chunks: int = 100, held: int = 0, spread: float = 0.0, seed: int = 0
) -> Outcome:
    """An outcome of 20 segments with 10 actions each; `spread`: how much the error differs between segments."""
    factor_G = 1.0 + spread * np.random.default_rng(seed).uniform(-1.0, 1.0, 20)
    squares = {g: (np.full(7, 10 * (error * factor) ** 2), 10) for g, factor in enumerate(factor_G)}
    jumps = {} if jump is None else {g: (np.full(7, 10 * jump**2), 10) for g in range(20)}
    return Outcome(100, chunks, held, 0, 0, 0, squares, jumps, 270.0, 20.0, 200)


def choose(*outcomes: Outcome) -> Advice:
    return advise(GRID, outcomes, SPEC, 0, "kitchen.mcap (30.0 s)")


def test_fewest_failures_come_before_everything() -> None:
    advice = choose(outcome(0.01, held=5), outcome(0.03), outcome(0.01, held=5), outcome(0.01, held=5))
    assert advice.chosen == 1
    assert "In 0.0% of the ticks the arm was held" in advice.reason


def test_least_error_where_the_bag_can_tell() -> None:
    advice = choose(outcome(0.02), outcome(0.012), outcome(0.01, jump=0.05), outcome(0.02, chunks=10))
    assert advice.chosen == 2
    assert [row.as_good for row in advice.rows] == [False, False, True, False]


def test_smoother_where_it_cannot_tell() -> None:
    noisy = {"spread": 0.9}
    rough, smooth = outcome(0.0100, jump=0.03, seed=1, **noisy), outcome(0.0102, jump=0.01, seed=2, **noisy)
    advice = choose(rough, smooth, outcome(0.05), outcome(0.05))
    assert advice.rows[0].as_good and advice.rows[1].as_good
    assert advice.chosen == 1


def test_fewest_inferences_among_the_equally_smooth() -> None:
    advice = choose(
        outcome(chunks=100), outcome(chunks=100), outcome(chunks=50, jump=0.0105), outcome(chunks=34, jump=0.02)
    )
    assert advice.chosen == 2


def test_equal_settings_stay_as_given() -> None:
    assert choose(*[outcome() for _ in range(4)]).chosen == 0


def test_pairs_are_compared_on_the_same_segments() -> None:
    """An error that varies widely over time but is always a tenth larger can be told apart."""
    advice = choose(*(outcome(error, spread=0.9, seed=3) for error in (0.011, 0.01, 0.011, 0.011)))
    low, high = advice.rows[0].error_ci or (0.0, 0.0)
    assert low < (advice.rows[1].error or 0.0) < high  # the intervals overlap by far
    assert [row.as_good for row in advice.rows] == [False, True, False, False]


def test_without_reference_failures_and_seams_decide() -> None:
    outcomes = [outcome(jump=jump) for jump in (0.03, 0.02, 0.01, 0.04)]
    for each in outcomes:
        each.squares.clear()
    advice = choose(*outcomes)
    assert advice.chosen == 2 and "no reference" in advice.reason
    assert "recommended" in sweep_section(advice)


@pytest.mark.parametrize("best", [0, 2])
def test_yaml_has_only_the_differences_and_a_reason(best: int, tmp_path: Path) -> None:
    advice = choose(*(outcome(0.01 if c == best else 0.02) for c in range(4)))
    written = recommended_yaml(advice)
    path = tmp_path / "recommended.yaml"
    path.write_text(written)
    assert load_parameters(path) == ({"executor": "rtc", "execution_horizon_s": 0.2} if best else {})
    assert max(map(len, written.splitlines())) <= 120
    words = " ".join(written.replace("#", " ").split())
    assert advice.reason in words and "kitchen.mcap (30.0 s)" in words


def test_section_marks_the_recommended_row() -> None:
    section = sweep_section(choose(outcome(0.02), outcome(0.01), outcome(0.02), outcome(0.02)))
    assert section.count("class=marked") == 1
    marked = section.partition("class=marked")[2].partition("</tr>")[0]
    assert "recommended" in marked and "rtc" in marked


def test_the_verdict_names_what_to_take_in_actions_and_seconds() -> None:
    assert choose(*(outcome(0.01 if c == 3 else 0.02) for c in range(4))).verdict == (
        "take executor rtc, execution_horizon 6 actions (0.3 s)"
    )
    assert choose(*[outcome() for _ in range(4)]).verdict == "keep the given settings"


def test_table_shows_the_given_value_and_jerk() -> None:
    """It does so even if the given executor uses no horizon."""
    grid = make_grid(("executor=rtc", "execution_horizon=2,6"), Settings(executor="temporal_ensemble"), SPEC)
    section = sweep_section(advise(grid, [outcome()] * 3, SPEC, 0, ""))
    rows = section.partition("<tbody>")[2].split("</tr>")
    given = next(row for row in rows if "given" in row)
    assert "2 actions (0.1 s)" in given and "not used" in given and "(given, recommended)" in given
    assert sum("6 actions (0.3 s)" in row for row in rows) == 1
    assert "jerk, rad/s^3" in section and all("<td>270</td>" in row for row in rows[:3])


@pytest.mark.parametrize(
    ("segments", "spread", "short"), [(2, 0.0, True), (4, 0.9, True), (20, 0.0, False)], ids=["none", "wide", "narrow"]
)
def test_a_bag_too_short_to_tell_is_reported(segments: int, spread: float, short: bool) -> None:
    outcomes = [outcome(0.01 + 0.0001 * c, spread=spread, seed=c) for c in range(4)]
    for each in outcomes:
        for g in range(segments, 20):
            del each.squares[g]
    advice = choose(*outcomes)
    assert ("too short to tell" in advice.reason) == short
    assert ("too short to tell" in sweep_section(advice)) == short


def test_equal_errors_do_not_blame_the_bags_length() -> None:
    assert "too short" not in choose(*[outcome() for _ in range(4)]).reason
