"""What a bag says the robot was told, joined from the topics of all its outputs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.bundles import demo_policy, mixed_policy

from ki_vla_ros.bundle.manifest import PolicySpec
from ki_vla_ros.errors import ConfigurationError, InputError
from ki_vla_ros.messages import IMAGE, JOINT_STATE, POSE, BagMessage
from ki_vla_ros.messages.encoding import encode_array, encode_command, encode_stamped
from ki_vla_ros.records import NS_PER_S, Motion
from ki_vla_ros.replay.inputs import Inbox
from ki_vla_ros.replay.setup import ReplayOptions
from ki_vla_ros.replay.topics import ReplayTopics, resolve_topics
from ki_vla_ros.settings.settings import Settings

TRAJECTORY, ARRAY = "trajectory_msgs/msg/JointTrajectory", "std_msgs/msg/Float64MultiArray"
INPUTS = {
    **{f"/camera/{name}/image_raw": IMAGE for name in ("scene", "wrist")},
    "/joint_states": JOINT_STATE,
    "/tool_pose": POSE,
}
TOLD = {
    "/arm/joint_trajectory": TRAJECTORY,
    "/hand/joint_trajectory": TRAJECTORY,
    "/slide/commands": ARRAY,
    "/cmd_vel": "geometry_msgs/msg/TwistStamped",
    "/tool/target": POSE,
}
NOW = 10 * NS_PER_S


def resolved(types: dict[str, str], policy: PolicySpec | None = None, topic: str = "") -> ReplayTopics:
    topics = {name: SimpleNamespace(type=kind, count=3) for name, kind in types.items()}
    bag: Any = SimpleNamespace(path=Path("bag"), topics=topics)
    return resolve_topics(bag, policy or mixed_policy(), Settings(), None, None, "command", topic)


def test_all_outputs_together_are_the_reference() -> None:
    topics = resolved(INPUTS | TOLD)
    assert list(topics.commands.values()) == list(TOLD) and topics.missing_reference is None
    assert topics.described()["command slide"] == "/slide/commands"
    assert set(TOLD) <= set(topics.all)
    inbox = Inbox(topics, ReplayOptions(), SimpleNamespace(), mixed_policy().robot, 96, False, lambda _: None)  # type: ignore[arg-type]
    names = mixed_policy().axis_names
    motion = Motion(
        names, NOW, np.array([NOW, NOW + NS_PER_S]), np.arange(24.0).reshape(2, 12) / 100, np.zeros((2, 12))
    )
    data = {
        "/arm/joint_trajectory": encode_command(motion, NOW, axes=slice(0, 2)),
        "/hand/joint_trajectory": encode_command(motion, NOW, axes=slice(2, 3)),
        "/slide/commands": encode_array(np.array([0.5])),
        "/cmd_vel": encode_stamped(NOW, "base", np.array([0.25, 0, 0, 0, 0, -0.5])),
        "/tool/target": encode_stamped(NOW, "world", np.array([0.1, 0.2, 0.3, 0, 0, 0, 1.0])),
    }
    for topic, kind in TOLD.items():
        inbox.take(BagMessage(topic, kind, NOW, data[topic]))
    assert inbox.reference is not None
    told_J = inbox.reference.at(np.array([NOW + NS_PER_S]))[0]
    np.testing.assert_allclose(told_J, [0.12, 0.13, 0.14, 0.5, 0.25, -0.5, 0.1, 0.2, 0.3, 0, 0, 0])
    with pytest.raises(InputError, match="output 'slide': command: expected 1 numbers, got 2"):
        inbox.take(BagMessage("/slide/commands", ARRAY, NOW, encode_array(np.zeros(2))))


def test_an_output_that_the_bag_lacks_is_named_and_the_others_are_compared() -> None:
    types = {name: kind for name, kind in (INPUTS | TOLD).items() if name != "/cmd_vel"}
    topics = resolved(types)
    assert "base" not in topics.commands and topics.missing_reference is None
    assert any(note.startswith("reference: no geometry_msgs/msg/TwistStamped on /cmd_vel;") for note in topics.notes)
    none = resolved(INPUTS)
    assert none.commands == {} and str(none.missing_reference).count("; ") >= 5


def test_a_topic_for_the_reference_is_for_a_robot_of_one_output() -> None:
    with pytest.raises(ConfigurationError, match="reference_topic: got mine, but the robot has 5 outputs: arm, hand"):
        resolved(INPUTS | TOLD, topic="mine")
    types = {**INPUTS, "/mine": TRAJECTORY}
    topics = resolved(types, demo_policy(), "mine")
    assert topics.commands == {"arm": "/mine"} and topics.described()["command"] == "/mine"
    assert resolved({**INPUTS}, demo_policy()).described()["command"] is None
