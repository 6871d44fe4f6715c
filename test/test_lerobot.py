"""Bags -> LeRobot datasets and back: what belongs together, where episodes begin, and what stays the same."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from bad_bags import (
    CAMERAS,
    CASES,
    COMMAND_TOPIC,
    COMPRESSED_IMAGE,
    INSTRUCTION_TOPIC,
    JOINT_TOPIC,
    JOINTS,
    START_NS,
    STRING,
    Messages,
    joint_state,
    jpeg,
    recording,
    text,
    where,
    write_bag,
)

from ki_vla_ros.bag_records import BagMessage
from ki_vla_ros.bags import camera_frame, decode, header_ns, joint_reading, open_bag
from ki_vla_ros.records import NS_PER_S
from ki_vla_ros.session import BundleIdentity, Session, SessionTopics
from training.data.lerobot.__main__ import main
from training.data.lerobot.dataset import Dataset

MS = 1_000_000
STATUS = "/sim_arm/status"


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def convert(tmp_path: Path, messages: Messages, *arguments: object, fps: int = 10, actions: str = "states") -> Dataset:
    bag, out = write_bag(tmp_path / "bag", messages), tmp_path / "dataset"
    more = arguments if "--camera" in arguments or "--bundle" in arguments else ("--bundle", "demo", *arguments)
    assert run("from-bag", bag, "--fps", fps, "--actions", actions, "--out", out, *more) == 0
    return Dataset(out)


def shown(stamp_ns: int) -> int:
    """The grey of the recording's images of this time."""
    return stamp_ns // 10**7 % 251


def test_frames_have_the_images_the_state_and_the_later_state_of_their_stamps(tmp_path: Path) -> None:
    dataset = convert(tmp_path, recording(seconds=1.5))
    (episode,) = dataset.episodes
    columns = dataset.columns(episode)
    since_N = (columns["stamp_ns"] - START_NS) / NS_PER_S
    assert len(since_N) >= 12 and np.allclose(np.diff(since_N), 0.1)
    assert dataset.task_of(columns) == ["touch the red cube"] * episode.length
    for column, later_s in (("observation.state", 0.0), ("action", 0.1)):
        expected = np.array([where(t + later_s) for t in since_N])
        np.testing.assert_allclose(columns[column], expected, atol=1e-7)
    for camera in CAMERAS:
        for stamp_ns, rgb_HWC in zip(columns["stamp_ns"].tolist(), dataset.images(episode, camera), strict=True):
            assert np.abs(rgb_HWC.astype(int) - shown(stamp_ns)).max() <= 3


def test_a_state_between_two_readings_lies_on_the_line_between_them(tmp_path: Path) -> None:
    """The images are stamped 4 ms after a reading."""
    messages = [
        replace(m, data=jpeg(m.log_ns + 2 * MS)) if m.type == COMPRESSED_IMAGE else m
        for m in recording(seconds=1.0, transport="compressed", joint_hz=50.0)
    ]
    dataset = convert(tmp_path, messages)
    columns = dataset.columns(dataset.episodes[0])
    for stamp_ns, state_J in zip(columns["stamp_ns"].tolist(), columns["observation.state"], strict=True):
        before_s = (stamp_ns - START_NS) // (20 * MS) * 0.02
        share = (stamp_ns - START_NS) / NS_PER_S / 0.02 % 1.0
        assert min(abs(share - 0.2), abs(share - 0.7)) < 1e-6
        expected = (1 - share) * where(before_s) + share * where(before_s + 0.02)
        np.testing.assert_allclose(state_J, expected, atol=1e-7)


def test_commanded_actions_are_what_the_controller_was_told_for_one_period_later(tmp_path: Path) -> None:
    """Every tenth of a second the recording commands where to be a tenth of a second later."""
    dataset = convert(tmp_path, recording(seconds=1.5), actions="commands")
    columns = dataset.columns(dataset.episodes[0])
    due_N = (columns["stamp_ns"] - START_NS) / NS_PER_S + 0.1
    knots = np.arange(1, 16) * 0.1
    expected = np.array([[np.interp(t, knots, [where(k)[j] for k in knots]) for j in range(7)] for t in due_N])
    assert np.all(due_N >= 0.1 - 1e-9) and len(due_N) >= 12
    np.testing.assert_allclose(columns["action"], expected, atol=1e-6)


def stepped(messages: Sequence[BagMessage], late_ns: int) -> Messages:
    return [replace(message, log_ns=message.log_ns + late_ns) for message in messages]


