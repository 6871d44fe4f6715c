"""The dimensions of a robot's state and actions: one number each, in the order in which policies have them."""

from __future__ import annotations

import math
from typing import Annotated, Final, Literal

from pydantic import BeforeValidator, Field, model_validator

from ki_vla_ros.robot.mapping import Finite, Frozen, Mapping, RobotUnit

Name = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-/ ]*$")]
TopicName = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[~/A-Za-z_][A-Za-z0-9_~/{}]*$")]

JOINT_STATE: Final = "sensor_msgs/msg/JointState"
POSE_STAMPED: Final = "geometry_msgs/msg/PoseStamped"
STATE, ACTION = "observation.state", "action"  # the columns of LeRobot's datasets

StateKind = Literal["joint_position", "joint_velocity", "gripper", "pose"]
ActionKind = Literal["joint_position", "joint_velocity", "gripper", "pose_delta", "pose", "twist"]
POSITION, VECTOR, QUATERNION = ("x", "y", "z"), ("rx", "ry", "rz"), ("qx", "qy", "qz", "qw")
SIX_D, LINEAR, ANGULAR = ("r1", "r2", "r3", "r4", "r5", "r6"), ("vx", "vy", "vz"), ("wx", "wy", "wz")
Component = Literal[
    "x", "y", "z", "rx", "ry", "rz", "qx", "qy", "qz", "qw", "r1", "r2", "r3", "r4", "r5", "r6",
    "vx", "vy", "vz", "wx", "wy", "wz",
]  # fmt: skip
# The unit that a component has; joints and grippers name theirs.
_UNITS: dict[str, RobotUnit] = {
    **dict.fromkeys(POSITION, "m"),
    **dict.fromkeys(VECTOR, "rad"),
    **dict.fromkeys((*QUATERNION, *SIX_D), "ratio"),
    **dict.fromkeys(LINEAR, "m/s"),
    **dict.fromkeys(ANGULAR, "rad/s"),
}
_COMPONENTS: dict[str, tuple[str, ...]] = {
    "pose": (*POSITION, *VECTOR, *QUATERNION, *SIX_D),
    "pose_delta": (*POSITION, *VECTOR),
    "twist": (*LINEAR, *ANGULAR),
}


def _unlimited(value: object) -> object:
    """YAML's .inf and -.inf mean what leaving a limit out means; JSON has no word for them."""
    return None if isinstance(value, float) and math.isinf(value) else value


Limit = Annotated[Finite | None, BeforeValidator(_unlimited)]


class Column(Mapping):
    """Where a dataset has a dimension, and in what unit."""

    column: str | None = Field(default=None, description="feature; left out: observation.state, or action")
    index: Annotated[int, Field(ge=0, le=10_000)] | None = Field(
        default=None, description="place in the column, from 0; left out: by name, else in the order of this list"
    )
    name: str | None = Field(default=None, description="the dataset's name for it; left out: this dimension's name")


class Source(Mapping):
    """The topic that a dimension is read from."""

    topic: TopicName = Field(
        default="joint_states", description="topic; without a leading slash in the node's namespace"
    )
    type: Literal["sensor_msgs/msg/JointState", "geometry_msgs/msg/PoseStamped"] = Field(
        default=JOINT_STATE, description="its type"
    )
    joint: Name | None = Field(default=None, description="JointState: name in the message; left out: the dimension's")
    field: Literal["position", "velocity", "effort"] = Field(default="position", description="JointState: the field")


def unused_of_pose(source: Source) -> str:
    """What a PoseStamped has no use for; "" if nothing of it is given."""
    if not source.says_nothing or source.joint is not None or source.field != "position":
        return "expected only topic and type for a pose, which is in m and a quaternion"
    return ""


