"""What the node sends, judged from its bytes by a controller that knows nothing of the node: see support/judge.py.

Twenty thousand cases: KI_VLA_CASES=5 make test ARGS=test/contracts/test_judge.py
A million cases: PYTHONPATH=test python -m system.judge --cases 1000000 --jobs 2
"""

from __future__ import annotations

import numpy as np
import pytest
from rclpy.serialization import deserialize_message
from support import MORE_CASES
from support.controller import NS_PER_S, LiteralController, TrajectoryController, read_trajectory
from support.judge import FAULTS, MODES, TOLERANCE, Case, judge
from trajectory_msgs.msg import JointTrajectory

from ki_vla_ros.messages.encoding import encode_command
from ki_vla_ros.records import Motion, header_ns, time_to_ns
from ki_vla_ros.runtime.paths import trajectory_from_message

CASES, PARTS = 4000 * MORE_CASES, 10
MS = 1_000_000


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.usefixtures("uncounted")
@pytest.mark.parametrize("part", range(PARTS))
def test_no_fault_makes_the_arm_leave_its_limits(part: int) -> None:
    bad = [verdict for seed in range(part, CASES, PARTS) if (verdict := judge(Case(seed))).bad]
    told = [f"{verdict.case}\n    {verdict.ratios}\n    {verdict.where} {verdict.faults}" for verdict in bad[:3]]
    assert not bad, f"{len(bad)} of {CASES // PARTS} cases:\n" + "\n".join(told)


@pytest.mark.usefixtures("uncounted")
def test_the_cases_are_not_empty() -> None:
    """Every fault comes in every mode, most cases move the arm, and the worst ones use a limit up."""
    verdicts = [judge(Case(seed)) for seed in range(400)]
    met = {(verdict.case.mode, fault) for verdict in verdicts for fault in verdict.case.faults}
    assert met >= {(mode, fault) for mode in MODES for fault in FAULTS}
    assert np.mean([verdict.moved for verdict in verdicts]) > 0.6
    for quantity in ("step", "acceleration"):
        assert 0.99 < max(verdict.ratios[quantity] for verdict in verdicts) < TOLERANCE


def motion(joints: tuple[str, ...], seed: int = 3) -> Motion:
    rng = np.random.default_rng(seed)
    velocity_NJ = np.vstack([rng.normal(0.0, 1.0, (6, len(joints))), np.zeros(len(joints))])
    time_N = np.cumsum(rng.integers(1, 9, 7)) * 7 * MS
    return Motion(joints, int(time_N[0]), time_N, rng.normal(0.0, 1.0, (7, len(joints))), velocity_NJ)


@pytest.mark.parametrize(
    "joints", [("a",), ("arm", "gripper"), ("shoulder", "b", "wrist_3"), ("joint_one", "two", "x")]
)
def test_it_reads_a_message_as_rclpy_does(joints: tuple[str, ...]) -> None:
    data = encode_command(motion(joints), 10 * MS, 5 * NS_PER_S + 7)
    ours, theirs = read_trajectory(data), deserialize_message(data, JointTrajectory)
    assert ours.stamp_ns == header_ns(theirs) and list(ours.joints) == list(theirs.joint_names)
    assert ours.time_K.tolist() == [time_to_ns(point.time_from_start) for point in theirs.points]
    np.testing.assert_array_equal(ours.position_KJ, [point.positions for point in theirs.points])
    np.testing.assert_array_equal(ours.velocity_KJ, [point.velocities for point in theirs.points])


@pytest.mark.parametrize("seed", range(8))
def test_its_controller_is_the_one_that_is_written_step_by_step(seed: int) -> None:
    """Messages that start now, later, already began or ended, each before the last one is over."""
    rng, joints, start_J = np.random.default_rng(seed), ("arm", "gripper"), np.array([0.3, -0.2])
    quick = TrajectoryController(joints, start_J, 0, 0)
    literal = LiteralController({name: (float(p), 0.0, 0.0) for name, p in zip(joints, start_J, strict=True)})
    expected = []
    for ms in range(1, 500):
        state = literal.step(ms * MS)
        if rng.random() < 0.02:
            stamp_ms = ms + int(rng.integers(-150, 80))
            stamp_ns = stamp_ms * MS if rng.random() < 0.6 and stamp_ms > 0 else 0
            data = encode_command(motion(joints, int(rng.integers(1000))), 0, stamp_ns)
            quick.receive(data, ms * MS)
            literal.receive(trajectory_from_message(deserialize_message(data, JointTrajectory)), ms * MS)
            state = literal.step(ms * MS)
        expected.append(state)
    assert np.ptp(np.array(expected), axis=0).min() > 0.1
    np.testing.assert_allclose(quick.walk(np.arange(1, 500) * MS)[0], expected, atol=1e-9)
