"""From a wanted path to a motion the arm may make: bounded position, speed and acceleration, always able to stop.

The motion has constant acceleration in each period, so its points with positions and velocities describe it wholly: the
cubic through two of them, which is what joint_trajectory_controller follows, is that parabola again, from whatever
moment of it the controller starts. So what holds at the points holds between them, and two commands that share a piece
join without a seam.

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

# Share of the acceleration limit that closes a gap to the path; the path's own acceleration needs the rest.
CORRECTION = 0.5
_STILL = 1e-7


@dataclass(frozen=True, eq=False)
class Bounds:
    """Per joint: lowest and highest position, speed, acceleration."""

    lower_J: Array
    upper_J: Array
    speed_J: Array
    acceleration_J: Array


class Governor:
    """Makes each motion continue the one before it. `running` is what the wire was last told; None: nothing moves."""

    def __init__(self, joints: tuple[str, ...], period_s: float) -> None:
        self.running: Motion | None = None
        self._joints = joints
        self._period_s, self._period_ns = period_s, to_ns(period_s)

    def handover_ns(self, now_ns: int, lead_ns: int) -> int:
        """The first instant of the running motion that is at least `lead_ns` away: there the next one takes over."""
        if self.running is None or now_ns + lead_ns >= self.running.end_ns:
            return now_ns + lead_ns
        return int(self.running.time_N[np.searchsorted(self.running.time_N, now_ns + lead_ns)])

    def follow(self, target: ActionChunk, measured_J: Array, from_ns: int, now_ns: int, bounds: Bounds) -> Motion:
        """The running motion until `from_ns`, then towards `target`, ending at rest. Without one: from `measured_J`."""
        end_ns = target.due_ns(target.horizon - 1)
        steps = max(1, -((from_ns - end_ns) // self._period_ns))  # rounded up: the last action is still reached
        path_NJ, speed_NJ = cubic(target, from_ns + self._period_ns * (np.arange(steps) + 1))
        return self._continue(path_NJ, speed_NJ, measured_J, from_ns, now_ns, bounds)

    def rest_at(self, position_J: Array, measured_J: Array, from_ns: int, now_ns: int, bounds: Bounds) -> Motion:
        """To rest at `position_J` as fast as the bounds allow."""
        reach_s = np.max(
            np.abs(bounds.upper_J - bounds.lower_J) / bounds.speed_J + 4 * bounds.speed_J / bounds.acceleration_J
        )
        path_NJ = np.tile(position_J, (int(reach_s / self._period_s) + 2, 1))
        motion = self._continue(path_NJ, np.zeros_like(path_NJ), measured_J, from_ns, now_ns, bounds)
        return _without_tail(motion)

    def brake(self, measured_J: Array, from_ns: int, now_ns: int, bounds: Bounds) -> Motion:
        """To rest as soon as the bounds allow, wherever that is."""
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
            # From the instant before now on, so that the new motion says where the arm is now, too.
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
    """Ended where nothing moves any more (to 1e-7 rad or m); what it repeats of the motion before it stays whole."""
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
    allow, and after its end brakes. A path within the bounds is met to the path's third derivative times period^3 / 24.
    From a start that cannot stop within the bounds it returns to them with the acceleration that it has; from one
    outside (an arm that was pushed there) it comes in at that acceleration too.
    """
    aim_NJ = np.minimum(np.maximum(path_NJ, bounds.lower_J), bounds.upper_J)
    aim_velocity_NJ = np.where(aim_NJ == path_NJ, speed_NJ, 0.0)
    # Joint by joint in plain numbers: four times as fast as arrays of a few joints, fifty periods long.
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
    """`follow` for one joint: each velocity leads towards the path, and is one from which the joint can still stop.

    With v1 as the next velocity the joint moves (v + v1) T / 2 in a period T; it must then be able to stop before its
    limit: p + (v + v1) T / 2 + v1^2 / 2a + v1 T / 2 <= upper, a quadratic in v1. If the present state can stop, braking
    with full acceleration fulfils it, so there is always a solution within one step of acceleration.

    The largest v1 >= 0 with v1 T + v1^2 / 2a <= way is sqrt(step^2 + 2 a way) - step with step = a T, and negative
    where there is no way left.
    """
    half_s, step, (lower, upper) = period_s / 2.0, acceleration * period_s, limits
    closing = CORRECTION * step
    step2, closing2, twice = step * step, closing * closing, 2.0 * acceleration
    positions, velocities = [], []
    for aim, aim_velocity in aims:
        gap, coasted = aim - p - (v + aim_velocity) * half_s, p + v * half_s
        to_path = sqrt(closing2 + CORRECTION * twice * abs(gap)) - closing
        way_up, way_down = step2 + twice * (upper - coasted), step2 + twice * (coasted - lower)
        up = sqrt(way_up) - step if way_up > 0.0 else -step
        down = step - sqrt(way_down) if way_down > 0.0 else step
        wanted = aim_velocity + to_path if gap > 0.0 else aim_velocity - to_path if gap < 0.0 else aim_velocity
        # Comparisons, as min and max would take twice the time: what can stop, within the speed limit, within reach.
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
