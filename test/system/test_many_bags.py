"""Many bags into one dataset: several at a time, one that fails, one that changes, and conversions that are stopped."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from support import ROOT
from support.lerobot_runs import kill_at, run
from support.sample_bags import START_NS, Messages, jpeg, recording, text, write_bag

from ki_vla_ros.messages.type_names import COMPRESSED_IMAGE
from ki_vla_ros.records import NS_PER_S
from training.convert import __main__ as command
from training.convert import many
from training.convert.episodes import Frame
from training.convert.writer import DatasetWriter
from training.data.lerobot.dataset import Dataset

GIVEN = ("--bundle", "demo", "--actions", "states")


def told(seconds: float, number: int, task: str = "touch the red cube") -> Messages:
    messages = recording(seconds, START_NS + number * 100 * NS_PER_S, "compressed")
    return [replace(m, data=text(task)) if m.topic == "/policy/instruction" else m for m in messages]


def bags(folder: Path) -> list[Path]:
    """Of two tasks, in turn."""
    tasks = ("touch the red cube", "point at the blue ball", "touch the red cube")
    return [write_bag(folder / name, told(0.5, k, tasks[k])) for k, name in enumerate(("one", "two", "three"))]


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.slow
def test_bags_at_the_same_time_make_the_dataset_of_bags_one_after_the_other(tmp_path: Path) -> None:
    made = bags(tmp_path)
    assert run("from-bag", *made, *GIVEN, "--out", tmp_path / "out1") == 0
    command = [sys.executable, "-m", "training.convert", "from-bag", *made, *GIVEN, "--workers", "2"]
    done = subprocess.run([*command, "--out", tmp_path / "out2"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "3 of 3 episodes" in done.stdout, done.stderr
    one, two = content(tmp_path / "out1"), content(tmp_path / "out2")
    assert one == two and "videos/observation.images.scene/chunk-000/file-002.mp4" in one
    assert names(tmp_path) == {"one", "two", "three", "out1", "out2"}


def test_parts_are_put_together_as_if_they_had_been_one(tmp_path: Path) -> None:
    made, out = bags(tmp_path), tmp_path / "out"
    assert run("from-bag", *made, *GIVEN, "--out", out) == 0
    dataset = Dataset(out)
    assert [episode.length for episode in dataset.episodes] == [4, 4, 4]
    columns = [dataset.columns(episode) for episode in dataset.episodes]
    for name, expected in {
        "index": np.arange(12),
        "episode_index": np.repeat([0, 1, 2], 4),
        "frame_index": np.tile(np.arange(4), 3),
        "task_index": np.repeat([0, 1, 0], 4),
    }.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in columns]), expected)
    stats = json.loads((out / "meta/stats.json").read_text())
    states = np.concatenate([part["observation.state"] for part in columns])
    np.testing.assert_allclose(stats["observation.state"]["mean"], states.mean(axis=0), rtol=1e-5)
    assert stats["index"]["max"] == [11.0] and stats["observation.images.wrist"]["count"] == [12]
    greys = [np.mean([image.mean() for image in dataset.images(e, "wrist")]) / 255 for e in dataset.episodes]
    np.testing.assert_allclose(np.ravel(stats["observation.images.wrist"]["mean"]), np.mean(greys), atol=0.01)
    source = json.loads((out / "meta/ki_vla_ros.json").read_text())
    assert source["bags"] == ["one", "two", "three"]


def test_a_bag_that_fails_is_named_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third = bags(tmp_path)
    silent = [m for m in told(0.5, 1) if "joint" not in m.topic]
    (tmp_path / "two").rename(tmp_path / "good")
    write_bag(second, silent)
    out, given = tmp_path / "out", ("from-bag", first, second, third, *GIVEN)
    assert run(*given, "--out", out) == 1
    said = capsys.readouterr()
    assert f"convert: bag {second}: expected /joint_states" in said.err
    assert "without 1 of 3 bags; the same command tries them again" in said.err
    assert [episode.length for episode in Dataset(out).episodes] == [4, 4]

    for file in second.iterdir():
        file.unlink()
    second.rmdir()
    (tmp_path / "good").rename(second)
    assert run(*given, "--out", out) == 0
    said = capsys.readouterr()
    assert f"{first}: converted before" in said.out and f"{second}: converted before" not in said.out
    assert len(Dataset(out).episodes) == 3
    assert run("from-bag", first, second, third, *GIVEN, "--out", tmp_path / "anew") == 0
    assert content(out) == content(tmp_path / "anew")
    assert names(tmp_path) == {"one", "two", "three", "out", "anew"}
    assert run(*given, "--out", out) == 2
    assert "exists already; remove it or choose another --out" in capsys.readouterr().err


def test_where_no_bag_can_be_converted_nothing_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("from-bag", tmp_path / "a", tmp_path / "b", *GIVEN, "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err.splitlines()
    assert said == [f"convert: bag {tmp_path / name}: no such file or folder" for name in "ab"]
    assert names(tmp_path) == set()
    short = write_bag(tmp_path / "short", told(0.5, 0))
    capsys.readouterr()
    assert run("from-bag", short, *GIVEN, "--least-frames", 99, "--out", tmp_path / "out") == 2
    assert "expected at least one frame, got none; nothing was written" in capsys.readouterr().err
    assert names(tmp_path) == {"short"}


def test_bags_of_other_images_are_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_bag(tmp_path / "small", told(0.5, 0))
    wide = cv2.imencode(".jpg", np.full((32, 64, 3), 99, np.uint8))[1].tobytes()
    other = [replace(m, data=jpeg(m.log_ns, wide)) if m.type == COMPRESSED_IMAGE else m for m in told(0.5, 1)]
    second, out = write_bag(tmp_path / "wide", other), tmp_path / "out"
    assert run("from-bag", first, second, *GIVEN, "--out", out) == 1
    said = capsys.readouterr().err
    told_of = f"expected observation.images.wrist as in {first}, 32 x 32 pixels, h264 yuv420p, got 64 x 32 pixels"
    assert f"convert: bag {second}: {told_of}" in said
    assert len(Dataset(out).episodes) == 1


class Stopped:
    """Stops after so many bags, as Ctrl-C does; counts conversions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
        self.done: list[str] = []
        self.after, self._convert = after, command.convert_bag
        monkeypatch.setattr(command, "convert_bag", self)

    def __call__(self, arguments: object, options: object, path: Path, folder: Path) -> None:
        if len(self.done) == self.after:
            raise KeyboardInterrupt
        self._convert(arguments, options, path, folder)  # type: ignore[arg-type]
        self.done.append(path.name)


