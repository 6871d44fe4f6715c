"""Where the arm was told to be, and where it was, as functions of time.

`CommandedPath` is the one model of ROS 2's joint_trajectory_controller: the simulated arms move by it, and replay,
datasets and shadow mode use it to find what a recorded arm was told. `CommandedAxes` joins the paths of all outputs of
a robot. `MeasuredPath` is the line through what was read of it.

Legend: J joints in the order in which the path was given them, N instants, K points of a trajectory, or readings; M
signals, G those of them that come in one message. Positions in rad or m, derivatives per second, times in integer ns on
one clock: the node's, or the bag's.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.errors import InputError
from ki_vla_ros.records import NS_PER_S, SignalReading, header_ns, time_to_ns
from ki_vla_ros.robot import CommandSpace, Robot, Signal, pose_place

# Joint states farther apart than this say nothing about the time between them.
LONGEST_GAP_NS = 250_000_000
# How much longer than their stamps say two readings may lie apart: times of arrival vary, and where a slow gripper is
# merged into the messages of a fast arm, it moves in steps this long.
JUMP_S = 0.1

Array = NDArray[np.float64]


def reach(speed_J: Array, since_ns: int) -> Array:
    """How far from each other [J] two readings may be that are `since_ns` apart; what is farther was no motion.

    After a longer gap nobody knows what has happened, so it counts as LONGEST_GAP_NS.
    """
    return speed_J * (min(abs(since_ns), LONGEST_GAP_NS) / NS_PER_S + JUMP_S)


class ArmPath(Protocol):
    """Positions over time; nobody asks for a time before the last `forget`."""

    def at(self, time_N: NDArray[np.int64]) -> Array:
        """Positions [N, J]; NaN where nothing is known."""
        ...

    def known(self, time_ns: int, now_ns: int) -> bool:
        """Whether `at(time_ns)` is final once everything up to `now_ns` has been taken in."""
        ...

    def forget(self, before_ns: int) -> None:
        """Frees what is only needed for times before `before_ns`; nobody will ask for those any more."""
        ...

    def clear(self) -> None:
        """Forgets everything."""
        ...


class TrajectoryPoint(NamedTuple):
    """One waypoint; values in the order of the trajectory's `joints`, an empty sequence where they are not given."""

    time_from_start_ns: int
    positions: Sequence[float]
    velocities: Sequence[float] = ()
    accelerations: Sequence[float] = ()
    effort: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A trajectory message as received; `stamp_ns` 0 means "start now"."""

    stamp_ns: int
    joints: Sequence[str]
    points: Sequence[TrajectoryPoint]


def trajectory_from_message(message: Any) -> Trajectory:
    """The numbers of a trajectory_msgs/JointTrajectory, unchanged and unchecked."""
    points = [
        TrajectoryPoint(
            time_to_ns(point.time_from_start),
            point.positions,
            point.velocities,
            point.accelerations,
            point.effort,
        )
        for point in message.points
    ]
    return Trajectory(header_ns(message), message.joint_names, points)


class CommandedPath:
    """What joint_trajectory_controller, or forward_command_controller, makes of the messages on its topic.

    A trajectory replaces the previous one at once (stamp 0, or a stamp that has passed) or at its stamp; until then the
    previous one goes on, and whatever waits for a later stamp is dropped. The new one starts from where the arm was
    told to be then, at the velocity it was told to have (`interpolate_from_desired_state: true`), and leads to the
    first point and on through the others: in a straight line where two neighbours give only positions, along a cubic
    where both give velocities, along a quintic where both give accelerations too. After the last point the arm is told
    to stay there. If some points have already passed, the arm is told to be, at once, where the trajectory is by then.
    A trajectory that ended before it arrived is refused, as is whatever the controller refuses. An array of positions
    takes effect when it arrives.

    With `position_J`, where the arm rests at first, the path acts as the controller of exactly these joints. Without
    it, the path belongs to an onlooker: nothing is known before the first message, and the controller may have more
    joints (they are left out), take effort, and let a trajectory end in motion
    (`allow_nonzero_velocity_at_trajectory_end`). The first trajectory starts from where the arm was measured then; an
    onlooker who is not told that knows nothing before its first point, and never anything of a stream of points that
    are replaced before they are reached.

    Source: ros2_controllers, joint_trajectory_controller: trajectory.cpp (`sample`, `interpolate_between_points`) and
    `validate_trajectory_msg`, 2.x to 6.9; stamps in the future as with the `allow_trajectory_replacement` of August
    2026. Of several waiting trajectories 6.8 and 6.9 keep only the newest; before 6.8 none waited: the arm set out for
    the first point at once. Refused here but not there: numbers that are not finite, times before the start, and
    accelerations without velocities, which the controller takes as zeros.
    """

    def __init__(
        self, joints: Sequence[str], position_J: Array | None = None, *, allow_partial_joints_goal: bool = False
    ) -> None:
        """`allow_partial_joints_goal`: as the controller's; joints that a message leaves out stay where they are."""
        self.joints = tuple(joints)
        self._onlooker, self._allow_partial = position_J is None, allow_partial_joints_goal
        # Sorted by `from_ns`. Each is in force until the next one begins; the last ones may still be waiting.
        self._pieces: list[_Piece] = []
        self._rest(np.full(len(self.joints), np.nan) if position_J is None else position_J)

    def take(self, message: Any, arrived_ns: int, measured_J: Array | None = None) -> None:
        """Takes a trajectory_msgs/JointTrajectory, or a std_msgs/Float64MultiArray in the order of the joints.

        `measured_J`: where the arm is (NaN: not known), for an onlooker. InputError says why a message is refused; what
        was in force stays in force.
        """
        if hasattr(message, "points"):
            self.accept(trajectory_from_message(message), arrived_ns, measured_J)
            return
        position_J = np.array(message.data, dtype=np.float64)
        if len(position_J) != len(self.joints):
            raise InputError(f"command: expected {len(self.joints)} positions, got {len(position_J)}")
        if not np.isfinite(position_J).all():
            raise InputError(f"command: expected finite positions, got {position_J.tolist()}")
        self._add(_rest(arrived_ns, position_J), arrived_ns)

    def accept(self, trajectory: Trajectory, arrived_ns: int, measured_J: Array | None = None) -> None:
        """`take` for a trajectory that is no longer a message."""
        index = self._index(trajectory.joints)
        start_ns = trajectory.stamp_ns or arrived_ns
        knots = self._knots(trajectory, index, start_ns)
        late_ns = arrived_ns - int(knots.time_K[-1])
        if trajectory.stamp_ns and late_ns > 0:
            raise InputError(
                f"command: trajectory refused: its last point was due {late_ns / 1e6:.0f} ms before it came; expected "
                "at least one point in the future (check header.stamp and the publisher's clock)"
            )
        from_ns = max(start_ns, arrived_ns)
        before_3J = self._state(from_ns)
        if measured_J is not None:
            known_J = ~np.isnan(before_3J[0])
            before_3J = np.where(known_J, before_3J, [measured_J, *np.zeros((2, len(self.joints)))])
        left_out = [j for j, i in enumerate(index) if i is None]
        knots.state_3KJ[0][:, left_out] = before_3J[0, left_out]
        self._add(_Piece(from_ns, before_3J, knots), arrived_ns)

    def sample(self, time_ns: int) -> tuple[Array, Array]:
        """The controller's desired position and velocity [J]."""
        position_J, velocity_J, _ = self._state(time_ns)
        return position_J, velocity_J

    def hold(self, position_J: Array) -> None:
        """Drops what is running and what is waiting, and stays at `position_J`."""
        self._rest(position_J)

    def at(self, time_N: NDArray[np.int64]) -> Array:
        starts = np.array([piece.from_ns for piece in self._pieces], dtype=np.int64)
        in_force_N = np.maximum(np.searchsorted(starts, time_N, side="right") - 1, 0)
        path_NJ = np.empty((len(time_N), len(self.joints)))
        for number in np.unique(in_force_N):
            chosen_N = in_force_N == number
            path_NJ[chosen_N] = self._pieces[number].at(time_N[chosen_N])
        return path_NJ

    def known(self, time_ns: int, now_ns: int) -> bool:
        return now_ns > time_ns

    def forget(self, before_ns: int) -> None:
        gone = bisect_right(self._pieces, before_ns, key=lambda piece: piece.from_ns) - 1
        if gone > 0:
            del self._pieces[:gone]

    def clear(self) -> None:
        """Becomes an onlooker that has seen no command yet."""
        self._rest(np.full(len(self.joints), np.nan))

    def _rest(self, position_J: Array) -> None:
        self._pieces = [_rest(0, np.array(position_J, dtype=np.float64))]

    def _add(self, piece: _Piece, arrived_ns: int) -> None:
        if not self._onlooker:  # nobody calls `forget` on a controller, and it never looks back
            self.forget(arrived_ns)
        while len(self._pieces) > 1 and self._pieces[-1].from_ns >= piece.from_ns:
            self._pieces.pop()  # it was waiting for a stamp that the new one's start has overtaken
        self._pieces.append(piece)

    def _state(self, time_ns: int) -> Array:
        number = bisect_right(self._pieces, time_ns, key=lambda piece: piece.from_ns) - 1
        return self._pieces[max(number, 0)].state(time_ns)

    def _index(self, names: Sequence[str]) -> list[int | None]:
        """The index of each of the path's joints in a message; None: it is not there."""
        index = {name: i for i, name in enumerate(names)}
        missing = [name for name in self.joints if name not in index]
        unknown = [] if self._onlooker else [name for name in names if name not in self.joints]
        few = len(missing) == len(self.joints) or (missing and not self._allow_partial)
        if few or unknown or len(index) != len(names):
            raise InputError(
                f"command: trajectory refused: joint_names must be each of {list(self.joints)} once, in any order; got "
                f"{list(names)} (missing {missing}, unknown {unknown})"
            )
        return [index.get(name) for name in self.joints]

    def _knots(self, trajectory: Trajectory, index: list[int | None], start_ns: int) -> _Knots:
        """The points of a trajectory that starts at `start_ns`; joints that it leaves out are 0."""
        points, width = trajectory.points, len(trajectory.joints)
        if not points:
            raise InputError(
                "command: trajectory refused: it has no points; to stop the arm, send its present position"
            )
        time_K = np.array([point.time_from_start_ns for point in points], dtype=np.int64)
        for k in np.flatnonzero(np.diff(time_K, prepend=-1) <= 0)[:1]:
            after = f" after {time_K[k - 1] / NS_PER_S:.3f} s" if k else ""
            raise InputError(
                f"command: trajectory refused: point {k}: time_from_start must be >= 0 and grow strictly; got "
                f"{time_K[k] / NS_PER_S:.3f} s{after}"
            )
        position_KW, _ = _column(points, "positions", width, required=True)
        velocity_KW, has_velocity_K = _column(points, "velocities", width)
        acceleration_KW, has_acceleration_K = _column(points, "accelerations", width)
        for k in np.flatnonzero(has_acceleration_K & ~has_velocity_K)[:1]:
            raise InputError(f"command: trajectory refused: point {k}: accelerations without velocities; send both")
        if not self._onlooker:
            if any(len(point.effort) for point in points):
                raise InputError(
                    "command: trajectory refused: effort is not supported by this controller; leave it out"
                )
            if np.any(np.abs(velocity_KW[-1]) > np.finfo(np.float32).eps):
                raise InputError(
                    "command: trajectory refused: the last point's velocities must be 0 so that the arm can stay, "
                    f"got {velocity_KW[-1].tolist()}"
                )
        given_J = np.array([i is not None for i in index])
        order_J = [i or 0 for i in index]
        state_3KJ = np.array([position_KW, velocity_KW, acceleration_KW])[..., order_J] * given_J
        degree_K = np.where(has_acceleration_K, 5, np.where(has_velocity_K, 3, 1))
        return _Knots(start_ns + time_K, degree_K, state_3KJ)