class _Dimension(Frozen):
    name: Name = Field(
        description="distinct in its list; also the name of its joint and in datasets, where nothing else is said there"
    )
    unit: RobotUnit | None = Field(
        default=None, description="the robot's own unit; parts of poses and twists have theirs"
    )
    component: Component | None = Field(default=None, description="pose, pose_delta and twist: which part this is")
    lower: Limit = Field(
        default=None, description="lowest value; left out or -.inf: none, or a gripper's lower one of open and closed"
    )
    upper: Limit = Field(
        default=None, description="highest value; left out or .inf: none, or a gripper's higher one of open and closed"
    )
    continuous: bool = Field(
        default=False, description="a joint that turns without end: angles a whole turn apart are one place"
    )
    open: Finite | None = Field(default=None, description="gripper: the value when it is open")
    closed: Finite | None = Field(default=None, description="gripper: the value when it is closed")

    def own_unit(self) -> RobotUnit:
        unit = self.unit or _UNITS.get(self.component or "")
        assert unit is not None  # checked on reading
        return unit

    @property
    def limits(self) -> tuple[float, float] | None:
        return None if self.lower is None or self.upper is None else (self.lower, self.upper)

    @property
    def ends(self) -> tuple[float, float] | None:
        """A gripper's open and closed."""
        return None if self.open is None or self.closed is None else (self.open, self.closed)

    def _check(self, kind: str) -> None:
        here = f"{self.name!r}: "
        allowed = _COMPONENTS.get(kind, ())
        if allowed and self.component not in allowed:
            raise ValueError(f"{here}component: expected one of {', '.join(allowed)} for {kind}, got {self.component}")
        if not allowed and self.component is not None:
            raise ValueError(f"{here}component: expected none for {kind}, got {self.component}")
        expected = {
            "joint_position": ("rad", "m"),
            "joint_velocity": ("rad/s", "m/s"),
            "gripper": ("rad", "m", "ratio"),
        }.get(kind, (_UNITS.get(self.component or "", ""),))
        if self.unit not in expected and (self.unit is not None or not allowed):
            raise ValueError(f"{here}unit: expected {' or '.join(expected)} for {kind}, got {self.unit}")
        if self.lower is not None and self.upper is not None and not self.lower < self.upper:
            raise ValueError(f"{here}expected lower < upper, got {self.lower} and {self.upper}")
        if self.continuous and (kind != "joint_position" or self.own_unit() != "rad"):
            raise ValueError(
                f"{here}expected a joint_position in rad for a continuous joint, got {kind} in {self.unit}"
            )
        if kind != "gripper" and self.ends is not None:
            raise ValueError(f"{here}open and closed: expected none for {kind}")
        if kind == "gripper" and (self.open is None) != (self.closed is None):
            raise ValueError(f"{here}expected both open and closed, got one of them")
        if self.ends is not None and self.open == self.closed:
            raise ValueError(f"{here}open and closed: expected two values, got {self.open} twice")