def shaken_recording() -> Messages:
    """Compressed, textured images with skew, jitter and delay; two instructions; half a second without one camera."""
    rng, found = np.random.default_rng(3), recording(seconds=4.0, transport="compressed")
    messages = []
    for message in found:
        if message.type == COMPRESSED_IMAGE:
            number = (message.log_ns - START_NS) // (50 * MS)
            if "wrist" in message.topic and 40 <= number < 52:
                continue
            stamp_ns = (
                message.log_ns - 2 * MS + int(rng.integers(-4 * MS, 4 * MS)) + 10 * MS * ("wrist" in message.topic)
            )
            y, x = np.mgrid[0:64, 0:64] / 64.0
            waves = [np.sin(3 * x + number / 5), np.cos(4 * y - number / 7), np.sin(2 * (x + y))]
            picture = (127.5 + 120 * np.stack(waves, axis=-1)).astype(np.uint8)
            content = cv2.imencode(".png", picture)[1].tobytes()
            log_ns = stamp_ns + int(rng.integers(5 * MS, 40 * MS))
            message = replace(message, data=jpeg(stamp_ns, content), log_ns=log_ns)
        messages.append(message)
    messages.append(BagMessage(INSTRUCTION_TOPIC, STRING, START_NS + NS_PER_S, text("point at the blue ball")))
    return sorted(messages, key=lambda message: message.log_ns)


def test_dataset_to_bag_and_back_is_the_same_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = convert(tmp_path, shaken_recording(), "--episodes", "instruction", fps=20, actions="commands")
    report = capsys.readouterr().out
    assert "in 3 episodes" in report and "x no observation (the first: camera" in report
    assert [episode.tasks[0] for episode in first.episodes] == ["touch the red cube"] + 2 * ["point at the blue ball"]
    assert run("to-bag", first.folder, "--out", tmp_path / "back") == 0
    again = ("from-bag", tmp_path / "back", "--bundle", "demo", "--fps", 20, "--actions", "commands")
    assert run(*again, "--out", tmp_path / "second") == 0
    second = Dataset(tmp_path / "second")
    assert second.tasks == first.tasks and second.info == first.info
    for one, two in zip(first.episodes, second.episodes, strict=True):
        mine, theirs = first.columns(one), second.columns(two)
        for name in mine:
            np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)
        for camera in CAMERAS:
            pairs = zip(first.images(one, camera), second.images(two, camera), strict=True)
            errors = [np.mean((a.astype(float) - b) ** 2) for a, b in pairs]
            assert 10 * np.log10(255**2 / max(errors)) > 38.0


def test_bag_of_a_dataset_has_exact_states_stamps_instructions_and_commands(tmp_path: Path) -> None:
    dataset = convert(tmp_path, shaken_recording(), fps=20, actions="commands")
    run("to-bag", dataset.folder, "--out", tmp_path / "back")
    with open_bag(tmp_path / "back") as bag:
        messages = list(bag.messages())
        assert not bag.faults
    rows = [dataset.columns(episode) for episode in dataset.episodes]
    stamps = np.concatenate([row["stamp_ns"] for row in rows])
    readings = [joint_reading(m) for m in messages if m.topic == JOINT_TOPIC]
    assert [reading.stamp_ns for reading in readings] == stamps.tolist() and readings[0].names == JOINTS
    states = np.concatenate([row["observation.state"] for row in rows])
    np.testing.assert_array_equal([reading.position_J for reading in readings], states.astype(np.float64))
    commands = [decode(m) for m in messages if m.topic == COMMAND_TOPIC]
    assert [header_ns(command) for command in commands] == (stamps + 50 * MS).tolist()
    actions = np.concatenate([row["action"] for row in rows])
    np.testing.assert_array_equal([c.points[0].positions for c in commands], actions.astype(np.float64))
    said = [(m.log_ns, decode(m).data) for m in messages if m.topic == INSTRUCTION_TOPIC]
    assert [task for _, task in said] == [episode.tasks[0] for episode in dataset.episodes]
    assert all(abs(log_ns - row["stamp_ns"][0]) <= 50 * MS for (log_ns, _), row in zip(said, rows, strict=True))
    for camera in CAMERAS:
        frames = [camera_frame(m, camera) for m in messages if m.topic == f"/camera/{camera}/image_raw/compressed"]
        assert [frame.stamp_ns for frame in frames] == stamps.tolist()
        videos = [rgb for episode in dataset.episodes for rgb in dataset.images(episode, camera)]
        assert all(np.array_equal(frame.rgb_HWC, rgb) for frame, rgb in zip(frames, videos, strict=True))