def _column(
    points: Sequence[TrajectoryPoint], name: str, width: int, required: bool = False
) -> tuple[Array, NDArray[np.bool_]]:
    """One field of all points [K, width], 0 where it is not given, and whether each point gives it [K]."""
    rows = [getattr(point, name) for point in points]
    given_K = np.array([len(row) > 0 for row in rows])
    for k, row in enumerate(rows):
        if len(row) != width and (required or len(row)):
            raise InputError(
                f"command: trajectory refused: point {k}: expected {width} {name} (one per joint), got {len(row)}"
            )
    values_KW = np.zeros((len(rows), width))
    if given_K.any():
        values_KW[given_K] = [row for row in rows if len(row)]
    for k in np.flatnonzero(~np.isfinite(values_KW).all(axis=1))[:1]:
        raise InputError(f"command: trajectory refused: point {k}: {name} must be finite, got {values_KW[k].tolist()}")
    return values_KW, given_K


@dataclass(frozen=True, slots=True, eq=False)
class _Knots:
    """The knots of a piecewise polynomial of degree 1, 3 or 5: between two knots the lower one of theirs."""

    time_K: NDArray[np.int64]
    degree_K: NDArray[np.int64]
    state_3KJ: Array  # position, velocity, acceleration; 0 where not given


class _Piece:
    """What one message makes of the path from `from_ns` on: polynomials from knot to knot, then rest.

    Legend: M knots that still matter at `from_ns`, D coefficients. Between knot m and the next, the position is the sum
    over d of `factor_DMJ[d, m] * phase ** d`, with a phase from 0 to 1. After the last knot only `factor_DMJ[0]` is not
    0.
    """

    def __init__(self, from_ns: int, before_3J: Array, knots: _Knots) -> None:
        """`before_3J`: position, velocity and acceleration of the previous path at `from_ns`."""
        self.from_ns = from_ns
        # The first polynomial begins at the last knot that has passed; if none has, where the previous path has got to.
        passed = int(np.searchsorted(knots.time_K, from_ns, side="right")) - 1
        first = max(passed, 0)
        self._begin_M, degree_M, state_3MJ = knots.time_K[first:], knots.degree_K[first:], knots.state_3KJ[:, first:]
        if passed < 0:
            self._begin_M = np.concatenate([[from_ns], self._begin_M])
            degree_M = np.concatenate([[5], degree_M])
            state_3MJ = np.concatenate([before_3J[:, None], state_3MJ], axis=1)
        self._length_M = np.append(np.diff(self._begin_M) / NS_PER_S, 1.0)
        self._end_2J = state_3MJ[1:, -1]
        self._factor_DMJ = _factors(state_3MJ, self._length_M[:-1], np.minimum(degree_M[:-1], degree_M[1:]))

    def at(self, time_N: NDArray[np.int64]) -> Array:
        """Positions [N, J]; before `from_ns`, the position at `from_ns`."""
        time_N = np.maximum(time_N, self.from_ns)
        m_N = np.searchsorted(self._begin_M, time_N, side="right") - 1
        phase_N = ((time_N - self._begin_M[m_N]) / (self._length_M[m_N] * NS_PER_S))[:, None]
        factor_DNJ = self._factor_DMJ[:, m_N]
        path_NJ: Array = factor_DNJ[-1]
        for factor_NJ in factor_DNJ[-2::-1]:
            path_NJ = path_NJ * phase_N + factor_NJ
        return path_NJ

    def state(self, time_ns: int) -> Array:
        """Position, velocity and acceleration [3, J]; after the end, velocity and acceleration of the last point.

        The controller does the same.
        """
        time_ns = max(time_ns, self.from_ns)
        m = int(np.searchsorted(self._begin_M, time_ns, side="right")) - 1
        if m == len(self._begin_M) - 1:
            return np.concatenate([self._factor_DMJ[0, m][None], self._end_2J])
        length_s = self._length_M[m]
        phase = (time_ns - int(self._begin_M[m])) / (length_s * NS_PER_S)
        powers_D = [phase**d for d in range(len(self._factor_DMJ))]
        first_D = [d * phase ** (d - 1) / length_s if d else 0.0 for d in range(len(powers_D))]
        second_D = [d * (d - 1) * phase ** (d - 2) / length_s**2 if d > 1 else 0.0 for d in range(len(powers_D))]
        state_3J: Array = np.array([powers_D, first_D, second_D]) @ self._factor_DMJ[:, m]
        return state_3J


