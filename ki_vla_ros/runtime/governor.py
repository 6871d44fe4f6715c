"""Turns a wanted path into a motion the arm may make: bounded position, speed and acceleration, always able to stop.

Acceleration is constant within each period, so the positions and velocities at the points describe the motion
completely: the cubic that joint_trajectory_controller draws through two of them is that same parabola, from whichever
moment of it the controller starts. What holds at the points therefore holds between them, and two commands that share a
piece join without a seam.

Legend: N periods, J joints. Positions in rad or m, times in s.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.records import ActionChunk, Motion, to_ns
from ki_vla_ros.runtime.chunking import cubic

Array = NDArray[np.float64]

# Share of the acceleration limit spent on closing a gap to the path; the path's own acceleration needs the rest.
CORRECTION = 0.5
_STILL = 1e-7  # rad or m, and per second: less than this is no motion


@dataclass(frozen=True, eq=False)
class Bounds:
    """Per joint: lowest and highest position, speed, acceleration."""

    lower_J: Array
    upper_J: Array
    speed_J: Array
    acceleration_J: Array


class Governor:
    """Makes each motion continue the one before it.

    `running` is the motion the wire was last told; None: nothing moves.
    """

    def __init__(self, joints: tuple[str, ...], period_s: float) -> None:
        self.running: Motion | None = None
        self._joints = joints
        self._period_s, self._period_ns = period_s, to_ns(period_s)

    def handover_ns(self, now_ns: int, lead_ns: int) -> int:
        """The first instant of the running motion that is at least `lead_ns` away, where the next motion takes over."""
        if self.running is None or now_ns + lead_ns >= self.running.end_ns:
            return now_ns + lead_ns
        return int(self.running.time_N[np.searchsorted(self.running.time_N, now_ns + lead_ns)])

    def follow(self, target: ActionChunk, measured_J: Array, from_ns: int, now_ns: int, bounds: Bounds) -> Motion:
        """Continues the running motion until `from_ns`, then follows `target` and ends at rest.

        If no motion is running, it starts at rest from `measured_J`.
        """
        end_ns = target.due_ns(target.horizon - 1)
        steps = max(1, -((from_ns - end_ns) // self._period_ns))  # rounded up: the last action is still reached
        path_NJ, speed_NJ = cubic(target, from_ns + self._period_ns * (np.arange(steps) + 1))
        return self._continue(path_NJ, speed_NJ, measured_J, from_ns, now_ns, bounds)

    def rest_at(self, position_J: Array, measured_J: Array, from_ns: int, now_ns: int, bounds: Bounds) -> Motion:
        """Comes to rest at `position_J` as fast as the bounds allow."""
        reach_s = np.max(
            np.abs(bounds.upper_J - bounds.lower_J) / bounds.speed_J + 4 * bounds.speed_J / bounds.acceleration_J
        )
        path_NJ = np.tile(position_J, (int(reach_s / self._period_s) + 2, 1))
        motion = self._continue(path_NJ, np.zeros_like(path_NJ), measured_J, from_ns, now_ns, bounds)
        return _without_tail(motion)

    def brake(self, measured_J: Array, from_ns: int, now_ns: int, bounds: Bounds) -> Motion:
        """Comes to rest as soon as the bounds allow, wherever that is."""
        nowhere = np.zeros((0, len(self._joints)))
        return self._continue(nowhere, nowhere, measured_J, from_ns, now_ns, bounds)

    def _continue(
        self, path_NJ: Array, speed_NJ: Array, measured_J: Array, from_ns: int, now_ns: int, bounds: Bounds
    ) -> Motion:
        old = self.running
        if old is None:
            start_p, start_v = measured_J, np.zeros_like(measured_J)
            keep = slice(0, 0)
        else:
            start_p, start_v = old.at(from_ns)
            # From the last instant that is not after now, so that the new motion covers the present too.
            now = max(int(np.searchsorted(old.time_N, now_ns, side="right")) - 1, 0)
            keep = slice(now, int(np.searchsorted(old.time_N, from_ns, side="left")))
        position_NJ, velocity_NJ = follow(start_p, start_v, path_NJ, speed_NJ, self._period_s, bounds)
        times = from_ns + self._period_ns * np.arange(len(position_NJ) + 1, dtype=np.int64)
        before = (old.time_N[keep], old.position_NJ[keep], old.velocity_NJ[keep]) if old else None
        parts = [(times, np.vstack([start_p, position_NJ]), np.vstack([start_v, velocity_NJ]))]
        parts = [before, *parts] if before else parts
        time_N, position_NJ, velocity_NJ = (np.concatenate(pieces) for pieces in zip(*parts, strict=True))
        return Motion(self._joints, from_ns, time_N, position_NJ, velocity_NJ)


def _without_tail(motion: Motion) -> Motion:
    """The motion, cut off where nothing moves any more (_STILL); what it repeats of the previous motion is kept."""
    still = np.all(np.abs(motion.velocity_NJ) < _STILL, axis=1)
    still &= np.all(np.abs(motion.position_NJ - motion.position_NJ[-1]) < _STILL, axis=1)
    moving = np.flatnonzero(~still)
    last = max(int(moving[-1]) + 1 if moving.size else 0, int(np.searchsorted(motion.time_N, motion.from_ns)))
    head = slice(0, last + 1)
    velocity_NJ = motion.velocity_NJ[head].copy()
    velocity_NJ[-1] = 0.0
    return Motion(motion.joints, motion.from_ns, motion.time_N[head], motion.position_NJ[head], velocity_NJ)


def follow(
    position_J: Array, velocity_J: Array, path_NJ: Array, speed_NJ: Array, period_s: float, bounds: Bounds
) -> tuple[Array, Array]:
    """Positions and velocities [M, J], M >= N, one, two, ... periods after the given start, ending at rest.

    The motion follows `path_NJ` with the velocities `speed_NJ` (both at the same instants) as closely as the bounds
    allow, and brakes after the path's end. It follows a path that keeps the bounds to within the path's third
    derivative times period^3 / 24. A joint that starts too fast to stop within the position bounds, or starts outside
    them (it was pushed there), returns to them at the acceleration limit.
    """
    aim_NJ = np.minimum(np.maximum(path_NJ, bounds.lower_J), bounds.upper_J)
    aim_velocity_NJ = np.where(aim_NJ == path_NJ, speed_NJ, 0.0)
    # One joint at a time, in Python floats: four times as fast as numpy on arrays of a few joints by fifty periods.
    joints = [
        _follow_joint(
            float(position_J[j]),
            float(velocity_J[j]),
            list(zip(aim_NJ[:, j].tolist(), aim_velocity_NJ[:, j].tolist(), strict=True)),
            (float(bounds.lower_J[j]), float(bounds.upper_J[j])),
            float(bounds.speed_J[j]),
            float(bounds.acceleration_J[j]),
            period_s,
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
    speed: float,
    acceleration: float,
    period_s: float,
) -> tuple[list[float], list[float]]:
    """`follow` for one joint: each velocity leads towards the path and lets the joint still stop before its limit.

    If v1 is the next velocity, the joint moves (v + v1) T / 2 in a period T. It must then be able to stop before its
    limit: p + (v + v1) T / 2 + v1^2 / 2a + v1 T / 2 <= upper, a quadratic in v1. If the joint can stop from its present
    state, full braking satisfies this, so there is always a solution within one step of acceleration.

    With room = upper - p - v T / 2 and step = a T, the largest v1 >= 0 with v1 T + v1^2 / 2a <= room is
    sqrt(step^2 + 2 a room) - step; it is negative where there is no room left.
    """
    half_s, step, (lower, upper) = period_s / 2.0, acceleration * period_s, limits
    closing = CORRECTION * step
    step2, closing2, twice = step * step, closing * closing, 2.0 * acceleration
    positions, velocities = [], []
    for aim, aim_velocity in aims:
        gap, coasted = aim - p - (v + aim_velocity) * half_s, p + v * half_s
        to_path = sqrt(closing2 + CORRECTION * twice * abs(gap)) - closing
        square_up, square_down = step2 + twice * (upper - coasted), step2 + twice * (coasted - lower)
        up = sqrt(square_up) - step if square_up > 0.0 else -step
        down = step - sqrt(square_down) if square_down > 0.0 else step
        wanted = aim_velocity + to_path if gap > 0.0 else aim_velocity - to_path if gap < 0.0 else aim_velocity
        # The last clamp has priority: able to stop, then the speed limit, then the acceleration limit. Comparisons,
        # because min() and max() take twice the time.
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
