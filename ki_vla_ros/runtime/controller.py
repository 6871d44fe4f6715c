"""What joint_trajectory_controller does with messages on its topic, without ROS.

Source: ros2_controllers, documentation and `validate_trajectory_msg` of joint_trajectory_controller (4.x to 6.x).
A new trajectory replaces the running one from its start on; stamp 0 starts now, a future stamp lets the running one
continue until then; points whose time has passed are dropped, and a message of which nothing is left is refused.
Positions alone give straight lines, positions with velocities cubic Hermite splines. After the last point it is held.

Two defaults of the real controller are set otherwise here, as one does for streamed trajectories:
the first segment begins at the commanded state (`interpolate_from_desired_state: true`), and accelerations are refused.

Legend: J joints. Times are integer nanoseconds on the node's clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.errors import InputError
from ki_vla_ros.records import NS_PER_S

Vector = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TrajectoryPoint:
    """One waypoint, values in the order of the trajectory's `joints`; an empty sequence means "not given"."""

    time_from_start_ns: int
    positions: Sequence[float]
    velocities: Sequence[float] = ()
    accelerations: Sequence[float] = ()
    effort: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A message as it came; `stamp_ns` 0 means "start now"."""

    stamp_ns: int
    joints: Sequence[str]
    points: Sequence[TrajectoryPoint]


def trajectory_from_message(message: Any) -> Trajectory:
    """The numbers of a trajectory_msgs/JointTrajectory, unchanged and unchecked."""
    stamp = message.header.stamp
    points = [
        TrajectoryPoint(
            point.time_from_start.sec * NS_PER_S + point.time_from_start.nanosec,
            point.positions,
            point.velocities,
            point.accelerations,
            point.effort,
        )
        for point in message.points
    ]
    return Trajectory(stamp.sec * NS_PER_S + stamp.nanosec, message.joint_names, points)


@dataclass(frozen=True, slots=True, eq=False)
class Knot:
    """A waypoint in the controller's joint order; `velocity_J` None: not given."""

    time_ns: int
    position_J: Vector
    velocity_J: Vector | None


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """The way from one knot to the next, valid until `until_ns`, where a replacement may have cut it short."""

    start: Knot
    end: Knot
    until_ns: int

    def sample(self, time_ns: int) -> tuple[Vector, Vector]:
        """Position and velocity [J] at a time between the two knots."""
        duration_s = (self.end.time_ns - self.start.time_ns) / NS_PER_S
        phase = (time_ns - self.start.time_ns) / (self.end.time_ns - self.start.time_ns)
        p0, p1 = self.start.position_J, self.end.position_J
        if self.start.velocity_J is None or self.end.velocity_J is None:
            return p0 + phase * (p1 - p0), (p1 - p0) / duration_s
        # Cubic Hermite: c0 + c1 s + c2 s^2 + c3 s^3 with s the phase in 0..1 and slopes per unit of phase.
        m0, m1 = self.start.velocity_J * duration_s, self.end.velocity_J * duration_s
        c2 = 3.0 * (p1 - p0) - 2.0 * m0 - m1
        c3 = 2.0 * (p0 - p1) + m0 + m1
        position_J = p0 + phase * (m0 + phase * (c2 + phase * c3))
        velocity_J = (m0 + phase * (2.0 * c2 + phase * 3.0 * c3)) / duration_s
        return position_J, velocity_J


