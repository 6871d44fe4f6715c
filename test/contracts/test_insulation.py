"""Knowledge insulation: what the flow loss may teach, and what action tokens and expert see of each other.

All models are away from their initial values: at those, the expert's branches are closed, and no leak would show.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.models import BATCH, CONFIG, POSTFIX, make_batch, make_model, prefix_of, run
from support.recipes import tiny_run
from torch import Tensor

from training.config import StageConfig, TrainingConfig
from training.data.batch import Batch
from training.losses.hints import TrainingHeads
from training.losses.step import BatchLosses
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
@pytest.mark.parametrize("with_postfix", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_flow_loss_never_reaches_the_backbone(repeats: int, with_postfix: bool, training: bool) -> None:
    model, batch = make_model().train(training), make_batch(repeats=repeats)
    if not with_postfix:
        batch = {name: tensor for name, tensor in batch.items() if not name.startswith("postfix")}
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


# --- the trainer's joint step: `prefix_rows`, a probed layer, hints, and losses drawn by the stage

BACKBONE = ("vision.", "projector.", "backbone.")
TOKENS = {"text": 1.0, "fast": 1.0, "pointing": 1.0, "grounding": 1.0, "readout": 1.0}


def joint_losses(tmp_path: Path) -> tuple[BatchLosses, Batch]:
    """The trainer's losses over a batch that has targets for all hints, FAST and flow; the probe is in layer 1 of 3.

    Of the second sample's postfix, only the first token counts.
    """
    config = TrainingConfig.model_validate(tiny_run(tmp_path, steps=1))
    model, given = make_model(dataclasses.replace(CONFIG, state_dim=CONFIG.action_dim)), make_batch()
    assert config.hints is not None and config.hints.probe_layer == 1 < CONFIG.backbone.depth - 1
    frequencies = config.hints.readout_frequencies
    heads = TrainingHeads(
        CONFIG.vision.width, CONFIG.backbone.width, 4, frequencies, CONFIG.action_dim, CONFIG.action_dim
    )
    images, image_mask, tokens, token_mask = prefix_of(given)
    batch = Batch(
        images,
        torch.ones_like(image_mask),
        tokens,
        token_mask,
        given["postfix_BT"],
        fast_mask_BT=torch.arange(POSTFIX) < torch.tensor([[POSTFIX], [1]]),
        text_mask_BT=(torch.arange(POSTFIX) < 1).expand(BATCH, -1),
        asking_BR=torch.arange(frequencies).expand(BATCH, -1),
        place_B2=torch.tensor([[0.2, 0.3], [0.7, 0.9]]),
        target_cell_B=torch.tensor([0, 3]),
        readout_BKA=torch.randn(BATCH, frequencies, CONFIG.action_dim),
        action_BHA=torch.randn(BATCH, CONFIG.horizon, CONFIG.action_dim),
        state_BS=torch.randn(BATCH, CONFIG.action_dim),
    )
    return BatchLosses(model.train(), heads, config), batch


def stage_of(weights: dict[str, float], insulate: bool = True) -> StageConfig:
    given = {"name": "joint", "steps": 1, "learning_rate": 1e-3, "train": ["backbone"], "sources": {"robot": BATCH}}
    samples = 1 if weights.keys() == {"fast", "flow"} else 2
    return StageConfig.model_validate(given | {"losses": weights, "insulate": insulate, "noise_samples": samples})


def joint_gradients(losses: BatchLosses, batch: Batch, weights: dict[str, float], insulate: bool) -> dict[str, Tensor]:
    stage = stage_of(weights, insulate)
    [whole] = losses.split(batch, stage, np.random.default_rng(0))
    found = losses(whole, stage)
    assert found.keys() == weights.keys()
    return gradients(losses.model, torch.stack([weights[name] * loss for name, loss in found.items()]).sum())


def test_the_joint_step_gives_the_backbone_the_gradients_of_a_step_without_the_expert(tmp_path: Path) -> None:
    losses, batch = joint_losses(tmp_path)
    joint = joint_gradients(losses, batch, TOKENS | {"flow": 1.0}, insulate=True)
    alone = joint_gradients(losses, batch, TOKENS, insulate=True)
    for name, gradient in joint.items():
        if name.startswith(BACKBONE):
            assert torch.equal(gradient, alone[name]), name
        else:
            assert gradient.count_nonzero() and not alone[name].count_nonzero(), name
    flow = joint_gradients(losses, batch, {"flow": 1.0}, insulate=True)
    assert [name for name, gradient in flow.items() if name.startswith(BACKBONE) and gradient.count_nonzero()] == []


@pytest.mark.parametrize("in_pieces", [True, False])
def test_insulation_needs_no_hints(tmp_path: Path, in_pieces: bool) -> None:
    losses, batch = joint_losses(tmp_path)
    parallel = losses.config.parallel.model_copy(update={"activation_checkpointing": in_pieces})
    config = losses.config.model_copy(update={"hints": None, "parallel": parallel})
    without = BatchLosses(losses.model, None, config)
    joint = joint_gradients(without, batch, {"fast": 1.0, "flow": 1.0}, insulate=True)
    alone = joint_gradients(without, batch, {"fast": 1.0}, insulate=True)
    assert [name for name in joint if name.startswith(BACKBONE) and not torch.equal(joint[name], alone[name])] == []


def test_the_joint_step_without_insulation_trains_all_that_the_expert_reads(tmp_path: Path) -> None:
    losses, batch = joint_losses(tmp_path)
    flow = joint_gradients(losses, batch, {"flow": 1.0}, insulate=False)
    untouched = {name for name, g in flow.items() if not g.count_nonzero() and not name.endswith("k.bias")}
    assert untouched == {name for name in flow if name.startswith(UNREAD)}


@pytest.mark.parametrize("insulate", [True, False])
def test_a_step_without_a_token_loss_runs_no_token_of_the_postfix(tmp_path: Path, insulate: bool) -> None:
    losses, batch = joint_losses(tmp_path)
    whole, rows = joint_gradients(losses, batch, {"flow": 1.0}, insulate), []
    losses.model.backbone.layers[0].register_forward_hook(lambda *given: rows.append(given[1][0].shape[1]))
    again = joint_gradients(losses, batch, {"flow": 1.0}, insulate)
    prefix = CONFIG.vision.tokens * batch.images_BVCHW.shape[1] + batch.tokens_BL.shape[1]
    assert rows == [prefix]
    assert all(torch.equal(gradient, again[name]) for name, gradient in whole.items())
    joint_gradients(losses, batch, {"fast": 1.0, "flow": 1.0}, insulate)
    assert rows == [prefix, prefix + POSTFIX]


def test_the_joint_steps_fast_loss_is_that_of_a_whole_forward_pass(tmp_path: Path) -> None:
    """Each token that counts, the first too, against the logits of the token before it, one by one."""
    losses, batch = joint_losses(tmp_path)
    model, postfix, mask = losses.model, batch.postfix_BT, batch.fast_mask_BT
    assert postfix is not None and mask is not None
    joint = joint_gradients(losses, batch, {"fast": 1.0}, insulate=True)
    output = model(*batch.prefix, postfix, mask)
    surprises = []
    for b, t in mask.nonzero().tolist():
        last = int(batch.last_token_B[b]) - batch.tokens_BL.shape[1]
        hidden = output.postfix_hidden_BTD[b, t - 1] if t else output.prefix_hidden_BPD[b, last]
        surprises.append(-model.logits(hidden).log_softmax(-1)[postfix[b, t]])
    assert len(surprises) == POSTFIX + 1
    whole = gradients(model, torch.stack(surprises).mean())
    for name, gradient in whole.items():
        torch.testing.assert_close(joint[name], gradient, atol=1e-6, rtol=1e-4, msg=lambda m: f"{name}: {m}")  # noqa: B023
        assert gradient.count_nonzero() or not name.startswith(BACKBONE) or name.endswith("k.bias"), name


def test_the_flow_loss_is_that_of_its_rows_one_by_one(tmp_path: Path) -> None:
    """Each row reads the prefix and the state of its own sample, in `joint` and in `flow_alone`."""
    losses, batch = joint_losses(tmp_path)
    model, stage = losses.model, stage_of({"flow": 1.0})
    x_t, time, target, learned = losses.draw_flow(batch, 2, np.random.default_rng(0))
    assert batch.action_BHA is not None and batch.state_BS is not None
    errors = []
    for row in range(2 * BATCH):
        b = slice(row // 2, row // 2 + 1)
        torch.testing.assert_close(x_t[row] - time[row, :, None] * target[row], batch.action_BHA[row // 2])
        cache = model.prefill(*(tensor[b] for tensor in batch.prefix))
        velocity = model.velocity(cache, x_t[row : row + 1], time[row : row + 1], batch.state_BS[b])[0]
        errors.append(((velocity - target[row]) ** 2)[learned[row]])
    slow = gradients(model, torch.cat(errors).mean())
    [whole] = losses.split(batch, stage, np.random.default_rng(0))
    for found in (losses.joint, losses.flow_alone):
        quick = gradients(model, found(whole, stage)["flow"])
        for name, gradient in slow.items():
            if name.startswith(BACKBONE):
                assert not quick[name].count_nonzero(), name
            else:
                assert gradient.count_nonzero(), name
                torch.testing.assert_close(quick[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda m: f"{name}: {m}")  # noqa: B023
