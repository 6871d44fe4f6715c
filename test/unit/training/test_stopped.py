"""A run that was stopped and goes on leaves the records of one run."""

from pathlib import Path

import pytest
from support.toy_training import curves, run_until, toy_stage, toy_trainer

from training.train import Trainer


def trainer(out: Path) -> Trainer:
    made = toy_trainer(out, toy_stage(evaluate_every=1), toy_stage(name="more", steps=2))
    made.figures = lambda driven: {"bias": float(made.model.action_out.bias.detach().sum())}
    return made


def test_each_step_is_in_the_curves_and_in_the_records_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before there is a checkpoint, and between two: figures of steps that are lost are already written."""
    trainer(tmp_path / "whole").run()
    for calls, seen in ((1, [0]), (3, [0, 1, 2])):
        run_until(trainer(tmp_path / "stopped"), calls, monkeypatch)
        assert [step for step, _ in curves(tmp_path / "stopped")["rank0 figures/bias"]] == seen
    trainer(tmp_path / "stopped").run()
    one, two = (curves(tmp_path / name) for name in ("whole", "stopped"))
    assert one == two and [step for step, _ in one["rank0 figures/bias"]] == [0, 1, 2, 3, 5]
    assert one.keys() >= {"rank0 toy/flow", "rank0 more/flow"}
    for name in ("figures.jsonl", "losses.jsonl"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "stopped" / name).read_text()
