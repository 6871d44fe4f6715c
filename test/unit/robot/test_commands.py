"""CommandSpace: actions of every kind to paths of axes and back, against slow references."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.kinds import PARTS, draw_robot

from ki_vla_ros.robot import CommandSpace, Robot, rotations

Array = NDArray[np.float64]
PERIOD_S = 0.05


def shuffled(robot: Robot, rng: random.Random) -> Robot:
    """The same with state and actions in any order."""
    parts = {"state": list(robot.state), "actions": list(robot.actions)}
    for part in parts.values():
        rng.shuffle(part)
    return Robot.model_validate({name: getattr(robot, name) for name in Robot.model_fields} | parts)


def matrix(quaternion: Array) -> Array:
    """A rotation's matrix, column by column."""
    return np.stack([rotations.rotate(quaternion, axis) for axis in np.eye(3)], axis=1)


def signals_of(robot: Robot, rng: np.random.Generator) -> Array:
    signal_M = np.array([rng.uniform(max(s.lower, -1.0), min(s.upper, 1.0)) for s in robot.signals])
    for pose in CommandSpace(robot).poses:
        signal_M[pose.signals][3:] = rotations.from_vector(rng.normal(0.0, 1.0, 3))
    return signal_M


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_actions_come_back_from_their_path(seed: int) -> None:
    """But for binary grippers, which round, and rotations of more than can be counted."""
    rng = np.random.default_rng(seed)
    draw = random.Random(seed)
    robot = draw_robot(draw, tuple(draw.sample([part for part in PARTS if part not in ("binary", "hand")], 3)))
    space, signal_M = CommandSpace(robot), signals_of(robot, rng)
    space.count_from(np.nan_to_num(space.measured(signal_M)))
    measured_J = space.measured(signal_M)
    action_HD = rng.uniform(-0.05, 0.05, (6, len(robot.actions)))
    for d, action in enumerate(robot.actions):
        if action.kind == "pose" and action.component in ("qx", "qy", "qz", "qw", "r1", "r2", "r3", "r4", "r5", "r6"):
            near = rotations.multiply(space.reference_P4[0], rotations.from_vector(rng.normal(0.0, 0.3, 3)))
            near = near if near[3] >= 0 else -near
            values = near if str(action.component).startswith("q") else rotations.to_6d(near)
            parts = ("qx", "qy", "qz", "qw") if str(action.component).startswith("q") else ()
            index = parts.index(str(action.component)) if parts else int(str(action.component)[1]) - 1
            if index == 0:
                width = len(values)
                action_HD[:, d : d + width] = values
    position_HJ, velocity_HJ = space.path(action_HD, measured_J, None, PERIOD_S)
    assert np.isfinite(position_HJ).all() and np.isfinite(velocity_HJ).all()
    again_HD = space.actions(position_HJ, velocity_HJ, measured_J)
    wound = [action.continuous for action in robot.actions]
    np.testing.assert_allclose(again_HD[:, ~np.array(wound)], action_HD[:, ~np.array(wound)], atol=1e-9)


def one_pose(kind: str, rotation: tuple[str, ...], **output: Any) -> Robot:
    source = {"topic": "tool", "type": "geometry_msgs/msg/PoseStamped"}
    box = {"x": [-9, 9], "y": [-9, 9], "z": [-9, 9]}
    speeds = {"max_linear_velocity": 1.0, "max_angular_velocity": 1.0}
    parts = ("x", "y", "z", *rotation)
    return Robot.model_validate(
        {
            "name": "tool",
            "cameras": [{"name": "scene"}],
            "state": [{"name": f"s_{part}", "kind": "pose", "component": part, "source": source} for part in parts],
            "actions": [{"name": f"a_{part}", "kind": kind, "component": part, "output": "tool"} for part in parts],
            "outputs": [
                {"name": "tool", "topic": "target", "type": "geometry_msgs/msg/PoseStamped", "workspace": box}
                | speeds
                | output
            ],
            "action_period_s": PERIOD_S,
            "horizon": 8,
        }
    )


