"""The gate: whatever comes in, what goes out keeps every limit, between the points too."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from ki_vla_ros.errors import SafetyRefusal
from ki_vla_ros.manifest import JointSpec
from ki_vla_ros.records import NS_PER_S, ActionChunk
from ki_vla_ros.safety import SafetyGate, Verdict, cubic_extremes
from ki_vla_ros.settings import LimitSettings

MS = 1_000_000
PERIOD = 50 * MS
NOW = 5_000 * MS
ARM = JointSpec(name="arm", unit="rad", lower=-2.0, upper=2.0, max_velocity=1.0, relative=True)
GRIPPER = JointSpec(name="gripper", unit="m", lower=0.0, upper=0.04, max_velocity=0.1, relative=True)
JOINTS = (ARM, GRIPPER)
LIMITS = LimitSettings()
REST = np.array([0.0, 0.02])


def chunk_of(position_HJ: NDArray[np.float64], velocity_HJ: NDArray[np.float64] | None = None) -> ActionChunk:
    """First action due one period from NOW."""
    if velocity_HJ is None:
        velocity_HJ = np.gradient(position_HJ, 0.05, axis=0) if len(position_HJ) > 1 else np.zeros_like(position_HJ)
    return ActionChunk(NOW, PERIOD, ("arm", "gripper"), position_HJ, velocity_HJ)


def ramp(speed: float, horizon: int = 8) -> ActionChunk:
    """The arm moves evenly from 0, the gripper rests."""
    arm = speed * 0.05 * np.arange(1, horizon + 1)
    return chunk_of(np.stack([arm, np.full(horizon, 0.02)], axis=1))


def judge(chunk: ActionChunk, limits: LimitSettings = LIMITS, measured: NDArray[np.float64] = REST) -> Verdict:
    return SafetyGate(JOINTS, limits).judge(chunk, NOW, measured, NOW)


def sampled(command: ActionChunk, per_segment: int = 40) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Positions and velocities of the cubics through the points, by the textbook's Hermite basis."""
    s = np.linspace(0.0, 1.0, per_segment)[:, None]
    period_s = command.period_ns / NS_PER_S
    positions, velocities = [command.position_HJ], [command.velocity_HJ]
    for k in range(command.horizon - 1):
        p0, p1 = command.position_HJ[k : k + 2]
        m0, m1 = command.velocity_HJ[k : k + 2] * period_s
        positions.append(
            (2 * s**3 - 3 * s**2 + 1) * p0
            + (s**3 - 2 * s**2 + s) * m0
            + (3 * s**2 - 2 * s**3) * p1
            + (s**3 - s**2) * m1
        )
        basis = (
            (6 * s**2 - 6 * s) * p0 + (3 * s**2 - 4 * s + 1) * m0 + (6 * s - 6 * s**2) * p1 + (3 * s**2 - 2 * s) * m1
        )
        velocities.append(basis / period_s)
    return np.vstack(positions), np.vstack(velocities)


def assert_within_limits(command: ActionChunk, measured: NDArray[np.float64], now_ns: int, scale: float = 1.0) -> None:
    lower, upper = np.array([-2.0, 0.0]), np.array([2.0, 0.04])
    speed = np.array([1.0, 0.1]) * scale
    position, velocity = sampled(command)
    assert np.all(np.isfinite(position)) and np.all(np.isfinite(velocity))
    assert np.all(position >= lower - 1e-6) and np.all(position <= upper + 1e-6)
    assert np.all(np.abs(velocity) <= speed * (1 + 1e-6))
    assert command.due_ns(0) > now_ns and command.period_ns > 0
    first_s = (command.due_ns(0) - now_ns) / NS_PER_S
    assert np.all(np.abs(command.position_HJ[0] - measured) <= speed * first_s * (1 + 1e-6))
    np.testing.assert_array_equal(command.velocity_HJ[-1], 0.0)


