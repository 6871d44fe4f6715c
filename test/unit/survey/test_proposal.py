"""`robot new`: a valid file of what is there, each guess said; what nothing shows is left to be filled in."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from support.bad_bags import CASES
from support.robot_bags import SHAPES
from support.sample_bags import (
    START_NS,
    TRAJECTORY,
    Messages,
    command,
    header,
    joint_state,
    serialize,
    write_bag,
    write_mcap,
)
from support.unknown_arm import (
    ARM,
    ARM_TOPIC,
    ARRAY,
    FINGER,
    FRONT,
    LIMITS,
    WRIST,
    array,
    depth,
    place,
    recording,
    urdf,
)

from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.messages import BagMessage, decode, typestore
from ki_vla_ros.robot import Robot, read_robot
from ki_vla_ros.robot.__main__ import main
from ki_vla_ros.survey import Proposal, survey_bag, survey_dataset


def bag(folder: Path, messages: Messages) -> Path:
    return write_mcap(folder / "bag.mcap", messages)


def proposed(folder: Path, *sources: Path) -> Robot:
    out = folder / "robot.yaml"
    assert main(["new", *(part for source in sources for part in ("--from", str(source))), "--out", str(out)]) == 0
    return read_robot(out)


@pytest.fixture
def arm_urdf(tmp_path: Path) -> Path:
    path = tmp_path / "arm.urdf"
    path.write_text(urdf())
    return path


def test_a_bag_of_an_unknown_arm_becomes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    robot = proposed(tmp_path, bag(tmp_path, recording()))
    assert [d.name for d in robot.state] == [a.name for a in robot.actions] == [*ARM, FINGER]
    assert {d.source.topic for d in robot.state[:7]} == {"/joint_states"}
    gripper, action = robot.state[7], robot.actions[7]
    assert gripper.source.topic == "/gripper/joint_states" and (gripper.kind, gripper.unit) == ("gripper", "m")
    assert gripper.ends == action.ends and gripper.ends == pytest.approx((0.04, 0.0), abs=1e-3)
    assert [(o.name, o.topic) for o in robot.outputs] == [
        ("arm", "/arm_controller/joint_trajectory"),
        ("gripper", "/gripper_controller/joint_trajectory"),
    ]
    assert [(c.name, c.topic, c.transport) for c in robot.cameras] == [
        ("front_camera", FRONT, "raw"),
        ("wrist", f"{WRIST}/compressed", "compressed"),
    ]
    assert robot.cameras[1].mounting == "moving"
    assert robot.action_period_s == 0.05 and robot.horizon == 20
    # What was seen is said to be no limit, at each line, and has a margin.
    text = (tmp_path / "robot.yaml").read_text()
    assert text.count("not limits") == 8 and text.count("speed seen, no limit") == 8
    assert robot.actions[0].limits == pytest.approx((-0.72, 0.72), abs=0.01)
    assert robot.actions[0].max_velocity == pytest.approx(0.9, abs=0.01)
    assert "other_finger_joint" in text and "other_finger_joint" not in robot.axis_names
    assert "guesses to check" in capsys.readouterr().err


def test_the_urdf_has_the_limits(tmp_path: Path, arm_urdf: Path) -> None:
    robot = proposed(tmp_path, bag(tmp_path, recording()), arm_urdf)
    assert robot.name == "iiwa7"
    assert [a.limits for a in robot.actions[:7]] == [(-most, most) for most in LIMITS]
    assert {a.max_velocity for a in robot.actions} == {1.7, 0.1} and robot.actions[7].ends == (0.04, 0.0)
    assert "seen" not in " ".join((tmp_path / "robot.yaml").read_text().split("actions:")[1].split("outputs:")[0])


def test_a_urdf_in_the_bag_is_read(tmp_path: Path) -> None:
    description = typestore().types["std_msgs/msg/String"](data=urdf().replace("revolute", "continuous", 1))
    text = BagMessage("/robot_description", "std_msgs/msg/String", 1, serialize(description, "std_msgs/msg/String"))
    robot = proposed(tmp_path, bag(tmp_path, [text, *recording(2.0)]))
    assert robot.actions[0].continuous and robot.state[0].continuous and not robot.actions[1].continuous
    assert robot.actions[1].limits == (-LIMITS[1], LIMITS[1])


@pytest.mark.parametrize("with_urdf", [True, False])
def test_degrees_are_suspected(tmp_path: Path, arm_urdf: Path, with_urdf: bool) -> None:
    sources = [bag(tmp_path, recording(degrees=True)), *([arm_urdf] if with_urdf else [])]
    robot = proposed(tmp_path, *sources)
    assert {d.source.unit for d in robot.state[:7]} == {"deg"} and robot.state[7].source.unit is None
    assert robot.signals[0].scale == pytest.approx(np.pi / 180)
    assert "CHECK: is it in degrees?" in (tmp_path / "robot.yaml").read_text()
    assert main(["check", str(tmp_path / "robot.yaml"), "--bag", str(sources[0])]) == 0


def test_columns_without_names_are_the_joints_that_they_are_nearest_to(tmp_path: Path) -> None:
    robot = proposed(tmp_path, bag(tmp_path, recording(arrays=True)))
    assert robot.actions[7].name == FINGER and robot.outputs[1].type == ARRAY
    # An arm by an array, in another order than its joint states.
    order = np.array([3, 1, 0, 2, 6, 5, 4])
    messages = [m for m in recording() if m.topic != "/arm_controller/joint_trajectory"]
    start = messages[0].log_ns
    messages += [
        BagMessage("/forward_position_controller/commands", ARRAY, start + k * 40_000_000, array(place(k / 25)[order]))
        for k in range(75)
    ]
    (tmp_path / "robot.yaml").unlink()
    robot = proposed(tmp_path, bag(tmp_path, sorted(messages, key=lambda m: m.log_ns)))
    forward = next(o for o in robot.outputs if "forward" in o.topic)
    assert [a.target for a in robot.actions_of(forward)] == [ARM[i] for i in order]


def twist(vx: float, wz: float) -> bytes:
    types = typestore().types
    zero, kind = {"x": 0.0, "y": 0.0, "z": 0.0}, "geometry_msgs/msg/Vector3"
    content = types["geometry_msgs/msg/Twist"](
        linear=types[kind](**zero | {"x": vx}), angular=types[kind](**zero | {"z": wz})
    )
    return serialize(content, "geometry_msgs/msg/Twist")


def test_a_mobile_base_and_depth(tmp_path: Path) -> None:
    messages = recording()
    start = messages[0].log_ns
    messages += [
        BagMessage("/cmd_vel", "geometry_msgs/msg/Twist", start + k * 10**8, twist(0.4 * np.sin(k), 0.2))
        for k in range(30)
    ] + [BagMessage("/depth/image_raw", "sensor_msgs/msg/Image", start + 10**9, depth(start))]
    messages += [
        BagMessage("/cmd_vel", "geometry_msgs/msg/Twist", start + 31 * 10**8, twist(0.0, 0.9)),
    ]
    robot = proposed(tmp_path, bag(tmp_path, sorted(messages, key=lambda m: m.log_ns)))
    base = next(o for o in robot.outputs if o.name == "base")
    assert base.type == "geometry_msgs/msg/Twist"
    assert [(a.component, a.max_velocity) for a in robot.actions_of(base)] == [
        ("vx", pytest.approx(0.4, abs=0.01)),
        ("wz", pytest.approx(0.9)),
    ]
    text = (tmp_path / "robot.yaml").read_text()
    assert "Left out: /depth/image_raw (depth, not colour)" in text and "the most that was seen, no limit" in text


def pose(at_ns: int, x: float) -> bytes:
    types = typestore().types
    place = types["geometry_msgs/msg/Pose"](
        position=types["geometry_msgs/msg/Point"](x=x, y=0.1, z=0.3),
        orientation=types["geometry_msgs/msg/Quaternion"](x=np.sin(x / 2), y=0.0, z=0.0, w=np.cos(x / 2)),
    )
    kind = "geometry_msgs/msg/PoseStamped"
    return serialize(types[kind](header=header(at_ns), pose=place), kind)


def test_poses_are_an_output_with_a_box(tmp_path: Path) -> None:
    kind, messages = "geometry_msgs/msg/PoseStamped", [m for m in recording() if "controller" not in m.topic]
    start = messages[0].log_ns
    for k in range(100):
        at, x = start + k * 40_000_000, 0.4 + 0.1 * np.sin(k / 10)
        messages.append(BagMessage("/cartesian/target_pose", kind, at, pose(at, x)))
        messages.append(BagMessage("/current_pose", kind, at + 1, pose(at, x)))
    robot = proposed(tmp_path, bag(tmp_path, sorted(messages, key=lambda m: m.log_ns)))
    (output,) = robot.outputs
    assert (output.topic, output.type) == ("/cartesian/target_pose", kind)
    assert output.workspace is not None and output.workspace.x == pytest.approx((0.25, 0.55), abs=0.01)
    assert output.max_linear_velocity == pytest.approx(0.25, rel=0.1)
    assert output.max_angular_velocity == pytest.approx(0.25, rel=0.1)
    assert {d.source.topic for d in robot.state} == {"/current_pose"} and len(robot.state) == 7


@pytest.mark.parametrize("beside", ["a gripper", "columns that no joints fit"])
def test_poses_and_a_gripper_are_two_outputs_and_what_is_left_out_is_said(tmp_path: Path, beside: str) -> None:
    kind = "geometry_msgs/msg/PoseStamped"
    fits = beside == "a gripper"
    messages = [m for m in recording(arrays=True) if m.topic != "/arm_controller/joint_trajectory"]
    if not fits:
        messages = [m for m in messages if m.topic != "/gripper/joint_states"]
        messages = [m for m in messages if m.type != "sensor_msgs/msg/JointState"]
    for k in range(100):
        at, x = messages[0].log_ns + k * 40_000_000, 0.4 + 0.1 * np.sin(k / 10)
        messages.append(BagMessage("/cartesian/target_pose", kind, at, pose(at, x)))
        messages.append(BagMessage("/current_pose", kind, at + 1, pose(at, x)))
    path = bag(tmp_path, sorted(messages, key=lambda m: m.log_ns))
    proposal = Proposal("hand", survey_bag(path), None, "")
    types = [output["type"] for output in yaml.safe_load(proposal.text)["outputs"]]
    assert types == ([ARRAY, kind] if fits else [kind])
    left_out = "columns that no joints fit; it is left out"
    assert (left_out in proposal.text) != fits
    assert proposal.to_check == sum("# CHECK" in line or "CHECK:" in line for line in proposal.text.splitlines())


def test_what_nothing_shows_is_named_and_refused_until_it_is_filled_in(
    tmp_path: Path, arm_urdf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A URDF alone knows no topic and no rate; joint states alone no controller."""
    with pytest.raises(ConfigurationError, match=r"line \d+: .*FILL IN"):
        proposed(tmp_path, arm_urdf)
    told = capsys.readouterr().err
    assert "to fill in, until then it is refused" in told
    assert "who takes the commands" in told and "cameras: topic" in told and "action_period_s" in told
    assert main(["check", str(tmp_path / "robot.yaml")]) == 1
    assert "FILL IN" in capsys.readouterr().out


