"""Each planted fault is found, with its fix; a healthy recording gets no finding. Running nodes: ros/test_doctor.py."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import sample_bags
from support.bad_bags import CASES, change, with_data
from support.bundles import params_file
from support.sample_bags import COMMAND_TOPIC, JOINT_TOPIC, JOINTS, SCENE, Messages, jpeg, recording, write_mcap

from ki_vla_ros.doctor.__main__ import diagnose, main
from ki_vla_ros.doctor.findings import Finding, Findings, as_json, as_table
from ki_vla_ros.doctor.setup import MIB, Machine, Request, SharedMemory, check_shared_memory
from ki_vla_ros.messages.decoding import BagMessage, typestore
from ki_vla_ros.messages.type_names import COMPRESSED_IMAGE
from ki_vla_ros.records import NS_PER_S
from ki_vla_ros.settings.session import BundleIdentity, Session, SessionTopics
from ki_vla_ros.share import find_bundle, find_share

HEALTHY = Machine((3, 11), "2.1.0", {})
WRIST = "/camera/wrist/image_raw"


def examine(
    folder: Path, messages: Messages | None = None, machine: Machine = HEALTHY, bag: Path | None = None, **values: Any
) -> list[Finding]:
    params = params_file(folder, **values)
    if bag is None:
        bag = write_mcap(folder / "bag.mcap", recording(4.0) if messages is None else messages)
    return diagnose(Request(bag=bag, params=params), machine)[0]


def stamped(shift: Callable[[int, int], int]) -> Callable[[int, BagMessage], BagMessage]:
    """Changes the header's stamp: (k, stamp) -> stamp."""

    def changed(k: int, message: BagMessage) -> BagMessage:
        sec, nanosec = struct.unpack_from("<iI", message.data, 4)
        stamp_ns = shift(k, sec * NS_PER_S + nanosec)
        return with_data(
            message, message.data[:4] + struct.pack("<iI", *divmod(stamp_ns, NS_PER_S)) + message.data[12:]
        )

    return changed


def positions(to: Callable[[np.ndarray], np.ndarray], names: tuple[str, ...] = JOINTS) -> Any:
    def changed(_k: int, message: BagMessage) -> BagMessage:
        state = typestore().deserialize_cdr(message.data, message.type)
        stamp_ns = state.header.stamp.sec * NS_PER_S + state.header.stamp.nanosec
        return with_data(message, sample_bags.joint_state(stamp_ns, to(state.position), names))

    return changed


def mirrored_gripper(position_J: np.ndarray) -> np.ndarray:
    return np.append(position_J[:-1], 0.04 - position_J[-1])


@dataclass(frozen=True)
class Plant:
    """`check` and `where` of the finding that must come; further ones may only be about `also`."""

    check: str
    where: str
    fix: str
    bag: Callable[[Messages], Messages] = lambda messages: messages
    parameters: dict[str, Any] = field(default_factory=dict)
    machine: Machine = HEALTHY
    level: str = "error"
    also: tuple[str, ...] = ()
    recorded: dict[str, Any] = field(default_factory=dict)


def machine(python: tuple[int, int] = (3, 12), numpy: str = "1.26.4", **environment: str) -> Machine:
    return Machine(python, numpy, environment)