def _rest(from_ns: int, position_J: Array) -> _Piece:
    state_3J = np.array([position_J, np.zeros_like(position_J), np.zeros_like(position_J)])
    return _Piece(from_ns, state_3J, _Knots(np.array([from_ns]), np.array([5]), state_3J[:, None]))


def _factors(state_3MJ: Array, length_N: Array, degree_N: NDArray[np.int64]) -> Array:
    """`_Piece`'s factors [D, M, J]: N = M - 1 polynomials through the states at their ends, then rest."""
    factor_DMJ = np.zeros((int(degree_N.max(initial=0)) + 1, *state_3MJ.shape[1:]))
    factor_DMJ[0] = state_3MJ[0]
    delta_NJ = np.diff(state_3MJ[0], axis=0)
    if len(delta_NJ):
        factor_DMJ[1, :-1] = delta_NJ
    for degree in (3, 5):
        n = np.flatnonzero(degree_N == degree)
        if not len(n):
            continue
        # Derivatives by phase, not by time, so that the lengths cancel below.
        delta, length = delta_NJ[n], length_N[n, None]
        velocity, end_velocity = state_3MJ[1, n] * length, state_3MJ[1, n + 1] * length
        factor_DMJ[1, n] = velocity
        if degree == 3:
            factor_DMJ[2, n] = 3.0 * delta - 2.0 * velocity - end_velocity
            factor_DMJ[3, n] = velocity + end_velocity - 2.0 * delta
            continue
        accel, end_accel = state_3MJ[2, n] * length**2, state_3MJ[2, n + 1] * length**2
        factor_DMJ[2, n] = accel / 2.0
        factor_DMJ[3, n] = 10.0 * delta - 6.0 * velocity - 4.0 * end_velocity - 1.5 * accel + 0.5 * end_accel
        factor_DMJ[4, n] = -15.0 * delta + 8.0 * velocity + 7.0 * end_velocity + 1.5 * accel - end_accel
        factor_DMJ[5, n] = 6.0 * delta - 3.0 * velocity - 3.0 * end_velocity - 0.5 * accel + 0.5 * end_accel
    return factor_DMJ


