"""Our own weights on disk: checkpoints, and training state to resume from; foreign.py reads other formats.

A folder appears whole or not at all (training/storage.py). A run's checkpoints are numbered folders, of which the
newest counts; its weights and its training state carry the same identity.

Nothing here executes code from a file: weights are safetensors, configs JSON, and optimizer state is loaded with
`weights_only=True`.
"""

import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from ki_vla_ros.bundle import TOKENIZER, PolicySpec
from ki_vla_ros.errors import ConfigurationError, describe_validation, short_repr
from ki_vla_ros.files import open_stored, read_json
from training.model import VLA, Conditioning, GemmaConfig, VisionConfig, VLAConfig
from training.storage import whole_folder, writing
from training.weights.files import WeightFiles, check_fit, open_safetensors

DEEPEST, LARGEST_SIZE = 200, 1 << 20
WEIGHTS, CONFIG, RESUME = "weights.safetensors", "config.json", "resume.pt"
POLICY = "policy.json"  # a `PolicySpec`, beside the weights of a finished policy
NAMES = (WEIGHTS, CONFIG, RESUME, POLICY, TOKENIZER)
IDENTITY = "identity"  # the same random text in weights and training state that were saved together
NUMBERED = "checkpoint-{:06d}"


def save_checkpoint(
    folder: Path,
    model: VLA,
    resume: Mapping[str, Any] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    tokenizer: Tokenizer | None = None,
    policy: PolicySpec | None = None,
) -> None:
    """Write weights and config; what is needed to resume (tensors, numbers, strings, lists and dicts only); a policy.

    `weights` are the whole weights of a sharded model. An earlier checkpoint in the folder is replaced in one step;
    files of other names in it are kept. ConfigurationError if the disk is full; the earlier one is then still there.
    """
    weights = model.state_dict() if weights is None else weights
    identity = {} if resume is None else {IDENTITY: secrets.token_hex(16)}
    with whole_folder(folder) as part:
        if folder.is_dir():
            top = str(folder)
            shutil.copytree(
                folder, part, dirs_exist_ok=True, ignore=lambda path, _: NAMES if path == top else (), symlinks=True
            )
        with writing(folder / WEIGHTS):
            save_file({name: tensor.contiguous() for name, tensor in weights.items()}, part / WEIGHTS, identity or None)
        with writing(folder / CONFIG):
            (part / CONFIG).write_text(json.dumps(asdict(model.config), indent=2) + "\n")
        if resume is not None:
            with writing(folder / RESUME):
                torch.save({**resume, **identity}, part / RESUME)
        if tokenizer is not None:
            with writing(folder / TOKENIZER):
                tokenizer.save(str(part / TOKENIZER), pretty=False)
        if policy is not None:
            with writing(folder / POLICY):
                (part / POLICY).write_text(policy.model_dump_json(indent=2) + "\n", encoding="utf-8")


def save_run(out: Path, model: VLA, resume: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None) -> None:
    """Save a run's next checkpoint; the earlier ones go when it is on the disk, those in version 0.2's form too."""
    earlier = numbered(out)
    save_checkpoint(out / NUMBERED.format(max(earlier, default=0) + 1), model, resume, weights)
    for folder in earlier.values():
        shutil.rmtree(folder)
    for name in (RESUME, WEIGHTS, CONFIG):
        for path in (out / name, out / f"{name}.part"):
            path.unlink(missing_ok=True)


def newest_checkpoint(out: Path) -> Path | None:
    """The folder that a run resumes from: its newest checkpoint, or `out` itself in version 0.2's form; None if none.

    ConfigurationError if version 0.2 was killed while it replaced one file after the other.
    """
    if found := numbered(out):
        return found[max(found)]
    resume, weights = out / RESUME, out / f"{WEIGHTS}.part"
    if not resume.exists():
        return None
    if weights.exists() and weights.stat().st_mtime_ns <= resume.stat().st_mtime_ns:
        raise ConfigurationError(
            f"checkpoint {out}: expected {WEIGHTS} and {RESUME} of one step, got the weights of an earlier one: an "
            f"earlier version was killed while it saved; rename {weights.name} to {WEIGHTS}, and the run goes on"
        )
    return out


def numbered(out: Path) -> dict[int, Path]:
    """The checkpoints of a run by their number; ConfigurationError if one is no folder of this run's own."""
    found = ((re.fullmatch(r"checkpoint-([0-9]{1,12})", path.name), path) for path in out.glob("checkpoint-*"))
    checkpoints = {int(match[1]): path for match, path in found if match is not None}
    for path in checkpoints.values():
        if path.is_symlink() or not path.is_dir():
            got = f"a link to {os.readlink(path)}" if path.is_symlink() else "a file"
            raise ConfigurationError(
                f"{path}: expected a checkpoint's folder, got {got}; a run replaces its checkpoints: move it away, or "
                "copy what it points to into its place"
            )
    return checkpoints


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
    except (ArithmeticError, KeyError, OSError, TypeError, ValueError) as error:
        raise ConfigurationError(f"{path}: not the config of a model of this version ({error})") from error


def _check_sizes(part: VLAConfig | VisionConfig | GemmaConfig) -> None:
    """ValueError unless the sizes are those of a model: dataclasses take anything, and building takes minutes."""
    for field in fields_of(part):
        value = getattr(part, field.name)
        if field.name == "conditioning":
            fits = value in get_args(Conditioning)
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


def load_resume(folder: Path) -> dict[str, Any]:
    """What `save_checkpoint` was given to resume from; ConfigurationError unless the weights were saved with it."""
    path = folder / RESUME
    if not path.is_file():
        raise ConfigurationError(f"checkpoint {folder}: expected {RESUME} to resume from, found none; start again")
    try:
        with open_stored(path):  # torch also unpacks what was compressed, whatever its size
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        identity = state.pop(IDENTITY, None)
    except Exception as error:  # torch raises what pickles and zip files raise
        raise ConfigurationError(
            f"{path}: expected the state of a run, without code, got {path.stat().st_size} bytes that are cut off or "
            "something else; resume from another checkpoint, or start again"
        ) from error
    theirs = (open_safetensors(folder / WEIGHTS).metadata() or {}).get(IDENTITY)
    if identity != theirs:
        raise ConfigurationError(
            f"checkpoint {folder}: expected {WEIGHTS} and {RESUME} that were saved together, got identities "
            f"{theirs or 'none'} and {identity or 'none'}; take both files from one checkpoint"
        )
    return state
