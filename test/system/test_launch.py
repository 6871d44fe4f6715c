"""The launch files run by the real `launch`, with the real node: who is activated, when, and with which arguments.

launch and launch_ros come with a ROS installation only; beside the wheels they run from their sources. Where they are
missing, these tests are skipped, and test_launch_files.py shows what the files ask for.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import ROOT
from support.bundles import TASK
from support.robots import Robot
from support.waiting import PATIENCE_S, until

from ki_vla_ros.settings.session import read_session

# Not `launch` itself: that name also finds this repository's folder.
pytest.importorskip("launch_ros", reason="launch and launch_ros come with a ROS installation")

RUN = """
import sys
from launch import LaunchService
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource

service = LaunchService()
arguments = [argument.split(":=", 1) for argument in sys.argv[2:]]
source = PythonLaunchDescriptionSource(sys.argv[1])
service.include_launch_description(IncludeLaunchDescription(source, launch_arguments=arguments))
sys.exit(service.run())
"""
TWICE = """
import os
from launch import LaunchDescription
from launch.actions import GroupAction, IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import PathJoinSubstitution
from launch_ros.substitutions import FindPackageShare

def policy(**arguments):
    file = PathJoinSubstitution([FindPackageShare("ki_vla_ros"), "launch", "policy.launch.py"])
    arguments["params_file"] = os.environ["PARAMS_FILE"]
    include = IncludeLaunchDescription(PythonLaunchDescriptionSource(file), launch_arguments=arguments.items())
    return GroupAction([include])

def generate_launch_description():
    return LaunchDescription([
        policy(namespace="left", instruction="touch the red cube", use_sim_time="true", activate="false", record="true"),
        policy(namespace="right", name="second", record="true"),
    ])
"""  # noqa: E501


class Launched:
    """A launch file that runs in a process of its own, in `folder`; what it and its nodes print goes to a file."""

    def __init__(self, environment: dict[str, str], folder: Path, file: Path, *arguments: str) -> None:
        self.folder = folder
        self._log = folder / "launch.log"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", RUN, str(file), *arguments],
                cwd=folder,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._log.read_text()

    def pids(self, executable: str) -> list[int]:
        """Of all processes of this executable, oldest first."""
        return [
            int(pid) for pid in re.findall(rf"\[{executable}-\d+\]: process started with pid \[(\d+)\]", self.output)
        ]

    def interrupt(self) -> int:
        """Ctrl-C in a terminal: all processes get the signal."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(PATIENCE_S)

    def kill(self) -> None:
        for name in ("policy_node", "record", "sim_arm"):
            for pid in self.pids(name):
                if Path(f"/proc/{pid}").exists():
                    os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()