class StateDimension(_Dimension):
    """One number of the state that the policy sees."""

    kind: StateKind = Field(description="joint_position, joint_velocity, gripper, or a part of a pose")
    source: Source = Field(default=Source(), description="the topic that it is read from")
    dataset: Column = Field(default=Column(), description="where datasets have it, and in what unit")

    @model_validator(mode="after")
    def _consistent(self) -> StateDimension:
        self._check(self.kind)
        expected = POSE_STAMPED if self.kind == "pose" else JOINT_STATE
        if self.source.type != expected:
            raise ValueError(f"{self.name!r}: source.type: expected {expected} for {self.kind}, got {self.source.type}")
        if self.kind == "pose" and (fault := unused_of_pose(self.source)):
            raise ValueError(f"{self.name!r}: source: {fault}")
        self.lines()
        return self

    @property
    def joint(self) -> str:
        """The joint's name in its topic's messages."""
        return self.source.joint or self.name

    def lines(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Scale and offset from the topic, and from the dataset."""
        unit = self.own_unit()
        return _line(self, self.source, "source", unit), _line(self, self.dataset, "dataset", unit)


class ActionDimension(_Dimension):
    """One number of an action, and what bounds the command that it becomes.

    Speeds are per second of the dimension's unit. A pose is bounded by its output instead; a twist and a velocity by
    `max_velocity`, their greatest value.
    """

    kind: ActionKind = Field(description="joint_position, joint_velocity, gripper, or a part of a pose or a twist")
    output: Name = Field(description="the output that it is a part of")
    joint: Name | None = Field(default=None, description="name in the output's message; left out: the dimension's name")
    max_velocity: Annotated[Finite, Field(gt=0, le=1e6)] | None = Field(
        default=None, description="highest speed, per second; not for pose and pose_delta"
    )
    max_acceleration: Annotated[Finite, Field(gt=0, le=1e9)] | None = Field(
        default=None, description="highest acceleration, per second squared; left out: as limits.time_to_speed_s says"
    )
    relative: bool = Field(default=False, description="the action is a difference from the state at the observation")
    state: Name | None = Field(
        default=None,
        description="the state dimension that measures it; left out: that of this name or joint, if any",
    )
    source: Source | None = Field(
        default=None, description="the topic that measures it, where the policy's state does not have it"
    )
    binary: bool = Field(default=False, description="gripper: fully open or fully closed, nothing between")
    threshold: Annotated[Finite, Field(gt=0, lt=1)] = Field(
        default=0.5, description="binary: the share of the way from closed to open above which it opens"
    )
    hysteresis: Annotated[Finite, Field(ge=0, lt=1)] = Field(
        default=0.1, description="binary: the width around the threshold in which it stays as it is"
    )
    recorded: Source | None = Field(
        default=None,
        description="recordings: the joint states that say what it was told, where no command does: a leader arm's, or "
        "a gripper's own",
    )
    command: Mapping = Field(
        default=Mapping(), description="how the output's messages write it, where not in the robot's own unit"
    )
    dataset: Column = Field(default=Column(), description="where datasets have it, and in what unit")

    @model_validator(mode="after")
    def _consistent(self) -> ActionDimension:
        self._check(self.kind)
        here, posed = f"{self.name!r}: ", self.kind in ("pose", "pose_delta")
        if posed != (self.max_velocity is None):
            raise ValueError(
                f"{here}max_velocity: "
                + ("expected none, its output bounds a pose" if posed else "expected a number, got none")
            )
        if posed and (self.max_acceleration is not None or self.limits is not None):
            raise ValueError(f"{here}expected no limits: its output bounds a pose")
        if self.kind == "joint_position" and self.limits is None and not self.continuous:
            raise ValueError(
                f"{here}lower and upper: expected both for a joint that does not turn without end (continuous: true)"
            )
        if self.kind == "gripper" and self.ends is None and self.limits is None:
            raise ValueError(f"{here}open and closed: expected both for a gripper")
        if self.relative and self.kind not in ("joint_position", "gripper"):
            raise ValueError(f"{here}relative: expected joint_position or gripper, got {self.kind}")
        if not self.binary and (self.threshold, self.hysteresis) != (0.5, 0.1):
            raise ValueError(f"{here}threshold and hysteresis: expected them only with binary: true")
        if self.binary and self.ends is None:
            raise ValueError(f"{here}binary: expected open and closed, got none")
        if self.binary and not self.hysteresis / 2 < min(self.threshold, 1 - self.threshold):
            raise ValueError(f"{here}hysteresis: expected less than twice the threshold's distance from 0 and 1")
        if (self.binary or self.ends is not None) and self.kind != "gripper":
            raise ValueError(f"{here}binary: expected kind gripper, got {self.kind}")
        if self.binary and self.relative:
            raise ValueError(f"{here}relative: expected false for a binary gripper")
        if self.kind in ("twist", "joint_velocity") and (self.lower, self.upper) != (None, None):
            raise ValueError(
                f"{here}lower and upper: expected none for {self.kind}: max_velocity bounds it, and positions "
                "are bounded by the joint's state dimension"
            )
        if self.recorded is not None:
            if self.kind not in ("joint_position", "joint_velocity", "gripper"):
                raise ValueError(f"{here}recorded: expected none for {self.kind}, whose commands are recorded")
            if self.recorded.type != JOINT_STATE:
                raise ValueError(f"{here}recorded.type: expected {JOINT_STATE}, got {self.recorded.type}")
            _line(self, self.recorded, "recorded", self.own_unit())
        self.line()
        scale, offset = self.command_line()
        if posed and (scale, offset) != (1.0, 0.0):
            raise ValueError(f"{here}command: expected none for {self.kind}: poses are in m and rad")
        if offset and self.kind in ("joint_velocity", "twist"):
            raise ValueError(f"{here}command: expected no offset for a velocity, got {offset:g}")
        return self

    @property
    def target(self) -> str:
        """The joint's name in its output's messages."""
        return self.joint or self.name

    @property
    def span(self) -> tuple[float, float]:
        """Lowest and highest value of a position; infinite where there is no limit."""
        ends = self.ends
        low = self.lower if self.lower is not None else min(ends) if ends else -math.inf
        high = self.upper if self.upper is not None else max(ends) if ends else math.inf
        return low, high

    def recorded_line(self) -> tuple[float, float]:
        """Scale and offset from the joint states in `recorded`."""
        assert self.recorded is not None
        return _line(self, self.recorded, "recorded", self.own_unit())

    def line(self) -> tuple[float, float]:
        """Scale and offset from the dataset."""
        return _line(self, self.dataset, "dataset", self.own_unit())

    def command_line(self) -> tuple[float, float]:
        """Scale and offset from the output's messages."""
        return _line(self, self.command, "command", self.own_unit())


def _line(dimension: _Dimension, mapping: Mapping, what: str, unit: RobotUnit) -> tuple[float, float]:
    """ValueError names the dimension and which of its mappings is wrong."""
    limits = dimension.limits
    if limits is None and dimension.ends is not None:
        limits = min(dimension.ends), max(dimension.ends)
    if isinstance(dimension, ActionDimension) and dimension.kind in ("joint_velocity", "twist"):
        assert dimension.max_velocity is not None
        limits = -dimension.max_velocity, dimension.max_velocity
    try:
        return mapping.line(unit, limits, dimension.ends)
    except ValueError as error:
        raise ValueError(f"{dimension.name!r}: {what}: {error}") from None
