"""Rotary positions, additive masks and attention with grouped query heads.

Legend: B batch, S query tokens, C context tokens (keys), Q query heads, K key/value heads, G = Q / K, D head_dim.
"""

from collections.abc import Iterable, MutableSequence
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROPE_BASE = 10_000.0
MASKED = -2.3819763e38
"""Finite, so that a row with nothing to see gives a uniform average and never NaN (Gemma's constant)."""

Rotation = tuple[Tensor, Tensor]
Layer = TypeVar("Layer", bound=nn.Module)


def as_layers(layers: Iterable[Layer]) -> MutableSequence[Layer]:
    """An `nn.ModuleList`, which forgets what it is a list of: a type checker would know no layer's attributes."""
    return cast("MutableSequence[Layer]", nn.ModuleList(layers))


def rotation(position_BS: Tensor, head_dim: int) -> Rotation:
    """Cosine and sine, each [B, S, 1, D / 2], of the rotary embedding at the given positions."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_BS.device) / head_dim
    angle = position_BS.to(torch.float32)[:, :, None, None] * ROPE_BASE**-exponent
    return angle.cos(), angle.sin()


def rotate(x_BSQD: Tensor, turn: Rotation) -> Tensor:
    """Rotates feature i together with feature i + D / 2 (the half-split layout of Gemma); angles are float32."""
    cos, sin = turn
    first, second = x_BSQD.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BSQD.dtype)


def additive(visible: Tensor) -> Tensor:
    """Turns a boolean mask (True = may be seen) into what is added to the attention scores."""
    return torch.where(visible, 0.0, MASKED)


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention over the last two axes, the softmax in float32 whatever the type of the others.

    torch's fused kernels do so by themselves; in an ONNX graph the softmax would have the type of the scores.
    """
    if query.dtype == torch.float32 or not torch.onnx.is_in_onnx_export():
        mask = None if bias is None else bias.to(query.dtype)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    scores = (query @ key.mT).float() * query.shape[-1] ** -0.5
    return (scores if bias is None else scores + bias).softmax(dim=-1).to(value.dtype) @ value


def attend(query_BSQD: Tensor, key_BKCD: Tensor, value_BKCD: Tensor, bias: Tensor) -> Tensor:
    """Softmax attention -> [B, S, Q * D]. `bias` broadcasts to [B, K, S * G, C], with the G heads of a token adjacent.

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