def test_a_stopped_conversion_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, out = bags(tmp_path), tmp_path / "out"
    stopped = Stopped(monkeypatch, after=2)
    assert run("from-bag", *made, *GIVEN, "--out", out) == 130
    assert "a valid dataset; the same command goes on" in capsys.readouterr().err
    assert len(Dataset(out).episodes) == 2
    stopped.after = 99
    assert run("from-bag", *made, *GIVEN, "--fps", 20, "--out", out) == 2
    said = capsys.readouterr().err
    assert re.search(r"one: expected the options .*, got --fps 20 \(there: 10\); give the same options to go on", said)
    write_bag_again(made[0], told(0.7, 0))
    assert run("from-bag", *made, *GIVEN, "--out", out) == 0
    assert f"{made[0]}: converted again: it has changed" in capsys.readouterr().out
    assert stopped.done == ["one", "two", "one", "three"]
    assert [episode.length for episode in Dataset(out).episodes] == [6, 4, 4]
    assert names(tmp_path) == {"one", "two", "three", "out"}


def test_a_bag_that_is_stopped_in_its_middle_leaves_its_frames_and_is_converted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, out, add = bags(tmp_path)[:2], tmp_path / "out", DatasetWriter.add
    added: list[int] = []

    def stop(writer: DatasetWriter, frame: Frame) -> None:
        if len(added) == 6:
            raise KeyboardInterrupt
        add(writer, frame)
        added.append(frame.stamp_ns)

    monkeypatch.setattr(DatasetWriter, "add", stop)
    assert run("from-bag", *made, *GIVEN, "--out", out) == 130
    assert [episode.length for episode in Dataset(out).episodes] == [4, 2]
    reports = [json.loads(line) for line in (out / "meta/ki_vla_ros_episodes.jsonl").read_text().splitlines()]
    assert [report["why"] for report in reports] == [[], ["stopped: the conversion was stopped in it"]]
    monkeypatch.setattr(DatasetWriter, "add", add)
    assert run("from-bag", *made, *GIVEN, "--out", out) == 0
    assert [episode.length for episode in Dataset(out).episodes] == [4, 4]


