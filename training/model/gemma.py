"""The backbone: Gemma's attention, and its transformer as a prefix language model.

Legend: B batch, S query tokens, C context tokens (keys), P prefix tokens (images and prompt), T postfix tokens (answer
text or FAST actions), W width, Q query heads, K key/value heads, G = Q / K, D head_dim.
"""

from collections.abc import Iterable, Mapping, MutableSequence, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ki_vla_ros.errors import ConfigurationError

ROPE_BASE = 10_000.0
LARGEST_SIZE: Final = 1 << 20
MASKED = -2.3819763e38
"""Finite, so that a row with nothing to see gives a uniform average and never NaN (Gemma's constant)."""

Rotation = tuple[Tensor, Tensor]
Layer = TypeVar("Layer", bound=nn.Module)


def check_sizes(part: str, config: Any, multiples: Mapping[str, str]) -> None:
    """ConfigurationError unless all numbers of a dataclass are positive, and some are multiples of others."""
    for field in fields(config):
        size = getattr(config, field.name)
        if isinstance(size, int) and not 1 <= size <= LARGEST_SIZE:
            raise ConfigurationError(f"{part}.{field.name}: expected 1 to {LARGEST_SIZE}, got {size}")
    for name, of in multiples.items():
        if getattr(config, name) % getattr(config, of):
            raise ConfigurationError(
                f"{part}.{name}: expected a multiple of {of} {getattr(config, of)}, got {getattr(config, name)}"
            )


def as_layers(layers: Iterable[Layer]) -> MutableSequence[Layer]:
    """An `nn.ModuleList` typed by its layers, whose attributes a type checker would not know otherwise."""
    return cast("MutableSequence[Layer]", nn.ModuleList(layers))


def rotation(position_BS: Tensor, head_dim: int) -> Rotation:
    """Cosine and sine, each [B, S, 1, D / 2], of the rotary embedding at the given positions."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_BS.device) / head_dim
    angle = position_BS.to(torch.float32)[:, :, None, None] * ROPE_BASE**-exponent
    return angle.cos(), angle.sin()


def rotate(x_BSQD: Tensor, turn: Rotation) -> Tensor:
    """Rotate feature i together with feature i + D / 2 (the half-split layout of Gemma); angles are float32."""
    cos, sin = turn
    first, second = x_BSQD.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BSQD.dtype)


def additive(visible: Tensor) -> Tensor:
    """Turn a boolean mask (True = may be seen) into what is added to the attention scores."""
    return torch.where(visible, 0.0, MASKED)


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention over the last two axes, with the softmax in float32 whatever the type of the inputs.

    torch's fused kernels do that anyway; in an ONNX graph the softmax would have the type of the scores.
    """
    if query.dtype == torch.float32 or not torch.onnx.is_in_onnx_export():
        mask = None if bias is None else bias.to(query.dtype)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    scores = (query @ key.mT).float() * query.shape[-1] ** -0.5
    return (scores if bias is None else scores + bias).softmax(dim=-1).to(value.dtype) @ value


def attend(query_BSQD: Tensor, key_BKCD: Tensor, value_BKCD: Tensor, bias: Tensor) -> Tensor:
    """Softmax attention [B, S, Q * D]; `bias` broadcasts to [B, K, S * G, C], the G heads of a token adjacent.

    The heads that share one key head are laid along the query axis: no key or value is copied, and with one key
    head (Gemma's multi-query attention) the queries are only viewed differently.
    """
    batch, tokens, heads, head_dim = query_BSQD.shape
    kv_heads = key_BKCD.shape[1]
    group = heads // kv_heads
    query = query_BSQD.reshape(batch, tokens, kv_heads, group, head_dim).transpose(1, 2)
    query = query.reshape(batch, kv_heads, tokens * group, head_dim)
    out = softmax_attention(query, key_BKCD, value_BKCD, bias)
    out = out.reshape(batch, kv_heads, tokens, group, head_dim).transpose(1, 2)
    return out.reshape(batch, tokens, heads * head_dim)


@dataclass(frozen=True)
class GemmaConfig:
    """Sizes of the backbone or of the action expert."""

    width: int
    depth: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        check_sizes("gemma", self, multiples={"heads": "kv_heads"})
        if self.head_dim % 2:
            raise ConfigurationError(f"gemma.head_dim: expected an even number, got {self.head_dim}")

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.heads // self.kv_heads


class RMSNorm(nn.Module):
    """Root-mean-square norm; the weight is stored as its distance from 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return (normalize(x) * (1.0 + self.weight.float())).to(x.dtype)


def normalize(x: Tensor) -> Tensor:
    """Scale the last axis to a root mean square of 1, in float32.

    Squares of Gemma's activations leave half precision's range, and bfloat16 keeps only eight bits of their sum.
    """
    x = x.float()
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6)


class Projections(nn.Module):
    """Queries, keys and values of one layer, rotated to their positions, and the way back to the residual stream."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.heads, config.head_dim
        self.q = nn.Linear(config.width, config.heads * config.head_dim, bias=False)
        self.k = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.v = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.out = nn.Linear(config.heads * config.head_dim, config.width, bias=False)

    def project(self, x_BSW: Tensor, turn: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, S, Q, D], keys and values [B, K, S, D] of the same tokens."""
        return self.queries(x_BSW, turn), *self.keys_values(x_BSW, turn)

    def queries(self, x_BSW: Tensor, turn: Rotation) -> Tensor:
        """[B, S, Q, D]."""
        return rotate(self.q(x_BSW).unflatten(-1, (-1, self.head_dim)), turn)

    def keys_values(self, x_BSW: Tensor, turn: Rotation) -> tuple[Tensor, Tensor]:
        """Both [B, K, S, D]."""
        key = rotate(self.k(x_BSW).unflatten(-1, (-1, self.head_dim)), turn)
        value = self.v(x_BSW).unflatten(-1, (-1, self.head_dim))
        return key.transpose(1, 2), value.transpose(1, 2)


class MLP(nn.Module):
    """Gated GELU (tanh form)."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.mlp, bias=False)
        self.up = nn.Linear(config.width, config.mlp, bias=False)
        self.down = nn.Linear(config.mlp, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.gate(x), approximate="tanh") * self.up(x))


