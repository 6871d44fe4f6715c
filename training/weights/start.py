"""Where training begins: parts of a checkpoint, and what the policy in it fixes (prompt, state, padding, vocabulary).

The checkpoint's sizes, conditioning, prompt, state encoding and vocabulary are kept, because its weights mean nothing
without them. Robot, horizon, statistics and FAST are the new data's; no weight depends on the horizon. FAST's ids end
the vocabulary, so more of them grow it at its end.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ki_vla_ros.bundle import TOKENIZER, PolicySpec, PromptSpec, StateEncoding, load_tokenizer
from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.robot import Robot, find_robot, read_robot
from training.config import ModelConfig, PromptConfig, StartConfig, TrainingConfig
from training.model import VLA, VLAConfig
from training.policy import PROMPTS
from training.tokens import act_query_ids, fast_token, has_state_tokens, own_tokens, without_queries
from training.weights.checkpoints import CONFIG, POLICY, WEIGHTS, assemble, read_config, read_policy, shapes
from training.weights.files import WeightFiles, check_fit
from training.weights.foreign import spellings, their_name, token_table, untrained
from training.weights.lora import Adapter

TABLE = "backbone.embedding.weight"
IN_PART = {
    "vision": ("vision.", "projector."),
    "backbone": ("backbone.",),
    "expert": ("expert.", "action_in.", "action_out.", "state_in."),
}


@dataclass(frozen=True)
class Start:
    """A model to train, and what its policy must be like. `pad_to` is as in `PolicySpec`; None: nothing is padded."""

    config: VLAConfig
    weights: Mapping[str, Tensor]
    tokenizer: Tokenizer
    prompt: PromptSpec
    encoding: StateEncoding
    pad_to: int | None
    policy: PolicySpec | None
    folder: Path

    def model(self) -> VLA:
        return assemble(self.config, self.weights)


def check_statistics(start: StartConfig, robot: Robot) -> PolicySpec:
    """The policy whose normalisation a run keeps; ConfigurationError unless it is of the same dimensions."""
    where = start.checkpoint / POLICY
    if not where.exists():
        raise ConfigurationError(
            f"start.statistics: expected a checkpoint with statistics to keep, got {start.checkpoint} without "
            f"{POLICY}; let the data give them (statistics: data)"
        )
    policy = read_policy(where)
    for group, kept, given in (
        ("state", policy.robot.state, robot.state),
        ("actions", policy.robot.actions, robot.actions),
    ):
        ours, theirs = ([_describe(dimension) for dimension in dimensions] for dimensions in (given, kept))
        if ours != theirs:
            d = next((d for d, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
            d = min(len(ours), len(theirs)) if d is None else d
            mine, other = (lines[d] if d < len(lines) else "none" for lines in (ours, theirs))
            raise ConfigurationError(
                f"{where}: robot.{group}: dimension {d}: expected {mine}, as robot {robot.name!r} has it, got "
                f"{other}; statistics can be kept for the same dimensions only: statistics: data fits new ones"
            )
    return policy


def adopt(config: TrainingConfig) -> TrainingConfig:
    """The configuration with what its checkpoint says, for it to be opened as any other; none to start from: itself.

    ConfigurationError where the configuration says something else.
    """
    start = config.start
    if start is None:
        return config
    found, new_expert = read_config(start.checkpoint), "expert" not in start.parts
    policy = read_policy(start.checkpoint / POLICY) if (start.checkpoint / POLICY).exists() else None
    tokenizer = _open_tokenizer(start.checkpoint, found)
    prompt, encoding = _choose_prompt(policy, found, new_expert)
    fields: dict[str, Any] = {"vision": found.vision, "backbone": found.backbone, "expert": found.expert}
    if config.model is None or not new_expert:
        robot = read_robot(find_robot(config.robot))
        widths = (len(robot.state), len(robot.actions))
        alike = policy is not None and policy.pad_to is None and widths == (policy.state_width, policy.action_width)
        fields |= {
            "state": encoding,
            "width": None if alike else found.action_dim,
            "conditioning": found.conditioning,
            "actions": found.actions,
            "hybrid_mask": found.hybrid_mask,
        }
    if config.model is not None:
        said = {key: getattr(config.model, key) for key in config.model.model_fields_set}
        fields |= {key: value for key, value in said.items() if value is not None}
    model = ModelConfig.model_validate(fields)
    if not new_expert and policy is not None and model.state != encoding:
        raise ConfigurationError(
            f"{start.checkpoint / POLICY}: state.encoding: expected {model.state}, as model.state says, got "
            f"{encoding}; leave it out"
        )
    template: str | None = without_queries(prompt.template)
    if new_expert and model.state_in_prompt != ("{state}" in prompt.template):
        template = None  # a new expert may be told the state in another way
    given = config.prompt
    if given is None:
        given = PromptConfig(template=template, length=prompt.length, style=prompt.style)
    else:
        kept: dict[str, Any] = {"template": template, "style": prompt.style}
        changed = {key: value for key in kept if (value := given.model_dump(exclude_unset=True).get(key)) is not None}
        if not new_expert and policy is not None and kept | changed != kept:
            own, key = next((value, key) for key, value in changed.items() if value != kept[key])
            raise ConfigurationError(
                f"{start.checkpoint / POLICY}: prompt.{key}: expected {own!r}, as prompt says, got {kept[key]!r}; "
                "leave it out"
            )
        given = given.model_copy(update=kept | changed)
    vocabulary = config.vocabulary.model_copy(update={"queries": len(act_query_ids(tokenizer))})
    return TrainingConfig.model_validate(dict(config) | {"model": model, "prompt": given, "vocabulary": vocabulary})


def start_tokenizer(start: StartConfig, action_ids: int, state_tokens: bool = False) -> Tokenizer:
    """The checkpoint's vocabulary, with tokens for the state if asked for, and at least so many of FAST at its end."""
    tokenizer = _open_tokenizer(start.checkpoint, read_config(start.checkpoint))
    return _grow(tokenizer, action_ids, state_tokens, start.checkpoint)[0]


