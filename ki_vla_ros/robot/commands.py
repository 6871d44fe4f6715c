"""Between a policy's numbers and a robot's axes: signals to state and axes, actions to paths of the axes, and back.

An action may be an angle, a velocity, a step of a tool, an open gripper; a path of the axes (robot/axes.py) is one
continuous thing that can be joined, bounded and braked. Here is the only place that knows how the one becomes the
other.

Legend: M signals, S state, D actions, J axes, H horizon; P outputs with a pose.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.robot import rotations
from ki_vla_ros.robot.axes import MOST_ROTATION
from ki_vla_ros.robot.dimensions import POSITION, QUATERNION, SIX_D, VECTOR, ActionDimension
from ki_vla_ros.robot.robot import Robot
from ki_vla_ros.robot.signals import measuring_state, own_signal, pose_topic, scale_of
from ki_vla_ros.robot.turns import nearest_turn

Array = NDArray[np.float64]
ALL_PARTS = (*POSITION, *VECTOR, *QUATERNION, *SIX_D)
# From this share of the farthest rotation on, the arm had better rest and count anew before it goes on.
WORN = 0.5


@dataclass(frozen=True)
class PoseOutput:
    """Where in the axes, actions and signals an output's pose is; `rotation` names how actions write it.

    Actions without a position or a rotation leave it as it is; `position` or `turned` is then empty.
    """

    output: int
    axes: slice
    position: NDArray[np.intp]
    rotation: tuple[str, ...]
    turned: NDArray[np.intp]
    signals: slice
    delta: bool
    in_tool: bool
    from_observation: bool


@dataclass(frozen=True)
class _Gripper:
    axis: int
    action: int
    ends: tuple[float, float]
    threshold: float
    hysteresis: float


class CommandSpace:
    """The numbers of one robot. Its only state is `reference_P4`: the orientations that rotation axes count from.

    They change only while the arm rests (`count_from`).
    """

    def __init__(self, robot: Robot) -> None:
        self.robot, self.axes = robot, robot.axes
        kinds = [axis.kind for axis in self.axes]
        self.velocity_J = np.array([kind == "velocity" for kind in kinds])
        self.continuous_J = np.array([axis.continuous for axis in self.axes])
        self.continuous_S = np.array([signal.continuous for signal in self._state_signals()])
        self.relative_D = np.array([action.relative for action in robot.actions])
        self._state_index, self._poses_of_state = self._plan_state()
        self.poses = self._plan_poses()
        self._plan_axes()
        self.reference_P4 = np.tile(rotations.IDENTITY, (len(self.poses), 1))
        self._plain = (
            not self.poses
            and not self.velocity_J.any()
            and not self._grippers
            and np.array_equal(self._axis_of_action, np.arange(len(self.axes)))
        )

    # --- signals

    def state(self, signal_M: Array) -> Array:
        """The policy's state [S]."""
        state_S = signal_M[self._state_index]
        for places, topic, parts in self._poses_of_state:
            state_S[places] = _all_parts(signal_M[topic][:3], signal_M[topic][3:])[parts]
        return state_S

    def signals(self, state_S: Array) -> Array:
        """The inverse of `state`: signals [M]; NaN for those that the state does not say.

        ValueError for a state that says no orientation.
        """
        signal_M = np.full(len(self.robot.signals), np.nan)
        for s, dimension in enumerate(self.robot.state):
            if dimension.kind != "pose":
                signal_M[self._state_index[s]] = state_S[s]
        for places, topic, parts in self._poses_of_state:
            said = np.full(len(ALL_PARTS), np.nan)
            said[parts] = state_S[places]
            pose = signal_M[topic]
            pose[:3] = said[:3]
            for rotation in (VECTOR, QUATERNION, SIX_D):
                numbers = said[[ALL_PARTS.index(part) for part in rotation]]
                if not np.isnan(numbers).any():
                    pose[3:] = _read(rotation, numbers)
        return signal_M

    def measured(self, signal_M: Array) -> Array:
        """Where the axes are [J]; NaN for velocities that nobody measures."""
        position_J = signal_M[self._signal_of_axis] * self._scale_J + self._offset_J
        for p, pose in enumerate(self.poses):
            position_J[pose.axes] = pose_place(signal_M[pose.signals], self.reference_P4[p])
        return position_J

    def stamps(self, stamp_M: NDArray[np.int64]) -> NDArray[np.int64]:
        """The stamp of what says where each axis is [J]; an axis that nobody measures takes the newest."""
        stamp_J = np.where(self.unmeasured_J, stamp_M.max(), stamp_M[self._signal_of_axis])
        for pose in self.poses:
            stamp_J[pose.axes] = stamp_M[pose.signals.start]
        return stamp_J

    # --- rotations

    def worn(self, position_J: Array) -> bool:
        """Whether a rotation is so far from where it is counted from that a rest should come first."""
        return any(bool(np.abs(position_J[_rotation(pose)]).max() > WORN * MOST_ROTATION) for pose in self.poses)

    def beyond(self, position_HJ: Array) -> bool:
        """Whether a path turns farther than rotations can be counted."""
        return any(bool(np.abs(position_HJ[..., _rotation(pose)]).max() > MOST_ROTATION) for pose in self.poses)

    def count_from(self, origin_J: Array, position_J: Array | None = None) -> Array:
        """Counts rotations from where they are at `origin_J`; returns `position_J` (None: that) in the new count.

        Only while the arm rests: whatever was counted from before means something else afterwards.
        """
        counted_J = (origin_J if position_J is None else position_J).copy()
        for p, pose in enumerate(self.poses):
            origin, there = (rotations.from_vector(place_J[_rotation(pose)]) for place_J in (origin_J, counted_J))
            self.reference_P4[p] = rotations.unit(rotations.multiply(self.reference_P4[p], origin))
            turned = rotations.to_vector(rotations.multiply(rotations.inverse(origin), there))
            counted_J[_rotation(pose)] = 0.0 if position_J is None else turned
        return counted_J

    def quaternions(self, pose: PoseOutput, position_NJ: Array, reference_P4: Array) -> Array:
        """The orientations [N, 4] of an output at the given places of the axes."""
        p = self.poses.index(pose)
        turned = rotations.from_vector(position_NJ[..., _rotation(pose)])
        return rotations.unit(rotations.multiply(reference_P4[p], turned))

    def nearest(self, position_NJ: Array, near_NJ: Array, reference_P4: Array) -> Array:
        """The same places [N, J], written the way that is nearest to `near_NJ`.

        Rotations come counted from no rotation at all, and are then counted from `reference_P4`, as those of `near_NJ`
        are; joints that turn without end may be whole turns away. Of a velocity only what it has led to since the first
        place counts.
        """
        position_NJ = nearest_turn(position_NJ, near_NJ, self.continuous_J)
        if self.velocity_J.any():
            position_NJ = position_NJ + np.where(self.velocity_J, near_NJ[0] - position_NJ[0], 0.0)
        for p, pose in enumerate(self.poses):
            position_NJ = position_NJ.copy() if p == 0 else position_NJ
            turned_N4 = rotations.from_vector(position_NJ[:, _rotation(pose)])
            counted_N4 = rotations.multiply(rotations.inverse(reference_P4[p]), turned_N4)
            position_NJ[:, _rotation(pose)] = [
                _nearest_vector(vector, near)
                for vector, near in zip(rotations.to_vector(counted_N4), near_NJ[:, _rotation(pose)], strict=True)
            ]
        return position_NJ

    # --- actions

    def path(
        self, action_HD: Array, measured_J: Array, commanded_J: Array | None, period_s: float
    ) -> tuple[Array, Array]:
        """Positions and velocities [H, J] of the axes for absolute actions [H, D] of one chunk.

        `measured_J` is where the axes were at the observation, and `commanded_J` where they were told to be then
        (None: as measured). ValueError for an action that says no orientation.
        """
        horizon = len(action_HD)
        start_J = measured_J
        if self.unmeasured_J.any():  # of those only the velocity counts: a chunk's way begins at 0
            start_J = np.where(self.unmeasured_J, 0.0, measured_J)
        position_HJ = action_HD if self._plain else np.empty((horizon, len(self.axes)))
        if not self._plain:
            position_HJ[:, self._axis_of_action] = action_HD[:, self._action_of_axis]
            for gripper in self._grippers:
                began = start_J if commanded_J is None else commanded_J
                position_HJ[:, gripper.axis] = _switch(gripper, action_HD[:, gripper.action], began[gripper.axis])
            for p, pose in enumerate(self.poses):
                position_HJ[:, pose.axes] = self._pose_path(p, pose, action_HD, start_J)
        path = np.concatenate([start_J[np.newaxis], position_HJ])
        # Absolute angles of a joint that turns without end may be a turn apart: the arm takes the shortest way.
        if (wound_J := self.continuous_J & ~self._relative_J).any():
            path[:, wound_J] = np.unwrap(path[:, wound_J], axis=0)
            position_HJ = path[1:]
        # Central differences; the last point has no successor and takes the difference to its predecessor.
        velocity_HJ = np.gradient(path, period_s, axis=0)[1:]
        for gripper in self._grippers:  # between two places it goes as fast as it may
            velocity_HJ[:, gripper.axis] = 0.0
        if self.velocity_J.any():
            wanted_HV = position_HJ[:, self.velocity_J].copy()
            before_HV = np.concatenate([wanted_HV[:1], wanted_HV[:-1]])
            position_HJ[:, self.velocity_J] = start_J[self.velocity_J] + np.cumsum(
                0.5 * period_s * (before_HV + wanted_HV), axis=0
            )
            velocity_HJ[:, self.velocity_J] = wanted_HV
        return position_HJ, velocity_HJ

    def actions(self, position_HJ: Array, velocity_HJ: Array, measured_J: Array) -> Array:
        """Absolute actions [H, D] of a path of the axes: the inverse of `path`."""
        if self._plain:
            return position_HJ
        action_HD = np.empty((len(position_HJ), len(self.robot.actions)))
        value_HJ = np.where(self.velocity_J, velocity_HJ, position_HJ)
        action_HD[:, self._action_of_axis] = value_HJ[:, self._axis_of_action]
        for p, pose in enumerate(self.poses):
            self._write_pose(p, pose, position_HJ, measured_J, action_HD)
        return action_HD

    def origin(self, state_S: Array, turns_S: Array) -> Array:
        """What actions are counted from [..., D]: the state for relative ones; else `turns_S`, whole turns, or 0."""
        state_D = state_S[..., self._state_of_action] * self._scale_D + self._offset_D
        origin_D: Array = np.where(self.relative_D, state_D, turns_S[..., self._state_of_action] * self._turns_D)
        return origin_D

    def _pose_path(self, p: int, pose: PoseOutput, action_HD: Array, start_J: Array) -> Array:
        """x, y, z and rotation vector [H, 6]; what the actions leave out stays."""
        start = start_J[pose.axes]
        position_H3 = np.tile(start[:3], (len(action_HD), 1))
        begin = rotations.from_vector(start[3:])
        turned_H4 = np.tile(begin, (len(action_HD), 1))
        if len(pose.position):
            position_H3 = action_HD[:, pose.position]
        if pose.rotation:
            turned_H4 = _read(pose.rotation, action_HD[:, pose.turned])
            if not pose.delta:
                turned_H4 = rotations.multiply(rotations.inverse(self.reference_P4[p]), turned_H4)
        if pose.delta:
            steps_H3 = position_H3 if len(pose.position) else np.zeros_like(position_H3)
            steps_H4 = turned_H4 if pose.rotation else np.tile(rotations.IDENTITY, (len(action_HD), 1))
            position_H3, turned_H4 = self._walk(p, pose, steps_H3, steps_H4, start)
        vector_H3 = np.empty_like(position_H3)
        for k, vector in enumerate(rotations.to_vector(turned_H4)):
            near = start[3:] if k == 0 else vector_H3[k - 1]
            vector_H3[k] = _nearest_vector(vector, near)
        return np.concatenate([position_H3, vector_H3], axis=1)

    def _walk(self, p: int, pose: PoseOutput, steps_H3: Array, steps_H4: Array, start: Array) -> tuple[Array, Array]:
        """Adds up steps from a pose; orientations are counted from the reference."""
        reference = self.reference_P4[p]
        place, there = start[:3], rotations.multiply(reference, rotations.from_vector(start[3:]))
        places, turns = np.empty_like(steps_H3), np.empty_like(steps_H4)
        origin = place, there
        for k, (step, turn) in enumerate(zip(steps_H3, steps_H4, strict=True)):
            if pose.from_observation:
                place, there = origin
            if pose.in_tool:
                place, there = place + rotations.rotate(there, step), rotations.multiply(there, turn)
            else:
                place, there = place + step, rotations.multiply(turn, there)
            places[k], turns[k] = place, rotations.multiply(rotations.inverse(reference), rotations.unit(there))
        return places, turns

    def _write_pose(self, p: int, pose: PoseOutput, position_HJ: Array, measured_J: Array, action_HD: Array) -> None:
        reference = self.reference_P4[p]
        place_H3 = position_HJ[:, pose.axes][:, :3]
        turned_H4 = rotations.multiply(reference, rotations.from_vector(position_HJ[:, _rotation(pose)]))
        if pose.delta:
            start = measured_J[pose.axes]
            first = rotations.multiply(reference, rotations.from_vector(start[3:]))
            if pose.from_observation:
                from_H3, from_H4 = np.tile(start[:3], (len(place_H3), 1)), np.tile(first, (len(place_H3), 1))
            else:
                from_H3 = np.concatenate([start[None, :3], place_H3[:-1]])
                from_H4 = np.concatenate([first[None], turned_H4[:-1]])
            back_H4 = rotations.inverse(from_H4)
            place_H3 = place_H3 - from_H3
            if pose.in_tool:
                place_H3, turned_H4 = rotations.rotate(back_H4, place_H3), rotations.multiply(back_H4, turned_H4)
            else:
                turned_H4 = rotations.multiply(turned_H4, back_H4)
        parts_H = _all_parts(place_H3, turned_H4)
        if len(pose.position):
            action_HD[:, pose.position] = place_H3
        action_HD[:, pose.turned] = parts_H[:, [ALL_PARTS.index(part) for part in pose.rotation]]

    # --- where everything is, once

    def _state_signals(self) -> list:  # type: ignore[type-arg]
        by_key = {signal.key: signal for signal in self.robot.signals}
        return [
            by_key[d.source.topic, QUATERNION[3] if d.kind == "pose" else d.joint, _field(d)] for d in self.robot.state
        ]

    def _plan_state(self) -> tuple[NDArray[np.intp], list[tuple[list[int], slice, list[int]]]]:
        keys = [signal.key for signal in self.robot.signals]
        index, poses = [], dict[str, list[int]]()
        for s, dimension in enumerate(self.robot.state):
            posed = dimension.kind == "pose"
            index.append(
                keys.index((dimension.source.topic, POSITION[0] if posed else dimension.joint, _field(dimension)))
            )
            if posed:
                poses.setdefault(dimension.source.topic, []).append(s)
        planned = []
        for topic, places in poses.items():
            first = keys.index((topic, POSITION[0], "pose"))
            parts = [ALL_PARTS.index(str(self.robot.state[s].component)) for s in places]
            planned.append((places, slice(first, first + 7), parts))
        return np.array(index, dtype=np.intp), planned

    def _plan_poses(self) -> tuple[PoseOutput, ...]:
        keys, found = [signal.key for signal in self.robot.signals], []
        for number, output in enumerate(self.robot.outputs):
            topic = pose_topic(self.robot, output)
            if topic is None:
                continue
            places = {str(a.component): d for d, a in enumerate(self.robot.actions) if a.output == output.name}
            kinds = {a.kind for a in self.robot.actions if a.output == output.name}
            rotation = next((parts for parts in (VECTOR, QUATERNION, SIX_D) if parts[0] in places), ())
            first_axis = next(j for j, axis in enumerate(self.axes) if axis.output == number)
            first = keys.index((topic, POSITION[0], "pose"))
            found.append(
                PoseOutput(
                    output=number,
                    axes=slice(first_axis, first_axis + 6),
                    position=np.array([places[part] for part in POSITION if "x" in places], dtype=np.intp),
                    rotation=rotation,
                    turned=np.array([places[part] for part in rotation], dtype=np.intp),
                    signals=slice(first, first + 7),
                    delta="pose_delta" in kinds,
                    in_tool=output.delta_frame == "tool",
                    from_observation=output.delta_from == "observation",
                )
            )
        return tuple(found)

    def _plan_axes(self) -> None:
        robot, keys = self.robot, [signal.key for signal in self.robot.signals]
        count, names = len(self.axes), [axis.name for axis in self.axes]
        self._signal_of_axis = np.zeros(count, dtype=np.intp)
        self._scale_J, self._offset_J = np.ones(count), np.zeros(count)
        self._relative_J = np.zeros(count, dtype=np.bool_)
        self._state_of_action = np.zeros(len(robot.actions), dtype=np.intp)
        self._scale_D, self._offset_D = np.ones(len(robot.actions)), np.zeros(len(robot.actions))
        self._turns_D = np.array([float(action.continuous) for action in robot.actions])
        axes, actions, grippers = [], [], []
        states = [dimension.name for dimension in robot.state]
        for d, action in enumerate(robot.actions):
            if action.kind in ("pose", "pose_delta"):
                continue
            j = names.index(_axis_name(action))
            axes.append(j)
            actions.append(d)
            self._relative_J[j] = action.relative
            if action.binary and action.ends is not None:
                grippers.append(_Gripper(j, d, action.ends, action.threshold, action.hysteresis))
            state, own = (None, None) if action.kind == "twist" else (measuring_state(robot, action), None)
            if state is not None:
                scale, offset = scale_of(action, state) or (1.0, 0.0)
                self._signal_of_axis[j] = keys.index((state.source.topic, state.joint, state.source.field))
                self._scale_J[j] = self._scale_D[d] = scale
                self._offset_J[j] = self._offset_D[d] = offset
                self._state_of_action[d] = states.index(state.name)
            elif (own := own_signal(robot, action)) is not None:
                self._signal_of_axis[j] = keys.index(own.key)
            else:
                self._scale_J[j] = np.nan
        self._axis_of_action, self._action_of_axis = np.array(axes, dtype=np.intp), np.array(actions, dtype=np.intp)
        self._grippers = tuple(grippers)
        self.unmeasured_J = np.array([not axis.measured for axis in self.axes])


