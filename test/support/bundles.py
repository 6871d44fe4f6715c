"""A bundle, a policy and an observation for tests; training/export/tiny.py makes the bundle.

The trainer is imported by what needs it: the robot's own environment lacks what it needs (test/conftest.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ki_vla_ros.bundle.folder import Bundle
from ki_vla_ros.bundle.format2 import robot_from
from ki_vla_ros.bundle.manifest import PolicySpec
from ki_vla_ros.records import CameraFrame, Observation
from ki_vla_ros.robot.axes import Axis
from ki_vla_ros.robot.robot import Robot
from support.vocabularies import DEMO_PROMPT, DEMO_WORDS

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow", "forearm_roll", "wrist_pitch", "wrist_roll", "gripper")
CAMERAS = ("scene", "wrist")
HORIZON = 16
IMAGE_SIZE = 96
PROMPT_LENGTH = 32
TASK = "touch the red cube"


def demo_policy(**changes: Any) -> PolicySpec:
    """The demo robot's policy; `changes` replace whole fields."""
    arm = [
        {"name": name, "unit": "rad", "lower": -3.1, "upper": 3.1, "max_velocity": 3.0, "relative": True}
        for name in JOINTS[:-1]
    ]
    gripper = {"name": "gripper", "unit": "m", "lower": 0.0, "upper": 0.04, "max_velocity": 0.1, "relative": True}
    fields: dict[str, Any] = {
        "name": "test-policy",
        "created": "2026-01-01T00:00:00Z",
        "cameras": [{"name": name} for name in CAMERAS],
        "image": {"size": IMAGE_SIZE},
        "prompt": {"template": DEMO_PROMPT, "length": PROMPT_LENGTH},
        "joints": [*arm, gripper],
        "state": {"encoding": "text", "low": [-3.1] * 6 + [0.0], "high": [3.1] * 6 + [0.04]},
        "action": {"low": [-0.4] * 6 + [-0.04], "high": [0.4] * 6 + [0.04]},
        "horizon": HORIZON,
        "action_period_s": 0.05,
        "max_prefix_delay": 4,
        "provenance": {"recipe": "random", "seed": 0, "commit": "none", "data_fingerprint": "none"},
    }
    return PolicySpec.model_validate({**fields, **changes})


def joint_fields(axis: Axis) -> dict[str, Any]:
    """A joint as files of format 2, and `demo_policy(joints=...)`, have it."""
    names = ("name", "unit", "lower", "upper", "max_velocity", "relative", "continuous")
    return {name: getattr(axis, name) for name in names}


def robot_of(axes: Sequence[Axis], horizon: int = HORIZON, period_s: float = 0.05) -> Robot:
    """An arm with one camera and these joints behind one controller."""
    fields = {"joints": [joint_fields(axis) for axis in axes], "horizon": horizon, "action_period_s": period_s}
    return robot_from({"cameras": [{"name": "scene"}], **fields})


