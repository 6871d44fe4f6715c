"""A trainer of the small model on random samples: no robot, no data set, no simulator."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.random import Generator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from support.models import CONFIG, make_model
from training.config import ParallelConfig, StageConfig, TrainingConfig
from training.data import Batch
from training.losses import BatchLosses
from training.model import VLA, VLAConfig
from training.train import Trainer

PROMPT, POSTFIX = 6, 5


class RandomSamples:
    """Samples with prompts and FAST postfixes of different lengths, and actions."""

    def __init__(self, config: VLAConfig = CONFIG) -> None:
        self.config = config

    def draw(self, count: int, rng: Generator, action_tokens: bool = True) -> Batch:
        size, vocabulary = self.config.vision.image_size, self.config.vocab_size
        tokens, fast = (rng.integers(2, longest + 1, count) for longest in (PROMPT, POSTFIX))
        state_dim = self.config.state_dim
        return Batch(
            images_BVCHW=torch.from_numpy(rng.uniform(-1, 1, (count, 2, 3, size, size)).astype(np.float32)),
            image_mask_BV=torch.ones(count, 2, dtype=torch.bool),
            tokens_BL=torch.from_numpy(rng.integers(0, vocabulary, (count, PROMPT))),
            token_mask_BL=torch.arange(PROMPT) < torch.from_numpy(tokens)[:, None],
            postfix_BT=torch.from_numpy(rng.integers(0, vocabulary, (count, POSTFIX))),
            fast_mask_BT=torch.arange(POSTFIX) < torch.from_numpy(fast)[:, None],
            action_BHA=torch.from_numpy(
                rng.standard_normal((count, self.config.horizon, self.config.action_dim)).astype(np.float32)
            ),
            state_BS=None
            if state_dim is None
            else torch.from_numpy(rng.standard_normal((count, state_dim)).astype(np.float32)),
        )


def toy_stage(**changes: Any) -> StageConfig:
    given = {
        "name": "toy",
        "steps": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "losses": {"fast": 1.0, "flow": 1.0},
        "train": ["vision", "backbone", "expert"],
        "sources": {"robot": 2},
        "checkpoint_every": 2,
    }
    return StageConfig.model_validate(given | changes)


def toy_trainer(out: Path, *stages: StageConfig, model: VLA | None = None, **changes: Any) -> Trainer:
    """Fields of the configuration that no toy needs are left out."""
    settings = {"seed": 0, "out": out, "parallel": ParallelConfig(), "stages": stages or (toy_stage(),)}
    config = TrainingConfig.model_construct(**(settings | {"max_prefix_delay": 2} | changes))
    model = make_model().train() if model is None else model
    return Trainer(
        config, model, None, {"robot": RandomSamples(model.config)}, BatchLosses(model, None, config), lambda driven: {}
    )


def run_until(trainer: Trainer, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the trainer, and interrupt it in this step, counted over all stages."""
    real, calls = trainer.accumulate_gradients, itertools.count()

    def stop(*given: Any) -> Any:
        if next(calls) == step:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(trainer, "accumulate_gradients", stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()


def curves(out: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run, by process and name: steps and values."""
    found = {}
    for folder in sorted((out / "tensorboard").iterdir()):
        shown = EventAccumulator(str(folder)).Reload()
        for name in shown.Tags()["scalars"]:
            found[f"{folder.name} {name}"] = [(event.step, event.value) for event in shown.Scalars(name)]
    return found
