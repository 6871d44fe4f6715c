"""What a robot is: its cameras, joints and the timing of its actions, read from one YAML file."""

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

__all__ = [
    "ActionPeriod",
    "CameraSpec",
    "Finite",
    "Frozen",
    "Horizon",
    "JointSpec",
    "Name",
    "Robot",
    "check_parts",
    "find_robot",
    "main_joints",
    "read_robot",
]
