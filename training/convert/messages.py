"""What a robot's topics would have said at the frames of a dataset: joint states, poses, and commands to its outputs.

Legend: N frames, M signals, S state, D action, J axes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.errors import ConfigurationError, InputError
from ki_vla_ros.messages import typestore
from ki_vla_ros.records import NS_PER_S
from ki_vla_ros.robot import (
    ACTIONS,
    ARRAY,
    JOINT_STATE,
    POSE,
    POSE_STAMPED,
    TRAJECTORY,
    TWIST,
    TWIST_STAMPED,
    CommandSpace,
    Output,
    Robot,
    Signal,
    recorded_signal,
)

Array = NDArray[np.float64]
NOTHING: Final = np.zeros(0)


@dataclass(frozen=True, slots=True)
class Message:
    topic: str
    type: str
    content: Any


class RobotMessages:
    """The messages of one robot, whose topics have their full names.

    `unsaid`: what of the robot the dataset does not say, with the reason.
    """

    def __init__(self, robot: Robot) -> None:
        self.robot, self.space = robot, CommandSpace(robot)
        known_M = ~np.isnan(self.space.signals(_some_state(robot)))
        self._read: dict[str, list[int]] = {}  # signals by topic
        self.unsaid: dict[str, str] = {}
        for m, signal in enumerate(robot.signals):
            if signal.type == POSE_STAMPED and not all(
                known_M[k] for k, other in enumerate(robot.signals) if other.topic == signal.topic
            ):
                self.unsaid[signal.topic] = "the state does not have its position and orientation"
            elif known_M[m]:
                self._read.setdefault(signal.topic, []).append(m)
            else:
                self.unsaid[f"{signal.part} on {signal.topic}"] = "the state does not have it"
        self._recorded: dict[str, list[tuple[int, Signal]]] = {}
        for d, action in enumerate(robot.actions):
            if (found := recorded_signal(action)) is not None:
                self._recorded.setdefault(found.topic, []).append((d, found))
        for output in robot.outputs:
            if output.type in ACTIONS:
                self.unsaid[f"commands to {output.topic}"] = "it is an action, and bags do not have goals"
        names = [axis.name for axis in robot.axes]
        moved = [(d, a) for d, a in enumerate(robot.actions) if a.kind not in ("pose", "pose_delta")]
        self._moved_D = [d for d, _ in moved]
        self._axis_of_moved = [names.index(a.name if a.kind == "twist" else a.target) for _, a in moved]

    @property
    def types(self) -> dict[str, str]:
        """Message type by topic."""
        types = {signal.topic: signal.type for signal in self.robot.signals if signal.topic in self._read}
        types |= dict.fromkeys(self._recorded, JOINT_STATE)
        return types | {o.topic: o.type or TRAJECTORY for o in self.robot.outputs if o.type not in ACTIONS}

    def signals(self, state_NS: Array) -> Array:
        """What was read of the robot [N, M]; NaN where the state does not say it. InputError for no orientation."""
        try:
            return np.array([self.space.signals(state_S) for state_S in state_NS])
        except ValueError as error:
            raise InputError(f"state: {error}") from error

    def states(self, signal_M: Array, stamp_ns: int) -> Iterator[Message]:
        """Joint states and poses of one frame."""
        for topic, index in self._read.items():
            signals = [self.robot.signals[m] for m in index]
            if signals[0].type == JOINT_STATE:
                yield Message(topic, JOINT_STATE, _joint_state(stamp_ns, signals, signal_M[index]))
            else:
                pose_7 = signal_M[index]
                yield Message(topic, POSE_STAMPED, _pose(stamp_ns, signals[0].frame, pose_7[:3], pose_7[3:]))

    def targets(self, action_ND: Array, signal_NM: Array, period_s: float) -> Array:
        """Where, or how fast, the axes are told to be [N, J].

        ConfigurationError if that counts from a pose that the state does not have.
        """
        value_NJ = np.zeros((len(action_ND), len(self.robot.axes)))
        value_NJ[:, self._axis_of_moved] = action_ND[:, self._moved_D]
        for pose in self.space.poses:
            here_N7, output = signal_NM[:, pose.signals], self.robot.outputs[pose.output]
            is_counted = pose.delta or not len(pose.position) or not len(pose.turned)
            if is_counted and np.isnan(here_N7).any():
                raise ConfigurationError(
                    f"robot {self.robot.name}: outputs: {output.name!r}: expected its pose in the state, as its "
                    "actions count from it, got none; add the pose to the state, if the dataset has it"
                )
            known_NM = signal_NM.copy()
            known_NM[:, pose.signals] = np.where(np.isnan(here_N7), [0, 0, 0, 0, 0, 0, 1], here_N7)
            value_NJ[:, pose.axes] = self._walk(action_ND, known_NM, period_s, each=pose.from_observation)[:, pose.axes]
        return value_NJ

    def _walk(self, action_ND: Array, signal_NM: Array, period_s: float, each: bool) -> Array:
        """The path from the first frame on; `each`: every action counts from its own frame."""
        try:
            measured_NJ = np.array([self.space.measured(signal_M) for signal_M in signal_NM])
            if not each:
                return self.space.path(action_ND.copy(), measured_NJ[0], None, period_s)[0]
            rows = zip(action_ND, measured_NJ, strict=True)
            return np.concatenate([self.space.path(a_D[None].copy(), m_J, None, period_s)[0] for a_D, m_J in rows])
        except ValueError as error:
            raise InputError(f"action: {error}") from error

    def commands(self, action_D: Array, target_J: Array, due_ns: int) -> Iterator[Message]:
        """What the outputs are told, to be in force at `due_ns`, and joint states that say the same."""
        for topic, found in self._recorded.items():
            signals = [signal for _, signal in found]
            content = _joint_state(due_ns, signals, action_D[[d for d, _ in found]])
            yield Message(topic, JOINT_STATE, content)
        for output in self.robot.outputs:
            if output.type not in ACTIONS:
                yield Message(output.topic, output.type or TRAJECTORY, self._command(output, target_J, due_ns))

    def _command(self, output: Output, target_J: Array, due_ns: int) -> Any:
        place = self.robot.axes_of(output)
        value_J = self.robot.command_lines.to_foreign(target_J)[place]
        if output.type == ARRAY:
            types = typestore().types
            layout = types["std_msgs/msg/MultiArrayLayout"](dim=[], data_offset=0)
            return types[ARRAY](layout=layout, data=value_J)
        if output.type in (TWIST, TWIST_STAMPED):
            value_6 = np.zeros(6)
            value_6[self.robot.twist_parts(output)] = value_J
            twist = _make(TWIST, linear=_vector(value_6[:3]), angular=_vector(value_6[3:]))
            return (
                twist
                if output.type == TWIST
                else _make(output.type, header=header(due_ns, output.frame_id), twist=twist)
            )
        if output.type == POSE:
            pose = next(p for p in self.space.poses if self.robot.outputs[p.output] is output)
            quaternion = self.space.quaternions(pose, target_J, self.space.reference_P4)
            return _pose(due_ns, output.frame_id, value_J[:3], quaternion)
        return trajectory(due_ns, [axis.name for axis in self.robot.axes[place]], value_J)


def header(stamp_ns: int, frame_id: str = "") -> Any:
    sec, nanosec = divmod(stamp_ns, NS_PER_S)
    return _make(
        "std_msgs/msg/Header", stamp=_make("builtin_interfaces/msg/Time", sec=sec, nanosec=nanosec), frame_id=frame_id
    )


def _some_state(robot: Robot) -> Array:
    """Any state that says orientations."""
    return np.array([float(d.component in ("qw", "r1", "r5")) for d in robot.state])


def _make(kind: str, **fields: Any) -> Any:
    return typestore().types[kind](**fields)


def _vector(value_3: Array) -> Any:
    return _make("geometry_msgs/msg/Vector3", **dict(zip("xyz", value_3.tolist(), strict=True)))


def _pose(stamp_ns: int, frame_id: str, position_3: Array, quaternion_4: Array) -> Any:
    position = _make("geometry_msgs/msg/Point", **dict(zip("xyz", position_3.tolist(), strict=True)))
    turned = _make("geometry_msgs/msg/Quaternion", **dict(zip("xyzw", quaternion_4.tolist(), strict=True)))
    pose = _make("geometry_msgs/msg/Pose", position=position, orientation=turned)
    return _make(POSE, header=header(stamp_ns, frame_id), pose=pose)


def _joint_state(stamp_ns: int, signals: Sequence[Signal], value_G: Array) -> Any:
    """The values, which are in the robot's units, in those of the topic; NaN for fields that a joint does not have."""
    names = list(dict.fromkeys(signal.part for signal in signals))
    fields: Mapping[str, Array] = {
        name: np.full(len(names), np.nan) if any(s.field == name for s in signals) else NOTHING
        for name in ("position", "velocity", "effort")
    }
    for signal, value in zip(signals, value_G.tolist(), strict=True):
        fields[signal.field][names.index(signal.part)] = (value - signal.offset) / signal.scale
    return _make(JOINT_STATE, header=header(stamp_ns), name=names, **fields)


def trajectory(due_ns: int, joints: Sequence[str], position_J: Array) -> Any:
    """A single point, due at `due_ns` with no motion towards it: the time before is the previous frame's."""
    point = _make(
        "trajectory_msgs/msg/JointTrajectoryPoint",
        positions=position_J.astype(np.float64),
        velocities=NOTHING,
        accelerations=NOTHING,
        effort=NOTHING,
        time_from_start=_make("builtin_interfaces/msg/Duration", sec=0, nanosec=0),
    )
    return _make(TRAJECTORY, header=header(due_ns), joint_names=list(joints), points=[point])
