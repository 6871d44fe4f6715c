"""The session that the node publishes and the process that records it, over real ROS, each in its own process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from support import ROOT
from support.bundles import TASK, demo_observation
from support.robots import PolicyProcess, Robot, ns_of
from support.waiting import PATIENCE_S, until

from ki_vla_ros.bags.bag import open_bag
from ki_vla_ros.bundle.folder import load_bundle
from ki_vla_ros.messages.decoding import camera_frame, decode
from ki_vla_ros.replay.__main__ import main as replay
from ki_vla_ros.ros.children import begin_child
from ki_vla_ros.settings.session import read_session


def test_the_session_describes_the_running_policy(
    robot: Robot, start: Callable[..., PolicyProcess], bundle_path: str
) -> None:
    start("-r", "camera/wrist/image_raw:=/hand/image", bundle=bundle_path, instruction=TASK, limits__velocity_scale=0.5)
    assert robot.state == "unconfigured" and not robot.sessions
    assert robot.change("configure")
    until(lambda: robot.sessions)
    session = read_session(robot.sessions[-1])
    assert session.bundle.name == load_bundle(bundle_path).manifest.name
    assert len(session.bundle.manifest_sha256) == 64
    assert session.topics.cameras == {"scene": "/camera/scene/image_raw", "wrist": "/hand/image"}
    assert session.topic == "/policy/session" and session.topics.command == "/arm_controller/joint_trajectory"
    assert (session.settings.bundle, session.settings.limits.velocity_scale) == (bundle_path, 0.5)

    assert robot.set(execution_horizon_s=0.3) == ""
    until(lambda: read_session(robot.sessions[-1]).settings.execution_horizon_s == 0.3)
    assert robot.set(execution_horizon_s=30.0) != ""  # refused, so nothing to report
    count = len(robot.sessions)
    assert robot.change("activate")
    until(lambda: len(robot.sessions) > count)
    assert read_session(robot.sessions[-1]).settings.execution_horizon_s == 0.3


def test_a_late_subscriber_gets_the_session_too(
    ros_environment: dict[str, str], start: Callable[..., PolicyProcess], bundle_path: str
) -> None:
    start("-r", "__ns:=/left", bundle=bundle_path, autostart=True)
    domain = int(ros_environment["ROS_DOMAIN_ID"])
    first = Robot(domain, "/left")
    second = None
    try:
        until(lambda: first.sessions)
        second = Robot(domain, "/left")
        until(lambda: second and second.sessions)
        session = read_session(second.sessions[-1])
        assert session.node == "/left/policy"
        assert session.topics.cameras["scene"] == "/left/camera/scene/image_raw"
        assert session.message_types["/left/policy/tick"] == "std_msgs/msg/String"
    finally:
        first.close()
        if second is not None:
            second.close()


# --- the command `record`

INPUTS = ("/camera/scene/image_raw", "/camera/wrist/image_raw", "/joint_states")
OUTPUTS = ("/arm_controller/joint_trajectory", "/policy/chunk", "/policy/tick", "/diagnostics", "/policy/session")


class Recording:
    """`python -m ki_vla_ros.record` as a process."""

    def __init__(self, environment: dict[str, str], folder: Path, *arguments: str) -> None:
        self.bag = folder / "bag"
        self._log = folder / "record.log"
        command = [sys.executable, "-m", "ki_vla_ros.record", "--out", str(self.bag), *arguments]
        environment = {**environment, "PYTHONPATH": f"{ROOT}:{environment.get('PYTHONPATH', '')}"}
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, preexec_fn=begin_child
            )

    @property
    def output(self) -> str:
        return self._log.read_text()

    def counts(self) -> Counter[str]:
        """How many messages of each topic are on the disk: none before the recorder has opened its file there."""
        if not self.bag.exists() or not any(self.bag.iterdir()):
            return Counter()
        with open_bag(self.bag) as bag:
            return Counter(message.topic for message in bag.messages())

    def wait_for(self, least: Mapping[str, int]) -> None:
        """Until so many messages of these topics are on the disk."""
        until(
            lambda: all(self.counts()[topic] >= count for topic, count in least.items()),
            lambda: f"{least} messages, there are {dict(self.counts())}; the recorder says {self.output!r}",
        )

    def end(self, number: signal.Signals = signal.SIGINT) -> int:
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)


@pytest.fixture
def record(ros_environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., Recording]]:
    started: list[Recording] = []

    def start_recording(*arguments: str) -> Recording:
        started.append(Recording(ros_environment, tmp_path, *arguments))
        return started[-1]

    yield start_recording
    for recording in started:
        if recording.process.poll() is None:
            recording.process.kill()
            recording.process.wait()


def test_a_recording_has_all_that_replay_needs(
    robot: Robot, start: Callable[..., PolicyProcess], record: Callable[..., Recording], bundle_path: str
) -> None:
    recording = record("--writer", "own")
    until(lambda: "waiting for /policy/session" in recording.output)
    assert not recording.bag.exists()
    # Set by parameter, not by topic: the recorder may be discovered before the node's subscription is.
    start(bundle=bundle_path, autostart=True, instruction=TASK)
    recording.wait_for(dict.fromkeys((*INPUTS, *OUTPUTS[:3]), 10))
    robot.say("point at the blue ball")
    recording.wait_for({"/policy/instruction": 1})
    assert recording.end() == 0, recording.output
    with open_bag(recording.bag) as bag:
        assert bag.faults == [] and (recording.bag / "metadata.yaml").exists()
        messages = list(bag.messages())
        session = read_session(next(decode(m).data for m in messages if m.topic == "/policy/session"))
        assert {name: topic.type for name, topic in bag.topics.items()} == {
            **session.message_types,
            "/diagnostics": "diagnostic_msgs/msg/DiagnosticArray",
        }
    of = {topic: [m for m in messages if m.topic == topic] for topic in bag.topics}
    assert session.bundle.name == load_bundle(bundle_path).manifest.name
    frame = camera_frame(of["/camera/scene/image_raw"][0], "scene")
    np.testing.assert_array_equal(frame.rgb_HWC, demo_observation(image_size=96).frames["scene"].rgb_HWC)
    assert decode(of["/policy/instruction"][-1]).data == "point at the blue ball"
    sent = {ns_of(chunk.header.stamp): chunk.points[3].positions for chunk in robot.chunks}
    kept = {ns_of(chunk.header.stamp): chunk.points[3].positions for chunk in map(decode, of["/policy/chunk"])}
    assert len(kept) >= 10
    assert all(np.array_equal(sent[stamp_ns], positions) for stamp_ns, positions in kept.items())


def test_a_robot_that_loses_power_keeps_what_was_recorded(
    robot: Robot, start: Callable[..., PolicyProcess], record: Callable[..., Recording], bundle_path: str
) -> None:
    start(bundle=bundle_path, autostart=True, instruction=TASK)
    until(lambda: robot.chunks)  # a recorder that starts after the session was published still gets it
    recording = record("--writer", "own")
    recording.wait_for(dict.fromkeys((*INPUTS, *OUTPUTS[:3]), 10))
    before = recording.counts()
    recording.end(signal.SIGKILL)
    assert not (recording.bag / "metadata.yaml").exists()
    after = recording.counts()
    assert all(after[topic] >= before[topic] for topic in before)
    assert set(after) == {*INPUTS, *OUTPUTS}


def test_a_policy_in_a_namespace(
    ros_environment: dict[str, str],
    start: Callable[..., PolicyProcess],
    record: Callable[..., Recording],
    bundle_path: str,
) -> None:
    start("-r", "__ns:=/left", bundle=bundle_path, autostart=True, instruction=TASK)
    recording = record("--writer", "own", "--ros-args", "-r", "__ns:=/left")
    robot = Robot(int(ros_environment["ROS_DOMAIN_ID"]), "/left")
    try:
        recording.wait_for({"/left/policy/chunk": 1, "/left/joint_states": 1})
        assert recording.end(signal.SIGTERM) == 0, recording.output
    finally:
        robot.close()


def test_a_recording_in_simulated_time_replays(
    robot: Robot, start: Callable[..., PolicyProcess], record: Callable[..., Recording], bundle_path: str,
    tmp_path: Path,
) -> None:  # fmt: skip
    """The recorder takes the policy's clock; before that clock has a time, it writes nothing."""
    robot.imaging = robot.stating = False
    recording = record("--writer", "own")
    start(bundle=bundle_path, autostart=True, instruction=TASK, use_sim_time=True)
    until(lambda: "waiting for /clock" in recording.output)
    assert not recording.bag.exists()
    robot.clock_ns = began_ns = 10**12
    robot.imaging = robot.stating = True
    recording.wait_for({"/policy/chunk": 20})
    assert recording.end() == 0, recording.output
    with open_bag(recording.bag) as bag:
        messages = list(bag.messages())
    assert all(began_ns <= message.log_ns <= robot.clock_ns for message in messages)
    assert read_session(next(decode(m).data for m in messages if m.topic == "/policy/session")).simulated_clock
    assert replay([str(recording.bag), "--out", str(tmp_path / "replay")]) == 0
    ticks = json.loads((tmp_path / "replay" / "metrics.json").read_text())["ticks"]
    assert ticks["count"] >= 10 and ticks["held"] <= ticks["count"] // 2


