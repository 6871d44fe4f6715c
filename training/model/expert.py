"""The action expert: a small transformer with its own weights that reads the backbone's keys and values.

Legend: R rows (noise samples; a multiple of the batch B), B batch, P prefix tokens, E expert tokens (state token, if
any, and actions), W width, Q query heads, K key/value heads, D head_dim.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.model.attention import Rotation, additive, attend
from training.model.gemma import MLP, GemmaConfig, Projections, normalize

SHORTEST_PERIOD, LONGEST_PERIOD = 4e-3, 4.0


def embed_time(time: Tensor, width: int) -> Tensor:
    """Sines, then cosines, of the flow time at geometrically spaced periods -> [..., width]."""
    fraction = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device=time.device)
    period = SHORTEST_PERIOD * (LONGEST_PERIOD / SHORTEST_PERIOD) ** fraction
    angle = time[..., None] * (2.0 * math.pi / period).to(time.dtype)
    return torch.cat((angle.sin(), angle.cos()), dim=-1)


class AdaRMSNorm(nn.Module):
    """RMS norm whose scale, shift and residual gate are a linear function of the time condition (pi0.5).

    Zero at the start of training: the norm is plain, and the gate closes the branch.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, 3 * width)

    def forward(self, x_REW: Tensor, condition_REW: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift, gate = self.dense(condition_REW).chunk(3, dim=-1)
        return torch.addcmul(shift, normalize(x_REW), 1.0 + scale), gate


def expert_bias(mask_RP: Tensor, tokens: int, state: bool, group: int) -> Tensor:
    """Who the expert's tokens see: the prefix and each other -> [R, 1, E * G, P + E].

    A state token comes first and does not see the actions (openpi's cumulative rule: its block precedes theirs).
    """
    index = torch.arange(tokens, device=mask_RP.device)
    own_EE = (index[:, None] > 0) | (index[None, :] == 0) if state else index[:, None] >= 0
    own_REE = own_EE.expand(mask_RP.shape[0], tokens, tokens)
    visible = torch.cat((mask_RP[:, None, :].expand(-1, tokens, -1), own_REE), dim=-1)
    return additive(visible).repeat_interleave(group, dim=1)[:, None]


class ExpertLayer(nn.Module):
    """One softmax per row over the backbone's prefix and all expert tokens that the row may see."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.norm1 = AdaRMSNorm(config.width)
        self.attention = Projections(config)
        self.norm2 = AdaRMSNorm(config.width)
        self.mlp = MLP(config)

    def forward(
        self, x_REW: Tensor, condition_REW: Tensor, key_RKPD: Tensor, value_RKPD: Tensor, turn: Rotation, bias: Tensor
    ) -> Tensor:
        normed, gate = self.norm1(x_REW, condition_REW)
        query = self.attention.queries(normed, turn)
        key, value = self.attention.keys_values(normed, turn)
        key, value = torch.cat((key_RKPD, key), dim=2), torch.cat((value_RKPD, value), dim=2)
        x_REW = x_REW + gate * self.attention.out(attend(query, key, value, bias))
        normed, gate = self.norm2(x_REW, condition_REW)
        return x_REW + gate * self.mlp(normed)


class Expert(nn.Module):
    """Layers of the expert with a time-conditioned final norm."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.config = config
        self.time_in = nn.Linear(config.width, config.width)
        self.time_out = nn.Linear(config.width, config.width)
        self.layers = nn.ModuleList(ExpertLayer(config) for _ in range(config.depth))
        self.norm = AdaRMSNorm(config.width)

    def condition(self, time: Tensor) -> Tensor:
        """Time condition of every norm, one per token."""
        return F.silu(self.time_out(F.silu(self.time_in(embed_time(time, self.config.width)))))

    def forward(
        self,
        x_REW: Tensor,
        condition_REW: Tensor,
        keys_RKPD: tuple[Tensor, ...],
        values_RKPD: tuple[Tensor, ...],
        turn: Rotation,
        bias: Tensor,
    ) -> Tensor:
        for layer, key, value in zip(self.layers, keys_RKPD, values_RKPD, strict=True):
            x_REW = layer(x_REW, condition_REW, key, value, turn, bias)
        return self.norm(x_REW, condition_REW)[0]
