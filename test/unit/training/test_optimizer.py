"""What a stage trains, at which rates, and what its optimizer's state must be to go on."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from support.models import make_model

from ki_vla_ros.errors import ConfigurationError
from training.config import StageConfig
from training.losses import TrainingHeads
from training.optimizer import (
    clip_gradients,
    load_optimizer,
    make_optimizer,
    named_parameters,
    optimizer_tensors,
    part_norms,
    peaks,
    schedule,
    select_parameters,
    set_learning_rates,
)
from training.weights import RunState, open_run, save_run


def stage(**changes: Any) -> StageConfig:
    given = {"name": "s", "steps": 100, "learning_rate": 1e-3, "warmup_steps": 0, "train": ["backbone", "expert"]}
    return StageConfig.model_validate(given | {"losses": {"flow": 1.0}, "sources": {"robot": 1}} | changes)


def heads() -> TrainingHeads:
    return TrainingHeads(vision_width=16, width=32, kinds=4, frequencies=2, action_dim=3, state_dim=3)


def test_the_parts_are_the_whole_model() -> None:
    model, more = make_model(), heads()
    every = select_parameters(model, more, ("vision", "backbone", "expert", "heads"))
    assert set(every) == set(named_parameters(model, more)) and all(p.requires_grad for p in every.values())
    stem = select_parameters(model, more, ("stem",))
    assert stem and all(name.startswith("vision.stem.") for name in stem)
    assert [name for name, p in named_parameters(model, more).items() if p.requires_grad] == list(stem)


def test_patterns_choose_and_freeze() -> None:
    model = make_model()
    chosen = select_parameters(model, None, ("backbone.layers.2.*", "expert"), ("*.norm?.*", "action_in" + ".*"))
    assert "backbone.layers.2.mlp.up.weight" in chosen and "expert.layers.0.mlp.up.weight" in chosen
    assert not any(".norm1." in name or "backbone.layers.1" in name or "action_in" in name for name in chosen)
    assert not model.action_in.weight.requires_grad and model.action_out.weight.requires_grad


@pytest.mark.parametrize(
    ("train", "freeze", "message"),
    [
        (
            ["backbone.layer.*"],
            [],
            r"stage s: train: expected a part .*'backbone\.layer\.\*'.*nearest: backbone\.layers",
        ),
        (["expert"], ["vison"], r"stage s: train: freeze: .*'vison', which matches none; nearest: vision"),
        (["heads"], [], "'heads', which matches none"),
        (["expert"], ["expert"], "something to train, got only frozen parameters"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(train: list[str], freeze: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        select_parameters(make_model(), None, train, freeze, "stage s: train")


def test_the_schedule_is_openpis() -> None:
    """Against optax.warmup_cosine_decay_schedule written down plainly, as openpi calls it."""
    given = stage(learning_rate=5e-5, warmup_steps=10, decay_steps=60, final_learning_rate=5e-6)
    for step in range(100):
        if step < 10:
            first = 5e-5 / 11
            expected = first + (5e-5 - first) * step / 10
        else:
            share = 0.5 * (1 + math.cos(math.pi * min(step - 10, 50) / 50))
            expected = 5e-5 * ((1 - 0.1) * share + 0.1)
        assert 5e-5 * schedule(given, step) == pytest.approx(expected, rel=1e-12), step
    assert schedule(stage(), 100) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"final_learning_rate": 2e-3}, "final_learning_rate: expected at most learning_rate 0.001, got 0.002"),
        ({"warmup_steps": 9, "decay_steps": 9}, "decay_steps: expected more than warmup_steps 9"),
        ({"learning_rates": {"expert": 0.0}}, "greater than 0"),
        ({"train": []}, "at least 1"),
        ({"betas": [0.9, 1.0]}, "less than 1"),
        ({"largest_norm": 0.0}, "greater than 0"),
    ],
)
def test_rates_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        stage(**changes)


def test_each_part_has_its_rate_and_decay_spares_norms_biases_and_tables() -> None:
    given = stage(
        learning_rates={"backbone": 1e-5, "backbone.layers.2.*": 2e-5},
        weight_decay=0.1,
        betas=(0.8, 0.9),
        warmup_steps=1,
    )
    parameters = select_parameters(make_model(), None, given.train)
    optimizer = make_optimizer(parameters, given)
    set_learning_rates(optimizer, given, 0)
    of = {
        name: (group["lr"] * 2, group["weight_decay"], group["betas"])
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    assert of.keys() == parameters.keys()
    assert of["expert.layers.0.mlp.up.weight"] == (1e-3, 0.1, (0.8, 0.9))
    assert of["backbone.layers.0.mlp.up.weight"] == (1e-5, 0.1, (0.8, 0.9))
    assert of["backbone.layers.2.norm1.weight"] == (2e-5, 0.0, (0.8, 0.9))
    assert {of[name][1] for name in ("backbone.embedding.weight", "action_in.bias", "backbone.norm.weight")} == {0.0}
    everywhere = make_optimizer(parameters, given.model_copy(update={"weight_decay_on": "all"}))
    assert {group["weight_decay"] for group in everywhere.param_groups} == {0.1}
    with pytest.raises(ConfigurationError, match=r"learning_rates: among what it trains: expected a part .*'vision'"):
        peaks(parameters, stage(learning_rates={"vision": 1e-4}))


def test_norms_by_part_make_up_the_whole_which_is_clipped() -> None:
    model = make_model()
    parameters = select_parameters(model, None, ("backbone", "expert"))
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, 2.0)
    count = {
        part: sum(p.numel() for n, p in parameters.items() if n.startswith(part)) for part in ("backbone", "action")
    }
    norms = part_norms(parameters)
    assert norms["backbone"] == pytest.approx(2.0 * count["backbone"] ** 0.5)
    assert set(norms) == {"backbone", "expert"}
    total = clip_gradients(parameters.values(), 1.0)
    assert float(total) == pytest.approx(math.hypot(*norms.values()))
    assert math.hypot(*part_norms(parameters).values()) == pytest.approx(1.0, abs=1e-4)


def test_state_goes_on_at_the_rates_of_the_configuration_and_with_its_own_parameters_only(tmp_path: Path) -> None:
    given = stage(weight_decay=0.1)
    parameters = select_parameters(make_model(), None, given.train)
    optimizer = make_optimizer(parameters, given)
    for parameter in list(parameters.values())[1:]:  # one never has a gradient
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    save_run(tmp_path, RunState(step=1), optimizer_tensors(optimizer, parameters), keep=1)
    saved = open_run(tmp_path / "checkpoint-000001")[1]
    changed = make_optimizer(parameters, given.model_copy(update={"learning_rate": 3e-3, "weight_decay": 0.2}))
    load_optimizer(changed, parameters, saved)
    assert {group["peak"] for group in changed.param_groups} == {3e-3}
    assert {group["weight_decay"] for group in changed.param_groups} == {0.0, 0.2}
    assert changed.state.keys() == set(list(parameters.values())[1:])
    for parameter, state in changed.state.items():
        for kind, value in state.items():
            assert torch.equal(value, optimizer.state[parameter][kind]), kind
    other = select_parameters(make_model(), None, ("backbone", "vision"))
    with pytest.raises(ConfigurationError, match=r"expected optimizer state of .* got some of \S+; within a st"):
        load_optimizer(make_optimizer(other, given), other, saved)