def open_start(
    start: StartConfig,
    *,
    state_width: int,
    action_width: int,
    horizon: int,
    action_ids: int,
    image_size: int | None = None,
    model: ModelConfig | None = None,
    seed: int = 0,
) -> Start:
    """The checkpoint as the beginning of a run; ConfigurationError names file, key, expected and got.

    `state_width` and `action_width` are the largest of the run's robots (of a new expert: what it is to have),
    `action_ids` is how many FAST tokens there are.
    `model` gives the sizes of parts that are not taken, and must agree with those that are. Weights are float32; what
    is not taken is drawn from `seed`.
    """
    folder = start.checkpoint
    found = read_config(folder)
    policy = read_policy(folder / POLICY) if (folder / POLICY).exists() else None
    special = model is not None and model.state == "special"
    tokenizer, more = _grow(_open_tokenizer(folder, found), action_ids, special, folder)
    config = _choose_sizes(start, found, model, state_width, action_width)
    config = replace(config, horizon=horizon, vocab_size=found.vocab_size + more)
    if image_size not in (None, config.vision.image_size):
        raise ConfigurationError(
            f"{folder / CONFIG}: vision.image_size: expected {image_size}, as the data has it, got "
            f"{config.vision.image_size}"
        )
    prompt, encoding = _choose_prompt(policy, config, new_expert="expert" not in start.parts)
    return Start(
        config=config,
        weights=_take(start, found, config, seed),
        tokenizer=tokenizer,
        prompt=prompt,
        encoding=encoding,
        pad_to=config.action_dim if min(state_width, action_width) < config.action_dim else None,
        policy=policy,
        folder=folder,
    )