class TrajectoryExecutor:
    """Holds the running trajectory and says where the arm shall be. Times given to it must not run backwards."""

    def __init__(self, joints: Sequence[str], position_J: Vector) -> None:
        self.joints = tuple(joints)
        self._segments: tuple[Segment, ...] = ()
        self._held_J = np.array(position_J, dtype=np.float64)

    def hold(self, position_J: Vector) -> None:
        """Drops what is running or deferred and stays at `position_J`."""
        self._segments = ()
        self._held_J = np.array(position_J, dtype=np.float64)

    def accept(self, trajectory: Trajectory, now_ns: int) -> None:
        """Takes a message over, or raises InputError and leaves the running trajectory as it is."""
        order = self._joint_order(trajectory.joints)
        self._check_points(trajectory, order)
        start_ns = trajectory.stamp_ns or now_ns
        knots = [self._knot(point, start_ns, order) for point in trajectory.points]
        # A point at time 0 of a trajectory that starts now or later is a wanted step; one due before now is past.
        usable = [knot for knot in knots if knot.time_ns > now_ns or start_ns == now_ns]
        if not usable:
            raise InputError(
                f"trajectory refused: its last point was due {(now_ns - knots[-1].time_ns) / 1e6:.0f} ms ago; "
                "expected at least one point in the future (check header.stamp and the publisher's clock)"
            )
        handoff_ns = max(start_ns, now_ns)
        position_J, velocity_J = self.sample(handoff_ns)
        ahead = [Knot(handoff_ns, position_J, velocity_J), *usable]
        # Two knots at the hand-off (a first point at time 0) leave no way in between: a step, as in the real
        # controller.
        new = [Segment(a, b, b.time_ns) for a, b in pairwise(ahead) if b.time_ns > a.time_ns]
        kept = [
            Segment(old.start, old.end, min(old.until_ns, handoff_ns))
            for old in self._segments
            if now_ns < old.until_ns and old.start.time_ns < handoff_ns
        ]
        if handoff_ns > now_ns:
            kept = kept or [self._standstill(now_ns, handoff_ns)]
            if kept[-1].until_ns < handoff_ns:
                kept.append(Segment(kept[-1].end, Knot(handoff_ns, position_J, None), handoff_ns))
        self._segments = (*kept, *new)
        self._held_J = ahead[-1].position_J

    def sample(self, time_ns: int) -> tuple[Vector, Vector]:
        """Commanded position and velocity [J] at `time_ns`; the last point (with velocity 0) once it has passed."""
        for segment in self._segments:
            if time_ns < segment.until_ns:
                return segment.sample(max(time_ns, segment.start.time_ns))
        return self._held_J.copy(), np.zeros(len(self.joints))

    def _standstill(self, from_ns: int, to_ns: int) -> Segment:
        return Segment(Knot(from_ns, self._held_J, None), Knot(to_ns, self._held_J, None), to_ns)

    def _knot(self, point: TrajectoryPoint, start_ns: int, order: list[int]) -> Knot:
        velocity_J = np.array(point.velocities, dtype=np.float64)[order] if len(point.velocities) else None
        return Knot(start_ns + point.time_from_start_ns, np.array(point.positions, dtype=np.float64)[order], velocity_J)

    def _joint_order(self, names: Sequence[str]) -> list[int]:
        """Where each of the controller's joints stands in the message."""
        missing = [name for name in self.joints if name not in names]
        unknown = [name for name in names if name not in self.joints]
        if missing or unknown or len(names) != len(self.joints):
            raise InputError(
                f"trajectory refused: joint_names must be each of {list(self.joints)} once, in any order; got "
                f"{list(names)} (missing {missing}, unknown {unknown})"
            )
        return [list(names).index(name) for name in self.joints]

    def _check_points(self, trajectory: Trajectory, order: list[int]) -> None:
        if not trajectory.points:
            raise InputError("trajectory refused: it has no points; to stop the arm, send its present position")
        before_ns = -1
        for k, point in enumerate(trajectory.points):
            if point.time_from_start_ns <= before_ns:
                raise InputError(
                    f"trajectory refused: point {k}: time_from_start must be >= 0 and grow strictly; got "
                    f"{point.time_from_start_ns / NS_PER_S:.3f} s"
                    + (f" after {before_ns / NS_PER_S:.3f} s" if k else "")
                )
            before_ns = point.time_from_start_ns
            for field, values, optional in (
                ("positions", point.positions, False),
                ("velocities", point.velocities, True),
            ):
                if len(values) != len(order) and not (optional and len(values) == 0):
                    raise InputError(
                        f"trajectory refused: point {k}: expected {len(order)} {field} (one per joint), "
                        f"got {len(values)}"
                    )
                if not np.isfinite(np.asarray(values, dtype=np.float64)).all():
                    raise InputError(f"trajectory refused: point {k}: {field} must be finite, got {list(values)}")
            for field, values in (("accelerations", point.accelerations), ("effort", point.effort)):
                if len(values):
                    raise InputError(
                        f"trajectory refused: point {k}: {field} are not supported by this controller; "
                        "send positions, or positions and velocities"
                    )
        last = trajectory.points[-1].velocities
        if any(abs(v) > np.finfo(np.float32).eps for v in last):
            raise InputError(
                f"trajectory refused: the last point's velocities must be 0 so that the arm can stay there; got "
                f"{list(last)}"
            )
