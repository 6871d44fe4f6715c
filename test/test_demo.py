"""The demo from its parts, and as a user runs it: what it writes, what it refuses, and that nothing is left running."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import write_test_bundle

from ki_vla_ros import demo
from ki_vla_ros.demo_driver import CHUNK, INSTRUCTION, SCENE_IMAGE, STATUS, TICK, TOPICS, WRIST_IMAGE, Observed
from ki_vla_ros.demo_processes import ChildError, Children, free_domain, is_free, prepare_environment
from ki_vla_ros.demo_recorder import TYPESTORE, Recorder, open_bag
from ki_vla_ros.demo_report import Episode, Run, rate_hz, summarise, write_report
from ki_vla_ros.demo_video import HEADER, SIDE, Film, frames, make_video
from ki_vla_ros.errors import BundleError, ConfigurationError, InstructionError, KiVlaError, SimulationError
from ki_vla_ros.share import find_share
from ki_vla_ros.sim.expert import tip_to_joints
from ki_vla_ros.sim.task import sample_scene
from ki_vla_ros.sim.world import JOINTS, World

LIMIT_S = 150.0
NS = 1_000_000_000

# --- figures and page


def tick(total_ms: float, *, chunk_index: int | None = 0, misses: int = 0, instruction: str = "") -> dict[str, Any]:
    stage_ms = {"prefill": 0.25 * total_ms, "denoise": 0.75 * total_ms, "total": total_ms}
    fields = {"chunk_index": chunk_index, "deadline_misses": misses, "stage_ms": stage_ms, "hold": None}
    return {**fields, "instruction": instruction}


def observed(rate: float, *ticks: dict[str, Any], start_s: float = 0.0) -> Observed:
    times = [start_s + k / rate for k in range(11)]
    return Observed(times, {SCENE_IMAGE: times[::2], WRIST_IMAGE: times}, list(ticks))


def episode(**fields: Any) -> Episode:
    whole = Episode(7, "touch the red disc", 4, "red disc", True, True, 2.5)
    return replace(whole, **fields)


def a_run() -> Run:
    lost = episode(seed=8, objects=5, reached="red <b>cube</b>", followed=False, success=False)
    return Run(
        episodes=[episode(), lost],
        observed=[
            observed(10.0, tick(10.0), tick(3.0, chunk_index=None), tick(20.0, misses=1)),
            observed(20.0, tick(30.0, misses=2), start_s=100.0),
        ],
        expert_success=[True, True],
        seed=3,
        split="held_out",
        bundle="a & b",
        bundle_sha256="0" * 64,
        overruns=4,
    )


def test_the_summary_has_the_figures_of_the_run() -> None:
    summary = summarise(a_run())
    assert summary["episodes"] == 2
    assert (summary["follow_rate"], summary["success_rate"], summary["expert_success_rate"]) == (0.5, 0.5, 1.0)
    assert summary["chance_follow_rate"] == pytest.approx((1 / 4 + 1 / 5) / 2)
    assert summary["chunk_rate_hz"] == pytest.approx(20 / 1.5, abs=1e-3)  # 10 gaps of 0.1 s, 10 of 0.05 s, no pause
    assert summary["camera_rate_hz"] == pytest.approx(10 / 1.5, abs=1e-3)  # the slower of the two
    assert summary["tick_ms"] == {"p50": 20.0, "p90": 28.0, "p99": 29.8}  # only ticks that made a chunk
    assert summary["stages_ms"]["prefill"]["p50"] == 5.0
    assert set(summary["stages_ms"]) == {"prefill", "denoise"}
    assert summary["deadline_misses"] == 1 + 2
    assert (summary["realtime_overruns"], summary["seed"], summary["split"]) == (4, 3, "held_out")
    assert summary["bundle"] == {"name": "a & b", "manifest_sha256": "0" * 64}
    assert summary["machine"]["cores"] == os.cpu_count()
    assert [entry["seed"] for entry in summary["per_episode"]] == [7, 8]
    assert summary["per_episode"][0]["expert_success"] is True


def test_a_rate_needs_two_arrivals() -> None:
    assert rate_hz([[1.0], []]) == 0.0
    assert rate_hz([[1.0], [5.0, 5.5, 6.0]]) == 2.0


class Page(HTMLParser):
    """Checks that tags nest; notes texts and the video's source."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.video: str | None = None
        self.rows = 0
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "video":
            self.video = dict(attributes)["src"]
        self.rows += tag == "tr"
        if tag not in ("meta",):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_shows_figures_and_episodes_and_escapes_what_it_was_given(tmp_path: Path) -> None:
    summary = write_report(tmp_path, a_run(), "demo.mp4")
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    page = Page((tmp_path / "index.html").read_text())
    assert page.video == "demo.mp4"
    assert page.rows == 1 + 2
    assert {"50 %", "chance 22 %", "13.3 Hz", "3 deadlines missed", "20 ms", "p99 30 ms"} <= set(page.texts)
    assert "red <b>cube</b>" in page.texts
    assert "http" not in (tmp_path / "index.html").read_text()  # nothing is fetched from elsewhere


