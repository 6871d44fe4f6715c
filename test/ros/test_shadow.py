"""Shadow mode in the node: it leaves the arm alone and says how far the policy is from what the arm does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from std_msgs.msg import Float64MultiArray
from support.bundles import JOINTS, TASK
from support.robots import PolicyProcess, Robot
from support.waiting import until
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from ki_vla_ros.settings.session import read_session

MS = 1_000_000
ARM = "arm_controller/joint_trajectory"


@pytest.mark.parametrize("mode", ["replace", "stream"])
def test_a_shadow_never_commands_the_arm(
    robot: Robot, start: Callable[..., PolicyProcess], bundle_path: str, mode: str
) -> None:
    shadowed: list[Any] = []
    kind = JointTrajectory if mode == "replace" else Float64MultiArray
    robot.node.create_subscription(kind, "policy/shadow/command", shadowed.append, 100)
    policy = start(bundle=bundle_path, autostart=True, instruction=TASK, shadow=True, publish_mode=mode)
    until(lambda: len(shadowed) >= 10 and len(robot.chunks) >= 10)
    assert robot.node.count_publishers(ARM) == 0
    until(lambda: robot.sessions)
    topics = read_session(robot.sessions[-1]).topics
    assert (topics.command, topics.shadow) == (f"/{ARM}", "/policy/shadow/command")
    assert "changes only while the node is unconfigured" in robot.set(shadow=False)
    # Everything else that makes a node send something: a hold for stale inputs, a latched stop, deactivation.
    robot.imaging = False
    until(lambda: robot.hold.startswith("camera"))
    robot.imaging = True
    until(lambda: robot.hold == "")
    assert robot.trigger("stop")[0] and robot.trigger("reset")[0]
    count = len(robot.chunks)
    until(lambda: len(robot.chunks) > count + 2)
    assert robot.change("deactivate")
    assert robot.node.count_publishers(ARM) == 0
    assert policy.stop() == 0, policy.output
    assert robot.commands == []
    assert "commands to ~/shadow/command" in policy.output and "not where it was sent" not in policy.output


@pytest.mark.parametrize("reference", ["joint_states", "command"])
def test_diagnostics_give_the_error_between_policy_and_arm(
    robot: Robot, start: Callable[..., PolicyProcess], bundle_path: str, reference: str
) -> None:
    start(bundle=bundle_path, autostart=True, instruction=TASK, shadow=True, shadow_reference=reference)
    until(lambda: len(robot.chunks) >= 3)
    if reference == "command":
        until(lambda: robot.diagnosed("shadow chunks without reference") not in ("", "0"))
        assert robot.diagnosed("shadow rms") == ""
        teleoperation = robot.node.create_publisher(JointTrajectory, ARM, 10)
        until(lambda: robot.node.count_subscribers(ARM) == 2)  # the robot's own, and the shadow's
        point = JointTrajectoryPoint(positions=robot.position)
        point.time_from_start.nanosec = 10 * MS
        teleoperation.publish(JointTrajectory(joint_names=list(JOINTS), points=[point]))
    until(lambda: int(robot.diagnosed("shadow chunks compared") or 0) >= 3)
    # The arm stands still, so the error is the distance that the chunks would move it.
    way_NHJ = np.array([[p.positions for p in chunk.points] for chunk in robot.chunks]) - robot.position
    largest = np.sqrt(np.mean(way_NHJ**2, axis=(0, 1))).max()
    assert 0.0 < float(robot.diagnosed("shadow rms")) <= largest * 1.5
    assert all(robot.diagnosed(f"shadow rms {joint}") for joint in JOINTS)
