"""Where a robot with one or several outputs is told what to do: settings, robot file and session agree, or say so."""

from __future__ import annotations

from typing import Any

import pytest
from support.bundles import demo_policy, mixed_policy, mixed_robot

from ki_vla_ros.bundle.manifest import PolicySpec
from ki_vla_ros.errors import ParameterError
from ki_vla_ros.robot.robot import Robot
from ki_vla_ros.settings.names import settings_from_parameters
from ki_vla_ros.settings.session import (
    BundleIdentity,
    CommandTopic,
    Session,
    SessionTopics,
    command_topics,
    read_session,
    shadow_topics,
)

TRAJECTORY, ARRAY = "trajectory_msgs/msg/JointTrajectory", "std_msgs/msg/Float64MultiArray"
FOLLOW = "control_msgs/action/FollowJointTrajectory"
ROBOT = Robot.model_validate(mixed_robot())


def only_stream() -> PolicySpec:
    """The mixed robot with nothing but its slide."""
    fields = mixed_robot()
    fields["outputs"], fields["actions"] = fields["outputs"][2:3], fields["actions"][3:4]
    policy = mixed_policy().model_dump(exclude={"robot"})
    policy["action"] = {"low": [-1.0], "high": [1.0]}
    return PolicySpec.model_validate({**policy, "robot": fields})


def arm_and_gripper(arm: str | None) -> PolicySpec:
    """The mixed robot's arm, of this type, and its gripper by an action."""
    fields = mixed_robot()
    fields["outputs"] = [
        {"name": "arm", "topic": "arm", "type": arm},
        {"name": "hand", "topic": "hand/grip", "type": "control_msgs/action/GripperCommand"},
    ]
    fields["actions"] = fields["actions"][:3]
    policy = mixed_policy().model_dump(exclude={"robot"})
    policy["action"] = {"low": [-1.0] * 3, "high": [1.0] * 3}
    return PolicySpec.model_validate({**policy, "robot": fields})


def misfits(policy: PolicySpec, **parameters: object) -> str:
    try:
        settings_from_parameters(parameters).validate_against(policy)
    except ParameterError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("policy", "parameters", "fault"),
    [
        (demo_policy, {"publish_mode": "stream", "command_topic": "forward"}, ""),
        (demo_policy, {"publish_mode": "splice"}, ""),
        (mixed_policy, {}, ""),
        (mixed_policy, {"publish_mode": "splice"}, ""),
        (only_stream, {}, ""),
        (only_stream, {"publish_mode": "stream", "command_topic": "elsewhere"}, ""),
        (
            mixed_policy,
            {"command_topic": "forward"},
            "'command_topic': got 'forward', but the robot file of the bundle has 5 outputs: arm/",
        ),
        (
            mixed_policy,
            {"publish_mode": "stream"},
            f"'publish_mode': got stream, but the robot file gives output 'arm' the type {TRAJECTORY}",
        ),
        (
            only_stream,
            {"publish_mode": "splice"},
            f"got splice, which is for .* only outputs of {ARRAY}",
        ),
    ],
)
def test_what_disagrees_is_refused_with_both_values(policy: Any, parameters: dict[str, object], fault: str) -> None:
    found = misfits(policy(), **parameters)
    if not fault:
        assert found == ""
    elif ".*" in fault:
        start, end = fault.split(".*")
        assert start in found and end in found
    else:
        assert fault in found


def test_topics_of_several_outputs_are_those_of_the_robot_file() -> None:
    settings = settings_from_parameters({})
    found = command_topics(settings, ROBOT, "/left/policy")
    assert found["hand"] == CommandTopic(topic="/left/hand/joint_trajectory", type=TRAJECTORY)
    assert found["base"].type == "geometry_msgs/msg/TwistStamped"
    assert shadow_topics(ROBOT)["hand"] == "~/shadow/hand"
    arm = demo_policy().robot
    assert shadow_topics(arm) == {"arm": "~/shadow/command"}
    assert command_topics(settings, arm, "/p")["arm"].topic == "/arm_controller/joint_trajectory"
    named = settings_from_parameters({"command_topic": "mine", "publish_mode": "stream"})
    assert command_topics(named, arm, "/left/p")["arm"] == CommandTopic(topic="/left/mine", type=ARRAY)
    assert command_topics(named, None, "/p") == {"": CommandTopic(topic="/mine", type=ARRAY)}


def session(commands: dict[str, CommandTopic], shadow: str | None = None, **parameters: Any) -> Session:
    first = next(iter(commands.values()), CommandTopic(topic="/told", type=TRAJECTORY))
    topics = SessionTopics(
        cameras={}, joint_states="/j", instruction="/i", chunk="/k", tick="/t", command=first.topic, commands=commands,
        shadow=shadow,
    )  # fmt: skip
    return Session(
        node="/policy", bundle=BundleIdentity(name="b", manifest_sha256="0"), parameters=parameters, topics=topics
    )


def test_a_session_names_every_output_and_the_type_of_each() -> None:
    commands = {
        "arm": CommandTopic(topic="/there/arm", type=FOLLOW, shadow="/policy/shadow/arm"),
        "slide": CommandTopic(topic="/there/slide", type=ARRAY, shadow="/policy/shadow/slide"),
    }
    back = read_session(session(commands).text())
    assert back.commands == commands
    types = back.message_types
    # A goal is no message, but what a shadow would command is.
    assert "/there/arm" not in types and types["/policy/shadow/arm"] == TRAJECTORY
    assert types["/there/slide"] == types["/policy/shadow/slide"] == ARRAY
    found = command_topics(back.settings, ROBOT, "/policy", back)
    assert found["slide"].topic == "/there/slide" and found["tool"].topic == "/tool/target"


def test_an_older_session_has_one_command_topic() -> None:
    old = session({}, shadow="/policy/shadow/command", publish_mode="stream")
    assert old.commands == {"": CommandTopic(topic="/told", type=ARRAY, shadow="/policy/shadow/command")}
    assert old.message_types["/told"] == old.message_types["/policy/shadow/command"] == ARRAY
    assert command_topics(old.settings, demo_policy().robot, "/policy", old)["arm"].topic == "/told"
    assert command_topics(old.settings, None, "/policy", old)[""].topic == "/told"


def test_names_of_outputs_become_parts_of_topic_names() -> None:
    names = ["left arm", "2nd", "a-b", "a.b"]
    outputs = [{"name": name, "topic": f"t{n}"} for n, name in enumerate(names)]
    action = {"kind": "joint_position", "unit": "rad", "lower": -1, "upper": 1, "max_velocity": 1}
    actions = [{"name": f"j{n}", "output": name, **action} for n, name in enumerate(names)]
    state = [{"name": f"j{n}", "kind": "joint_position", "unit": "rad"} for n in range(4)]
    robot = Robot.model_validate(mixed_robot(outputs=outputs, actions=actions, state=state))
    assert list(robot.output_tokens.values()) == ["left_arm", "output1_2nd", "output2_a_b", "output3_a_b"]
