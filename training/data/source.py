"""Where batches come from. A stage mixes sources: so many samples of each in every step."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from training.data.batch import Batch


class Source(Protocol):
    """Samples of one kind. All randomness comes from `rng`, so a step's seed decides what it draws."""

    def draw(self, count: int, rng: np.random.Generator) -> Batch: ...
