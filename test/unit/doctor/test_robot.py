"""The doctor with a robot file and no bundle: a recording of several topics is judged by it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bad_bags import change, with_data
from support.sample_bags import START_NS, Messages, joint_state, write_mcap
from support.unknown_arm import FINGER, FRONT, recording

from ki_vla_ros.doctor.__main__ import main
from ki_vla_ros.records import NS_PER_S
from ki_vla_ros.robot.__main__ import main as robot_main


@pytest.fixture(scope="module")
def robot_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arm")
    bag, out = write_mcap(folder / "bag.mcap", recording()), folder / "robot.yaml"
    assert robot_main(["new", "--from", str(bag), "--out", str(out)]) == 0
    return out


def diagnosed(bag: Path, robot: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, Any]:
    code = main(["--bag", str(bag), "--robot", str(robot), "--json", *more])
    return code, json.loads(capsys.readouterr().out)["findings"]


def test_a_healthy_recording_has_no_errors(
    tmp_path: Path, robot_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, findings = diagnosed(write_mcap(tmp_path / "bag.mcap", recording()), robot_file, capsys)
    assert code == 0 and [f for f in findings if f["level"] == "error"] == []


def in_parts(messages: Messages) -> Messages:
    """The arm's joint states as two messages on one topic, with the same stamp."""
    from ki_vla_ros.messages import decode

    def parts(message: Any) -> list[Any]:
        if message.topic != "/joint_states":
            return [message]
        state = decode(message)
        halves = [(state.position[:3], state.name[:3]), (state.position[3:], state.name[3:])]
        return [with_data(message, joint_state(message.log_ns, np.array(p), list(names))) for p, names in halves]

    return [part for message in messages for part in parts(message)]


def test_parts_that_share_a_topic_and_their_stamps_are_no_fault(
    tmp_path: Path, robot_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    messages = in_parts(recording())
    assert len(messages) > len(recording())
    code, findings = diagnosed(write_mcap(tmp_path / "bag.mcap", messages), robot_file, capsys)
    assert code == 0 and [f for f in findings if f["level"] == "error"] == []


def stamps(shift_ns: int) -> Callable[[int, Any], Any]:
    from ki_vla_ros.messages import decode

    def changed(_k: int, message: Any) -> Any:
        state = decode(message)
        return with_data(message, joint_state(message.log_ns - shift_ns, np.array(state.position), list(state.name)))

    return changed


def teleported(message: Any) -> Any:
    """The arm's first joint is elsewhere from the middle on, as a simulator's reset puts it."""
    from ki_vla_ros.messages import decode

    if message.topic != "/joint_states" or message.log_ns < START_NS + 2 * NS_PER_S:
        return message
    state = decode(message)
    return with_data(message, joint_state(message.log_ns, state.position + 1.571 * (np.arange(7) == 0), state.name))


PLANTS: dict[str, tuple[Callable[[Messages], Messages], str, str, str]] = {
    "the gripper's states stop": (
        change("/gripper/joint_states", lambda k, m: m if k < 20 or k > 120 else None),
        "gap",
        "/gripper/joint_states",
        "gaps longer than",
    ),
    "old stamps of one of two topics": (
        change("/gripper/joint_states", stamps(10**9)),
        "stamps",
        "/gripper/joint_states",
        "old when they arrive",
    ),
    "no gripper": (
        lambda messages: [m for m in messages if m.topic != "/gripper/joint_states"],
        "robot file",
        "robot.yaml:",
        f"state {FINGER}: expected sensor_msgs/msg/JointState on /gripper/joint_states, got no such topic",
    ),
    "lost images": (change(FRONT, lambda k, m: None if k % 7 in (2, 3) else m), "image loss", FRONT, "are missing"),
    "the gripper the other way": (
        lambda _: recording(mirrored=True),
        "robot file",
        "robot.yaml:",
        "open is closed",
    ),
    "two episodes": (
        lambda messages: [teleported(m) for m in messages],
        "jump",
        "iiwa_joint_1",
        "jumps once, by up to 1.",
    ),
    "a broken image": (change(FRONT, lambda k, m: with_data(m, m.data[:60])), "unreadable", FRONT, "were refused"),
}


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_fault_is_found(
    name: str, tmp_path: Path, robot_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_bag, check, where, found = PLANTS[name]
    _, findings = diagnosed(write_mcap(tmp_path / "bag.mcap", of_bag(recording())), robot_file, capsys)
    told = [f for f in findings if f["check"] == check and where in f["where"] and found in f["found"]]
    assert told and all(f["fix"] for f in told), findings


def test_faults_of_the_robot_file_are_findings(
    tmp_path: Path, robot_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bag, path = write_mcap(tmp_path / "bag.mcap", recording(1.0)), tmp_path / "mine.yaml"
    path.write_text(robot_file.read_text().replace("max_velocity: ", "speed: ", 1))
    code, findings = diagnosed(bag, path, capsys)
    line = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if "speed: " in text)
    assert code == 1 and {f["where"] for f in findings} == {f"{path}:{line}"}


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--robot", "nobody"], "expected --bag beside it"),
        (["--robot", "nobody", "--bag", "BAG"], "expected the path of a robot file, or one of aloha"),
        (["--bag", "BAG"], "give --params, --robot, or at least --bundle"),
    ],
)
def test_what_the_doctor_needs_is_named(
    tmp_path: Path, arguments: list[str], fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bag = str(write_mcap(tmp_path / "bag.mcap", recording(1.0)))
    assert main([bag if argument == "BAG" else argument for argument in arguments]) == 2
    assert fault in capsys.readouterr().err
