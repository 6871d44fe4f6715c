"""The governor: no path makes it leave position, speed or acceleration bounds, and it follows a feasible path."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ki_vla_ros.runtime.governor import Bounds, follow

PERIOD = 0.02
BOUNDS = Bounds(np.array([-2.0, 0.0]), np.array([2.0, 0.04]), np.array([1.0, 0.1]), np.array([8.0, 1.0]))

Array = NDArray[np.float64]


def accelerations(start_velocity_J: Array, velocity_NJ: Array) -> Array:
    return np.diff(np.vstack([start_velocity_J, velocity_NJ]), axis=0) / PERIOD


def assert_bounded(p0: Array, v0: Array, position_NJ: Array, velocity_NJ: Array) -> None:
    """Checks the points and each piece's turning point, as the motion is a parabola in between."""
    a = accelerations(v0, velocity_NJ)
    assert np.all(np.abs(a) <= BOUNDS.acceleration_J * (1 + 1e-9) + 1e-12)
    assert np.all(np.abs(velocity_NJ) <= BOUNDS.speed_J * (1 + 1e-9))
    before_p, before_v = np.vstack([p0, position_NJ[:-1]]), np.vstack([v0, velocity_NJ[:-1]])
    with np.errstate(divide="ignore", invalid="ignore"):
        turn = np.where(before_v * velocity_NJ < 0, before_p - before_v**2 / (2 * a), before_p)
    for place in (position_NJ, turn):
        assert np.all(place >= BOUNDS.lower_J - 1e-9) and np.all(place <= BOUNDS.upper_J + 1e-9)
    np.testing.assert_array_equal(velocity_NJ[-1], 0.0)
    # Each piece is the parabola between its points: the distance is the mean speed times the period.
    np.testing.assert_allclose(
        np.diff(np.vstack([p0, position_NJ]), axis=0), (before_v + velocity_NJ) * PERIOD / 2, atol=1e-12
    )


@given(st.integers(0, 2**32 - 1), st.sampled_from(("jumps", "far", "noise", "smooth")))
def test_no_path_makes_it_leave_the_bounds(seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    v0 = rng.uniform(-1, 1, 2) * BOUNDS.speed_J
    # The longest distance to rest, braking constantly in whole periods: v^2 / 2a + v * period / 2.
    reach = v0**2 / (2 * BOUNDS.acceleration_J) + np.abs(v0) * PERIOD / 2
    p0 = rng.uniform(BOUNDS.lower_J, BOUNDS.upper_J)
    p0 = np.clip(p0, BOUNDS.lower_J + reach * (v0 < 0), BOUNDS.upper_J - reach * (v0 > 0))
    if np.any(reach > BOUNDS.upper_J - BOUNDS.lower_J):  # it could not stop anywhere
        v0 = np.zeros(2)
    n = int(rng.integers(1, 80))
    span = BOUNDS.upper_J - BOUNDS.lower_J
    path = {
        "jumps": lambda: BOUNDS.lower_J + span * rng.integers(0, 2, (n, 2)),
        "far": lambda: rng.normal(0, 100, (n, 2)),
        "noise": lambda: rng.uniform(BOUNDS.lower_J - span, BOUNDS.upper_J + span, (n, 2)),
        "smooth": lambda: p0 + np.cumsum(rng.normal(0, 0.02, (n, 2)), axis=0) * span,
    }[kind]()
    speed = np.gradient(path, PERIOD, axis=0) if n > 1 else rng.normal(0, 10, (n, 2))
    assert_bounded(p0, v0, *follow(p0, v0, path, speed, PERIOD, BOUNDS))


def minimum_jerk(start: Array, end: Array, duration: float, count: int) -> tuple[Array, Array]:
    t = np.clip(PERIOD * np.arange(1, count + 1)[:, None] / duration, 0, 1)
    path = start + (end - start) * (10 * t**3 - 15 * t**4 + 6 * t**5)
    return path, (end - start) / duration * (30 * t**2 - 60 * t**3 + 30 * t**4)


def test_a_feasible_path_is_followed() -> None:
    start, end = np.array([-0.3, 0.005]), np.array([0.4, 0.035])
    path, speed = minimum_jerk(start, end, 1.5, 100)
    position, _ = follow(start, np.zeros(2), path, speed, PERIOD, BOUNDS)
    assert len(position) == 100
    assert np.abs(position - path).max() < 1e-5


def test_a_jump_is_approached_without_overshoot_and_reached() -> None:
    start = np.array([0.0, 0.02])
    path = np.tile([1.0, 0.03], (150, 1))
    position, velocity = follow(start, np.zeros(2), path, np.zeros_like(path), PERIOD, BOUNDS)
    assert np.all(position <= path[0] + 1e-9)
    np.testing.assert_allclose(position[-1], path[0], atol=1e-6)
    assert velocity[:, 0].max() == pytest.approx(1.0)


def test_an_arm_pushed_out_of_bounds_comes_back_within_the_acceleration_limit() -> None:
    """It starts out of bounds and moving outwards: nothing jumps, and it ends inside."""
    start, speed = np.array([2.1, 0.02]), np.array([0.5, 0.0])
    path = np.tile([1.9, 0.02], (100, 1))
    position, velocity = follow(start, speed, path, np.zeros_like(path), PERIOD, BOUNDS)
    assert np.all(np.abs(accelerations(speed, velocity)) <= BOUNDS.acceleration_J * (1 + 1e-9))
    np.testing.assert_allclose(position[-1], path[0], atol=1e-6)


def test_the_empty_path_is_braking() -> None:
    position, velocity = follow(
        np.array([0.0, 0.02]), np.array([1.0, 0.0]), np.zeros((0, 2)), np.zeros((0, 2)), PERIOD, BOUNDS
    )
    assert len(position) == 7  # 1.0 rad/s at 8 rad/s^2 in periods of 0.02 s
    assert_bounded(np.array([0.0, 0.02]), np.array([1.0, 0.0]), position, velocity)
    at_rest, _ = follow(np.array([0.0, 0.02]), np.zeros(2), np.zeros((0, 2)), np.zeros((0, 2)), PERIOD, BOUNDS)
    assert at_rest.shape == (0, 2)
