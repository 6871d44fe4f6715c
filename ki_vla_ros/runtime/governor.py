"""Turns a wanted path into a motion the arm may make: bounded position, speed and acceleration, always able to stop.

Acceleration is constant within each period, so the positions and velocities at the points describe the motion
completely: the cubic that joint_trajectory_controller draws through two of them is that same parabola, from whichever
moment of it the controller starts. What holds at the points therefore holds between them, and two commands that share a
piece join without a seam.

Of an axis that is a velocity only the velocity follows the target; its position is what has been gone so far.

Legend: N periods, J axes. Positions in each axis's unit, times in s.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.records import NO_REFERENCES, NS_PER_S, ActionChunk, Motion, to_ns
from ki_vla_ros.runtime.chunking import cubic

Array = NDArray[np.float64]

# Share of the acceleration limit spent on closing a gap to the path; the path's own acceleration needs the rest.
CORRECTION = 0.5
# No motion follows a target for more periods than this, whatever bundle, stamps and settings say, so that what is
# computed while a stop waits stays small.
MOST_PERIODS = 5000
# A resting joint farther from its last command than this share of its range, or than this (rad or m), has been moved by
# someone else.
MOVED_SHARE, MOVED_MOST = 0.02, 0.1
# A controller that someone else commanded may be as far from the measured position as the joint turns in this time.
START_GAP_S = 0.03


@dataclass(frozen=True, eq=False)
class Bounds:
    """Per axis: lowest and highest position (infinite: no limit), speed, acceleration.

    `ramp`: the share of the speed limits that counts where a motion begins, and by how much of 1 it rises per second.
    """

    lower_J: Array
    upper_J: Array
    speed_J: Array
    acceleration_J: Array
    ramp: tuple[float, float] = (1.0, 0.0)

    @property
    def range_J(self) -> Array:
        """Upper less lower; 0 where there is no limit, so that a share of it allows nothing."""
        range_J: Array = self.upper_J - self.lower_J
        return np.where(np.isfinite(range_J), range_J, 0.0)


class Governor:
    """Makes each motion continue the one before it, from where the controller has really got to.

    Times in ns on the clock by which the controller moves the arm (`Wire.motion_ns`). `running` is the motion that the
    wire was last told; None: none yet.
    """

    def __init__(self, joints: tuple[str, ...], period_s: float, velocity_J: NDArray[np.bool_] | None = None) -> None:
        """`velocity_J`: axes that are velocities (None: no axis)."""
        self._velocity_J = np.zeros(len(joints), dtype=np.bool_) if velocity_J is None else velocity_J
        self.reference_P4 = NO_REFERENCES  # what rotations of the next motions count from
        self.running: Motion | None = None
        self._bounds: Bounds | None = None  # that `running` was made within
        self._joints = joints
        self._period_s, self._period_ns = period_s, to_ns(period_s)

    def commit(self, motion: Motion, bounds: Bounds) -> None:
        """Notes that the wire was told `motion`, which was made within `bounds`."""
        self.running, self._bounds = motion, bounds

    def interrupt(self, motion: Motion, axis_J: NDArray[np.bool_], bounds: Bounds) -> None:
        """Notes that the axes `axis_J` do `motion` instead, within `bounds`; the others go on as they were told.

        If they were not told anything yet, they stay where it begins.
        """
        running = self.running
        self._bounds = self._bounds or bounds
        if running is None or axis_J.all():
            still = self.settle(motion.position_NJ[0], int(motion.time_N[0]))
            self.running = motion if axis_J.all() else _joined(still, motion, axis_J)
        else:
            self.running = _joined(running, motion, axis_J)

    def forget(self) -> None:
        """Notes that nothing is known any more of what the controller does."""
        self.running = None

    def correct(self, measured_J: Array, measured_ns: int) -> None:
        """Moves what was gone so far by velocity to where it really led: only velocities were sent."""
        if self.running is not None and self._velocity_J.any():
            off_J = np.where(self._velocity_J, measured_J - self.running.at(measured_ns)[0], 0.0)
            self.running = replace(self.running, position_NJ=self.running.position_NJ + off_J)

    def recount(self, position_J: Array, reference_P4: Array, now_ns: int) -> None:
        """Says where the resting robot is in another count of its rotations."""
        assert self.at_rest(now_ns)
        self.reference_P4 = reference_P4.copy()
        if self.running is not None:
            self.running = self.settle(position_J, self.running.end_ns)

    def at_rest(self, now_ns: int) -> bool:
        return self.running is None or now_ns >= self.running.end_ns

    def keeps(self, bounds: Bounds, now_ns: int) -> bool:
        """Whether what is left of the running motion keeps these bounds."""
        running = self.running
        if running is None or self.at_rest(now_ns):
            return True
        left = slice(max(int(np.searchsorted(running.time_N, now_ns, side="right")) - 1, 0), None)
        position_NJ, velocity_NJ = running.position_NJ[left], running.velocity_NJ[left]
        period_N = np.diff(running.time_N[left])[:, None] / NS_PER_S
        acceleration_NJ = np.abs(np.diff(velocity_NJ, axis=0)) / period_N
        kept = (bounds.lower_J <= position_NJ).all() and (position_NJ <= bounds.upper_J).all()
        kept = kept and (np.abs(velocity_NJ) <= bounds.speed_J).all()
        return bool(kept and (acceleration_NJ <= bounds.acceleration_J * (1.0 + 1e-9)).all())

    def start(
        self, measured_J: Array, moved_J: NDArray[np.bool_], bounds: Bounds, *, first: bool
    ) -> tuple[Array, Array]:
        """Where a motion from rest is to start, and the time in s that each axis's controller needs to get there.

        The controller may be where it was sent, or, after a reset or under someone else's command, where the arm is. It
        joins the two with a cubic. The joints `moved_J` start where they are, the others where they were sent. `first`:
        someone else may have commanded the arm before, so the controller may also be a little beside both.
        """
        sent_J = measured_J if self.running is None else self.running.position_NJ[-1]
        gap_J = np.abs(sent_J - measured_J)
        start_J = np.where(moved_J, measured_J, sent_J)
        if first or self.running is None:
            gap_J = np.maximum(gap_J, bounds.speed_J * START_GAP_S)
        # From rest to rest over a distance d in a time T, a cubic's peaks are 1.5 d / T and 6 d / T^2.
        settle_J = np.maximum(1.5 * gap_J / bounds.speed_J, np.sqrt(6.0 * gap_J / bounds.acceleration_J))
        return start_J, settle_J

    def handover_ns(self, now_ns: int, lead_ns: int) -> int:
        """The first instant of the running motion that is at least `lead_ns` away, where the next motion takes over."""
        if self.running is None or now_ns + lead_ns >= self.running.end_ns:
            return now_ns + lead_ns
        return int(self.running.time_N[np.searchsorted(self.running.time_N, now_ns + lead_ns)])

    def follow(self, target: ActionChunk, start_J: Array | None, from_ns: int, now_ns: int, bounds: Bounds) -> Motion:
        """Continues the running motion until `from_ns`, then follows `target` and ends at rest.

        With `start_J` it starts there, at rest, at `from_ns`.
        """
        end_ns = target.due_ns(target.horizon - 1)
        steps = max(1, -((from_ns - end_ns) // self._period_ns))  # rounded up: the last action is still reached
        steps = min(steps, MOST_PERIODS)
        path_NJ, speed_NJ = cubic(target, from_ns + self._period_ns * (np.arange(steps) + 1))
        return self._continue(path_NJ, speed_NJ, start_J, from_ns, now_ns, bounds)

    def settle(self, start_J: Array, from_ns: int) -> Motion:
        """Only leads the controller to `start_J`, where it is to be, at rest, at `from_ns`."""
        still = np.zeros((1, len(self._joints)))
        return Motion(self._joints, from_ns, np.array([from_ns]), start_J[None], still, self.reference_P4)

    def brake(self, from_ns: int, now_ns: int, acceleration_J: Array) -> tuple[Motion, Bounds]:
        """The running motion until `from_ns`, then to rest as soon as bounds allow; and these bounds.

        They are those that the motion was made within, or with the limits of acceleration that are in force now,
        whichever stops the arm sooner.
        """
        assert self._bounds is not None
        acceleration_J = np.maximum(self._bounds.acceleration_J, acceleration_J)
        bounds, nowhere = replace(self._bounds, acceleration_J=acceleration_J), np.zeros((0, len(self._joints)))
        return self._continue(nowhere, nowhere, None, from_ns, now_ns, bounds), bounds

    def _continue(
        self, path_NJ: Array, speed_NJ: Array, start_J: Array | None, from_ns: int, now_ns: int, bounds: Bounds
    ) -> Motion:
        old = self.running
        before = None
        if start_J is not None or old is None:
            assert start_J is not None
            start_p, start_v = start_J, np.zeros_like(start_J)
        else:
            start_p, start_v = old.at(from_ns)
            # It covers the present too, and the period before: a stream may be late by less than one.
            now = max(int(np.searchsorted(old.time_N, now_ns - self._period_ns, side="right")) - 1, 0)
            keep = slice(now, int(np.searchsorted(old.time_N, from_ns, side="left")))
            before = old.time_N[keep], old.position_NJ[keep], old.velocity_NJ[keep]
        position_NJ, velocity_NJ = follow(start_p, start_v, path_NJ, speed_NJ, self._period_s, bounds, self._velocity_J)
        times = from_ns + self._period_ns * np.arange(len(position_NJ) + 1, dtype=np.int64)
        parts = [(times, np.vstack([start_p, position_NJ]), np.vstack([start_v, velocity_NJ]))]
        parts = [before, *parts] if before else parts
        time_N, position_NJ, velocity_NJ = (np.concatenate(pieces) for pieces in zip(*parts, strict=True))
        return Motion(self._joints, from_ns, time_N, position_NJ, velocity_NJ, self.reference_P4)


def _joined(running: Motion, motion: Motion, axis_J: NDArray[np.bool_]) -> Motion:
    """The axes `axis_J` as in `motion`, the others as in `running`; between the instants of both neither changes."""
    time_N = np.union1d(running.time_N, motion.time_N)
    states = [(running.at(int(time_ns)), motion.at(int(time_ns))) for time_ns in time_N]
    position_NJ, velocity_NJ = (
        np.array([np.where(axis_J, theirs[part], ours[part]) for ours, theirs in states]) for part in (0, 1)
    )
    return Motion(running.joints, int(motion.time_N[0]), time_N, position_NJ, velocity_NJ, running.reference_P4)


def moved_room(bounds: Bounds) -> Array:
    """How far [J] a resting arm may be from its last command before someone else must have moved it."""
    share_J = MOVED_SHARE * bounds.range_J
    return np.where(share_J > 0.0, np.minimum(share_J, MOVED_MOST), MOVED_MOST)


def follow(
    position_J: Array,
    velocity_J: Array,
    path_NJ: Array,
    speed_NJ: Array,
    period_s: float,
    bounds: Bounds,
    only_velocity_J: NDArray[np.bool_] | None = None,
) -> tuple[Array, Array]:
    """Positions and velocities [M, J], M >= N, one, two, ... periods after the given start, ending at rest.

    The motion follows `path_NJ` with the velocities `speed_NJ` (both at the same instants) as closely as the bounds
    allow, and brakes after the path's end. It follows a path that keeps the bounds to within the path's third
    derivative times period^3 / 24. A joint that starts too fast to stop within the position bounds, or starts outside
    them (it was pushed there), returns to them at the acceleration limit. The axes `only_velocity_J` follow `speed_NJ`
    alone, wherever that leads within the bounds.
    """
    if only_velocity_J is None:
        only_velocity_J = np.zeros(len(position_J), dtype=np.bool_)
    aim_NJ = np.minimum(np.maximum(path_NJ, bounds.lower_J), bounds.upper_J)
    aim_velocity_NJ = np.where((aim_NJ == path_NJ) | only_velocity_J, speed_NJ, 0.0)
    # One joint at a time, in Python floats: four times as fast as numpy on arrays of a few joints by fifty periods.
    first, rise = bounds.ramp[0], bounds.ramp[1] * period_s
    joints = [
        _follow_joint(
            float(position_J[j]),
            float(velocity_J[j]),
            list(zip(aim_NJ[:, j].tolist(), aim_velocity_NJ[:, j].tolist(), strict=True)),
            (float(bounds.lower_J[j]), float(bounds.upper_J[j])),
            (first * float(bounds.speed_J[j]), rise * float(bounds.speed_J[j]), float(bounds.speed_J[j])),
            float(bounds.acceleration_J[j]),
            period_s,
            bool(only_velocity_J[j]),
        )
        for j in range(len(position_J))
    ]
    length = max(len(positions) for positions, _ in joints)
    position_NJ, velocity_NJ = np.empty((length, len(joints))), np.zeros((length, len(joints)))
    for j, (positions, velocities) in enumerate(joints):
        position_NJ[: len(positions), j], velocity_NJ[: len(positions), j] = positions, velocities
        position_NJ[len(positions) :, j] = positions[-1] if positions else position_J[j]
    return position_NJ, velocity_NJ


def _follow_joint(
    p: float,
    v: float,
    aims: list[tuple[float, float]],
    limits: tuple[float, float],
    speeds: tuple[float, float, float],
    acceleration: float,
    period_s: float,
    only_velocity: bool,
) -> tuple[list[float], list[float]]:
    """`follow` for one joint: each velocity leads towards the path and lets the joint still stop before its limit.

    `speeds`: the speed limit at the start, by how much it rises in a period, and the highest.

    If v1 is the next velocity, the joint moves (v + v1) T / 2 in a period T. It must then be able to stop before its
    limit: p + (v + v1) T / 2 + v1^2 / 2a + v1 T / 2 <= upper, a quadratic in v1. If the joint can stop from its present
    state, full braking satisfies this, so there is always a solution within one step of acceleration.

    With room = upper - p - v T / 2 and step = a T, the largest v1 >= 0 with v1 T + v1^2 / 2a <= room is
    sqrt(step^2 + 2 a room) - step; it is negative where there is no room left.
    """
    half_s, step, (lower, upper), (speed, rise, highest) = period_s / 2.0, acceleration * period_s, limits, speeds
    closing = CORRECTION * step
    step2, closing2, twice = step * step, closing * closing, 2.0 * acceleration
    positions, velocities = [], []
    for aim, aim_velocity in aims:
        gap, coasted = 0.0 if only_velocity else aim - p - (v + aim_velocity) * half_s, p + v * half_s
        to_path = sqrt(closing2 + CORRECTION * twice * abs(gap)) - closing
        square_up, square_down = step2 + twice * (upper - coasted), step2 + twice * (coasted - lower)
        up = sqrt(square_up) - step if square_up > 0.0 else -step
        down = step - sqrt(square_down) if square_down > 0.0 else step
        wanted = aim_velocity + to_path if gap > 0.0 else aim_velocity - to_path if gap < 0.0 else aim_velocity
        # The last clamp has priority: able to stop, then the speed limit, then the acceleration limit. Comparisons,
        # because min() and max() take twice the time.
        speed = speed + rise if speed + rise < highest else highest  # of the period's end
        wanted = down if wanted < down else wanted
        wanted = up if wanted > up else wanted
        wanted = -speed if wanted < -speed else speed if wanted > speed else wanted
        v_next = v - step if wanted < v - step else v + step if wanted > v + step else wanted
        p, v = p + (v + v_next) * half_s, v_next
        positions.append(p)
        velocities.append(v)
    while v != 0.0:
        v_next = max(v - step, 0.0) if v > 0.0 else min(v + step, 0.0)
        p, v = p + (v + v_next) * half_s, v_next
        positions.append(p)
        velocities.append(v)
    return positions, velocities
