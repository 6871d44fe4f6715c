"""The action expert: a small transformer with its own weights that reads the backbone's keys and values.

Legend: R rows (noise samples; a multiple of the batch B), B batch, P prefix tokens, E expert tokens (state token, if
any, and actions), W width, Q query heads, K key/value heads, D head_dim.
"""

import math
from collections.abc import MutableSequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.model.gemma import (
    MLP,
    Backbone,
    GemmaConfig,
    Projections,
    RMSNorm,
    Rotation,
    additive,
    as_layers,
    attend,
    normalize,
)

Conditioning = Literal["adarms", "concat"]
"""How the flow time enters: through every norm (pi0.5), or mixed with the embedded actions (pi0)."""
SHORTEST_PERIOD, LONGEST_PERIOD = 4e-3, 4.0


def time_periods(width: int, device: torch.device | None = None) -> Tensor:
    """The periods of the waves that embed the time: geometrically spaced, float64 [width / 2]."""
    fraction = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device=device)
    return SHORTEST_PERIOD * (LONGEST_PERIOD / SHORTEST_PERIOD) ** fraction


def embed_time(time: Tensor, width: int) -> Tensor:
    """[..., width]: sines, then cosines, of the flow time; angles reach 1570 rad, hence float64 on the way."""
    angle = time.double()[..., None] * (2.0 * math.pi / time_periods(width, time.device))
    return torch.cat((angle.sin(), angle.cos()), dim=-1).to(time.dtype)


