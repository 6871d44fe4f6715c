"""What a robot is: cameras, state, actions, units, outputs, from one YAML file; and limits from its URDF."""

from ki_vla_ros.robot.agreement import check_agreement, disagreements
from ki_vla_ros.robot.axes import MOST_ROTATION, Axis, led_axes, main_axes, other_axes
from ki_vla_ros.robot.columns import find_columns, flatten_names
from ki_vla_ros.robot.commands import CommandSpace, PoseOutput, pose_place
from ki_vla_ros.robot.dimensions import (
    JOINT_STATE,
    POSE_STAMPED,
    ActionDimension,
    Column,
    Name,
    Source,
    StateDimension,
)
from ki_vla_ros.robot.limits import with_urdf
from ki_vla_ros.robot.mapping import Finite, Frozen, Lines, Mapping
from ki_vla_ros.robot.outputs import (
    ACTIONS,
    ARRAY,
    FOLLOW_TRAJECTORY,
    GRIPPER_COMMAND,
    POSE,
    TRAJECTORY,
    TWIST,
    TWIST_STAMPED,
    Output,
    OutputType,
    Workspace,
)
from ki_vla_ros.robot.robot import ActionPeriod, CameraSpec, Horizon, Robot, check_names, find_robot, read_robot
from ki_vla_ros.robot.signals import Signal, measuring_state, plain_joints, recorded_signal, scale_of
from ki_vla_ros.robot.turns import TURN, continued_rotation, continuous, nearest_rotation, nearest_turn
from ki_vla_ros.robot.urdf import UrdfJoint, movable_joints, read_urdf

__all__ = [
    "ACTIONS",
    "ARRAY",
    "FOLLOW_TRAJECTORY",
    "GRIPPER_COMMAND",
    "JOINT_STATE",
    "MOST_ROTATION",
    "POSE",
    "POSE_STAMPED",
    "TRAJECTORY",
    "TURN",
    "TWIST",
    "TWIST_STAMPED",
    "ActionDimension",
    "ActionPeriod",
    "Axis",
    "CameraSpec",
    "Column",
    "CommandSpace",
    "Finite",
    "Frozen",
    "Horizon",
    "Lines",
    "Mapping",
    "Name",
    "Output",
    "OutputType",
    "PoseOutput",
    "Robot",
    "Signal",
    "Source",
    "StateDimension",
    "UrdfJoint",
    "Workspace",
    "check_agreement",
    "check_names",
    "continued_rotation",
    "continuous",
    "disagreements",
    "find_columns",
    "find_robot",
    "flatten_names",
    "led_axes",
    "main_axes",
    "measuring_state",
    "movable_joints",
    "nearest_rotation",
    "nearest_turn",
    "other_axes",
    "plain_joints",
    "pose_place",
    "read_robot",
    "read_urdf",
    "recorded_signal",
    "scale_of",
    "with_urdf",
]
