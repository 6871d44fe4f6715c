"""Which frames of a bag become which episodes, and which bags are refused and why."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bad_bags import CASES
from support.lerobot_runs import convert, run
from support.sample_bags import (
    CAMERAS,
    COMMAND_TOPIC,
    INSTRUCTION_TOPIC,
    JOINT_STATE,
    JOINT_TOPIC,
    JOINTS,
    START_NS,
    STRING,
    joint_state,
    jpeg,
    recording,
    text,
    where,
    write_bag,
)

from ki_vla_ros.messages.decoding import BagMessage
from ki_vla_ros.messages.type_names import COMPRESSED_IMAGE
from ki_vla_ros.records import NS_PER_S
from ki_vla_ros.settings.session import BundleIdentity, Session, SessionTopics
from training.data.lerobot.dataset import Dataset

MS = 1_000_000
STATUS = "/sim_arm/status"


# --- where episodes begin


def status(reset: int | None, **more: Any) -> bytes:
    return text(json.dumps({"reset_id": reset, **more}))


def test_markers_cut_where_the_robot_was_moved_and_nothing_from_before_remains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second recording begins 30 ms after the first ends, elsewhere, with the same instruction.

    Its joint states begin later than its images, so that before these there are only the first recording's. The last
    images and the last joint state of the first arrive late.
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


def test_only_a_different_instruction_begins_an_episode(tmp_path: Path) -> None:
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


def test_after_another_instruction_frames_wait_for_a_new_command(tmp_path: Path) -> None:
    """The first one comes 50 ms later, and leads from where the arm was measured then to its point, 100 ms later."""
    other = BagMessage(INSTRUCTION_TOPIC, STRING, START_NS + 1050 * MS, text("touch the blue ball"))
    messages = sorted([*recording(), other], key=lambda message: message.log_ns)
    dataset = convert(tmp_path, messages, actions="commands", fps=20)
    columns = dataset.columns(dataset.episodes[1])
    assert columns["stamp_ns"][0] == START_NS + 1050 * MS
    first_2J = [where(1.09), (where(1.09) + where(1.2)) / 2]  # the newest joint state came at 1.092 s
    np.testing.assert_allclose(columns["action"][:2], first_2J, atol=1e-6)


def test_a_tick_sees_what_arrives_at_its_own_instant(tmp_path: Path) -> None:
    messages = [replace(m, log_ns=m.log_ns - 2 * MS) if m.topic != INSTRUCTION_TOPIC else m for m in recording(1.0)]
    dataset = convert(tmp_path, sorted(messages, key=lambda m: (m.log_ns, m.topic != INSTRUCTION_TOPIC)))
    stamps = dataset.columns(dataset.episodes[0])["stamp_ns"]
    assert ((stamps - START_NS) / 1e8).tolist() == list(range(len(stamps)))


@pytest.mark.parametrize("episodes", ["bag", "instruction"])
def test_hours_without_a_message_make_no_ticks(
    tmp_path: Path, episodes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A joint state logged at time 0, before the clock was set, and a pause of an hour in the middle."""
    stray = BagMessage(JOINT_TOPIC, JOINT_STATE, 0, joint_state(0, where(0.0)))
    later = recording(seconds=1.0, start_ns=START_NS + 3600 * NS_PER_S)
    whole = convert(tmp_path, recording(seconds=1.0), "--episodes", episodes, fps=20)
    capsys.readouterr()
    (tmp_path / "more").mkdir()
    messages = [stray, *recording(seconds=1.0), *later]
    dataset = convert(tmp_path / "more", messages, "--episodes", episodes, fps=20)
    said = capsys.readouterr().out
    assert re.search(r"left out: \d+ x no message in the bag for more than 1 s \(the first: \d+.\d s\)", said)
    assert [episode.length for episode in dataset.episodes] == 2 * [whole.episodes[0].length]


