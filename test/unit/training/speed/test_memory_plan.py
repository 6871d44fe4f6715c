"""The memory plan at a size that can be counted by hand, and against a step that is really taken."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from training.config import ParallelConfig
from training.model.gemma import GemmaConfig
from training.model.siglip import VisionConfig
from training.model.vla import VLAConfig
from training.speed import memory as memory_plan
from training.speed.memory import Step, cards, empty_model

MODEL = VLAConfig(
    vision=VisionConfig(image_size=28, patch_size=14, width=32, depth=4, heads=2, mlp=128),
    backbone=GemmaConfig(width=64, depth=4, mlp=256, heads=2, kv_heads=1, head_dim=32),
    expert=GemmaConfig(width=32, depth=4, mlp=128, heads=2, kv_heads=1, head_dim=32),
    vocab_size=64,
    action_dim=8,
    horizon=8,
)
STEP = Step(MODEL, gpus=1, batch=16, parallel=ParallelConfig(shard=True, dtype="bfloat16"))
COUNT = sum(parameter.numel() for parameter in empty_model(STEP).parameters())


predict = cache(memory_plan.predict)


def checkpointed(step: Step) -> Step:
    return replace(step, parallel=step.parallel.model_copy(update={"activation_checkpointing": True}))


@pytest.mark.slow
def test_parameters_gradients_and_moments_are_float32_shards() -> None:
    for gpus in (1, 4):
        found = predict(replace(STEP, gpus=gpus))
        assert found.parameters == found.gradients == pytest.approx(4 * COUNT / gpus, rel=0.02)  # padding
        assert found.optimizer == pytest.approx(8 * COUNT / gpus, rel=0.02)
        # Only gradients can be missing at the peak.
        assert found.peak >= found.parameters + found.optimizer + found.gathered + found.activations
        assert found.offloaded_peak < found.peak


@pytest.mark.slow
def test_checkpointing_keeps_less_than_half_of_the_activations() -> None:
    assert predict(checkpointed(STEP)).activations < 0.5 * predict(STEP).activations


def test_the_step_that_is_measured_lowers_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same batch, with AdamW and with SGD during the backward pass: so what is measured is a real step."""
    monkeypatch.setattr(memory_plan, "SGD_RATE", 0.1)
    for step in (checkpointed(STEP), replace(checkpointed(STEP), recipe=False)):
        torch.manual_seed(0)
        found = memory_plan.measure(step)
        assert found.loss_after < found.loss_before


def test_a_card_is_named_with_its_reserve() -> None:
    assert [cards(int(size * memory_plan.GIB)) for size in (21, 22, 71, 126, 127)] == [
        "24 GB",
        "40 GB",
        "80 GB",
        "141 GB",
        "none",
    ]
