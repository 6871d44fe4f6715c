"""The robot file: read by name or path, its faults named, and the demo's arm the same in bundle and simulator."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from support import ROOT
from support.bundles import mixed_robot

from ki_vla_ros.bundle.folder import load_bundle
from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.robot.robot import Robot, find_robot, read_robot
from ki_vla_ros.sim.world import World

EXAMPLE = find_robot("imported_arm")


def test_the_demo_arm_agrees_with_the_shipped_bundle() -> None:
    robot, manifest = read_robot(find_robot("demo_arm")), load_bundle(ROOT / "models/demo").manifest
    for field in ("cameras", "axes", "signals", "horizon", "action_period_s"):
        assert getattr(robot, field) == getattr(manifest.robot, field), field


def test_the_demo_arm_agrees_with_the_simulator() -> None:
    robot, world = read_robot(find_robot("demo_arm")), World(render=False)
    assert robot.axis_names == world.joints
    np.testing.assert_array_equal([joint.lower for joint in robot.axes], world.lower_J)
    np.testing.assert_array_equal([joint.upper for joint in robot.axes], world.upper_J)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {1: {"topic": "arm/joint_trajectory"}},
            "outputs: 'hand': topic: expected another than that of 'arm', got .*let all name one output",
        ),
        (
            {4: {"workspace": None, "max_linear_velocity": None}},
            "outputs: 'tool': workspace, max_linear_velocity: expected them for a pose, got none",
        ),
        (
            {4: {"topic": "tool_pose"}},
            "outputs: 'tool': topic: expected another than that which says",
        ),
    ],
)
def test_each_output_has_a_topic_of_its_own_on_which_nobody_says_where_the_robot_is(
    changes: dict[int, dict[str, str]], fault: str
) -> None:
    fields = mixed_robot()
    for number, change in changes.items():
        fields["outputs"][number] |= change
    with pytest.raises(ValueError, match=fault):
        Robot.model_validate(fields)


def test_a_robot_is_found_by_name_or_by_path(tmp_path: Path) -> None:
    assert EXAMPLE == ROOT / "config/robots/imported_arm.yaml"
    path = tmp_path / "mine.yaml"
    path.write_text(EXAMPLE.read_text())
    assert find_robot(str(path)) == path and read_robot(path) == read_robot(EXAMPLE)
    with pytest.raises(ConfigurationError, match=r"robot 'nobody': expected the path of a robot file, or one of aloha"):
        find_robot("nobody")


JOINT = {"name": "a", "kind": "joint_position", "unit": "rad"}
ACTION = JOINT | {"lower": -1.0, "upper": 1.0, "max_velocity": 1.0, "output": "arm"}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"horizon": 1}, r"horizon: expected >= 2, got 1"),
        (
            {"action_period_s": 0},
            r"action_period_s: expected >= 0.001, got 0 .time between two .* 1 / frames per second",
        ),
        ({"gripper": "left"}, r"gripper: expected one of name, .*, got 'left' for gripper: no such key"),
        ({"actions": []}, r"actions: expected at least 1 item"),
        ({"actions": [ACTION, ACTION]}, r"line \d+: actions: 'a': expected distinct names, got it 2 times"),
        ({"actions": [ACTION | {"max_vel": 1.0}]}, r"actions\.0\.max_vel: .*no such key .did you mean 'max_velocity'"),
        ({"actions": [ACTION | {"kind:gripper": None}]}, r"write 'kind: gripper', with a space after the colon"),
        ({"actions": [{**ACTION, "kind": "joint_positon"}]}, r"actions\.0\.kind: .*did you mean 'joint_position'"),
        ({"horizon": "x"}, r"horizon: expected an integer, got 'x'"),
        ({"actions": [ACTION | {"upper": -1.0}]}, r"actions\.0: 'a': expected lower < upper, got -1\.0 and -1\.0"),
        ({"state": [JOINT | {"unit": "m/s"}]}, r"state\.0: 'a': unit: expected rad or m for joint_position, got m/s"),
        ({"cameras": [{"name": "a", "optional": True}]}, r"cameras: expected at least one required camera"),
    ],
)
def test_faults_name_file_key_and_value(tmp_path: Path, changes: dict[str, object], fault: str) -> None:
    path = tmp_path / "robot.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(EXAMPLE.read_text()) | changes))
    with pytest.raises(ConfigurationError, match=rf"robot file {path}: .*{fault}.*config/robots/ has examples"):
        read_robot(path)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "robot.yaml"
    with pytest.raises(ConfigurationError, match=r"expected a YAML file, got one that cannot be read \(No such file"):
        read_robot(path)
    for text in ("a: [", "name: a\nname: b\n"):
        path.write_text(text)
        with pytest.raises(ConfigurationError, match=r"(?s)expected YAML, got something else"):
            read_robot(path)


def test_a_urdf_may_say_that_a_joint_turns_without_end() -> None:
    bundle = load_bundle(ROOT / "models/demo")
    urdf = '<robot><joint name="forearm_roll" type="continuous"/></robot>'
    marked = [joint.name for joint in bundle.on_robot(urdf).manifest.axes if joint.continuous]
    assert marked == ["forearm_roll"] and bundle.on_robot("") is bundle


POSE = {"kind": "pose", "source": {"topic": "pose", "type": "geometry_msgs/msg/PoseStamped"}}
STATE = [POSE | {"name": part, "component": part} for part in ("x", "y", "z", "qx", "qy", "qz", "qw")]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"outputs": [{"name": "arm", "topic": "t", "max_effort": 1.0}]}, "max_effort: expected it only for control"),
        ({"outputs": [{"name": "arm", "topic": "t", "frame_id": "base"}]}, "frame_id: expected it only for poses and"),
        ({"outputs": [{"name": "arm", "topic": "t", "delta_frame": "tool"}]}, "expected them only for steps of a pose"),
        ({"state": [STATE[0] | {"source": POSE["source"] | {"unit": "mm"}}, *STATE[1:]]}, "'x': source: expected only"),
        ({"state": [STATE[0] | {"source": POSE["source"] | {"joint": "a"}}, *STATE[1:]]}, "topic and type for a pose"),
        (
            {"actions": [ACTION | {"kind": "gripper", "open": 1.0, "closed": 0.0, "threshold": 0.3}]},
            "'a': threshold and hysteresis: expected them only with binary: true",
        ),
    ],
)  # fmt: skip
def test_what_would_have_no_effect_is_refused(tmp_path: Path, changes: dict[str, object], fault: str) -> None:
    path = tmp_path / "robot.yaml"
    content = {"state": [JOINT], "actions": [ACTION], "outputs": [{"name": "arm", "topic": "t"}]} | changes
    path.write_text(yaml.safe_dump(yaml.safe_load(EXAMPLE.read_text()) | content))
    with pytest.raises(ConfigurationError, match=fault):
        read_robot(path)
