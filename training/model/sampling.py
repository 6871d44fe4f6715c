"""From a prefix to a chunk, the same call for every recipe: by the flow, token by token, or all actions at once.

A sampler does not know what it is for: figures on held-out data and the closed loop call it alike. It returns
normalised chunks [B, H, A] (of tokens: [B, H, D]). A sequence of tokens that stands for no chunk is a row of NaN, never
of zeros, which would be a chunk like any other.

Legend: B batch, V cameras, C channels, S image side or state, L prompt tokens, T tokens of a sequence, H horizon, A
action dim of the model, D of the robot.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, Literal, Protocol, TypeAlias
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.model.expert import empty_actions
from training.model.vla import VLA
from training.tokens import ActionPostfix, ActionTokenizer, FastDecodeError

SamplerName = Literal["flow", "tokens", "regression"]
Prefix: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
"""Images [B, V, C, S, S] and which are there [B, V], prompt tokens [B, L] and which count [B, L]."""


class Sampler(Protocol):
    """Chunks [B, H, A] for a prefix, and for the normalised state [B, S] where the model takes it as a token.

    `noise_BHA` is what the flow begins with, and what tokens are drawn by: the same noise gives the same chunk.
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


FAULTS: Final = ("endless", "frame", "foreign", "chunk")


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
    """Reads a chunk's postfix one token after the other, over cached keys and values.

    With `temperature` 0 the likeliest token is taken, else one is drawn. The likeliest chunk can be a trap in closed
    loop: where "stay here" is likelier than any single motion, an arm stays there for good, however likely motions are
    together.

    A whole postfix is read from the whole vocabulary, up to its end-of-sequence; of a bare one, only action tokens are
    looked at, until they have all of a chunk's numbers. What is no chunk is counted in `faults`:

        endless   no end after `longest` tokens, by default as many as a chunk has numbers, and the postfix's others
        frame     other words than the postfix's before or after the action tokens
        foreign   another token among the action tokens
        chunk     action tokens that are not exactly one chunk
    """

    actions: ActionTokenizer
    postfix: ActionPostfix
    longest: int | None = None
    temperature: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)

    @torch.no_grad()
    def __call__(self, model: VLA, prefix: Prefix, state_BS: Tensor | None, noise_BHA: Tensor) -> NDArray[np.float64]:
        *_, tokens_BL, token_mask_BL = prefix
        looked_at, longest = self._looked_at(model.config.vocab_size), self.longest or self._longest()
        allowed_N = torch.from_numpy(looked_at).to(tokens_BL.device)
        cache, token_B1 = model.prefill(*prefix), last_tokens(tokens_BL, token_mask_BL)
        said_BT: list[list[int]] = [[] for _ in tokens_BL]
        done_B = np.zeros(len(said_BT), dtype=bool)
        dice = [] if self.temperature == 0 else [_die(row_HA) for row_HA in noise_BHA.cpu()]
        for _ in range(longest):
            hidden_B1D, cache = model.read_on(cache, token_B1)
            logits_BN = model.logits(hidden_B1D[:, 0])[:, allowed_N]
            if dice:  # the largest of logits with Gumbel noise is a draw by their softmax
                drawn_BN = torch.stack([torch.rand(len(allowed_N), generator=die) for die in dice])
                logits_BN = logits_BN - self.temperature * (-drawn_BN.log()).log().to(logits_BN)
            token_B1 = allowed_N[logits_BN.argmax(dim=1)][:, None]
            for b, token in enumerate(token_B1[:, 0].tolist()):
                if not done_B[b]:
                    said_BT[b].append(token)
                    done_B[b] = self._ends(said_BT[b])
            if done_B.all():
                break
        chunks = []
        for ids, done in zip(said_BT, done_B, strict=True):
            chunk_HA, fault = self._read(ids) if done else (None, "endless")
            if chunk_HA is None:
                self.faults[fault] += 1
                chunk_HA = np.full((self.actions.horizon, self.actions.action_dim), np.nan)
            chunks.append(chunk_HA)
        return np.stack(chunks)

    def shares(self, count: int) -> dict[str, float]:
        """Each kind of fault so far, by name, in parts of `count`."""
        return {name: self.faults[name] / count for name in FAULTS}

    def _looked_at(self, vocab_size: int) -> NDArray[np.int64]:
        own = self.postfix.ids[: self.actions.vocab_size]
        return np.arange(vocab_size) if self.postfix.after else own

    def _longest(self) -> int:
        return len(self.postfix.before) + self.actions.numbers + len(self.postfix.after)

    def _ends(self, ids: Sequence[int]) -> bool:
        """Whether the last of these ids ends the postfix."""
        if self.postfix.after:
            return ids[-1] == self.postfix.after[-1]
        return sum(self.lengths[self.token_of[i]] for i in ids) >= self.actions.numbers

    @cached_property
    def lengths(self) -> list[int]:
        """How many numbers each action token stands for."""
        return [len(self.actions.integers(i)) for i in range(self.actions.vocab_size)]

    @cached_property
    def token_of(self) -> dict[int, int]:
        """The action token of each id that has one."""
        return {int(i): n for n, i in enumerate(self.postfix.ids[: self.actions.vocab_size])}

    def _read(self, ids: Sequence[int]) -> tuple[NDArray[np.float64] | None, str]:
        """The chunk of a postfix that has ended, or the name of what is wrong with it."""
        before, after = self.postfix.before, self.postfix.after
        middle = ids[len(before) : len(ids) - len(after)]
        if (*before, *middle, *after) != tuple(ids):
            return None, "frame"
        if any(i not in self.token_of for i in middle):
            return None, "foreign"
        try:
            return self.actions.decode([self.token_of[i] for i in middle]), ""
        except FastDecodeError:
            return None, "chunk"


def _die(noise_HA: Tensor) -> torch.Generator:
    """One for each chunk, so that what is drawn does not depend on the others of its batch."""
    return torch.Generator().manual_seed(crc32(noise_HA.numpy().tobytes()))


def last_tokens(tokens_BL: Tensor, token_mask_BL: Tensor) -> Tensor:
    """[B, 1]: each prompt's last token, after which the postfix begins."""
    return tokens_BL.gather(1, token_mask_BL.sum(dim=1, keepdim=True) - 1)
