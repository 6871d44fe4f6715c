"""What is read from a robot's topics, and how state and axes follow from it.

A signal is one number of a topic, in the robot's units: a joint's position, or a component of a pose. The state is
made of signals, and so is where the axes are (`Place`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ki_vla_ros.robot.axes import MOST_ROTATION, Axis
from ki_vla_ros.robot.dimensions import (
    JOINT_STATE,
    POSE_STAMPED,
    POSITION,
    QUATERNION,
    SIX_D,
    VECTOR,
    ActionDimension,
    Source,
    StateDimension,
)
from ki_vla_ros.robot.outputs import Output


class Robot(Protocol):
    """What is needed of a robot file here."""

    @property
    def state(self) -> Sequence[StateDimension]: ...
    @property
    def actions(self) -> Sequence[ActionDimension]: ...
    @property
    def outputs(self) -> Sequence[Output]: ...
    def actions_of(self, output: Output) -> Sequence[ActionDimension]: ...


@dataclass(frozen=True, slots=True)
class Signal:
    """One number of a topic: robot value = `scale` * value + `offset`.

    `part` is the joint's name in a JointState, or the component of a PoseStamped: x, y, z, qx, qy, qz, qw. Limits and
    speed are what is known of it (infinite: nothing), to tell degrees from radians and readings from impossible ones.
    `frame`: the frame that a pose must be in; "": any, but always the same.
    """

    name: str
    topic: str
    type: str
    part: str
    field: str
    unit: str
    lower: float
    upper: float
    max_velocity: float
    continuous: bool
    scale: float = 1.0
    offset: float = 0.0
    frame: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.topic, self.part, self.field


def plain_joints(names: Sequence[str], topic: str) -> tuple[Signal, ...]:
    """Joints of which nothing is known but their names."""
    inf = math.inf
    return tuple(Signal(name, topic, JOINT_STATE, name, "position", "rad", -inf, inf, inf, False) for name in names)


def measuring_state(robot: Robot, action: ActionDimension) -> StateDimension | None:
    """The state dimension that says where the action's joint is; ValueError if the one that it names cannot."""
    if action.state is not None:
        found = next((d for d in robot.state if d.name == action.state), None)
        if found is None:
            names = ", ".join(d.name for d in robot.state)
            raise ValueError(f"actions: {action.name!r}: state: expected one of {names}, got {action.state}")
    elif action.source is not None:
        return None
    else:
        joints = [d for d in robot.state if d.kind in ("joint_position", "gripper") and d.source.field == "position"]
        found = next((d for d in joints if d.name == action.name), None)
        found = found or next((d for d in joints if d.joint == action.target), None)
    if found is not None and scale_of(action, found) is None:
        if action.state is not None:
            raise ValueError(
                f"actions: {action.name!r}: state: expected a dimension in {action.own_unit()}, or a gripper with "
                f"open and closed, got {found.name} in {found.unit}"
            )
        return None
    return found


def scale_of(action: ActionDimension, state: StateDimension) -> tuple[float, float] | None:
    """Scale and offset from a state dimension's value to the action's joint; None: they are not of one kind.

    Two grippers that name open and closed fit each other in any units.
    """
    if action.kind == "gripper" and state.ends and action.ends:
        scale = (action.ends[0] - action.ends[1]) / (state.ends[0] - state.ends[1])
        return (1.0, 0.0) if state.ends == action.ends else (scale, action.ends[1] - scale * state.ends[1])
    unit = {"rad/s": "rad", "m/s": "m"}.get(action.own_unit(), action.own_unit())
    return (1.0, 0.0) if state.kind in ("joint_position", "gripper") and state.unit == unit else None


def robot_signals(robot: Robot) -> tuple[Signal, ...]:
    """The state's signals in its order, then those that only the axes need; each once."""
    found: dict[tuple[str, str, str], Signal] = {}
    for dimension in robot.state:
        for signal in _signals_of_state(robot, dimension):
            found.setdefault(signal.key, signal)
    for action in robot.actions:
        if (own := own_signal(robot, action)) is not None:
            found.setdefault(own.key, own)
    for output in robot.outputs:
        if (topic := pose_topic(robot, output)) is None:
            continue
        for signal in _pose_signals(topic, output):
            before = found.setdefault(signal.key, signal)
            if before.frame and output.frame_id and before.frame != output.frame_id:
                raise ValueError(
                    f"outputs: {output.name!r}: frame_id: expected {before.frame!r}, which {topic} is in for another "
                    f"output, got {output.frame_id!r}"
                )
            speed = min(before.max_velocity, signal.max_velocity)
            found[signal.key] = replace(before, frame=before.frame or output.frame_id, max_velocity=speed)
    types = {signal.topic: signal.type for signal in found.values()}
    for signal in found.values():
        if signal.type != types[signal.topic]:
            raise ValueError(
                f"source: expected one type on {signal.topic}, got {signal.type} and {types[signal.topic]}"
            )
    return tuple(found.values())