@pytest.fixture
def ros2_bag(ros_environment: dict[str, str], tmp_path: Path) -> Callable[[str], Path]:
    """`ros2 bag` cannot be installed beside the wheels, so a STAND-IN takes its place: a script of these lines.

    Before them, it writes its arguments into the file whose path is returned.
    """
    given = tmp_path / "given"

    def install(lines: str) -> Path:
        index = tmp_path / "share" / "ament_index" / "resource_index" / "packages"
        for folder in (index, tmp_path / "bin", tmp_path / "ros2bag"):
            folder.mkdir(parents=True)
        (index / "rosbag2_storage_mcap").touch()
        (tmp_path / "ros2bag" / "__init__.py").touch()
        ros2 = tmp_path / "bin" / "ros2"
        ros2.write_text(
            f'#!/bin/sh\nfor a in "$@"; do echo "$a"; done > {tmp_path}/part && mv {tmp_path}/part {given}\n{lines}\n'
        )
        ros2.chmod(0o755)
        ros_environment["PATH"] = f"{ros2.parent}:{os.environ['PATH']}"
        ros_environment["AMENT_PREFIX_PATH"] = ros_environment["PYTHONPATH"] = str(tmp_path)
        return given

    return install


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_ros2_bag(
    start: Callable[..., PolicyProcess], record: Callable[..., Recording], bundle_path: str,
    ros2_bag: Callable[[str], Path], number: signal.Signals,
) -> None:  # fmt: skip
    """A signal that a process ignores stays ignored in what takes its place."""
    given = ros2_bag("exec sleep 600")
    recording = record()
    start(bundle=bundle_path, autostart=True)
    until(given.exists)
    assert recording.end(number) == -number, recording.output


