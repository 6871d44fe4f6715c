"""Sources of batches. A stage draws a fixed number of samples from each of its sources in every step.

Legend: B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from training.data.batch import Batch
from training.data.samples import Samples


class Source(Protocol):
    """Samples of one kind. All randomness comes from `rng`, so a step's seed decides what it draws.

    `action_tokens`: whether chunks of actions are also written as tokens.
    """

    def draw(self, count: int, rng: np.random.Generator, action_tokens: bool = True) -> Batch: ...


Make = Callable[[Sequence[int], Sequence[Any], np.random.Generator, bool], Batch]
"""Makes a batch of samples, given the part that each came from, and `action_tokens` as in `Source`."""


@dataclass(frozen=True)
class Part:
    """One data set of a mixture. Samples come from it as often as its weight is large beside the others'."""

    samples: Samples
    weight: float = 1.0


class Mixture:
    """Draws from several data sets; `make` turns their samples into a batch."""

    def __init__(self, parts: Sequence[Part], make: Make) -> None:
        self.parts, self.make = tuple(parts), make
        weights = np.array([part.weight for part in parts])
        self.share = weights / weights.sum()

    def __len__(self) -> int:
        return sum(len(part.samples) for part in self.parts)

    def draw(self, count: int, rng: np.random.Generator, action_tokens: bool = True) -> Batch:
        """A batch of `count` samples, all different where a data set has enough."""
        from_B = np.sort(rng.choice(len(self.parts), size=count, p=self.share))
        rows = []
        for number in np.unique(from_B):
            samples, wanted = self.parts[number].samples, int((from_B == number).sum())
            chosen = rng.choice(len(samples), size=wanted, replace=wanted > len(samples))
            rows += [(int(number), int(row)) for row in np.sort(chosen)]
        return self.take(rows, rng, action_tokens)

    def take(self, rows: Sequence[tuple[int, int]], rng: np.random.Generator, action_tokens: bool = True) -> Batch:
        """A batch of these samples, each given by its part and its row there; `rng` augments them."""
        return self.make([number for number, _ in rows], self.read(rows), rng, action_tokens)

    def read(self, rows: Sequence[tuple[int, int]]) -> list[Any]:
        """The samples themselves, in this order."""
        found: dict[int, list[Any]] = {}
        for number in dict.fromkeys(number for number, _ in rows):
            found[number] = self.parts[number].samples.take([row for part, row in rows if part == number])
        waiting = {number: iter(samples) for number, samples in found.items()}
        return [next(waiting[number]) for number, _ in rows]

    def spread(self, count: int, among: Collection[int] | None = None) -> list[tuple[int, int]]:
        """At most `count` rows, evenly over all data sets (or these parts) by their lengths: always the same ones."""
        ends = np.cumsum([len(part.samples) * (among is None or n in among) for n, part in enumerate(self.parts)])
        if not ends[-1]:
            return []
        places = np.unique(np.linspace(0, ends[-1] - 1, min(count, int(ends[-1]))).astype(np.int64))
        numbers = np.searchsorted(ends, places, side="right")
        return [(int(n), int(p - (ends[n - 1] if n else 0))) for n, p in zip(numbers, places, strict=True)]