class BackboneLayer(nn.Module):
    """Pre-norm attention and MLP. The prefix sees the prefix; the postfix sees the prefix and its own past."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.width)
        self.attention = Projections(config)
        self.norm2 = RMSNorm(config.width)
        self.mlp = MLP(config)

    def keys_values(self, x_BSW: Tensor, turn: Rotation) -> tuple[Tensor, Tensor]:
        """What the layer offers to readers, both [B, K, S, D]."""
        return self.attention.keys_values(self.norm1(x_BSW), turn)

    def scores(self, x_BSW: Tensor, turn: Rotation, head: int) -> Tensor:
        """One head's scaled attention scores before masking and softmax, [B, S, S]."""
        normed = self.norm1(x_BSW)
        query = self.attention.queries(normed, turn)[:, :, head]
        key = self.attention.keys_values(normed, turn)[0]
        kv_head = head * key.shape[1] // self.attention.heads
        return query @ key[:, kv_head].mT * self.attention.head_dim**-0.5

    def read_on(
        self, x_BTW: Tensor, turn: Rotation, key_BKCD: Tensor, value_BKCD: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The residual stream of tokens that follow those whose keys and values are given; keys and values of all."""
        query, key, value = self.attention.project(self.norm1(x_BTW), turn)
        key, value = torch.cat((key_BKCD, key), dim=2), torch.cat((value_BKCD, value), dim=2)
        x_BTW = x_BTW + self.attention.out(attend(query, key, value, bias))
        return x_BTW + self.mlp(self.norm2(x_BTW)), key, value

    def forward(self, x_BSW: Tensor, turn: Rotation, view: "View", first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """The residual stream after the layer from prefix token `first` on, and the keys and values of all tokens."""
        normed = self.norm1(x_BSW)
        if first:
            key, value = self.attention.keys_values(normed, turn)
            query = self.attention.queries(normed[:, first:], (turn[0][:, first:], turn[1][:, first:]))
        else:
            query, key, value = self.attention.project(normed, turn)
        prefix = view.prefix_bias.shape[-1]
        split = prefix - first
        seen = attend(query[:, :split], key[:, :, :prefix], value[:, :, :prefix], view.prefix_bias)
        if view.postfix_bias is not None:
            seen = torch.cat((seen, attend(query[:, split:], key, value, view.postfix_bias)), dim=1)
        x_BSW = x_BSW[:, first:] + self.attention.out(seen)
        return x_BSW + self.mlp(self.norm2(x_BSW)), key, value


@dataclass(frozen=True)
class View:
    """Who sees whom in the backbone, as biases on the scores."""

    prefix_bias: Tensor
    """[B, 1, 1, P]"""
    postfix_bias: Tensor | None
    """[B, 1, T * G, P + T]"""


def make_view(prefix_mask_BP: Tensor, postfix_mask_BT: Tensor | None, group: int) -> View:
    """The view of all rows; only keys are masked, so padding rows see the prefix too, stay finite, and are not read."""
    prefix_bias = additive(prefix_mask_BP)[:, None, None, :]
    if postfix_mask_BT is None:
        return View(prefix_bias, None)
    tokens = postfix_mask_BT.shape[1]
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=postfix_mask_BT.device).tril()
    past = additive(causal & postfix_mask_BT[:, None, :])
    whole = torch.cat((prefix_bias[:, 0].expand(-1, tokens, -1), past), dim=-1)
    return View(prefix_bias, whole.repeat_interleave(group, dim=1)[:, None])


def positions(mask_BS: Tensor) -> Tensor:
    """Each token's number among the valid ones, from 0, so that padding does not shift what follows it."""
    return mask_BS.long().cumsum(dim=1) - 1


class Backbone(nn.Module):
    """Token table (tied with the output head), layers and final norm."""

    layers: MutableSequence[BackboneLayer]

    def __init__(self, config: GemmaConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(vocab_size, config.width)
        self.layers = as_layers(BackboneLayer(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.width)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token embeddings at the scale of the residual stream."""
        return self.embedding(tokens) * self.config.width**0.5

    def follow(
        self, x_BTW: Tensor, turn: Rotation, keys_BKCD: Sequence[Tensor], values_BKCD: Sequence[Tensor], bias: Tensor
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Hidden states of tokens that follow those whose keys and values are given, by layer; keys and values of all.

        `bias` [B, 1, T * G, C + T] says whom they see.
        """
        keys, values = [], []
        for layer, key, value in zip(self.layers, keys_BKCD, values_BKCD, strict=True):
            x_BTW, key, value = layer.read_on(x_BTW, turn, key, value, bias)
            keys.append(key)
            values.append(value)
        return self.norm(x_BTW), keys, values