class AdaRMSNorm(nn.Module):
    """RMS norm whose scale, shift and residual gate are a linear function of the time condition (pi0.5).

    That function is zero at the start of training: the norm is plain, and the gate closes the branch.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, 3 * width)

    def forward(self, x_REW: Tensor, condition_REW: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift, gate = self.dense(condition_REW).float().chunk(3, dim=-1)
        return torch.addcmul(shift, normalize(x_REW), 1.0 + scale).to(x_REW.dtype), gate.to(x_REW.dtype)


class PlainNorm(RMSNorm):
    """What pi0 has in place of `AdaRMSNorm`: no condition, and no gate (None)."""

    def forward(self, x_REW: Tensor, _: None) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(x_REW), None


def make_norm(width: int, conditioning: Conditioning) -> nn.Module:
    return AdaRMSNorm(width) if conditioning == "adarms" else PlainNorm(width)


def gated(gate: Tensor | None, branch: Tensor) -> Tensor:
    return branch if gate is None else gate * branch


def expert_bias(mask_RP: Tensor, tokens: int, state: bool, group: int) -> Tensor:
    """What the expert's tokens see, the prefix and each other, as a bias [R, 1, E * G, P + E].

    A state token comes first and does not see the actions (openpi's cumulative rule: its block precedes theirs).
    """
    index = torch.arange(tokens, device=mask_RP.device)
    own_EE = (index[:, None] > 0) | (index[None, :] == 0) if state else index[:, None] >= 0
    own_REE = own_EE.expand(mask_RP.shape[0], tokens, tokens)
    visible = torch.cat((mask_RP[:, None, :].expand(-1, tokens, -1), own_REE), dim=-1)
    return additive(visible).repeat_interleave(group, dim=1)[:, None]


class ExpertLayer(nn.Module):
    """One softmax per row over the backbone's prefix and all expert tokens that the row may see."""

    def __init__(self, config: GemmaConfig, conditioning: Conditioning) -> None:
        super().__init__()
        self.norm1 = make_norm(config.width, conditioning)
        self.attention = Projections(config)
        self.norm2 = make_norm(config.width, conditioning)
        self.mlp = MLP(config)

    def forward(
        self,
        x_REW: Tensor,
        condition_REW: Tensor | None,
        key_RKPD: Tensor,
        value_RKPD: Tensor,
        turn: Rotation,
        bias: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The residual stream after the layer, and the keys and values of all that the layer's tokens see."""
        normed, gate = self.norm1(x_REW, condition_REW)
        query, key, value = self.attention.project(normed, turn)
        key, value = torch.cat((key_RKPD, key), dim=2), torch.cat((value_RKPD, value), dim=2)
        x_REW = x_REW + gated(gate, self.attention.out(attend(query, key, value, bias)))
        normed, gate = self.norm2(x_REW, condition_REW)
        return x_REW + gated(gate, self.mlp(normed)), key, value


class Expert(nn.Module):
    """Layers of the expert, the final norm, and the way in for the flow time."""

    layers: MutableSequence[ExpertLayer]

    def __init__(self, config: GemmaConfig, conditioning: Conditioning = "adarms") -> None:
        super().__init__()
        self.config = config
        self.conditioning = conditioning
        mixed = conditioning == "concat"
        self.time_in = nn.Linear(2 * config.width if mixed else config.width, config.width)
        self.time_out = nn.Linear(config.width, config.width)
        self.layers = as_layers(ExpertLayer(config, conditioning) for _ in range(config.depth))
        self.norm = make_norm(config.width, conditioning)

    def embed_actions(self, action_RHW: Tensor, time_RH: Tensor) -> Tensor:
        """Embedded actions as they enter the layers: with "concat" an MLP mixes each with its time."""
        if self.conditioning == "adarms":
            return action_RHW
        time_RHW = embed_time(time_RH, self.config.width).to(action_RHW.dtype)
        return self.time_out(F.silu(self.time_in(torch.cat((action_RHW, time_RHW), dim=-1))))

    def condition(self, time_RH: Tensor, with_state: bool) -> Tensor | None:
        """The time condition of every norm, one per token; None with "concat".

        A state token is clean, so its time is 0, like that of a clean action.
        """
        if not isinstance(self.norm, AdaRMSNorm):
            return None  # "concat": the time is in the actions
        time_RE = F.pad(time_RH, (1, 0)) if with_state else time_RH
        time_REW = embed_time(time_RE, self.config.width).to(self.time_in.weight.dtype)
        return F.silu(self.time_out(F.silu(self.time_in(time_REW)))).to(self.norm.dense.weight.dtype)

    def forward(
        self,
        x_REW: Tensor,
        condition_REW: Tensor | None,
        keys_RKPD: tuple[Tensor, ...],
        values_RKPD: tuple[Tensor, ...],
        turn: Rotation,
        bias: Tensor,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Hidden states after the final norm, and by layer the keys and values of prefix and expert."""
        keys, values = [], []
        for layer, key, value in zip(self.layers, keys_RKPD, values_RKPD, strict=True):
            x_REW, key, value = layer(x_REW, condition_REW, key, value, turn, bias)
            keys.append(key)
            values.append(value)
        return self.norm(x_REW, condition_REW)[0], keys, values


class BackboneAsExpert(Expert):
    """No expert: action tokens go through the backbone's own layers and norm (Transfusion, arXiv 2408.11039).

    Its own weights only mix actions and time on their way in, as in pi0.
    """

    def __init__(self, backbone: Backbone) -> None:
        nn.Module.__init__(self)
        self.config, self.conditioning = backbone.config, "concat"
        width = backbone.config.width
        self.time_in, self.time_out = nn.Linear(2 * width, width), nn.Linear(width, width)
        self.layers, self.norm = as_layers(()), nn.Identity()
        self.follow = backbone.follow  # a method, so the backbone is no part of this module

    def forward(
        self,
        x_REW: Tensor,
        condition_REW: Tensor | None,
        keys_RKPD: tuple[Tensor, ...],
        values_RKPD: tuple[Tensor, ...],
        turn: Rotation,
        bias: Tensor,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        return self.follow(x_REW, turn, keys_RKPD, values_RKPD, bias)


def empty_actions(like_RHA: Tensor) -> tuple[Tensor, Tensor]:
    """What a regression has in place of noisy actions: zeros [R, H, A], and each one's place in the chunk as its time.

    OpenVLA-OFT (arXiv 2502.19645) decodes all actions at once from such empty tokens.
    """
    horizon = like_RHA.shape[1]
    place_H = (torch.arange(horizon, device=like_RHA.device) + 0.5) / horizon
    return torch.zeros_like(like_RHA), place_H.to(like_RHA.dtype).expand(like_RHA.shape[:2])
