"""A stage's optimizer: its parameters, its learning rate, clipped gradients, and its state in a resumed run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ki_vla_ros.errors import ConfigurationError
from training.config import Part, StageConfig
from training.losses import TrainingHeads
from training.model import VLA
from training.parallel import like


def select_parameters(model: VLA, heads: TrainingHeads | None, parts: tuple[Part, ...]) -> list[nn.Parameter]:
    """The parameters of these parts; all others are switched off, so that no gradient is computed for them."""
    modules: dict[Part, list[nn.Module]] = {
        "stem": [model.vision.stem],
        "vision": [model.vision, model.projector],
        "backbone": [model.backbone],
        "expert": [m for m in (model.expert, model.action_in, model.action_out, model.state_in) if m is not None],
        "heads": [] if heads is None else [heads],
    }
    for parameter in [*model.parameters(), *(heads.parameters() if heads is not None else ())]:
        parameter.requires_grad_(False)
    chosen = {id(p): p for part in parts for module in modules[part] for p in module.parameters()}
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    return list(chosen.values())


def learning_rate(stage: StageConfig, step: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth of the stage's learning rate."""
    if step < stage.warmup_steps:
        return stage.learning_rate * (step + 1) / stage.warmup_steps
    done = (step - stage.warmup_steps) / max(1, stage.steps - stage.warmup_steps)
    return stage.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizer(parameters: Sequence[nn.Parameter], learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW; the fused kernel updates sharded parameters, as the one over lists would copy all of them."""
    groups = [
        {"params": group} | ({"fused": True} if isinstance(group[0], DTensor) else {})
        for group in by_placement(parameters)
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), weight_decay=weight_decay)


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """Scale all gradients so that their norm over all processes is at most `limit`; returns the norm before that."""
    if not any(isinstance(parameter, DTensor) for parameter in parameters):
        return nn.utils.clip_grad_norm_(parameters, limit)
    norms = []
    for group in by_placement(parameters):
        norm = nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total: Tensor = torch.stack(norms).norm()
    for group in by_placement(parameters):
        nn.utils.clip_grads_with_norm_(group, limit, total)
    return total


def by_placement(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Sharded and whole parameters separately: torch's fused operations on lists take one kind at a time."""
    groups = [[p for p in parameters if isinstance(p, DTensor) is sharded] for sharded in (True, False)]
    return [group for group in groups if group]


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """`load_state_dict` of whole tensors; moments are sharded like their parameter."""
    ours, theirs = (
        [len(group["params"]) for group in groups] for groups in (optimizer.param_groups, state["param_groups"])
    )
    if ours != theirs:
        raise ConfigurationError(
            f"resume: expected optimizer state of parameter groups {ours}, got {theirs}; within a stage, keep the "
            "settings that it began with (parallel.shard, train)"
        )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        index: {key: like(v, parameters[index]) if torch.is_tensor(v) and v.ndim else v for key, v in moment.items()}
        for index, moment in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})
