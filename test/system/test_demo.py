"""The demo as a user runs it: its options, results and refusals, and that it leaves no process behind."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.bundles import write_test_bundle
from support.waiting import PATIENCE_S, until

from ki_vla_ros.bags.bag import open_bag
from ki_vla_ros.demo import __main__ as demo
from ki_vla_ros.demo.driver import SESSION, TOPICS
from ki_vla_ros.errors import BundleError
from ki_vla_ros.messages.decoding import decode
from ki_vla_ros.ros.children import begin_child, is_free
from ki_vla_ros.settings.session import read_session
from ki_vla_ros.share import find_share


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_test_bundle(tmp_path_factory.mktemp("bundle") / "random").path


def start(arguments: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ki_vla_ros.demo", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def left_running(folder: Path) -> list[str]:
    """Command lines of processes that have an argument in `folder`."""
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
    """Arguments for a short run; the parameter file's path marks the processes that it starts."""
    params = shutil.copy(find_share("config/demo.yaml"), tmp_path / "demo.yaml")
    return ["--bundle", str(bundle), "--params", str(params), "--out", str(tmp_path / "out"), "--episodes", "1"]


def test_a_run_leaves_summary_film_bag_and_page_and_no_process(
    tmp_path: Path, given: list[str], ros_environment: dict[str, str]
) -> None:
    del ros_environment["ROS_DOMAIN_ID"]  # the demo finds a free one
    process = start([*given, "--instruction", "touch the blue ball"], ros_environment)
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    assert left_running(tmp_path) == []
    assert "[1/1] touch the blue ball" in printed
    out = tmp_path / "out"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["episodes"] == 1
    assert (summary["split"], summary["bundle"]["name"]) == ("all", "test-policy")
    assert summary["demonstrator_success_rate"] == 1.0
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


def test_an_interrupted_run_stops_its_children(
    tmp_path: Path, given: list[str], ros_environment: dict[str, str]
) -> None:
    process = start([*given, "--no-video"], ros_environment)
    log = tmp_path / "out" / "log" / "policy.log"
    until(lambda: (log.exists() and "instruction:" in log.read_text()) or process.poll() is not None, "an instruction")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert errors.strip() == "demo: interrupted; all processes were stopped"
    assert left_running(tmp_path) == []
    assert (tmp_path / "out" / "bag" / "metadata.yaml").exists()  # what was recorded can be played


def test_a_child_that_cannot_start_ends_the_run_with_its_message(
    tmp_path: Path, given: list[str], ros_environment: dict[str, str]
) -> None:
    params = tmp_path / "demo.yaml"
    params.write_text(params.read_text().replace("    image_size: 288", "    image_sise: 288"))
    process = start([*given, "--no-video"], ros_environment)
    _, errors = process.communicate()
    assert process.returncode == 2
    assert "sim_arm ended with exit code 2" in errors
    assert "parameter 'image_sise' does not exist" in errors
    assert "Traceback" not in errors
    assert left_running(tmp_path) == []


def test_a_domain_in_use_is_refused(tmp_path: Path, given: list[str], ros_environment: dict[str, str]) -> None:
    arguments = ["--ros-args", "-p", "image_size:=32"]
    arm = subprocess.Popen(
        [sys.executable, "-m", "ki_vla_ros.sim.arm_node", *arguments], env=ros_environment, preexec_fn=begin_child
    )
    try:
        until(lambda: not is_free(int(ros_environment["ROS_DOMAIN_ID"])), "the simulated arm's participant")
        process = start([*given, "--no-video"], ros_environment)
        _, errors = process.communicate()
    finally:
        arm.send_signal(signal.SIGINT)
        arm.wait(PATIENCE_S)
    assert process.returncode == 2
    assert f"ROS domain {ros_environment['ROS_DOMAIN_ID']} is in use: a node 'sim_arm'" in errors
    assert left_running(tmp_path) == []


def test_a_broken_bundle_is_refused_before_anything_starts(tmp_path: Path, bundle: Path, given: list[str]) -> None:
    broken = shutil.copytree(bundle, tmp_path / "broken")
    (broken / "expert.onnx").write_bytes(b"")
    with pytest.raises(BundleError, match=r"expert\.onnx"):
        demo.run(demo.parse_options([*given, "--bundle", str(broken), "--no-video"]))
    assert not (tmp_path / "out").exists()
