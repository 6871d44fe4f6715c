"""A stage's optimizer: its parameters, its learning rates, clipped gradients, and its state in a resumed run.

Parameters are chosen by part or by a glob pattern over their names (`*` also stands for dots), as
`model.named_parameters()` gives them; those of the training heads begin with `heads.`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ki_vla_ros.errors import ConfigurationError
from training.config import Part, StageConfig
from training.losses import TrainingHeads
from training.model import VLA
from training.parallel import like

Parameters = Mapping[str, nn.Parameter]
PARTS: dict[Part, tuple[str, ...]] = {
    "stem": ("vision.stem.*",),
    "vision": ("vision.*", "projector.*"),
    "backbone": ("backbone.*",),
    "expert": ("expert.*", "action_in.*", "action_out.*", "state_in.*"),
    "heads": ("heads.*",),
}
TABLES = ("backbone.embedding.weight", "vision.position.weight")


def named_parameters(model: VLA, heads: TrainingHeads | None) -> dict[str, nn.Parameter]:
    """All parameters by their names."""
    return dict([*model.named_parameters(), *(() if heads is None else heads.named_parameters(prefix="heads"))])


def match(names: Iterable[str], pattern: str, where: str) -> list[str]:
    """The names of a part, or those that a glob pattern matches; ConfigurationError with the nearest if none."""
    names = list(names)
    globs = PARTS.get(cast("Part", pattern), (pattern,))
    if found := [name for name in names if any(fnmatchcase(name, glob) for glob in globs)]:
        return found
    folders = {
        ".".join(words[:i]) + ".*" for words in (name.split(".") for name in names) for i in range(1, len(words))
    }
    nearest = get_close_matches(pattern, [*PARTS, *sorted(folders), *names], n=3, cutoff=0.0)
    raise ConfigurationError(
        f"{where}: expected a part ({', '.join(get_args(Part))}) or a pattern over the names of parameters, got "
        f"{pattern!r}, which matches none; nearest: {', '.join(nearest)}"
    )


def select_parameters(
    model: VLA, heads: TrainingHeads | None, train: Sequence[str], freeze: Sequence[str] = (), where: str = "train"
) -> dict[str, nn.Parameter]:
    """The parameters to train; all others are switched off, so that no gradient is computed for them."""
    every = named_parameters(model, heads)
    chosen = {name: every[name] for pattern in train for name in without_adapted(match(every, pattern, where), pattern)}
    for pattern in freeze:
        for name in match(every, pattern, f"{where}: freeze"):
            chosen.pop(name, None)
    if not chosen:
        raise ConfigurationError(
            f"{where}: expected something to train, got only frozen parameters; leave something out of freeze"
        )
    for name, parameter in every.items():
        parameter.requires_grad_(name in chosen)
    return chosen


def without_adapted(names: Sequence[str], pattern: str) -> Sequence[str]:
    """Of a part with LoRA, its factors and what is outside its layers, as in openpi: these learn in place of the rest.

    A pattern that is no part's name means all that it matches.
    """
    if pattern not in PARTS or not any(".lora_" in name for name in names):
        return names
    inside = f"{pattern}."
    return [name for name in names if ".lora_" in name or not name.startswith(inside) or ".time_" in name]


def schedule(stage: StageConfig, step: int) -> float:
    """The learning rate as a share of its peak: linear warm-up, a cosine down to the final one, then constant.

    As openpi's and optax's `warmup_cosine_decay_schedule`: warm-up begins at 1 / (warmup_steps + 1), and `decay_steps`
    are counted from the beginning of the stage.
    """
    if step < stage.warmup_steps:
        return (step + 1) / (stage.warmup_steps + 1)
    final = 0.05 if stage.final_learning_rate is None else stage.final_learning_rate / stage.learning_rate
    done = (step - stage.warmup_steps) / max(1, (stage.decay_steps or stage.steps) - stage.warmup_steps)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def peaks(names: Iterable[str], stage: StageConfig, where: str = "learning_rates") -> dict[str, float]:
    """Each parameter's largest learning rate: that of the last entry of `learning_rates` it belongs to, if any."""
    found = dict.fromkeys(names, stage.learning_rate)
    for pattern, rate in stage.learning_rates.items():
        found |= dict.fromkeys(match(found, pattern, f"stage {stage.name}: {where}: among what it trains"), rate)
    return found


