"""The losses of the recipe, each a plain function of model outputs and a batch.

Legend: B batch, P prefix tokens, T postfix tokens, D width, N image cells, K readout frequencies, A action dim, H
horizon, R rows (batch x noise samples). The paper's (arXiv 2505.23705) are `predict_postfix` (text and FAST alike) and
`match_flow`. `name_cells`, `point_at_target`, `read_out` (cross-entropies) and `ground` (a smooth L1 error) are
additions that make small models learn in minutes; they touch the backbone only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from training.config import Loss
from training.data.simulated.draw import NO_TARGET

Index = Tensor | tuple[Tensor, ...]
"""A boolean mask, or the indices of what it selects."""


class TrainingHeads(nn.Module):
    """Heads that only training needs; never exported.

    `cells` names what an image cell shows. `place` and `state` say where the asked object is (u and v in the scene
    image) and what the prompt says of the joints (normalised). `readout[k]` turns the k-th learned prompt token into
    one distribution per joint over the integers that are FAST's k-th lowest frequency: a logistic one, as neighbouring
    integers mean neighbouring motions. A softmax over hundreds of integers has to learn that, which took too long here.
    """

    COEFFICIENT_SCALE = 10.0  # what the heads' outputs, about 1 at first, are multiplied by

    def __init__(self, vision_width: int, width: int, kinds: int, frequencies: int, action_dim: int) -> None:
        super().__init__()
        self.cells = nn.Linear(vision_width, kinds)
        self.place = nn.Linear(width, 2)
        self.state = nn.Linear(width, action_dim)
        self.readout = nn.ModuleList(nn.Linear(width, 2 * action_dim) for _ in range(frequencies))

    def name_coefficients(self, hidden_BKD: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and spread [B, K, A] of each coefficient's distribution."""
        named = torch.stack([head(hidden_BKD[:, k]) for k, head in enumerate(self.readout)], dim=1)
        mean, log_spread = named.chunk(2, dim=-1)
        return self.COEFFICIENT_SCALE * mean, (log_spread + 1.0).clamp(-2.0, 5.0).exp()


def predict_postfix(logits_BTW: Tensor, postfix_BT: Tensor, postfix_mask_BT: Index) -> Tensor:
    """Cross-entropy of the next token, mean over the tokens that count. `logits[:, t]` predicts `postfix[:, t]`."""
    return F.cross_entropy(logits_BTW[postfix_mask_BT], postfix_BT[postfix_mask_BT])


def predict_in_pieces(
    logits: Callable[[Tensor], Tensor], hidden_BTD: Tensor, postfix_BT: Tensor, mask: Index, rows: int = 1024
) -> Tensor:
    """`predict_postfix` without ever holding the logits of more than `rows` tokens: they are computed for the loss, and
    again for its gradient. With a vocabulary of 257,152 the logits of one token and their gradients take 4 MB.
    """
    hidden_ND, postfix_N = hidden_BTD[mask], postfix_BT[mask]

    def lose(hidden: Tensor, token: Tensor) -> Tensor:
        return F.cross_entropy(logits(hidden), token, reduction="sum")

    pieces = zip(hidden_ND.split(rows), postfix_N.split(rows), strict=True)
    return torch.stack([checkpoint(lose, *piece, use_reentrant=False) for piece in pieces]).sum() / len(postfix_N)


def next_token_hidden(prefix_hidden_BPD: Tensor, last_B: Tensor, postfix_hidden_BTD: Tensor) -> Tensor:
    """Hidden states that predict the postfix:

    the last valid prefix token (index `last_B`), then each postfix token but the last.
    """
    first = prefix_hidden_BPD[torch.arange(len(last_B), device=last_B.device), last_B][:, None]
    return torch.cat([first, postfix_hidden_BTD[:, :-1]], dim=1)


def name_cells(heads: TrainingHeads, features_BND: Tensor, cells_BN: Tensor) -> Tensor:
    """Which kind of object each image cell shows. Background is most of the image, so it weighs a tenth."""
    weight = torch.ones(heads.cells.out_features, device=cells_BN.device)
    weight[-1] = 0.1
    return F.cross_entropy(heads.cells(features_BND).flatten(0, -2), cells_BN.flatten(), weight=weight)


def point_at_target(scores_BRP: Tensor, target_cell_B: Tensor, first_cell: int) -> Tensor:
    """Cross-entropy of attention scores (R asking rows, P prefix tokens; -inf where masked) towards the asked object's
    cell, where there is one. The image's first cell is prefix token `first_cell`.
    """
    asked = target_cell_B != NO_TARGET
    if not asked.any():
        return scores_BRP.new_zeros((), requires_grad=True)
    rows = scores_BRP[asked]
    targets = first_cell + target_cell_B[asked][:, None].expand(-1, rows.shape[1])
    return F.cross_entropy(rows.flatten(0, 1), targets.flatten())


