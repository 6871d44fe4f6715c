"""The gate: which chunks pass, and that nothing beyond the bounds does, not even between the instants."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from ki_vla_ros.errors import ConfigurationError, EmergencyStop, SafetyRefusal
from ki_vla_ros.records import NS_PER_S, ActionChunk, Motion
from ki_vla_ros.robot.axes import Axis
from ki_vla_ros.runtime.governor import Governor
from ki_vla_ros.runtime.safety import SafetyGate, axis_bounds, extremes
from ki_vla_ros.settings.names import settings_from_parameters
from ki_vla_ros.sim.demonstrator import Demonstrator
from ki_vla_ros.sim.task import sample_scene
from ki_vla_ros.sim.world import HOME_J, World
from ki_vla_ros.sim.world import JOINTS as SIM_JOINTS

MS = 1_000_000
PERIOD = 50 * MS
NOW = 5_000 * MS
ARM = Axis(kind="joint", name="arm", unit="rad", lower=-2.0, upper=2.0, max_velocity=1.0, relative=True)
GRIPPER = Axis(kind="joint", name="gripper", unit="m", lower=0.0, upper=0.04, max_velocity=0.1, relative=True)
JOINTS = (ARM, GRIPPER)
REST = np.array([0.0, 0.02])

Screened = tuple[ActionChunk, tuple[str, ...]]


def gate_of(**limits: Any) -> SafetyGate:
    chosen = settings_from_parameters({f"limits.{name}": value for name, value in limits.items()}).limits
    return SafetyGate(JOINTS, chosen, axis_bounds(JOINTS, chosen))


def chunk_of(position_HJ: NDArray[np.float64], velocity_HJ: NDArray[np.float64] | None = None) -> ActionChunk:
    """A chunk whose first action is due one period after NOW."""
    if velocity_HJ is None:
        velocity_HJ = np.gradient(position_HJ, 0.05, axis=0) if len(position_HJ) > 1 else np.zeros_like(position_HJ)
    return ActionChunk(NOW, PERIOD, ("arm", "gripper"), position_HJ, velocity_HJ)


def ramp(speed: float, horizon: int = 8) -> ActionChunk:
    """A chunk in which the arm moves evenly from 0 and the gripper rests."""
    arm = speed * 0.05 * np.arange(1, horizon + 1)
    return chunk_of(np.stack([arm, np.full(horizon, 0.02)], axis=1))


def screen(chunk: ActionChunk, measured: NDArray[np.float64] = REST, **limits: Any) -> Screened:
    return gate_of(**limits).screen(chunk, NOW, measured, NOW)


def motion_of(position_NJ: Any, velocity_NJ: Any, period_ns: int = PERIOD) -> Motion:
    position_NJ, velocity_NJ = np.array(position_NJ, dtype=float), np.array(velocity_NJ, dtype=float)
    time_N = NOW + period_ns * np.arange(len(position_NJ), dtype=np.int64)
    return Motion(("arm", "gripper"), NOW, time_N, position_NJ, velocity_NJ)


# --- bounds


def test_bounds_are_the_tightest_of_bundle_urdf_and_settings() -> None:
    urdf = """<robot name="r">
      <joint name="arm" type="revolute"><limit lower="-1.5" upper="3" velocity="0.8"/></joint>
      <joint name="fixed" type="fixed"/></robot>"""
    chosen = settings_from_parameters(
        {"limits.velocity_scale": 0.5, "limits.joints.gripper.upper": 0.03, "limits.joints.arm.acceleration": 2.0}
    ).limits
    bounds = axis_bounds(JOINTS, chosen, urdf)
    np.testing.assert_allclose(bounds.lower_J, [-1.5, 0.0])
    np.testing.assert_allclose(bounds.upper_J, [2.0, 0.03])
    np.testing.assert_allclose(bounds.speed_J, [0.4, 0.05])
    np.testing.assert_allclose(bounds.acceleration_J, [2.0, 0.1 / 0.15])


def test_limits_that_leave_no_range_are_refused() -> None:
    chosen = settings_from_parameters({"limits.joints.gripper.lower": 0.05}).limits
    with pytest.raises(ConfigurationError, match=r"joint 'gripper': bundle, URDF and limits.joints leave no range"):
        axis_bounds(JOINTS, chosen)


# --- what the policy asks for


def test_a_clean_chunk_passes_as_it_is() -> None:
    chunk, corrections = screen(ramp(0.8))
    assert corrections == ()
    np.testing.assert_array_equal(chunk.position_HJ, ramp(0.8).position_HJ)


def test_clean_demonstrations_are_not_flagged() -> None:
    """Calibration: users would switch off a gate that corrects sound motions."""
    world = World(render=False)
    units = ["m" if name == "gripper" else "rad" for name in SIM_JOINTS]
    joints = tuple(
        Axis(kind="joint", name=n, unit=u, lower=lo, upper=hi, max_velocity={"rad": 3.0, "m": 0.2}[u], relative=True)  # type: ignore[arg-type]
        for n, u, lo, hi in zip(SIM_JOINTS, units, world.lower_J, world.upper_J, strict=True)
    )
    chosen = settings_from_parameters({}).limits
    gate = SafetyGate(joints, chosen, axis_bounds(joints, chosen))
    flagged = judged = 0
    worst = 0.0
    for seed in range(60):
        reference = Demonstrator(world).plan(HOME_J, None, sample_scene(seed, split="all"))
        for start_s in np.arange(0.0, reference.duration_s, 0.05):
            path = reference.sample(start_s + 0.05 * np.arange(17))
            chunk = ActionChunk(NOW, PERIOD, SIM_JOINTS, path[1:], np.gradient(path, 0.05, axis=0)[1:])
            wished, corrections = gate.screen(chunk, NOW, path[0], NOW)
            governor = Governor(SIM_JOINTS, 0.02)
            before = reference.sample(start_s + np.array([-0.02, 0.0])) if start_s else path[[0, 0]]
            speed = (before[1] - before[0]) / 0.02
            moving = np.stack([path[0], path[0]]), np.stack([speed, speed])
            governor.commit(Motion(SIM_JOINTS, NOW, np.array([NOW, NOW + MS]), *moving), gate.bounds)
            motion = governor.follow(wished, None, NOW, NOW, gate.bounds)
            gate.judge(motion, path[0])
            due = np.array([motion.at(chunk.due_ns(k))[0] for k in range(1, 16)])
            worst = max(worst, float(np.abs(due - chunk.position_HJ[1:]).max()))
            judged, flagged = judged + 1, flagged + bool(corrections)
    assert judged > 1000 and flagged == 0
    assert worst < 5e-3  # and the governor follows them


def test_a_small_excess_is_clamped_and_a_large_one_follows_the_rule() -> None:
    near = np.array([1.97, 0.02])
    chunk = chunk_of(np.array([[1.98, 0.02], [2.01, 0.02], [2.05, 0.02]]))
    wished, corrections = screen(chunk, near)
    assert corrections == ("clamped arm",)
    np.testing.assert_array_equal(wished.position_HJ[:, 0], [1.98, 2.0, 2.0])
    beyond = replace(chunk, position_HJ=chunk.position_HJ + np.array([0.04, 0.0]))
    fault = r"joint 'arm': position of action 2 is 2.0900 rad, limits -2.0000 to 2.0000"
    with pytest.raises(SafetyRefusal, match=fault):
        screen(beyond, near)
    with pytest.raises(EmergencyStop, match=fault):
        screen(beyond, near, on_position="stop")
    assert screen(beyond, near, on_position="clamp")[1] == ("clamped arm",)


def test_speed_follows_the_rule() -> None:
    assert screen(ramp(1.5))[1] == ("slowed arm",)
    assert screen(ramp(0.6))[1] == ()
    assert screen(ramp(0.6), velocity_scale=0.5)[1] == ("slowed arm",)
    fault = r"joint 'arm': chunk moves at 2.10 rad/s, limit 1.00, more than limits.max_overspeed \(2\) times as fast"
    with pytest.raises(SafetyRefusal, match=fault):
        screen(ramp(2.1))
    with pytest.raises(EmergencyStop, match=fault):
        screen(ramp(2.1), on_speed="stop")
    assert screen(ramp(2.1), on_speed="clamp")[1] == ("slowed arm",)
    assert screen(ramp(2.1), max_overspeed=3.0)[1] == ("slowed arm",)


def test_a_jump_from_the_measured_position_follows_the_rule() -> None:
    fault = r"joint 'arm': action 0 is 0.500 rad from the measured 0.500, limit 0.350 \(limits.max_jump_s\)"
    with pytest.raises(SafetyRefusal, match=fault):
        screen(ramp(0.0), np.array([0.5, 0.02]))
    with pytest.raises(EmergencyStop, match=fault):
        screen(ramp(0.0), np.array([0.5, 0.02]), on_jump="stop")
    screen(ramp(0.0), np.array([0.5, 0.02]), on_jump="clamp")  # the governor goes there as fast as the bounds allow
    screen(ramp(0.0), np.array([0.34, 0.02]))


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
        (replace(ramp(0.5), period_ns=0), "expected a period > 0"),
    ],
)
def test_malformed_chunks_are_refused_by_name(chunk: ActionChunk, fault: str) -> None:
    with pytest.raises(SafetyRefusal, match=fault):
        screen(chunk)


def test_an_old_chunk_is_refused() -> None:
    gate_of().screen(ramp(0.5), NOW - 400 * MS, REST, NOW)
    with pytest.raises(SafetyRefusal, match=r"observation is 401 ms old, limit 400 ms \(limits.max_chunk_age_s\)"):
        gate_of().screen(ramp(0.5), NOW - 401 * MS, REST, NOW)


def test_an_unknown_measured_state_refuses() -> None:
    with pytest.raises(SafetyRefusal, match=r"joint 'arm': measured at nan"):
        screen(ramp(0.5), np.array([np.nan, 0.02]))
    with pytest.raises(SafetyRefusal, match=r"joint 'gripper': measured at 20 m, .* is it published in m\?"):
        screen(ramp(0.5), np.array([0.0, 20.0]))
    with pytest.raises(SafetyRefusal, match="measured state: expected 2 positions"):
        screen(ramp(0.5), np.zeros(3))


# --- what the wire will carry


def test_a_motion_within_the_bounds_passes() -> None:
    gate_of().judge(motion_of([[0.0, 0.02], [0.005, 0.02], [0.01, 0.02]], [[0, 0], [0.2, 0], [0, 0]]), REST)
    gate_of().judge(motion_of([[0.0, 0.02]], [[0, 0]]), REST)


@pytest.mark.parametrize(
    "position, velocity",
    [
        ([[1.9, 0.02], [2.1, 0.02]], [[0, 0], [0, 0]]),  # beyond the limit
        ([[2.0, 0.02], [2.0, 0.02]], [[0.2, 0], [-0.2, 0]]),  # beyond it between the instants
        ([[0.0, 0.02], [0.06, 0.02]], [[0, 0], [0, 0]]),  # 1.2 rad/s on average
        ([[0.0, 0.02], [0.025, 0.02]], [[0, 0], [0, 0]]),  # 60 rad/s^2
        ([[0.0, 0.02], [0.005, 0.02]], [[0, 0], [0.2, 0]]),  # does not end at rest
        ([[0.0, 0.02], [np.nan, 0.02]], [[0, 0], [0, 0]]),
    ],
)
def test_a_motion_beyond_the_bounds_is_refused(position: Any, velocity: Any) -> None:
    with pytest.raises(SafetyRefusal, match=r"joint 'arm': motion reaches"):
        gate_of().judge(motion_of(position, velocity), REST)


def test_an_arm_outside_its_limits_may_come_back_but_not_go_farther() -> None:
    gate, outside = gate_of(), np.array([2.1, 0.02])
    inside = ActionChunk(NOW, PERIOD, ("arm", "gripper"), np.array([[1.9, 0.02]] * 16), np.zeros((16, 2)))
    way_back = Governor(("arm", "gripper"), 0.02).follow(inside, outside, NOW, NOW, gate.bounds)
    gate.judge(way_back, outside)
    with pytest.raises(SafetyRefusal, match="joint 'arm'"):
        gate.judge(motion_of([[2.1, 0.02], [2.105, 0.02], [2.11, 0.02]], [[0, 0], [0.2, 0], [0, 0]]), outside)


any_float = st.floats(width=64, allow_nan=True, allow_infinity=True)
near_arm, near_gripper = st.floats(-2.2, 2.2), st.floats(-0.005, 0.045)


@st.composite
def any_chunk(draw: st.DrawFn) -> ActionChunk:
    """A chunk: anything from a smooth motion with faults to arbitrary numbers."""
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


rules = st.sampled_from(("clamp", "refuse"))


@pytest.mark.slow
@settings(max_examples=1000)
@given(
    any_chunk(),
    st.tuples(st.one_of(near_arm, any_float), st.one_of(near_gripper, any_float)),
    st.fixed_dictionaries(
        {
            "velocity_scale": st.floats(0.1, 1.0),
            "position_margin": st.floats(0.0, 0.2),
            "max_jump_s": st.floats(0.0, 10.0),
            "on_position": rules,
            "on_speed": rules,
            "on_jump": rules,
        }
    ),
)
def test_nothing_leaves_the_limits(chunk: ActionChunk, measured: tuple[float, float], limits: dict[str, Any]) -> None:
    gate, measured_J = gate_of(**limits), np.array(measured)
    try:
        wished, _ = gate.screen(chunk, NOW, measured_J, NOW)
        motion = Governor(("arm", "gripper"), 0.02).follow(wished, measured_J, NOW + 10 * MS, NOW, gate.bounds)
        gate.judge(motion, measured_J)
    except SafetyRefusal:
        return
    position, velocity, acceleration = sampled(motion)
    lower, upper = np.minimum([-2.0, 0.0], measured_J), np.maximum([2.0, 0.04], measured_J)
    assert np.all(position >= lower - 1e-6) and np.all(position <= upper + 1e-6)
    assert np.all(np.abs(velocity) <= np.array([1.0, 0.1]) * limits["velocity_scale"] * (1 + 1e-6))
    assert np.all(np.abs(acceleration) <= np.array([1.0, 0.1]) / 0.15 * (1 + 1e-6))
    np.testing.assert_array_equal(motion.velocity_NJ[-1], 0.0)
    np.testing.assert_array_equal(motion.position_NJ[0], measured_J)


def sampled(motion: Motion, per_piece: int = 40) -> tuple[NDArray[np.float64], ...]:
    """Positions, velocities and accelerations of the cubics through the instants, from the Hermite basis."""
    s = np.linspace(0.0, 1.0, per_piece)[:, None]
    positions, velocities = [motion.position_NJ], [motion.velocity_NJ]
    accelerations = [np.zeros_like(motion.velocity_NJ)]
    for k in range(len(motion.time_N) - 1):
        period_s = int(motion.time_N[k + 1] - motion.time_N[k]) / NS_PER_S
        p0, p1 = motion.position_NJ[k : k + 2]
        m0, m1 = motion.velocity_NJ[k : k + 2] * period_s
        positions.append((2 * s**3 - 3 * s**2 + 1) * p0 + (s**3 - 2 * s**2 + s) * m0 + (3 * s**2 - 2 * s**3) * p1)
        positions[-1] = positions[-1] + (s**3 - s**2) * m1
        slope = (6 * s**2 - 6 * s) * (p0 - p1) + (3 * s**2 - 4 * s + 1) * m0 + (3 * s**2 - 2 * s) * m1
        velocities.append(slope / period_s)
        bend = (12 * s - 6) * (p0 - p1) + (6 * s - 4) * m0 + (6 * s - 2) * m1
        accelerations.append(bend / period_s**2)
    return np.vstack(positions), np.vstack(velocities), np.vstack(accelerations)


@settings(max_examples=100)
@given(arrays(float, (4, 2), elements=st.floats(-1, 1)), arrays(float, (4, 2), elements=st.floats(-30, 30)))
def test_extremes_are_those_of_the_sampled_curve(
    position_NJ: NDArray[np.float64], velocity_NJ: NDArray[np.float64]
) -> None:
    motion = motion_of(position_NJ, velocity_NJ)
    low_J, high_J, speed_J, acceleration_J = extremes(motion)
    position, velocity, acceleration = sampled(motion, 2000)
    np.testing.assert_allclose(low_J, position.min(axis=0), atol=1e-5)
    np.testing.assert_allclose(high_J, position.max(axis=0), atol=1e-5)
    np.testing.assert_allclose(speed_J, np.abs(velocity).max(axis=0), atol=1e-3)
    np.testing.assert_allclose(acceleration_J, np.abs(acceleration).max(axis=0), atol=1e-6)


@pytest.mark.parametrize("at_rad, period_ms", [(1e5, 2), (1e6, 2), (1e6, 20), (1e8, 20), (9e8, 200)])
def test_the_rounding_of_large_positions_is_no_acceleration(at_rad: float, period_ms: int) -> None:
    """A wheel that has turned for a year still turns; one per cent too much acceleration shows at 1e6 rad, too."""
    joints = (replace(ARM, lower=-1e9, upper=1e9),)
    limits = settings_from_parameters({}).limits
    gate = SafetyGate(joints, limits, axis_bounds(joints, limits))
    start_J, bounds = np.array([at_rad]), gate.bounds
    path_HJ = start_J + np.cumsum(np.random.default_rng(0).normal(0.0, 0.05, (16, 1)), axis=0)
    chunk = ActionChunk(NOW, PERIOD, ("arm",), path_HJ, np.gradient(path_HJ, 0.05, axis=0))
    governor = Governor(("arm",), period_ms / 1e3)
    gate.judge(governor.follow(chunk, start_J, NOW, NOW, bounds), start_J)
    if at_rad <= 1e6:
        wider = replace(bounds, acceleration_J=1.01 * bounds.acceleration_J)
        with pytest.raises(SafetyRefusal, match="per second squared"):
            gate.judge(governor.follow(chunk, start_J, NOW, NOW, wider), start_J)
