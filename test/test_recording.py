"""What the node says for the record, over real ROS; the node is a process of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from robots import TASK, PolicyProcess, Robot, until

from ki_vla_ros.bundle import load_bundle
from ki_vla_ros.session import read_session

pytestmark = pytest.mark.filterwarnings("ignore:module 'sre_:DeprecationWarning")  # as in test_node.py


def test_the_session_says_what_runs(robot: Robot, start: Callable[..., PolicyProcess], bundle_path: str) -> None:
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


def test_who_comes_later_gets_the_session_too(
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