def decays(name: str, parameter: nn.Parameter, stage: StageConfig) -> bool:
    """Whether weight decay applies: by default to matrices only, neither to norms and biases nor to tables of rows."""
    return stage.weight_decay_on == "all" or (parameter.ndim > 1 and name not in TABLES)


def make_optimizer(parameters: Parameters, stage: StageConfig) -> torch.optim.AdamW:
    """AdamW; the fused kernel updates sharded parameters, as the one over lists would copy all of them."""
    rates, groups = peaks(parameters, stage), dict[tuple[bool, float, float], list[tuple[str, nn.Parameter]]]()
    for name, parameter in parameters.items():
        decay = stage.weight_decay if decays(name, parameter, stage) else 0.0
        groups.setdefault((isinstance(parameter, DTensor), rates[name], decay), []).append((name, parameter))
    # torch's fused operations on lists take sharded or whole parameters, not both.
    ordered = sorted(groups.items(), key=lambda group: not group[0][0])
    return torch.optim.AdamW(
        [
            {"params": named, "lr": rate, "peak": rate, "weight_decay": decay} | ({"fused": True} if sharded else {})
            for (sharded, rate, decay), named in ordered
        ],
        betas=stage.betas,
    )


def set_learning_rates(optimizer: torch.optim.Optimizer, stage: StageConfig, step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * schedule(stage, step)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm of all gradients over all processes, each of which must call this."""
    norms = []
    for group in by_placement(parameters):
        norm = nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    return norms[0] if len(norms) == 1 else torch.stack(norms).norm()


def part_norms(parameters: Parameters) -> dict[Part, float]:
    """The gradients' norm by part; the stem belongs to vision."""
    parts: dict[Part, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        part = next(part for part in PARTS if part != "stem" and any(fnmatchcase(name, glob) for glob in PARTS[part]))
        parts.setdefault(part, []).append(parameter)
    return {part: float(gradient_norm(group)) for part, group in parts.items()}


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale all gradients so that their norm over all processes is at most `limit`; returns the norm before that."""
    parameters = list(parameters)
    total = gradient_norm(parameters)
    for group in by_placement(parameters):
        nn.utils.clip_grads_with_norm_(group, limit, total)
    return total


def by_placement(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Sharded and whole parameters separately: torch's fused operations on lists take one kind at a time."""
    parameters = list(parameters)
    groups = [[p for p in parameters if isinstance(p, DTensor) is sharded] for sharded in (True, False)]
    return [group for group in groups if group]


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """`load_state_dict` of whole tensors; moments are sharded like their parameter.

    Learning rates, betas and weight decay are those of the configuration: only the moments come from `state`.
    """
    ours, theirs = optimizer.param_groups, state["param_groups"]
    sizes = [[len(group["params"]) for group in groups] for groups in (ours, theirs)]
    names = [[group.get("param_names") for group in groups] for groups in (ours, theirs)]
    # State from before version 0.3 has no names.
    if sizes[0] != sizes[1] or (None not in names[1] and names[0] != names[1]):
        one, two = ({name for group in groups for name in group or ()} for groups in names)
        differing = sorted(one ^ two) if None not in names[1] else []
        raise ConfigurationError(
            f"resume: expected optimizer state of parameter groups {sizes[0]}, got {sizes[1]}"
            + (f", which differ in {', '.join(differing[:5])}" if differing else "")
            + "; within a stage, keep the settings that it began with (parallel.shard, train, freeze, learning_rates, "
            "weight_decay)"
        )
    parameters = [parameter for group in ours for parameter in group["params"]]
    moments = {
        index: {key: like(v, parameters[index]) if torch.is_tensor(v) and v.ndim else v for key, v in moment.items()}
        for index, moment in state["state"].items()
    }
    groups = [
        {**their, **{key: value for key, value in our.items() if key != "params"}}
        for our, their in zip(ours, theirs, strict=True)
    ]
    optimizer.load_state_dict({**state, "param_groups": groups, "state": moments})
