"""The doctor beside a running policy on real Fast DDS: when all is well, and with other nodes that do things wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rclpy
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import JointState
from std_msgs.msg import String
from support.bundles import JOINTS, TASK, mixed_robot, params_file
from support.robots import PolicyProcess, Robot
from support.waiting import until
from trajectory_msgs.msg import JointTrajectory

from ki_vla_ros.doctor.__main__ import diagnose, main
from ki_vla_ros.doctor.findings import Findings
from ki_vla_ros.doctor.graph import COMMAND_QOS, _check_controller, _check_endpoints, is_policy_node
from ki_vla_ros.doctor.inputs import Expected, InputWatch
from ki_vla_ros.doctor.setup import Machine, Request
from ki_vla_ros.robot.robot import Robot as RobotFile
from ki_vla_ros.settings.session import command_topics
from ki_vla_ros.settings.settings import Settings
from ki_vla_ros.share import find_share

MACHINE = Machine((3, 11), "2.1.0", {"FASTDDS_DEFAULT_PROFILES_FILE": str(find_share("config/fastdds.xml"))})
SECONDS = 2.0


# Findings that a busy machine really causes; test/unit/doctor tests them on planted messages.
OF_A_BUSY_MACHINE = {"image loss", "gap", "max age", "stamps", "camera skew", "camera rate", "joint rate"}


def found(findings: Findings) -> set[tuple[str, str]]:
    return {(finding.check, finding.where) for finding in findings if finding.check not in OF_A_BUSY_MACHINE}


def diagnose_until(expected: set[tuple[str, str]]) -> tuple[Findings, Sequence[str]]:
    """Diagnoses again until the findings are as expected: a busy machine discovers new nodes late."""
    looks: list[tuple[Findings, Sequence[str]]] = []

    def look() -> bool:
        looks.append(diagnose(Request(seconds=SECONDS), MACHINE))
        return found(looks[-1][0]) == expected

    until(look, f"{expected}")
    return looks[-1]


# rclpy warns the careless publisher through an interface that rclpy itself has deprecated.
@pytest.mark.filterwarnings("ignore:Deprecated in favor of:DeprecationWarning")
def test_a_running_policy(robot: Robot, start: Callable[..., PolicyProcess], bundle_path: str, tmp_path: Path) -> None:
    robot.do(lambda: robot.node.destroy_publisher(robot._clock))
    remapped = ("-r", "states:=joint_states", "-r", "front:=camera/scene/image_raw")
    topics = {"joint_states_topic": "states", "cameras__scene__topic": "front"}
    start(*remapped, bundle=bundle_path, autostart=True, instruction=TASK, max_age_s=1.0, **topics)
    until(lambda: len(robot.commands) >= 5)
    _, looked_at = diagnose_until(set())
    assert {"parameters of /policy", "topics as the node says"} <= set(looked_at)

    # Everything that other nodes may do wrong, all at once.
    careless = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
    robot.node.create_publisher(String, "policy/instruction", careless)
    robot.node.create_publisher(JointTrajectory, "arm_controller/joint_trajectory", 1)
    robot.node.create_publisher(JointState, "joint_states", 1)
    robot.node.create_publisher(Clock, "/clock", 1)
    robot.imaging = False
    controller = rclpy.create_node("arm_controller", context=robot.context)
    values = {"joints": [*JOINTS[:-1], "rail"], "interpolation_method": "none", "interpolate_from_desired_state": False}
    for name, value in values.items():
        controller.declare_parameter(name, value)
    robot._executor.add_node(controller)
    expected = {("missing", f"/camera/{name}/image_raw") for name in robot.image} | {
        ("qos", "/policy/instruction"),
        ("command", "/arm_controller/joint_trajectory"),
        ("joint states", "/joint_states"),
        ("clock", "/policy"),
        ("controller", "/arm_controller"),
    }
    findings, _ = diagnose_until(expected)
    two = {f.check: f.found for f in findings if f.check in ("joint states", "command")}
    assert "published 2 times, by /robot, /robot" in two["joint states"]
    assert "also published by /robot: two masters" in two["command"]
    told = [f.found for f in findings if f.check == "controller"]
    assert len(told) == 4 and any(f"does not move {JOINTS[-1]}" in t for t in told) and any("rail" in t for t in told)
    robot.do(lambda: (robot._executor.remove_node(controller), controller.destroy_node()))

    # The parameters of a file, not the running node's.
    robot.imaging = True
    params = params_file(tmp_path, command_topic="arm/joint_trajectory", bundle=bundle_path, max_age_s=1.0)
    findings, _ = diagnose(Request(params=params, seconds=SECONDS), MACHINE)
    (command,) = [f for f in findings if f.check == "command"]
    assert command.where == "/arm/joint_trajectory" and "there is /arm_controller/joint_trajectory" in command.fix


def test_every_output_of_a_robot_is_looked_at() -> None:
    """A graph that is made up: the arm's controller moves another joint, one topic is of another type, one unheard."""
    fields = mixed_robot()
    fields["outputs"][1] |= {"topic": "hand/grip", "type": "control_msgs/action/GripperCommand"}
    robot = RobotFile.model_validate(fields)
    commands = command_topics(Settings(), robot, "/policy")
    heard = {"/arm/joint_trajectory": "arm", "/slide/commands": "slide", "/cmd_vel": "twist"}
    types = {output.topic: output.type for output in commands.values()} | {"/cmd_vel": "geometry_msgs/msg/Twist"}

    def listeners(topic: str) -> list[Any]:
        return [SimpleNamespace(topic_type=types[topic], qos_profile=COMMAND_QOS)] if topic in heard else []

    node = SimpleNamespace(
        get_publishers_info_by_topic=lambda topic: [],
        get_subscriptions_info_by_topic=listeners,
        get_topic_names_and_types=lambda: [],
        get_service_names_and_types=lambda: [],
    )
    values = {"joints": ["shoulder", "elbow", "rail"]}
    graph: Any = SimpleNamespace(node=node, nodes=["/arm"], parameters=lambda name, names: values)
    watch = InputWatch(Expected({}, {}, robot=robot), Settings(), {}, commands)
    findings = Findings()
    _check_endpoints(graph, watch, "/policy", True, findings)
    for output in commands:
        _check_controller(graph, watch, output, findings)
    told = {(f.check, f.where): f.found for f in findings}
    assert told == {
        ("command", "/hand/grip"): "no server of control_msgs/action/GripperCommand here",
        (
            "command",
            "/cmd_vel",
        ): "nobody subscribes to geometry_msgs/msg/TwistStamped here, only geometry_msgs/msg/Twist",
        ("command", "/tool/target"): "nobody subscribes to geometry_msgs/msg/PoseStamped here",
        ("controller", "/arm"): "expects rail too, which the bundle does not move, and refuses every command",
    }
    assert all("the output's topic in the robot file" in f.fix for f in findings if f.check == "command")


