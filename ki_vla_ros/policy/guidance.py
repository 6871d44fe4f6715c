"""Guidance of real-time chunking: the actions a new chunk begins with, and how firmly the flow is pulled towards them.

Legend: H horizon, A action dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Guide:
    """Normalised actions that a new chunk is to begin with; see `records.Condition`."""

    action_HA: NDArray[np.float32]
    weight_H: NDArray[np.float32]
    clean: bool
    strength: float


def guidance(t: float, strongest: float) -> np.float32:
    """Weight of the guidance at flow time t (1: noise): min(beta, t / (1 - t) * ((1 - t)^2 + t^2) / t^2)."""
    done = 1.0 - t
    return np.float32(strongest if done == 0.0 else min(strongest, (done**2 + t**2) / (done * t)))
