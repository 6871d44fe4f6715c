"""The figures that the format keeps for every feature: min, max, mean, std, count and five quantiles.

They are per element of a vector, and per colour channel of an image (pixels in 0..1, shape (3, 1, 1)). They are exact;
LeRobot's own are estimates: for images from a sample of frames, for quantiles from 5000 bins and, over all episodes,
from the episodes' extremes. Legend: N frames, D elements of a feature, C channels.
"""

from __future__ import annotations

from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray

QUANTILES: Final = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
FeatureFigures = dict[str, Any]
"""Nested lists of numbers, by "min", "max", "mean", "std", "count" and the names in `QUANTILES`."""


def describe_values(values: NDArray[Any]) -> FeatureFigures:
    """The figures of [N, ...] numbers, over the first axis; for [N], lists of one element."""
    values_ND = np.asarray(values, dtype=np.float64)
    values_ND = values_ND[:, None] if values_ND.ndim == 1 else values_ND
    figures = {
        "min": values_ND.min(axis=0),
        "max": values_ND.max(axis=0),
        "mean": values_ND.mean(axis=0),
        "std": values_ND.std(axis=0),
        "count": np.array([len(values_ND)]),
    }
    quantiles = np.quantile(values_ND, list(QUANTILES.values()), axis=0)
    return {name: value.tolist() for name, value in (figures | dict(zip(QUANTILES, quantiles, strict=True))).items()}


class PixelCounts:
    """How often each of 256 values occurs in each channel: all that the figures of any number of images need."""

    def __init__(self) -> None:
        self.count_CV = np.zeros((3, 256), dtype=np.int64)
        self.frames = 0

    def add(self, rgb_HWC: NDArray[np.uint8]) -> None:
        for channel in range(3):  # three times as fast as numpy's bincount, and exact: a float holds 2^24 pixels
            self.count_CV[channel] += cv2.calcHist([rgb_HWC], [channel], None, [256], [0, 256]).ravel().astype(np.int64)
        self.frames += 1

    def merge(self, other: PixelCounts) -> None:
        self.count_CV += other.count_CV
        self.frames += other.frames

    def describe(self) -> FeatureFigures:
        """The figures; `count` is of frames, quantiles are numpy's: linear between the two nearest sorted pixels."""
        value_V = np.arange(256) / 255.0
        pixels = int(self.count_CV[0].sum())
        mean_C = self.count_CV @ value_V / pixels
        spread_C = np.sqrt((self.count_CV * (value_V - mean_C[:, None]) ** 2).sum(axis=1) / pixels)
        figures = {"mean": mean_C, "std": spread_C} | {
            name: self._quantile(share, pixels) for name, share in {"min": 0.0, "max": 1.0, **QUANTILES}.items()
        }
        return {name: value.reshape(3, 1, 1).tolist() for name, value in figures.items()} | {"count": [self.frames]}

    def _quantile(self, share: float, pixels: int) -> NDArray[np.float64]:
        rank = share * (pixels - 1)
        below, above = int(np.floor(rank)), int(np.ceil(rank))
        upto_CV = self.count_CV.cumsum(axis=1)
        first_C, second_C = (
            np.array([np.searchsorted(upto_V, place, side="right") for upto_V in upto_CV]) for place in (below, above)
        )
        return np.asarray((first_C + (rank - below) * (second_C - first_C)) / 255.0)