def test_simulated_time_without_a_clock(robot: Robot, start: Callable[..., PolicyProcess], bundle_path: str) -> None:
    robot.do(lambda: robot.node.destroy_publisher(robot._clock))
    start(bundle=bundle_path, autostart=True, use_sim_time=True)
    until(lambda: robot.diagnostics)
    findings, _ = diagnose(Request(seconds=SECONDS), MACHINE)
    assert ("clock", "/policy") in found(findings)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("python3 /opt/ros/my/lib/ki_vla_ros/policy_node --ros-args -r __node:=policy", True),
        ("python -m ki_vla_ros.ros.node --ros-args", True),
        ("python -m ki_vla_ros node", True),
        ("/home/me/venv/bin/python /home/me/venv/bin/ki-vla node --ros-args", True),
        ("python /home/me/venv/bin/ki-vla doctor --node /policy", False),
        ("vi node", False),
    ],
)
def test_the_nodes_process_is_recognised_by_its_command(command: str, expected: bool) -> None:
    assert is_policy_node(command.encode().split(b" ")) is expected


def test_nothing_runs(ros_environment: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    findings, _ = diagnose(
        Request(seconds=0.1), Machine((3, 11), "2.1.0", {"ROS_DOMAIN_ID": ros_environment["ROS_DOMAIN_ID"]})
    )
    assert found(findings) == {("node", "/policy"), ("fast dds", "FASTDDS_DEFAULT_PROFILES_FILE")}
    assert main(["--seconds", "0.1"]) == 1
    assert "does not run in this ROS domain, where there are no nodes" in " ".join(capsys.readouterr().out.split())


def test_an_impossible_domain(
    ros_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ROS_DOMAIN_ID", "4000")
    assert main([]) == 2
    assert "ROS_DOMAIN_ID: expected 0 to 232" in capsys.readouterr().err