def test_a_page_without_film_and_with_a_single_chunk(tmp_path: Path) -> None:
    short = Observed([1.0], {SCENE_IMAGE: [1.0], WRIST_IMAGE: [1.0]}, [tick(4.0)])
    write_report(tmp_path, replace(a_run(), episodes=[episode()], observed=[short], expert_success=[False]), None)
    assert Page((tmp_path / "index.html").read_text()).video is None


# --- recording and film


def ros_message(kind: str, **fields: Any) -> bytes:
    return bytes(TYPESTORE.serialize_cdr(TYPESTORE.types[kind](**fields), kind))


def header(stamp_ns: int) -> Any:
    stamp = TYPESTORE.types["builtin_interfaces/msg/Time"](sec=stamp_ns // NS, nanosec=stamp_ns % NS)
    return TYPESTORE.types["std_msgs/msg/Header"](stamp=stamp, frame_id="camera")


def image(colour: tuple[int, int, int], stamp_ns: int) -> bytes:
    data = np.tile(np.array(colour, dtype=np.uint8), 32 * 32)
    fields = {"height": 32, "width": 32, "encoding": "rgb8", "is_bigendian": 0, "step": 96, "data": data}
    return ros_message("sensor_msgs/msg/Image", header=header(stamp_ns), **fields)


def text(content: str) -> bytes:
    return ros_message("std_msgs/msg/String", data=content)


def chunk(tips: list[tuple[float, float, float]], stamp_ns: int) -> bytes:
    duration, kind = TYPESTORE.types["builtin_interfaces/msg/Duration"], "trajectory_msgs/msg/JointTrajectoryPoint"
    none = np.zeros(0)
    points = [
        TYPESTORE.types[kind](
            positions=tip_to_joints(tip)[::-1].copy(),
            velocities=none,
            accelerations=none,
            effort=none,
            time_from_start=duration(sec=0, nanosec=50_000_000 * (k + 1)),
        )
        for k, tip in enumerate(tips)
    ]
    names = list(reversed(JOINTS))  # the film goes by names
    return ros_message("trajectory_msgs/msg/JointTrajectory", header=header(stamp_ns), joint_names=names, points=points)


def status(**fields: Any) -> bytes:
    objects = [{"colour": "red", "shape": "cube", "x": 0.0, "y": 0.0}]
    return text(json.dumps({"done": False, "success": False, "reached": None, "objects": objects, **fields}))


def record(folder: Path, *messages: tuple[str, int, bytes]) -> Path:
    recorder = Recorder(folder / "bag", {topic: kind for topic, (_, kind) in TOPICS.items()})
    for message in messages:
        recorder.record(*message)
    recorder.close()
    return folder / "bag"


def test_the_bag_has_every_message_with_its_time_and_images_as_jpeg(tmp_path: Path) -> None:
    bag = record(
        tmp_path, (STATUS, 10, status()), (SCENE_IMAGE, 20, image((200, 100, 50), 7)), (TICK, 30, text("tick"))
    )
    assert "storage_identifier: mcap" in (bag / "metadata.yaml").read_text()
    with open_bag(bag, [STATUS, f"{SCENE_IMAGE}/compressed", TICK]) as messages:
        first, picture, last = list(messages)
    assert (first.topic, first.time_ns) == (STATUS, 10)
    assert (last.topic, last.time_ns, last.message.data) == (TICK, 30, "tick")
    assert picture.time_ns == 20
    assert picture.message.header.stamp.nanosec == 7
    assert picture.message.format == "rgb8; jpeg compressed bgr8"
    assert bytes(picture.message.data[:2]) == b"\xff\xd8"


def test_recording_over_an_old_bag_is_refused(tmp_path: Path) -> None:
    record(tmp_path)
    with pytest.raises(ConfigurationError, match="exists already"):
        record(tmp_path)


def test_a_message_that_cannot_be_written_is_reported_and_the_bag_still_closed(tmp_path: Path) -> None:
    with pytest.raises(KiVlaError, match=r"recording to .*bag failed"):
        record(
            tmp_path, (TICK, 1, text("before")), (SCENE_IMAGE, 2, b"\x00\x01\x00\x00rubbish"), (TICK, 3, text("after"))
        )
    with open_bag(tmp_path / "bag", [TICK]) as messages:
        assert [recorded.message.data for recorded in messages] == ["before"]


@pytest.fixture(scope="module")
def projector() -> World:
    world = World(render_size=SIDE, render=False)
    world.reset(sample_scene(0, split="all"))
    return world


def episode_messages(start_ns: int = 0) -> list[tuple[str, int, bytes]]:
    """Status, instruction, and a pair of images 50 ms apart from the next; the second is seen with a chunk."""
    pairs = []
    for k in range(3):
        stamp_ns = start_ns + k * 50_000_000
        pairs.append((SCENE_IMAGE, stamp_ns + 1, image((0, 0, 255), stamp_ns)))
        pairs.append((WRIST_IMAGE, stamp_ns + 2, image((255, 0, 0), stamp_ns)))
    predicted = chunk([(0.35, 0.0, 0.1), (0.4, 0.0, 0.1), (0.45, 0.0, 0.1)], start_ns)
    return [
        (STATUS, start_ns, status()),
        (INSTRUCTION, start_ns, text("touch the red cube")),
        *pairs[:2],
        (CHUNK, start_ns + 5, predicted),
        *pairs[2:4],
        (STATUS, start_ns + 60_000_000, status(done=True, success=True, reached=0)),
        *pairs[4:],
    ]


def near_tip(picture: np.ndarray, projector: World, tip: tuple[float, float, float]) -> np.ndarray:
    u, v = projector.project("scene", tip)
    return picture[HEADER + round(v), round(u)].astype(int)


def test_frames_show_both_cameras_the_chunk_ahead_and_the_verdict(tmp_path: Path, projector: World) -> None:
    bag = record(tmp_path, *episode_messages())
    before, during, after = (frame.picture for frame in frames(bag, Film(1, projector)))
    assert before.shape == (HEADER + SIDE, 2 * SIDE, 3)
    blue, red = (255, 0, 0), (0, 0, 255)  # blue first
    assert before[HEADER + 100, 100] == pytest.approx(np.array(blue), abs=8)
    assert before[HEADER + 100, SIDE + 100] == pytest.approx(np.array(red), abs=8)
    for tip, due in (((0.35, 0.0, 0.1), True), ((0.45, 0.0, 0.1), True)):
        assert near_tip(before, projector, tip) == pytest.approx(np.array(blue), abs=8)
        assert (near_tip(during, projector, tip)[2] > 200) == due  # orange
    assert near_tip(after, projector, (0.35, 0.0, 0.1)) == pytest.approx(np.array(blue), abs=8)  # has passed by now
    assert near_tip(after, projector, (0.45, 0.0, 0.1))[2] > 200
    corner = (slice(0, HEADER), slice(2 * SIDE - 60, 2 * SIDE))
    assert during[corner].max() < 60
    assert after[corner][..., 1].max() > 150  # a green mark


def test_images_of_different_instants_or_outside_episodes_make_no_frame(tmp_path: Path, projector: World) -> None:
    early = [(SCENE_IMAGE, 1, image((0, 0, 0), 0)), (WRIST_IMAGE, 2, image((0, 0, 0), 0))]
    bag = record(
        tmp_path,
        *early,
        (INSTRUCTION, 3, text("touch the red cube")),
        (SCENE_IMAGE, 4, image((0, 0, 0), 100)),
        (WRIST_IMAGE, 5, image((0, 0, 0), 200)),
    )
    assert list(frames(bag, Film(1, projector))) == []


@pytest.mark.parametrize(("reached", "wide"), [(0, 250), (None, 120)])
def test_a_failure_says_what_was_reached_instead(
    tmp_path: Path, projector: World, reached: int | None, wide: int
) -> None:
    messages = episode_messages()
    bag = record(tmp_path, *messages[:2], (STATUS, 1, status(done=True, reached=reached)), *messages[2:4])
    (frame,) = frames(bag, Film(1, projector))
    inked = np.flatnonzero(frame.picture[:HEADER, SIDE:, 2].max(axis=0) > 150)
    assert np.ptp(inked) == pytest.approx(wide, rel=0.3)


def test_the_film_runs_in_real_time_and_skips_pauses(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    bag = record(tmp_path, *episode_messages(), *episode_messages(60 * NS))
    assert make_video(bag, tmp_path / "demo.mp4", 2) == 6
    with av.open(str(tmp_path / "demo.mp4")) as film:
        (stream,) = film.streams.video
        assert (stream.codec_context.name, stream.width, stream.height) == ("h264", 2 * SIDE, HEADER + SIDE)
        times_s = [float(frame.pts * frame.time_base) for frame in film.decode(stream)]
    assert np.diff(times_s) == pytest.approx([0.05, 0.05, 0.5, 0.05, 0.05], abs=2e-3)


# --- processes


def module(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: str) -> str:
    (folder / f"{name}.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    return name


def wait_for(path: Path, content: str) -> None:
    end_s = time.monotonic() + 30.0
    while content not in path.read_text():
        assert time.monotonic() < end_s
        time.sleep(0.02)


def test_children_get_sigint_first_and_are_killed_if_they_ignore_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    polite = (
        "import time\nprint('up', flush=True)\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('bye')\n"
    )
    stubborn = (
        "import signal, time\nfor s in (signal.SIGINT, signal.SIGTERM): signal.signal(s, signal.SIG_IGN)\n"
        "print('up', flush=True)\ntime.sleep(60)\n"
    )
    monkeypatch.setattr("ki_vla_ros.demo_processes.STOP_LIMIT_S", 0.5)
    with Children(tmp_path) as children:
        gentle = children.start("gentle", module(tmp_path, monkeypatch, "polite_child", polite), [])
        hard = children.start("hard", module(tmp_path, monkeypatch, "stubborn_child", stubborn), [])
        for child in (gentle, hard):
            wait_for(child.log, "up")
        children.check()
    assert "bye" in gentle.log.read_text()
    assert (gentle.process.returncode, hard.process.returncode) == (0, -signal.SIGKILL)


def test_a_dead_child_is_reported_with_the_end_of_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "print('[WARN] [1.5] [x]: hot'); print('[INFO] [1.6] [x]: fine'); raise SystemExit(7)"
    with Children(tmp_path) as children:
        child = children.start("brief", module(tmp_path, monkeypatch, "brief_child", code), [])
        child.process.wait(30)
        with pytest.raises(ChildError, match=r"(?s)brief ended with exit code 7; .*brief.log says:.*hot"):
            children.check()
        assert child.last_error() == "hot"


def test_a_domain_with_a_participant_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    free = free_domain()
    monkeypatch.setattr("ki_vla_ros.demo_processes.DOMAINS", range(free, free + 1))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as participant:
        participant.bind(("", 7400 + 250 * free + 10))
        with pytest.raises(ConfigurationError, match="no free ROS domain"):
            free_domain()
    assert free_domain() == free


def test_a_domain_with_a_participant_or_open_to_other_machines_may_be_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ros_environment: dict[str, str]
) -> None:
    for name in ("FASTDDS_DEFAULT_PROFILES_FILE", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # so that what the demo would set does not stay for other tests
    assert not prepare_environment(tmp_path)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as participant:
        participant.bind(("", 7400 + 250 * int(ros_environment["ROS_DOMAIN_ID"]) + 10))
        assert prepare_environment(tmp_path)
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "SUBNET")
    assert prepare_environment(tmp_path)


@pytest.mark.parametrize("domain", ["233", "-1", "robot"])
def test_an_impossible_domain_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, domain: str) -> None:
    monkeypatch.setenv("ROS_DOMAIN_ID", domain)
    with pytest.raises(ConfigurationError, match=f"ROS_DOMAIN_ID: expected 0 to 232, got '{domain}'"):
        prepare_environment(tmp_path)


# --- one episode, against a driver that answers from a script


class ScriptedDriver:
    def __init__(self, *, statuses: list[dict[str, Any]], seen: Observed) -> None:
        self.calls: list[Any] = []
        self.observed = seen
        self._statuses: Iterator[dict[str, Any]] = iter(statuses)
        self._status = {"done": False}

    @property
    def status(self) -> dict[str, Any]:
        self._status = next(self._statuses, self._status)
        return self._status

    def reset(self, *scene: Any) -> dict[str, Any]:
        self.calls.append(scene)
        return {"instruction": "touch the red cube"}

    def instruct(self, instruction: str) -> None:
        self.calls.append(instruction)

    def activate(self) -> None:
        self.calls.append("activate")

    def deactivate(self) -> Observed:
        self.calls.append("deactivate")
        return self.observed

    def sleep(self, _duration_s: float) -> None:
        pass


VERDICT = {
    "done": True,
    "success": True,
    "reached": 1,
    "target": 1,
    "time_s": 3.25,
    "objects": [{"colour": "red", "shape": "ball"}, {"colour": "red", "shape": "cube"}],
}
TOLD = observed(10.0, tick(9.0, instruction="touch the red cube"))


def options(**fields: Any) -> demo.Options:
    whole = demo.Options(3, "", 2, "held_out", Path("bundle"), Path("out"), Path("params"), False)
    return replace(whole, **fields)


def run_scripted(driver: ScriptedDriver) -> tuple[Episode, Observed]:
    return demo.run_episode(driver, options(), 5, demo.StatusLine(3))  # type: ignore[arg-type]


def test_an_episode_goes_from_reset_to_verdict() -> None:
    driver = ScriptedDriver(statuses=[{"done": False}, VERDICT], seen=TOLD)
    result, seen = run_scripted(driver)
    assert driver.calls == [(5, "held_out", ""), "touch the red cube", "activate", "deactivate"]
    assert result == Episode(5, "touch the red cube", 2, "red cube", True, True, 3.25)
    assert seen is TOLD


@pytest.mark.parametrize(
    ("verdict", "reached", "followed"), [({"reached": 0}, "red ball", False), ({"reached": None}, None, False)]
)
def test_reaching_another_object_or_none_is_not_following(
    verdict: dict[str, Any], reached: str | None, followed: bool
) -> None:
    driver = ScriptedDriver(statuses=[{**VERDICT, **verdict, "success": False}], seen=TOLD)
    result, _ = run_scripted(driver)
    assert (result.reached, result.followed, result.success) == (reached, followed, False)


def test_a_policy_that_publishes_nothing_is_an_error_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "FIRST_CHUNK_LIMIT_S", 0.0)
    holding = {**tick(1.0, chunk_index=None), "hold": "camera 'wrist': no image yet"}
    with pytest.raises(KiVlaError, match="no chunk within 0 s: camera 'wrist': no image yet"):
        run_scripted(ScriptedDriver(statuses=[], seen=Observed(ticks=[holding])))
    with pytest.raises(KiVlaError, match="it does not tick"):
        run_scripted(ScriptedDriver(statuses=[], seen=Observed()))


