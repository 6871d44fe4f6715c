"""Rotations that can be written in two ways are written in the one that is nearer to what training saw."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from ki_vla_ros.robot import StateDimension, continued_rotation, nearest_rotation, rotations

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


@pytest.mark.parametrize("parts", [("rx", "ry", "rz"), ("qx", "qy", "qz", "qw")])
def test_a_recording_of_a_tool_that_points_down_has_no_jumps(parts: tuple[str, ...]) -> None:
    """Half a turn about an axis in the plane, now a little less, now a little more; all episodes alike."""
    dimensions, firsts = pose(*parts), []
    for episode in range(20):
        yaw, before, rows = RNG.uniform(-1.5, 1.5), None, []
        for k in range(60):
            tilt = 0.3 * math.sin(0.4 * k + episode)
            vector = (math.pi + tilt) * np.array([math.cos(yaw / 2), math.sin(yaw / 2), 0.05])
            quaternion = rotations.from_vector(vector) * RNG.choice([-1.0, 1.0])
            value = rotations.to_vector(quaternion) if len(parts) == 3 else quaternion
            before = continued_rotation(value, before, dimensions)
            rows.append(before)
        assert np.abs(np.diff(rows, axis=0)).max() < 0.2
        firsts.append(rows[0])
    assert min(first[0] for first in firsts) > 0.5


def test_a_small_rotation_begins_as_it_is() -> None:
    for vector in (np.zeros(3), np.array([-0.5, 0.2, 0.1]), np.array([-2.0, 0.0, 0.0])):
        assert continued_rotation(vector, None, pose("rx", "ry", "rz")) == pytest.approx(vector)
    turned = np.array([-3.0, 0.1, 0.0])
    assert continued_rotation(turned, None, pose("rx", "ry", "rz"))[0] > 3.0