@pytest.mark.parametrize("frame", ["base", "tool"])
@pytest.mark.parametrize("counted_from", ["previous", "observation"])
def test_steps_of_a_tool_add_up_as_matrices_do(frame: str, counted_from: str) -> None:
    rng = np.random.default_rng(3)
    robot = one_pose("pose_delta", ("rx", "ry", "rz"), delta_frame=frame, delta_from=counted_from)
    space, signal_M = CommandSpace(robot), signals_of(robot, rng)
    space.count_from(space.measured(signal_M))
    action_HD = rng.uniform(-0.1, 0.1, (8, 6))
    position_HJ, _ = space.path(action_HD, space.measured(signal_M), None, PERIOD_S)
    turned_H4 = space.quaternions(space.poses[0], position_HJ, space.reference_P4)
    begin = place, turn = signal_M[:3], matrix(signal_M[3:])
    for k, step in enumerate(action_HD):
        if counted_from == "observation":
            place, turn = begin
        by = matrix(rotations.from_vector(step[3:]))
        place, turn = (place + turn @ step[:3], turn @ by) if frame == "tool" else (place + step[:3], by @ turn)
        np.testing.assert_allclose(position_HJ[k, :3], place, atol=1e-12)
        np.testing.assert_allclose(matrix(turned_H4[k]), turn, atol=1e-12)


@pytest.mark.parametrize(
    "rotation", [("rx", "ry", "rz"), ("qx", "qy", "qz", "qw"), tuple(f"r{i}" for i in range(1, 7))]
)
def test_a_pose_is_read_and_written_in_each_form(rotation: tuple[str, ...]) -> None:
    rng = np.random.default_rng(5)
    robot = one_pose("pose", rotation)
    space = CommandSpace(robot)
    for _ in range(50):
        signal_M = signals_of(robot, rng)
        state_S = space.state(signal_M)
        assert len(state_S) == 3 + len(rotation) and np.array_equal(state_S[:3], signal_M[:3])
        space.count_from(space.measured(signal_M))
        position_HJ, _ = space.path(state_S[None], space.measured(signal_M), None, PERIOD_S)
        np.testing.assert_allclose(position_HJ[0, 3:], 0.0, atol=1e-7)
        turned = space.quaternions(space.poses[0], position_HJ, space.reference_P4)[0]
        np.testing.assert_allclose(matrix(turned), matrix(signal_M[3:]), atol=1e-7)


def test_an_action_that_says_no_orientation_is_refused() -> None:
    for rotation in (("qx", "qy", "qz", "qw"), tuple(f"r{i}" for i in range(1, 7))):
        robot = one_pose("pose", rotation)
        with pytest.raises(ValueError, match=r"expected a quaternion|expected two columns of a rotation"):
            CommandSpace(robot).path(np.zeros((2, 3 + len(rotation))), np.zeros(6), None, PERIOD_S)


def test_rotations_keep_their_place_when_they_are_counted_anew() -> None:
    robot = one_pose("pose", ("rx", "ry", "rz"))
    space = CommandSpace(robot)
    position_J = np.array([0.1, 0.2, 0.3, 1.2, -0.4, 0.5])
    before = space.quaternions(space.poses[0], position_J[None], space.reference_P4)
    again_J = space.count_from(position_J)
    assert np.array_equal(again_J, [0.1, 0.2, 0.3, 0.0, 0.0, 0.0]) and not space.worn(again_J)
    after = space.quaternions(space.poses[0], again_J[None], space.reference_P4)
    np.testing.assert_allclose(matrix(after[0]), matrix(before[0]), atol=1e-12)
    assert space.worn(position_J) and not space.beyond(position_J) and space.beyond(position_J * 2)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_order_of_a_file_changes_nothing_but_the_order(seed: int) -> None:
    rng, draw = np.random.default_rng(seed), random.Random(seed)
    one = draw_robot(draw, tuple(draw.sample(PARTS, 3)))
    other = shuffled(one, draw)
    spaces, signal = (CommandSpace(one), CommandSpace(other)), signals_of(one, rng)
    keys = [s.key for s in one.signals]
    signals = signal, signal[[keys.index(s.key) for s in other.signals]]
    order_S = [[d.name for d in one.state].index(d.name) for d in other.state]
    order_D = [[d.name for d in one.actions].index(d.name) for d in other.actions]
    order_J = [list(one.axis_names).index(name) for name in other.axis_names]
    np.testing.assert_array_equal(spaces[0].state(signals[0])[order_S], spaces[1].state(signals[1]))
    action_HD = rng.uniform(-0.5, 0.5, (4, len(one.actions)))
    measured = [space.measured(given) for space, given in zip(spaces, signals, strict=True)]
    np.testing.assert_allclose(measured[0][order_J], measured[1])
    paths = (
        spaces[0].path(action_HD, measured[0], None, PERIOD_S),
        spaces[1].path(action_HD[:, order_D], measured[1], None, PERIOD_S),
    )
    for ours, theirs in zip(*paths, strict=True):
        np.testing.assert_allclose(ours[:, order_J], theirs)


