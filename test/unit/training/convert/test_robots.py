"""Bags of many kinds of robots become datasets with the right numbers, and bags again."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.lerobot_runs import run
from support.robot_bags import (
    CAMERA,
    DEPTH,
    KNUCKLE,
    PERIOD,
    SECONDS,
    SHAPES,
    Motion,
    Shape,
    joints,
    sort,
    trajectories,
)
from support.sample_bags import START_NS, text, write_bag

from ki_vla_ros.errors import InputError
from ki_vla_ros.messages import BagMessage
from ki_vla_ros.records import NS_PER_S
from ki_vla_ros.robot import Robot
from ki_vla_ros.robot.__main__ import main as check_robot
from ki_vla_ros.settings import BundleIdentity, CommandTopic, Session, SessionTopics
from training.data.lerobot import Dataset, RobotColumns, read_robot_columns

# Those whose outputs, states or units are of a kind of their own.
BACK = [
    "UR5e and Robotiq",
    "MoveIt Servo",
    "ALOHA, leaders",
    "SO-101, degrees",
    "wheels and arm",
    "DROID, velocities",
    "Cartesian",
    "pointing down",
    "LIBERO, told",
    "gripper action",
    "speeds",
    "two arms",
]


def convert(tmp_path: Path, shape: Shape, *more: object) -> Dataset:
    (tmp_path / "robot.yaml").write_text(shape.yaml)
    bag = write_bag(tmp_path / "bag", shape.messages, shape.storage)
    given = ("--robot", tmp_path / "robot.yaml", "--actions", shape.actions, "--fps", 10, *more)
    assert run("from-bag", bag, *given, "--out", tmp_path / "dataset") == 0
    return Dataset(tmp_path / "dataset")


def values(dataset: Dataset, what: str) -> np.ndarray:
    """All columns of the state, or of the actions, one beside the other."""
    columns = dataset.columns(dataset.episodes[0])
    names = [name for name in columns if name not in ("stamp_ns", "timestamp", "frame_index", "index")]
    names = [name for name in names if not name.endswith("_index") and name.startswith("action") == (what == "action")]
    return np.concatenate([columns[name].reshape(len(columns[name]), -1) for name in names], axis=1)


@pytest.mark.parametrize("name", SHAPES)
def test_a_robots_bag_becomes_a_dataset_with_its_numbers(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = SHAPES[name]()
    dataset = convert(tmp_path, shape)
    assert re.search(shape.said, capsys.readouterr().out)
    (episode,) = dataset.episodes
    time_N = (dataset.columns(episode)["stamp_ns"] - START_NS) / NS_PER_S
    assert len(time_N) >= (SECONDS - shape.known_s) / PERIOD - 4 and dataset.tasks == {0: "put the cup on the plate"}
    assert dataset.info.robot_type == "robot"
    for what, truth in (("state", shape.state), ("action", shape.action)):
        np.testing.assert_allclose(values(dataset, what), [truth(t) for t in time_N], atol=shape.within, err_msg=what)
    assert len(list(dataset.images(episode, "front"))) == episode.length


@pytest.mark.slow
@pytest.mark.parametrize("name", BACK)
def test_a_bag_of_a_robots_dataset_gives_the_same_dataset(name: str, tmp_path: Path) -> None:
    """The dataset says whose it is; all its outputs, joint states and poses are on their topics, in their units."""
    first = convert(tmp_path, SHAPES[name]())
    assert run("to-bag", first.folder, "--out", tmp_path / "back") == 0
    given = ("--robot", tmp_path / "robot.yaml", "--actions", "commands", "--fps", 10)
    assert run("from-bag", tmp_path / "back", *given, "--out", tmp_path / "second") == 0
    second = Dataset(tmp_path / "second")
    assert second.info.features == first.info.features and second.tasks == first.tasks
    (one,), (two,) = first.episodes, second.episodes
    mine, theirs = first.columns(one), second.columns(two)
    assert (mine["stamp_ns"] == theirs["stamp_ns"]).all()
    for column in mine:
        np.testing.assert_allclose(mine[column], theirs[column], rtol=1e-6, atol=1e-6, err_msg=column)


@pytest.mark.slow
@pytest.mark.parametrize("fps", [7, 12, 15, 20, 30])
def test_a_bag_of_a_dataset_has_its_last_frame_at_any_rate(
    fps: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A period that is no whole number of ns is rounded the same both ways; from a bag's stamps, and from none."""
    first = convert(tmp_path, SHAPES["DROID, velocities"](), "--fps", fps)
    more = ("--robot", tmp_path / "robot.yaml", "--actions", "commands", "--fps", fps)
    period_s = yaml.safe_load(SHAPES["DROID, velocities"]().yaml)["action_period_s"]
    said = f"--fps {fps} makes a frame every {1 / fps:.4g} s, but robot robot has action_period_s {period_s:g}; give --"
    assert (said in capsys.readouterr().err) == (abs(period_s * fps - 1.0) > 0.02)
    for k in range(2):
        assert run("to-bag", first.folder, "--out", tmp_path / f"bag {k}") == 0
        assert run("from-bag", tmp_path / f"bag {k}", *more, "--out", tmp_path / f"dataset {k}") == 0
        assert "left out" not in capsys.readouterr().out
        again = Dataset(tmp_path / f"dataset {k}")
        (one,), (two,) = first.episodes, again.episodes
        assert (first.columns(one)["stamp_ns"] == again.columns(two)["stamp_ns"]).all() and one.length == two.length
        first = again


