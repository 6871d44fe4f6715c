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


def save_checkpoint(folder: Path, model: VLA, resume: Mapping[str, Any] | None = None) -> None:
    """Writes weights and config, and what is needed to resume (tensors, numbers, strings, lists and dicts only).

    Each file is replaced in one step, so that an interrupted save leaves the previous one readable.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / f"{WEIGHTS}.part")
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


def load_weights(model: VLA, weights: Mapping[str, Tensor], source: str) -> None:
    """Copies weights by our names; refuses to load a part of them."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    got = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    complain(
        source,
        missing=sorted(expected.keys() - got.keys()),
        unknown=sorted(got.keys() - expected.keys()),
        misshapen=[
            f"{name}: expected {list(expected[name])}, got {list(got[name])}"
            for name in sorted(expected.keys() & got.keys())
            if expected[name] != got[name]
        ],
    )
    model.load_state_dict(dict(weights))


def complain(source: str, **faults: list[str]) -> None:
    """Raises one error that lists every fault, each kind at most ten times."""
    lines = [
        f"  {len(names)} {kind}: " + "; ".join(names[:10]) + ("; ..." if len(names) > 10 else "")
        for kind, names in faults.items()
        if names
    ]
    if lines:
        raise ConfigurationError(
            f"{source}: weights do not fit the model\n"
            + "\n".join(lines)
            + "\ncheck the model's sizes against the file"
        )


BACKBONE = "paligemma_with_expert.paligemma"
VISION = f"{BACKBONE}.model.vision_tower.vision_model"
LANGUAGE = f"{BACKBONE}.model.language_model"
EXPERT = "paligemma_with_expert.gemma_expert"

OPENPI_NAMES = {
    rf"{VISION}\.embeddings\.patch_embedding": "vision.stem",
    rf"{VISION}\.embeddings\.position_embedding": "vision.position",
    rf"{VISION}\.post_layernorm": "vision.norm",
    rf"{VISION}\.encoder\.layers\.(\d+)\.layer_norm(\d)": r"vision.layers.\1.norm\2",
    rf"{VISION}\.encoder\.layers\.(\d+)\.self_attn\.out_proj": r"vision.layers.\1.out",
    rf"{VISION}\.encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj": r"vision.layers.\1.\2",
    rf"{VISION}\.encoder\.layers\.(\d+)\.mlp\.fc1": r"vision.layers.\1.up",
    rf"{VISION}\.encoder\.layers\.(\d+)\.mlp\.fc2": r"vision.layers.\1.down",
    rf"{BACKBONE}\.model\.multi_modal_projector\.linear": "projector",
    rf"{BACKBONE}\.lm_head": "backbone.embedding",
    r"action_(in|out)_proj": r"action_\1",
    r"time_mlp_(in|out)": r"expert.time_\1",
}
"""openpi's module -> ours; the parameter's own name (weight, bias) follows both."""
for _theirs, _ours in ((LANGUAGE, "backbone"), (rf"{EXPERT}\.model", "expert")):
    OPENPI_NAMES |= {
        rf"{_theirs}\.norm": f"{_ours}.norm",
        rf"{_theirs}\.layers\.(\d+)\.input_layernorm": rf"{_ours}.layers.\1.norm1",
        rf"{_theirs}\.layers\.(\d+)\.post_attention_layernorm": rf"{_ours}.layers.\1.norm2",
        rf"{_theirs}\.layers\.(\d+)\.self_attn\.o_proj": rf"{_ours}.layers.\1.attention.out",
        rf"{_theirs}\.layers\.(\d+)\.self_attn\.([qkv])_proj": rf"{_ours}.layers.\1.attention.\2",
        rf"{_theirs}\.layers\.(\d+)\.mlp\.(gate|up|down)_proj": rf"{_ours}.layers.\1.mlp.\2",
    }


def translate(key: str) -> str | None:
    """Our name for one of openpi's keys, or None for a key this model does not know."""
    for pattern, ours in OPENPI_NAMES.items():
        match = re.fullmatch(rf"{pattern}((?:\.dense)?\.(?:weight|bias))", key)
        if match:
            return match.expand(ours) + match[match.lastindex or 0]
    return None


def import_openpi(model: VLA, weights: Mapping[str, Tensor], source: str) -> None:
    """Loads pi0.5 weights (PaliGemma and action expert) from openpi's PyTorch naming, LeRobot's `model.` prefix allowed.

    The token table is tied to `lm_head`; a file may hold either or both. The expert's own `lm_head` is never used.
    """
    theirs = {key.removeprefix("model."): tensor for key, tensor in weights.items()}
    theirs.pop(f"{EXPERT}.lm_head.weight", None)
    table = theirs.pop(f"{LANGUAGE}.embed_tokens.weight", None)
    if table is not None:
        theirs.setdefault(f"{BACKBONE}.lm_head.weight", table)
    names = {key: translate(key) for key in theirs}
    complain(source, unknown=sorted(key for key, name in names.items() if name is None))
    load_weights(model, {name: theirs[key].float() for key, name in names.items() if name is not None}, source)
