"""What a user downloads, in openpi's naming and small: weights, sizes, tokenizer and statistics, and a robot file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from support import ROOT
from support.golden import CONFIG
from support.sentencepieces import train
from training import import_weights
from training.model.vla import VLAConfig
from training.weights.checkpoints import shapes
from training.weights.foreign import PALIGEMMA, their_name

EXAMPLE = ROOT / "config" / "robots" / "imported_arm.yaml"
SENTENCEPIECE = train()
JOINTS = 7
WIDTH = {"pi0": 12, "pi05": 12, "paligemma": 12}  # of the model: wider than the robot


def small(kind: str, action_ids: int = 0) -> VLAConfig:
    """A small configuration of the kind's form in place of the published one, with two layers."""
    pi0 = kind == "pi0"
    return dataclasses.replace(
        CONFIG,
        backbone=dataclasses.replace(CONFIG.backbone, depth=2),
        expert=dataclasses.replace(CONFIG.expert, depth=2),
        vocab_size=len(SENTENCEPIECE.pieces) + action_ids,
        action_dim=WIDTH[kind],
        state_dim=WIDTH[kind] if pi0 else None,
        conditioning="concat" if pi0 else "adarms",
    )


def write_weights(folder: Path, kind: str) -> None:
    config = small("pi05" if kind == "paligemma" else kind)
    generator = torch.Generator().manual_seed(0)
    weights = {
        their_name(name, config): (0.1 * torch.randn(shape, generator=generator)).bfloat16()
        for name, shape in shapes(config).items()
    }
    if kind == "paligemma":
        weights = {key.removeprefix(PALIGEMMA): w for key, w in weights.items() if key.startswith(PALIGEMMA)}
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors")


def write_downloads(tmp_path: Path) -> dict[str, Path]:
    """The files in a folder; returns options of training.import_weights."""
    tmp_path.mkdir(exist_ok=True)
    for kind in WIDTH:
        write_weights(tmp_path / kind, kind)
        (tmp_path / f"{kind}.json").write_text(json.dumps(dataclasses.asdict(small(kind))))
    (tmp_path / "paligemma.model").write_bytes(SENTENCEPIECE.SerializeToString())
    statistics = {"mean": 0.1, "std": 0.5, "q01": -1.0, "q99": 1.25}
    padded = {name: [value] * JOINTS + [0.0] * (32 - JOINTS) for name, value in statistics.items()}
    (tmp_path / "norm_stats.json").write_text(json.dumps({"norm_stats": {"state": padded, "actions": padded}}))
    robot = yaml.safe_load(EXAMPLE.read_text())
    (tmp_path / "robot.yaml").write_text(yaml.safe_dump(robot | {"horizon": 10}))
    return {
        "--tokenizer": tmp_path / "paligemma.model",
        "--stats": tmp_path / "norm_stats.json",
        "--robot": tmp_path / "robot.yaml",
        "--out": tmp_path / "checkpoint",
    }


def run_import(files: dict[str, Path], kind: str, *more: str) -> int:
    """Import one kind of them to `files["--out"]`; returns the exit code."""
    options = [str(part) for pair in files.items() for part in pair]
    folder = files["--out"].parent
    first = ["--from", str(folder / kind), "--as", kind, "--config", str(folder / f"{kind}.json")]
    return import_weights.main([*first, *options, *more])