def test_an_endless_episode_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "EPISODE_LIMIT_S", 0.0)
    with pytest.raises(KiVlaError, match="no verdict within 0 s"):
        run_scripted(ScriptedDriver(statuses=[], seen=TOLD))


def test_acting_on_another_instruction_is_an_error() -> None:
    seen = observed(10.0, tick(9.0, instruction="touch the blue cube"))
    with pytest.raises(KiVlaError, match=r"told 'touch the red cube', but acted on \['touch the blue cube'\]"):
        run_scripted(ScriptedDriver(statuses=[VERDICT], seen=seen))


def test_without_a_terminal_each_episode_is_one_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    line = demo.StatusLine(12)
    line.update("touch the red cube", TOLD)
    line.finish(episode())
    line.finish(episode(success=False, reached="red ball"))
    line.finish(episode(success=False, reached=None))
    printed = capsys.readouterr().out
    assert "\r" not in printed
    first, second, third = printed.splitlines()
    assert first.startswith("[ 1/12] touch the red disc")
    assert "10.0 Hz, tick 9/9 ms p50/p99 | success 1/1 | success" in first
    assert second.endswith("success 1/2 | reached red ball")
    assert third.endswith("success 1/3 | time is up")


def test_on_a_terminal_the_line_renews_itself(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    line = demo.StatusLine(3)
    line.update("touch the red cube", TOLD)
    printed = capsys.readouterr().out
    assert printed.startswith("\r\x1b[K[1/3] touch the red cube")
    assert not printed.endswith("\n")


def test_the_scripted_expert_is_judged_on_the_same_scenes() -> None:
    assert demo.run_expert(options(episodes=3)) == [True, True, True]
    assert demo.run_expert(options(episodes=1, split="all", instruction="point at the blue cube")) == [True]


# --- what a user gives


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_test_bundle(tmp_path_factory.mktemp("bundle") / "random").path


def test_defaults_ask_for_held_out_combinations_and_an_instruction_for_all(bundle: Path) -> None:
    chosen = demo.parse_options(["--bundle", str(bundle), "--no-video"])
    assert (chosen.episodes, chosen.split, chosen.video, chosen.out) == (20, "held_out", False, Path("out/demo"))
    assert chosen.params == find_share("config/demo.yaml")
    chosen = demo.parse_options(["--bundle", str(bundle), "--instruction", "Touch  the blue ball", "--seed", "2"])
    assert (chosen.instruction, chosen.split) == ("touch the blue ball", "all")
    assert not set(chosen.seeds) & set(replace(chosen, seed=3, episodes=1000).seeds)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (["--instruction", "sing"], InstructionError, "'sing'.*touch the red cube"),
        (
            ["--instruction", "touch the red disc", "--split", "train"],
            SimulationError,
            "never commanded.*use split 'all'",
        ),
        (["--episodes", "0"], ConfigurationError, "--episodes 0: expected 1 to"),
        (["--seed", "-1"], ConfigurationError, "--seed -1: expected 0 to"),
        (["--params", "nowhere.yaml"], ConfigurationError, "--params nowhere.yaml: no such file"),
        (["--bundle", "nosuchbundle"], ConfigurationError, "nosuchbundle"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_starts(
    bundle: Path, arguments: list[str], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        demo.parse_options(["--bundle", str(bundle), "--no-video", *arguments])


def test_a_film_without_its_encoder_is_refused_before_anything_starts(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigurationError, match="--no-video"):
        demo.parse_options(["--bundle", str(bundle)])


def test_an_earlier_run_is_cleared_but_nothing_else(tmp_path: Path) -> None:
    bag = tmp_path / "bag"
    bag.mkdir()
    for path in (bag / "bag.mcap", bag / "metadata.yaml", tmp_path / "summary.json", tmp_path / "notes.txt"):
        path.touch()
    demo.clear_results(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    bag.mkdir()
    (bag / "thesis.doc").touch()
    with pytest.raises(ConfigurationError, match=r"thesis.doc is not from an earlier demo"):
        demo.clear_results(tmp_path)
    assert (bag / "thesis.doc").exists()


# --- the whole, as a user runs it


def start(arguments: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ki_vla_ros.demo", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def left_running(folder: Path) -> list[str]:
    """Command lines of processes that were given something in `folder`."""
    lines = []
    for entry in Path("/proc").iterdir():
        try:
            line = (entry / "cmdline").read_bytes().decode().replace("\0", " ") if entry.name.isdigit() else ""
        except OSError:  # it has just ended
            continue
        if str(folder) in line:
            lines.append(line)
    return lines


@pytest.fixture
def given(tmp_path: Path, bundle: Path) -> list[str]:
    """Arguments for a short run; the parameter file's path marks the processes that were started with it."""
    params = shutil.copy(find_share("config/demo.yaml"), tmp_path / "demo.yaml")
    return ["--bundle", str(bundle), "--params", str(params), "--out", str(tmp_path / "out"), "--episodes", "1"]


@pytest.mark.timeout(300)
def test_a_run_leaves_summary_film_bag_and_page_and_no_process(
    tmp_path: Path, given: list[str], ros_environment: dict[str, str]
) -> None:
    del ros_environment["ROS_DOMAIN_ID"]  # the demo finds a free one
    process = start([*given, "--instruction", "touch the blue ball"], ros_environment)
    printed, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, errors
    assert left_running(tmp_path) == []
    assert "[1/1] touch the blue ball" in printed
    out = tmp_path / "out"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["episodes"] == 1
    assert (summary["split"], summary["bundle"]["name"]) == ("all", "test-policy")
    assert summary["expert_success_rate"] == 1.0
    assert summary["chunk_rate_hz"] > 1.0
    assert summary["camera_rate_hz"] > 1.0
    assert {"preprocess", "prefill", "denoise", "publish"} <= set(summary["stages_ms"])
    assert summary["per_episode"][0]["instruction"] == "touch the blue ball"
    assert (out / "demo.mp4").stat().st_size > 10_000
    Page((out / "index.html").read_text())
    recorded = {f"{topic}/compressed" if topic in (SCENE_IMAGE, WRIST_IMAGE) else topic for topic in TOPICS}
    metadata = (out / "bag" / "metadata.yaml").read_text()
    assert all(topic in metadata for topic in recorded)
    with open_bag(out / "bag", [INSTRUCTION, TICK, CHUNK, "/diagnostics", STATUS]) as messages:
        topics = {recorded.topic for recorded in messages}
    assert topics == {INSTRUCTION, TICK, CHUNK, "/diagnostics", STATUS}


@pytest.mark.timeout(300)
def test_an_interrupted_run_stops_its_children(
    tmp_path: Path, given: list[str], ros_environment: dict[str, str]
) -> None:
    process = start([*given, "--no-video"], ros_environment)
    end_s = time.monotonic() + LIMIT_S
    log = tmp_path / "out" / "log" / "policy.log"
    while not (log.exists() and "instruction:" in log.read_text()):
        assert time.monotonic() < end_s
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130
    assert errors.strip() == "demo: interrupted; all processes were stopped"
    assert left_running(tmp_path) == []
    assert (tmp_path / "out" / "bag" / "metadata.yaml").exists()  # what was recorded can be played


@pytest.mark.timeout(300)
def test_a_child_that_cannot_start_ends_the_run_with_its_message(
    tmp_path: Path, given: list[str], ros_environment: dict[str, str]
) -> None:
    params = tmp_path / "demo.yaml"
    params.write_text(params.read_text().replace("    image_size: 288", "    image_sise: 288"))
    process = start([*given, "--no-video"], ros_environment)
    _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1
    assert "sim_arm ended with exit code 1" in errors
    assert "parameter 'image_sise' does not exist" in errors
    assert "Traceback" not in errors
    assert left_running(tmp_path) == []


@pytest.mark.timeout(300)
def test_a_domain_in_use_is_refused(tmp_path: Path, given: list[str], ros_environment: dict[str, str]) -> None:
    arguments = ["--ros-args", "-p", "image_size:=32"]
    arm = subprocess.Popen([sys.executable, "-m", "ki_vla_ros.sim.arm_node", *arguments], env=ros_environment)
    try:
        end_s = time.monotonic() + LIMIT_S
        while is_free(int(ros_environment["ROS_DOMAIN_ID"])):
            assert time.monotonic() < end_s
            time.sleep(0.1)
        process = start([*given, "--no-video"], ros_environment)
        _, errors = process.communicate(timeout=LIMIT_S)
    finally:
        arm.send_signal(signal.SIGINT)
        arm.wait(30)
    assert process.returncode == 1
    assert f"ROS domain {ros_environment['ROS_DOMAIN_ID']} is in use: a node 'sim_arm'" in errors
    assert left_running(tmp_path) == []


def test_a_broken_bundle_is_refused_before_anything_starts(tmp_path: Path, bundle: Path, given: list[str]) -> None:
    broken = shutil.copytree(bundle, tmp_path / "broken")
    (broken / "expert.onnx").write_bytes(b"")
    with pytest.raises(BundleError, match=r"expert\.onnx"):
        demo.run(demo.parse_options([*given, "--bundle", str(broken), "--no-video"]))
    assert not (tmp_path / "out").exists()
