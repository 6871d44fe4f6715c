"""`robot check`: each planted misfit is found, with the line to change; a file that fits gets no finding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from support import ROOT
from support.bad_bags import change, with_data
from support.sample_bags import JOINT_STATE, TRAJECTORY, Messages, command, joint_state, jpeg, serialize, write_mcap
from support.unknown_arm import ARM, ARM_TOPIC, ARRAY, COMPRESSED, FINGER, FRONT, array, recording, urdf

from ki_vla_ros.messages import BagMessage, decode, typestore
from ki_vla_ros.robot import TWIST
from ki_vla_ros.robot.__main__ import main
from ki_vla_ros.survey import RobotFile, check_dataset, survey_dataset
from ki_vla_ros.survey.tracks import Track, following

Robot = dict[str, Any]
GRIPPER_TOPIC = "/gripper_controller/joint_trajectory"


@pytest.fixture(scope="module")
def proposed(tmp_path_factory: pytest.TempPathFactory) -> Robot:
    folder = tmp_path_factory.mktemp("proposed")
    path, arm = write_mcap(folder / "bag.mcap", recording()), folder / "arm.urdf"
    arm.write_text(urdf())
    out = folder / "robot.yaml"
    assert main(["new", "--from", str(path), "--from", str(arm), "--out", str(out)]) == 0
    robot: Robot = yaml.safe_load(out.read_text())
    return robot


def write(folder: Path, robot: Robot) -> Path:
    """One dimension a line, as people write them."""
    path, lines = folder / "robot.yaml", []
    for key, value in robot.items():
        if isinstance(value, list):
            lines += [f"{key}:", *(f"  - {json.dumps(item)}" for item in value)]
        else:
            lines.append(f"{key}: {json.dumps(value)}")
    path.write_text("\n".join(lines) + "\n")
    return path


def edit(*changes: tuple[str, int, dict[str, Any]], **top: Any) -> Callable[[Robot], Robot]:
    def changed(robot: Robot) -> Robot:
        robot = json.loads(json.dumps(robot)) | top
        for group, number, fields in changes:
            robot[group][number] = robot[group][number] | fields
        return robot

    return changed


def line_with(path: Path, what: str) -> int:
    return next(i for i, line in enumerate(path.read_text().splitlines(), 1) if what in line)


def states(to: Callable[[np.ndarray], np.ndarray]) -> Callable[[Messages], Messages]:
    def changed(_k: int, message: BagMessage) -> BagMessage:
        state = decode(message)
        return with_data(message, joint_state(message.log_ns, to(np.array(state.position)), list(state.name)))

    return change("/joint_states", changed)


def same(messages: Messages) -> Messages:
    return messages


def slower(topic: str, every: int) -> Callable[[Messages], Messages]:
    return change(topic, lambda k, m: m if k % every == 0 else None)


# What is wrong with the file, or with the bag; text of the line that is named, and parts of what is said.
PLANTS: dict[str, tuple[Callable[[Robot], Robot], Callable[[Messages], Messages], str, tuple[str, ...]]] = {
    "camera's topic": (edit(("cameras", 0, {"topic": "/front/image_raw"})), same, "/front/image_raw",
        ("camera front_camera: expected images on /front/image_raw, got no such topic", FRONT)),
    "transport": (edit(), change(FRONT, lambda k, m: with_data(m, jpeg(m.log_ns), type=COMPRESSED)), FRONT,
        ("camera front_camera: expected sensor_msgs/msg/Image", "set transport: compressed")),
    "slow camera": (edit(), slower(FRONT, 4), "action_period_s",
        ("expected an image per action, 20 Hz, got 4", "set action_period_s to 0.2")),
    "joint states elsewhere":
        (edit(("state", 0, {"source": {"topic": "/arm/joint_states"}})), same, "/arm/joint_states",
        ("state iiwa_joint_1: expected sensor_msgs/msg/JointState on /arm/joint_states, got no such topic",)),
    "a joint's name": (edit(("state", 1, {"name": "iiwa_joint_two"})), same, "iiwa_joint_two",
        ("state iiwa_joint_two: expected iiwa_joint_two on /joint_states", "did you mean", "set joint in its source")),
    "a joint without a number": (edit(), states(lambda p: np.append(np.nan, p[1:])), '"iiwa_joint_1"',
        ("state iiwa_joint_1: expected a position of iiwa_joint_1 on /joint_states, got its name without a number",
         "let its driver fill in position, or set topic in its source")),
    "degrees": (edit(), states(np.degrees), '"name": "iiwa_joint_5", "kind": "joint_position", "unit": "rad", "source"',
        ("state iiwa_joint_5: expected -2.96 to 2.96 rad", "would fit as degrees", "set unit: deg in its source")),
    "radians that are said to be degrees":
        (edit(("state", 0, {"source": {"topic": "/joint_states", "unit": "deg"}})), same, '"deg"',
        ("state iiwa_joint_1: expected degrees", "fits as radians", "leave the unit out")),
    "a gripper of 0 to 1": (edit(), change("/gripper/joint_states", lambda k, m: with_data(m, joint_state(m.log_ns,
        np.array([k % 2, 0.0]), (FINGER, "other_finger_joint")))), '"topic": "/gripper/joint_states"',
        (f"state {FINGER}: expected 0 to 0.04 m, got 0 to 1", "set open: 1 and closed: 0 in its source")),
    "a gripper the other way": (edit(), lambda _: recording(mirrored=True), FINGER,
        (f"action {FINGER}: expected the state to follow the commands", "open is closed", "exchange open and closed")),
    "a joint the other way": (edit(), states(lambda p: np.append(-p[0], p[1:])), '"iiwa_joint_1"',
        ("action iiwa_joint_1: expected the state to follow", "it goes the other way")),
    "a gripper that is commanded a little beyond its end": (edit(("state", 7, {"closed": 0.0015}),
        ("actions", 7, {"closed": 0.0015})), same, '"closed": 0.0015, "max_velocity"',
        (f"action {FINGER}: expected 0.0015 to 0.04 m, got ", "correct open and closed, or its limits")),
    "limits that the commands exceed": (edit(("actions", 3, {"lower": 0.0, "upper": 0.4})), same, "0.4",
        ("action iiwa_joint_4: expected 0 to 0.4 rad, got -0.3 to 0.8998 from /arm_controller/joint_trajectory",)),
    "output's topic": (edit(("outputs", 0, {"topic": "/arm/joint_trajectory"})), same, '"/arm/joint_trajectory"',
        ("output arm: expected trajectory_msgs/msg/JointTrajectory on /arm/joint_trajectory, got no such", ARM_TOPIC)),
    "output's type": (edit(("outputs", 1, {"type": "std_msgs/msg/Float64MultiArray"})), same, "Float64MultiArray",
        ("output gripper: expected std_msgs/msg/Float64MultiArray", "got trajectory_msgs/msg/JointTrajectory")),
    "a command's joint": (edit(("actions", 7, {"joint": "finger"})), same, '"gripper", "topic"',
        ("output gripper: expected joints finger", FINGER)),
    "an array's width": (edit(("outputs", 1, {"topic": "/g", "type": "std_msgs/msg/Float64MultiArray"})),
        change(GRIPPER_TOPIC, lambda k, m: BagMessage("/g", ARRAY, m.log_ns, array(np.zeros(2)))),
        '"/g"', ("output gripper: expected 1 values on /g, got 2",)),
    "actions faster than the joint states": (edit(action_period_s=0.01), same, "action_period_s",
        ("expected a value per action, 100 Hz, got 50 Hz on /joint_states",)),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_misfit_is_found(
    name: str, tmp_path: Path, proposed: Robot, capsys: pytest.CaptureFixture[str]
) -> None:
    of_file, of_bag, marked, said = PLANTS[name]
    path = write(tmp_path, of_file(proposed))
    bag = write_mcap(tmp_path / "bag.mcap", of_bag(recording()))
    assert main(["check", str(path), "--bag", str(bag)]) == 1
    out = capsys.readouterr().out
    found = [part for part in out.split(f"{path}:") if part and said[0] in part]
    assert found, out
    assert all(text in found[0] for text in said), out
    assert int(found[0].partition(":")[0]) == line_with(path, marked), out


def test_small_values_outside_the_limits_are_not_called_degrees(
    tmp_path: Path, proposed: Robot, capsys: pytest.CaptureFixture[str]
) -> None:
    """A hundredth of a radian fits any limits as degrees."""
    path = write(tmp_path, edit(("actions", 3, {"lower": 0.0, "upper": 0.4}))(proposed))
    assert main(["check", str(path), "--bag", str(write_mcap(tmp_path / "bag.mcap", recording()))]) == 1
    assert "degrees" not in capsys.readouterr().out


def test_a_file_that_fits_has_no_faults(tmp_path: Path, proposed: Robot, capsys: pytest.CaptureFixture[str]) -> None:
    bag = write_mcap(tmp_path / "bag.mcap", recording())
    (tmp_path / "arm.urdf").write_text(urdf())
    arguments = ["--bag", str(bag), "--urdf", str(tmp_path / "arm.urdf")]
    assert main(["check", str(write(tmp_path, proposed)), *arguments]) == 0
    assert capsys.readouterr().out.endswith("robot.yaml: no faults found\n")


def test_a_compressed_copy_of_a_raw_topic_will_do(tmp_path: Path, proposed: Robot) -> None:
    """The recorder compresses images; conversion and replay take those."""
    path = write(tmp_path, edit(("cameras", 1, {"topic": "/wrist/image_raw", "transport": "raw"}))(proposed))
    assert main(["check", str(path), "--bag", str(write_mcap(tmp_path / "bag.mcap", recording()))]) == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("actions", 0, {"upper": 3.3}), "iiwa_joint_1: expected -2.96 to 2.96, as the URDF says, got -2.96 to 3.3"),
        (("actions", 0, {"max_velocity": 2.5}), "expected max_velocity up to 1.7, as the URDF says, got 2.5"),
        (("actions", 1, {"continuous": True}), "expected continuous: false, as the URDF says, got true"),
        (("actions", 7, {"open": 0.05}), f"action {FINGER}: expected 0 to 0.04, as the URDF says, got 0 to 0.05"),
        (("actions", 2, {"joint": "joint_3"}), "action iiwa_joint_3: expected joint joint_3 in the URDF, got none"),
    ],
)  # fmt: skip
def test_the_urdf_disagrees(
    tmp_path: Path, proposed: Robot, changes: Any, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, edit(changes)(proposed))
    (tmp_path / "arm.urdf").write_text(urdf())
    assert main(["check", str(path), "--urdf", str(tmp_path / "arm.urdf")]) == 1
    assert said in capsys.readouterr().out


def dataset(folder: Path, fps: float = 20, key: str = "front_camera", **figures: Any) -> Path:
    names = [*ARM, FINGER]
    low, high = [-0.5] * 7 + [0.0], [0.5] * 7 + [0.04]
    stats = {"min": low, "max": high, "mean": [0.0] * 7 + [0.035]}
    column = {"dtype": "float32", "shape": [8], "names": names}
    image = {"dtype": "video", "shape": [32, 32, 3]}
    images = {f"observation.images.{key}": image, "observation.images.wrist": image}
    info = {
        "codebase_version": "v3.0",
        "fps": fps,
        "features": {"observation.state": column, "action": column, **images},
    }
    content = {"observation.state": stats, "action": stats}
    for column_key, changes in figures.items():
        content[column_key.replace("_", ".")] = stats | changes
    (folder / "meta").mkdir(parents=True)
    (folder / "meta/info.json").write_text(json.dumps(info))
    (folder / "meta/stats.json").write_text(json.dumps(content))
    return folder


DATASETS: dict[str, tuple[dict[str, Any], Callable[[Robot], Robot], tuple[str, ...]]] = {
    "degrees": ({"action": {"min": [-71.0] * 7 + [0.0], "max": [80.0] * 7 + [0.04]}}, edit(),
        ("actions iiwa_joint_1: expected -2.96 to 2.96 rad", "would fit as degrees", "set unit: deg in its dataset")),
    "a gripper of 0 to 100": ({"observation_state": {"min": [-0.5] * 7 + [2.0], "max": [0.5] * 7 + [99.0]}}, edit(),
        (f"state {FINGER}: expected 0 to 0.04 m, got 2 to 99", "set open: 100 and closed: 0 in its dataset")),
    "a gripper that goes a little beyond its end": ({}, edit(("state", 7, {"closed": 0.0015}),
        ("actions", 7, {"closed": 0.0015})),
        (f"actions {FINGER}: expected 0.0015 to 0.04 m, got 0 to 0.04", "correct open and closed, or its limits")),
    "a gripper the other way": ({"action": {"mean": [0.0] * 7 + [0.006]}}, edit(),
        (f"action {FINGER}: expected it to be open as often as the state", "got 15 %: in one of them open is closed")),
    "frames": ({"fps": 10}, edit(), ("action_period_s: expected 1 / 10 s", "got 0.05 s", "set it to 0.1")),
    "a camera": ({"key": "front"}, edit(), ("camera front_camera: expected images observation.images.front_camera",
        "did you mean", "set its dataset to the key")),
    "a name": ({}, edit(("state", 2, {"dataset": {"name": "joint_3"}})),
        ("state iiwa_joint_3: expected one of the names of observation.state", "got joint_3")),
    "a width": ({}, lambda robot: robot | {"state": [d | {"name": f"a{i}"} for i, d in enumerate(robot["state"][:7])]},
        ("state: expected 7 values in observation.state", "got 8")),
    "a column": ({}, edit(("actions", 0, {"dataset": {"column": "actions"}})),
        ("actions iiwa_joint_1: expected one of observation.state, action, got actions; did you mean 'action'",)),
}  # fmt: skip


@pytest.mark.parametrize("name", DATASETS)
def test_the_dataset_disagrees(name: str, tmp_path: Path, proposed: Robot, capsys: pytest.CaptureFixture[str]) -> None:
    figures, of_file, said = DATASETS[name]
    path = write(tmp_path, of_file(proposed))
    assert main(["check", str(path), "--dataset", str(dataset(tmp_path / "data", **figures))]) == 1
    out = capsys.readouterr().out
    assert all(text in out for text in said), out


def test_a_dataset_that_fits_has_no_faults(tmp_path: Path, proposed: Robot) -> None:
    assert main(["check", str(write(tmp_path, proposed)), "--dataset", str(dataset(tmp_path / "data"))]) == 0


def test_the_columns_of_openpis_converters_are_checked_as_they_are_read(tmp_path: Path, proposed: Robot) -> None:
    path = dataset(tmp_path / "data", observation_state={"min": [-0.5] * 7 + [2.0], "max": [0.5] * 7 + [99.0]})
    for file in ("meta/info.json", "meta/stats.json"):
        text = (path / file).read_text().replace('"observation.state"', '"state"').replace('"action"', '"actions"')
        (path / file).write_text(text)
    robot = RobotFile(write(tmp_path, proposed))
    (misfit,) = check_dataset(robot, survey_dataset(path))
    assert misfit.where == f"state {FINGER}" and "state[7]" in misfit.got


def test_the_bundle_is_of_another_robot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "demo_arm", "--bundle", "demo"]) == 0
    capsys.readouterr()
    text = (ROOT / "config/robots/demo_arm.yaml").read_text()
    path = tmp_path / "robot.yaml"
    path.write_text(
        text.replace("upper: 2.75", "upper: 2.8")
        .replace("upper: 2.4", "upper: 2.3")
        .replace("horizon: 16", "horizon: 8")
    )
    assert main(["check", str(path), "--bundle", "demo"]) == 1
    out = capsys.readouterr().out
    line = line_with(path, "upper: 2.8")
    assert f"{path}:{line}: actions.2.upper: expected 2.75, as bundle demo has it, got 2.8, which is wider" in out
    assert "2.3" not in out  # tighter is this robot's own affair
    assert "horizon: expected 16, as bundle demo has it, got 8" in out


def test_faults_of_the_file_have_their_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "robot.yaml"
    text = (ROOT / "config/robots/demo_arm.yaml").read_text()
    path.write_text(text.replace("upper: 2.75", "upper: high").replace("kind: joint_position, unit: m}", "kind: arm}"))
    assert main(["check", str(path)]) == 1
    out = capsys.readouterr().out
    assert f"{path}:{line_with(path, 'upper: high')}: actions.2.upper: " in out and "got 'high'" in out
    assert f"{path}:{line_with(path, 'kind: arm')}: state.6.kind: " in out


def test_missing_and_unknown_fields_are_plain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, text = tmp_path / "robot.yaml", (ROOT / "config/robots/demo_arm.yaml").read_text()
    path.write_text(text.replace("horizon: 16", "horison: 16"))
    assert main(["check", str(path)]) == 1
    out = capsys.readouterr().out
    assert "horizon: expected horizon, got none" in out
    assert f":{line_with(path, 'horison')}: horison: expected one of name, " in out
    assert "got 16 for horison: no such key\n    -> did you mean 'horizon'?" in out


def test_a_fault_between_two_parts_has_the_line_of_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "robot.yaml"
    text = (ROOT / "config/robots/demo_arm.yaml").read_text()
    path.write_text(text.replace("max_velocity: 0.2, relative: true, output: arm", "max_velocity: 0.2, output: hand"))
    assert main(["check", str(path)]) == 1
    line = line_with(path, "output: hand")
    assert f"{path}:{line}: actions: 'gripper': output: expected one of arm, got hand" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["nowhere.yaml"], "expected a YAML file, got No such file"),
        (["demo_arm", "--bag", "nowhere"], "bag nowhere: no such file or folder"),
        (["demo_arm", "--dataset", "nowhere"], "expected a LeRobot dataset with meta/info.json, got none"),
        (["demo_arm", "--bundle", "nowhere"], "models/nowhere: expected the folder of a bundle, or one of "),
        (["demo_arm", "--urdf", "nowhere"], "nowhere: expected a URDF, got one that cannot be read"),
    ],
)
def test_what_cannot_be_read_is_one_line(arguments: list[str], fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("robot: ") and fault in captured.err and "Traceback" not in captured.err


def test_a_command_in_another_namespace(tmp_path: Path, proposed: Robot) -> None:
    """Topics without a leading slash are in the namespace of the node."""
    robot = edit(("outputs", 0, {"topic": "arm_controller/joint_trajectory"}))(proposed)
    path, bag = write(tmp_path, robot), write_mcap(tmp_path / "bag.mcap", recording())
    assert main(["check", str(path), "--bag", str(bag)]) == 0
    assert main(["check", str(path), "--bag", str(bag), "--node", "/left/policy"]) == 1


def test_a_trajectory_that_says_nothing_is_no_fault_of_the_file(tmp_path: Path, proposed: Robot) -> None:
    messages = change(ARM_TOPIC, lambda k, m: with_data(m, command(np.zeros(0), ())) if k == 0 else m)(recording())
    bag = write_mcap(tmp_path / "bag.mcap", messages)
    assert main(["check", str(write(tmp_path, proposed)), "--bag", str(bag)]) == 0


def test_limits_of_a_urdf_beside_the_file_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "config/robots/demo_arm.yaml").read_text().replace("upper: 2.75, max_velocity: 3.0, ", "")
    (tmp_path / "robot.yaml").write_text(text + "urdf: arm.urdf\n")
    assert main(["check", str(tmp_path / "robot.yaml")]) == 2
    assert "arm.urdf cannot be read" in capsys.readouterr().err
    joint = '<joint name="elbow" type="revolute"><limit lower="-0.2" upper="2.75" velocity="3"/></joint>'
    (tmp_path / "arm.urdf").write_text(f"<robot name='r'>{joint}</robot>")
    assert main(["check", str(tmp_path / "robot.yaml"), "--bundle", "demo"]) == 0


def goals(*, arm: bool, turned: bool, every_s: float) -> Messages:
    """Goals one by one instead of a stream: trajectories of one point, reached in half the time to the next one."""
    names, low, high = (
        (ARM, -0.3 * np.ones(7), 0.5 * np.ones(7)) if arm else ((FINGER,), np.zeros(1), 0.04 * np.ones(1))
    )
    commanded, stated = (ARM_TOPIC, "/joint_states") if arm else (GRIPPER_TOPIC, "/gripper/joint_states")
    found = [m for m in recording(10 * every_s) if m.topic not in (commanded, stated)]
    start = found[0].log_ns

    def told(k: int) -> np.ndarray:
        return (high, low)[k % 2]

    for k in range(10):
        at_ns = start + round(k * every_s * 1e9)
        found.append(BagMessage(commanded, TRAJECTORY, at_ns, command(told(k), names)))
    for i in range(round(10 * every_s * 50)):
        k, since = divmod(i / 50, every_s)
        way = min(1.0, since / (every_s / 2))
        was = told(int(k) - 1) * (1.0 - way) + told(int(k)) * way
        at_ns = start + i * 20_000_000
        seen = low + high - was if turned else was
        found.append(BagMessage(stated, JOINT_STATE, at_ns, joint_state(at_ns, seen, names)))
    return sorted(found, key=lambda message: message.log_ns)


@pytest.mark.slow
@pytest.mark.parametrize("arm", [True, False])
@pytest.mark.parametrize("every_s", [3.0, 5.0])
def test_goals_that_come_one_by_one_are_judged_when_they_were_reached(
    tmp_path: Path, proposed: Robot, arm: bool, every_s: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """At its arrival the state is still where the goal before it was, which is the other way."""
    path = write(tmp_path, proposed)
    right = write_mcap(tmp_path / "right.mcap", goals(arm=arm, turned=False, every_s=every_s))
    assert main(["check", str(path), "--bag", str(right)]) == 0, capsys.readouterr().out
    turned = write_mcap(tmp_path / "turned.mcap", goals(arm=arm, turned=True, every_s=every_s))
    assert main(["check", str(path), "--bag", str(turned)]) == 1
    out = capsys.readouterr().out
    assert out.count("expected the state to follow the commands, got it to go against them") == (7 if arm else 1)
    assert ("it goes the other way" if arm else "open is closed") in out


@pytest.mark.parametrize("lag_s", [0.0, 0.4])
def test_a_state_that_comes_late_does_not_go_the_other_way(lag_s: float) -> None:
    path, state = Track(), Track()
    for k in range(400):
        path.add(k * 20_000_000, float(np.sin(6.0 * k / 50)))
        state.add(k * 20_000_000, float(np.sin(6.0 * (k / 50 - lag_s))))
    fit = following(path, state)
    assert fit is not None and fit > 0.9


@pytest.mark.parametrize(
    ("place", "unit", "said"),
    [
        (
            7,
            "mm",
            f"state {FINGER}: expected values 1000 times as large, got ",
        ),
        (0, "deg", "state iiwa_joint_1: expected degrees, got -0.6 to 0.6"),
    ],
)
def test_a_unit_that_makes_a_state_too_small_is_found(
    tmp_path: Path, proposed: Robot, place: int, unit: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    topic = "/gripper/joint_states" if place == 7 else "/joint_states"
    path = write(tmp_path, edit(("state", place, {"source": {"topic": topic, "unit": unit}}))(proposed))
    assert main(["check", str(path), "--bag", str(write_mcap(tmp_path / "bag.mcap", recording()))]) == 1
    out = capsys.readouterr().out
    assert said in out and "-> leave the unit out of its source" in out, out


def test_a_dataset_that_is_read_too_small_is_found(
    tmp_path: Path, proposed: Robot, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, edit(("state", 7, {"dataset": {"unit": "mm"}}))(proposed))
    assert main(["check", str(path), "--dataset", str(dataset(tmp_path / "data"))]) == 1
    out = capsys.readouterr().out
    assert f"state {FINGER}: expected values 1000 times as large, got 0 to 0.04" in out, out


def test_a_state_that_hardly_moves_while_its_commands_do_is_found(
    tmp_path: Path, proposed: Robot, capsys: pytest.CaptureFixture[str]
) -> None:
    """The driver writes km, whatever the robot file says."""
    thousandth = change(
        "/gripper/joint_states",
        lambda k, m: with_data(
            m, joint_state(m.log_ns, np.array([4e-5 * (k % 2), 0.0]), (FINGER, "other_finger_joint"))
        ),
    )
    bag = write_mcap(tmp_path / "bag.mcap", thousandth(recording()))
    assert main(["check", str(write(tmp_path, proposed)), "--bag", str(bag)]) == 1
    out = capsys.readouterr().out
    assert "expected the state to go as far as the commands, got it to use 0.1 % of its range" in out


def test_degrees_on_the_wire_are_said_to_be_the_commands(
    tmp_path: Path, proposed: Robot, capsys: pytest.CaptureFixture[str]
) -> None:
    def in_degrees(_k: int, m: BagMessage) -> BagMessage:
        return with_data(m, command(np.degrees(decode(m).points[0].positions), ARM))

    bag = write_mcap(tmp_path / "bag.mcap", change(ARM_TOPIC, in_degrees)(recording()))
    assert main(["check", str(write(tmp_path, proposed)), "--bag", str(bag)]) == 1
    out = capsys.readouterr().out
    assert out.count("-> set unit: deg in its command") == 7 and "in its dataset" not in out, out
    fixed = edit(*(("actions", j, {"command": {"unit": "deg"}}) for j in range(7)))(proposed)
    assert main(["check", str(write(tmp_path, fixed)), "--bag", str(bag)]) == 0, capsys.readouterr().out


def test_a_component_that_was_written_for_another_is_named(
    tmp_path: Path, proposed: Robot, capsys: pytest.CaptureFixture[str]
) -> None:
    base = {"name": "base.vy", "kind": "twist", "component": "vy", "max_velocity": 0.5, "output": "base"}
    robot = edit()(proposed)
    robot["actions"].append(base)
    robot["outputs"].append({"name": "base", "topic": "/cmd_vel", "type": TWIST})
    zero, kind = {"x": 0.0, "y": 0.0, "z": 0.0}, "geometry_msgs/msg/Vector3"
    types, messages = typestore().types, recording()
    for k in range(30):
        speed = types[kind](**zero | {"x": 0.4 * np.sin(k)})
        twist = types[TWIST](linear=speed, angular=types[kind](**zero))
        messages.append(BagMessage("/cmd_vel", TWIST, messages[0].log_ns + k * 10**8, serialize(twist, TWIST)))
    bag = write_mcap(tmp_path / "bag.mcap", sorted(messages, key=lambda m: m.log_ns))
    path = write(tmp_path, robot)
    assert main(["check", str(path), "--bag", str(bag)]) == 1
    out = capsys.readouterr().out
    assert "only vy to be commanded on /cmd_vel, got vx" in out and "-> change vy to vx" in out
    assert f"{path}:{line_with(path, 'base.vy')}: output base" in out
