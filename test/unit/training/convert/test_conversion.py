"""From bags to LeRobot datasets and back: what belongs together, and what stays the same."""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from support.lerobot_runs import convert, run
from support.sample_bags import (
    CAMERAS,
    COMMAND_TOPIC,
    INSTRUCTION_TOPIC,
    JOINT_TOPIC,
    JOINTS,
    START_NS,
    STRING,
    TRAJECTORY,
    Messages,
    jpeg,
    recording,
    serialize,
    text,
    where,
    write_bag,
)

from ki_vla_ros.bags.bag import open_bag
from ki_vla_ros.messages.decoding import BagMessage, camera_frame, decode, joint_reading
from ki_vla_ros.messages.type_names import COMPRESSED_IMAGE
from ki_vla_ros.records import NS_PER_S, header_ns
from training.convert.messages import trajectory
from training.data.lerobot.dataset import Dataset

MS = 1_000_000


def shown(stamp_ns: int) -> int:
    """The grey of the recording's images at this time."""
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
    for stamp_ns, state_S in zip(columns["stamp_ns"].tolist(), columns["observation.state"], strict=True):
        before_s = (stamp_ns - START_NS) // (20 * MS) * 0.02
        share = (stamp_ns - START_NS) / NS_PER_S / 0.02 % 1.0
        assert min(abs(share - 0.2), abs(share - 0.7)) < 1e-6
        expected = (1 - share) * where(before_s) + share * where(before_s + 0.02)
        np.testing.assert_allclose(state_S, expected, atol=1e-7)


def test_commanded_actions_are_what_the_controller_was_told_for_one_period_later(tmp_path: Path) -> None:
    """Every tenth of a second, the recording commands where to be a tenth of a second later."""
    dataset = convert(tmp_path, recording(seconds=1.5), actions="commands")
    columns = dataset.columns(dataset.episodes[0])
    due_N = (columns["stamp_ns"] - START_NS) / NS_PER_S + 0.1
    knots = np.arange(1, 16) * 0.1
    expected = np.array([[np.interp(t, knots, [where(k)[j] for k in knots]) for j in range(7)] for t in due_N])
    assert np.all(due_N >= 0.1 - 1e-9) and len(due_N) >= 12
    np.testing.assert_allclose(columns["action"], expected, atol=1e-6)


def stepped(messages: Sequence[BagMessage], late_ns: int) -> Messages:
    return [replace(message, log_ns=message.log_ns + late_ns) for message in messages]


def shaken_recording(longest_ms: int = 40) -> Messages:
    """Compressed, textured images with skew, jitter and delay; two instructions; half a second without one camera.

    `longest_ms` is the longest time from an image's stamp to its arrival.
    """
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
            log_ns = stamp_ns + int(rng.integers(5 * MS, longest_ms * MS))
            message = replace(message, data=jpeg(stamp_ns, content), log_ns=log_ns)
        messages.append(message)
    messages.append(BagMessage(INSTRUCTION_TOPIC, STRING, START_NS + NS_PER_S, text("point at the blue ball")))
    return sorted(messages, key=lambda message: message.log_ns)