def test_ros2_bag_records_where_it_is_installed(
    start: Callable[..., PolicyProcess], record: Callable[..., Recording], bundle_path: str,
    ros2_bag: Callable[[str], Path],
) -> None:  # fmt: skip
    given = ros2_bag("")
    recording = record("--use-sim-time", "--also", "/robot/status", "--also", "marker")
    start(bundle=bundle_path, autostart=True)
    assert recording.process.wait(PATIENCE_S) == 0, recording.output
    options, _, topics = given.read_text().partition("--topics\n")
    assert options.split() == [
        "bag", "record", "--storage", "mcap", "--storage-preset-profile", "zstd_fast",
        "--output", str(recording.bag), "--disable-keyboard-controls", "--use-sim-time",
    ]  # fmt: skip
    assert set(topics.split()) == {*INPUTS, *OUTPUTS, "/policy/instruction", "/robot/status", "/marker"}


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ((), "bag exists already; remove it or choose another --out"),
        (("--out", "new", "--writer", "ros2bag"), "ros2bag is not installed; install it, or use --writer own"),
        (("--out", "new", "--also", "/my status"), "topic '/my status' of node /recorder: expected a ROS name such as"),
    ],
)
def test_impossible_options_are_refused_at_once(
    record: Callable[..., Recording], tmp_path: Path, arguments: tuple[str, ...], fault: str
) -> None:
    (tmp_path / "bag").mkdir()
    recording = record(*arguments)
    assert recording.process.wait(PATIENCE_S) == 2
    assert recording.output.startswith("python -m ki_vla_ros.record: ") and fault in recording.output


def test_without_a_policy_there_is_no_bag(record: Callable[..., Recording]) -> None:
    recording = record("--writer", "own")
    until(lambda: "waiting for /policy/session" in recording.output)
    assert recording.end() == 0
    assert "nothing was recorded: no message came on /policy/session" in recording.output and not recording.bag.exists()