# --- where episodes begin


def status(reset: int | None, **more: Any) -> bytes:
    return text(json.dumps({"reset_id": reset, **more}))


def test_markers_cut_where_the_robot_was_moved_and_nothing_of_before_remains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second recording begins 30 ms after the first ends, elsewhere, with the same instruction.

    Its joint states begin later than its images, so that nothing but the first's lie before those; and the first's last
    images and joint state arrive late.
    """
    first = recording(seconds=1.0)
    moved_ns = START_NS + NS_PER_S + 30 * MS
    second = [
        replace(m, data=joint_state(m.log_ns - 2 * MS, where(0.0) + 0.05)) if m.topic == JOINT_TOPIC else m
        for m in recording(seconds=1.0, start_ns=moved_ns)
        if m.topic != JOINT_TOPIC or m.log_ns > moved_ns + 15 * MS
    ]
    late = [replace(m, log_ns=moved_ns + 1) for m in first if m.log_ns == START_NS + 952 * MS]
    assert len(late) == 3
    marks = [
        BagMessage(STATUS, STRING, START_NS - 1, status(1, instruction="touch the red cube")),
        BagMessage(STATUS, STRING, START_NS + NS_PER_S // 2, status(1, success=True)),
        BagMessage(STATUS, STRING, moved_ns - 1, status(2, instruction="touch the red cube")),
    ]
    messages = sorted([*first, *second, *marks, *late], key=lambda message: message.log_ns)
    dataset = convert(tmp_path, messages, fps=20)
    assert len(dataset.episodes) == 2
    one, two = (dataset.columns(episode) for episode in dataset.episodes)
    assert one["stamp_ns"].max() + 50 * MS <= START_NS + NS_PER_S and two["stamp_ns"].min() >= moved_ns
    np.testing.assert_allclose(
        one["action"], [where((t - START_NS) / NS_PER_S + 0.05) for t in one["stamp_ns"].tolist()]
    )
    np.testing.assert_allclose(
        two["observation.state"], np.broadcast_to(where(0.0) + 0.05, two["action"].shape), atol=1e-7
    )
    np.testing.assert_allclose(two["action"], np.broadcast_to(where(0.0) + 0.05, two["action"].shape), atol=1e-7)
    assert "x action after the episode's end" in capsys.readouterr().out


def test_a_repeated_instruction_begins_nothing_but_another_does(tmp_path: Path) -> None:
    repeats = [
        BagMessage(INSTRUCTION_TOPIC, STRING, START_NS + k * 300 * MS, text("touch the red cube")) for k in range(1, 4)
    ]
    other = BagMessage(INSTRUCTION_TOPIC, STRING, START_NS + NS_PER_S, text("touch the blue ball"))
    messages = sorted([*recording(), *repeats, other], key=lambda message: message.log_ns)
    cut = convert(tmp_path / "cut", messages)
    assert [episode.tasks for episode in cut.episodes] == [("touch the red cube",), ("touch the blue ball",)]
    whole = convert(tmp_path / "whole", messages, "--episodes", "bag")
    assert [episode.tasks for episode in whole.episodes] == [("touch the red cube", "touch the blue ball")]
    columns = whole.columns(whole.episodes[0])
    tasks = whole.task_of(columns)
    assert tasks == sorted(tasks, reverse=True) and 8 <= tasks.count("touch the red cube") <= 11


def test_another_instruction_waits_for_a_command_of_its_own(tmp_path: Path) -> None:
    """The first after it, which comes 50 ms later, says nothing about the time before its point in 100 ms."""
    other = BagMessage(INSTRUCTION_TOPIC, STRING, START_NS + 1050 * MS, text("touch the blue ball"))
    messages = sorted([*recording(), other], key=lambda message: message.log_ns)
    dataset = convert(tmp_path, messages, actions="commands", fps=20)
    stamps = dataset.columns(dataset.episodes[1])["stamp_ns"]
    assert stamps[0] == START_NS + 1150 * MS


def test_what_arrives_at_the_instant_of_a_tick_is_there_for_it(tmp_path: Path) -> None:
    messages = [replace(m, log_ns=m.log_ns - 2 * MS) if m.topic != INSTRUCTION_TOPIC else m for m in recording(1.0)]
    dataset = convert(tmp_path, sorted(messages, key=lambda m: (m.log_ns, m.topic != INSTRUCTION_TOPIC)))
    stamps = dataset.columns(dataset.episodes[0])["stamp_ns"]
    assert ((stamps - START_NS) / 1e8).tolist() == list(range(len(stamps)))


def test_a_bag_without_instructions_needs_a_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    messages = [m for m in recording() if m.topic != INSTRUCTION_TOPIC]
    bag = write_bag(tmp_path / "quiet", messages)
    asked = ("from-bag", bag, "--bundle", "demo", "--actions", "states", "--out", tmp_path / "none")
    assert run(*asked) == 2
    assert f"expected instructions on {INSTRUCTION_TOPIC}, found none" in capsys.readouterr().err
    assert convert(tmp_path, messages, "--task", "wipe").tasks == {0: "wipe"}


# --- what is asked of a bag


def test_a_bag_that_says_its_session_needs_no_parameters(tmp_path: Path) -> None:
    topics = {"scene": "/front/image", "wrist": "/hand/image"}
    session = Session(
        node="/left/policy",
        bundle=BundleIdentity(name="demo", manifest_sha256="0" * 64),
        parameters={"bundle": "demo", "max_age_s": 0.3},
        topics=SessionTopics(
            cameras=topics, joint_states="/left/joints", instruction="/say", command="/go", chunk="/c", tick="/t"
        ),
    )
    names = {f"/camera/{camera}/image_raw": topic for camera, topic in topics.items()}
    names |= {JOINT_TOPIC: "/left/joints", INSTRUCTION_TOPIC: "/say", COMMAND_TOPIC: "/go"}
    messages = [replace(m, topic=names[m.topic]) for m in recording()]
    messages.insert(0, BagMessage(session.topic, STRING, START_NS - 1, text(session.text())))
    out = tmp_path / "dataset"
    bag = write_bag(tmp_path / "bag", messages)
    assert run("from-bag", bag, "--actions", "commands", "--out", out) == 0
    source = json.loads((out / "meta/ki_vla_ros.json").read_text())
    assert source["topics"]["cameras"] == topics and source["topics"]["command"] == "/go"
    assert source["max_age_s"] == 0.3 and source["actions"] == "commands"
    assert Dataset(out).info.total_frames > 15


def test_a_robot_without_a_bundle_names_its_cameras_and_joints(tmp_path: Path) -> None:
    chosen = ("--camera", "top=/camera/scene/image_raw", "--joints", "elbow", "gripper", "--robot-type", "one_hand")
    dataset = convert(tmp_path, recording(), *chosen)
    assert dataset.cameras == ("top",) and dataset.info.robot_type == "one_hand"
    assert dataset.info.features["observation.state"].names == ["elbow", "gripper"]
    columns = dataset.columns(dataset.episodes[0])
    since_N = (columns["stamp_ns"] - START_NS) / NS_PER_S
    order = [JOINTS.index("elbow"), JOINTS.index("gripper")]
    np.testing.assert_allclose(columns["observation.state"], [where(t)[order] for t in since_N], atol=1e-7)


def test_several_bags_become_one_dataset(tmp_path: Path) -> None:
    bags = [
        write_bag(tmp_path / name, recording(start_ns=START_NS + k * 100 * NS_PER_S)) for k, name in enumerate("ab")
    ]
    out = tmp_path / "both"
    assert run("from-bag", *bags, "--bundle", "demo", "--actions", "states", "--out", out) == 0
    dataset = Dataset(out)
    assert len(dataset.episodes) == 2 and len(dataset.tasks) == 1
    assert dataset.episodes[1].row["dataset_from_index"] == dataset.episodes[0].length


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--joint-states", "/arm/joints"), "expected /arm/joints .joint states., but it has only /arm_controller"),
        (("--camera", "top=/top"), "expected /top .camera 'top'."),
        (("--actions", "commands", "--command", "/go"), "expected commands on /go, .*or take --actions states"),
        (("--marker", "/marks", "id"), "expected markers of episodes on /marks, found none"),
        (("--episodes", "marker"), "expected markers of episodes on /sim_arm/status, /dataset/episode, found none"),
        (("--episodes", "instruction", "--instruction", "/say"), "expected instructions on /say, found none"),
        (("--node", "/other"), "no parameters for node /other"),
    ],
)
def test_what_the_bag_lacks_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    bag = write_bag(tmp_path / "bag", recording(seconds=0.5))
    usual = ("--params", "config/demo.yaml", "--actions", "states", "--out", tmp_path / "out")
    assert run("from-bag", bag, *usual, *arguments) == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err), captured.err
    assert not (tmp_path / "out").exists()


def test_nothing_is_guessed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bag = write_bag(tmp_path / "bag", recording(seconds=0.5))
    assert run("from-bag", bag, "--actions", "states", "--out", tmp_path / "out") == 2
    assert "expected to be told cameras and joints, as it has no ~/session" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("from-bag", bag, "--bundle", "demo", "--out", tmp_path / "out")
    assert "--actions" in capsys.readouterr().err


def test_messages_that_cannot_be_used_are_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    messages = recording(transport="compressed")
    broken = [i for i, m in enumerate(messages) if "wrist" in m.topic][5]
    messages[broken] = replace(messages[broken], data=jpeg(START_NS, b"no image"))
    dataset = convert(tmp_path, messages)
    report = capsys.readouterr().out
    assert "1 x message on /camera/wrist/image_raw/compressed" in report and "neither" in report
    assert len(dataset.episodes) == 1  # the frame before it was young enough


@pytest.mark.parametrize(
    ("case", "frames"),
    [
        ("good sqlite", 19),
        ("truncated mcap, zstd", 12),
        ("truncated sqlite", None),  # as much as is left of it
        ("a gap of minutes", None),
        ("stamps go back", None),
        ("corrupt jpegs", None),
        ("zero messages", 0),
        ("another serialization", 0),
        ("cut messages", 0),
    ],
)
def test_of_a_bad_bag_what_can_be_used_is_used_and_its_faults_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str, frames: int | None
) -> None:
    bag, out = CASES[case].make(tmp_path), tmp_path / "dataset"
    result = run("from-bag", bag, "--bundle", "demo", "--actions", "commands", "--out", out)
    captured = capsys.readouterr()
    assert all(re.search(fault, captured.out) for fault in CASES[case].faults), captured.out
    if frames == 0:
        assert result == 2 and captured.err.startswith("lerobot: ")
        return
    dataset = Dataset(out)
    assert result == 0 and dataset.info.total_frames == (frames or dataset.info.total_frames) > 2
    for episode in dataset.episodes:
        rows = dataset.columns(episode)
        expected = [where((stamp_ns - START_NS) / NS_PER_S) for stamp_ns in rows["stamp_ns"].tolist()]
        if case not in ("a gap of minutes", "stamps go back"):
            np.testing.assert_allclose(rows["observation.state"], expected, atol=1e-7)
        assert len(list(dataset.images(episode, "wrist"))) == episode.length


# --- datasets of others


def test_a_dataset_that_says_no_stamps_becomes_a_bag_with_its_own_clock(tmp_path: Path) -> None:
    """As LeRobot writes them: no stamps, no file of ours, joint names with a suffix, tasks by an index without name."""
    dataset = convert(tmp_path, shaken_recording(), fps=20)
    (dataset.folder / "meta/ki_vla_ros.json").unlink()
    info = json.loads((dataset.folder / "meta/info.json").read_text())
    del info["features"]["stamp_ns"]
    info["total_videos"] = 2
    (dataset.folder / "meta/info.json").write_text(json.dumps(info))
    path = dataset.folder / "meta/tasks.parquet"
    pq.write_table(pq.ParquetFile(path).read().rename_columns(["task_index", "__index_level_0__"]), path)
    assert run("to-bag", dataset.folder, "--out", tmp_path / "back") == 0
    again = ("from-bag", tmp_path / "back", "--bundle", "demo", "--actions", "commands", "--fps", 20)
    assert run(*again, "--out", tmp_path / "second") == 0
    second = Dataset(tmp_path / "second")
    assert second.tasks == dataset.tasks
    starts = [second.columns(episode)["stamp_ns"] for episode in second.episodes]
    assert all(after[0] - before[-1] >= NS_PER_S for before, after in pairwise(starts))
    for one, two in zip(dataset.episodes, second.episodes, strict=True):
        for name in ("observation.state", "action"):
            np.testing.assert_array_equal(dataset.columns(one)[name], second.columns(two)[name])


def test_a_dataset_of_other_actions_becomes_no_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = convert(tmp_path, recording(seconds=1.0))
    info = json.loads((dataset.folder / "meta/info.json").read_text())
    info["features"]["action"]["names"] = {"motors": ["x", "y", "z", "roll", "pitch", "yaw", "open"]}
    (dataset.folder / "meta/info.json").write_text(json.dumps(info))
    assert run("to-bag", dataset.folder, "--out", tmp_path / "back") == 2
    assert "got x, y, z, roll, pitch, yaw, open: these actions are no joint positions" in capsys.readouterr().err