def pose_place(pose: Array, reference: Array = rotations.IDENTITY) -> Array:
    """x, y, z and the rotation vector counted from `reference` of a pose (x, y, z, qx, qy, qz, qw).

    ValueError for numbers that say no orientation.
    """
    turned = rotations.multiply(rotations.inverse(reference), rotations.unit(pose[3:]))
    return np.concatenate([pose[:3], rotations.to_vector(turned)])


def _axis_name(action: ActionDimension) -> str:
    return action.name if action.kind == "twist" else action.target


def _field(dimension: object) -> str:
    kind, source = getattr(dimension, "kind"), getattr(dimension, "source")  # noqa: B009
    return "pose" if kind == "pose" else str(source.field)


def _rotation(pose: PoseOutput) -> slice:
    return slice(pose.axes.start + 3, pose.axes.stop)


def _switch(gripper: _Gripper, value_H: Array, began: float) -> Array:
    """Fully open or closed [H]: it changes only where a value is clearly on the other side of the threshold."""
    opened, closed = gripper.ends
    share_H = (value_H - closed) / (opened - closed)
    half, is_open = gripper.hysteresis / 2.0, (began - closed) / (opened - closed) > 0.5
    switched_H = np.empty_like(value_H)
    for k, share in enumerate(share_H):
        if abs(share - gripper.threshold) > half:
            is_open = bool(share > gripper.threshold)
        switched_H[k] = opened if is_open else closed
    return switched_H


def _read(parts: tuple[str, ...], values: Array) -> Array:
    if parts == QUATERNION:
        return rotations.unit(values)
    return rotations.from_6d(values) if parts == SIX_D else rotations.from_vector(values)


def _all_parts(place: Array, quaternion: Array) -> Array:
    """A pose in all forms, as ALL_PARTS."""
    # Of the two quaternions that mean the same, the one that turns by at most half a turn.
    short = np.where(quaternion[..., 3:] < 0.0, -quaternion, quaternion)
    return np.concatenate([place, rotations.to_vector(short), short, rotations.to_6d(short)], axis=-1)


def _nearest_vector(vector: Array, near: Array) -> Array:
    """The rotation vector of the same rotation that is nearer: it, or the one the other way round."""
    angle = float(np.linalg.norm(vector))
    if angle == 0.0:
        return vector
    other = vector * (1.0 - 2.0 * np.pi / angle)
    return other if np.linalg.norm(other - near) < np.linalg.norm(vector - near) else vector
