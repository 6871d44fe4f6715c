"""A robot file with a URDF beside it: limits filled in, the tighter one counts, faults named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.robot import Robot, read_robot

URDF = """<robot name="r">
  <joint name="lift" type="prismatic"><limit lower="0" upper="0.5" velocity="0.2" effort="1"/></joint>
  <joint name="elbow" type="revolute">
    <limit lower="-2" upper="2" velocity="1.5" effort="1"/>
    <safety_controller soft_lower_limit="-1.8" soft_upper_limit="2.5" k_velocity="1"/>
  </joint>
  <joint name="roll" type="continuous"><limit velocity="3" effort="1"/></joint>
</robot>"""


def write(folder: Path, *actions: dict[str, Any], urdf: str = "r.urdf") -> Path:
    (folder / "r.urdf").write_text(URDF)
    actions = tuple({"kind": "joint_position", "unit": "rad", "output": "arm"} | action for action in actions)
    fields = {
        "name": "r",
        "urdf": urdf,
        "cameras": [{"name": "scene"}],
        "state": [{"name": "elbow", "kind": "joint_position", "unit": "rad"}],
        "actions": list(actions),
        "outputs": [{"name": "arm", "topic": "arm/command"}],
        "action_period_s": 0.1,
        "horizon": 8,
    }
    path = folder / "robot.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def test_limits_that_are_left_out_come_from_the_urdf(tmp_path: Path) -> None:
    lift = {"name": "height", "joint": "lift", "unit": "m"}
    robot = read_robot(write(tmp_path, {"name": "elbow"}, {"name": "roll"}, lift))
    elbow, roll, height = robot.axes
    assert (elbow.lower, elbow.upper, elbow.max_velocity) == (-1.8, 2.0, 1.5), "hard and soft, the tighter counts"
    assert roll.continuous and (roll.lower, roll.max_velocity) == (-float("inf"), 3.0)
    assert (height.lower, height.upper, height.max_velocity) == (0.0, 0.5, 0.2)
    assert robot.urdf is None and Robot.model_validate_json(robot.model_dump_json()) == robot, "a bundle stands alone"


def test_the_tighter_of_file_and_urdf_counts(tmp_path: Path) -> None:
    robot = read_robot(write(tmp_path, {"name": "elbow", "lower": -3.0, "upper": 1.0, "max_velocity": 9.0}))
    assert (robot.axes[0].lower, robot.axes[0].upper, robot.axes[0].max_velocity) == (-1.8, 1.0, 1.5)


@pytest.mark.parametrize(
    ("action", "urdf", "fault"),
    [
        ({"name": "elbow"}, "nowhere.urdf", r"urdf: .*nowhere\.urdf cannot be read \(No such file"),
        (
            {"name": "wrist"},
            "r.urdf",
            r"urdf .*r\.urdf: expected joints wrist, got lift, elbow, roll; is it this",
        ),
        (
            {"name": "elbow", "lower": 1.9, "upper": 1.0},
            "r.urdf",
            r"'elbow': expected lower < upper, got 1\.9 and",
        ),
        ({"name": "elbow", "lower": "low"}, "r.urdf", r"actions\.0\.lower: .*got 'low'"),
    ],
)
def test_faults_name_the_urdf_or_the_line(tmp_path: Path, action: dict[str, Any], urdf: str, fault: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"robot file .*robot\.yaml: .*{fault}"):
        read_robot(write(tmp_path, action, urdf=urdf))


def test_a_bundle_cannot_name_a_urdf(tmp_path: Path) -> None:
    robot = read_robot(write(tmp_path, {"name": "elbow"}))
    with pytest.raises(ValueError, match="urdf: expected in a robot file only"):
        Robot.model_validate(robot.model_dump() | {"urdf": "/etc/passwd"})
