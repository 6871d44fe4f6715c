"""A stage's optimizer: its parameters, its learning rates, clipped gradients, and its state in a resumed run.

Parameters are chosen by part or by a glob pattern over their names (`*` also stands for dots), as
`model.named_parameters()` gives them; those of the training heads begin with `heads.`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import cast, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ki_vla_ros.errors import ConfigurationError
from training.config import Part, StageConfig
from training.losses import TrainingHeads
from training.model import VLA
from training.weights import PieceReader

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


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Parameters) -> dict[str, Tensor]:
    """The optimizer's state, `optimizer.KIND.PARAMETER`; none of a parameter that never had a gradient."""
    return {
        f"optimizer.{kind}.{name}": value
        for name, parameter in parameters.items()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, parameters: Parameters, saved: PieceReader) -> None:
    """Load the state that `optimizer_tensors` gave, laid out like the parameters of now.

    torch's `set_optimizer_state_dict` is not it: it gives a state to each parameter first, by a step without gradients.
    Learning rates, betas and weight decay are those of the configuration.
    """
    states: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    for full, shape in saved.shapes.items():
        if not full.startswith("optimizer."):
            continue
        _, kind, name = full.split(".", 2)
        if name not in states:
            raise ConfigurationError(
                f"resume {saved.folder}: expected optimizer state of the parameters that the stage trains, got some of "
                f"{name}; within a stage, keep what it began to train (train, freeze)"
            )
        dtype = saved.dtype(full)
        states[name][kind] = torch.empty_like(parameters[name], dtype=dtype) if shape else torch.empty((), dtype=dtype)
    saved.load({f"optimizer.{kind}.{name}": x for name, state in states.items() for kind, x in state.items()})
    names = {parameter: name for name, parameter in parameters.items()}
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    loaded = {index: states[name] for index, name in enumerate(order) if states[name]}
    optimizer.load_state_dict(optimizer.state_dict() | {"state": loaded})