def _open_tokenizer(folder: Path, config: VLAConfig) -> Tokenizer:
    path = folder / TOKENIZER
    try:
        tokenizer = load_tokenizer(path)
    except FileNotFoundError as error:
        raise ConfigurationError(
            f"{path}: expected the vocabulary of the weights, got none; take the folder of training.import_weights, or "
            "the folder policy of a finished run"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path}: expected a tokenizers file, got something else ({error})") from error
    if (got := tokenizer.get_vocab_size()) != config.vocab_size:
        raise ConfigurationError(
            f"{path}: tokens: expected {config.vocab_size}, as vocab_size in {CONFIG} says, got {got}; do the files "
            "belong together?"
        )
    return tokenizer


def _grow(tokenizer: Tokenizer, action_ids: int, state_tokens: bool, folder: Path) -> tuple[Tokenizer, int]:
    """The tokenizer with state tokens and at least so many FAST tokens, which end it, and how many were added."""
    size, have = tokenizer.get_vocab_size(), 0
    while tokenizer.token_to_id(fast_token(have)) is not None:
        have += 1
    if have and tokenizer.token_to_id(fast_token(have - 1)) != size - 1:
        raise ConfigurationError(
            f"{TOKENIZER}: {fast_token(have - 1)}: expected the last of the {size} tokens, got id "
            f"{tokenizer.token_to_id(fast_token(have - 1))}; such a vocabulary cannot grow"
        )
    if state_tokens and not has_state_tokens(tokenizer):
        if have:
            raise ConfigurationError(
                f"{folder / TOKENIZER}: expected special tokens for the state, as model.state says, or no FAST tokens, "
                f"got {have} FAST tokens, which must stay at the vocabulary's end; begin with weights before either, "
                "or take another model.state"
            )
        tokenizer.add_special_tokens(own_tokens(0, state_tokens=True))
    tokenizer.add_special_tokens([fast_token(i) for i in range(have, action_ids)])
    return tokenizer, tokenizer.get_vocab_size() - size


def _choose_sizes(
    start: StartConfig, found: VLAConfig, model: ModelConfig | None, state_width: int, action_width: int
) -> VLAConfig:
    """The checkpoint's sizes where parts are taken, else the configuration's, if it has any."""
    faults, new = list[str](), dict[str, Any]()  # what is not the checkpoint's, replaced at once, as it must agree
    if model is not None:
        new["hybrid_mask"] = model.hybrid_mask
        for part in ("vision", "backbone", "expert"):
            wanted = model.expert_sizes if part == "expert" else getattr(model, part)
            got = getattr(found, part)
            if part not in start.parts:
                new[part] = wanted
            else:
                faults += [
                    f"{part}.{key}: expected {value}, as model says, got {asdict(got)[key]}"
                    for key, value in asdict(wanted).items()
                    if value != asdict(got)[key]
                ]
        said = model.model_dump(exclude_unset=True).get("conditioning", found.conditioning)
        if "expert" in start.parts and said != found.conditioning:
            faults.append(f"conditioning: expected {said}, as model says, got {found.conditioning}")
        if "expert" in start.parts and model.actions != found.actions:
            faults.append(f"actions: expected {model.actions}, as model says, got {found.actions}")
        if "expert" in start.parts and model.state_token != (found.state_dim is not None):
            faults.append(
                f"state_dim: expected {'a' if model.state_token else 'no'} state token, got {found.state_dim}"
            )
    token = found.state_dim is not None if model is None or "expert" in start.parts else model.state_token
    if "expert" not in start.parts:
        new |= {"action_dim": action_width, "state_dim": state_width if token else None}
        if model is not None:
            new |= {"conditioning": model.conditioning, "actions": model.actions}
    else:
        for key, expected, got in (
            ("action_dim", action_width, found.action_dim),
            ("state_dim", state_width, found.state_dim if token else state_width),
        ):
            if got is not None and got < expected:
                faults.append(f"{key}: expected at least the robot's {expected}, got {got}")
    if faults:
        raise ConfigurationError(
            f"{start.checkpoint / CONFIG}: "
            + "; ".join(faults)
            + "; leave model out, name the checkpoint's sizes, or take other parts (start.parts)"
        )
    return replace(found, **new)