def test_a_joint_that_stood_still_shows_no_speed_and_a_gripper_no_ends(tmp_path: Path) -> None:
    still = [m for m in recording() if m.topic.startswith(("/joint", "/arm", "/front"))]
    parts = [m for m in recording(0.2) if m.topic.startswith("/gripper")]
    proposal = Proposal("", survey_bag(bag(tmp_path, still[:20] + parts[:8] + still[20:])), None, "")
    assert any(f"{FINGER}: open and closed" in what for what in proposal.fill_in)


DATASET: dict[str, Any] = {
    "names": ["shoulder_pan.pos", "elbow_flex.pos", "gripper.pos"],
    "min": [-92.0, -40.0, 1.5],
    "max": [88.0, 95.0, 99.0],
    "mean": [0.0, 10.0, 50.0],
}


def dataset(folder: Path, version: str = "v3.0", **changes: Any) -> Path:
    content = DATASET | changes
    column = {"dtype": "float32", "shape": [len(content["min"])], "names": content["names"]}
    image = {"dtype": "video", "shape": [480, 640, 3], "names": ["height", "width", "channels"]}
    info = {
        "codebase_version": version,
        "robot_type": "so101_follower",
        "fps": 30,
        "features": {"observation.state": column, "action": column, "observation.images.front": image},
    }
    stats = {what: content[what] for what in ("min", "max", "mean")}
    figures = {"observation.state": stats, "action": stats}
    (folder / "meta").mkdir(parents=True)
    (folder / "meta/info.json").write_text(json.dumps(info))
    if version == "v2.1":
        line = json.dumps({"episode_index": 0, "stats": figures})
        (folder / "meta/episodes_stats.jsonl").write_text(f"{line}\n{line}\n")
    else:
        (folder / "meta/stats.json").write_text(json.dumps(figures))
    return folder


