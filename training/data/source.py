"""A source of batches. A stage mixes sources: it draws a fixed number of samples from each in every step."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from training.data.batch import Batch


class Source(Protocol):
    """Samples of one kind. All randomness comes from `rng`, so a step's seed decides what it draws."""

    def draw(self, count: int, rng: np.random.Generator) -> Batch: ...
