"""Gradients from pieces of a step's batches against those of the whole batches in one pass."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from support.models import CONFIG, make_model
from support.toy_training import toy_stage
from torch import Tensor

from training.config import HintsConfig, ParallelConfig, StageConfig, TrainingConfig
from training.data import NO_TARGET, Batch
from training.losses import BatchLosses, TrainingHeads
from training.train import Trainer

ROWS, VIEWS, PROMPT, POSTFIX, CELLS, CLASSES, READOUTS = 5, 2, 6, 4, 4, 4, 4
BACKBONE = {"text": 0.5, "fast": 1.5, "pointing": 1.0, "grounding": 2.0, "readout": 1.0}
ALL = {"losses": BACKBONE | {"flow": 3.0, "cells": 1.0}, "train": ["vision", "backbone", "heads", "expert"]}
STAGES = {
    "joint": ALL,
    "not insulated": ALL | {"insulate": False},
    "flow alone": {"losses": {"flow": 1.0}, "train": ["expert"]},
    "one cross-entropy": {"losses": {"tokens": 2.0, "flow": 1.0}, "train": ["vision", "backbone", "expert"]},
    "regression": {
        "losses": {"text": 1.0, "regression": 2.0},
        "train": ["vision", "backbone", "expert"],
        "noise_samples": 1,
    },
    "no hints": {"losses": {"fast": 1.0, "flow": 1.0}, "train": ["backbone", "expert"]},
}


def make_batches() -> list[Batch]:
    """Robots of different widths with unknown ends, beside language; no two samples have as much that counts."""
    drawn = torch.Generator().manual_seed(3)

    def prefix(rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        lengths = torch.arange(rows) % 3 + READOUTS
        return (
            torch.rand(rows, VIEWS, 3, 24, 24, generator=drawn) * 2 - 1,
            torch.arange(VIEWS) >= (torch.arange(rows) % 2)[:, None],  # every second sample lacks the first camera
            torch.randint(0, CONFIG.vocab_size, (rows, PROMPT), generator=drawn),
            torch.arange(PROMPT) < lengths[:, None],
        )

    def words(*lengths: int) -> dict[str, Tensor]:
        tokens = torch.randint(0, CONFIG.vocab_size, (len(lengths), POSTFIX), generator=drawn)
        return {"postfix_BT": tokens, "mask": torch.arange(POSTFIX) < torch.tensor(lengths)[:, None]}

    cells = torch.randint(0, CLASSES, (ROWS, VIEWS, CELLS), generator=drawn)
    cells[1], cells[2, 0], cells[4] = NO_TARGET, NO_TARGET, CLASSES - 1
    readout = torch.randn(ROWS, READOUTS, CONFIG.action_dim, generator=drawn)
    readout[[0, 1, 4]] = torch.nan
    fast, text = words(4, 0, 2, 1, 0), words(3, 0)
    robots = Batch(
        *prefix(ROWS),
        postfix_BT=fast["postfix_BT"],
        fast_mask_BT=fast["mask"],
        asking_BR=torch.arange(READOUTS).expand(ROWS, -1),
        place_B2=torch.tensor([[0.2, 0.3], [torch.nan] * 2, [0.7, 0.9], [0.6, 0.1], [torch.nan] * 2]),
        target_cell_B=torch.tensor([0, NO_TARGET, NO_TARGET, 3, NO_TARGET]),
        cells_BVN=cells,
        readout_BKA=readout,
        action_BHA=torch.randn(ROWS, CONFIG.horizon, CONFIG.action_dim, generator=drawn),
        state_BS=torch.randn(ROWS, CONFIG.action_dim, generator=drawn),
        known_BH=torch.arange(CONFIG.horizon) < torch.tensor([5, 2, 0, 4, 1])[:, None],
        weight_BA=torch.tensor([[1.0, 1.0, 1.0]] * 2 + [[1.0, 0.1, 0.1]] * 2 + [[1.0, 1.0, 0.1]]),
    )
    language = Batch(*prefix(2), postfix_BT=text["postfix_BT"], text_mask_BT=text["mask"])
    return [robots, language]


def make_trainer(checkpointed: bool = False) -> Trainer:
    """Fields of the configuration that no step needs are left out."""
    config = TrainingConfig.model_construct(
        seed=0,
        out=Path("nowhere"),
        parallel=ParallelConfig(activation_checkpointing=checkpointed),
        stages=(),
        max_prefix_delay=3,
        prefix_lead=1.0,
        hints=HintsConfig(readout_frequencies=READOUTS, probe_layer=1, cell_classes=CLASSES),
    )
    model = make_model(dataclasses.replace(CONFIG, state_dim=CONFIG.action_dim)).train()
    torch.manual_seed(2)
    heads = TrainingHeads(
        CONFIG.vision.width, CONFIG.backbone.width, CLASSES, READOUTS, CONFIG.action_dim, CONFIG.action_dim
    )
    return Trainer(config, model, heads, {}, BatchLosses(model, heads, config), dict)


def take_step(trainer: Trainer, stage: StageConfig, batches: list[Batch]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The losses by name, and every gradient that the step leaves."""
    chosen = trainer.choose(stage)
    for parameter in chosen.values():
        parameter.grad = None
    values = trainer.accumulate_gradients(stage, batches, np.random.default_rng(7))
    return values, {name: p.grad.clone() for name, p in chosen.items() if p.grad is not None}