def test_a_clean_chunk_passes_as_it_is_and_ends_at_rest() -> None:
    chunk = ramp(0.8)
    verdict = judge(chunk)
    assert verdict.corrections == ()
    assert verdict.command.horizon == chunk.horizon + 1
    np.testing.assert_array_equal(verdict.command.position_HJ[:-1], chunk.position_HJ)
    np.testing.assert_array_equal(verdict.command.velocity_HJ[:-1], chunk.velocity_HJ)
    np.testing.assert_array_equal(verdict.command.velocity_HJ[-1], 0.0)
    # Even braking from 0.8 rad/s within 0.05 s takes 0.02 rad.
    np.testing.assert_allclose(verdict.command.position_HJ[-1], chunk.position_HJ[-1] + [0.02, 0.0], atol=1e-12)


def test_clean_motions_of_many_kinds_pass_without_correction() -> None:
    """A gate that corrects what is in order would be switched off by its users."""
    flagged = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        start = rng.uniform([-1.5, 0.005], [1.5, 0.035])
        way = rng.uniform([-0.4, -0.015], [0.4, 0.015])
        target = np.clip(start + way, [-2.0, 0.0], [2.0, 0.04])
        duration = rng.uniform(0.8, 2.0)
        t = np.clip(rng.uniform(0, duration) + 0.05 * np.arange(0, 17), 0, duration)[:, None] / duration
        path = start + (target - start) * (10 * t**3 - 15 * t**4 + 6 * t**5)
        chunk = chunk_of(path[1:], np.gradient(path, 0.05, axis=0)[1:])
        flagged += bool(judge(chunk, measured=path[0]).corrections)
    assert flagged == 0


def test_a_small_excess_is_clamped_a_large_one_refused() -> None:
    chunk = chunk_of(np.array([[1.98, 0.02], [2.01, 0.02], [2.05, 0.02]]))
    verdict = judge(chunk, measured=np.array([1.97, 0.02]))
    assert verdict.corrections == ("clamped arm",)
    np.testing.assert_array_equal(verdict.command.position_HJ[:3, 0], [1.98, 2.0, 2.0])
    beyond = replace(chunk, position_HJ=chunk.position_HJ + np.array([0.04, 0.0]))
    with pytest.raises(
        SafetyRefusal, match=r"joint 'arm': position of action 2 is 2.0900 rad, limits -2.0000 to 2.0000"
    ):
        judge(beyond, measured=np.array([1.97, 0.02]))


def test_a_cubic_that_leaves_the_limits_between_points_is_flattened() -> None:
    # Both points lie on the limit; with these velocities the cubic between them would go 0.006 rad beyond.
    points, velocity = np.array([[2.0, 0.02], [2.0, 0.02]]), np.array([[0.5, 0.0], [-0.5, 0.0]])
    chunk = chunk_of(points, velocity)
    assert sampled(chunk)[0][:, 0].max() > 2.005
    command = judge(chunk, measured=np.array([1.99, 0.02])).command
    assert sampled(command)[0][:, 0].max() <= 2.0 + 1e-12


def test_a_chunk_that_is_too_fast_is_slowed_down_along_the_same_path() -> None:
    chunk = ramp(1.5)
    verdict = judge(chunk)
    assert verdict.corrections == ("slowed 1.50x for arm",)
    np.testing.assert_array_equal(verdict.command.position_HJ[:-1], chunk.position_HJ)
    np.testing.assert_allclose(verdict.command.velocity_HJ[:-1, 0], 1.0, rtol=1e-6)
    # Rounded up by at most a nanosecond or two, so that no speed is above its limit.
    assert 0 <= verdict.command.period_ns - 75 * MS <= 2
    assert 0 <= verdict.command.due_ns(0) - (NOW + 75 * MS) <= 2


def test_a_chunk_that_is_much_too_fast_is_refused() -> None:
    with pytest.raises(SafetyRefusal, match=r"joint 'arm': velocity of action 0 is 2.1, limit 1 per second, too fast"):
        judge(ramp(2.1))
    with pytest.raises(SafetyRefusal, match=r"joint 'arm': chunk needs 2.15 rad/s, limit 1.00, too fast"):
        judge(replace(ramp(2.1), velocity_HJ=np.full((8, 2), [2.0, 0.0])))
    judge(ramp(2.1), replace_limits(max_slowdown=3.0))


