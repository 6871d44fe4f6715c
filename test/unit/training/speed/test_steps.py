"""What the benchmark of training steps compares: the ways that it names, on the same expert gradients."""

import dataclasses

import pytest
import torch
from support.models import CONFIG, DEEP

from training.model import VLA
from training.recipe import recipe_names
from training.speed import steps


def test_ki_gives_the_expert_the_gradients_of_flow_alone_and_the_backbone_its_own() -> None:
    config = dataclasses.replace(DEEP, vocab_size=64)
    calls = steps.make_calls(config, rows=2, noise_samples=2)
    assert set(calls) == set(steps.WAYS)
    trained = calls["KI"].args[0].model  # type: ignore[attr-defined]
    with torch.no_grad():  # the expert's branches start closed, and would hide what it reads
        for name, parameter in trained.named_parameters():
            if name.endswith("dense.bias"):
                parameter.fill_(0.5)
    found = {}
    for name, call in calls.items():
        call()
        found[name] = {n: p.grad.clone() for n, p in trained.named_parameters() if p.grad is not None}
    for name, gradient in found["flow, frozen"].items():
        torch.testing.assert_close(found["KI"][name], gradient, atol=1e-5, rtol=1e-4)
    assert not any(name.startswith(("vision", "backbone")) for name in found["flow, frozen"])
    key = "backbone.layers.0.attention.k.weight"
    assert not torch.equal(found["KI"][key], found["flow, end to end"][key])


@pytest.mark.slow
def test_every_recipe_has_a_step_of_what_it_draws_and_learns() -> None:
    config = CONFIG
    calls = dict(steps.recipe_calls(recipe_names(), config, rows=2, noise_samples=2))
    assert {name.partition(":")[0] for name in calls} == set(recipe_names())
    assert {name for name in calls if ":" in name} == {"pi05_staged: tokens", "pi05_staged: flow"}
    lengths = {}
    for name, call in calls.items():
        losses, stage, (robot, *questions) = call.args  # type: ignore[attr-defined]
        call()
        learned = {part for part in ("backbone", "action_in") if any_gradient(losses.model, part)}
        assert learned == {"frozen": {"action_in"}, "pi0_fast": {"backbone"}, "pi05_staged: tokens": {"backbone"}}.get(
            name, {"backbone", "action_in"}
        )
        assert bool(questions) == bool(stage.losses.keys() & {"text", "tokens"})
        lengths[name] = 0 if robot.postfix_BT is None else int(robot.fast_mask_BT.sum(dim=1).max())
    assert (lengths["pi0"], lengths["oft"], lengths["ki"]) == (0, 0, steps.FAST)
    assert lengths["ki_naive_tokens"] == config.horizon * config.action_dim
    assert lengths["ki_naive_tokens_stride"] == 2 * config.action_dim, "the first action and the last, of 5"


def any_gradient(model: VLA, part: str) -> bool:
    return any(p.grad is not None for name, p in model.named_parameters() if name.startswith(part))
