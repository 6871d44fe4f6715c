"""The robot file: what a robot is, said once for conversion, training, export, node, doctor, replay and evaluation.

With config/robots/demo_arm.yaml, or the path of any such file:

    robot = read_robot(find_robot("demo_arm"))
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from functools import cached_property, partial
from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ki_vla_ros.errors import ConfigurationError, did_you_mean
from ki_vla_ros.robot.axes import Axis
from ki_vla_ros.robot.dimensions import (
    ACTION,
    ANGULAR,
    LINEAR,
    POSE_STAMPED,
    STATE,
    ActionDimension,
    Name,
    StateDimension,
    TopicName,
    unused_of_pose,
)
from ki_vla_ros.robot.limits import with_urdf
from ki_vla_ros.robot.mapping import Finite, Frozen, Lines
from ki_vla_ros.robot.outputs import ARRAY, CARRIES, GRIPPER_COMMAND, POSE, Output
from ki_vla_ros.robot.signals import Signal, check_pose_parts, command_axes, measuring_state, robot_signals
from ki_vla_ros.share import expand, find_share
from ki_vla_ros.yaml_file import read_yaml

Horizon = Annotated[int, Field(ge=2, le=1000)]
TWIST_PARTS = (*LINEAR, *ANGULAR)
ActionPeriod = Annotated[Finite, Field(ge=0.001, le=1.0)]


class CameraSpec(Frozen):
    """One camera of the model; an optional one may be absent, and then its tokens are masked out."""

    name: Name = Field(description="name, distinct among the cameras")
    optional: bool = Field(default=False, description="the policy runs without its images, too")
    topic: TopicName | None = Field(
        default=None, description="image topic; left out: camera/NAME/image_raw, with /compressed if transport says so"
    )
    transport: Literal["raw", "compressed"] = Field(
        default="raw", description="raw: sensor_msgs/Image; compressed: sensor_msgs/CompressedImage"
    )
    dataset: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        default=None, description="the dataset's key; left out: observation.images.NAME"
    )
    mounting: Literal["fixed", "moving"] = Field(
        default="fixed", description="moving: on the arm, so that its images turn with it"
    )

    @property
    def key(self) -> str:
        """The camera's key in a LeRobot dataset."""
        return self.dataset or f"observation.images.{self.name}"