class _Streamed:
    """What a topic says that has one message of W numbers after the other; each is in force until the next.

    `integrate`: the numbers are velocities, and the path is where they have led to since the first.
    """

    def __init__(self, width: int, integrate: bool = False) -> None:
        self._width, self._integrate = width, integrate
        self.clear()

    def clear(self) -> None:
        self._times: list[int] = []
        self._values: list[Array] = []
        self._gone: list[Array] = []  # where the velocities had led to by then

    def add(self, value_W: Array, arrived_ns: int) -> None:
        if len(value_W) != self._width:
            raise InputError(f"command: expected {self._width} numbers, got {len(value_W)}")
        if not np.isfinite(value_W).all():
            raise InputError(f"command: expected finite numbers, got {value_W.tolist()}")
        while self._times and self._times[-1] >= arrived_ns:
            for kept in (self._times, self._values, self._gone):
                kept.pop()
        gone_W = np.zeros(self._width)
        if self._times and self._integrate:
            gone_W = self.at(np.array([arrived_ns]))[0]
        self._times.append(arrived_ns)
        self._values.append(value_W)
        self._gone.append(gone_W)

    def values(self, time_N: NDArray[np.int64]) -> Array:
        """What was said last [N, W]; NaN before the first message."""
        value_NW, k_N = np.full((len(time_N), self._width), np.nan), self._in_force(time_N)
        if self._times:
            value_NW[k_N >= 0] = np.array(self._values)[k_N[k_N >= 0]]
        return value_NW

    def at(self, time_N: NDArray[np.int64]) -> Array:
        if not self._integrate or not self._times:
            return self.values(time_N)
        k_N = self._in_force(time_N)
        since_N = (time_N - np.array(self._times)[k_N]) / NS_PER_S
        place_NW: Array = np.array(self._gone)[k_N] + self.values(time_N) * since_N[:, None]
        return place_NW

    def known(self, time_ns: int, now_ns: int) -> bool:
        return now_ns > time_ns

    def forget(self, before_ns: int) -> None:
        if (gone := bisect_right(self._times, before_ns) - 1) > 0:
            for kept in (self._times, self._values, self._gone):
                del kept[:gone]

    def _in_force(self, time_N: NDArray[np.int64]) -> NDArray[np.intp]:
        return np.searchsorted(np.array(self._times, dtype=np.int64), time_N, side="right") - 1


