"""What a data set gives before anything is made a tensor: one sample of a robot, or one of vision and language.

Nothing here is normalised, tokenized or augmented; that is the batch's work (training/data/batch.py), which knows the
model. Images are already at the model's size, in the order of the robot file's cameras.

Legend: V cameras, S image side (or state, in `state_S`), H horizon, D actions, N image cells, O alternatives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.robot import Robot

Image = NDArray[np.uint8]


@dataclass(frozen=True)
class Labels:
    """What hints learn from, where the data carries it (training/losses/hints.py)."""

    place: tuple[float, float] | None = None
    """Where the last image shows what the sample is about: u to the right and v down, in 0..1."""
    cells_VN: NDArray[np.int64] | None = None
    """A class for each cell of each image, in raster order; the highest class is the background."""


@dataclass(frozen=True)
class LanguageSample:
    """A question or a prefix about images, and the answer that is to be predicted; both may be empty (cells only)."""

    images: tuple[Image, ...]
    prefix: str
    suffix: str
    labels: Labels = Labels()


@dataclass(frozen=True)
class RobotSample:
    """One frame of one robot and the actions that follow it."""

    images: tuple[Image | None, ...]
    """[S, S, 3] each, in the order of the robot's cameras; None: the data has no image of an optional camera."""
    task: str
    state_S: NDArray[np.float64]
    """In the robot file's order and units."""
    chunk_HD: NDArray[np.float64]
    """As the robot file says, absolute; past the episode's end the last action, where `known_H` is False."""
    known_H: NDArray[np.bool_]
    labels: Labels = Labels()


class Samples(Protocol):
    """A data set that is read at random; opening it checks it, and memory does not grow with its length."""

    name: str

    def __len__(self) -> int: ...

    def take(self, rows: Sequence[int]) -> list[Any]:
        """The samples with these numbers; InputError names what is broken, and where."""
        ...

    def texts(self) -> Iterator[str]:
        """All texts, for a vocabulary: tasks, prefixes and suffixes."""
        ...


class RobotSamples(Samples, Protocol):
    """Samples of one robot; `numbers` is what normalisation and FAST are fitted on."""

    robot: Robot

    def numbers(self) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]]:
        """State [F, S], chunks [F, H, D] and what of them is known [F, H], piece by piece, without any image."""
        ...


@dataclass
class Check:
    """What `training.data check` says of one data set: how much there is, and each broken sample with its place."""

    name: str
    samples: int = 0
    broken: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    """What else there is of it: images, tasks, words."""
    notes: list[str] = field(default_factory=list)
    """What was left out, or read in a certain way."""