def test_speed_between_points_counts() -> None:
    # 0.9 rad/s on average from rest to rest is 1.35 rad/s in the middle.
    chunk = chunk_of(np.array([[0.0, 0.02], [0.045, 0.02]]), np.zeros((2, 2)))
    assert judge(chunk).corrections == ("slowed 1.35x for arm",)


def test_a_jump_from_the_measured_position_is_refused() -> None:
    with pytest.raises(SafetyRefusal, match=r"joint 'arm': chunk needs 10.00 rad/s"):
        judge(ramp(0.0), measured=np.array([0.5, 0.02]))


def test_velocity_scale() -> None:
    assert judge(ramp(0.6)).corrections == ()
    assert judge(ramp(0.6), replace_limits(velocity_scale=0.5)).corrections == ("slowed 1.20x for arm",)


def replace_limits(**changes: float) -> LimitSettings:
    return LimitSettings.model_validate({**LIMITS.model_dump(), **changes})


def with_value(what: str, value: float) -> ActionChunk:
    chunk = ramp(0.5)
    values = getattr(chunk, what).copy()
    values[3, 1] = value
    return replace(chunk, **{what: values})


@pytest.mark.parametrize(
    "chunk, fault",
    [
        (with_value("position_HJ", np.nan), "joint 'gripper': position of action 3 is nan"),
        (with_value("position_HJ", np.inf), "joint 'gripper': position of action 3 is inf"),
        (with_value("velocity_HJ", -np.inf), "joint 'gripper': velocity of action 3 is -inf"),
        (replace(ramp(0.5), joints=("gripper", "arm")), "expected joints arm, gripper, got gripper, arm"),
        (replace(ramp(0.5), velocity_HJ=np.zeros((7, 2))), r"got \[8, 2\] and \[7, 2\]"),
        (chunk_of(np.zeros((0, 2)), np.zeros((0, 2))), "1 or more"),
        (replace(ramp(0.5), start_ns=NOW - PERIOD), "first action is due 0.0 ms ago"),
        (replace(ramp(0.5), period_ns=0), "expected one in the future"),
    ],
)
def test_chunks_that_cannot_be_are_refused_by_name(chunk: ActionChunk, fault: str) -> None:
    with pytest.raises(SafetyRefusal, match=fault):
        judge(chunk)


def test_an_old_chunk_is_refused() -> None:
    gate = SafetyGate(JOINTS, LIMITS)
    gate.judge(ramp(0.5), NOW - 400 * MS, REST, NOW)
    with pytest.raises(SafetyRefusal, match=r"observation is 401 ms old, limit 400 ms \(limits.max_chunk_age_s\)"):
        gate.judge(ramp(0.5), NOW - 401 * MS, REST, NOW)


def test_an_unknown_measured_state_refuses() -> None:
    with pytest.raises(SafetyRefusal, match=r"joint 'arm': measured at nan"):
        judge(ramp(0.5), measured=np.array([np.nan, 0.02]))
    with pytest.raises(SafetyRefusal, match=r"joint 'gripper': measured at 20 m, .* is it published in m\?"):
        judge(ramp(0.5), measured=np.array([0.0, 20.0]))
    with pytest.raises(SafetyRefusal, match="measured state: expected 2 positions"):
        judge(ramp(0.5), measured=np.zeros(3))


def test_hold_stays_where_the_arm_is() -> None:
    hold = SafetyGate(JOINTS, LIMITS).hold(np.array([0.7, 0.01]), NOW, 200 * MS)
    assert (hold.horizon, hold.due_ns(0)) == (1, NOW + 200 * MS)
    np.testing.assert_array_equal(hold.position_HJ, [[0.7, 0.01]])
    np.testing.assert_array_equal(hold.velocity_HJ, [[0.0, 0.0]])