class CommandedAxes:
    """Where all axes of a robot were told to be, by the messages of each output; an `ArmPath` over the axes.

    NaN for an output of which no message has come yet. Rotation vectors count from no rotation at all. The position of
    an axis that is a velocity is where its velocities have led to since the first; poses and velocities are in force
    until the next message, as nobody sees what makes a controller give up.
    """

    def __init__(self, robot: Robot) -> None:
        self._robot, self._width, self._lines = robot, len(robot.axes), robot.command_lines
        # In the units of the messages, as a line between two of their values is one in ours, too.
        self._parts: dict[str, tuple[slice, CommandedPath | _Streamed]] = {}
        for output in robot.outputs:
            place = robot.axes_of(output)
            axes = robot.axes[place]
            streamed = axes[0].kind in ("position", "velocity")
            path = (
                _Streamed(len(axes), axes[0].kind == "velocity")
                if streamed
                else CommandedPath([axis.name for axis in axes])
            )
            self._parts[output.name] = place, path

    def take(self, output: str, message: Any, arrived_ns: int, measured_J: Array | None = None) -> None:
        """Takes a message of this output: of rclpy or of rosbags; InputError says why it is refused.

        `measured_J`: where all axes are, which an output's first trajectory starts from (see CommandedPath).
        """
        place, path = self._parts[output]
        try:
            if isinstance(path, CommandedPath):
                written_J = None if measured_J is None else self._lines.to_foreign(measured_J)
                path.take(message, arrived_ns, None if written_J is None else written_J[place])
            else:
                path.add(self._values(output, message), arrived_ns)
        except AttributeError:
            expected = next(o for o in self._robot.outputs if o.name == output).type or "JointTrajectory"
            raise InputError(f"command: output {output!r}: expected {expected}, got {type(message).__name__}") from None
        except InputError as refusal:
            if len(self._parts) == 1:
                raise
            raise InputError(f"output {output!r}: {refusal}") from refusal

    def at(self, time_N: NDArray[np.int64]) -> Array:
        path_NJ = np.full((len(time_N), self._width), np.nan)
        for place, path in self._parts.values():
            path_NJ[:, place] = path.at(time_N)
        return self._lines.to_robot(path_NJ)

    def velocities(self, time_N: NDArray[np.int64]) -> Array:
        """What axes that are velocities were told [N, J]; 0 for all others."""
        velocity_NJ = np.zeros((len(time_N), self._width))
        for place, path in self._parts.values():
            if isinstance(path, _Streamed) and self._robot.axes[place.start].kind == "velocity":
                velocity_NJ[:, place] = path.values(time_N)
        return velocity_NJ * self._lines.scale_D

    def known(self, time_ns: int, now_ns: int) -> bool:
        return now_ns > time_ns

    def forget(self, before_ns: int) -> None:
        for _, path in self._parts.values():
            path.forget(before_ns)

    def clear(self) -> None:
        for _, path in self._parts.values():
            path.clear()

    def _values(self, name: str, message: Any) -> Array:
        """The numbers of a streamed message, one per axis of its output."""
        if hasattr(message, "data"):
            return np.array(message.data, dtype=np.float64)
        if hasattr(message, "pose"):
            place, turned = message.pose.position, message.pose.orientation
            pose = np.array([place.x, place.y, place.z, turned.x, turned.y, turned.z, turned.w], dtype=np.float64)
            try:
                return pose_place(pose)
            except ValueError as error:
                raise InputError(f"command: orientation: {error}") from None
        twist, output = getattr(message, "twist", message), next(o for o in self._robot.outputs if o.name == name)
        parts = [getattr(part, axis) for part in (twist.linear, twist.angular) for axis in "xyz"]
        return np.array(parts, dtype=np.float64)[self._robot.twist_parts(output)]


