"""Joints that turn without end, and rotations: what is one place in several numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.robot.dimensions import QUATERNION, VECTOR, ActionDimension, StateDimension

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
    values: NDArray[np.float64],
    near_D: NDArray[np.float64],
    dimensions: Sequence[StateDimension | ActionDimension],
) -> NDArray[np.float64]:
    """The same values [..., D] with their rotations written the way that is nearer to `near_D`.

    A rotation vector and the one the other way round are one rotation, as are a quaternion and its negative. Who
    recorded the data may have written either: robosuite follows MuJoCo's quaternion beyond half a turn.
    """
    for places in _rotations(dimensions):
        value, near = values[..., places], near_D[places]
        other = -value
        if len(places) == 3:
            angle = np.linalg.norm(value, axis=-1, keepdims=True)
            other = value * (1.0 - TURN / np.where(angle > 0.0, angle, TURN))
        nearer = np.linalg.norm(other - near, axis=-1) < np.linalg.norm(value - near, axis=-1)
        if nearer.any():
            values = values.copy()
            values[..., places] = np.where(nearer[..., np.newaxis], other, value)
    return values


def _rotations(dimensions: Sequence[StateDimension | ActionDimension]) -> Iterator[list[int]]:
    """The places of each rotation that can be written in two ways: three of a vector, four of a quaternion."""
    groups: dict[str, dict[str, int]] = {}
    for d, dimension in enumerate(dimensions):
        if dimension.component is not None:
            group = dimension.source.topic if isinstance(dimension, StateDimension) else dimension.output
            groups.setdefault(group, {})[dimension.component] = d
    for place in groups.values():
        for parts in (VECTOR, QUATERNION):
            if parts[0] in place:
                yield [place[part] for part in parts]