@pytest.fixture
def environment(ros_environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """With this checkout as a package that ROS finds."""
    share = tmp_path / "ros" / "share"
    (share / "ki_vla_ros" / "launch").mkdir(parents=True)
    for file in (ROOT / "launch").glob("*.launch.py"):
        (share / "ki_vla_ros" / "launch" / file.name).symlink_to(file)
    for folder in ("config", "models"):
        (share / "ki_vla_ros" / folder).symlink_to(ROOT / folder)
    (share.parent / "lib").mkdir()
    (share.parent / "lib" / "ki_vla_ros").symlink_to(ROOT / "scripts" / "ros")
    index = share / "ament_index" / "resource_index" / "packages"
    index.mkdir(parents=True)
    (index / "ki_vla_ros").touch()
    ros_environment["AMENT_PREFIX_PATH"] = f"{share.parent}:{os.environ.get('AMENT_PREFIX_PATH', sys.prefix)}"
    ros_environment["PYTHONPATH"] = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    ros_environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return ros_environment


@pytest.fixture
def launch(environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    started: list[Launched] = []

    def start(name: str, *arguments: str) -> Launched:
        folder = tmp_path / f"run{len(started)}"
        folder.mkdir()
        file = Path(name) if name.startswith("/") else ROOT / "launch" / name
        started.append(Launched(environment, folder, file, *arguments))
        return started[-1]

    yield start
    for launched in started:
        if launched.process.poll() is None:
            launched.kill()


@pytest.fixture
def params_file(tmp_path: Path) -> str:
    """For the demo's bundle, which needs nothing of the trainer; what it makes of random pictures may be odd."""
    odd = ", ".join(f"limits.{rule}: clamp" for rule in ("on_position", "on_speed", "on_jump"))
    path = tmp_path / "arm.yaml"
    # Of several sections for one node the last counts, here even against what the launch file sets for /policy.
    path.write_text(
        f"/**:\n  ros__parameters: {{bundle: demo, {odd}}}\n"
        "/policy:\n  ros__parameters: {threads: 1}\n/*:\n  ros__parameters: {autostart: true}\n"
    )
    return str(path)


def stays_inactive(robot: Robot) -> bool:
    """Longer than the launch file has ever taken to activate a node."""
    count = len(robot.commands)
    time.sleep(1.0)
    return robot.state == "inactive" and len(robot.commands) == count


def test_it_activates_the_node_once(robot: Robot, launch: Callable[..., Launched], params_file: str) -> None:
    launched = launch("policy.launch.py", f"params_file:={params_file}", f"instruction:={TASK}", "respawn:=true")
    until(lambda: len(robot.commands) > 3)
    for step in ("deactivate", "cleanup", "configure"):
        assert robot.change(step)
    assert stays_inactive(robot)
    assert robot.change("activate") and robot.trigger("stop")[0]
    for step in ("deactivate", "cleanup", "configure"):
        assert robot.change(step)
    assert stays_inactive(robot)
    # A process that was started again waits for someone who orders it to move, too. It ends in peace here, because a
    # crash would leave its services behind for as long as DDS believes in them.
    os.kill(launched.pids("policy_node")[0], signal.SIGTERM)
    until(lambda: len(launched.pids("policy_node")) == 2)
    until(lambda: launched.output.count("unconfigured: waiting for a lifecycle client") == 2)
    assert robot.state == "unconfigured" and robot.change("configure")
    assert stays_inactive(robot)
    assert robot.change("activate")
    count = len(robot.commands)
    until(lambda: len(robot.commands) > count + 3)
    assert launched.interrupt() == 0, launched.output
    assert not any(Path(f"/proc/{pid}").exists() for pid in launched.pids("policy_node"))


def test_a_configure_that_failed_uses_up_the_order_to_activate(
    robot: Robot, launch: Callable[..., Launched], params_file: str
) -> None:
    launched = launch("policy.launch.py", f"params_file:={params_file}", "bundle:=/not/there")
    until(lambda: "cannot configure: " in launched.output)
    assert robot.set(bundle="demo") == "" and robot.change("configure")
    assert stays_inactive(robot)
    assert launched.interrupt() == 0


def test_a_process_that_dies_before_it_is_configured_uses_it_up_too(
    robot: Robot, launch: Callable[..., Launched], params_file: str
) -> None:
    launched = launch("policy.launch.py", f"params_file:={params_file}", "respawn:=true")
    until(lambda: launched.pids("policy_node"))
    os.kill(launched.pids("policy_node")[0], signal.SIGKILL)
    until(lambda: "limits: " in launched.output, "the second process to be configured")
    assert stays_inactive(robot)
    assert launched.interrupt() == 0


def test_two_includes_keep_their_arguments_to_themselves(
    ros_environment: dict[str, str], launch: Callable[..., Launched], params_file: str, tmp_path: Path
) -> None:
    """The right policy comes second and leaves out what the left one was given."""
    (tmp_path / "twice.launch.py").write_text(TWICE)
    ros_environment["PARAMS_FILE"] = params_file
    launched = launch(str(tmp_path / "twice.launch.py"))
    robot = Robot(int(ros_environment["ROS_DOMAIN_ID"]), "/left")
    try:
        until(lambda: robot.sessions)
        left = read_session(robot.sessions[-1])
        assert (left.node, left.settings.instruction, left.simulated_clock) == ("/left/policy", TASK, True)
        assert robot.state == "inactive"
        until(lambda: "holding: camera" in launched.output)  # that the right one is active
        assert "[right.second]: holding: camera" in launched.output and robot.state == "inactive"
        robot.clock_ns = 10**12
        bags = {name: f"recording into {name}_2" for name in ("left_policy", "right_second")}
        until(lambda: all(said in launched.output for said in bags.values()))
        time.sleep(1.0)  # the policies' sessions reach the disk
        assert launched.interrupt() == 0, launched.output
    finally:
        robot.close()
    assert sorted(path.name[:12] for path in launched.folder.glob("*_20*")) == ["left_policy_", "right_second"]


def test_the_demo_moves_into_a_namespace_and_follows_the_clock(
    ros_environment: dict[str, str], launch: Callable[..., Launched], tmp_path: Path
) -> None:
    bag = tmp_path / "bag"
    launched = launch(
        "demo.launch.py", "namespace:=left", "use_sim_time:=true", f"instruction:={TASK}",
        "record:=true", f"record_to:={bag}",
    )  # fmt: skip
    robot = Robot(int(ros_environment["ROS_DOMAIN_ID"]), "/left")
    robot.imaging = robot.stating = False
    robot.clock_ns = 10**12
    try:
        until(lambda: len(robot.chunks) > 5, "chunks of the policy")
        nodes = {f"{space}/{name}" for name, space in robot.node.get_node_names_and_namespaces()}
        assert {"/left/policy", "/left/sim_arm", "/left/recorder"} <= nodes
        own = {"/clock", "/diagnostics", "/parameter_events", "/rosout", "/tf"}
        topics = {topic for topic, _ in robot.node.get_topic_names_and_types()}
        assert not {topic for topic in topics if not topic.startswith("/left/")} - own
        stamp = robot.chunks[-1].header.stamp
        assert 1000 <= stamp.sec < 1000 + 60
        until(bag.exists)
        assert launched.interrupt() == 0, launched.output
    finally:
        robot.close()
    assert (bag / "metadata.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ((), "missing required argument 'params_file'"),
        (
            ("params_file:=/nowhere.yaml",),
            "argument params_file: expected a file, got '/nowhere.yaml', which is missing",
        ),
        (("params_file:={}", "urdf:=/no.urdf"), "argument urdf: expected a file, got '/no.urdf', which is missing"),
        (("params_file:={}", "activate:=yes"), "argument activate: expected true or false, got 'yes'"),
    ],
)
def test_nothing_starts_with_impossible_arguments(
    launch: Callable[..., Launched], params_file: str, arguments: tuple[str, ...], fault: str
) -> None:
    launched = launch("policy.launch.py", *(argument.format(params_file) for argument in arguments))
    assert launched.process.wait(PATIENCE_S) == 1
    assert fault in launched.output and launched.pids("policy_node") == []
