"""Knowledge insulation: what the flow loss may teach, and what action tokens and expert see of each other."""

import pytest
import torch
import torch.nn.functional as F
from support.models import BATCH, CONFIG, POSTFIX, make_batch, make_model, run
from torch import Tensor

from training.model.vla import VLA, Output

EXPERT_SIDE = ("expert.", "action_in.", "action_out.")
LAST = f"backbone.layers.{CONFIG.backbone.depth - 1}"
UNREAD = (f"{LAST}.attention.q", f"{LAST}.attention.out", f"{LAST}.norm2", f"{LAST}.mlp", "backbone.norm")
"""What comes after the last layer's keys and values: no expert reads it, with or without insulation."""


def flow_loss(output: Output) -> Tensor:
    assert output.velocity_RHA is not None
    return F.mse_loss(output.velocity_RHA, torch.ones_like(output.velocity_RHA))


def text_loss(model: VLA, output: Output, batch: dict[str, Tensor]) -> Tensor:
    assert output.postfix_hidden_BTD is not None
    logits = model.logits(output.postfix_hidden_BTD[:, :-1])
    valid = batch["postfix_mask_BT"][:, 1:]
    return F.cross_entropy(logits[valid], batch["postfix_BT"][:, 1:][valid])


def gradients(model: VLA, loss: Tensor) -> dict[str, Tensor]:
    """Gradient of every weight; zeros where the loss does not reach it."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("repeats", [1, 3])
def test_flow_loss_never_reaches_the_backbone(repeats: int) -> None:
    model, batch = make_model(), make_batch(repeats=repeats)
    found = gradients(model, flow_loss(model(**batch)))
    knowledge = {name: g for name, g in found.items() if not name.startswith(EXPERT_SIDE)}
    assert {name.split(".")[0] for name in knowledge} == {"vision", "projector", "backbone"}
    assert [name for name, gradient in knowledge.items() if gradient.count_nonzero()] == []
    assert [name for name, g in found.items() if name.startswith(EXPERT_SIDE) and not g.count_nonzero()] == []


def test_without_insulation_flow_loss_reaches_every_weight_that_it_reads() -> None:
    model, batch = make_model(), make_batch()
    found = gradients(model, flow_loss(model(**batch, insulate=False)))
    # A key's bias shifts all scores of a row equally, so the softmax hides it: SigLIP's gradient there is rounding.
    untouched = {name for name, g in found.items() if not g.count_nonzero() and not name.endswith("k.bias")}
    assert untouched == {name for name in found if name.startswith(UNREAD)}


def test_insulation_changes_no_output() -> None:
    model, batch = make_model(), make_batch()
    with torch.no_grad():
        insulated, open_ = model(**batch), model(**batch, insulate=False)
    assert torch.equal(insulated.velocity_RHA, open_.velocity_RHA)
    assert torch.equal(insulated.postfix_hidden_BTD, open_.postfix_hidden_BTD)


def test_text_gradients_are_the_same_with_and_without_the_expert() -> None:
    model, batch = make_model(), make_batch()
    backbone_only = {name: tensor for name, tensor in batch.items() if name not in ("x_t", "time")}
    alone = gradients(model, text_loss(model, model(**backbone_only), batch))
    output = model(**batch)
    joint = gradients(model, text_loss(model, output, batch) + flow_loss(output))
    for name, gradient in alone.items():
        if name.startswith(EXPERT_SIDE):
            assert not gradient.count_nonzero() and joint[name].count_nonzero()
        else:
            assert torch.equal(gradient, joint[name]), name
    # The trap: detaching keys and values before one shared attention would also silence these.
    for layer in range(CONFIG.backbone.depth):
        for part in "kv":
            assert joint[f"backbone.layers.{layer}.attention.{part}.weight"].count_nonzero()


def test_expert_does_not_see_the_postfix() -> None:
    model, batch = make_model(), make_batch()
    before = run(model, batch).velocity_RHA
    assert before is not None
    other = batch | {"postfix_BT": (batch["postfix_BT"] + 1) % 50, "postfix_mask_BT": ~batch["postfix_mask_BT"]}
    assert torch.equal(run(model, other).velocity_RHA, before)  # type: ignore[arg-type]
    absent = {name: tensor for name, tensor in batch.items() if not name.startswith("postfix")}
    torch.testing.assert_close(run(model, absent).velocity_RHA, before, atol=1e-6, rtol=1e-6)


def test_backbone_does_not_see_the_expert() -> None:
    model, batch = make_model(), make_batch()
    before = run(model, batch)
    after = run(model, batch | {"x_t": batch["x_t"] + 1.0, "time": batch["time"] * 0.5})
    assert not torch.equal(before.velocity_RHA, after.velocity_RHA)  # type: ignore[arg-type]
    assert torch.equal(before.postfix_hidden_BTD, after.postfix_hidden_BTD)  # type: ignore[arg-type]
    assert torch.equal(before.prefix_hidden_BPD, after.prefix_hidden_BPD)


@pytest.mark.parametrize("insulate", [True, False])
def test_derivatives_between_action_tokens_and_expert_are_zero(insulate: bool) -> None:
    model, batch = make_model(), make_batch()
    batch["x_t"].requires_grad_()
    embedded: list[Tensor] = []
    embed = model.backbone.embed

    def keep(tokens: Tensor) -> Tensor:
        embedded.append(embed(tokens).detach().requires_grad_())
        return embedded[-1]

    model.backbone.embed = keep  # type: ignore[method-assign]
    output = model(**batch, insulate=insulate)
    prompt, postfix = embedded
    assert prompt.shape[1] != postfix.shape[1] == POSTFIX
    reached = torch.autograd.grad(output.velocity_RHA.sum(), (postfix, prompt), retain_graph=True, allow_unused=True)
    assert reached[0] is None or not reached[0].count_nonzero()
    assert (reached[1] is not None and bool(reached[1].count_nonzero())) != insulate
    towards = torch.autograd.grad(output.postfix_hidden_BTD.sum(), (batch["x_t"],), allow_unused=True)[0]
    assert towards is None or not towards.count_nonzero()


def test_postfix_is_causal_and_prefix_does_not_see_it() -> None:
    model, batch = make_model(), make_batch()
    before = run(model, batch)
    batch["postfix_BT"] = batch["postfix_BT"].clone()
    batch["postfix_BT"][:, 2] = (batch["postfix_BT"][:, 2] + 1) % 50
    after = run(model, batch)
    assert before.postfix_hidden_BTD is not None and after.postfix_hidden_BTD is not None
    moved = (before.postfix_hidden_BTD != after.postfix_hidden_BTD).any(dim=-1)
    assert torch.equal(moved, (torch.arange(POSTFIX) >= 2).expand(BATCH, -1))
    assert torch.equal(before.prefix_hidden_BPD, after.prefix_hidden_BPD)