def mixed_robot(**changes: Any) -> dict[str, Any]:
    """A robot whose parts take commands in all ways: two trajectory controllers, velocities, a base, a tool's pose."""
    joint = {"kind": "joint_position", "unit": "rad"}
    limits = {"lower": -2.0, "upper": 2.0, "max_velocity": 2.0, "output": "arm"}
    slide = {"name": "slide", "kind": "joint_velocity", "unit": "m/s", "max_velocity": 0.5, "output": "slide"}
    twist = {"kind": "twist", "max_velocity": 0.6, "output": "base"}
    tool = {"type": "geometry_msgs/msg/PoseStamped", "topic": "tool_pose"}
    parts = ("x", "y", "z", "qx", "qy", "qz", "qw")
    fields: dict[str, Any] = {
        "name": "mixed",
        "cameras": [{"name": name} for name in CAMERAS],
        "state": [
            {"name": "shoulder", **joint},
            {"name": "elbow", **joint},
            {"name": "gripper", "kind": "gripper", "unit": "m", "open": 0.04, "closed": 0.0},
            {"name": "slide", "kind": "joint_position", "unit": "m", "lower": -1.0, "upper": 1.0},
            *({"name": f"tool.{part}", "kind": "pose", "component": part, "source": tool} for part in parts),
        ],
        "actions": [
            {"name": "shoulder", **joint, **limits, "relative": True},
            {"name": "elbow", **joint, **limits, "relative": True},
            {"name": "gripper", "kind": "gripper", "unit": "m", "open": 0.04, "closed": 0.0, "max_velocity": 0.1,
             "output": "hand"},
            slide,
            {"name": "forward", "component": "vx", **twist},
            {"name": "turn", "component": "wz", **twist},
            *({"name": f"tool.{part}", "kind": "pose_delta", "component": part, "output": "tool"} for part in "xyz"),
        ],
        "outputs": [
            {"name": "arm", "topic": "arm/joint_trajectory", "type": "trajectory_msgs/msg/JointTrajectory"},
            {"name": "hand", "topic": "hand/joint_trajectory", "type": "trajectory_msgs/msg/JointTrajectory"},
            {"name": "slide", "topic": "slide/commands", "type": "std_msgs/msg/Float64MultiArray"},
            {"name": "base", "topic": "cmd_vel", "type": "geometry_msgs/msg/TwistStamped", "frame_id": "base"},
            {"name": "tool", "topic": "tool/target", "type": "geometry_msgs/msg/PoseStamped", "frame_id": "world",
             "workspace": {"x": [-1, 1], "y": [-1, 1], "z": [0, 1]}, "max_linear_velocity": 0.5,
             "max_angular_velocity": 1.0},
        ],
        "action_period_s": 0.05,
        "horizon": HORIZON,
    }  # fmt: skip
    return {**fields, **changes}


def mixed_policy(**changes: Any) -> PolicySpec:
    """`demo_policy` for the `mixed_robot`."""
    fields: dict[str, Any] = demo_policy().model_dump(exclude={"robot"})
    robot = Robot.model_validate(mixed_robot())
    states, actions = len(robot.state), len(robot.actions)
    fields["state"] |= {"low": [-3.1] * states, "high": [3.1] * states}
    fields["action"] = {"low": [-0.4] * (actions - 3) + [-0.01] * 3, "high": [0.4] * (actions - 3) + [0.01] * 3}
    return PolicySpec.model_validate({**fields, "robot": mixed_robot(), **changes})


def state_token_policy() -> PolicySpec:
    """Like `demo_policy`, with the state as a token of the expert instead of text."""
    low, high = demo_policy().state.low, demo_policy().state.high
    return demo_policy(
        prompt={"template": "Task: {task};\nAction: ", "length": PROMPT_LENGTH},
        state={"encoding": "token", "low": low, "high": high},
    )


def both_ways_policy() -> PolicySpec:
    """Like `demo_policy`, with the state as text and as a token."""
    low, high = demo_policy().state.low, demo_policy().state.high
    return demo_policy(state={"encoding": "both", "low": low, "high": high})


def write_test_bundle(folder: Path, policy: PolicySpec | None = None, seed: int = 0) -> Bundle:
    """Make `folder` a valid bundle with random weights drawn from `seed`."""
    from training.export.tiny import write_tiny_bundle

    return write_tiny_bundle(folder, policy or demo_policy(), seed, DEMO_WORDS)


def demo_observation(stamp_ns: int = 1_000_000_000, image_size: int = 288, seed: int = 0) -> Observation:
    """Pictures of random colours (both cameras) and a state within the limits."""
    rng = np.random.default_rng(seed)
    frames = {}
    for name in CAMERAS:
        tint = rng.integers(0, 226, 3)
        grain = rng.integers(0, 30, (image_size, image_size, 3))
        frames[name] = CameraFrame(name, stamp_ns, (tint + grain).astype(np.uint8))
    return Observation(stamp_ns, frames, np.array([0.1, -0.5, 0.8, 0.0, 0.9, -0.2, 0.0]))


def params_file(folder: Path, node: str = "/**/policy", **values: Any) -> Path:
    """A parameter file for `node`, written as JSON, which is YAML."""
    path = folder / "robot.yaml"
    path.write_text(json.dumps({node: {"ros__parameters": {"bundle": "demo", "max_age_s": 0.4, **values}}}))
    return path