def test_a_bag_that_is_not_there_any_more_costs_nothing_that_was_converted_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk that is not mounted."""
    made, out = bags(tmp_path), tmp_path / "out"
    stopped = Stopped(monkeypatch, after=2)
    assert run("from-bag", *made, *GIVEN, "--out", out) == 130
    stopped.after = 99
    made[0].rename(tmp_path / "away")
    assert run("from-bag", *made, *GIVEN, "--out", out) == 1
    (tmp_path / "away").rename(made[0])
    assert run("from-bag", *made, *GIVEN, "--out", out) == 0
    assert stopped.done == ["one", "two", "three"] and len(Dataset(out).episodes) == 3


@pytest.mark.slow
def test_a_process_that_is_killed_costs_its_own_bag(tmp_path: Path) -> None:
    jobs = {Path(name): tmp_path / name for name in ("full", "one")}
    outcomes = dict(many.run(jobs, kill_at, 2, None))
    failure = outcomes.pop(Path("full"))
    assert failure is not None and "bag full: expected to convert it, got a process that was killed" in failure.reason
    assert outcomes == {Path("one"): None} and (tmp_path / "one").is_dir()


def write_bag_again(folder: Path, messages: Messages) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    write_bag(folder, messages)


def test_a_dataset_of_others_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Parts of an earlier conversion are beside it."""
    made, out = bags(tmp_path), tmp_path / "out"
    Stopped(monkeypatch, after=2)
    assert run("from-bag", *made, *GIVEN, "--out", out) == 130
    out.rename(tmp_path / "mine")
    (out / "videos").mkdir(parents=True)
    (out / "videos/other.mp4").touch()
    assert run("from-bag", *made, *GIVEN, "--out", out) == 2
    assert "exists already" in capsys.readouterr().err and (out / "videos/other.mp4").exists()


@pytest.mark.slow
def test_killed_at_any_moment_nothing_or_the_whole_dataset_is_to_be_seen(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'test'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "test/support/killed_conversions.py"), str(tmp_path), "11"],
        env=environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["same"] and found["kills"] >= 5 and set(found["seen"]) <= {"nothing", "whole"}
    assert found["left"] == ["killed", "one", "two", "whole"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # its own
def test_a_ray_cluster_makes_the_same_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # or it puts a token into the home folder
    made = bags(tmp_path)
    assert run("from-bag", *made, *GIVEN, "--out", tmp_path / "here") == 0
    assert run("from-bag", *made, tmp_path / "none", *GIVEN, "--ray", "local", "--out", tmp_path / "there") == 1
    assert content(tmp_path / "there") == content(tmp_path / "here")


def test_without_ray_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    bag = write_bag(tmp_path / "bag", told(0.5, 0))
    assert run("from-bag", bag, *GIVEN, "--ray", "auto", "--out", tmp_path / "out") == 2
    assert "--ray: expected the package ray, which is not installed" in capsys.readouterr().err
    assert names(tmp_path) == {"bag"}
