"""A small model and the bundle that was made of it, with the programs for the torch engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.bundle.folder import Bundle
from ki_vla_ros.policy.preprocess import make_model_input
from ki_vla_ros.records import ModelInput
from support.bundles import HORIZON, demo_observation
from support.checkpoints import write_checkpoint
from training.export.bundle import export_bundle
from training.model.vla import VLA
from training.weights.checkpoints import load_checkpoint

A = 7
NONE = np.zeros(HORIZON, dtype=np.bool_)  # no action is clean


@dataclass(frozen=True)
class Made:
    """`model` is the one in float32, whatever the bundle's `dtype`."""

    model: VLA
    bundle: Bundle
    given: ModelInput


def make(folder: Path, kind: str, dtype: str = "float32") -> Made:
    checkpoint = write_checkpoint(folder / "checkpoint", kind)
    bundle = export_bundle(checkpoint, folder / "bundle", with_torch=True, dtype=dtype)
    given = make_model_input(bundle.manifest, bundle.tokenizer, demo_observation(), "touch the red cube")
    return Made(load_checkpoint(checkpoint).eval().requires_grad_(False), bundle, given)


def draw(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape or (HORIZON, A), dtype=np.float32)