@pytest.mark.parametrize("pieces", [2, 3, 5])
@pytest.mark.parametrize("case", STAGES)
def test_pieces_give_the_gradients_of_the_whole_batch(case: str, pieces: int) -> None:
    trainer = make_trainer(checkpointed=pieces == 3)
    settings = {"noise_samples": 2} | STAGES[case] | {"sources": {"robot": ROWS, "language": 2}}
    batches = make_batches() if settings["losses"].keys() & {"text", "tokens"} else make_batches()[:1]
    whole, gradients = take_step(trainer, toy_stage(**settings), batches)
    values, pieced = take_step(trainer, toy_stage(**settings, accumulate=pieces), batches)
    assert values.keys() == whole.keys() == settings["losses"].keys() and all(value > 0 for value in whole.values())
    assert values == pytest.approx(whole, rel=1e-5)
    assert pieced.keys() == gradients.keys() and sum(bool(g.count_nonzero()) for g in gradients.values()) > 10
    for name, gradient in gradients.items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(
            pieced[name] / scale,
            gradient / scale,
            atol=2e-6,
            rtol=1e-4,
            msg=lambda m: f"{name}: {m}",  # noqa: B023
        )


@pytest.mark.parametrize("pieces", [1, 2])
def test_one_cross_entropy_is_one_mean_over_the_tokens_of_all_sources(pieces: int) -> None:
    """As in the paper: three words count as much as three action tokens, whichever batch they came in."""
    trainer, batches, surprises = make_trainer(), make_batches(), []
    for batch in batches:
        mask_BT = batch.fast_mask_BT if batch.text_mask_BT is None else batch.text_mask_BT
        output = trainer.model(*batch.prefix, batch.postfix_BT, mask_BT)
        for b, t in mask_BT.nonzero().tolist():
            last = int(batch.last_token_B[b]) - PROMPT
            hidden = output.postfix_hidden_BTD[b, t - 1] if t else output.prefix_hidden_BPD[b, last]
            surprises.append(-trainer.model.logits(hidden).log_softmax(-1)[batch.postfix_BT[b, t]])
    assert len(surprises) == 7 + 3
    expected = torch.stack(surprises).mean()
    settings = {"sources": {"robot": ROWS, "language": 2}, "train": ["vision", "backbone"], "accumulate": pieces}
    stage = toy_stage(losses={"tokens": 1.0}, **settings)
    chosen = trainer.choose(stage)
    slow = torch.autograd.grad(expected, list(chosen.values()), allow_unused=True)
    values, gradients = take_step(trainer, stage, batches)
    assert values == pytest.approx({"tokens": float(expected.detach())}, rel=1e-5)
    for name, gradient in zip(chosen, slow, strict=True):
        if gradient is not None:
            torch.testing.assert_close(gradients[name], gradient, atol=2e-6, rtol=1e-3, msg=lambda m: f"{name}: {m}")  # noqa: B023
    # Beside it today's two losses, each the mean over its own batch.
    separate, _ = take_step(trainer, toy_stage(losses={"text": 1.0, "fast": 1.0}, **settings), batches)
    assert (7 * separate["fast"] + 3 * separate["text"]) / 10 == pytest.approx(values["tokens"], rel=1e-5)


def test_one_cross_entropy_is_over_the_tokens_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are averaged over the processes, so each divides by their mean count of tokens."""
    trainer, batches = make_trainer(), make_batches()
    stage = toy_stage(losses={"tokens": 1.0}, train=["backbone"], sources={"robot": ROWS, "language": 2})
    alone, _ = take_step(trainer, stage, batches)
    monkeypatch.setattr("training.train.mean_of_processes", lambda own: (own + 5.0) / 2)  # another process has 5
    one_of_two, _ = take_step(trainer, stage, batches)
    assert one_of_two["tokens"] == pytest.approx(alone["tokens"] * 10 / 7.5, rel=1e-5)


def test_one_cross_entropy_beside_the_two_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"losses: expected tokens, .*, or text and fast, got tokens and fast"):
        toy_stage(losses={"tokens": 1.0, "fast": 1.0})


def test_a_batch_is_cut_into_pieces_as_alike_as_can_be() -> None:
    trainer, (robots, language) = make_trainer(), make_batches()
    settings = ALL | {"sources": {"robot": ROWS, "language": 2}, "noise_samples": 3}

    def sizes(batch: Batch, pieces: int) -> list[int]:
        stage = toy_stage(**settings, accumulate=pieces)
        return [len(p.batch.tokens_BL) for p in trainer.losses.split(batch, stage, np.random.default_rng(0))]

    assert sizes(robots, 1) == [5] and sizes(robots, 3) == [2, 2, 1] and sizes(robots, 5) == [1] * 5
    assert sizes(robots, 4) == [2, 1, 1, 1], "four pieces, not three of two"
    assert sizes(language, 3) == [1, 1], "a smaller source has as many pieces as it has samples"


def test_more_pieces_than_samples_are_refused() -> None:
    assert toy_stage(sources={"robot": 4, "words": 2}, accumulate=4).accumulate == 4
    with pytest.raises(ValidationError, match=r"accumulate: expected at most 4, the samples .* got 5; a piece has"):
        toy_stage(sources={"robot": 4, "words": 2}, accumulate=5)