@pytest.mark.parametrize("name", ["DROID, velocities", "SO-101, degrees"])
def test_values_of_a_dataset_are_the_robots_again(name: str, tmp_path: Path) -> None:
    """Written and read by one robot file: the robot's values to single precision, the dataset's bit by bit."""
    dataset = convert(tmp_path, SHAPES[name]())
    robot = Robot.model_validate(yaml.safe_load(SHAPES[name]().yaml))
    columns = RobotColumns(robot)
    widths = len(robot.state), len(robot.actions)

    @settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.floats(-3.0, 3.0), min_size=sum(widths), max_size=sum(widths)))
    def check(numbers: list[float]) -> None:
        state_S, action_D = np.array(numbers[: widths[0]]), np.array(numbers[widths[0] :])
        rows = columns.rows(state_S[None], action_D[None])
        read = {key: values[:, 0] if values.shape[1] == 1 else values for key, values in rows.items()}
        back_S, back_D = read_robot_columns(dataset, robot, read)
        assert back_D is not None
        np.testing.assert_allclose(back_S[0], state_S, atol=1e-5)
        np.testing.assert_allclose(back_D[0], action_D, atol=1e-5)
        again = columns.rows(back_S, back_D)
        assert all((again[key] == values).all() for key, values in rows.items())

    check()
    (episode,) = dataset.episodes
    whole = dataset.columns(episode)
    state_NS, action_ND = read_robot_columns(dataset, robot, whole)
    assert action_ND is not None
    for key, values in columns.rows(state_NS, action_ND).items():
        assert np.array_equal(values.squeeze(), whole[key]), key


@pytest.mark.parametrize(("column", "place"), [("joint_position", (1, 3)), ("actions", (0, 2))])
def test_a_number_that_is_none_is_named_in_any_column(column: str, place: tuple[int, int], tmp_path: Path) -> None:
    """Also in those that only the robot file calls a part of the state."""
    dataset = convert(tmp_path, SHAPES["DROID, velocities"]())
    robot = Robot.model_validate(yaml.safe_load(SHAPES["DROID, velocities"]().yaml))
    columns = dataset.columns(dataset.episodes[0])
    columns[column] = columns[column].copy()
    columns[column][place] = np.nan
    with pytest.raises(InputError, match=f"episode 0: .* {column}, got nan at index {place[1]} for frame {place[0]}"):
        read_robot_columns(dataset, robot, columns)