@dataclass(eq=False)
class _Track:
    """The readings of the signals `index`, which come together, in the order of their stamps."""

    index: tuple[int, ...]
    speed_G: Array
    stamps: deque[int]
    values: deque[Array]
    jumps: deque[int]  # stamps of the last readings before a jump
    jump_count: int = 0

    def of(self, index: tuple[int, ...]) -> _Track:
        """The same for some of the signals."""
        places = [self.index.index(m) for m in index]
        values = deque(value_G[places] for value_G in self.values)
        return _Track(index, self.speed_G[places], deque(self.stamps), values, deque(self.jumps), self.jump_count)

    def at(self, time_N: NDArray[np.int64], max_gap_ns: int) -> Array:
        """Values [N, G]; NaN where nothing is known."""
        path_NG = np.full((len(time_N), len(self.index)), np.nan)
        first = bisect_right(self.stamps, int(time_N.min())) - 1
        last = bisect_left(self.stamps, int(time_N.max()))
        keep = range(max(first, 0), min(last + 1, len(self.stamps)))
        if not keep:
            return path_NG
        stamp_K = np.array([self.stamps[i] for i in keep], dtype=np.int64)
        value_KG = np.array([self.values[i] for i in keep])
        after_N = np.searchsorted(stamp_K, time_N).clip(max=len(stamp_K) - 1)
        before_N = np.maximum(after_N - 1, 0)
        before_ns, after_ns = stamp_K[before_N], stamp_K[after_N]
        between_N = (time_N > before_ns) & (time_N < after_ns) & (after_ns - before_ns <= max_gap_ns)
        between_N &= ~np.isin(before_ns, self.jumps)
        weight_N = ((time_N - before_ns) / np.maximum(after_ns - before_ns, 1))[:, None]
        line_NG = value_KG[before_N] * (1.0 - weight_N) + value_KG[after_N] * weight_N
        path_NG[between_N] = line_NG[between_N]
        path_NG[time_N == after_ns] = value_KG[after_N[time_N == after_ns]]
        return path_NG


