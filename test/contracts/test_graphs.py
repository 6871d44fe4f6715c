"""The arranged graphs against the model that they are made from."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.checkpoints import small_policy
from support.models import CONFIG, make_batch, make_model, prefix_of
from torch.utils.flop_counter import FlopCounterMode

from training.export.graphs import StepTime, arrange, cast_weights, describe_graphs, modulations, on_meta
from training.model.expert import Conditioning
from training.model.vla import VLA

TIME = 0.75


def small_model(conditioning: Conditioning, state_dim: int | None) -> VLA:
    return make_model(dataclasses.replace(CONFIG, conditioning=conditioning, state_dim=state_dim))


@pytest.mark.parametrize(("conditioning", "state_dim"), [("adarms", None), ("adarms", 4), ("concat", 4)])
@pytest.mark.parametrize("clean_actions", [0, 2])
def test_one_step_equals_the_models_with_a_time_for_each_action(
    conditioning: Conditioning, state_dim: int | None, clean_actions: int
) -> None:
    model, batch = small_model(conditioning, state_dim), make_batch(state_dim)
    prefill, expert = arrange(model, CONFIG.vocab_size)
    clean = torch.arange(CONFIG.horizon) < clean_actions
    x_t, state = batch["x_t"][1], batch["state"][1] if state_dim else None
    with torch.no_grad():
        cache = model.prefill(*(part[1:] for part in prefix_of(batch)))
        time = torch.where(clean, 0.0, TIME)
        expected = model.velocity(cache, x_t[None], time[None], None if state is None else state[None])[0]
        ours = prefill(*(part[1] for part in prefix_of(batch)))
        row = modulations(model.expert, torch.tensor([TIME]))[0]
        velocity, after = expert(*ours, x_t, row, clean, torch.tensor([0.1]), state)
    for got, wanted in zip(ours, (cache.keys_NBKPD[:, 0], cache.values_NBKPD[:, 0], cache.mask_BP[0]), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(after[:clean_actions], x_t[:clean_actions])
    torch.testing.assert_close(after[clean_actions:], (x_t - 0.1 * expected)[clean_actions:], atol=1e-5, rtol=1e-5)


def test_the_time_matters_to_both_kinds_of_conditioning() -> None:
    """Otherwise the test above would pass without it."""
    for conditioning, state_dim in (("adarms", None), ("concat", 4)):
        model, batch = small_model(conditioning, state_dim), make_batch(state_dim)  # type: ignore[arg-type]
        expert = arrange(model, CONFIG.vocab_size)[1].model
        cache = model.prefill(*prefix_of(batch))
        found = []
        for clean in (False, True):
            time = StepTime(modulations(model.expert, torch.tensor([TIME]))[0], torch.full((CONFIG.horizon,), clean))
            found.append(expert.velocity(cache, batch["x_t"], time, batch.get("state")))
        assert (found[0] - found[1]).abs().max() > 1e-2


def test_operations_are_counted_for_each_graph() -> None:
    model, batch = small_model("adarms", None), make_batch()
    policy = small_policy("text").model_copy(update={"horizon": CONFIG.horizon})
    graph = describe_graphs(model, policy, CONFIG.vocab_size)
    cameras, length = len(policy.cameras), policy.prompt.length
    # On "meta", because the CPU's attention is a single operation that the counter does not know.
    prefix = [
        torch.ones(1, cameras, 3, 24, 24, device="meta"),
        torch.ones(1, cameras, dtype=torch.bool, device="meta"),
        torch.ones(1, length, dtype=torch.long, device="meta"),
        torch.ones(1, length, dtype=torch.bool, device="meta"),
    ]
    whole = on_meta(model)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        cache = whole.prefill(*prefix)
        # In the last layer the model computes only keys and values, as the graph does.
        assert graph.prefill_flops == counter.get_total_flops()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        whole.velocity(cache, batch["x_t"][:1].to("meta"), batch["time"][:1].to("meta"))
    # The model also computes the time layers, whose result the graph looks up.
    width, horizon, layers = CONFIG.expert.width, CONFIG.horizon, 2 * CONFIG.expert.depth + 1
    assert graph.step_flops == counter.get_total_flops() - 2 * horizon * width * (2 * width + layers * 3 * width)


@pytest.mark.parametrize(("conditioning", "state_dim"), [("adarms", None), ("concat", 4)])
def test_the_model_itself_runs_in_bfloat16(conditioning: Conditioning, state_dim: int | None) -> None:
    model, batch = small_model(conditioning, state_dim), make_batch(state_dim)
    with torch.no_grad():
        wide = model.sample_actions(model.prefill(*prefix_of(batch)), batch["x_t"], 4, batch.get("state"))
        half = cast_weights(model, torch.bfloat16)
        found = half.sample_actions(half.prefill(*prefix_of(batch)), batch["x_t"], 4, batch.get("state"))
    assert found.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(wide.flatten(1), found.flatten(1)).min() > 0.999
