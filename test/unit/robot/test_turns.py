"""Rotations that can be written in two ways are written in the one that is nearer to what training saw."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from ki_vla_ros.robot import StateDimension, nearest_rotation, rotations

RNG = np.random.default_rng(0)


def pose(*parts: str, topic: str = "hand") -> list[StateDimension]:
    source: dict[str, Any] = {"topic": topic, "type": "geometry_msgs/msg/PoseStamped"}
    return [
        StateDimension.model_validate({"name": f"{topic}_{part}", "kind": "pose", "component": part, "source": source})
        for part in parts
    ]


@pytest.mark.parametrize("order", [("rx", "ry", "rz"), ("rz", "rx", "ry")])
def test_rotation_vectors(order: tuple[str, ...]) -> None:
    """Up to a whole turn from the reference, whatever else stands between the parts."""
    dimensions = [*pose(order[0]), *pose("x", "y", "z", topic="other"), *pose(*order[1:])]
    places = [next(d for d, one in enumerate(dimensions) if one.component == part) for part in ("rx", "ry", "rz")]
    near = np.zeros(6)
    near[places] = [3.0, 0.2, -0.1]
    wanted = np.tile(near, (50, 1))
    wanted[:, places] += RNG.normal(0.0, 0.5, (50, 3))
    assert 10 < (np.linalg.norm(wanted[:, places], axis=1) > math.pi).sum() < 40
    shortest = wanted.copy()
    shortest[:, places] = rotations.to_vector(rotations.from_vector(wanted[:, places]))
    assert np.abs(shortest - wanted).max() > 5.0
    before = shortest.copy()
    assert nearest_rotation(shortest, near, dimensions) == pytest.approx(wanted)
    assert np.array_equal(shortest, before)
    assert nearest_rotation(shortest[0], near, dimensions) == pytest.approx(wanted[0])


def test_quaternions_and_what_has_no_other_way() -> None:
    dimensions = [*pose("x", "y", "z", "qx", "qy", "qz", "qw")]
    near = np.array([0.0, 0.0, 0.0, 0.1, 0.9, 0.1, -0.3])
    one = np.array([1.0, 2.0, 3.0, 0.0, 1.0, 0.0, 0.0])
    assert nearest_rotation(one * [1, 1, 1, -1, -1, -1, -1], near, dimensions) == pytest.approx(one)
    assert nearest_rotation(one, near, dimensions) is one
    still = np.zeros(3)
    assert nearest_rotation(still, np.ones(3), pose("rx", "ry", "rz")) is still
