"""The weights' moving average: openpi's sum, in float32, over a whole run and its resumptions."""

import json
from pathlib import Path

import pytest
import torch
from support.toy_training import run_until, toy_stage, toy_trainer
from torch import Tensor

from ki_vla_ros.errors import ConfigurationError
from training.ema import MovingAverage
from training.train import Trainer
from training.weights import newest_checkpoint, open_run

DECAY = 0.9


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def note_steps(trainer: Trainer) -> tuple[MovingAverage, list[dict[str, Tensor]]]:
    """The trainer's average, and a list that gets the weights after each step of its run."""
    real = trainer.average
    assert real is not None
    steps, update = list[dict[str, Tensor]](), real.update

    def note(step: int) -> None:
        steps.append(weights(trainer))
        update(step)

    real.update = note  # type: ignore[method-assign]
    return real, steps


def test_the_average_is_openpis_sum_and_is_what_is_measured(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, toy_stage(train=["expert"], losses={"flow": 1.0}), ema=DECAY)
    (real, steps), expected = note_steps(trainer), weights(trainer)
    trainer.run()
    for step in steps:
        expected = {name: DECAY * expected[name] + (1 - DECAY) * step[name] for name in expected}
    assert len(steps) == 4
    with trainer.averaged():
        measured = weights(trainer)
    for name, tensor in expected.items():
        torch.testing.assert_close(measured[name], tensor, atol=1e-6, rtol=1e-5)
    moved = "expert.layers.0.mlp.up.weight"
    assert not torch.equal(measured[moved], steps[-1][moved])
    assert all(torch.equal(one, steps[-1][name]) for name, one in weights(trainer).items()), "the weights are back"
    assert set(real.averages) == {name for name in expected if name.startswith(("expert", "action_"))}


def test_what_a_later_stage_trains_first_forgets_the_weights_before_it(tmp_path: Path) -> None:
    """A short last stage would else be judged by weights that were never trained: 0.9 ** 3 of them here."""
    stages = (
        toy_stage(name="words", train=["backbone"], losses={"fast": 1.0}),
        toy_stage(name="flow", train=["backbone", "expert"], steps=3),
    )
    trainer = toy_trainer(tmp_path, *stages, ema=DECAY)
    (real, steps), before = note_steps(trainer), weights(trainer)
    trainer.run()
    late, early = "expert.layers.0.mlp.up.weight", "backbone.layers.0.mlp.up.weight"
    torch.testing.assert_close(real.averages[late], sum(step[late] for step in steps[4:]) / 3)
    expected = before[early]
    for step in steps:
        expected = DECAY * expected + (1 - DECAY) * step[early]
    torch.testing.assert_close(real.averages[early], expected, atol=1e-6, rtol=1e-5)


def test_a_gate_is_measured_on_the_average(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, toy_stage(gates={"good": 0.5}), ema=DECAY)
    seen = []
    trainer.figures = lambda driven: seen.append(weights(trainer)) or {"good": 1.0}  # type: ignore[func-returns-value]
    trainer.run()
    assert trainer.average is not None
    for name, average in trainer.average.averages.items():
        assert torch.equal(seen[0][name], average)


def test_a_resumed_average_is_the_same_to_the_last_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = toy_trainer(tmp_path / "whole", ema=DECAY)
    whole.run()
    broken = toy_trainer(tmp_path / "broken", ema=DECAY)
    run_until(broken, 3, monkeypatch)
    resumed = toy_trainer(tmp_path / "broken", ema=DECAY)
    resumed.run()
    assert whole.average is not None and resumed.average is not None
    for name, average in whole.average.averages.items():
        assert torch.equal(average, resumed.average.averages[name]), name


def test_a_run_goes_on_with_its_average_only(tmp_path: Path) -> None:
    toy_trainer(tmp_path / "with", ema=DECAY).run()
    toy_trainer(tmp_path / "without").run()
    _, saved = open_run(newest_checkpoint(tmp_path / "without") or tmp_path)
    assert not any(name.startswith("ema.") for name in saved.shapes)
    with pytest.raises(ConfigurationError, match=r"ema: expected none, as this configuration says, got 0\.9"):
        toy_trainer(tmp_path / "with").load()
    with pytest.raises(ConfigurationError, match=r"ema: expected 0\.9, .* got none"):
        toy_trainer(tmp_path / "without", ema=DECAY).load()
    with pytest.raises(ConfigurationError, match=r"ema\.action_in\.bias: expected none, .* got \[\d+\]"):
        toy_trainer(tmp_path / "with", toy_stage(train=["backbone"], losses={"fast": 1.0}), ema=DECAY).load()


def test_remarks_may_change_while_a_run_goes_on(tmp_path: Path) -> None:
    """Also where an earlier version has noted them as what the run is of."""
    begun = toy_trainer(tmp_path, made_by="as in docs/data.md")
    begun.run()
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    resumed = toy_trainer(tmp_path, made_by="as in docs/environments.md")
    assert resumed.load()[0].stage == 1, "it had come to its end"
    file = newest / "state.json"
    state = json.loads(file.read_text())
    file.write_text(json.dumps(state | {"made_of": state["made_of"] | {"made_by": "by hand", "workers": 7}}))
    assert toy_trainer(tmp_path).load()[0].stage == 1
    file.write_text(json.dumps(state | {"made_of": state["made_of"] | {"seed": 77}}))
    with pytest.raises(ConfigurationError, match="seed: expected 0, as this configuration says, got 77"):
        toy_trainer(tmp_path).load()