SO101 = """<robot name="so101">
<joint name="shoulder_pan" type="revolute"><limit lower="-1.92" upper="1.92" velocity="10"/></joint>
<joint name="elbow_flex" type="revolute"><limit lower="-1.69" upper="1.69" velocity="10"/></joint>
<joint name="gripper" type="revolute"><limit lower="-0.17" upper="1.75" velocity="10"/></joint></robot>"""


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
@pytest.mark.parametrize("names", [DATASET["names"], {"motors": DATASET["names"]}])
def test_a_dataset_in_degrees_with_a_urdf(tmp_path: Path, version: str, names: Any) -> None:
    path = tmp_path / "so101.urdf"
    path.write_text(SO101)
    robot = proposed(tmp_path, dataset(tmp_path / "data", version, names=names), path)
    assert [d.dataset.unit for d in robot.state] == ["deg", "deg", None]
    assert [d.dataset.name for d in robot.actions] == DATASET["names"]
    assert robot.actions[0].limits == (-1.92, 1.92) and robot.actions[2].ends == (1.75, -0.17)
    # 0 and 100 are closed and open, whatever was reached.
    np.testing.assert_allclose(robot.action_lines.to_robot(np.array([90.0, 0.0, 100.0])), [np.pi / 2, 0.0, 1.75])
    assert robot.action_period_s == pytest.approx(1 / 30) and robot.name == "so101_follower"
    assert main(["check", str(tmp_path / "robot.yaml"), "--dataset", str(tmp_path / "data")]) == 0