class Robot(Frozen):
    """One robot: cameras in the order of the images, state and actions in the order in which policies have them.

    `horizon` actions make a chunk, `action_period_s` apart.
    """

    name: Name = Field(description="name of the robot; robot_type of datasets")
    cameras: Annotated[tuple[CameraSpec, ...], Field(min_length=1)] = Field(description="in the order of the images")
    state: Annotated[tuple[StateDimension, ...], Field(min_length=1)] = Field(description="what the policy sees of it")
    actions: Annotated[tuple[ActionDimension, ...], Field(min_length=1)] = Field(description="what the policy commands")
    outputs: Annotated[tuple[Output, ...], Field(min_length=1)] = Field(description="who takes the commands")
    action_period_s: ActionPeriod = Field(
        description="time between two actions, in s: 1 / frames per second of the dataset"
    )
    urdf: Annotated[str, Field(min_length=1, max_length=1024)] | None = Field(
        default=None,
        description="a URDF, by its path from this file, whose limits fill in what is left out and tighten what is not",
    )
    horizon: Horizon = Field(description="actions per chunk")

    @model_validator(mode="after")
    def _consistent(self) -> Robot:
        if self.urdf is not None:  # `read_robot` puts its limits in and takes it out: bundles stand alone
            raise ValueError("urdf: expected in a robot file only, beside its actions")
        check_names("cameras", [camera.name for camera in self.cameras])
        check_names("state", [dimension.name for dimension in self.state])
        check_names("actions", [dimension.name for dimension in self.actions])
        check_names("outputs", [output.name for output in self.outputs])
        for before, output in combinations(self.outputs, 2):
            if output.topic == before.topic:
                raise ValueError(
                    f"outputs: {output.name!r}: topic: expected another than that of {before.name!r}, got "
                    f"{output.topic}; one message can carry the actions of both: let all name one output"
                )
        for camera, other in combinations(self.cameras, 2):
            if camera.key == other.key:
                raise ValueError(
                    f"cameras: {other.name!r}: dataset: expected another than that of {camera.name!r}, got {other.key}"
                )
        if all(camera.optional for camera in self.cameras):
            raise ValueError("cameras: expected at least one required camera, got only optional ones")
        for group, what, dimensions in (("state", STATE, self.state), ("actions", ACTION, self.actions)):
            places: dict[tuple[str, int], str] = {}
            for d in dimensions:
                column, index = d.dataset.column or what, d.dataset.index
                if index is not None and (first := places.setdefault((column, index), d.name)) != d.name:
                    raise ValueError(
                        f"{group}: {d.name!r}: dataset.index: expected each index of {column} once, got {index}, which "
                        f"{first!r} has"
                    )
        for output in self.outputs:
            self._check_output(output)
        known = [output.name for output in self.outputs]
        for action in self.actions:
            if action.output not in known:
                raise ValueError(
                    f"actions: {action.name!r}: output: expected one of {', '.join(known)}, got {action.output}"
                )
        check_pose_parts(self.state)
        check_names("actions: joints", [axis.name for axis in self.axes])
        poses = {signal.topic for signal in self.signals if signal.type == POSE_STAMPED}
        for output in self.outputs:
            if output.type == POSE and output.topic in poses:
                raise ValueError(
                    f"outputs: {output.name!r}: topic: expected another than that which says where the robot is, got "
                    f"{output.topic}"
                )
        return self

    def _check_output(self, output: Output) -> None:
        here, actions = f"outputs: {output.name!r}: ", self.actions_of(output)
        if not actions:
            raise ValueError(f"{here}expected actions that name it, got none")
        kinds = {action.kind for action in actions}
        allowed = CARRIES[output.type] if output.type else ("joint_position", "gripper")
        for kind in sorted(kinds - set(allowed)):
            carrier = output.type or "an output without type"
            fitting = " or ".join(name for name, carried in CARRIES.items() if kind in carried)
            raise ValueError(f"{here}expected {' or '.join(allowed)} for {carrier}, got {kind}; set type to {fitting}")
        if output.type == ARRAY and "joint_velocity" in kinds and len(kinds) > 1:
            raise ValueError(f"{here}expected positions or velocities, got {', '.join(sorted(kinds))}")
        if len(kinds & {"pose", "pose_delta"}) > 1:
            raise ValueError(f"{here}expected pose or pose_delta, got both")
        if output.type == GRIPPER_COMMAND and len(actions) > 1:
            raise ValueError(f"{here}expected one gripper, got {len(actions)}")
        posed = bool(kinds & {"pose", "pose_delta"})
        bounds = ("workspace", "max_linear_velocity", "max_angular_velocity")
        if wrong := [field for field in bounds if (getattr(output, field) is not None) != posed]:
            them = "it" if len(wrong) == 1 else "them"
            raise ValueError(
                f"{here}{', '.join(wrong)}: expected "
                + (
                    f"{them} for a pose, got none; they bound where it may go and how fast"
                    if posed
                    else f"none without a pose, got {them}; joints have limits of their own, under actions"
                )
            )
        if output.source is not None and not posed:
            raise ValueError(f"{here}source: expected none without a pose; give it with the action")
        if output.source is not None and (fault := unused_of_pose(output.source)):
            raise ValueError(f"{here}source: {fault}")
        if output.max_effort is not None and output.type != GRIPPER_COMMAND:
            raise ValueError(f"{here}max_effort: expected it only for {GRIPPER_COMMAND}, got {output.type}")
        if (output.delta_frame, output.delta_from) != ("base", "previous") and not posed:
            raise ValueError(f"{here}delta_frame and delta_from: expected them only for steps of a pose")
        if output.frame_id and not posed and "twist" not in kinds:
            raise ValueError(f"{here}frame_id: expected it only for poses and twists, got {output.frame_id!r}")

    def actions_of(self, output: Output) -> tuple[ActionDimension, ...]:
        return tuple(action for action in self.actions if action.output == output.name)

    def axes_of(self, output: Output) -> slice:
        """Where its axes are among all."""
        number = self.outputs.index(output)
        places = [j for j, axis in enumerate(self.axes) if axis.output == number]
        return slice(places[0], places[-1] + 1)

    @cached_property
    def output_tokens(self) -> dict[str, str]:
        """The outputs' names as parts of topics' names, which may only have letters, digits and underscores."""
        tokens = {o.name: re.sub("[^A-Za-z0-9]+", "_", o.name).strip("_") for o in self.outputs}
        counts = Counter(tokens.values())
        return {
            name: f"output{number}_{token}" if counts[token] > 1 or token[:1].isdigit() else token
            for number, (name, token) in enumerate(tokens.items())
        }

    def twist_parts(self, output: Output) -> list[int]:
        """Which of vx, vy, vz, wx, wy, wz each axis of a twist is."""
        return [TWIST_PARTS.index(str(action.component)) for action in self.actions_of(output)]

    def turning(self, joints: Collection[str]) -> Robot:
        """The same with exactly these of its joints as ones that turn without end, as a URDF says."""
        actions = tuple(
            a.model_copy(update={"continuous": a.target in joints}) if a.kind == "joint_position" else a
            for a in self.actions
        )
        turning = {d.name for a in actions if a.continuous and (d := measuring_state(self, a)) is not None}
        state = tuple(
            d.model_copy(update={"continuous": d.name in turning}) if d.kind == "joint_position" else d
            for d in self.state
        )
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return Robot.model_validate({**fields, "actions": actions, "state": state})

    @property
    def camera_names(self) -> tuple[str, ...]:
        return tuple(camera.name for camera in self.cameras)

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """What the runtime moves, output by output."""
        return command_axes(self)

    @property
    def axis_names(self) -> tuple[str, ...]:
        return tuple(axis.name for axis in self.axes)

    @cached_property
    def signals(self) -> tuple[Signal, ...]:
        """The numbers that are read from topics: for the state, and to know where the axes are."""
        return robot_signals(self)

    @cached_property
    def command_lines(self) -> Lines:
        """The numbers of the outputs' messages to the axes' units, and back."""
        return Lines.of([(axis.scale, axis.offset) for axis in self.axes])

    @cached_property
    def state_lines(self) -> Lines:
        """The dataset's state values to the robot's units, and back."""
        return Lines.of([dimension.lines()[1] for dimension in self.state])

    @cached_property
    def action_lines(self) -> Lines:
        """The dataset's action values to the robot's units, and back."""
        return Lines.of([dimension.line() for dimension in self.actions])


def check_names(what: str, names: Sequence[str]) -> None:
    """ValueError names those that appear more than once; `what` they are names of."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        also = f" (and so {', '.join(map(repr, twice[1:]))})" if twice[1:] else ""
        raise ValueError(f"{what}: {twice[0]!r}: expected distinct names, got it {names.count(twice[0])} times{also}")


def find_robot(robot: str) -> Path:
    """The file as given, or the one in config/robots/ of the robot of this name; ConfigurationError if it has none."""
    path = expand(robot)
    if path.name != robot or path.suffix:
        return path
    folder = find_share("config/robots")
    if not (known := folder / f"{robot}.yaml").exists():
        names = sorted(file.stem for file in folder.glob("*.yaml"))
        raise ConfigurationError(
            f"robot {robot!r}: expected the path of a robot file, or one of {', '.join(names)}"
            f"{did_you_mean(robot, names)}"
        )
    return known


def read_robot(path: Path) -> Robot:
    """Read and check a robot file; ConfigurationError names the file, the key, what was expected and what was got."""
    return read_yaml(path, Robot, "robot file", "config/robots/", partial(with_urdf, folder=path.parent))
