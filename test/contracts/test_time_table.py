"""The table of flow times against the layers that it replaces."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import write_checkpoint
from support.models import CONFIG, make_model

from ki_vla_ros.bundle.time_table import MOST_ROWS, TimeTable
from ki_vla_ros.engines.base import step_times
from ki_vla_ros.errors import BundleError, EngineError
from training.export.graphs import cast_weights, expert_norms, modulation_size, modulations, time_file
from training.model.expert import Conditioning, Expert, embed_time
from training.weights.checkpoints import load_checkpoint

TIMES = (1.0, 0.75, 0.125, 0.0)  # exact in float32, which the layers get


def table(expert: Expert, path: Path, modulation: int) -> TimeTable:
    path.write_bytes(time_file(expert))
    return TimeTable(path, modulation)


def test_a_row_is_what_every_norm_would_compute(tmp_path: Path) -> None:
    model = make_model()
    rows = table(model.expert, tmp_path / "time.npz", modulation_size(model)).rows(TIMES)
    with torch.no_grad():
        condition = model.expert.condition(torch.tensor([TIMES]), with_state=False)[0]
        expected = torch.cat([norm.dense(condition) for norm in expert_norms(model.expert)], dim=-1)
    assert len(expert_norms(model.expert)) == 2 * CONFIG.expert.depth + 1
    np.testing.assert_allclose(rows, expected.numpy(), atol=2e-6)


def test_with_concat_a_row_is_the_times_part_of_the_first_layer(tmp_path: Path) -> None:
    model = make_model(dataclasses.replace(CONFIG, conditioning="concat", state_dim=4))
    rows = table(model.expert, tmp_path / "time.npz", CONFIG.expert.width).rows(TIMES)
    action = torch.randn(len(TIMES), CONFIG.expert.width)
    with torch.no_grad():
        whole = model.expert.time_in(torch.cat((action, embed_time(torch.tensor(TIMES), CONFIG.expert.width)), dim=-1))
        own = action @ model.expert.time_in.weight[:, : CONFIG.expert.width].T
    np.testing.assert_allclose(rows, (whole - own).numpy(), atol=5e-6)


@pytest.mark.parametrize("conditioning", ["adarms", "concat"])
def test_bfloat16_weights_come_back_bit_for_bit(tmp_path: Path, conditioning: Conditioning) -> None:
    model = cast_weights(make_model(dataclasses.replace(CONFIG, conditioning=conditioning)), torch.bfloat16)
    rows = table(model.expert, tmp_path / "time.npz", modulation_size(model)).rows(TIMES)
    np.testing.assert_allclose(rows, modulations(model.expert, torch.tensor(TIMES)).numpy(), atol=2e-6)


def test_rows_are_computed_once_and_the_table_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    made = table(model.expert, tmp_path / "time.npz", modulation_size(model))
    asked: list[float] = []
    compute = made._compute
    monkeypatch.setattr(made, "_compute", lambda times: asked.extend(times) or compute(times))
    first = made.rows(step_times(10))
    assert np.array_equal(made[1.0], first[0]) and np.array_equal(made.rows(step_times(10)), first)
    assert sorted(asked) == sorted(step_times(10)) and step_times(4) == [1.0, 0.75, 0.5, 0.25]
    before = made[0.5]
    for steps in range(1, 101):
        made.rows(step_times(steps))
    assert len(made) <= MOST_ROWS and np.array_equal(made[0.5], before)


@pytest.mark.parametrize("time", [-0.1, 1.1, float("nan")])
def test_a_time_outside_the_flow_is_refused(tmp_path: Path, time: float) -> None:
    model = make_model()
    with pytest.raises(EngineError, match="flow time: expected 0 to 1"):
        table(model.expert, tmp_path / "time.npz", modulation_size(model))[time]


def broken(arrays: dict[str, np.ndarray], fault: str) -> dict[str, np.ndarray]:
    match fault:
        case "no periods":
            arrays.pop("periods")
        case "a gap":
            arrays["weight3"] = arrays.pop("weight2")
        case "width":
            arrays["weight1"] = arrays["weight1"][:, :-1]
        case "bias":
            arrays["bias1"] = arrays["bias1"][:-1]
        case "pickle":
            arrays["bias1"] = np.array([object()])
        case "short":
            arrays = {name: arrays[name] for name in ("periods", "weight0", "bias0")}
    return arrays


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no periods", "expected arrays of numbers in an npz file"),
        ("a gap", "expected arrays of numbers in an npz file"),
        ("width", r"layer 1: expected weights \[out, 24\] and biases \[out\], got \(24, 23\)"),
        ("bias", r"layer 1: expected weights .*, got \(24, 24\) and \(23,\)"),
        ("pickle", r"expected arrays of numbers in an npz file, got .* as object \[1\]"),
        ("short", r"expected a modulation of \d+ \(graph\.modulation\), got 24"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, fault: str, message: str) -> None:
    model = load_checkpoint(write_checkpoint(tmp_path / "checkpoint", "text"))
    path = tmp_path / "time.npz"
    path.write_bytes(time_file(model.expert))
    with np.load(path) as arrays:
        content = broken(dict(arrays), fault)
    np.savez(path, allow_pickle=True, **content)
    with pytest.raises(BundleError, match=message):
        TimeTable(path, modulation_size(model))


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    model = make_model()
    content = time_file(model.expert)
    for damaged in (b"", b"PK\x03\x04", content[: len(content) // 2], content[:-30]):
        (tmp_path / "time.npz").write_bytes(damaged)
        with pytest.raises(BundleError, match="expected arrays of numbers in an npz file"):
            TimeTable(tmp_path / "time.npz", modulation_size(model))
