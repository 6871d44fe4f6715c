"""The session's text: what went in comes back, and any other text is refused with a reason."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.bundles import demo_policy, mixed_policy, mixed_robot

from ki_vla_ros.errors import ConfigurationError, InputError
from ki_vla_ros.robot import Robot
from ki_vla_ros.settings.names import parameter_specs
from ki_vla_ros.settings.session import BundleIdentity, Session, SessionTopics, read_session, signal_topics


def make_session(**parameters: Any) -> Session:
    values = {spec.name: spec.default for spec in parameter_specs(("scene", "wrist"), ("elbow",))}
    topics = SessionTopics(
        cameras={"scene": "/camera/scene/image_raw", "wrist": "/wrist/compressed"},
        joint_states="/joint_states",
        instruction="/policy/instruction",
        command="/arm_controller/joint_trajectory",
        chunk="/policy/chunk",
        tick="/policy/tick",
    )
    identity = BundleIdentity(name="demo", manifest_sha256="0" * 64)
    return Session(node="/policy", bundle=identity, parameters={**values, **parameters}, topics=topics)


def test_every_parameter_comes_back_with_its_type() -> None:
    given = {"rate_hz": 20.0, "threads": 2, "dry_run": True, "limits.joints.elbow.upper": 1.25}
    session = make_session(**given)
    back = read_session(session.text())
    assert back == session
    types = {name: type(value) for name, value in session.parameters.items()}
    assert {name: type(value) for name, value in back.parameters.items()} == types
    assert (back.settings.rate_hz, back.settings.limits.joints["elbow"].upper) == (20.0, 1.25)


def test_the_topics_and_their_types() -> None:
    session = make_session(**{"cameras.wrist.transport": "compressed", "publish_mode": "stream"})
    assert session.message_types == {
        "/camera/scene/image_raw": "sensor_msgs/msg/Image",
        "/wrist/compressed": "sensor_msgs/msg/CompressedImage",
        "/joint_states": "sensor_msgs/msg/JointState",
        "/arm_controller/joint_trajectory": "std_msgs/msg/Float64MultiArray",
        "/policy/chunk": "trajectory_msgs/msg/JointTrajectory",
        "/policy/instruction": "std_msgs/msg/String",
        "/policy/tick": "std_msgs/msg/String",
        "/policy/session": "std_msgs/msg/String",
    }
    assert make_session().message_types["/arm_controller/joint_trajectory"] == "trajectory_msgs/msg/JointTrajectory"


@pytest.mark.parametrize(
    "change, fault",
    [
        ({"version": 2}, "session: version: Input should be 1, got 2"),
        ({"bundle": {"name": "demo"}}, "session: bundle.manifest_sha256: Field required"),
        ({"colour": "red"}, "session: colour: Extra inputs are not permitted, got 'red'"),
    ],
)
def test_a_text_that_is_not_a_session_is_refused(change: dict[str, Any], fault: str) -> None:
    with pytest.raises(InputError) as raised:
        read_session(json.dumps({**json.loads(make_session().text()), **change}))
    assert str(raised.value).startswith(fault) and "replay with --params" in str(raised.value)


def test_a_text_that_is_not_json_is_refused() -> None:
    with pytest.raises(InputError, match="session: expected JSON, got"):
        read_session("{")


def test_a_parameter_of_another_version_is_named() -> None:
    with pytest.raises(ConfigurationError, match="parameter 'rate'"):
        _ = make_session(rate=10.0).settings


def test_the_topics_of_a_state_in_parts() -> None:
    session = make_session()
    topics = session.topics.model_copy(
        update={
            "transports": {"scene": "raw", "wrist": "compressed"},
            "states": {"joint_states": "/arm/states", "hand/states": "/hand/states"},
            "poses": {"tool_pose": "/tool"},
            "joint_states": "/arm/states",
        }
    )
    session = read_session(session.model_copy(update={"topics": topics}).text())
    types = session.message_types
    assert types["/arm/states"] == types["/hand/states"] == "sensor_msgs/msg/JointState"
    assert types["/tool"] == "geometry_msgs/msg/PoseStamped" and "/joint_states" not in types
    assert types["/wrist/compressed"] == "sensor_msgs/msg/CompressedImage", "as the robot file says, not the settings"
    robot = mixed_policy().robot
    assert signal_topics(session.settings, robot, "/policy", session) == {
        "joint_states": "/arm/states",
        "tool_pose": "/tool",
    }


def test_an_older_session_has_one_topic_of_joint_states() -> None:
    """Also where the bundle of the replay names it otherwise; what the session does not know is as in the file."""
    old = make_session(joint_states_topic="joint_states")
    assert signal_topics(old.settings, demo_policy().robot, "/policy", old) == {"joint_states": "/joint_states"}
    fields = mixed_robot()
    state = [{**d, "source": {"topic": "/my/states"}} if d["kind"] != "pose" else d for d in fields["state"]]
    robot = Robot.model_validate({**fields, "state": state})
    assert signal_topics(old.settings, robot, "/a/policy", old) == {
        "/my/states": "/joint_states",
        "tool_pose": "/a/tool_pose",
    }
