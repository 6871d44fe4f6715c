"""Naive action tokens (RT-2, OpenVLA): each number of a chunk is one token, its bin; what FAST is compared with.

A chunk in about [-1, 1] becomes the bins of its actions, step after step, with the dimensions of a step next to each
other. With a `stride`, only every so many-th step is written, and the last one; decoding draws straight lines between
them. It has the methods of `FastTokenizer`. Legend: H horizon, A action dim, N numbers that are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from training.tokens.fast import FastDecodeError


@dataclass(frozen=True)
class NaiveTokenizer:
    """For chunks of one shape. Nothing is fitted: the bins are of equal widths over [-1, 1]."""

    vocab_size: ClassVar[int] = 256

    horizon: int
    action_dim: int
    stride: int = 1

    def for_shape(self, horizon: int, action_dim: int) -> NaiveTokenizer:
        """The same for chunks [horizon, action_dim]."""
        return replace(self, horizon=horizon, action_dim=action_dim)

    @property
    def steps(self) -> NDArray[np.int64]:
        """The steps that are written, in order."""
        return np.unique([*range(0, self.horizon, self.stride), self.horizon - 1])

    @property
    def numbers(self) -> int:
        """How many a chunk is written as."""
        return len(self.steps) * self.action_dim

    def integers(self, token: int) -> list[int]:
        """The bin that a token stands for."""
        return [token]

    def count_clamped(self, chunk_HA: NDArray[np.floating]) -> int:
        """How many of the numbers that are written of these chunks [..., H, A] lie outside the bins."""
        return int((np.abs(self._written(chunk_HA)) > 1.0).sum())

    def encode(self, chunk_HA: NDArray[np.floating]) -> list[int]:
        """The bins of one normalised chunk [H, A]; numbers outside of them have the nearest (`count_clamped`)."""
        bins_NA = np.floor((self._written(chunk_HA) + 1.0) * (self.vocab_size / 2.0))
        return [int(i) for i in np.clip(bins_NA, 0, self.vocab_size - 1).ravel()]

    def decode(self, ids: Sequence[int]) -> NDArray[np.float64]:
        """The normalised chunk [H, A] of these bins, from their middles; FastDecodeError if they are not one chunk."""
        for position, token in enumerate(ids):
            if not 0 <= token < self.vocab_size:
                raise FastDecodeError(
                    f"action tokens: expected ids in 0..{self.vocab_size - 1}, got id {token} at position {position}"
                )
        if len(ids) != self.numbers:
            raise FastDecodeError(
                f"action tokens: expected {len(self.steps)} steps x {self.action_dim} = {self.numbers}, got {len(ids)}"
            )
        written_NA = (np.array(ids, dtype=np.float64).reshape(-1, self.action_dim) + 0.5) * 2.0 / self.vocab_size - 1.0
        every = np.arange(self.horizon)
        return np.stack([np.interp(every, self.steps, column) for column in written_NA.T], axis=1)

    def _written(self, chunk_HA: NDArray[np.floating]) -> NDArray[np.float64]:
        expected = (self.horizon, self.action_dim)
        if chunk_HA.shape[-2:] != expected or not np.isfinite(chunk_HA).all():
            raise ValueError(f"action tokens: expected finite chunks of shape {expected}, got {chunk_HA.shape}")
        return np.asarray(chunk_HA[..., self.steps, :], dtype=np.float64)
