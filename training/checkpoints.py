"""Weights on disk: our own checkpoints, training state to resume from, and pi0.5 weights in openpi's naming.

Nothing here executes code from a file: weights are safetensors, configs JSON, and optimizer state is loaded with
`weights_only=True`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ki_vla_ros.errors import ConfigurationError
from training.model.gemma import GemmaConfig
from training.model.siglip import VisionConfig
from training.model.vla import VLA, VLAConfig

WEIGHTS, CONFIG, RESUME = "weights.safetensors", "config.json", "resume.pt"


def save_checkpoint(
    folder: Path, model: VLA, resume: Mapping[str, Any] | None = None, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Writes weights and config, and what is needed to resume (tensors, numbers, strings, lists and dicts only).

    `weights`: the whole weights of a model that is sharded.
    Each file is replaced in one step, so that an interrupted save leaves the previous one readable.
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


def load_checkpoint(folder: Path) -> VLA:
    """The model as it was saved."""
    model = VLA(read_config(folder))
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ConfigurationError(f"{folder / WEIGHTS}: expected the weights as safetensors ({error})") from error
    load_weights(model, weights, str(folder / WEIGHTS))
    return model


def load_resume(folder: Path) -> dict[str, Any]:
    """What `save_checkpoint` was given to resume from."""
    path = folder / RESUME
    if not path.is_file():
        raise ConfigurationError(f"checkpoint {folder}: no {RESUME}, so training cannot resume from it; start anew")
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def load_weights(
    model: VLA, weights: Mapping[str, Tensor], source: str, names: Mapping[str, str] | None = None
) -> None:
    """Copies weights and refuses to load a part of them. `names`: what the file calls each of our weights."""
    ours = model.state_dict()
    names = {name: name for name in ours} if names is None else names
    pairs = [(names[name], name) for name in ours]
    faults = {
        "missing": [key for key, _ in pairs if key not in weights],
        "unknown": sorted(weights.keys() - names.values()),
        "misshapen": [
            f"{key}: expected {list(ours[name].shape)}, got {list(weights[key].shape)}"
            for key, name in pairs
            if key in weights and weights[key].shape != ours[name].shape
        ],
    }
    lines = [
        f"  {len(keys)} {fault}: " + "; ".join(keys[:10]) + ("; ..." if len(keys) > 10 else "")
        for fault, keys in faults.items()
        if keys
    ]
    if lines:
        raise ConfigurationError(
            f"{source}: weights do not fit the model\n"
            + "\n".join(lines)
            + "\ncheck the model's sizes against the file"
        )
    model.load_state_dict({name: weights[key] for key, name in pairs})


PALIGEMMA = "paligemma_with_expert.paligemma"
VISION = f"{PALIGEMMA}.model.vision_tower.vision_model"
OPENPI_STEMS = {"backbone": f"{PALIGEMMA}.model.language_model", "expert": "paligemma_with_expert.gemma_expert.model"}
OPENPI_NAMES = {
    r"vision\.stem": rf"{VISION}.embeddings.patch_embedding",
    r"vision\.position": rf"{VISION}.embeddings.position_embedding",
    r"vision\.norm": rf"{VISION}.post_layernorm",
    r"vision\.layers\.(\d+)\.norm(\d)": rf"{VISION}.encoder.layers.\1.layer_norm\2",
    r"vision\.layers\.(\d+)\.([qkv]|out)": rf"{VISION}.encoder.layers.\1.self_attn.\2_proj",
    r"vision\.layers\.(\d+)\.up": rf"{VISION}.encoder.layers.\1.mlp.fc1",
    r"vision\.layers\.(\d+)\.down": rf"{VISION}.encoder.layers.\1.mlp.fc2",
    r"projector": rf"{PALIGEMMA}.model.multi_modal_projector.linear",
    r"backbone\.embedding": rf"{PALIGEMMA}.lm_head",
    r"action_(in|out)": r"action_\1_proj",
    r"expert\.time_(in|out)": r"time_mlp_\1",
}
"""Our module -> openpi's; the parameter's own name (weight, bias) follows both."""
for _ours, _theirs in OPENPI_STEMS.items():
    OPENPI_NAMES |= {
        rf"{_ours}\.norm": rf"{_theirs}.norm",
        rf"{_ours}\.layers\.(\d+)\.norm1": rf"{_theirs}.layers.\1.input_layernorm",
        rf"{_ours}\.layers\.(\d+)\.norm2": rf"{_theirs}.layers.\1.post_attention_layernorm",
        rf"{_ours}\.layers\.(\d+)\.attention\.out": rf"{_theirs}.layers.\1.self_attn.o_proj",
        rf"{_ours}\.layers\.(\d+)\.attention\.([qkv])": rf"{_theirs}.layers.\1.self_attn.\2_proj",
        rf"{_ours}\.layers\.(\d+)\.mlp\.(gate|up|down)": rf"{_theirs}.layers.\1.mlp.\2_proj",
    }


def openpi_name(name: str) -> str:
    """What openpi's pi0.5 calls one of our weights."""
    for ours, theirs in OPENPI_NAMES.items():
        match = re.fullmatch(rf"{ours}(?P<parameter>(?:\.dense)?\.(?:weight|bias))", name)
        if match:
            return match.expand(theirs) + match["parameter"]
    raise ConfigurationError(
        f"model: pi0.5 has no counterpart of {name}; to import its weights use stem 'patch' and no state_dim"
    )


def import_openpi(model: VLA, weights: Mapping[str, Tensor], source: str) -> None:
    """Loads pi0.5 weights (PaliGemma and expert) by openpi's PyTorch names; LeRobot's prefix `model.` is allowed.

    The token table is tied to `lm_head`; a file may hold either or both. The expert's own `lm_head` is never used.
    """
    theirs = {key.removeprefix("model."): tensor for key, tensor in weights.items()}
    theirs.pop("paligemma_with_expert.gemma_expert.lm_head.weight", None)
    table = theirs.pop(f"{OPENPI_STEMS['backbone']}.embed_tokens.weight", None)
    if table is not None:
        theirs.setdefault(f"{PALIGEMMA}.lm_head.weight", table)
    load_weights(model, theirs, source, {name: openpi_name(name) for name in model.state_dict()})
