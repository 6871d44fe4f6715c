"""Names of figures are checked before a replay, against what metrics.json can hold."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.bundles import demo_policy
from support.recordings import record_inputs

from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.replay.__main__ import main
from ki_vla_ros.replay.thresholds import check_figure, parse_threshold

SPEC = demo_policy()


def numbers(tree: Any, prefix: str = "") -> Iterator[str]:
    """The name of every number in metrics.json."""
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from numbers(value, f"{prefix}{key}.")
    elif isinstance(tree, int | float) and not isinstance(tree, bool):
        yield prefix[:-1]


@pytest.mark.parametrize(
    "name",
    [
        "error.by_step.0.rms",
        "error.by_step.15.rms_ci.1",
        "error.by_joint.gripper.bias",
        "inputs.age_ms.joint state.p99",
        "sensitivity.probes.camera.wrist.ratio",
        "safety.holds.camera 'wrist'",
        "error.rms_m",
    ],
)
def test_nested_names_are_known(name: str) -> None:
    check_figure(parse_threshold(f"{name}>1"), SPEC, recorded_ticks=False)


@pytest.mark.parametrize(
    "name",
    [
        *("error.rsm", "error", "error.by_step.16.rms", "error.by_step.0", "error.by_joint.hand.rms", "complete"),
        *("inputs.age_ms.tail.p50", "sensitivity.probes.camera.tail.rms", "parity.chunks", "error_rms"),
    ],
)
def test_unknown_names_are_refused_with_a_list_of_known_ones(name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"error\.by_step\.STEP\.rms.*STEP: 0 to 15") as refusal:
        check_figure(parse_threshold(f"{name}>1"), SPEC, recorded_ticks=False)
    assert repr(name) in str(refusal.value)


def test_recorded_ticks_have_parity() -> None:
    check_figure(parse_threshold("parity.max_difference>0"), SPEC, recorded_ticks=True)


def test_the_nearest_name_is_suggested() -> None:
    with pytest.raises(ConfigurationError, match=r"did you mean error\.rms\?"):
        check_figure(parse_threshold("error.rsm>1"), SPEC, recorded_ticks=False)


def test_every_figure_of_a_replay_is_known_and_a_misspelt_one_stops_it_at_once(
    tmp_path: Path, bundle_path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record_inputs(tmp_path / "bag", 4.0)
    out = tmp_path / "out"
    command = [
        str(tmp_path / "bag"),
        "--bundle",
        bundle_path,
        "--out",
        str(out),
        "--no-mcap",
        "--sensitivity-every",
        "1",
    ]
    assert main(command) == 0
    found = list(numbers(json.loads((out / "metrics.json").read_text())))
    assert len(found) > 200
    for name in found:
        check_figure(parse_threshold(f"{name}>1"), SPEC, recorded_ticks=False)
    (out / "metrics.json").unlink()
    monkeypatch.setattr("ki_vla_ros.replay.run.open_engine", lambda *_: pytest.fail("it began"))
    assert main([*command, "--fail-if", "error.rsm>0.1"]) == 2
    assert "no figure 'error.rsm'" in capsys.readouterr().err and not (out / "metrics.json").exists()


def test_help_says_where_results_go_and_what_they_overwrite(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "default: out/replay" in words and "overwritten" in words