def ground(heads: TrainingHeads, hidden_BRD: Tensor, place_B2: Tensor, state_BJ: Tensor | None) -> Tensor:
    """Mean error of place (0..1, where there is one; NaN: none) and normalised joint state that the asking rows name.

    An attention that looks at the right cell does not yet bring its place along; this makes it do so.
    """
    known = ~place_B2.isnan().any(dim=1)
    wanted = place_B2[known][:, None].expand(-1, hidden_BRD.shape[1], -1)
    loss = (
        4.0 * F.smooth_l1_loss(heads.place(hidden_BRD[known]), wanted, beta=0.02)
        if known.any()
        else 0.0 * hidden_BRD.sum()
    )
    if state_BJ is None:
        return loss
    named = heads.state(hidden_BRD)
    return loss + F.smooth_l1_loss(named, state_BJ[:, None].expand_as(named), beta=0.05)


def read_out(heads: TrainingHeads, hidden_BKD: Tensor, coefficient_BKA: Tensor) -> Tensor:
    """Cross-entropy of FAST's integer coefficients under the readout's logistic distributions.

    A value between two integers lies where its half-integer neighbourhood does, so nothing is lost by rounding.
    """
    mean, spread = heads.name_coefficients(hidden_BKD)
    above = torch.sigmoid((coefficient_BKA + 0.5 - mean) / spread)
    below = torch.sigmoid((coefficient_BKA - 0.5 - mean) / spread)
    near = (above - below).clamp(min=1e-6).log()
    # Far out both are 0 or 1 in float32; the density's logarithm goes on there, and with it the pull back.
    z = (coefficient_BKA - mean) / spread
    far = -z.abs() - 2 * F.softplus(-z.abs()) - spread.log()
    return -torch.where(z.abs() < 8, near, far).mean()


def draw_flow_time(rows: int, horizon: int, max_prefix: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Time [R, H] for each action and the mask [R, H] of those that are to be learned.

    t = 0.999 * Beta(1.5, 1) + 0.001, noise at t = 1 (openpi's convention; the papers write tau = 1 - t). In every
    second row the first d actions, d uniform in 1..max_prefix, are a clean prefix: time 0 and no loss
    (arXiv 2512.05964); the other rows have none, as the other executors have none.
    """
    uniform = torch.rand(rows, generator=generator)
    time_R = 0.999 * uniform ** (1.0 / 1.5) + 0.001  # inverse of Beta(1.5, 1)'s distribution function t^1.5
    prefix_R = torch.randint(1, max_prefix + 1, (rows,), generator=generator) if max_prefix else torch.zeros(rows)
    prefix_R = prefix_R * torch.randint(0, 2, (rows,), generator=generator)
    learned_RH = torch.arange(horizon)[None, :] >= prefix_R[:, None]
    return time_R[:, None] * learned_RH, learned_RH


def run_ahead(action_RHA: Tensor, learned_RH: Tensor, lead: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Chunks whose clean prefix is what an arm that trails its command is given, and what of them can be learned.

    The chunk of a demonstration begins where the arm is. At run time the prefix comes from the running chunk: up to
    `lead` periods ahead of the arm (or, as it starts, up to one behind), and slower while the arm gains speed. So the
    prefix runs along the chunk from another place at another pace, and the actions after it go on from there at the
    chunk's own pace. What would lie past the chunk's end is not learned. Rows without a prefix stay as they are.
    """
    rows, horizon, _ = action_RHA.shape
    prefix_R1 = (~learned_RH).sum(dim=1, keepdim=True)
    start_R1 = torch.rand(rows, 1, generator=generator).to(action_RHA.device) * (lead + 1.0) - 1.0
    pace_R1 = torch.rand(rows, 1, generator=generator).to(action_RHA.device) + 0.2
    k_H = torch.arange(horizon, device=action_RHA.device)
    phase_RH = start_R1 + pace_R1 * torch.minimum(k_H, prefix_R1 - 1) + (k_H - prefix_R1 + 1).clamp(min=0)
    phase_RH = torch.where(prefix_R1 > 0, phase_RH, k_H.to(phase_RH.dtype))
    before_RH = phase_RH.floor().clamp(0, horizon - 2).long()
    share_RH1 = (phase_RH - before_RH).clamp(max=1.0)[..., None]  # negative before the first action: on its line
    one, two = (action_RHA.gather(1, (before_RH + i)[..., None].expand_as(action_RHA)) for i in (0, 1))
    return one + share_RH1 * (two - one), learned_RH & (phase_RH <= horizon - 1)


def mix_flow(action_RHA: Tensor, noise_RHA: Tensor, time_RH: Tensor) -> tuple[Tensor, Tensor]:
    """x_t = t * noise + (1 - t) * action, and the velocity u = noise - action that the expert learns."""
    time = time_RH[..., None]
    return time * noise_RHA + (1 - time) * action_RHA, noise_RHA - action_RHA


def match_flow(velocity_RHA: Tensor, target_RHA: Tensor, learned_RH: Index) -> Tensor:
    """Mean squared error over the actions that are learned, real action dimensions only."""
    return ((velocity_RHA - target_RHA) ** 2)[learned_RH].mean()


def backpropagate(found: dict[Loss, Tensor], weights: dict[Loss, float], values: dict[str, float]) -> None:
    """Backward of the weighted sum of those losses that have a weight; adds their values to `values`."""
    chosen = {name: loss for name, loss in found.items() if name in weights}
    torch.stack([weights[name] * loss for name, loss in chosen.items()]).sum().backward()
    for name, loss in chosen.items():
        values[name] = values.get(name, 0.0) + float(loss.detach())
