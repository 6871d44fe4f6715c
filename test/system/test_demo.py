"""The demo as a user runs it: what it takes, what it writes, what it refuses, and that nothing is left running."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.bundles import write_test_bundle
from support.demo_runs import episode, observed, tick

from ki_vla_ros.bags.bag import open_bag
from ki_vla_ros.demo import __main__ as demo
from ki_vla_ros.demo.driver import SESSION, TOPICS, Observed
from ki_vla_ros.demo.report import Episode
from ki_vla_ros.errors import BundleError, ConfigurationError, InstructionError, KiVlaError, SimulationError
from ki_vla_ros.messages.decode import decode
from ki_vla_ros.ros.children import is_free
from ki_vla_ros.settings.session import read_session
from ki_vla_ros.share import find_share

LIMIT_S = 150.0

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
    assert "touch the blue ball" in (out / "index.html").read_text()
    with open_bag(out / "bag") as bag:
        assert {name: topic.type for name, topic in bag.topics.items()} == {n: kind for n, (_, kind) in TOPICS.items()}
        assert all(topic.count for topic in bag.topics.values())
        assert bag.faults == []
        session = read_session(decode(next(bag.messages([SESSION]))).data)
    # It names everything that replay needs, and all of that is in the bag.
    assert set(session.message_types) <= set(TOPICS)
    assert session.bundle.manifest_sha256 == summary["bundle"]["manifest_sha256"]


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