def own_signal(robot: Robot, action: ActionDimension) -> Signal | None:
    """The signal that says where the action's joint is, where no state dimension does.

    None for poses and twists, and for velocities whose joint nobody measures.
    """
    if action.kind not in ("joint_position", "gripper", "joint_velocity") or measuring_state(robot, action):
        return None
    source = action.source
    if source is None:
        if action.kind == "joint_velocity":
            return None
        others = (d.source.topic for d in robot.state if d.source.type == JOINT_STATE)
        source = Source(topic=next(others, Source().topic))
    if source.type != JOINT_STATE:
        raise ValueError(f"actions: {action.name!r}: source.type: expected {JOINT_STATE}, got {source.type}")
    unit = {"rad/s": "rad", "m/s": "m"}.get(action.own_unit(), action.own_unit())
    lower, upper = (-math.inf, math.inf) if action.kind == "joint_velocity" else action.span
    limits = (lower, upper) if math.isfinite(lower) and math.isfinite(upper) else None
    try:
        scale, offset = source.line(unit, limits, action.ends)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"actions: {action.name!r}: source: {error}") from None
    speed = action.max_velocity or math.inf
    part = source.joint or action.target
    return Signal(
        part, source.topic, JOINT_STATE, part, source.field, unit, lower, upper, speed, action.continuous, scale, offset
    )


def recorded_signal(action: ActionDimension) -> Signal | None:
    """The signal that says what the action was, in recordings that have no command of it; in the action's unit."""
    source = action.recorded
    if source is None:
        return None
    (scale, offset), part = action.recorded_line(), source.joint or action.target
    lower, upper = (-math.inf, math.inf) if action.kind == "joint_velocity" else action.span
    return Signal(
        name=part,
        topic=source.topic,
        type=JOINT_STATE,
        part=part,
        field=source.field,
        unit=action.own_unit(),
        lower=lower,
        upper=upper,
        max_velocity=math.inf,
        continuous=action.continuous,
        scale=scale,
        offset=offset,
    )


def _signals_of_state(robot: Robot, dimension: StateDimension) -> tuple[Signal, ...]:
    if dimension.kind == "pose":
        return _pose_signals(dimension.source.topic)
    lower, upper, speed, turns = dimension.lower, dimension.upper, math.inf, dimension.continuous
    if dimension.ends:
        lower = min(dimension.ends) if lower is None else lower
        upper = max(dimension.ends) if upper is None else upper
    for action in robot.actions:
        if action.kind not in ("joint_position", "gripper", "joint_velocity"):
            continue
        if measuring_state(robot, action) is not dimension:
            continue
        turns |= action.continuous
        ratio = abs((scale_of(action, dimension) or (1.0, 0.0))[0])
        speed = min(speed, (action.max_velocity or math.inf) / ratio)
        if action.kind != "joint_velocity" and ratio == 1.0 and not dimension.ends:
            low, high = action.span
            lower, upper = (low if lower is None else lower), (high if upper is None else upper)
    (scale, offset), _ = dimension.lines()
    return (
        Signal(
            name=dimension.joint,
            topic=dimension.source.topic,
            type=JOINT_STATE,
            part=dimension.joint,
            field=dimension.source.field,
            unit=dimension.own_unit(),
            lower=-math.inf if lower is None else lower,
            upper=math.inf if upper is None else upper,
            max_velocity=speed,
            continuous=turns,
            scale=scale,
            offset=offset,
        ),
    )


def _pose_signals(topic: str, output: Output | None = None) -> tuple[Signal, ...]:
    """`output` bounds how fast the pose may move; half of an angular velocity is a bound of a quaternion's."""
    inf, linear, angular = math.inf, math.inf, math.inf
    if output is not None and output.max_linear_velocity and output.max_angular_velocity:
        linear, angular = output.max_linear_velocity, output.max_angular_velocity / 2.0
    frame = "" if output is None else output.frame_id
    return tuple(
        Signal(f"{topic}.{part}", topic, POSE_STAMPED, part, "pose", unit, -inf, inf, speed, False, frame=frame)
        for parts, unit, speed in ((POSITION, "m", linear), (QUATERNION, "ratio", angular))
        for part in parts
    )


