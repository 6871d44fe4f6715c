"""What a robot with several outputs was told, by the messages on all of its topics."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.bundles import mixed_robot

from ki_vla_ros.errors import InputError
from ki_vla_ros.records import NS_PER_S
from ki_vla_ros.robot.commands import CommandSpace
from ki_vla_ros.robot.robot import Robot
from ki_vla_ros.robot.rotations import from_vector
from ki_vla_ros.runtime.paths import CommandedAxes

ROBOT = Robot.model_validate(mixed_robot())
SHOULDER, ELBOW, GRIPPER, SLIDE, FORWARD, TURN = range(6)
TOOL = slice(6, 12)


def s(seconds: float) -> int:
    return round(seconds * NS_PER_S)


def trajectory(joints: list[str], positions: list[float]) -> Any:
    zero = SimpleNamespace(sec=0, nanosec=0)
    point = SimpleNamespace(
        positions=positions,
        velocities=[],
        accelerations=[],
        effort=[],
        time_from_start=SimpleNamespace(sec=1, nanosec=0),
    )
    return SimpleNamespace(header=SimpleNamespace(stamp=zero), joint_names=joints, points=[point])


def array(*values: float) -> Any:
    return SimpleNamespace(data=list(values))


def vector(x: float = 0.0, y: float = 0.0, z: float = 0.0) -> Any:
    return SimpleNamespace(x=x, y=y, z=z)


def twist(vx: float, wz: float) -> Any:
    return SimpleNamespace(linear=vector(vx, 9.0, 9.0), angular=vector(9.0, 9.0, wz))


def pose(x: float, y: float, z: float, quaternion: Any) -> Any:
    turned = SimpleNamespace(**dict(zip(("x", "y", "z", "w"), map(float, quaternion), strict=True)))
    return SimpleNamespace(pose=SimpleNamespace(position=vector(x, y, z), orientation=turned))


def at(axes: CommandedAxes, *seconds: float) -> Any:
    return axes.at(np.array([s(second) for second in seconds]))


def test_each_output_moves_its_own_axes() -> None:
    axes = CommandedAxes(ROBOT)
    assert np.isnan(at(axes, 1.0)).all()
    axes.take("arm", trajectory(["elbow", "shoulder"], [0.5, -0.5]), s(1.0))
    assert np.isnan(at(axes, 3.0)[0, GRIPPER:]).all()
    axes.take("hand", trajectory(["gripper"], [0.03]), s(1.0))
    axes.take("tool", pose(0.1, 0.2, 0.3, from_vector(np.array([0.0, 0.0, 0.4]))), s(1.5))
    np.testing.assert_allclose(at(axes, 3.0)[0, :SLIDE], [-0.5, 0.5, 0.03])
    assert np.isnan(at(axes, 1.4)[0, TOOL]).all()
    np.testing.assert_allclose(at(axes, 1.5, 9.0)[:, TOOL], [[0.1, 0.2, 0.3, 0.0, 0.0, 0.4]] * 2)
    axes.clear()
    assert np.isnan(at(axes, 9.0)).all()


def in_degrees() -> Robot:
    """The arm takes degrees, counted the other way round at the elbow; the hand mm; the slide mm/s."""
    fields = mixed_robot()
    writings = {"shoulder": {"unit": "deg"}, "elbow": {"unit": "deg", "sign": -1, "offset": 0.5}}
    writings |= {"gripper": {"unit": "mm"}, "slide": {"unit": "mm/s"}}
    for action in fields["actions"]:
        action |= {"command": writings[action["name"]]} if action["name"] in writings else {}
    return Robot.model_validate(fields)


def test_commands_in_other_units_mean_the_robots_own() -> None:
    axes = CommandedAxes(in_degrees())
    axes.take("arm", trajectory(["shoulder", "elbow"], [90.0, 90.0]), s(1.0), np.zeros(12))
    axes.take("hand", trajectory(["gripper"], [30.0]), s(1.0))
    axes.take("slide", array(200.0), s(1.0))
    np.testing.assert_allclose(at(axes, 3.0)[0, :SLIDE], [np.pi / 2, 0.5 - np.pi / 2, 0.03])
    # Halfway from where it was, in the straight line that the controller makes of positions alone.
    np.testing.assert_allclose(at(axes, 1.0, 1.5)[:, SHOULDER], [0.0, np.pi / 4], atol=1e-12)
    np.testing.assert_allclose(axes.velocities(np.array([s(1.5)]))[0, SLIDE], 0.2)


def test_a_writing_that_no_velocity_or_pose_can_have_is_refused() -> None:
    fields = mixed_robot()
    for name, writing, fault in (
        ("slide", {"offset": 0.1}, r"'slide': command: expected no offset for a velocity, got 0\.1"),
        ("tool.x", {"scale": 2.0}, r"'tool\.x': command: expected none for pose_delta"),
        ("shoulder", {"unit": "mm"}, r"'shoulder': command: unit: expected one for rad, got mm"),
    ):
        actions = [a | ({"command": writing} if a["name"] == name else {}) for a in fields["actions"]]
        with pytest.raises(ValueError, match=fault):
            Robot.model_validate(fields | {"actions": actions})


def test_the_path_of_a_velocity_is_where_it_has_led_to() -> None:
    axes = CommandedAxes(ROBOT)
    axes.take("slide", array(0.5), s(1.0))
    axes.take("slide", array(-0.25), s(3.0))
    axes.take("base", SimpleNamespace(twist=twist(0.5, -0.1)), s(1.0))
    np.testing.assert_allclose(at(axes, 1.0, 2.0, 3.0, 5.0)[:, SLIDE], [0.0, 0.5, 1.0, 0.5])
    np.testing.assert_allclose(at(axes, 3.0)[0, [FORWARD, TURN]], [1.0, -0.2])
    velocity_NJ = axes.velocities(np.array([s(2.0), s(4.0)]))
    np.testing.assert_allclose(velocity_NJ[:, SLIDE], [0.5, -0.25])
    np.testing.assert_allclose(velocity_NJ[:, [FORWARD, TURN]], [[0.5, -0.1]] * 2)
    axes.take("base", twist(0.0, 0.0), s(4.0))  # without a stamp it is the same
    axes.forget(s(4.5))
    np.testing.assert_allclose(at(axes, 9.0)[0, [SLIDE, FORWARD]], [-0.5, 1.5])


def test_of_a_velocity_only_counts_what_it_led_to_and_a_rotation_is_counted_as_the_other_ones_is() -> None:
    space = CommandSpace(ROBOT)
    told_NJ, near_NJ = np.zeros((2, 12)), np.zeros((2, 12))
    told_NJ[:, SLIDE], near_NJ[:, SLIDE] = [5.0, 5.5], [0.1, 0.4]
    told_NJ[:, 11] = 0.3
    counted_P4 = from_vector(np.array([[0.0, 0.0, 0.2]]))
    found_NJ = space.nearest(told_NJ, near_NJ, counted_P4)
    np.testing.assert_allclose(found_NJ[:, SLIDE], [0.1, 0.6])
    np.testing.assert_allclose(found_NJ[:, 11], 0.1)


@pytest.mark.parametrize(
    ("output", "message", "fault"),
    [
        ("slide", array(1.0, 2.0), "output 'slide': command: expected 1 numbers, got 2"),
        ("slide", array(float("nan")), "output 'slide': command: expected finite numbers, got .nan"),
        ("tool", pose(0, 0, 0, (0, 0, 0, 0)), "output 'tool': command: orientation: expected a quaternion"),
        ("arm", trajectory(["elbow"], [0.0]), "output 'arm': command: trajectory refused: .*missing .'shoulder'"),
        ("base", trajectory(["elbow"], [0.0]), "output 'base': expected geometry_msgs/msg/TwistStamped, got "),
        ("arm", twist(0.0, 0.0), "output 'arm': expected trajectory_msgs/msg/JointTrajectory, got "),
    ],
)
def test_what_does_not_fit_its_output_is_refused(output: str, message: Any, fault: str) -> None:
    with pytest.raises(InputError, match=fault):
        CommandedAxes(ROBOT).take(output, message, s(1.0))
