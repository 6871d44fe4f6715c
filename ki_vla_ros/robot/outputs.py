"""The outputs of a robot: groups of actions, and the topic or action of the controller that takes each."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field, model_validator

from ki_vla_ros.robot.dimensions import Name, Source, TopicName
from ki_vla_ros.robot.mapping import Finite, Frozen

TRAJECTORY: Final = "trajectory_msgs/msg/JointTrajectory"
ARRAY: Final = "std_msgs/msg/Float64MultiArray"
TWIST, TWIST_STAMPED = "geometry_msgs/msg/Twist", "geometry_msgs/msg/TwistStamped"
POSE: Final = "geometry_msgs/msg/PoseStamped"
FOLLOW_TRAJECTORY: Final = "control_msgs/action/FollowJointTrajectory"
GRIPPER_COMMAND: Final = "control_msgs/action/GripperCommand"

OutputType = Literal[
    "trajectory_msgs/msg/JointTrajectory",
    "std_msgs/msg/Float64MultiArray",
    "geometry_msgs/msg/Twist",
    "geometry_msgs/msg/TwistStamped",
    "geometry_msgs/msg/PoseStamped",
    "control_msgs/action/FollowJointTrajectory",
    "control_msgs/action/GripperCommand",
]
STREAMED: Final = (ARRAY, TWIST, TWIST_STAMPED, POSE)
ACTIONS: Final = (FOLLOW_TRAJECTORY, GRIPPER_COMMAND)
# The kinds of action that each type can carry.
CARRIES: dict[str, tuple[str, ...]] = {
    TRAJECTORY: ("joint_position", "gripper"),
    FOLLOW_TRAJECTORY: ("joint_position", "gripper"),
    ARRAY: ("joint_position", "gripper", "joint_velocity"),
    TWIST: ("twist",),
    TWIST_STAMPED: ("twist",),
    POSE: ("pose", "pose_delta"),
    GRIPPER_COMMAND: ("gripper",),
}
Interval = tuple[Finite, Finite]


class Workspace(Frozen):
    """The box that a pose's position stays in, in the output's frame, in m."""

    x: Interval = Field(description="lowest and highest x")
    y: Interval = Field(description="lowest and highest y")
    z: Interval = Field(description="lowest and highest z")

    @model_validator(mode="after")
    def _ordered(self) -> Workspace:
        for axis, (low, high) in (("x", self.x), ("y", self.y), ("z", self.z)):
            if not low < high:
                raise ValueError(f"workspace.{axis}: expected low < high, got {low} and {high}")
        return self


class Output(Frozen):
    """One controller's topic, or its action, which takes the actions that name this output, in their order."""

    name: Name = Field(description="name, distinct among the outputs")
    topic: TopicName = Field(
        description="the controller's topic, or its action's name; without a leading slash in the node's namespace"
    )
    type: OutputType | None = Field(
        default=None, description="left out: JointTrajectory, or what the node's publish_mode says"
    )
    frame_id: Annotated[str, Field(max_length=256)] = Field(
        default="", description="poses and twists: the frame that they are in"
    )
    workspace: Workspace | None = Field(default=None, description="poses: the box that the position stays in")
    max_linear_velocity: Annotated[Finite, Field(gt=0, le=100)] | None = Field(
        default=None, description="poses: highest speed of the position, in m/s"
    )
    max_angular_velocity: Annotated[Finite, Field(gt=0, le=100)] | None = Field(
        default=None, description="poses: highest speed of the orientation, in rad/s"
    )
    source: Source | None = Field(default=None, description="poses: the PoseStamped topic that says where it is")
    delta_frame: Literal["base", "tool"] = Field(
        default="base", description="pose_delta: the axes that a step is along, the frame's or the tool's own"
    )
    delta_from: Literal["previous", "observation"] = Field(
        default="previous", description="pose_delta: what an action counts from, the one before it or the observed pose"
    )
    max_effort: Annotated[Finite, Field(gt=0)] | None = Field(
        default=None, description="GripperCommand: max_effort; left out: 0, which means the driver's own"
    )

    def wire_type(self, publish_mode: str) -> OutputType:
        """The type of its messages, or of its action."""
        return self.type or (ARRAY if publish_mode == "stream" else TRAJECTORY)

    @property
    def message_types(self) -> tuple[OutputType, ...]:
        """The types that messages on its topic may have, whatever publish_mode was."""
        return (self.type,) if self.type else (TRAJECTORY, ARRAY)

    def streams(self, publish_mode: str) -> bool:
        """Whether its controller takes one value after the other, rather than a trajectory or a goal."""
        return self.wire_type(publish_mode) in STREAMED
