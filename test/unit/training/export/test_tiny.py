"""Tiny bundles with random weights for the robots of robot files, whatever their actions are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ki_vla_ros.bundle.folder import load_bundle
from ki_vla_ros.engines.onnx_engine import OnnxEngine
from ki_vla_ros.policy.policy import Policy
from ki_vla_ros.records import CameraFrame, Observation
from ki_vla_ros.robot.robot import Robot, find_robot, read_robot
from training.export.tiny import main, robot_policy, write_tiny_bundle

JOINT = {"kind": "joint_position", "unit": "rad"}
GRIPPER = {"kind": "gripper", "unit": "m", "open": 0.04, "closed": 0.0}
POSE = {"kind": "pose", "source": {"topic": "pose", "type": "geometry_msgs/msg/PoseStamped"}}
BOX = {
    "workspace": {"x": [0.2, 0.8], "y": [-0.4, 0.4], "z": [0.0, 0.6]},
    "max_linear_velocity": 0.3,
    "max_angular_velocity": 1.0,
}
OUTPUTS: dict[str, dict[str, Any]] = {
    "pose": {"type": "geometry_msgs/msg/PoseStamped", **BOX},
    "hand": {"type": "trajectory_msgs/msg/JointTrajectory"},
    "speeds": {"type": "std_msgs/msg/Float64MultiArray"},
    "base": {"type": "geometry_msgs/msg/TwistStamped"},
}


def robot_of(state: list[dict[str, Any]], actions: list[dict[str, Any]]) -> Robot:
    used = {action["output"] for action in actions}
    return Robot.model_validate(
        {
            "name": "made up",
            "cameras": [{"name": "front"}],
            "state": state,
            "actions": actions,
            "outputs": [
                {"name": name, "topic": f"{name}/command", **fields} for name, fields in OUTPUTS.items() if name in used
            ],
            "action_period_s": 0.05,
            "horizon": 10,
        }
    )


def stepping() -> Robot:
    """The end effector's steps and a binary gripper: eight numbers of state, seven of action."""
    parts = ("x", "y", "z", "rx", "ry", "rz")
    state = [{"name": part, "component": part, **POSE} for part in parts]
    fingers = [{"name": f"finger{n}", "kind": "gripper", "unit": "m", "open": 0.04, "closed": 0.0} for n in (1, 2)]
    actions = [{"name": part, "component": part, "kind": "pose_delta", "output": "pose"} for part in parts]
    hand = {"name": "finger1", **GRIPPER, "binary": True, "max_velocity": 0.2, "output": "hand"}
    return robot_of([*state, *fingers], [*actions, hand])


def driving() -> Robot:
    """Joint velocities, and a base's twist that nothing measures."""
    state = [{"name": f"j{n}", **JOINT, "lower": -2.0, "upper": 2.0} for n in range(3)]
    speeds = [
        {"name": f"j{n}", "kind": "joint_velocity", "unit": "rad/s", "max_velocity": 1.5, "output": "speeds"}
        for n in range(3)
    ]
    twist = [
        {"name": part, "kind": "twist", "component": part, "max_velocity": 0.5, "output": "base"}
        for part in ("vx", "wz")
    ]
    return robot_of(state, [*speeds, *twist])


def placing() -> Robot:
    """Absolute poses with a quaternion, and an absolute gripper."""
    parts = ("x", "y", "z", "qx", "qy", "qz", "qw")
    state = [{"name": part, "component": part, **POSE} for part in parts]
    actions = [{"name": part, "component": part, "kind": "pose", "output": "pose"} for part in parts]
    hand = {"name": "hand", **GRIPPER, "max_velocity": 0.2, "output": "hand"}
    return robot_of([*state, {"name": "hand", **GRIPPER}], [*actions, hand])


def aloha() -> Robot:
    return read_robot(find_robot("aloha"))


def somewhere(robot: Robot) -> Observation:
    """Grey pictures, and every signal in the middle of where it may be; poses are upright."""
    grey = np.full((48, 64, 3), 128, np.uint8)
    middle = {"qw": 1.0, "x": 0.5, "z": 0.3}
    signal_M = np.array(
        [
            (s.lower + s.upper) / 2.0 if np.isfinite(s.upper - s.lower) else middle.get(s.part, 0.0)
            for s in robot.signals
        ]
    )
    state_S = np.zeros(len(robot.state))
    return Observation(0, {name: CameraFrame(name, 0, grey) for name in robot.camera_names}, state_S, (), signal_M)


@pytest.mark.parametrize("make", [aloha, stepping, driving, placing])
def test_a_robot_moves_slowly_and_within_its_limits(tmp_path: Path, make: Any) -> None:
    robot = make()
    bundle = write_tiny_bundle(tmp_path / "b", robot_policy(robot), text="Go, go there!")
    assert bundle.manifest.robot == robot
    assert (bundle.manifest.graph.state_dim, bundle.manifest.graph.action_dim) == (
        len(robot.state),
        len(robot.actions),
    )
    engine = OnnxEngine(bundle)
    try:
        chunk = Policy(bundle, engine).infer(somewhere(robot), "Go there, go", 0)
    finally:
        engine.close()
    assert chunk.position_HJ.shape == (robot.horizon, len(robot.axes))
    speed_J = np.abs(np.diff(chunk.position_HJ, axis=0)).max(axis=0) / robot.action_period_s
    for axis, speed, path_H in zip(robot.axes, speed_J, chunk.position_HJ.T, strict=True):
        if not (axis.kind == "gripper" and "finger" in axis.name):  # a binary one may jump; the governor bounds it
            assert speed < 0.6 * axis.max_velocity, axis.name
        assert axis.lower - 1e-6 <= path_H.min() and path_H.max() <= axis.upper + 1e-6, axis.name
    assert speed_J.max() > 0.0


def test_the_command_takes_a_robot_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "b"), "--robot", "aloha", "--seed", "3"]) == 0
    assert load_bundle(tmp_path / "b").manifest.robot == aloha()
    assert main([str(tmp_path / "c"), "--robot", "nobody"]) == 2
    assert "robot 'nobody': expected the path" in capsys.readouterr().err
    assert main([str(tmp_path / "c"), "--seed", "-1"]) == 2
    assert "--seed: expected at least 0, got -1" in capsys.readouterr().err and not (tmp_path / "c").exists()
