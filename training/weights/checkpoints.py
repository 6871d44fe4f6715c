"""A finished policy on disk: weights, sizes, tokenizer, action tokens and policy.json; foreign.py reads other formats.

A folder appears whole or not at all (training/storage.py). What a run resumes from is in runs.py.
Nothing here executes code from a file: weights are safetensors, the others JSON.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from dataclasses import fields as fields_of
from pathlib import Path
from typing import get_args

import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from ki_vla_ros.bundle import TOKENIZER, PolicySpec
from ki_vla_ros.errors import ConfigurationError, describe_validation, short_repr
from ki_vla_ros.files import read_json
from training.model import VLA, Actions, Conditioning, GemmaConfig, VisionConfig, VLAConfig
from training.storage import whole_folder, writing
from training.tokens import ACTIONS, ActionTokenizer, describe_actions
from training.weights.files import WeightFiles, check_fit

DEEPEST, LARGEST_SIZE = 200, 1 << 20
WEIGHTS, CONFIG = "weights.safetensors", "config.json"
POLICY = "policy.json"  # a `PolicySpec`, beside the weights of a finished policy
NAMES = (WEIGHTS, CONFIG, POLICY, TOKENIZER, ACTIONS)


def save_checkpoint(
    folder: Path,
    model: VLA,
    weights: Mapping[str, Tensor] | None = None,
    tokenizer: Tokenizer | None = None,
    policy: PolicySpec | None = None,
    actions: ActionTokenizer | None = None,
) -> None:
    """Write weights and config, and what makes them a policy.

    `weights` are the whole weights of a sharded model. An earlier checkpoint in the folder is replaced in one step;
    files of other names in it are kept. ConfigurationError if the disk is full; the earlier one is then still there.
    """
    weights = model.state_dict() if weights is None else weights
    with whole_folder(folder) as part:
        if folder.is_dir():
            top = str(folder)
            shutil.copytree(
                folder, part, dirs_exist_ok=True, ignore=lambda path, _: NAMES if path == top else (), symlinks=True
            )
        with writing(folder / WEIGHTS):
            save_file({name: tensor.contiguous() for name, tensor in weights.items()}, part / WEIGHTS)
        with writing(folder / CONFIG):
            (part / CONFIG).write_text(json.dumps(asdict(model.config), indent=2) + "\n")
        if tokenizer is not None:
            with writing(folder / TOKENIZER):
                tokenizer.save(str(part / TOKENIZER), pretty=False)
        if policy is not None:
            with writing(folder / POLICY):
                (part / POLICY).write_text(policy.model_dump_json(indent=2) + "\n", encoding="utf-8")
        if actions is not None:
            with writing(folder / ACTIONS):
                (part / ACTIONS).write_text(describe_actions(actions), encoding="utf-8")


def read_config(folder: Path) -> VLAConfig:
    """The sizes a checkpoint was trained with."""
    path = folder / CONFIG
    if not path.is_file():
        raise ConfigurationError(f"checkpoint {folder}: expected {WEIGHTS} and {CONFIG}, found no {CONFIG}")
    return read_sizes(path)


def read_sizes(path: Path) -> VLAConfig:
    """A model's sizes, written as in a checkpoint's config.json."""
    try:
        fields = read_json(path)
        fields["vision"] = VisionConfig(**fields["vision"])
        fields["backbone"], fields["expert"] = GemmaConfig(**fields["backbone"]), GemmaConfig(**fields["expert"])
        config = VLAConfig(**fields)
        for part in (config, config.vision, config.backbone, config.expert):
            _check_sizes(part)
        return config
    except (ArithmeticError, ConfigurationError, KeyError, OSError, TypeError, ValueError) as error:
        raise ConfigurationError(f"{path}: not the config of a model of this version ({error})") from error


def _check_sizes(part: VLAConfig | VisionConfig | GemmaConfig) -> None:
    """ValueError unless the sizes are those of a model: dataclasses take anything, and building takes minutes."""
    for field in fields_of(part):
        value = getattr(part, field.name)
        if field.name == "conditioning":
            fits = value in get_args(Conditioning)
        elif field.name == "actions":
            fits = value in get_args(Actions)
        elif field.name == "hybrid_mask":
            fits = isinstance(value, bool)
        elif field.name in ("stem", "vision", "backbone", "expert") or (field.name == "state_dim" and value is None):
            continue
        else:
            most = DEEPEST if field.name == "depth" else LARGEST_SIZE
            fits = type(value) is int and 0 < value <= most
        if not fits:
            raise ValueError(f"{field.name} {short_repr(value)}")


def load_checkpoint(folder: Path, dtype: torch.dtype | None = torch.float32) -> VLA:
    """The model as it was saved, its weights in `dtype` (None: each in the file's type, which may be mixed).

    Weights in the file's type stay in the mapped file until they are used. Saving to the same folder is safe, because
    it makes a new file; so is training, because what is written goes to this process's memory.
    """
    config = read_config(folder)
    return assemble(config, read_weights(folder, shapes(config), dtype))


def read_weights(
    folder: Path, expected: Mapping[str, tuple[int, ...]], dtype: torch.dtype | None = torch.float32
) -> dict[str, Tensor]:
    """A checkpoint's weights by name; ConfigurationError unless they are those expected."""
    weights = WeightFiles([folder / WEIGHTS])
    check_fit(expected, weights.shapes, str(folder / WEIGHTS), "check the model's sizes against the file")
    return {name: weights.get(name, dtype) for name in expected}


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


def read_policy(path: Path) -> PolicySpec:
    """The policy's description, which training wrote beside the weights."""
    try:
        return PolicySpec.model_validate(read_json(path))
    except FileNotFoundError as error:
        raise ConfigurationError(f"{path}: expected the policy's description beside the weights, got none") from error
    except ValidationError as error:
        raise ConfigurationError(f"{path}: {describe_validation(error)}") from error
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path}: expected the policy's description as JSON, got none ({error})") from error
