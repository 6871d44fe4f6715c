"""Our own weights on disk: checkpoints, and training state to resume from; foreign.py reads other formats.

Nothing here executes code from a file: weights are safetensors, configs JSON, and optimizer state is loaded with
`weights_only=True`.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ki_vla_ros.errors import ConfigurationError
from training.model import VLA, GemmaConfig, VisionConfig, VLAConfig
from training.weights.files import WeightFiles, check_fit

WEIGHTS, CONFIG, RESUME = "weights.safetensors", "config.json", "resume.pt"
POLICY = "policy.json"  # a `PolicySpec`, beside the weights of a finished policy


def save_checkpoint(
    folder: Path, model: VLA, resume: Mapping[str, Any] | None = None, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Write weights and config, and what is needed to resume (tensors, numbers, strings, lists and dicts only).

    `weights` are the whole weights of a sharded model. Each file is replaced in one step, so that an interrupted save
    leaves the previous one readable.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = model.state_dict() if weights is None else weights
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / f"{WEIGHTS}.part")
    (folder / f"{CONFIG}.part").write_text(json.dumps(asdict(model.config), indent=2) + "\n")
    if resume is not None:
        torch.save(dict(resume), folder / f"{RESUME}.part")
    for part in sorted(folder.glob("*.part")):
        part.replace(part.with_suffix(""))


def read_config(folder: Path) -> VLAConfig:
    """The sizes a checkpoint was trained with."""
    path = folder / CONFIG
    if not path.is_file():
        raise ConfigurationError(f"checkpoint {folder}: expected {WEIGHTS} and {CONFIG}, found no {CONFIG}")
    try:
        fields = json.loads(path.read_text())
        fields["vision"] = VisionConfig(**fields["vision"])
        fields["backbone"], fields["expert"] = GemmaConfig(**fields["backbone"]), GemmaConfig(**fields["expert"])
        return VLAConfig(**fields)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigurationError(f"{path}: not the config of a model of this version ({error})") from error


def load_checkpoint(folder: Path, dtype: torch.dtype | None = torch.float32) -> VLA:
    """The model as it was saved, its weights in `dtype` (None: each in the file's type, which may be mixed).

    Weights in the file's type stay in the mapped file until they are used. Saving to the same folder is safe, because
    it makes a new file; so is training, because what is written goes to this process's memory.
    """
    config, weights = read_config(folder), WeightFiles([folder / WEIGHTS])
    expected = shapes(config)
    check_fit(expected, weights.shapes, str(folder / WEIGHTS), "check the model's sizes against the file")
    return assemble(config, {name: weights.get(name, dtype) for name in expected})


def shapes(config: VLAConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of all weights of a model, by name."""
    return {name: tuple(tensor.shape) for name, tensor in empty_model(config).state_dict().items()}


def empty_model(config: VLAConfig) -> VLA:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return VLA(config)


def assemble(config: VLAConfig, weights: Mapping[str, Tensor]) -> VLA:
    """A model made of these tensors, which are not copied."""
    model = empty_model(config)
    model.load_state_dict(dict(weights), assign=True)
    return model


def load_resume(folder: Path) -> dict[str, Any]:
    """What `save_checkpoint` was given to resume from."""
    path = folder / RESUME
    if not path.is_file():
        raise ConfigurationError(f"checkpoint {folder}: expected {RESUME} to resume from, found none; start again")
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state
