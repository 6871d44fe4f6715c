"""Joints that turn without end, and rotations: what is one place in several numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.robot.dimensions import StateDimension

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


def nearest_rotation(
    state_S: NDArray[np.float64], near_S: NDArray[np.float64], dimensions: Sequence[StateDimension]
) -> NDArray[np.float64]:
    """The same state [S] with its rotations written the way that is nearer to `near_S`.

    A rotation vector and the one the other way round are one rotation, as are a quaternion and its negative. Who
    recorded the data may have written either: robosuite follows MuJoCo's quaternion beyond half a turn.
    """
    for s, dimension in enumerate(dimensions):
        if dimension.component not in ("rx", "qx"):
            continue
        part = slice(s, s + (3 if dimension.component == "rx" else 4))
        value, near = state_S[part], near_S[part]
        angle = float(np.linalg.norm(value))
        factor = -1.0 if dimension.component == "qx" else 1.0 - TURN / angle if angle > 0.0 else 1.0
        if np.linalg.norm(factor * value - near) < np.linalg.norm(value - near):
            state_S = state_S.copy()
            state_S[part] = factor * value
    return state_S