def test_a_dataset_alone_does_not_say_how_fast(tmp_path: Path) -> None:
    proposal = Proposal("", None, survey_dataset(dataset(tmp_path / "data")), "")
    speeds = [what for what in proposal.fill_in if "max_velocity" in what]
    assert len(speeds) == 3 and 'max_velocity: "FILL IN"' in proposal.text
    assert "CHECK: degrees, or -100..100" in proposal.text


def test_a_dataset_of_a_mobile_base(tmp_path: Path) -> None:
    names = ["arm_shoulder_pan.pos", "x.vel", "theta.vel"]
    path = dataset(tmp_path / "data", names=names, min=[-1.0, -0.3, -90.0], max=[1.0, 0.3, 90.0], mean=[0.0] * 3)
    proposal = Proposal("lekiwi", None, survey_dataset(path), "")
    line = next(line for line in proposal.text.split("actions:")[1].splitlines() if "base.wz" in line)
    assert "kind: twist, component: wz, max_velocity: 1.5708" in line and "name: theta.vel, unit: deg/s" in line


@pytest.mark.parametrize(
    ("sources", "fault"),
    [
        (["nowhere"], "expected a bag, a dataset or a URDF, got nothing at that path"),
        (["arm.urdf", "arm.urdf"], "expected one URDF, got a second one"),
        (["empty"], "expected metadata.yaml or files .mcap or .db3 in it, got none"),
        (["arm.xacro"], "got xacro; expand it first"),
        (["broken.urdf"], "expected a URDF, got no element found"),
        (["nothing.urdf"], "expected joints, commands or poses in what is given, got none"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    tmp_path: Path, arm_urdf: Path, sources: list[str], fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for name, text in (("arm.xacro", ""), ("broken.urdf", "<robot>"), ("nothing.urdf", "<robot name='r'/>")):
        (tmp_path / name).write_text(text)
    arguments = [part for source in sources for part in ("--from", str(tmp_path / source))]
    assert main(["new", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("robot: ") and fault in captured.err and captured.out == ""


def test_a_file_that_is_there_is_kept(tmp_path: Path, arm_urdf: Path) -> None:
    out = tmp_path / "mine.yaml"
    out.write_text("mine")
    assert main(["new", "--from", str(arm_urdf), "--out", str(out)]) == 2 and out.read_text() == "mine"


def test_a_folder_bag_and_its_name(tmp_path: Path) -> None:
    robot = proposed(tmp_path, write_bag(tmp_path / "my bag 1", recording(1.0)))
    assert robot.name == "my_bag_1"


def states(names: tuple[str, ...], value: float = 0.5) -> Messages:
    kind, start = "sensor_msgs/msg/JointState", 10**18
    return [
        BagMessage(
            "/joint_states",
            kind,
            start + k * 10**7,
            joint_state(start, np.full(len(names), value if math.isinf(value) else value * np.sin(k / 9)), names),
        )
        for k in range(100)
    ]


@pytest.mark.parametrize(
    "name",
    [
        "a\nname: evil",
        "a}\n  - {name: b",
        "a # b",
        "a: b",
        "on",
        "1",
        "null",
        "a, b",
        '"',
        "'",
        "\\",
        "\x1b[2J",
        "é",
        "",
        " ",
    ],
)
def test_no_name_of_a_recording_becomes_yaml(tmp_path: Path, name: str) -> None:
    """Whatever a joint, a topic or a frame is called: the file has the same keys, and one line for each joint."""
    names = (name, "plain")
    twists = [
        BagMessage(f"/cmd_vel{name}", "geometry_msgs/msg/Twist", 10**18 + k, twist(float(k), 0.0)) for k in range(5)
    ]
    for messages in (states(names), [*states(names), *twists]):
        text = Proposal(name, survey_bag(bag(tmp_path, messages)), None, "").text
        content = yaml.safe_load(text)
        keys = ["name", "cameras", "state", "actions", "outputs", "action_period_s", "horizon"]
        assert list(content) == keys and all(line.isprintable() for line in text.splitlines())
        for group in ("state", "actions"):
            assert {part["name"] for part in content[group] if isinstance(part, dict)} <= {*names, "base.vx"}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (states(("a", "a")), "joint_position"),
        ([m for m in recording() if "controller" in m.topic], "the topic that says where it is"),
        (states(("a",))[:1], "max_velocity"),
        (states(("_a", "b")), "a name for '_a'"),
        (states(("a",), 1e300), "who takes the commands"),
        (states(("a",), np.inf) + states(("b",)), "who takes the commands"),
    ],
)
def test_odd_recordings_end_with_what_is_to_be_filled_in(tmp_path: Path, messages: Messages, expected: str) -> None:
    proposal = Proposal("", survey_bag(bag(tmp_path, messages)), None, "")
    assert any(expected in what for what in [*proposal.fill_in, proposal.text])
    path = tmp_path / "robot.yaml"
    path.write_text(proposal.text)
    assert main(["check", str(path), "--bag", str(tmp_path / "bag.mcap")]) == 1


@pytest.mark.parametrize("name", CASES)
def test_damaged_bags_give_what_can_be_read(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No traceback, whatever is damaged: what the faults leave is proposed, or nothing is, in one line."""
    path = CASES[name].make(tmp_path)
    assert main(["new", "--from", str(path), "--out", str(tmp_path / "robot.yaml")]) in (0, 2)
    if (tmp_path / "robot.yaml").exists():
        assert main(["check", str(tmp_path / "robot.yaml"), "--bag", str(path)]) in (0, 1)
    assert "Traceback" not in capsys.readouterr().err


FILLED = {
    "topic": "pose",
    "component": "rx",
    "workspace": {"x": [-1.0, 1.0], "y": [-1.0, 1.0], "z": [0.0, 1.0]},
}


def filled(value: Any, key: str = "") -> Any:
    """A proposed file as somebody fills it in: 1 for numbers."""
    if isinstance(value, dict):
        own = {"topic": f"to_{value.get('name')}"} if key == "outputs" and value.get("topic") == "FILL IN" else {}
        return {name: filled(part, name) for name, part in value.items()} | own
    if isinstance(value, list):
        return [filled(part, key) for part in value]
    return FILLED.get(key, 1.0) if value == "FILL IN" else value


EEF = ["x", "y", "z", "axis_angle1", "axis_angle2", "axis_angle3", "gripper", "gripper"]  # as LIBERO's
LEKIWI = ["arm_shoulder_pan.pos", "arm_gripper.pos", "x.vel", "y.vel", "theta.vel"]
ALOHA = ["left_waist", "left_shoulder", "left_gripper", "right_waist", "right_shoulder", "right_gripper"]


@pytest.mark.parametrize(
    ("state", "action", "kinds"),
    [
        (EEF, ["x", "y", "z", "axis_angle1", "axis_angle2", "axis_angle3", "gripper"], {"pose_delta", "gripper"}),
        (LEKIWI, LEKIWI, {"joint_position", "gripper", "twist"}),
        (ALOHA, ALOHA, {"joint_position", "gripper"}),
        (None, None, {"joint_position"}),
        (["a", "b"], ["a.vel", "b.vel"], {"joint_velocity"}),
    ],
)
def test_proposals_of_datasets_are_valid_once_they_are_filled_in(
    tmp_path: Path, state: list[str] | None, action: list[str] | None, kinds: set[str]
) -> None:
    path = dataset(tmp_path / "data")
    info, stats = json.loads((path / "meta/info.json").read_text()), {}
    for key, names in (("observation.state", state), ("action", action)):
        width = len(names or [0] * 7)
        info["features"][key] = {"dtype": "float32", "shape": [width], "names": names}
        stats[key] = {"min": [-1.0] * width, "max": [1.0] * width, "mean": [0.0] * width}
    (path / "meta/info.json").write_text(json.dumps(info))
    (path / "meta/stats.json").write_text(json.dumps(stats))
    proposal = Proposal("", None, survey_dataset(path), "")
    robot = Robot.model_validate(filled(yaml.safe_load(proposal.text)))
    assert {a.kind for a in robot.actions} == kinds and len(robot.actions) == len(action or [0] * 7)
    out = tmp_path / "robot.yaml"
    out.write_text(yaml.safe_dump(robot.model_dump(mode="json", exclude_defaults=True)))
    assert main(["check", str(out), "--dataset", str(path)]) in (0, 1)  # its numbers may be outside what was filled in


@pytest.mark.parametrize("dtype", ["float32", "int64"])
def test_columns_of_other_names_and_types_are_the_state_and_the_actions(tmp_path: Path, dtype: str) -> None:
    """openpi's converters call them state and actions; some datasets have whole numbers."""
    path = dataset(tmp_path / "data")
    for file in ("meta/info.json", "meta/stats.json"):
        text = (path / file).read_text().replace('"observation.state"', '"state"').replace('"action"', '"actions"')
        (path / file).write_text(text.replace("float32", dtype))
    text, plain = (Proposal("", None, survey_dataset(p), "").text for p in (path, dataset(tmp_path / "data2")))
    assert text.replace("data2", "data") == plain.replace("data2", "data")


@pytest.mark.parametrize(
    ("low", "high", "ends"),
    [(0.0, 1.0, None), (2.0, 97.0, (100.0, 0.0)), (-1.0, 1.0, (1.0, -1.0)), (-99.0, 100.0, (100.0, -100.0)),
     (0.0, 255.0, (255.0, 0.0)), (10.0, 850.0, (850.0, 0.0))],
)  # fmt: skip
def test_a_datasets_gripper_has_its_own_ends(tmp_path: Path, low: float, high: float, ends: Any) -> None:
    names = ["a.pos", "gripper.pos"]
    path = dataset(tmp_path / "data", names=names, min=[-1.0, low], max=[1.0, high], mean=[0.0, 0.5])
    content = yaml.safe_load(Proposal("", None, survey_dataset(path), "").text)
    for group in ("state", "actions"):
        given = content[group][1]["dataset"]
        assert (given.get("open"), given.get("closed")) == (ends or (None, None))


def test_euler_angles_are_no_rotation_vector(tmp_path: Path) -> None:
    names = ["x", "y", "z", "roll", "pitch", "yaw"]
    path = dataset(tmp_path / "data", names=names, min=[0.0] * 6, max=[1.0] * 6, mean=[0.5] * 6)
    proposal = Proposal("", None, survey_dataset(path), "")
    assert any("roll: Euler angles" in what for what in proposal.fill_in)


def test_small_values_outside_a_urdf_are_not_called_degrees(tmp_path: Path) -> None:
    path = tmp_path / "arm.urdf"
    path.write_text(urdf().replace('lower="-2.96" upper="2.96"', 'lower="0.0" upper="0.4"', 1))
    robot = proposed(tmp_path, bag(tmp_path, recording()), path)
    assert {d.source.unit for d in robot.state} == {None}


def test_a_leader_arm_stands_for_commands(tmp_path: Path) -> None:
    followed = [m for m in recording() if "controller" not in m.topic]
    led = [replace(m, topic="/leader/joint_states") for m in followed if m.topic == "/joint_states"]
    messages = sorted([*followed, *led], key=lambda m: m.log_ns)
    proposal = Proposal("", survey_bag(bag(tmp_path, messages)), None, "")
    content = yaml.safe_load(proposal.text)
    assert [a.get("recorded") for a in content["actions"][:7]] == [{"topic": "/leader/joint_states"}] * 7
    assert {d["source"]["topic"] for d in content["state"][:7]} == {"/joint_states"}
    assert "/leader/joint_states has joints of these names as well" in proposal.text
    robot = Robot.model_validate(filled(content))
    assert robot.actions[0].recorded is not None


def test_a_gripper_behind_an_action_is_recorded_by_its_own_state(tmp_path: Path) -> None:
    """Of an action's messages a bag has only feedback and status."""
    messages = [m for m in recording() if not m.topic.startswith("/gripper_controller")]
    feedback = "control_msgs/action/GripperCommand_FeedbackMessage"
    messages.append(BagMessage("/gripper/gripper_cmd/_action/feedback", feedback, messages[-1].log_ns, b"\0\1\0\0"))
    robot = proposed(tmp_path, bag(tmp_path, messages))
    assert [(o.topic, o.type) for o in robot.outputs][1:] == [
        ("/gripper/gripper_cmd", "control_msgs/action/GripperCommand")
    ]
    recorded = robot.actions[7].recorded
    assert recorded is not None and recorded.topic == "/gripper/joint_states"


def with_joint(name: str, value: Callable[[float], float]) -> Messages:
    """The recording with another joint among the arm's."""
    found = []
    for m in recording():
        if m.topic == "/joint_states":
            t = (m.log_ns - START_NS) / 1e9
            m = replace(m, data=joint_state(m.log_ns, np.append(place(t), value(t)), (*ARM, name)))
        found.append(m)
    return found


@pytest.mark.parametrize("commanded", [True, False])
def test_wheels_beside_an_arm_are_no_degrees(tmp_path: Path, commanded: bool) -> None:
    """A wheel has turned a hundred radians; the arm's joints are in radians all the same."""
    messages = with_joint("left_wheel_joint", lambda t: 50.0 * t)
    if not commanded:
        messages = [m for m in messages if "controller" not in m.topic]
    text = Proposal("", survey_bag(bag(tmp_path, messages)), None, "").text
    assert "deg" not in text


def test_a_joint_that_is_commanded_as_far_as_it_turns_is_not_in_degrees(tmp_path: Path) -> None:
    messages = with_joint("turret", lambda t: 3.0 * t)
    start = messages[0].log_ns
    told = [
        BagMessage(
            "/turret_controller/joint_trajectory",
            TRAJECTORY,
            start + k * 10**8,
            command(np.array([0.3 * k]), ("turret",)),
        )
        for k in range(40)
    ]
    proposal = Proposal("", survey_bag(bag(tmp_path, sorted([*messages, *told], key=lambda m: m.log_ns))), None, "")
    assert "turret" in proposal.text and "unit: deg" not in proposal.text
    assert {"turret: lower", "turret: upper"} <= set(proposal.fill_in)


@pytest.mark.parametrize("known", [False, True])
def test_state_and_commands_in_degrees_do_not_become_radians(tmp_path: Path, known: bool) -> None:
    """A URDF tells them from joints that turn on and on; without one the file is refused until somebody does."""
    messages = [
        replace(m, data=command(np.degrees(decode(m).points[0].positions), ARM)) if m.topic == ARM_TOPIC else m
        for m in recording(degrees=True)
    ]
    proposal = Proposal("", survey_bag(bag(tmp_path, messages)), None, urdf() if known else "")
    arm = yaml.safe_load(proposal.text)
    if known:
        assert all(d["source"]["unit"] == "deg" for d in arm["state"][:7])
        assert all(a["upper"] < 4.0 for a in arm["actions"][:7])
    else:
        beyond = [a["name"] for a in arm["actions"][:7] if a["lower"] == a["upper"] == "FILL IN"]
        assert len(beyond) > 3 and all(d["source"].get("unit") is None for d in arm["state"][:7])
        assert "are state and commands in degrees?" in proposal.text


def test_an_arm_that_is_moved_by_a_twist_has_its_joints_as_state(tmp_path: Path) -> None:
    messages = [m for m in recording() if "controller" not in m.topic]
    start = messages[0].log_ns
    messages += [
        BagMessage("/servo_node/cmd", "geometry_msgs/msg/Twist", start + k * 10**8, twist(0.1 * np.sin(k), 0.0))
        for k in range(40)
    ]
    robot = proposed(tmp_path, bag(tmp_path, sorted(messages, key=lambda m: m.log_ns)))
    assert [d.name for d in robot.state[:7]] == list(ARM) and {a.kind for a in robot.actions} == {"twist"}


@pytest.mark.parametrize("name", SHAPES)
def test_bags_of_many_robots(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their own robot files fit; what is proposed is valid, at the latest once it is filled in."""
    shape = SHAPES[name]()
    path = write_bag(tmp_path / "bag", shape.messages, shape.storage)
    (tmp_path / "true.yaml").write_text(shape.yaml)
    fits = main(["check", str(tmp_path / "true.yaml"), "--bag", str(path)]) == 0
    out = capsys.readouterr().out
    assert fits or (shape.actions == "states" and out.count("->") == out.count("no such topic")), out
    proposal = Proposal("", survey_bag(path), None, "")
    robot = Robot.model_validate(filled(yaml.safe_load(proposal.text)))
    assert robot.actions and robot.state


def test_a_shoulder_that_lifts_turns(tmp_path: Path) -> None:
    names = ("shoulder_pan_joint", "shoulder_lift_joint", "elbow_joint", "wrist_1_joint", "torso_lift_joint")
    text = Proposal("", survey_bag(bag(tmp_path, states(names))), None, "").text
    units = {part["name"]: part["unit"] for part in yaml.safe_load(text)["actions"]}
    assert units == dict.fromkeys(names, "rad") | {"torso_lift_joint": "m"}
    assert text.count("CHECK: metres, by its name") == 1


@pytest.mark.parametrize("by", [0.15, 1.571])
def test_a_jump_between_episodes_is_no_speed(tmp_path: Path, by: float, capsys: pytest.CaptureFixture[str]) -> None:
    messages = recording()
    for i, message in enumerate(messages):
        if message.topic == "/joint_states" and message.log_ns >= START_NS + 2_000_000_000:
            state = decode(message)
            moved = np.array(state.position) + by * (np.arange(7) == 0)
            messages[i] = replace(message, data=joint_state(message.log_ns, moved, list(state.name)))
    robot = proposed(tmp_path, bag(tmp_path, messages))
    assert robot.actions[0].max_velocity == pytest.approx(0.9, abs=0.02)
    line = next(a for a in (tmp_path / "robot.yaml").read_text().splitlines() if "iiwa_joint_1" in a and "max_vel" in a)
    assert "CHECK: 1 jump left out of the speed, as between episodes" in line
    assert "; 8 with limits that are only what was seen" in capsys.readouterr().err


def test_what_was_commanded_is_in_the_range(tmp_path: Path) -> None:
    """The states come only near to where the commands end; and messages that come at once are no speed."""
    messages = [
        replace(m, data=joint_state(m.log_ns, 0.002 + 0.95 * np.array(decode(m).position), list(decode(m).name)))
        if m.topic == "/gripper/joint_states"
        else m
        for m in recording()
    ]
    path = bag(tmp_path, messages)
    robot = proposed(tmp_path, path)
    assert robot.state[7].ends == robot.actions[7].ends == pytest.approx((0.04, 0.0), abs=2e-4)
    assert main(["check", str(tmp_path / "robot.yaml"), "--bag", str(path)]) == 0