@pytest.mark.parametrize("more", [{"begin_ns": "soon"}, {"begin_ns": 1.5}, {"instruction": 7}])
def test_a_marker_that_says_nonsense_is_left_out(
    tmp_path: Path, more: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    marks = [
        BagMessage(STATUS, STRING, START_NS - 1, status(1, instruction="touch the red cube")),
        BagMessage(STATUS, STRING, START_NS + NS_PER_S // 2, status(2, **more)),
    ]
    dataset = convert(tmp_path, sorted([*recording(seconds=1.0), *marks], key=lambda message: message.log_ns))
    assert len(dataset.episodes) == 1
    assert "left out: 1 x message on /sim_arm/status (the first: marker: expected a text as" in capsys.readouterr().out


def test_a_bag_without_instructions_needs_a_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    messages = [m for m in recording() if m.topic != INSTRUCTION_TOPIC]
    bag = write_bag(tmp_path / "quiet", messages)
    asked = ("from-bag", bag, "--bundle", "demo", "--actions", "states", "--out", tmp_path / "none")
    assert run(*asked) == 2
    assert f"expected instructions on {INSTRUCTION_TOPIC}, found none" in capsys.readouterr().err
    assert convert(tmp_path, messages, "--task", "wipe").tasks == {0: "wipe"}


def session(parameters: dict[str, Any], **topics: Any) -> BagMessage:
    """What a node said at its start, on topics that are the sample bag's but for `topics`."""
    cameras = {name: f"/camera/{name}/image_raw" for name in CAMERAS}
    usual = {"joint_states": JOINT_TOPIC, "instruction": INSTRUCTION_TOPIC, "command": COMMAND_TOPIC}
    said = Session(
        node="/left/policy",
        bundle=BundleIdentity(name="demo", manifest_sha256="0" * 64),
        parameters={"bundle": "demo", **parameters},
        topics=SessionTopics(**{"cameras": cameras, **usual, "chunk": "/c", "tick": "/t", **topics}),
    )
    return BagMessage(said.topic, STRING, START_NS - 1, text(said.text()))


@pytest.mark.parametrize(
    ("arguments", "task", "said"),
    [
        ((), "wipe", "tasks: 'wipe' (19 frames)"),
        (("--task", "wave"), "wave", "--task 'wave' stands in place of 'wipe', which the node's settings say"),
    ],
)
def test_topics_without_messages_count_for_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], task: str, said: str
) -> None:
    """The instruction is that of the session, from the node's parameter file, or the one that is given."""
    messages = [session({"instruction": "wipe"}), *(m for m in recording(1.0) if m.topic != INSTRUCTION_TOPIC)]
    topics = (INSTRUCTION_TOPIC, STATUS, "/dataset/episode", "/other/session", "/camera/scene/image_raw/compressed")
    silent = [(topic, COMPRESSED_IMAGE if "image" in topic else STRING) for topic in topics]
    bag, out = write_bag(tmp_path / "bag", messages, silent=silent), tmp_path / "dataset"
    usual = ("from-bag", bag, "--bundle", "demo", "--actions", "states", "--fps", 20)
    assert run(*usual, "--out", out, *arguments) == 0
    dataset = Dataset(out)
    assert [episode.tasks for episode in dataset.episodes] == [(task,)] and dataset.info.total_frames == 19
    assert said in capsys.readouterr().out
    for cut in (("--episodes", "marker"), ("--episodes", "instruction"), ("--marker", STATUS, "reset_id")):
        assert run(*usual, "--out", tmp_path / "none", *cut) == 2
        assert "found none" in capsys.readouterr().err


def test_until_the_first_instruction_that_of_the_session_is_in_force(tmp_path: Path) -> None:
    messages = [m for m in recording(1.0) if m.topic != INSTRUCTION_TOPIC]
    said = BagMessage(INSTRUCTION_TOPIC, STRING, START_NS + NS_PER_S // 2, text("wave"))
    messages = sorted([session({"instruction": "wipe"}), *messages, said], key=lambda message: message.log_ns)
    dataset = convert(tmp_path, messages, fps=20)
    assert [episode.tasks for episode in dataset.episodes] == [("wipe",), ("wave",)]


def test_a_task_that_loses_to_the_bags_own_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = convert(tmp_path, recording(1.0), "--task", "wave", fps=20)
    frames = dataset.info.total_frames
    said = capsys.readouterr().out
    assert dataset.tasks == {0: "touch the red cube"} and f"tasks: 'touch the red cube' ({frames} frames)" in said
    assert f"--task 'wave' is not that of {frames} frames: the bag has instructions of its own for them" in said


@pytest.mark.parametrize("topic", ["/sim_aloha/status", "/left/status"])
def test_any_status_with_resets_is_a_marker(tmp_path: Path, capsys: pytest.CaptureFixture[str], topic: str) -> None:
    """Other status topics are none, however they begin."""
    marks = [BagMessage(topic, STRING, START_NS + k * NS_PER_S // 2 - 1, status(k)) for k in (0, 1)]
    others = [
        BagMessage(f"/other{k}/status", STRING, START_NS - 2, text(said))
        for k, said in enumerate(("ready", "7", '{"charge": 1}', '["reset_id"]'))
    ]
    messages = sorted([*others, *recording(1.0), *marks], key=lambda message: message.log_ns)
    assert len(convert(tmp_path, messages, fps=20).episodes) == 2
    two = [*marks, BagMessage("/right/status", STRING, START_NS, status(1))]
    bag = write_bag(tmp_path / "two", sorted([*recording(1.0), *two], key=lambda message: message.log_ns))
    capsys.readouterr()
    assert run("from-bag", bag, "--bundle", "demo", "--actions", "states", "--out", tmp_path / "none") == 2
    both = ", ".join(sorted((topic, "/right/status")))
    assert f"markers of episodes on one topic, got {both}; choose" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (("--marker", "/marks", "id"), r"\d+ x message of a bag without a mark on /marks, so that no episode begins"),
        (("--fps", "20", "--least-frames", "100"), "19 x in a piece of fewer than 100 frames"),
    ],
)
def test_where_nothing_is_written_it_is_said_why_and_what_to_try(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], cause: str
) -> None:
    messages = [*recording(1.0), BagMessage("/marks", STRING, START_NS + NS_PER_S, text('{"id": null}'))]
    bag = write_bag(tmp_path / "bag", messages)
    assert run("from-bag", bag, "--bundle", "demo", "--actions", "states", "--out", tmp_path / "out", *arguments) == 2
    captured = capsys.readouterr()
    assert re.search(f"left out: {cause}", captured.out), captured.out
    assert "nothing was written" in captured.err and "take --episodes bag (all of it is one), or name" in captured.out


