"""The robot that a policy was trained for, and the one here: what may differ, and what is refused with both values."""

from __future__ import annotations

from typing import Any

import pytest
from support.bundles import demo_policy

from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.robot import Robot, check_agreement, disagreements, find_robot, read_robot

FIELDS = read_robot(find_robot("imported_arm")).model_dump()


def changed(part: str, number: int, **values: Any) -> Robot:
    parts = [dict(each) for each in FIELDS[part]]
    parts[number] |= values
    return Robot.model_validate(FIELDS | {part: parts})


TRAINED = Robot.model_validate(FIELDS)


@pytest.mark.parametrize(
    "here",
    [
        changed("outputs", 0, topic="other/topic", type="trajectory_msgs/msg/JointTrajectory"),
        changed("cameras", 0, topic="front/image", transport="compressed"),
        changed("state", 1, source={"topic": "left/joint_states", "joint": "left_joint2"}),
        changed("actions", 0, lower=-1.0, upper=1.0, max_velocity=0.5, joint="left_joint1"),
        changed("actions", 0, dataset={"unit": "deg"}),
    ],
)
def test_what_is_this_robots_own_affair_may_differ(here: Robot) -> None:
    assert list(disagreements(TRAINED, here)) == []
    check_agreement(TRAINED, here)


@pytest.mark.parametrize(
    ("here", "fault"),
    [
        (changed("cameras", 0, name="front"), r"cameras\.0\.name: base in the bundle, front in the robot file"),
        (changed("cameras", 0, optional=True), r"cameras\.0\.optional: False in the bundle, True in the robot file"),
        (changed("state", 2, name="elbow"), r"state\.2\.name: joint3 in the bundle, elbow in the robot file"),
        (changed("state", 6, open=0.0, closed=0.08), r"state\.6\.open: 0\.08 in the bundle, 0\.0 in the robot file"),
        (changed("actions", 3, relative=False), r"actions\.3\.relative: True in the bundle, False in the robot file"),
        (
            changed("actions", 1, upper=2.5),
            r"actions\.1\.upper: 1\.8 in the bundle, 2\.5 in the robot file, which is wider",
        ),
        (changed("actions", 1, max_velocity=3.0), r"actions\.1\.max_velocity: 1 in the bundle, 3 in the robot file"),
        (Robot.model_validate(FIELDS | {"horizon": 8}), r"horizon: 50 in the bundle, 8 in the robot file"),
        (demo_policy().robot, r"cameras: 3 \(base, left_wrist, right_wrist\) in the bundle, 2 \("),
    ],
)
def test_what_the_numbers_mean_must_be_the_same(here: Robot, fault: str) -> None:
    with pytest.raises(ConfigurationError, match=fault):
        check_agreement(TRAINED, here)
