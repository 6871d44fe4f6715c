"""What is read from a robot's topics: which signals, in which frame and how fast."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError
from support.bundles import mixed_robot

from ki_vla_ros.robot import Robot


def robot(**changes: Any) -> Robot:
    return Robot.model_validate(mixed_robot(**changes))


def test_a_pose_that_an_output_moves_has_its_frame_and_its_speeds() -> None:
    signals = {signal.part: signal for signal in robot().signals if signal.field == "pose"}
    assert {signal.frame for signal in signals.values()} == {"world"}
    assert signals["z"].max_velocity == 0.5 and signals["qw"].max_velocity == 0.5, "half of 1 rad/s"
    fields = mixed_robot()
    arm = [d for d in fields["actions"] if d["output"] != "tool"]
    only_seen = robot(actions=arm, outputs=[o for o in fields["outputs"] if o["name"] != "tool"])
    found = [signal for signal in only_seen.signals if signal.field == "pose"]
    assert {(signal.frame, signal.max_velocity) for signal in found} == {("", math.inf)}


def test_a_pose_is_in_one_frame_for_all_outputs() -> None:
    fields = mixed_robot()
    tool = next(o for o in fields["outputs"] if o["name"] == "tool")
    second = {**tool, "name": "second", "topic": "second/target", "frame_id": "base"}
    actions = [
        *fields["actions"],
        *({**d, "name": f"second.{d['component']}", "output": "second"} for d in fields["actions"][-3:]),
    ]
    with pytest.raises(
        ValidationError, match="'second': frame_id: expected 'world', which tool_pose is in for another"
    ):
        robot(outputs=[*fields["outputs"], second], actions=actions)
    slower = {**second, "frame_id": "", "max_linear_velocity": 0.25}
    found = [s for s in robot(outputs=[*fields["outputs"], slower], actions=actions).signals if s.field == "pose"]
    assert len(found) == 7 and {(s.frame, s.max_velocity) for s in found} == {("world", 0.25), ("world", 0.5)}


def test_a_topic_has_one_type() -> None:
    fields = mixed_robot()
    state = [{**d, "source": {"topic": "tool_pose"}} if d["name"] == "gripper" else d for d in fields["state"]]
    with pytest.raises(ValidationError, match="source: expected one type on tool_pose, got sensor_msgs/msg/JointState"):
        robot(state=state)
