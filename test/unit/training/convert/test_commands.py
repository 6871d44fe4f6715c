"""What a controller makes of its commands, against the node's own motion and against straight lines."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ki_vla_ros.errors import InputError
from ki_vla_ros.messages.type_names import POSITIONS, TRAJECTORY
from ki_vla_ros.records import NS_PER_S, JointReading, Motion
from training.convert.commands import Commands, Readings

MS = 1_000_000
NAMES = ("a", "b")


def time_of(time_ns: int) -> Any:
    return SimpleNamespace(sec=time_ns // NS_PER_S, nanosec=time_ns % NS_PER_S)


def trajectory(points: Any, stamp_ns: int = 0, names: tuple[str, ...] = NAMES) -> Any:
    """`points`: (time from start in ns, positions[, velocities])."""
    made = [
        SimpleNamespace(time_from_start=time_of(offset), positions=position, velocities=rest[0] if rest else [])
        for offset, position, *rest in points
    ]
    return SimpleNamespace(header=SimpleNamespace(stamp=time_of(stamp_ns)), joint_names=list(names), points=made)


def test_points_with_velocities_are_the_nodes_own_motion() -> None:
    """Constant acceleration from instant to instant is the cubic through both ends."""
    rng = np.random.default_rng(0)
    time_N = np.arange(6) * 20 * MS + 10 * MS
    velocity_NJ = rng.normal(size=(6, 2))
    step_NJ = (velocity_NJ[1:] + velocity_NJ[:-1]) / 2 * 0.02
    position_NJ = np.concatenate([[[0.3, -0.2]], np.array([0.3, -0.2]) + np.cumsum(step_NJ, axis=0)])
    motion = Motion(NAMES, int(time_N[0]), time_N, position_NJ, velocity_NJ)
    commands = Commands(("b", "a"))  # the dataset's order
    commands.add(trajectory(list(zip(time_N.tolist(), position_NJ, velocity_NJ, strict=True))), TRAJECTORY, 5 * MS)
    for time_ns in range(15 * MS, 130 * MS, 3 * MS):
        position_J = commands.at(time_ns)
        assert position_J is not None
        np.testing.assert_allclose(position_J, motion.at(time_ns - 5 * MS)[0][::-1], atol=1e-12)


def test_a_trajectory_takes_over_from_where_the_one_before_it_was() -> None:
    commands = Commands(NAMES)
    assert commands.at(0) is None
    commands.add(trajectory([(100 * MS, [1.0, 0.0]), (200 * MS, [2.0, 0.0])]), TRAJECTORY, NS_PER_S)
    assert commands.at(NS_PER_S + 50 * MS) is None, "nobody knows from where it goes to its first point"
    commands.add(trajectory([(50 * MS, [3.0, 8.0])]), TRAJECTORY, NS_PER_S + 150 * MS)
    for since_ms, expected in ((100, 1.0), (149, 1.49), (150, 1.5), (175, 2.25), (200, 3.0), (900, 3.0)):
        position_J = commands.at(NS_PER_S + since_ms * MS)
        assert position_J is not None and position_J[0] == pytest.approx(expected)


def test_a_stamped_trajectory_is_in_force_from_its_stamp_on() -> None:
    commands = Commands(NAMES)
    commands.add(trajectory([(0, [1.0, 1.0])], stamp_ns=NS_PER_S), TRAJECTORY, NS_PER_S // 2)
    commands.add(trajectory([(0, [5.0, 5.0])], stamp_ns=2 * NS_PER_S), TRAJECTORY, NS_PER_S + 1)
    assert commands.at(NS_PER_S - 1) is None
    assert [commands.at(t)[0] for t in (NS_PER_S, 2 * NS_PER_S - 1, 2 * NS_PER_S)] == [1.0, 1.0, 5.0]  # type: ignore[index]


def test_single_positions_are_in_force_from_their_arrival_on() -> None:
    commands = Commands(NAMES)
    for k in range(3):
        commands.add(SimpleNamespace(data=[float(k), -1.0]), POSITIONS, k * 20 * MS + 1)
    assert [commands.at(k * 10 * MS + 1)[0] for k in range(6)] == [0, 0, 1, 1, 2, 2]  # type: ignore[index]


@pytest.mark.parametrize(
    ("message", "kind", "expected"),
    [
        (trajectory([(0, [1.0])], names=("a",)), TRAJECTORY, "expected points for joints a, b, got b missing"),
        (trajectory([]), TRAJECTORY, "got no points"),
        (trajectory([(0, [1.0, 2.0, 3.0])]), TRAJECTORY, r"expected 2 positions in every point, got \[3\]"),
        (trajectory([(5, [1.0, 2.0]), (5, [1.0, 2.0])]), TRAJECTORY, "rising times"),
        (SimpleNamespace(data=[1.0]), POSITIONS, "expected 2 positions, got 1"),
        (SimpleNamespace(), "geometry_msgs/msg/Twist", "got geometry_msgs/msg/Twist"),
    ],
)
def test_commands_that_do_not_say_where_all_joints_go_are_refused(message: Any, kind: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        Commands(NAMES).add(message, kind, 0)


def test_readings_say_nothing_about_gaps_and_what_lies_outside() -> None:
    readings = Readings(("b",), max_gap_ns=100 * MS)
    for time_ms, value in ((100, 1.0), (150, 2.0), (150, 9.0), (120, 9.0), (300, 3.0)):
        readings.add(JointReading(time_ms * MS, NAMES, np.array([0.0, value])))
    found = [readings.at(time_ms * MS) for time_ms in (99, 100, 125, 150, 200, 300, 301)]
    assert [None if x is None else float(x[0]) for x in found] == [None, 1.0, 1.5, 2.0, None, 3.0, None]
    assert readings.known(300 * MS, 300 * MS) and not readings.known(301 * MS, 400 * MS)
    assert readings.known(301 * MS, 402 * MS), "nothing will come of it any more"
