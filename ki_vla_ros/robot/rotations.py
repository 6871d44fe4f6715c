"""Rotations as quaternions (x, y, z, w), rotation vectors (axis times angle in rad) and 6-D vectors.

The last axis of an array holds the numbers of one rotation; all others are free. 6-D: the first two columns of the
rotation matrix, one after the other (Zhou et al., arXiv 1812.07035).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
IDENTITY: Array = np.array([0.0, 0.0, 0.0, 1.0])
# Shorter vectors say nothing about a direction.
LEAST_LENGTH = 1e-6


def from_vector(vector: Array) -> Array:
    """Rotation vectors [..., 3] -> unit quaternions [..., 4]."""
    angle = np.linalg.norm(vector, axis=-1, keepdims=True)
    factor = 0.5 * np.sinc(angle / (2.0 * np.pi))  # sin(angle / 2) / angle, also at 0
    return np.concatenate([vector * factor, np.cos(angle / 2.0)], axis=-1)


def to_vector(quaternion: Array) -> Array:
    """Unit quaternions [..., 4] -> the shortest rotation vectors [..., 3], of at most half a turn."""
    quaternion = np.where(quaternion[..., 3:] < 0.0, -quaternion, quaternion)
    sine = np.linalg.norm(quaternion[..., :3], axis=-1, keepdims=True)
    angle = 2.0 * np.arctan2(sine, quaternion[..., 3:])
    safe = np.where(sine > 0.0, sine, 1.0)
    return np.asarray(quaternion[..., :3] * np.where(sine > 0.0, angle / safe, 2.0))


def multiply(left: Array, right: Array) -> Array:
    """The rotation `right`, then `left`."""
    (ax, ay, az, aw), (bx, by, bz, bw) = ([part[..., i] for i in range(4)] for part in (left, right))
    return np.stack(
        [
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
            aw * bw - ax * bx - ay * by - az * bz,
        ],
        axis=-1,
    )


def inverse(quaternion: Array) -> Array:
    return np.asarray(quaternion * np.array([-1.0, -1.0, -1.0, 1.0]))


def rotate(quaternion: Array, vector: Array) -> Array:
    """Vectors [..., 3] turned by unit quaternions [..., 4]."""
    twice = 2.0 * np.cross(quaternion[..., :3], vector)
    return np.asarray(vector + quaternion[..., 3:] * twice + np.cross(quaternion[..., :3], twice))


def unit(quaternion: Array) -> Array:
    """Quaternions of length 1; ValueError for one that is too short to say a direction, or not finite."""
    length = np.linalg.norm(quaternion, axis=-1, keepdims=True)
    if not np.all(np.isfinite(length)) or np.any(length < LEAST_LENGTH):
        raise ValueError(f"expected a quaternion, got {quaternion.tolist()}")
    return np.asarray(quaternion / length)


def from_6d(columns: Array) -> Array:
    """6-D vectors [..., 6] -> unit quaternions [..., 4]; ValueError if the two columns say no rotation."""
    first, second = columns[..., :3], columns[..., 3:]
    length = np.linalg.norm(first, axis=-1, keepdims=True)
    if not np.all(np.isfinite(columns)) or np.any(length < LEAST_LENGTH):
        raise ValueError(f"expected two columns of a rotation, got {columns.tolist()}")
    x = first / length
    second = second - np.sum(x * second, axis=-1, keepdims=True) * x
    length = np.linalg.norm(second, axis=-1, keepdims=True)
    if np.any(length < LEAST_LENGTH):
        raise ValueError(f"expected two columns of a rotation, got parallel ones: {columns.tolist()}")
    y = second / length
    return _from_matrix(np.stack([x, y, np.cross(x, y)], axis=-1))


def to_6d(quaternion: Array) -> Array:
    """Unit quaternions [..., 4] -> 6-D vectors [..., 6]."""
    axes = np.eye(3)
    return np.concatenate([rotate(quaternion, axes[0]), rotate(quaternion, axes[1])], axis=-1)


def _from_matrix(matrix: Array) -> Array:
    """Rotation matrices [..., 3, 3] -> unit quaternions: by the largest component, which loses no digits."""
    m = matrix
    trace = m[..., 0, 0] + m[..., 1, 1] + m[..., 2, 2]
    squares = np.stack([1.0 + 2.0 * m[..., i, i] - trace for i in range(3)] + [1.0 + trace], axis=-1)
    x, y, z, w = (np.sqrt(np.maximum(squares[..., i], 0.0)) / 2.0 for i in range(4))
    largest = np.argmax(squares, axis=-1)[..., None]
    d = [m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]]
    s = [m[..., 1, 0] + m[..., 0, 1], m[..., 0, 2] + m[..., 2, 0], m[..., 2, 1] + m[..., 1, 2]]
    with np.errstate(divide="ignore", invalid="ignore"):
        choices = [
            np.stack([x, s[0] / (4 * x), s[1] / (4 * x), d[0] / (4 * x)], axis=-1),
            np.stack([s[0] / (4 * y), y, s[2] / (4 * y), d[1] / (4 * y)], axis=-1),
            np.stack([s[1] / (4 * z), s[2] / (4 * z), z, d[2] / (4 * z)], axis=-1),
            np.stack([d[0] / (4 * w), d[1] / (4 * w), d[2] / (4 * w), w], axis=-1),
        ]
    return unit(np.select([largest == i for i in range(4)], choices))