PLANTS: dict[str, Plant] = {
    "camera topic misspelt": Plant("missing", "/camera/scene/image", "perhaps /camera/scene/image_raw",
        parameters={"cameras": {"scene": {"topic": "camera/scene/image"}}}),
    "only compressed images": Plant("transport", SCENE, "transport to compressed", level="warning",
        recorded={"transport": "compressed"}),
    "compressed images on the raw topic": Plant("transport", SCENE, "cameras.scene.transport: compressed",
        bag=change(SCENE, lambda k, m: with_data(m, jpeg(m.log_ns - NS_PER_S // 500), type=COMPRESSED_IMAGE))),
    "raw images, compressed expected": Plant("transport", SCENE, "cameras.scene.transport: raw",
        parameters={"cameras": {"scene": {"topic": SCENE, "transport": "compressed"}}}),
    "strings on the camera's topic": Plant("type", SCENE, "rename one", also=("bag",),
        bag=change(SCENE, lambda k, m: with_data(m, sample_bags.text("x"), type=sample_bags.STRING) if k % 2 else m)),
    "slow camera": Plant("camera rate", SCENE, "lower rate_hz", level="warning",
        bag=change(SCENE, lambda k, m: m if k % 4 == 0 else None)),
    "lost images": Plant("image loss", SCENE, "FASTDDS_DEFAULT_PROFILES_FILE",
        bag=change(SCENE, lambda k, m: None if k % 7 in (2, 3) else m)),
    "camera skew": Plant("camera skew", f"{WRIST}, {SCENE}", "sync_slop_s", parameters={"sync_slop_s": 0.01},
        bag=change(SCENE, stamped(lambda k, ns: ns - 25_000_000))),
    "camera skew in a tenth of the images": Plant("camera skew", f"{WRIST}, {SCENE}", "raise sync_slop_s to 0.02 or",
        parameters={"sync_slop_s": 0.01}, also=("image loss", "stamps"),
        bag=change(SCENE, stamped(lambda k, ns: ns - (20_000_000 if k % 5 == 0 else 0)))),
    "images rarer than max_age_s": Plant("max age", SCENE, "raise max_age_s to 0.052 or", also=("max age",),
        parameters={"max_age_s": 0.04}),
    "images rarer than their own max_age_s": Plant("max age", SCENE, "raise cameras.scene.max_age_s to 0.052 or",
        parameters={"cameras": {"scene": {"max_age_s": 0.03}}}),
    "joint states rarer than their own max_age_s": Plant("max age", JOINT_TOPIC, "raise joint_max_age_s to 0.012 or",
        parameters={"joint_max_age_s": 0.005}),
    "a fifth of the images too old on arrival": Plant("stamps", SCENE, "raise cameras.scene.max_age_s to 0.202 or",
        parameters={"cameras": {"scene": {"max_age_s": 0.1}}, "sync_slop_s": 0.2},
        also=("image loss",), bag=change(SCENE, stamped(lambda k, ns: ns - (150_000_000 if k % 5 == 0 else 0)))),
    "no stamps": Plant("stamps", SCENE, "use_receive_time", bag=change(SCENE, stamped(lambda k, ns: 0))),
    "stamps in the future": Plant("stamps", SCENE, "chrony", also=("camera skew",),
        bag=change(SCENE, stamped(lambda k, ns: ns + NS_PER_S))),
    "old stamps": Plant("stamps", JOINT_TOPIC, "chrony", bag=change(JOINT_TOPIC, stamped(lambda k, ns: ns - NS_PER_S))),
    "frozen stamps": Plant("stamps", SCENE, "frozen", also=("image loss", "camera skew", "stamps"),
        bag=change(SCENE, stamped(lambda k, ns: ns if k < 40 else sample_bags.START_NS + 2 * NS_PER_S))),
    "stamps go back": Plant("stamps", SCENE, "clock was set", level="warning",
        bag=change(SCENE, stamped(lambda k, ns: ns - (300_000_000 if k > 40 else 0)))),
    "simulated stamps": Plant("clock", JOINT_TOPIC, "use_sim_time", also=("clock",),
        bag=change(JOINT_TOPIC, stamped(lambda k, ns: ns - sample_bags.START_NS))),
    "a gap": Plant("gap", JOINT_TOPIC, "stalled", level="warning",
        bag=change(JOINT_TOPIC, lambda k, m: None if 100 < k < 220 else m)),
    "another robot's joints": Plant("unreadable", JOINT_TOPIC, "joint_states_topic",
        bag=change(JOINT_TOPIC, positions(lambda p: p, ("a", "b", "c", "d", "e", "f", "g")))),
    "a joint twice": Plant("unreadable", JOINT_TOPIC, "one program",
        bag=change(JOINT_TOPIC, positions(lambda p: p, (*JOINTS[:-1], "elbow")))),
    "degrees": Plant("unreadable", JOINT_TOPIC, "radians",
        bag=change(JOINT_TOPIC, positions(np.degrees))),
    "order of names changes": Plant("joint order", JOINT_TOPIC, "one program", level="warning",
        bag=change(JOINT_TOPIC, lambda k, m: positions(lambda p: p[::-1], JOINTS[::-1])(k, m) if k % 2 else m)),
    "slow joint states": Plant("joint rate", JOINT_TOPIC, "joint_state_broadcaster",
        bag=change(JOINT_TOPIC, lambda k, m: m if k % 20 == 0 else None)),
    "limits tighter than the motion": Plant("limits", "elbow", "limits.joints.elbow",
        parameters={"limits": {"joints": {"elbow": {"upper": 1.5}}}}),
    "speed limits tighter than the motion": Plant("limits", "elbow", "velocity_scale", level="warning",
        parameters={"limits": {"joints": {"elbow": {"velocity": 0.1}}}}),
    "a wrong zero": Plant("trained range", "wrist_pitch", "zero", level="warning", also=("direction",),
        bag=change(JOINT_TOPIC, positions(lambda p: p - np.eye(7)[4] * 1.4))),
    "gripper the other way": Plant("direction", "gripper", "sign",
        bag=change(JOINT_TOPIC, positions(mirrored_gripper))),
    "a joint the other way": Plant("direction", "shoulder_pan", "sign",
        bag=change(JOINT_TOPIC, positions(lambda p: p * np.where(np.arange(7) == 0, -1, 1)))),
    "streamed commands": Plant("type", COMMAND_TOPIC, "publish_mode", parameters={"publish_mode": "stream"}),
    "horizon of no whole ticks": Plant("horizon", "execution_horizon_s", "set it to 0.2", level="warning",
        parameters={"execution_horizon_s": 0.17}),
    "horizon longer than the chunk": Plant("parameters", "demo", "does not configure",
        parameters={"execution_horizon_s": 2.0}, also=("horizon",)),
    "watchdog shorter than the horizon": Plant("horizon", "hold_after_s", "raise hold_after_s", level="warning",
        parameters={"hold_after_s": 0.2, "execution_horizon_s": 0.5}),
    "points farther apart than actions": Plant("period", "command_period_s", "set it to 0.05", level="warning",
        parameters={"command_period_s": 0.1}),
    "misspelt parameter": Plant("parameters", "robot.yaml", "explains every parameter", parameters={"rate": 10.0}),
    "an integer for a float": Plant("parameters", "robot.yaml", "does not start", parameters={"rate_hz": 10}),
    "another node's parameters": Plant("node name", "robot.yaml", "correct the name", parameters={"node": "/vla"}),
    "limits without a range": Plant("parameters", "demo", "does not configure",
        parameters={"limits": {"joints": {"elbow": {"lower": 9.0}}}}, also=("limits",)),
    "no such bundle": Plant("bundle", "nowhere", "folder that export wrote", parameters={"bundle": "/nowhere"}),
    "unknown words": Plant("instruction", "instruction", "trained with", parameters={"instruction": "juggle"}),
    "no GPU": Plant("engine", "engine onnx, provider cuda", "install", parameters={"provider": "cuda"}),
    "no such Python": Plant("python", "", "--system-site-packages", machine=machine((3, 11), ROS_DISTRO="jazzy")),
    "numpy 2 under ROS": Plant("numpy", "numpy 2.1.0", "numpy<2", level="warning",
        machine=machine(numpy="2.1.0", ROS_DISTRO="jazzy")),
    "OpenCV 5 beside cv_bridge": Plant("opencv", "OpenCV 5.0.0", "opencv-python-headless<5", level="warning",
        machine=Machine((3, 12), "1.26.4", {}, opencv="5.0.0", cv_bridge=True)),
    "Humble": Plant("ros", "ROS_DISTRO humble", "try the arm's limits", level="warning",
        machine=machine((3, 10), ROS_DISTRO="humble")),
    "another ROS": Plant("ros", "ROS_DISTRO foxy", "use one of them", level="warning",
        machine=machine((3, 8), ROS_DISTRO="foxy"), also=("python",)),
    "profile is not there": Plant("fast dds", "FASTDDS_DEFAULT_PROFILES_FILE=/no/file", "fastdds.xml",
        machine=machine(FASTDDS_DEFAULT_PROFILES_FILE="/no/file")),
    "mixed encodings": Plant("encoding", SCENE, "colours", level="warning",
        bag=change(SCENE, lambda k, m: with_data(m, sample_bags.image(m.log_ns - 2_000_000, ("rgb8", "bgr8")[k % 2])))),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_fault_is_found(name: str, tmp_path: Path) -> None:
    plant = PLANTS[name]
    messages = plant.bag(recording(4.0, **plant.recorded))
    findings = examine(tmp_path, messages, plant.machine, **plant.parameters)
    found = [f for f in findings if f.check == plant.check and plant.where in f.where]
    assert found, findings
    assert any(f.level == plant.level and plant.fix in f.fix for f in found), found
    assert {f.check for f in findings} <= {plant.check, *plant.also}, findings
    assert "Traceback" not in as_table(findings, [])


def test_stamps_of_another_clock_are_told_with_their_sign(tmp_path: Path) -> None:
    for shift_ns, sign in ((NS_PER_S - sample_bags.START_NS, "-"), (10_000 * NS_PER_S, "+")):
        shifted = change(SCENE, stamped(lambda k, ns, shift_ns=shift_ns: ns + shift_ns))(recording(1.0))
        (found,) = [f.found for f in examine(tmp_path, shifted) if f.check == "clock"]
        assert found.startswith(f"stamps are {sign}{abs(shift_ns) // NS_PER_S} s from the time of arrival")


def test_a_joint_that_turns_without_end_may_pass_pi(tmp_path: Path) -> None:
    """Driver and commands give angles from -pi to pi."""
    roll_J = np.eye(len(JOINTS))[3]

    def turn(position_J: np.ndarray) -> np.ndarray:
        return position_J + roll_J * (3.1 + 3.0 * position_J[3])

    def wrap(position_J: np.ndarray) -> np.ndarray:
        return np.where(roll_J > 0.0, np.mod(turn(position_J) + np.pi, 2 * np.pi) - np.pi, position_J)

    def command(_k: int, message: BagMessage) -> BagMessage:
        point = typestore().deserialize_cdr(message.data, message.type).points[0]
        return with_data(message, sample_bags.command(wrap(point.positions)))

    messages = change(COMMAND_TOPIC, command)(change(JOINT_TOPIC, positions(wrap))(recording(4.0)))
    urdf = '<robot name="r"><joint name="forearm_roll" type="continuous"/></robot>'
    found = examine(tmp_path, messages, robot_description=urdf)
    assert {(finding.check, finding.where) for finding in found} <= {
        ("limits", "forearm_roll"),
        ("trained range", "forearm_roll"),
    }
    assert {finding.check for finding in examine(tmp_path, messages)} >= {"unreadable"}


def with_wheels(messages: Messages) -> Messages:
    """After each joint state one of the base below the arm, which another node publishes."""
    wheels = positions(lambda p: np.array([400.0, -400.0]), ("wheel_left", "wheel_right"))
    both = [(m, with_data(wheels(0, m), wheels(0, m).data, log_ns=m.log_ns + 1)) for m in messages if is_state(m)]
    return sorted([*[m for m in messages if not is_state(m)], *[m for pair in both for m in pair]], key=at)


def is_state(message: BagMessage) -> bool:
    return message.topic == JOINT_TOPIC


def at(message: BagMessage) -> int:
    return message.log_ns


def test_joints_beside_the_arms_are_no_error(tmp_path: Path) -> None:
    """Wheels in the arm's messages, and in messages of their own."""
    whole = positions(lambda p: np.append(p, [400.0, -400.0]), (*JOINTS, "wheel_left", "wheel_right"))
    assert examine(tmp_path, change(JOINT_TOPIC, whole)(recording(4.0))) == []
    (finding,) = examine(tmp_path, with_wheels(recording(4.0)))
    assert (finding.level, finding.check, finding.where) == ("warning", "other joints", JOINT_TOPIC)
    assert "400 of 800 messages have none of the bundle's joints, but wheel_left, wheel_right" in finding.found


def test_refused_messages_among_usable_ones_are_a_warning(tmp_path: Path) -> None:
    """The node goes by the others: it holds only when the last usable one is too old."""
    degrees = positions(np.degrees)
    some = change(JOINT_TOPIC, lambda k, m: degrees(k, m) if k % 5 == 0 else m)(recording(4.0))
    assert {(f.level, f.check) for f in examine(tmp_path, some)} == {("warning", "unreadable")}
    burst = change(JOINT_TOPIC, lambda k, m: degrees(k, m) if 100 < k < 160 else m)(recording(4.0))
    assert ("error", "unreadable") in [(f.level, f.check) for f in examine(tmp_path, burst)]


def test_pauses_between_episodes_are_no_lost_images(tmp_path: Path) -> None:
    episodes = [recording(2.0, start_ns=sample_bags.START_NS + k * 14 * NS_PER_S // 5, fps=10.0) for k in range(8)]
    findings = examine(tmp_path, [message for episode in episodes for message in episode], rate_hz=9.0)
    assert "image loss" not in {f.check for f in findings} and "gap" in {f.check for f in findings}


def test_inputs_are_examined_without_a_bundle(tmp_path: Path) -> None:
    cameras = {"scene": {"topic": SCENE}, "wrist": {"topic": "/nowhere"}, "front": {"transport": "compressed"}}
    findings = examine(tmp_path, bundle="/not/there", cameras=cameras)
    assert {(f.check, f.where) for f in findings} == {
        ("bundle", "/not/there"), ("missing", "/nowhere"), ("missing", "/camera/front/image_raw/compressed"),
    }  # fmt: skip
    old = change(SCENE, stamped(lambda k, ns: ns - NS_PER_S))(recording(4.0))
    findings = examine(tmp_path, old, bundle="/not/there", cameras={"scene": {"topic": SCENE}})
    assert {(f.check, f.where) for f in findings} == {("bundle", "/not/there"), ("stamps", SCENE)}
    slow = change(JOINT_TOPIC, lambda k, m: m if k % 20 == 0 else None)(recording(4.0))
    assert {f.check for f in examine(tmp_path, slow, bundle="/not/there")} == {"bundle", "joint rate"}


def test_a_build_from_source_has_the_python_that_it_was_built_with(tmp_path: Path) -> None:
    here = machine((3, 13), "2.3.0", ROS_DISTRO="jazzy")
    assert [f.check for f in examine(tmp_path, machine=here)] == ["python", "numpy"]
    assert examine(tmp_path, machine=replace(here, rclpy_fits=True)) == []
    # The release's own Python with another numpy than its modules were compiled with.
    mixed = replace(machine((3, 12), "2.3.0", ROS_DISTRO="jazzy"), rclpy_fits=True)
    assert [f.check for f in examine(tmp_path, machine=mixed)] == ["numpy"]


@pytest.mark.parametrize(
    ("total", "free", "told"),
    [
        (64, 64, "has 64 MiB, 64 of them free; each process with this profile takes 34: enough for 1 of them"),
        (64, 10, "enough for 1 of them"),
        (136, 136, ""),
        (
            8192,
            30,
            "8192 MiB, 30 of them free; each process with this profile takes 34: the next process gets none",
        ),
        (8192, 34, ""),
    ],
)
def test_shared_memory_that_is_too_small_for_the_profile(total: int, free: int, told: str) -> None:
    profile = {"FASTRTPS_DEFAULT_PROFILES_FILE": str(find_share("config/fastdds.xml"))}
    here = Machine((3, 12), "1.26.4", profile, shared_memory=SharedMemory(total * MIB, free * MIB))
    findings = Findings()
    check_shared_memory(here, findings)
    assert [f.check for f in findings] == (["shared memory"] if told else [])
    assert all(told in f.found and f.fix for f in findings)
    if "enough for" in told:
        assert "--shm-size=200m" in findings[0].fix
    for environment in ({}, {**profile, "RMW_IMPLEMENTATION": "rmw_cyclonedds_cpp"}):
        check_shared_memory(replace(here, environment=environment), none := Findings())
        assert none == []


@pytest.mark.parametrize("own_s, found", [(0.0, {JOINT_TOPIC}), (0.4, set())])
def test_an_inputs_own_limit_replaces_the_common_one(own_s: float, found: set[str], tmp_path: Path) -> None:
    cameras = {name: {"max_age_s": 0.4} for name in sample_bags.CAMERAS}
    slow = change(JOINT_TOPIC, lambda k, m: m if k % 5 == 0 else None)(recording(4.0))
    findings = examine(tmp_path, slow, max_age_s=0.04, cameras=cameras, joint_max_age_s=own_s)
    assert {f.where for f in findings if f.check == "max age"} == found


def test_all_mistakes_in_the_parameters_are_found_at_once(tmp_path: Path) -> None:
    wrong = {"rate": 5.0, "engin": "onnx", "max_age_s": 99.0, "executor": "rct", "threads": 1.5}
    findings = examine(tmp_path, **wrong)
    assert len(findings) == len(wrong) and {f.check for f in findings} == {"parameters"}
    said = "\n".join(f.found for f in findings)
    assert all(f"parameter '{name}': " in said for name in wrong), said
    assert "did you mean 'rate_hz'?" in said and "did you mean 'engine'?" in said


def test_everything_that_does_not_fit_the_bundle_is_found_at_once(tmp_path: Path) -> None:
    findings = examine(tmp_path, cameras={"front": {"topic": "/front"}}, limits={"joints": {"knee": {"upper": 1.0}}})
    assert [f.check for f in findings] == ["parameters"] * 2
    assert "cameras.front" in findings[0].found and "limits.joints.knee" in findings[1].found


def test_where_a_camera_is_missing_the_image_topics_are_listed(tmp_path: Path) -> None:
    (finding,) = examine(tmp_path, cameras={"scene": {"topic": "/front/color/image_raw"}})
    assert finding.check == "missing" and finding.where == "/front/color/image_raw"
    assert finding.found.endswith(f"image topics present: {SCENE}, {WRIST}")
    only_joints = [message for message in recording(4.0) if message.type != sample_bags.IMAGE]
    missing = examine(tmp_path, only_joints)
    assert [f.found.endswith("image topics present: none") for f in missing] == [True, True]


def test_a_healthy_recording_gets_no_finding(tmp_path: Path) -> None:
    assert examine(tmp_path) == []
    bag = write_mcap(tmp_path / "other.mcap", recording(4.0, transport="compressed"))
    compressed = {n: {"transport": "compressed"} for n in sample_bags.CAMERAS}
    assert examine(tmp_path, bag=bag, cameras=compressed) == []


def test_images_that_the_recorder_compressed_are_not_a_fault(tmp_path: Path) -> None:
    """If there are chunks, the node had its images."""
    messages = recording(4.0, transport="compressed")
    chunk = BagMessage(
        "/policy/chunk", sample_bags.TRAJECTORY, messages[-1].log_ns, sample_bags.command(sample_bags.MIDDLE_J)
    )
    assert examine(tmp_path, [*messages, chunk]) == []


# What the doctor says about bad bags that can be read completely.
JUDGED = {
    "zero messages": "missing",
    "missing topics": "missing",
    "other types": "type",
    "stamps go back": "stamps",
    "a gap of minutes": "gap",
    "corrupt jpegs": "unreadable",
    "cut jpegs": "unreadable",
    "mixed encodings": "encoding",
    "cut messages": "unreadable",
}


@pytest.mark.parametrize("name", CASES)
def test_no_bag_makes_the_doctor_fail(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bag = CASES[name].make(tmp_path)
    transport = "compressed" if "jpegs" in name else "raw"
    params = params_file(tmp_path, cameras={camera: {"transport": transport} for camera in sample_bags.CAMERAS})
    checks = {finding.check for finding in diagnose(Request(bag=bag, params=params), HEALTHY)[0]}
    assert ("bag" in checks) == bool(CASES[name].faults)
    if name in JUDGED:
        assert JUDGED[name] in checks
    elif not CASES[name].faults:
        assert not checks
    assert main(["--bag", str(bag), "--params", str(params)]) in (0, 1)
    assert "Traceback" not in "".join(capsys.readouterr())


def test_parameters_and_topics_come_from_the_session_in_the_bag(tmp_path: Path) -> None:
    cameras = {name: f"/robot/{name}" for name in sample_bags.CAMERAS}
    topics = SessionTopics(
        cameras=cameras,
        joint_states=JOINT_TOPIC,
        instruction=sample_bags.INSTRUCTION_TOPIC,
        command=COMMAND_TOPIC,
        chunk="/policy/chunk",
        tick="/policy/tick",
    )
    session = Session(
        node="/policy",
        bundle=BundleIdentity(name="demo", manifest_sha256="0" * 64),
        parameters={"bundle": "demo", "execution_horizon_s": 0.17},
        topics=topics,
    )
    renamed = {f"/camera/{name}/image_raw": topic for name, topic in cameras.items()}
    messages = [replace(m, topic=renamed.get(m.topic, m.topic)) for m in recording(4.0)]
    said = BagMessage("/policy/session", sample_bags.STRING, sample_bags.START_NS, sample_bags.text(session.text()))
    bag = write_mcap(tmp_path / "b.mcap", [said, *messages])
    findings, looked_at = diagnose(Request(bag=bag), HEALTHY)
    assert [f.check for f in findings] == ["horizon"] and "parameters as recorded" in looked_at
    findings, _ = diagnose(Request(bag=bag, params=params_file(tmp_path)), HEALTHY)
    assert {f.where for f in findings if f.check == "missing"} == set(renamed)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROS_DISTRO", raising=False)
    bag = str(write_mcap(tmp_path / "b.mcap", recording(4.0)))
    assert main(["--bag", bag, "--params", str(find_share("config/demo.yaml"))]) == 0
    assert "no faults found" in capsys.readouterr().out
    assert main(["--bag", bag, "--params", str(params_file(tmp_path, execution_horizon_s=0.17))]) == 0
    assert "0 errors, 1 warning" in capsys.readouterr().out
    assert main(["--bag", bag, "--params", str(params_file(tmp_path, provider="cuda")), "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["errors"] == 1 and printed["findings"][0]["check"] == "engine"
    assert main(["--bag", bag]) == 2
    assert "has no /policy/session; give --params" in capsys.readouterr().err
    assert main(["--bag", str(tmp_path / "nowhere")]) == 2
    assert main(["--bag", bag, "--node", "policy"]) == 2


def test_a_changed_bundle_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    shutil.copytree(find_bundle("demo"), folder)
    (folder / "tokenizer.json").write_text("{}")
    (finding,) = examine(tmp_path, bundle=str(folder))
    assert finding.check == "bundle" and "tokenizer.json" in finding.found


def test_a_small_profile_is_found(tmp_path: Path) -> None:
    profile = find_share("config/fastdds.xml").read_text()
    for text, found in (
        (profile, 0),
        (profile.replace("33554432", "524288"), 1),
        (profile.replace("33554432", "32M"), 1),
        ("<dds", 1),
    ):
        (tmp_path / "dds.xml").write_text(text)
        here = replace(HEALTHY, environment={"FASTDDS_DEFAULT_PROFILES_FILE": str(tmp_path / "dds.xml")})
        assert [f.check for f in examine(tmp_path, machine=here)] == ["fast dds"] * found


def test_findings_are_ordered_and_printed() -> None:
    findings = [Finding("warning", "a", "there", "small", "do b"), Finding("error", "c", "here", "large " * 40, "do d")]
    table = as_table(findings, ["a bag"])
    assert table.index("error") < table.index("warning") and "-> do d" in table
    assert max(map(len, table.splitlines())) <= 110
    assert [f["check"] for f in as_json(findings, [])["findings"]] == ["c", "a"]


def test_a_parameter_file_that_is_not_there_is_no_finding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bag = str(write_mcap(tmp_path / "bag.mcap", recording(1.0)))
    assert main(["--bag", bag, "--params", str(tmp_path / "none.yaml")]) == 2
    assert "expected a parameter file, got" in capsys.readouterr().err
