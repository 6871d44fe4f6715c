"""What a robot is: its cameras, joints and the timing of its actions, from one YAML file; and limits from its URDF."""

from ki_vla_ros.robot.robot import (
    ActionPeriod,
    CameraSpec,
    Finite,
    Frozen,
    Horizon,
    JointSpec,
    Name,
    Robot,
    check_parts,
    find_robot,
    main_joints,
    read_robot,
)
from ki_vla_ros.robot.turns import TURN, continuous, nearest_turn
from ki_vla_ros.robot.urdf import UrdfJoint, read_urdf

__all__ = [
    "TURN",
    "ActionPeriod",
    "CameraSpec",
    "Finite",
    "Frozen",
    "Horizon",
    "JointSpec",
    "Name",
    "Robot",
    "UrdfJoint",
    "check_parts",
    "continuous",
    "find_robot",
    "main_joints",
    "nearest_turn",
    "read_robot",
    "read_urdf",
]