def test_recorded_jpegs_are_kept_as_they_are_and_read_as_the_node_reads_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of an odd size, which H.264 in yuv420p cannot have."""
    noise_HWC = np.random.default_rng(0).integers(0, 256, (45, 63, 3), dtype=np.uint8)

    def picture(stamp_ns: int, shape: str) -> bytes:
        found = cv2.imencode(shape, np.roll(noise_HWC, stamp_ns // 10**7, axis=1))[1]
        return jpeg(stamp_ns, found.tobytes())

    def shaped(wrist: str) -> Messages:
        shapes = {"/camera/scene/image_raw/compressed": ".jpg", "/camera/wrist/image_raw/compressed": wrist}
        found = recording(seconds=1.0, transport="compressed")
        return [replace(m, data=picture(m.log_ns, shapes[m.topic])) if m.topic in shapes else m for m in found]

    messages = shaped(".jpg")
    dataset = convert(tmp_path, messages, "--video", "jpeg")
    (episode,) = dataset.episodes
    feature = dataset.info.features["observation.images.scene"]
    assert feature.info is not None and feature.shape == (45, 63, 3)
    assert (feature.info["video.codec"], feature.info["video.pix_fmt"]) == ("mjpeg", "yuvj420p")
    seen = {m.log_ns: camera_frame(m, "scene").rgb_HWC for m in messages if "scene" in m.topic}
    stamps = dataset.columns(episode)["stamp_ns"].tolist()
    for stamp_ns, rgb_HWC in zip(stamps, dataset.images(episode, "scene"), strict=True):
        np.testing.assert_array_equal(rgb_HWC, seen[stamp_ns])
    capsys.readouterr()
    bag = write_bag(tmp_path / "mixed", shaped(".png"))
    more = ("--bundle", "demo", "--actions", "states", "--video", "jpeg", "--out", tmp_path / "out")
    assert run("from-bag", bag, *more) == 2
    told = f"convert: bag {bag}: observation.images.wrist: expected images recorded as JPEG, to keep them as they are"
    assert told in capsys.readouterr().err


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


def test_actions_survive_the_way_back_where_images_arrived_late(tmp_path: Path) -> None:
    """Some frames arrived when their own action was already due."""
    first = convert(tmp_path, shaken_recording(longest_ms=120), "--episodes", "bag", fps=20, actions="commands")
    assert run("to-bag", first.folder, "--out", tmp_path / "back") == 0
    again = ("from-bag", tmp_path / "back", "--bundle", "demo", "--fps", 20, "--actions", "commands")
    assert run(*again, "--out", tmp_path / "second") == 0
    second = Dataset(tmp_path / "second")
    assert [episode.length for episode in second.episodes] == [episode.length for episode in first.episodes]
    for one, two in zip(first.episodes, second.episodes, strict=True):
        for name in ("stamp_ns", "action"):
            np.testing.assert_array_equal(first.columns(one)[name], second.columns(two)[name])


@pytest.mark.slow
def test_actions_survive_the_way_back_where_one_episode_follows_the_other_at_once(tmp_path: Path) -> None:
    """The first action of an episode may be due before the last tick of the one before, counted from its first."""
    names = ("touch the red cube", "point at the blue ball")
    said = [BagMessage(INSTRUCTION_TOPIC, STRING, START_NS + 310 * k * MS, text(names[k % 2])) for k in range(1, 12)]
    # A command every 20 ms, in force at once, so that there is one as soon as an episode begins.
    told = [
        BagMessage(COMMAND_TOPIC, TRAJECTORY, at_ns, serialize(trajectory(at_ns, JOINTS, where(0.02 * k)), TRAJECTORY))
        for k in range(200)
        if (at_ns := START_NS + 20 * k * MS)
    ]
    others = [m for m in shaken_recording(longest_ms=15) if m.topic not in (INSTRUCTION_TOPIC, COMMAND_TOPIC)]
    messages = sorted([*others, *said, *told], key=lambda message: message.log_ns)
    first = convert(tmp_path, messages, "--episodes", "instruction", fps=20, actions="commands")
    assert len(first.episodes) > 8
    assert run("to-bag", first.folder, "--out", tmp_path / "back") == 0
    again = ("from-bag", tmp_path / "back", "--bundle", "demo", "--fps", 20, "--actions", "commands")
    assert run(*again, "--out", tmp_path / "second") == 0
    second = Dataset(tmp_path / "second")
    assert [episode.length for episode in second.episodes] == [episode.length for episode in first.episodes]
    for one, two in zip(first.episodes, second.episodes, strict=True):
        for name in ("stamp_ns", "action"):
            np.testing.assert_array_equal(first.columns(one)[name], second.columns(two)[name])


def test_episodes_go_into_a_bag_by_time_and_may_not_overlap(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    later = recording(seconds=1.0, start_ns=START_NS + 100 * NS_PER_S)
    bags = {
        "later": write_bag(tmp_path / "later", later),
        "sooner": write_bag(tmp_path / "sooner", recording(seconds=1.0)),
        "meanwhile": write_bag(tmp_path / "meanwhile", recording(seconds=1.0, start_ns=START_NS + NS_PER_S // 2)),
    }
    for out, chosen in (("both", ("later", "sooner")), ("parallel", ("sooner", "meanwhile"))):
        given = (*(bags[name] for name in chosen), "--bundle", "demo", "--actions", "states", "--fps", 20)
        assert run("from-bag", *given, "--out", tmp_path / out) == 0
    first = Dataset(tmp_path / "both")
    assert run("to-bag", first.folder, "--out", tmp_path / "back") == 0
    again = ("from-bag", tmp_path / "back", "--bundle", "demo", "--fps", 20, "--actions", "commands")
    assert run(*again, "--out", tmp_path / "second") == 0
    second = Dataset(tmp_path / "second")
    for one, two in zip(first.episodes, reversed(second.episodes), strict=True):
        for name in ("stamp_ns", "action", "observation.state"):
            np.testing.assert_array_equal(first.columns(one)[name], second.columns(two)[name])
    capsys.readouterr()
    assert run("to-bag", tmp_path / "parallel", "--out", tmp_path / "none") == 2
    said = capsys.readouterr().err
    assert re.search(r"got episode 1, which begins 0\.\d+ s before the end of episode 0; convert the bags", said), said
    assert not (tmp_path / "none").exists()


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


# --- a disk that fills up


def test_a_disk_that_fills_up_ends_in_a_valid_dataset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = iter([*[500 << 20] * 12, *[99 << 20] * 99])  # two calls before the first frame, then one a frame

    def usage(_: Path) -> SimpleNamespace:
        return SimpleNamespace(free=next(free))

    monkeypatch.setattr(shutil, "disk_usage", usage)
    bag, out = write_bag(tmp_path / "bag", recording(seconds=1.5)), tmp_path / "dataset"
    given = ("from-bag", bag, "--actions", "states", "--bundle", "demo", "--fps", 20, "--out")
    assert run(*given, out) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said == (
        f"convert: dataset {out}: expected 256 MiB free on its disk, to end the dataset in order, got 99; "
        "what was added before is a valid dataset; make room or choose another --out"
    )
    dataset = Dataset(out)
    assert dataset.info.total_frames == 10
    assert [len(list(dataset.images(dataset.episodes[0], camera))) for camera in CAMERAS] == [10, 10]
    assert run(*given, tmp_path / "other") == 2
    assert "got 99; make room or choose another --out" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_place_that_is_no_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    bag = write_bag(tmp_path / "bag", recording(seconds=0.5))
    assert run("from-bag", bag, "--actions", "states", "--bundle", "demo", "--out", tmp_path / "file" / "x") == 2
    (said,) = capsys.readouterr().err.splitlines()
    told = f"dataset {tmp_path / 'file' / 'x'}: expected a folder at {tmp_path / 'file'}, got a file"
    assert said == f"convert: {told}; choose another --out"


# --- datasets that others made


def test_a_dataset_without_stamps_becomes_a_bag_with_its_own_clock(tmp_path: Path) -> None:
    """As LeRobot writes them: no stamps, no file of ours, tasks by an index without a name."""
    dataset = convert(tmp_path, shaken_recording(), fps=20)
    (dataset.folder / "meta/ki_vla_ros.json").unlink()
    info = json.loads((dataset.folder / "meta/info.json").read_text())
    del info["features"]["stamp_ns"]
    info["total_videos"] = 2
    (dataset.folder / "meta/info.json").write_text(json.dumps(info))
    path = dataset.folder / "meta/tasks.parquet"
    pq.write_table(pq.ParquetFile(path).read().rename_columns(["task_index", "__index_level_0__"]), path)
    assert run("to-bag", dataset.folder, "--out", tmp_path / "back", "--robot", "demo_arm") == 0
    again = ("from-bag", tmp_path / "back", "--bundle", "demo", "--actions", "commands", "--fps", 20)
    assert run(*again, "--out", tmp_path / "second") == 0
    second = Dataset(tmp_path / "second")
    assert second.tasks == dataset.tasks
    starts = [second.columns(episode)["stamp_ns"] for episode in second.episodes]
    assert all(after[0] - before[-1] >= NS_PER_S for before, after in pairwise(starts))
    for one, two in zip(dataset.episodes, second.episodes, strict=True):
        for name in ("observation.state", "action"):
            np.testing.assert_array_equal(dataset.columns(one)[name], second.columns(two)[name])


def test_a_dataset_whose_actions_are_not_joint_positions_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = convert(tmp_path, recording(seconds=1.0))
    info = json.loads((dataset.folder / "meta/info.json").read_text())
    info["features"]["action"]["names"] = {"motors": ["shoulder_pan", "y", "z", "roll", "pitch", "yaw", "open"]}
    (dataset.folder / "meta/info.json").write_text(json.dumps(info))
    assert run("to-bag", dataset.folder, "--out", tmp_path / "back", "--robot", "demo_arm") == 2
    said = capsys.readouterr().err
    assert "robot file: 'shoulder_lift': dataset.name: expected one of the names of action (shoulder_pan, y, " in said
    assert not (tmp_path / "back").exists()