def test_hold_outside_the_limits_goes_to_the_limit_at_allowed_speed() -> None:
    hold = SafetyGate(JOINTS, LIMITS).hold(np.array([2.5, -0.01]), NOW, 200 * MS)
    np.testing.assert_array_equal(hold.position_HJ, [[2.0, 0.0]])
    assert hold.due_ns(0) == NOW + 500 * MS


def test_hold_at_nowhere_is_refused() -> None:
    with pytest.raises(SafetyRefusal, match="joint 'arm': measured at nan"):
        SafetyGate(JOINTS, LIMITS).hold(np.array([np.nan, 0.0]), NOW, 200 * MS)


any_float = st.floats(width=64, allow_nan=True, allow_infinity=True)
near_arm, near_gripper = st.floats(-2.2, 2.2), st.floats(-0.005, 0.045)


@st.composite
def any_chunk(draw: st.DrawFn) -> ActionChunk:
    """From smooth motions with faults to arbitrary numbers."""
    horizon = draw(st.integers(1, 8))
    if draw(st.booleans()):
        steps = draw(arrays(float, (horizon, 2), elements=st.floats(-1.0, 1.0)))
        size = draw(st.floats(0.0, 0.2))
        start = np.array([draw(near_arm), draw(near_gripper)])
        position_HJ = start + np.cumsum(steps * [size, size * 0.1], axis=0)
        velocity_HJ = draw(arrays(float, (horizon, 2), elements=st.floats(-1.2, 1.2))) * [1.0, 0.1]
    else:
        position_HJ = draw(arrays(float, (horizon, 2), elements=any_float))
        velocity_HJ = draw(arrays(float, (horizon, 2), elements=any_float))
    start_ns = NOW + draw(st.integers(-200, 200)) * MS
    return ActionChunk(start_ns, draw(st.integers(1, 200)) * MS, ("arm", "gripper"), position_HJ, velocity_HJ)


@settings(max_examples=600, deadline=None)
@given(
    chunk=any_chunk(),
    measured=st.tuples(st.one_of(near_arm, any_float), st.one_of(near_gripper, any_float)),
    scale=st.floats(0.1, 1.0),
    margin=st.floats(0.0, 0.2),
    slowdown=st.floats(1.0, 10.0),
)
@example(ramp(0.5), (0.0, 0.02), 1.0, 0.0, 1.0)
@example(ramp(5.0), (0.0, 0.02), 1.0, 0.2, 10.0)
def test_nothing_leaves_the_limits(
    chunk: ActionChunk, measured: tuple[float, float], scale: float, margin: float, slowdown: float
) -> None:
    limits = replace_limits(velocity_scale=scale, position_margin=margin, max_slowdown=slowdown)
    gate, measured_J = SafetyGate(JOINTS, limits), np.array(measured)
    try:
        command = gate.judge(chunk, NOW, measured_J, NOW).command
    except SafetyRefusal:
        pass
    else:
        assert_within_limits(command, measured_J, NOW, scale)
    try:
        hold = gate.hold(measured_J, NOW, 100 * MS)
    except SafetyRefusal:
        return
    assert np.all(hold.position_HJ >= [-2.0, 0.0]) and np.all(hold.position_HJ <= [2.0, 0.04])
    assert np.all(hold.velocity_HJ == 0.0) and hold.due_ns(0) >= NOW + 100 * MS


@settings(max_examples=100, deadline=None)
@given(arrays(float, (4, 2), elements=st.floats(-1, 1)), arrays(float, (4, 2), elements=st.floats(-30, 30)))
def test_cubic_extremes_are_those_of_the_sampled_curve(
    position_HJ: NDArray[np.float64], velocity_HJ: NDArray[np.float64]
) -> None:
    chunk = chunk_of(position_HJ, velocity_HJ)
    low_J, high_J, speed_J = cubic_extremes(chunk)
    position, velocity = sampled(chunk, 2000)
    np.testing.assert_allclose(low_J, position.min(axis=0), atol=1e-5)
    np.testing.assert_allclose(high_J, position.max(axis=0), atol=1e-5)
    np.testing.assert_allclose(speed_J, np.abs(velocity).max(axis=0), atol=1e-3)