# --- what does not fit


def change(name: str, *path: str | int, to: Any) -> Callable[[], Shape]:
    """A shape whose robot file says something else; None takes the key out."""

    def changed() -> Shape:
        shape = SHAPES[name]()
        robot = yaml.safe_load(shape.yaml)
        place = robot
        for key in path[:-1]:
            place = place[key]
        if to is None:
            del place[path[-1]]
        else:
            place[path[-1]] = to
        return replace(shape, robot=robot)

    return changed


FAULTS: dict[str, tuple[Callable[[], Shape], tuple[str, ...], str]] = {
    "a topic of joint states that is not there": (
        change("since boot", "state", 0, "source", "topic", to="arm/joint_states"),
        (),
        r"expected /arm/joint_states \(joint states\), got only .*/joint_states \(sensor_msgs/msg/Joint.*robot file",
    ),
    "a topic of poses that has images": (
        change("LIBERO, told", "outputs", 0, "source", to={"topic": CAMERA, "type": "geometry_msgs/msg/PoseStamped"}),
        (),
        rf"expected {CAMERA} \(pose\) of geometry_msgs/msg/PoseStamped instead of sensor_msgs/msg/Image",
    ),
    "commands of another type": (
        change("since boot", "outputs", 0, "type", to="std_msgs/msg/Float64MultiArray"),
        (),
        r"expected commands on /arm/joint_trajectory \(output 'arm'\) of std_msgs/msg/Float64Multi.* instead of traj",
    ),
    "commands that are not there": (
        change("UR5e and Robotiq", "outputs", 1, "topic", to="gripper/joint_trajectory"),
        (),
        r"expected commands on /gripper/joint_trajectory \(output 'gripper'\), got only .*robot file "
        r"outputs: 'gripper': topic\), give the actions `recorded`",
    ),
    "a joint that no joint state has": (
        change("since boot", "state", 6, "name", to="fr3_joint8"),
        (),
        r"robot robot: state: 'fr3_joint8': source.joint: expected 'fr3_joint8' on /joint_states, got fr3_joint1, ",
    ),
    "a joint that no command has": (
        change("since boot", "actions", 6, "joint", to="fr3_joint8"),
        (),
        r"actions: 'fr3_joint7': joint: expected 'fr3_joint8' on /arm/joint_trajectory, got fr3_joint1, .*did you mean",
    ),
    "a leader without this joint": (
        change("ALOHA, leaders", "actions", 0, "recorded", "joint", to="wrist"),
        (),
        r"actions: 'left_waist': recorded.joint: expected 'wrist' on /leader_left/joint_states, got waist, shoulder, ",
    ),
    "an array of another length": (
        change("two arms", "actions", 0, "output", to="left"),
        (),
        "outputs: 'left': expected a number for each of its 7 actions on /left/forward_position_.*, got 6",
    ),
    "an action without a word of what it was": (
        change("gripper action", "actions", 6, "recorded", to=None),
        (),
        r"outputs: 'gripper': expected commands, got an action \(control_msgs/action/GripperCommand\), whose",
    ),
    "velocities that nobody measures": (
        SHAPES["MoveIt Servo"],
        ("--actions", "states"),
        "actions: 'vx', 'vy', .*: expected a `source` that says where it is, got none.* or take --actions commands",
    ),
    "a depth camera": (
        change("depth and colour", "cameras", 0, "topic", to=DEPTH[1:]),
        (),
        "cameras: 'front': topic: .*'16UC1' is not supported.*it holds depth: name the camera's colour topic",
    ),
    "a camera that is not there": (
        change("depth and colour", "cameras", 0, "topic", to="front/image_raw"),
        (),
        rf"expected /front/image_raw \(camera 'front'\), got only .*{CAMERA}",
    ),
    "zero stamps where stamps are to count": (
        SHAPES["no stamps"],
        ("--clock", "stamps"),
        r"expected stamps of one clock for --clock stamps, got /joint_states: stamps are zero; take --clock auto",
    ),
    "a command's topic without its output": (
        SHAPES["UR5e and Robotiq"],
        ("--command", "/go"),
        r"--command: expected NAME=TOPIC with one of arm, gripper as NAME, got '/go': there are several",
    ),
    "another topic for an output that is none": (
        SHAPES["UR5e and Robotiq"],
        ("--command", "hand=/go"),
        r"--command: expected one of arm, gripper, got 'hand'",
    ),
    "a column with a hole": (
        change("since boot", "state", 0, "dataset", to={"index": 9}),
        (),
        r"state: dataset.index: expected 0 to 6 in column 'observation.state', as a dataset is to be written, got .*9",
    ),
    "one column for both": (
        change("since boot", "actions", 0, "dataset", to={"column": "observation.state"}),
        (),
        r"actions: dataset.column: expected a column of the actions alone, got 'observation.state'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_named_with_its_line(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, more, expected = FAULTS[fault]
    shape = make()
    (tmp_path / "robot.yaml").write_text(shape.yaml)
    bag = write_bag(tmp_path / "bag", shape.messages)
    asked = ("from-bag", bag, "--robot", tmp_path / "robot.yaml", "--actions", shape.actions, *more)
    assert run(*asked, "--out", tmp_path / "dataset") == 2
    said = capsys.readouterr().err
    assert re.search(expected, said), said
    assert not (tmp_path / "dataset").exists()


def test_the_clock_is_chosen(tmp_path: Path) -> None:
    """By its log, a joint state that is stamped 100 ms too late is as old as it came."""
    shape = SHAPES["no stamps"]()
    for clock in ("auto", "log"):
        (tmp_path / clock).mkdir()
        dataset = convert(tmp_path / clock, shape, "--clock", clock)
        stamps = dataset.columns(dataset.episodes[0])["stamp_ns"] % (50 * 1_000_000)
        assert set(stamps.tolist()) == {0 if clock == "auto" else 2_000_000}


def test_other_topics_may_be_named(tmp_path: Path) -> None:
    shape = SHAPES["UR5e and Robotiq"]()
    names = {"/joint_states": "/ur/joint_states", "/robotiq_controller/joint_trajectory": "/hand/told"}
    renamed = replace(shape, messages=[replace(m, topic=names.get(m.topic, m.topic)) for m in shape.messages])
    more = ("--joint-states", "/ur/joint_states", "--command", "gripper=/hand/told")
    (tmp_path / "other").mkdir()
    first, second = convert(tmp_path, shape), convert(tmp_path / "other", renamed, *more)
    for column, mine in first.columns(first.episodes[0]).items():
        np.testing.assert_array_equal(mine, second.columns(second.episodes[0])[column])


def rarely_told(fingers: Motion, *told: float) -> Shape:
    """UR5e whose gripper is told 0.7 at these times only."""
    shape = SHAPES["UR5e and Robotiq"]()
    others = [m for m in shape.messages if "robotiq" not in m.topic and m.data.find(KNUCKLE.encode()) < 0]
    topic = "/robotiq_controller/joint_trajectory"
    grips = trajectories(topic, [KNUCKLE], lambda _: np.array([0.7]), 100.0)
    grips = [grips[round(time_s * 100)] for time_s in told]
    return replace(shape, messages=sort(others, joints("/joint_states", [KNUCKLE], fingers, 30.0), grips))


def test_a_gripper_that_is_told_something_now_and_then_rests_meanwhile(tmp_path: Path) -> None:
    """Open until it is told to close at 0.6 s; on what it holds it stays at 0.5 rad, but it is told 0.7."""
    dataset = convert(tmp_path, rarely_told(lambda t: np.array([2 * min(max(t - 0.65, 0.0), 0.25)]), 0.6))
    time_N = (dataset.columns(dataset.episodes[0])["stamp_ns"] - START_NS) / NS_PER_S
    grip_N = values(dataset, "action")[:, -1]
    assert len(time_N) >= 9
    np.testing.assert_allclose(grip_N, np.where(time_N + PERIOD >= 0.6 - 1e-6, 1 - 0.7 / 0.7929, 1.0), atol=1e-6)


def test_a_grip_is_kept_when_the_instruction_changes(tmp_path: Path) -> None:
    shape = rarely_told(lambda t: np.array([2 * min(max(t - 0.15, 0.0), 0.25)]), 0.1)
    other = BagMessage("/policy/instruction", "std_msgs/msg/String", START_NS + NS_PER_S // 2, text("lift it"))
    dataset = convert(tmp_path, replace(shape, messages=sort(shape.messages, [other])))
    assert len(dataset.episodes) == 2
    np.testing.assert_allclose(dataset.columns(dataset.episodes[1])["action"][:, -1], 1 - 0.7 / 0.7929, atol=1e-6)


def test_a_gripper_that_moves_without_a_command_is_not_taken_to_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its goals went another way, which the bag does not have: so much is said, and those frames are left out."""
    shape = rarely_told(lambda t: np.array([0.4 * max(t - 0.5, 0.0)]), 1.1)
    dataset = convert(tmp_path, shape)
    assert re.search(r"x no action \(the first: nothing says gripper at \d+\)", capsys.readouterr().out)
    time_N = (dataset.columns(dataset.episodes[0])["stamp_ns"] - START_NS) / NS_PER_S
    assert 0.4 <= time_N.max() <= 0.55


def test_a_bag_with_a_session_names_its_topics_itself(tmp_path: Path) -> None:
    """As the node had them after remapping; the robot file names them otherwise. No bundle is looked for."""
    shape = SHAPES["UR5e and Robotiq"]()
    told = "/scaled_joint_trajectory_controller/joint_trajectory", "/robotiq_controller/joint_trajectory"
    kind = "trajectory_msgs/msg/JointTrajectory"
    names = dict(zip(("/joint_states", CAMERA, *told), ("/ur/joint_states", "/eye", "/go", "/grip"), strict=True))
    session = Session(
        node="/policy",
        bundle=BundleIdentity(name="none", manifest_sha256="0" * 64),
        parameters={"bundle": "none"},
        topics=SessionTopics(
            cameras={"front": "/eye"},
            joint_states="/ur/joint_states",
            states={"joint_states": "/ur/joint_states"},
            instruction="/policy/instruction",
            command="/go",
            commands={n: CommandTopic(topic=t, type=kind) for n, t in (("arm", "/go"), ("gripper", "/grip"))},
            chunk="/c",
            tick="/t",
        ),
    )
    messages = [replace(m, topic=names.get(m.topic, m.topic)) for m in shape.messages]
    said = BagMessage("/policy/session", "std_msgs/msg/String", START_NS - 2, text(session.text()))
    (tmp_path / "other").mkdir()
    first = convert(tmp_path, shape)
    second = convert(tmp_path / "other", replace(shape, messages=[said, *messages]))
    for column, mine in first.columns(first.episodes[0]).items():
        np.testing.assert_array_equal(mine, second.columns(second.episodes[0])[column])


@pytest.mark.parametrize("name", ["ALOHA, leaders", "SO-101, degrees", "gripper action"])
def test_robot_check_looks_at_what_recordings_have(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Outputs that no bag has commands of are no misfit then."""
    shape, file = SHAPES[name](), tmp_path / "robot.yaml"
    bag = write_bag(tmp_path / "bag", shape.messages)
    file.write_text(shape.yaml)
    assert check_robot(["check", str(file), "--bag", str(bag)]) == 0
    content = yaml.safe_load(shape.yaml)
    content["actions"][-1]["recorded"]["joint"] = "gripp"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    capsys.readouterr()
    assert check_robot(["check", str(file), "--bag", str(bag)]) == 1
    said = capsys.readouterr().out
    assert re.search(r"robot.yaml:\d+: actions .*: expected gripp on /.*\n.*, or set joint in its recorded", said), said


def test_a_leader_in_degrees_does_not_become_radians(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its driver publishes degrees, and the robot file says nothing of that."""
    shape = change("SO-101, degrees", "actions", 1, "recorded", "unit", to="rad")()
    (tmp_path / "robot.yaml").write_text(shape.yaml)
    bag = write_bag(tmp_path / "bag", shape.messages)
    asked = ("from-bag", bag, "--robot", tmp_path / "robot.yaml", "--actions", "commands")
    assert run(*asked, "--out", tmp_path / "dataset") == 2
    assert re.search(r"message on /leader/joint_states .*degrees it would be .* rad", capsys.readouterr().out)


# --- datasets of others


def foreign(tmp_path: Path, name: str) -> Dataset:
    """A dataset that does not say whose it is."""
    dataset = convert(tmp_path, SHAPES[name]())
    (dataset.folder / "meta/ki_vla_ros.json").unlink()
    return dataset


def test_numbers_without_a_unit_never_become_radians(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = foreign(tmp_path, "SO-101, degrees")
    assert run("to-bag", dataset.folder, "--out", tmp_path / "back") == 2
    said = capsys.readouterr().err
    assert "expected --robot FILE, which says what its numbers are (rad, degrees, percent?)" in said
    assert not (tmp_path / "back").exists()
    given = ("to-bag", dataset.folder, "--out", tmp_path / "back", "--robot", tmp_path / "robot.yaml")
    assert run(*given) == 0
    again = ("from-bag", tmp_path / "back", "--robot", tmp_path / "robot.yaml", "--actions", "commands", "--fps", 10)
    assert run(*again, "--out", tmp_path / "second") == 0
    second = Dataset(tmp_path / "second")
    for column in ("observation.state", "action"):
        mine, theirs = (d.columns(d.episodes[0])[column] for d in (dataset, second))
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)


def test_a_camera_that_a_dataset_lacks_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset, robot = foreign(tmp_path, "since boot"), yaml.safe_load(SHAPES["since boot"]().yaml)
    robot["cameras"].append({"name": "wrist", "optional": True})
    (tmp_path / "robot.yaml").write_text(yaml.safe_dump(robot))
    asked = ("to-bag", dataset.folder, "--robot", tmp_path / "robot.yaml")
    assert run(*asked, "--out", tmp_path / "back") == 0
    assert "not in it: camera wrist, the dataset has no images observation.images.wrist" in capsys.readouterr().out
    robot["cameras"][0]["dataset"] = "observation.images.fron"
    (tmp_path / "robot.yaml").write_text(yaml.safe_dump(robot))
    assert run(*asked, "--out", tmp_path / "other") == 2
    assert re.search(
        r"cameras: 'front': dataset: expected one of observation.images.front, got observation.images.fron; did",
        capsys.readouterr().err,
    )


@pytest.mark.parametrize(
    ("robot", "said"),
    [
        ("droids", "robot 'droids': expected the path of a robot file, or one of aloha, .*; did you mean 'droid'"),
        ("./none.yaml", r"robot file none.yaml: expected a YAML file, got one that cannot be read"),
    ],
)
def test_a_robot_that_is_not_there_is_named(
    robot: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bag = write_bag(tmp_path / "bag", SHAPES["since boot"]().messages)
    assert run("from-bag", bag, "--robot", robot, "--actions", "states", "--out", tmp_path / "dataset") == 2
    assert re.search(said, capsys.readouterr().err)