# --- what a bag must say


def test_a_bag_that_records_its_session_needs_no_parameters(tmp_path: Path) -> None:
    topics = {"scene": "/front/image", "wrist": "/hand/image"}
    others = {"joint_states": "/left/joints", "instruction": "/say", "command": "/go"}
    names = {f"/camera/{camera}/image_raw": topic for camera, topic in topics.items()}
    names |= {JOINT_TOPIC: "/left/joints", INSTRUCTION_TOPIC: "/say", COMMAND_TOPIC: "/go"}
    messages = [replace(m, topic=names[m.topic]) for m in recording()]
    messages.insert(0, session({"max_age_s": 0.3}, cameras=topics, **others))
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
        (("--joint-states", "/arm/joints"), "expected /arm/joints .joint states., got only /arm_controller"),
        (("--camera", "top=/top"), "expected /top .camera 'top'."),
        (
            ("--actions", "commands", "--command", "/go"),
            "expected commands on /go .output 'arm'., got .*or take --actions states",
        ),
        (("--marker", "/marks", "id"), "expected markers of episodes on /marks, found none"),
        (
            ("--episodes", "marker"),
            "expected markers of episodes on a topic .../status with 'reset_id', or on /dataset/episode, found none",
        ),
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
    assert "expected cameras and joints, got neither, as it has no ~/session" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("from-bag", bag, "--bundle", "demo", "--out", tmp_path / "out")
    assert "--actions" in capsys.readouterr().err


def test_a_damaged_image_is_named_where_a_frame_would_have_it_and_the_one_before_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images at 20 Hz, frames at 10: every second image is never decoded. Without the damaged ones, the same frames."""
    messages = recording(transport="compressed")
    images = [m for m in messages if "wrist" in m.topic]
    damaged = [images[i] for i in (4, 8, 9, 14, 15)]
    assert convert(tmp_path / "without", [m for m in messages if m not in damaged]).episodes
    capsys.readouterr()
    broken = [replace(m, data=jpeg(m.log_ns - 2 * MS, b"no image")) if m in damaged else m for m in messages]
    dataset, expected = convert(tmp_path / "with", broken), Dataset(tmp_path / "without/dataset")
    report = capsys.readouterr().out
    assert "4 x message on /camera/wrist/image_raw/compressed" in report and "neither" in report
    (one,), (two,) = dataset.episodes, expected.episodes
    assert (dataset.columns(one)["stamp_ns"] == expected.columns(two)["stamp_ns"]).all() and one.length >= 18
    for camera in ("scene", "wrist"):
        for image, wanted in zip(dataset.images(one, camera), expected.images(two, camera), strict=True):
            np.testing.assert_array_equal(image, wanted)


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
def test_what_is_usable_in_a_bad_bag_is_used_and_its_faults_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str, frames: int | None
) -> None:
    bag, out = CASES[case].make(tmp_path), tmp_path / "dataset"
    result = run("from-bag", bag, "--bundle", "demo", "--actions", "commands", "--out", out)
    captured = capsys.readouterr()
    assert all(re.search(fault, captured.out) for fault in CASES[case].faults), captured.out
    if frames == 0:
        assert result == 2 and captured.err.startswith("convert: ")
        return
    dataset = Dataset(out)
    assert result == 0 and dataset.info.total_frames == (frames or dataset.info.total_frames) > 2
    for episode in dataset.episodes:
        rows = dataset.columns(episode)
        expected = [where((stamp_ns - START_NS) / NS_PER_S) for stamp_ns in rows["stamp_ns"].tolist()]
        if case not in ("a gap of minutes", "stamps go back"):
            np.testing.assert_allclose(rows["observation.state"], expected, atol=1e-7)
        assert len(list(dataset.images(episode, "wrist"))) == episode.length
