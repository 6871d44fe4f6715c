"""A robot as the model sees it: its numbers normalised, its chunks as tokens, its part of a padded batch.

A model trained on several robots has one of these for each: statistics are never shared between robots.

Legend: S state, H horizon, D actions, N chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.robot import Robot
from training.action_space import ActionSpace, Numbers
from training.tokens import ActionTokenizer, FastTokenizer


@dataclass(frozen=True)
class Embodiment:
    """One robot with its statistics; `actions` is the run's vocabulary of action tokens, which all robots share."""

    space: ActionSpace
    actions: ActionTokenizer

    @property
    def robot(self) -> Robot:
        return self.space.robot

    @cached_property
    def chunks(self) -> ActionTokenizer:
        """The same for this robot's chunks [H, D]."""
        return self.actions.for_shape(self.robot.horizon, len(self.robot.actions))

    @property
    def frequencies(self) -> FastTokenizer:
        """FAST for this robot's chunks, in a run that has it."""
        assert isinstance(self.chunks, FastTokenizer)  # the configuration refuses a readout of naive tokens
        return self.chunks


def whole_chunks(space: ActionSpace, numbers: Numbers, most: int, seed: int) -> NDArray[np.float64]:
    """Normalised chunks [N, H, D] that are known to their end, at most so many, for FAST to be fitted on."""
    whole = np.flatnonzero(numbers.known_NH.all(axis=1))
    if len(whole) > most:
        whole = np.sort(np.random.default_rng(seed).choice(whole, size=most, replace=False))
    return space.normalize_chunk(numbers.chunk_NHD[whole], numbers.state_NS[whole])


def fit_fast(
    chunks: Sequence[NDArray[np.float64]],
    *,
    vocabulary: int,
    scale: float,
    byte_level: bool = False,
    merged: int | None = None,
    ends: bool = False,
) -> FastTokenizer:
    """One vocabulary for the chunks of all robots, whatever their shapes."""
    return FastTokenizer.fit(
        *chunks, vocab_size=vocabulary, scale=scale, byte_level=byte_level, merged=merged, ends=ends
    )
