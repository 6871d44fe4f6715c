"""From a prefix to a chunk, the same call for every recipe: by the flow, token by token, or all actions at once.

A sampler does not know what it is for: figures on held-out data and the closed loop call it alike. It returns
normalised chunks [B, H, A] (of tokens: [B, H, D]). A sequence of tokens that stands for no chunk is a row of NaN, never
of zeros, which would be a chunk like any other.

Legend: B batch, V cameras, C channels, S image side or state, L prompt tokens, T tokens of a sequence, H horizon, A
action dim of the model, D of the robot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.model.expert import empty_actions
from training.model.vla import VLA
from training.tokens import ActionTokenizer, FastDecodeError

SamplerName = Literal["flow", "tokens", "regression"]
Prefix: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
"""Images [B, V, C, S, S] and which are there [B, V], prompt tokens [B, L] and which count [B, L]."""


class Sampler(Protocol):
    """Chunks [B, H, A] for a prefix, and for the normalised state [B, S] where the model takes it as a token.

    `noise_BHA` is what the flow begins with; the other samplers draw nothing, and leave it alone.
    """

    def __call__(
        self, model: VLA, prefix: Prefix, state_BS: Tensor | None, noise_BHA: Tensor
    ) -> NDArray[np.float64]: ...


@dataclass(frozen=True)
class FlowSampler:
    """Integrates the velocities from noise to actions, over a prefix that is computed once."""

    steps: int

    @torch.no_grad()
    def __call__(self, model: VLA, prefix: Prefix, state_BS: Tensor | None, noise_BHA: Tensor) -> NDArray[np.float64]:
        cache = model.prefill(*prefix)
        state_BS = None if model.config.state_dim is None else state_BS
        return model.sample_actions(cache, noise_BHA, self.steps, state_BS).double().cpu().numpy()


@dataclass(frozen=True)
class RegressionSampler:
    """Names all actions in one pass, from empty tokens."""

    @torch.no_grad()
    def __call__(self, model: VLA, prefix: Prefix, state_BS: Tensor | None, noise_BHA: Tensor) -> NDArray[np.float64]:
        state_BS = None if model.config.state_dim is None else state_BS
        chunk_BHA = model.velocity(model.prefill(*prefix), *empty_actions(noise_BHA), state_BS)
        return chunk_BHA.double().cpu().numpy()


@dataclass(frozen=True)
class TokenSampler:
    """Reads action tokens by argmax, one after the other, over cached keys and values.

    `fast_ids` are the ids of action tokens in the model's vocabulary. A sequence without its end after `longest` tokens
    is malformed; by default that is one token for each number of a chunk.
    """

    actions: ActionTokenizer
    fast_ids: NDArray[np.int64]
    longest: int | None = None

    @torch.no_grad()
    def __call__(self, model: VLA, prefix: Prefix, state_BS: Tensor | None, noise_BHA: Tensor) -> NDArray[np.float64]:
        actions, (*_, tokens_BL, token_mask_BL) = self.actions, prefix
        whole = actions.numbers
        lengths = np.array([len(actions.integers(i)) for i in range(actions.vocab_size)])
        ids_N = torch.from_numpy(self.fast_ids[: actions.vocab_size]).to(tokens_BL.device)
        cache, token_B1 = model.prefill(*prefix), last_tokens(tokens_BL, token_mask_BL)
        count_B, steps = np.zeros(len(tokens_BL)), list[NDArray[np.int64]]()
        while len(steps) < (self.longest or whole) and (count_B < whole).any():
            hidden_B1D, cache = model.read_on(cache, token_B1)
            best_B = model.logits(hidden_B1D[:, 0])[:, ids_N].argmax(dim=1)
            token_B1 = ids_N[best_B][:, None]
            steps.append(best_B.cpu().numpy())
            count_B += lengths[steps[-1]]
        chunks = []
        for ids_T in np.stack(steps, axis=1):
            used_T = ids_T[: 1 + int((np.cumsum(lengths[ids_T]) < whole).sum())]
            try:
                chunks.append(actions.decode(used_T.tolist()))
            except FastDecodeError:
                chunks.append(np.full((actions.horizon, actions.action_dim), np.nan))
        return np.stack(chunks)


def last_tokens(tokens_BL: Tensor, token_mask_BL: Tensor) -> Tensor:
    """[B, 1]: each prompt's last token, after which the postfix begins."""
    return tokens_BL.gather(1, token_mask_BL.sum(dim=1, keepdim=True) - 1)