class MeasuredPath:
    """Where the robot was: on the straight line between two readings of each signal.

    NaN where one of them is not known. Rotation vectors count from no rotation at all, as in `CommandedAxes`.
    Anything faster than a signal can be was no motion but a jump: a simulator's reset, or a bag joined from pieces;
    `jump_after` says when. A jump, and readings more than `max_gap_ns` apart, say nothing
    about the time between.
    """

    def __init__(self, signals: Sequence[Signal], robot: Robot | None = None, max_gap_ns: int = LONGEST_GAP_NS) -> None:
        """The path is that of `robot`'s axes, whose signals these are (None: it is that of the signals)."""
        self._speed_M = np.array([signal.max_velocity for signal in signals])
        self._space = None if robot is None else CommandSpace(robot)
        self._max_gap_ns = max_gap_ns
        self.clear()

    def clear(self) -> None:
        self.jumps = 0  # how often, at most, one signal has jumped
        self._tracks: dict[tuple[int, ...], _Track] = {}

    def add(self, readings: Iterable[SignalReading]) -> None:
        """Adds what the observation has accepted of a message; one that is not newer than the last is left out."""
        for reading in readings:
            track = self._tracks.get(reading.signals) or self._divide(reading.signals)
            if track.stamps:
                if reading.stamp_ns <= track.stamps[-1]:
                    continue
                reach_G = reach(track.speed_G, reading.stamp_ns - track.stamps[-1])
                if np.any(np.abs(reading.value_G - track.values[-1]) > reach_G):
                    track.jumps.append(track.stamps[-1])
                    track.jump_count += 1
                    self.jumps = max(self.jumps, track.jump_count)
            track.stamps.append(reading.stamp_ns)
            track.values.append(reading.value_G)

    def _divide(self, signals: tuple[int, ...]) -> _Track:
        """A track for signals that have come together for the first time: what another one knew of them, or empty."""
        found = _Track(signals, self._speed_M[list(signals)], deque(), deque(), deque())
        for index, track in list(self._tracks.items()):
            if set(signals) < set(index):
                found = track.of(signals)
                rest = tuple(m for m in index if m not in signals)
                del self._tracks[index]
                self._tracks[rest] = track.of(rest)
        self._tracks[signals] = found
        return found

    def jump_after(self, since_ns: int) -> int | None:
        """The stamp of the last reading before the first jump at or after `since_ns`; None: there was none."""
        stamps = (stamp_ns for track in self._tracks.values() for stamp_ns in track.jumps if stamp_ns >= since_ns)
        return min(stamps, default=None)

    def at(self, time_N: NDArray[np.int64]) -> Array:
        signal_NM = np.full((len(time_N), len(self._speed_M)), np.nan)
        for track in self._tracks.values():
            signal_NM[:, track.index] = track.at(time_N, self._max_gap_ns)
        if self._space is None:
            return signal_NM
        path_NJ = np.full((len(time_N), len(self._space.axes)), np.nan)
        for n in np.flatnonzero(np.isfinite(signal_NM).all(axis=1)):
            path_NJ[n] = self._space.measured(signal_NM[n])
        return path_NJ

    def known(self, time_ns: int, now_ns: int) -> bool:
        covered = sum(len(track.index) for track in self._tracks.values()) == len(self._speed_M)
        reached = covered and all(track.stamps[-1] >= time_ns for track in self._tracks.values())
        return reached or now_ns > time_ns + self._max_gap_ns

    def forget(self, before_ns: int) -> None:
        for track in self._tracks.values():
            while len(track.stamps) > 1 and track.stamps[1] < before_ns:
                track.stamps.popleft()
                track.values.popleft()
            while track.jumps and track.jumps[0] < before_ns:
                track.jumps.popleft()