def pose_topic(robot: Robot, output: Output) -> str | None:
    """The topic that says where an output's pose is; None for outputs without a pose."""
    if not any(action.kind in ("pose", "pose_delta") for action in robot.actions_of(output)):
        return None
    if output.source is not None:
        if output.source.type != POSE_STAMPED:
            raise ValueError(
                f"outputs: {output.name!r}: source.type: expected {POSE_STAMPED}, got {output.source.type}"
            )
        return output.source.topic
    topics = sorted({d.source.topic for d in robot.state if d.kind == "pose"})
    if len(topics) != 1:
        raise ValueError(
            f"outputs: {output.name!r}: source: expected the PoseStamped topic that says where it is, got none, and "
            f"the state has {len(topics)} ({', '.join(topics) or 'no pose'})"
        )
    return topics[0]


def check_pose_parts(dimensions: Sequence[StateDimension | ActionDimension]) -> None:
    """ValueError unless the parts of each pose are a position, an orientation or both, each whole, in any order."""
    groups: dict[str, list[str]] = {}
    for dimension in dimensions:
        if dimension.kind in ("pose", "pose_delta"):
            if isinstance(dimension, StateDimension):
                group = f"state: {dimension.source.topic}"
            else:
                group = f"outputs: {dimension.output!r}"
            groups.setdefault(group, []).append(str(dimension.component))
    for group, parts in groups.items():
        position, rest = ({part for part in parts if (part in POSITION) == placed} for placed in (True, False))
        whole = position in (set(), set(POSITION)) and rest in (set(), set(VECTOR), set(QUATERNION), set(SIX_D))
        if not whole or len(set(parts)) < len(parts):
            raise ValueError(
                f"{group}: pose: expected x, y, z and one of {', '.join(VECTOR)}; {', '.join(QUATERNION)}; "
                f"{', '.join(SIX_D)}, each whole and once, got {', '.join(parts)}"
            )


def command_axes(robot: Robot) -> tuple[Axis, ...]:
    """The axes, output by output, in the order of the actions; ValueError if one has no bounds that it needs."""
    check_pose_parts(robot.actions)
    axes: list[Axis] = []
    for number, output in enumerate(robot.outputs):
        actions = robot.actions_of(output)
        if any(action.kind in ("pose", "pose_delta") for action in actions):
            axes += _pose_axes(output, number)
        else:
            axes += [_axis(robot, action, number) for action in actions]
    return tuple(axes)


def _axis(robot: Robot, action: ActionDimension, number: int) -> Axis:
    kinds: Mapping[str, str] = {"joint_position": "joint", "gripper": "gripper"}
    velocity = action.kind in ("joint_velocity", "twist")
    lower, upper = (-math.inf, math.inf) if velocity else action.span
    if action.kind == "joint_velocity" and (state := measuring_state(robot, action)) is not None:
        lower = lower if state.lower is None else state.lower
        upper = upper if state.upper is None else state.upper
    assert action.max_velocity is not None  # checked on reading
    return Axis(
        name=action.name if action.kind == "twist" else action.target,
        kind=kinds.get(action.kind, "velocity"),  # type: ignore[arg-type]
        unit={"rad/s": "rad", "m/s": "m"}.get(action.own_unit(), action.own_unit()),
        lower=lower,
        upper=upper,
        max_velocity=action.max_velocity,
        output=number,
        max_acceleration=action.max_acceleration,
        relative=action.relative,
        continuous=action.continuous,
        measured=action.kind != "twist"
        and (measuring_state(robot, action) is not None or own_signal(robot, action) is not None),
        joint=action.kind != "twist",
        scale=action.command_line()[0],
        offset=action.command_line()[1],
    )


def _pose_axes(output: Output, number: int) -> list[Axis]:
    """Six axes; each of three gets the share of a speed that keeps the three together within it."""
    assert output.workspace is not None and output.max_linear_velocity and output.max_angular_velocity
    box, share = (output.workspace.x, output.workspace.y, output.workspace.z), 1.0 / math.sqrt(3.0)
    linear, angular = output.max_linear_velocity * share, output.max_angular_velocity * share
    position = [
        Axis(f"{output.name}.{part}", "position", "m", low, high, linear, number, joint=False)
        for part, (low, high) in zip(POSITION, box, strict=True)
    ]
    return position + [
        Axis(f"{output.name}.{part}", "rotation", "rad", -MOST_ROTATION, MOST_ROTATION, angular, number, joint=False)
        for part in VECTOR
    ]