def gripper(**values: Any) -> Robot:
    ends = {"open": 0.04, "closed": 0.0}
    dimension = {"name": "g", "kind": "gripper", "unit": "m", **ends}
    return Robot.model_validate(
        {
            "name": "hand",
            "cameras": [{"name": "scene"}],
            "state": [dimension | values.get("state", {})],
            "actions": [dimension | {"output": "hand", "max_velocity": 0.1} | values.get("action", {})],
            "outputs": [{"name": "hand", "topic": "hand/command"}],
            "action_period_s": PERIOD_S,
            "horizon": 8,
        }
    )


def test_a_binary_gripper_switches_only_beyond_its_hysteresis() -> None:
    space = CommandSpace(gripper(action={"binary": True, "threshold": 0.5, "hysteresis": 0.4}))
    share = [0.6, 0.65, 0.75, 0.4, 0.31, 0.29, 0.5, 0.69]
    path_HJ, velocity_HJ = space.path(0.04 * np.array(share)[:, None], np.array([0.0]), None, PERIOD_S)
    assert path_HJ[:, 0].tolist() == [0.0, 0.0, 0.04, 0.04, 0.04, 0.0, 0.0, 0.0] and not velocity_HJ.any()
    opened_HJ, _ = space.path(np.array([[0.02]]), np.array([0.04]), None, PERIOD_S)
    assert opened_HJ[0, 0] == 0.04, "between the two it stays as it is"


def test_grippers_in_two_units_measure_each_other_by_their_ends() -> None:
    """A Robotiq's joint goes from 0 rad (open) to 0.8; its command is an opening in m."""
    space = CommandSpace(gripper(state={"unit": "rad", "open": 0.0, "closed": 0.8}))
    for joint_rad, opening_m in ((0.0, 0.04), (0.8, 0.0), (0.2, 0.03)):
        assert space.measured(np.array([joint_rad]))[0] == pytest.approx(opening_m)


def test_velocities_add_up_to_where_they_lead() -> None:
    robot = draw_robot(random.Random(0), ("free_velocity",))
    space = CommandSpace(robot)
    assert space.velocity_J.all() and np.isnan(space.measured(np.zeros(len(robot.signals)))).all()
    action_HD = np.array([[0.2, -0.4], [0.4, -0.4], [0.0, 0.0]])
    position_HJ, velocity_HJ = space.path(action_HD, np.full(2, np.nan), np.array([1.0, 2.0]), PERIOD_S)
    np.testing.assert_array_equal(velocity_HJ, action_HD)
    np.testing.assert_allclose(position_HJ[:, 0], PERIOD_S * np.array([0.2, 0.5, 0.7]))
    np.testing.assert_allclose(space.actions(position_HJ, velocity_HJ, np.full(2, np.nan)), action_HD)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_rotations_agree_with_their_matrices(seed: int) -> None:
    rng = np.random.default_rng(seed)
    one, other = (rotations.from_vector(rng.normal(0.0, 2.0, 3)) for _ in range(2))
    np.testing.assert_allclose(matrix(rotations.multiply(one, other)), matrix(one) @ matrix(other), atol=1e-12)
    np.testing.assert_allclose(matrix(rotations.inverse(one)), matrix(one).T, atol=1e-12)
    for way, back in ((rotations.to_vector, rotations.from_vector), (rotations.to_6d, rotations.from_6d)):
        np.testing.assert_allclose(matrix(back(way(one))), matrix(one), atol=1e-9)
    assert np.linalg.norm(rotations.to_vector(one)) <= np.pi + 1e-12
    turn = rng.uniform(0.0, np.pi - 1e-3) * np.array([0.6, 0.0, -0.8])
    np.testing.assert_allclose(rotations.to_vector(rotations.from_vector(turn)), turn, atol=1e-12)
