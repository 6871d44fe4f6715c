"""A small model and the bundle made from it, with the programs for the torch engine."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ki_vla_ros.bundle.folder import EXPERT, PREFILL, PROGRAMS, Bundle, load_bundle
from ki_vla_ros.policy.preprocess import make_model_input
from ki_vla_ros.records import ModelInput
from support.bundles import HORIZON, demo_observation
from support.checkpoints import write_checkpoint
from support.once import made_once
from training.export.bundle import export_bundle
from training.model.vla import VLA
from training.weights.checkpoints import load_checkpoint

A = 7
NONE = np.zeros(HORIZON, dtype=np.bool_)  # no action is clean
NOTES = "It was never trained."


@dataclass(frozen=True)
class Made:
    """`model` is the one in float32, whatever the bundle's `dtype`."""

    checkpoint: Path
    model: VLA
    bundle: Bundle
    given: ModelInput


def export(factory: pytest.TempPathFactory, kind: str, dtype: str = "float32") -> Made:
    """Exported once per test run: copy the folders before you change them; `kind` as in `write_checkpoint`."""

    def make(folder: Path) -> None:
        checkpoint = write_checkpoint(folder / "checkpoint", kind)
        export_bundle(checkpoint, folder / "bundle", NOTES, with_torch=True, dtype=dtype)

    folder = made_once(factory, f"exported-{kind}-{dtype}", make)
    model, bundle = load_checkpoint(folder / "checkpoint"), load_bundle(folder / "bundle")
    given = make_model_input(bundle.manifest, bundle.tokenizer, demo_observation(), "touch the red cube")
    return Made(folder / "checkpoint", model.eval().requires_grad_(False), bundle, given)


def skip_tracing(monkeypatch: pytest.MonkeyPatch, made: Made) -> None:
    """Lets exports of `made.checkpoint` reuse its graphs and programs, since tracing takes long."""

    def take(names: Iterable[str], folder: Path) -> None:
        for name in names:
            shutil.copy(made.bundle.path / name, folder)

    monkeypatch.setattr("training.export.bundle.write_graphs", lambda _, folder: take((PREFILL, EXPERT), folder))
    monkeypatch.setattr("training.export.bundle.write_programs", lambda _, folder: take(PROGRAMS.values(), folder))


def draw(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape or (HORIZON, A), dtype=np.float32)
