"""Flow matching, the paper's loss for the action expert: which times, which prefixes, which velocity; and regression.

Legend: R rows (batch x noise samples), H horizon, A action dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class FlowRows(NamedTuple):
    """What the expert is given, what it should name (a velocity; in a regression the actions), and where it learns."""

    x_t_RHA: Tensor
    time_RH: Tensor
    target_RHA: Tensor
    learned_RH: Tensor


def draw_flow_time(rows: int, horizon: int, max_prefix: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Time [R, H] for each action, and the mask [R, H] of those that are learned.

    t = 0.999 * Beta(1.5, 1) + 0.001, noise at t = 1 (openpi's convention; the papers write tau = 1 - t). On average,
    in every second row the first d actions, d uniform in 1..max_prefix, are a clean prefix: time 0 and no loss
    (arXiv 2512.05964). The other rows have no prefix, because only one executor gives the model one.
    """
    uniform = torch.rand(rows, generator=generator)
    time_R = 0.999 * uniform ** (1.0 / 1.5) + 0.001  # inverse of Beta(1.5, 1)'s distribution function t^1.5
    prefix_R = torch.randint(1, max_prefix + 1, (rows,), generator=generator) if max_prefix else torch.zeros(rows)
    prefix_R = prefix_R * torch.randint(0, 2, (rows,), generator=generator)
    learned_RH = torch.arange(horizon)[None, :] >= prefix_R[:, None]
    return time_R[:, None] * learned_RH, learned_RH


def run_ahead(
    action_RHA: Tensor, learned_RH: Tensor, known_R: Tensor, lead: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Chunks with the clean prefix that an arm trailing its command is given, and the mask of what can be learned.

    A demonstration's chunk begins where the arm is. At run time the prefix comes from the running chunk: it is up to
    `lead` periods ahead of the arm (or, at the start, up to one behind), and slower while the arm gains speed. So the
    prefix follows the chunk from another place at another pace, and the actions after it go on from there at the
    chunk's own pace. Actions past the chunk's end, or past what is known of it (its first `known_R`), are not learned.
    Rows without a prefix stay as they are.
    """
    rows, horizon, _ = action_RHA.shape
    prefix_R1 = (~learned_RH).sum(dim=1, keepdim=True)
    start_R1 = torch.rand(rows, 1, generator=generator).to(action_RHA.device) * (lead + 1.0) - 1.0
    pace_R1 = torch.rand(rows, 1, generator=generator).to(action_RHA.device) + 0.2
    k_H = torch.arange(horizon, device=action_RHA.device)
    phase_RH = start_R1 + pace_R1 * torch.minimum(k_H, prefix_R1 - 1) + (k_H - prefix_R1 + 1).clamp(min=0)
    phase_RH = torch.where(prefix_R1 > 0, phase_RH, k_H.to(phase_RH.dtype))
    before_RH = phase_RH.floor().clamp(0, horizon - 2).long()
    # Below 0 before the first action: on the line of the first two.
    share_RH1 = (phase_RH - before_RH).clamp(max=1.0)[..., None]
    one, two = (action_RHA.gather(1, (before_RH + i)[..., None].expand_as(action_RHA)) for i in (0, 1))
    return one + share_RH1 * (two - one), learned_RH & (phase_RH <= known_R[:, None] - 1)


def mix_flow(action_RHA: Tensor, noise_RHA: Tensor, time_RH: Tensor) -> tuple[Tensor, Tensor]:
    """x_t = t * noise + (1 - t) * action, and the velocity u = noise - action that the expert learns."""
    time = time_RH[..., None]
    return time * noise_RHA + (1 - time) * action_RHA, noise_RHA - action_RHA


def match_flow(
    velocity_RHA: Tensor,
    target_RHA: Tensor,
    learned_RH: Tensor | tuple[Tensor, ...],
    weight_RA: Tensor | None = None,
) -> Tensor:
    """Mean squared error over the actions that are learned, 0 if none is.

    `weight_RA` weighs the dimensions of each row.
    """
    return mean_learned((velocity_RHA - target_RHA) ** 2, learned_RH, weight_RA)


def match_actions(named_RHA: Tensor, target_RHA: Tensor, learned_RH: Tensor, weight_RA: Tensor | None = None) -> Tensor:
    """Mean absolute error over the actions that are learned, 0 if none is (OpenVLA-OFT)."""
    return mean_learned((named_RHA - target_RHA).abs(), learned_RH, weight_RA)


def mean_learned(error_RHA: Tensor, learned_RH: Tensor | tuple[Tensor, ...], weight_RA: Tensor | None) -> Tensor:
    error_NA = error_RHA[learned_RH]
    if weight_RA is None:
        return error_NA.sum() / max(1, error_NA.numel())
    weight_NA = weight_RA[:, None].expand(-1, error_RHA.shape[1], -1)[learned_RH]
    return (error_NA * weight_NA).sum() / weight_NA.sum().clamp(min=1.0)
