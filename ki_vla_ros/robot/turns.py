"""Joints that turn without end, and rotations: what is one place in several numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.robot.dimensions import QUATERNION, VECTOR, ActionDimension, StateDimension
from ki_vla_ros.robot.rotations import from_vector, to_vector

TURN = 2.0 * math.pi
LARGE_TURN = TURN / 3.0


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


def continued_rotation(
    values_D: NDArray[np.float64],
    before_D: NDArray[np.float64] | None,
    dimensions: Sequence[StateDimension | ActionDimension],
) -> NDArray[np.float64]:
    """The same values [D] with their rotations written so that they go on from `before_D`, without a jump.

    None: they are the first of an episode. A turn of more than 120 degrees is then written with the first large
    component of its axis positive, so that a tool that points down is written alike in all episodes.
    """
    if before_D is not None:
        return nearest_rotation(values_D, before_D, dimensions)
    near_D = np.zeros_like(values_D)
    for places in _rotations(dimensions):
        value = values_D[places]
        vector = value if len(places) == 3 else to_vector(value)
        angle = float(np.linalg.norm(vector))
        if angle > LARGE_TURN:
            vector = vector * (math.pi / angle)
            vector = vector * np.sign(vector[np.flatnonzero(np.abs(vector) >= math.pi / 2.0)[0]])
        near_D[places] = vector if len(places) == 3 else from_vector(vector)
    return nearest_rotation(values_D, near_D, dimensions)


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
