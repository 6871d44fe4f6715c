"""The seam guarantee: whatever policy, delay, jitter and loss do, what goes on the wire is continuous and bounded.

Ten thousand cases: KI_VLA_CASES=5 make test ARGS=test/contracts/test_seams.py; a million: KI_VLA_CASES=500
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from rclpy.serialization import deserialize_message
from support import MORE_CASES
from support.bundles import robot_of
from trajectory_msgs.msg import JointTrajectory

from ki_vla_ros.errors import StaleInput
from ki_vla_ros.messages.encoding import encode_command
from ki_vla_ros.records import NS_PER_S, ActionChunk, CameraFrame, Motion, Observation
from ki_vla_ros.robot.axes import Axis
from ki_vla_ros.robot.commands import CommandSpace
from ki_vla_ros.runtime.diagnostics import Diagnostics
from ki_vla_ros.runtime.loop import PolicyLoop
from ki_vla_ros.runtime.observation import Latest
from ki_vla_ros.runtime.paths import CommandedPath
from ki_vla_ros.runtime.safety import extremes
from ki_vla_ros.settings.names import settings_from_parameters
from ki_vla_ros.settings.settings import ExecutorName, Settings

CASES = 2000 * MORE_CASES
MS = 1_000_000
START = 1_000 * NS_PER_S
STEP_S = 0.001
HORIZON, PERIOD = 16, 50 * MS
ARM = Axis(kind="joint", name="arm", unit="rad", lower=-2.0, upper=2.0, max_velocity=1.5, relative=True)
GRIPPER = Axis(kind="joint", name="gripper", unit="m", lower=0.0, upper=0.04, max_velocity=0.1, relative=False)
JOINTS = (ARM, GRIPPER)
NAMES = ("arm", "gripper")
EXECUTORS = get_args(ExecutorName)
LOWER, UPPER, SPEED = np.array([-2.0, 0.0]), np.array([2.0, 0.04]), np.array([1.5, 0.1])
ACCELERATION = SPEED / 0.15


class Wire:
    def __init__(self) -> None:
        self.time_ns = START
        self.sent: list[tuple[int, Motion]] = []

    def now_ns(self) -> int:
        return self.time_ns

    def motion_ns(self) -> int:
        return self.now_ns()

    def simulated_clock(self) -> bool:
        return True

    def moves_arm(self) -> bool:
        return True

    def send_command(self, motion: Motion, now_ns: int, hold: bool = False) -> None:
        self.sent.append((now_ns, motion))

    def report_chunk(self, chunk: ActionChunk) -> None: ...

    def report_tick(self, fields: Any) -> None: ...

    def log(self, message: str, cause: str) -> None:
        assert cause != "internal error", message  # a loop that fails in every tick sends nothing, and so has no seams

    def commanded(self, rest_J: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return self.sent[-1][1].at(self.time_ns) if self.sent else (rest_J, np.zeros(2))


@dataclass
class Arm:
    """Follows the wire up to a tracking error; now and then its inputs are stale."""

    wire: Wire
    rng: np.random.Generator
    rest_J: NDArray[np.float64]
    stale: float

    def measured(self, now_ns: int, max_age_ns: int) -> Latest:
        error_J = self.rng.uniform(-1, 1, 2) * [2e-3, 1e-4]
        measured_J = np.clip(self.wire.commanded(self.rest_J)[0] + error_J, LOWER, UPPER)
        return Latest(now_ns, measured_J, (now_ns,), np.full(len(measured_J), now_ns))

    def observe(self, now_ns: int, max_age_ns: int, slop_ns: int) -> Observation:
        if self.rng.random() < self.stale:
            raise StaleInput("camera 'scene': newest frame 900 ms old")
        stamp_ns = now_ns - int(self.rng.integers(0, 60)) * MS
        frame = CameraFrame("scene", stamp_ns, np.zeros((1, 1, 3), np.uint8))
        return Observation(stamp_ns, {"scene": frame}, self.measured(now_ns, max_age_ns)[1])

    def clear(self) -> None: ...


class WildPolicy:
    """Chunks of every kind, and inference that takes its time."""

    def __init__(self, wire: Wire, rng: np.random.Generator, kind: str, longest_ms: int) -> None:
        manifest = SimpleNamespace(
            axes=JOINTS,
            axis_names=NAMES,
            robot=robot_of(JOINTS, HORIZON, PERIOD / 1e9),
            horizon=HORIZON,
            action_period_ns=PERIOD,
            max_prefix_delay=4,
            state=SimpleNamespace(as_token=False),
            flow=SimpleNamespace(steps=10),
        )
        self.bundle = SimpleNamespace(manifest=manifest, tokenizer=None)
        self.wire, self.rng, self.kind, self.longest_ms = wire, rng, kind, longest_ms
        self.space = CommandSpace(manifest.robot)
        self.flow_steps = self.noise_seed = 0

    def see(self, *_: Any) -> None:
        self.wire.time_ns += int(self.rng.integers(0, self.longest_ms + 1)) * MS

    def noise(self, _: int) -> None: ...

    def guide(self, condition: Any, observation: Observation) -> Any:
        assert np.isfinite(condition.position_HJ).all() and condition.weight_H.shape == (HORIZON,)
        return condition

    def denoise(self, *_: Any) -> None: ...

    def decode(self, _: Any, observation: Observation, commanded_J: Any) -> ActionChunk:
        rng, start = self.rng, observation.state_S
        path = {
            "smooth": lambda: start + np.cumsum(rng.normal(0, 0.5, 2) * SPEED * 0.05 + np.zeros((HORIZON, 2)), axis=0),
            "wander": lambda: start + np.cumsum(rng.normal(0, 1.0, (HORIZON, 2)) * SPEED * 0.05, axis=0),
            "jumps": lambda: start + rng.choice([-1, 1], 2) * SPEED * rng.uniform(0, 0.4, 2) + np.zeros((HORIZON, 2)),
            "anywhere": lambda: rng.uniform(LOWER - 0.3, UPPER + 0.3, (HORIZON, 2)),
        }[self.kind]()
        velocity = np.gradient(np.vstack([start, path]), 0.05, axis=0)[1:]
        return ActionChunk(observation.stamp_ns, PERIOD, NAMES, path, velocity)


def run(seed: int, executor: str, kind: str, **changes: Any) -> list[tuple[int, Motion]]:
    """A second or so of ticks with random delay, late ticks, dropped ticks and stale inputs; what the wire got."""
    rng = np.random.default_rng(seed)
    wire = Wire()
    chosen = {"executor": executor, "execution_horizon_s": float(rng.choice([0.1, 0.2, 0.4])), "ramp_in_s": 0.0}
    margins = (
        {"limits.on_position": "clamp", "limits.on_speed": "clamp", "limits.max_jump_s": 10.0}
        if rng.random() < 0.7
        else {}
    )
    now: Settings = settings_from_parameters({**chosen, **margins, "limits.max_chunk_age_s": 2.0, **changes})
    policy = WildPolicy(wire, rng, kind, int(rng.choice([0, 60, 300])))
    arm = Arm(wire, rng, rng.uniform(LOWER + 0.005, UPPER - 0.005), float(rng.choice([0.0, 0.2])))
    line = PolicyLoop(policy, arm, wire, Diagnostics(), lambda: now)  # type: ignore[arg-type]
    line.instruction = "go"
    for _ in range(int(rng.integers(3, 10))):
        before = wire.time_ns
        line.step(now, before, 0)
        line.watch()
        wire.time_ns = max(wire.time_ns, before + 100 * MS) + int(rng.choice([0, 0, 0, 7, 100, 900])) * MS
    return wire.sent


def assert_seamless(sent: list[tuple[int, Motion]]) -> None:
    for _, motion in sent:
        low, high, speed, acceleration = extremes(motion)
        assert np.all(low >= LOWER - 1e-9) and np.all(high <= UPPER + 1e-9)
        assert np.all(speed <= SPEED * (1 + 1e-6))
        assert np.all(acceleration <= ACCELERATION * (1 + 1e-6))
        assert np.all(motion.velocity_NJ[-1] == 0.0)
    for (_, old), (now_ns, new) in pairwise(sent):
        # The controller has followed `old` until now; from here to the first instant ahead it follows `new`. Until
        # `from_ns` both must be one and the same motion.
        for time_ns in np.linspace(now_ns, new.from_ns, 5).astype(np.int64):
            for a, b in zip(old.at(int(time_ns)), new.at(int(time_ns)), strict=True):
                np.testing.assert_allclose(a, b, atol=1e-9)
        np.testing.assert_allclose(old.at(new.from_ns)[0], new.at(new.from_ns)[0], atol=1e-9)
        np.testing.assert_allclose(old.at(new.from_ns)[1], new.at(new.from_ns)[1], atol=1e-9)


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.usefixtures("uncounted")
@settings(max_examples=CASES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**63), st.sampled_from(EXECUTORS), st.sampled_from(("smooth", "wander", "jumps", "anywhere")))
def test_no_executor_makes_a_seam(seed: int, executor: str, kind: str) -> None:
    assert_seamless(run(seed, executor, kind))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_the_cases_are_not_empty(executor: str) -> None:
    """Most runs send several motions that take over from one still running."""
    runs = [run(seed, executor, "smooth") for seed in range(40)]
    handovers = [sum(now_ns < old.end_ns for (_, old), (now_ns, _) in pairwise(sent)) for sent in runs]
    assert np.mean([len(sent) >= 2 for sent in runs]) > 0.6
    assert np.mean(handovers) > (0.05 if executor == "synchronous" else 1.0)


def walk(sent: list[tuple[int, Motion]], mode: str) -> NDArray[np.float64]:
    """Positions [N, J] every `STEP_S` that a controller has, who gets what the wire carries in this mode."""
    start_ns, end_ns = sent[0][0], sent[-1][1].end_ns + 50 * MS
    times = np.arange(start_ns, end_ns, round(STEP_S * NS_PER_S))
    controller = CommandedPath(NAMES, sent[0][1].position_NJ[0])
    waiting, running, found = list(sent), sent[0][1], []
    for time_ns in times:
        while waiting and waiting[0][0] <= time_ns:
            now_ns, running = waiting.pop(0)
            if mode != "stream":
                message = deserialize_message(
                    encode_command(running, now_ns, now_ns * (mode == "splice")), JointTrajectory
                )
                controller.take(message, now_ns)
        found.append(running.at(int(time_ns))[0] if mode == "stream" else controller.sample(int(time_ns))[0])
    return np.array(found)


@pytest.mark.parametrize("mode", ["replace", "splice", "stream"])
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**63), st.sampled_from(EXECUTORS), st.sampled_from(("smooth", "wander", "jumps")))
def test_a_controller_moves_within_the_bounds_in_every_mode(mode: str, seed: int, executor: str, kind: str) -> None:
    """From the messages themselves: what the arm is told each millisecond has no step in position or speed."""
    sent = run(seed, executor, kind)
    if not sent:
        return
    position_NJ = walk(sent, mode)
    velocity_NJ = np.diff(position_NJ, axis=0) / STEP_S
    acceleration_NJ = np.diff(velocity_NJ, axis=0) / STEP_S
    assert np.all(position_NJ >= LOWER - 1e-9) and np.all(position_NJ <= UPPER + 1e-9)
    assert np.all(np.abs(velocity_NJ) <= SPEED * (1 + 1e-6))
    assert np.all(np.abs(acceleration_NJ) <= ACCELERATION * (1 + 1e-3))