def _choose_prompt(policy: PolicySpec | None, config: VLAConfig, new_expert: bool) -> tuple[PromptSpec, StateEncoding]:
    """As the checkpoint's policy has them; without one, or with a new expert for a prompt without state, pi0.5's."""
    if policy is not None and not new_expert:
        return policy.prompt, policy.state.encoding
    prompt = policy.prompt if policy is not None and policy.state.in_prompt else PROMPTS["pi05"]
    return prompt, "text" if config.state_dim is None else "both"


def _take(start: StartConfig, found: VLAConfig, config: VLAConfig, seed: int) -> dict[str, Tensor]:
    """The weights, in float32: of the checkpoint where a part is taken, else drawn."""
    file, sizes = WeightFiles([start.checkpoint / WEIGHTS]), shapes(config)
    check_fit(shapes(found), file.shapes, str(start.checkpoint / WEIGHTS), f"as {CONFIG} beside it says")
    prefixes = tuple(prefix for part in start.parts for prefix in IN_PART[part])
    wanted = {name: size for name, size in sizes.items() if name.startswith(prefixes)}
    if misfits := [
        f"{name}: expected {list(size)}, got {list(file.shapes.get(name, ()))}"
        for name, size in wanted.items()
        if name != TABLE and file.shapes.get(name) != size
    ]:
        raise ConfigurationError(
            f"{start.checkpoint / WEIGHTS}: " + "; ".join(misfits[:5]) + "; take the parts that belong together"
        )
    weights = {name: file.get(name, torch.float32) for name in wanted if name != TABLE}
    if start.adapter is not None:
        adapter = Adapter(start.adapter, lambda keys, path: _our_spelling(keys, path, found))
        adapter.check({name: size for name, size in file.shapes.items() if name.startswith(prefixes)})
        weights = {name: adapter.merge(name, tensor) for name, tensor in weights.items()}
    if TABLE in wanted:
        weights[TABLE] = token_table(file, TABLE, found.vocab_size, config.vocab_size, torch.float32, seed)
        if start.adapter is not None:
            weights[TABLE][: found.vocab_size] = adapter.merge(TABLE, weights[TABLE][: found.vocab_size].clone())
    if missing := sizes.keys() - weights.keys():
        weights |= {name: tensor for name, tensor in _draw(config, missing, seed).items() if name in missing}
    return weights


def _draw(config: VLAConfig, missing: Iterable[str], seed: int) -> Mapping[str, Tensor]:
    if config.actions == "expert" and all(name.startswith(IN_PART["expert"]) for name in missing):
        return untrained(config, seed)  # without memory for the rest
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return VLA(config).state_dict()


def _our_spelling(keys: Iterable[str], path: Path, config: VLAConfig) -> dict[str, str]:
    """An adapter's keys by our names, whether it was saved under ours or, as for PaliGemma's form, under openpi's."""
    ours = [name.rpartition(".")[0] for name in shapes(config)]
    if config.vision.stem != "patch":
        return {key: key for key in keys}
    modules = {their_name(f"{module}.weight", config).removesuffix(".weight"): module for module in ours}
    split = re.compile(r"(?P<module>.+?)(?P<rest>(\.lora_[AB](\.default)?)?\.(weight|bias))")
    renamed = {}
    for spelled, key in spellings(keys, path).items():
        found = split.fullmatch(spelled)
        known = None if found is None else modules.get(found["module"])
        renamed[spelled if found is None or known is None else known + found["rest"]] = key
    return renamed


def _describe(dimension: object) -> str:
    """A dimension of state or action by what its statistics depend on."""
    fields = {key: getattr(dimension, key, None) for key in ("kind", "unit", "relative")}
    said = ", ".join(f"{key} {value}" for key, value in fields.items() if value not in (None, False))
    return f"{getattr(dimension, 'name', '')} ({said})"
