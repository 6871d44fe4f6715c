"""Joints that turn without end: angles a whole turn apart are one place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

TURN = 2.0 * math.pi


class Turning(Protocol):
    """An axis or a signal, which may turn without end."""

    @property
    def continuous(self) -> bool: ...


def continuous(joints: Sequence[Turning]) -> NDArray[np.bool_]:
    """Which joints turn without end [J]."""
    return np.array([joint.continuous for joint in joints], dtype=np.bool_)


def nearest_turn(
    position: NDArray[np.float64], near: NDArray[np.float64], continuous_J: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """`position` [..., J], moved by whole turns to within half a turn of `near` where a joint is continuous."""
    if not continuous_J.any():
        return position
    moved: NDArray[np.float64] = position - TURN * np.where(continuous_J, np.round((position - near) / TURN), 0.0)
    return moved
