"""Published statistics: our linear map gives the numbers that theirs gives, and a file's faults are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.policy.preprocess import normalize, unnormalize
from training.weights.statistics import Method, read_ranges

RNG = np.random.default_rng(0)
JOINTS = 7


def features() -> dict[str, Any]:
    """Statistics of 32 dimensions, as a padded model has; the third never moves."""
    mean, std = RNG.normal(size=32), RNG.uniform(0.01, 1, 32)
    std[2] = 0
    low, high = mean - 2.2 * std, mean + 1.9 * std
    values = {"mean": mean, "std": std, "q01": low, "q99": high, "min": low - 1, "max": high + 1}
    values |= {"q10": mean - std, "q90": mean + 1.5 * std}
    used = np.arange(32) < JOINTS
    return {name: np.where(used, value, 0.0).tolist() for name, value in values.items()}


STATE, ACTION = features(), features()


def write(folder: Path, source: str, state: Any = STATE, action: Any = ACTION) -> Path:
    path = folder / "stats.json"
    if source == "openpi":
        path.write_text(json.dumps({"norm_stats": {"state": state, "actions": action}}))
    elif source == "lerobot":
        image = {"mean": [[[0.5]]] * 3}
        path.write_text(json.dumps({"observation.state": state, "action": action, "observation.images.top": image}))
    else:
        path = folder / "policy_preprocessor_step_5_normalizer_processor.safetensors"
        both = {"observation.state": state, "action": action}
        tensors = {f"{key}.{name}": torch.tensor(v) for key, fields in both.items() for name, v in fields.items()}
        save_file(tensors, path)
    return path


@pytest.mark.parametrize("source", ["openpi", "lerobot", "safetensors"])
@pytest.mark.parametrize("method", ["quantiles", "mean_std"])
def test_ranges_normalise_as_their_source_does(tmp_path: Path, source: str, method: Method) -> None:
    ranges = read_ranges(write(tmp_path, source), method, JOINTS, JOINTS)
    x = RNG.normal(size=(5, JOINTS))
    for found, fields in ((ranges.state, STATE), (ranges.action, ACTION)):
        moving = np.arange(JOINTS) != 2
        mean, std, q01, q99 = (np.array(fields[name])[:JOINTS] for name in ("mean", "std", "q01", "q99"))
        if method == "mean_std":
            epsilon = 1e-6 if source == "openpi" else 1e-8
            expected = (x - mean) / (std + epsilon)
        elif source == "openpi":
            expected = (x - q01) / (q99 - q01 + 1e-6) * 2 - 1
        else:
            expected = 2 * (x - q01) / np.where(q99 == q01, 1e-8, q99 - q01) - 1
        tolerance = 1e-5 if source == "safetensors" else 1e-9  # float32 there
        assert normalize(x, *found)[:, moving] == pytest.approx(expected[:, moving], rel=tolerance, abs=tolerance)
        if source != "safetensors":
            assert normalize(x, *found) == pytest.approx(expected, rel=1e-5)
        assert len(found.low) == JOINTS
        assert all(low < high for low, high in zip(*found, strict=True))
        assert unnormalize(normalize(x, *found), *found) == pytest.approx(x)


@pytest.mark.parametrize(("method", "low", "high"), [("min_max", "min", "max"), ("quantile10", "q10", "q90")])
def test_what_else_lerobot_can_normalise_by(tmp_path: Path, method: Method, low: str, high: str) -> None:
    ranges = read_ranges(write(tmp_path, "lerobot"), method, JOINTS, JOINTS)
    x = RNG.normal(size=(5, JOINTS))
    for found, fields in ((ranges.state, STATE), (ranges.action, ACTION)):
        first, second = (np.array(fields[name])[:JOINTS] for name in (low, high))
        expected = 2 * (x - first) / np.where(second == first, 1e-8, second - first) - 1
        assert normalize(x, *found) == pytest.approx(expected, rel=1e-5)


def without(field: str) -> dict[str, Any]:
    return {name: values for name, values in STATE.items() if name != field}


def changed(field: str, j: int, value: Any) -> dict[str, Any]:
    return {**STATE, field: [*STATE[field][:j], value, *STATE[field][j + 1 :]]}


@pytest.mark.parametrize("source", ["openpi", "lerobot"])
@pytest.mark.parametrize(
    ("state", "method", "message"),
    [
        (without("q99"), "quantiles", r"state: expected q99, got only .*compute the statistics again"),
        (without("std"), "mean_std", r"state: expected std, got only"),
        ({**STATE, "q01": None}, "quantiles", "expected q01"),
        (changed("q01", 3, float("nan")), "quantiles", r"state\.q01: expected finite numbers"),
        (changed("std", 6, float("inf")), "mean_std", r"state\.std: expected finite numbers"),
        (changed("std", 1, -0.1), "mean_std", "expected std >= 0, got in dimension 1"),
        (changed("q99", 4, -50.0), "quantiles", "expected q01 <= q99, got in dimension 4"),
        ({**STATE, "q01": STATE["q01"][:6]}, "quantiles", r"at least 7 numbers .* got shape \[6\]"),
        ({**STATE, "q01": [STATE["q01"]]}, "quantiles", r"at least 7 numbers .* got shape \[1, 32\]"),
        ({**STATE, "mean": ["a"] * 7}, "mean_std", "expected a list of numbers"),
        (None, "quantiles", r"expected statistics of '(observation\.)?state', got only those of"),
    ],
)
def test_faults_are_named(tmp_path: Path, source: str, state: Any, method: Method, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        read_ranges(write(tmp_path, source, state), method, JOINTS, JOINTS)


def test_faults_beyond_the_joints_do_not_matter(tmp_path: Path) -> None:
    read_ranges(write(tmp_path, "openpi", changed("q01", 30, float("nan"))), "quantiles", JOINTS, JOINTS)


@pytest.mark.parametrize("method", ["quantiles", "mean_std"])
def test_a_robot_with_fewer_dimensions_than_the_statistics_is_refused(tmp_path: Path, method: Method) -> None:
    """Zeros are padding; anything else is a dimension that the robot file lacks."""
    first = {"quantiles": "q01", "mean_std": "mean"}[method]
    with pytest.raises(ConfigurationError, match=rf"state: expected 6 dimensions, .* got in dimension 6 {first} "):
        read_ranges(write(tmp_path, "openpi"), method, JOINTS - 1, JOINTS)
    with pytest.raises(ConfigurationError, match=r"actions: expected 6 dimensions"):
        read_ranges(write(tmp_path, "openpi"), method, JOINTS, JOINTS - 1)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "a JSON file, got none"), ("[1]", "got list"), ("{}", "got only those of")]
)
def test_other_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "stats.json").write_text(content)
    with pytest.raises(ConfigurationError, match=message):
        read_ranges(tmp_path / "stats.json", "quantiles", JOINTS, JOINTS)
    with pytest.raises(ConfigurationError, match="a JSON file, got none"):
        read_ranges(tmp_path / "missing.json", "quantiles", JOINTS, JOINTS)
    with pytest.raises(ConfigurationError, match="no such file"):
        read_ranges(tmp_path / "missing.safetensors", "quantiles", JOINTS, JOINTS)
