"""The last gate before the wire checks twice: what the policy asks for, and what the wire will carry.

`screen` applies rules to a chunk: as the settings say, a fault is corrected, or the chunk is refused, or the arm is
stopped until `~/reset`. `judge` then verifies the motion made from the chunk (runtime/governor.py), whichever way it
was made: when joint_trajectory_controller joins its points, every position, speed and acceleration lies within the
bounds. What a fault is depends on the kind of axis: a gripper may be asked to jump, a velocity has no place to start
from, a rotation beyond what can be counted is followed as far as it goes.

Legend: H actions, N instants, J axes. Positions in each axis's unit, times in ns on the node's clock.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.errors import ConfigurationError, EmergencyStop, SafetyRefusal
from ki_vla_ros.records import NS_PER_S, ActionChunk, Motion
from ki_vla_ros.robot import Axis, UrdfJoint, read_urdf
from ki_vla_ros.runtime.governor import Bounds
from ki_vla_ros.settings import UNLIMITED, LimitSettings, RuleAction

# No joint may need longer than this to stop from its speed limit.
LONGEST_STOP_S = 10.0
# Slack for rounding in the final verification, as a share of a limit.
_ROUNDING = 1e-7


def axis_bounds(axes: Sequence[Axis], limits: LimitSettings, robot_description: str = "") -> Bounds:
    """The tightest limits of bundle, URDF and settings; ConfigurationError if they leave an axis no range."""
    urdf = read_urdf(robot_description, [axis.name for axis in axes if axis.joint])
    rows = []
    for joint in axes:
        chosen = limits.of(joint.name)
        there = urdf.get(joint.name, UrdfJoint(-np.inf, np.inf, np.inf, False))
        low, high = max(there.lower, joint.lower, chosen.lower), min(there.upper, joint.upper, chosen.upper)
        nowhere = joint.kind == "velocity" and not joint.measured  # what it has gone so far is no place on the robot
        low, high = -np.inf if nowhere or low <= -UNLIMITED else low, np.inf if nowhere or high >= UNLIMITED else high
        if not low < high:
            raise ConfigurationError(
                f"joint {joint.name!r}: bundle, URDF and limits.joints leave no range, from {low:g} to {high:g}; "
                "are they for the same robot and in the same unit?"
            )
        full_speed = min(there.velocity, joint.max_velocity, chosen.velocity)
        acceleration = min(full_speed / limits.time_to_speed_s, chosen.acceleration, joint.max_acceleration or np.inf)
        if full_speed > acceleration * LONGEST_STOP_S * (1.0 + 1e-9):
            raise ConfigurationError(
                f"joint {joint.name!r}: at limits.joints.{joint.name}.acceleration {acceleration:g} it would need "
                f"{full_speed / acceleration:.3g} s to stop from its speed limit {full_speed:g}, expected at most "
                f"{LONGEST_STOP_S:g} s; raise the acceleration, or lower the velocity"
            )
        rows.append((low, high, full_speed * limits.velocity_scale, acceleration))
    return Bounds(*np.array(rows).T)


class SafetyGate:
    def __init__(self, axes: Sequence[Axis], limits: LimitSettings, bounds: Bounds) -> None:
        self.bounds = bounds
        self._joints = tuple(axes)
        self._names = tuple(axis.name for axis in axes)
        kinds = np.array([axis.kind for axis in axes])
        self._velocity_J, self._gripper_J = kinds == "velocity", kinds == "gripper"
        self._placed_J = np.isin(kinds, ("joint", "position"))  # whose places a fault can be far from
        self._limits = limits

    def screen(
        self, chunk: ActionChunk, observed_ns: int, measured_J: NDArray[np.float64], now_ns: int
    ) -> tuple[ActionChunk, tuple[str, ...]]:
        """The chunk as it may be followed, and the corrections made, in words (none for a clean chunk).

        SafetyRefusal, or EmergencyStop where a rule says so, names the rule, the joint, the value and the limit.
        """
        self._check_form(chunk)
        self._check_measured(measured_J)
        age_ns = now_ns - observed_ns
        if age_ns < -self._limits.max_chunk_age_s * NS_PER_S:
            raise SafetyRefusal(
                f"chunk: its observation is {-age_ns / 1e6:.0f} ms ahead of the node's clock; do all use one clock?"
            )
        if age_ns > self._limits.max_chunk_age_s * NS_PER_S:
            raise SafetyRefusal(
                f"chunk: its observation is {age_ns / 1e6:.0f} ms old, limit {self._limits.max_chunk_age_s * 1e3:.0f} "
                "ms (limits.max_chunk_age_s); inference takes too long"
            )
        corrections: list[str] = []
        self._check_jump(chunk, measured_J, now_ns)
        chunk = self._clamp_positions(chunk, corrections)
        chunk = self._limit_speed(chunk, corrections)
        return chunk, tuple(corrections)

    def judge(self, motion: Motion, measured_J: NDArray[np.float64]) -> None:
        """SafetyRefusal unless the motion keeps the bounds everywhere and ends at rest.

        An arm that was found or pushed outside its limits may come back: the position where the motion starts then
        counts as its limit.
        """
        self._check_measured(measured_J)
        bounds = self.bounds
        start_J = motion.position_NJ[0]
        lower_J, upper_J = np.minimum(bounds.lower_J, start_J), np.maximum(bounds.upper_J, start_J)
        low_J, high_J, speed_J, acceleration_J = extremes(motion)
        slack_J = _ROUNDING * bounds.range_J
        kept_J = (low_J >= lower_J - slack_J) & (high_J <= upper_J + slack_J)  # false for NaN
        kept_J &= speed_J <= np.maximum(bounds.speed_J, np.abs(motion.velocity_NJ[0])) * (1.0 + _ROUNDING)
        kept_J &= acceleration_J <= bounds.acceleration_J * (1.0 + _ROUNDING) + _ROUNDING
        kept_J &= motion.velocity_NJ[-1] == 0.0
        if not kept_J.all():
            j = int(np.argmin(kept_J))
            raise SafetyRefusal(
                f"joint {self._names[j]!r}: motion reaches {low_J[j]:.6f} to {high_J[j]:.6f} at up to "
                f"{speed_J[j]:.4f} per second and {acceleration_J[j]:.4f} per second squared, and ends at "
                f"{motion.velocity_NJ[-1, j]:g}; limits {lower_J[j]:.6f} to {upper_J[j]:.6f}, {bounds.speed_J[j]:.4f}, "
                f"{bounds.acceleration_J[j]:.4f}, rest"
            )

    def _check_form(self, chunk: ActionChunk) -> None:
        if chunk.joints != self._names:
            raise SafetyRefusal(f"chunk: expected joints {', '.join(self._names)}, got {', '.join(chunk.joints)}")
        shape = (chunk.horizon, len(self._names))
        if chunk.horizon < 1 or chunk.position_HJ.shape != shape or chunk.velocity_HJ.shape != shape:
            raise SafetyRefusal(
                f"chunk: expected positions and velocities [1 or more, {len(self._names)}], got "
                f"{list(chunk.position_HJ.shape)} and {list(chunk.velocity_HJ.shape)}"
            )
        if chunk.period_ns <= 0:
            raise SafetyRefusal(f"chunk: expected a period > 0, got {chunk.period_ns} ns")
        for what, value_HJ in (("position", chunk.position_HJ), ("velocity", chunk.velocity_HJ)):
            bad = np.argwhere(~np.isfinite(value_HJ))
            if len(bad):
                k, j = (int(i) for i in bad[0])
                raise SafetyRefusal(
                    f"joint {self._names[j]!r}: {what} of action {k} is {value_HJ[k, j]}, expected a number"
                )

    def _check_measured(self, position_J: NDArray[np.float64]) -> None:
        bounds = self.bounds
        if position_J.shape != bounds.lower_J.shape:
            raise SafetyRefusal(f"measured state: expected {len(self._names)} positions, got {list(position_J.shape)}")
        range_J = bounds.range_J
        plausible_J = (position_J >= bounds.lower_J - range_J) & (position_J <= bounds.upper_J + range_J)
        for j in np.flatnonzero(~plausible_J)[:1]:  # also for NaN
            joint = self._joints[j]
            raise SafetyRefusal(
                f"joint {joint.name!r}: measured at {position_J[j]:.4g} {joint.unit}, outside its limits "
                f"{bounds.lower_J[j]:.4f} to {bounds.upper_J[j]:.4f} by more than they are apart; is it published in "
                f"{joint.unit}?"
            )

    def _check_jump(self, chunk: ActionChunk, measured_J: NDArray[np.float64], now_ns: int) -> None:
        """The first action still ahead must lie within the arm's reach by then, with `max_jump_s` more to spare."""
        ahead = next((k for k in range(chunk.horizon) if chunk.due_ns(k) > now_ns), chunk.horizon - 1)
        time_s = max(chunk.due_ns(ahead) - now_ns, 0) / NS_PER_S + self._limits.max_jump_s
        distance_J = np.abs(chunk.position_HJ[ahead] - measured_J)
        far_J = (distance_J > self.bounds.speed_J * time_s) & ~self._velocity_J & ~self._gripper_J
        for j in np.flatnonzero(far_J)[:1]:
            joint = self._joints[j]
            self._act(
                self._limits.on_jump,
                f"joint {joint.name!r}: action {ahead} is {distance_J[j]:.3f} {joint.unit} from the measured "
                f"{measured_J[j]:.3f}, limit {self.bounds.speed_J[j] * time_s:.3f} (limits.max_jump_s)",
            )

    def _clamp_positions(self, chunk: ActionChunk, corrections: list[str]) -> ActionChunk:
        lower_J, upper_J = self.bounds.lower_J, self.bounds.upper_J
        position_HJ = chunk.position_HJ
        excess_HJ = np.maximum(lower_J - position_HJ, position_HJ - upper_J)
        if self._velocity_J.any():  # the governor stops them before a limit, wherever the velocities would lead
            excess_HJ[:, self._velocity_J] = 0.0
        far = np.argwhere((excess_HJ > self._limits.position_margin * self.bounds.range_J) & self._placed_J)
        for k, j in far[:1]:
            joint = self._joints[j]
            self._act(
                self._limits.on_position,
                f"joint {joint.name!r}: position of action {k} is {position_HJ[k, j]:.4f} {joint.unit}, limits "
                f"{lower_J[j]:.4f} to {upper_J[j]:.4f}",
            )
        clamped = [self._names[j] for j in np.flatnonzero((excess_HJ > 0).any(axis=0))]
        if not clamped:
            return chunk
        corrections.append(f"clamped {', '.join(clamped)}")
        kept_HJ = np.where(excess_HJ > 0, np.clip(position_HJ, lower_J, upper_J), position_HJ)
        return dataclasses.replace(chunk, position_HJ=kept_HJ)

    def _limit_speed(self, chunk: ActionChunk, corrections: list[str]) -> ActionChunk:
        """Checks the speeds of the actions and between them, and clips the actions' velocities to the limits.

        Positions that are too far apart stay: the governor follows them as fast as the bounds allow.
        """
        speed_J = np.abs(chunk.velocity_HJ).max(axis=0)
        if chunk.horizon > 1:
            distance_J = np.abs(np.diff(chunk.position_HJ, axis=0)).max(axis=0)
            speed_J = np.maximum(speed_J, distance_J / (chunk.period_ns / NS_PER_S))
        limit_J = self.bounds.speed_J
        for j in np.flatnonzero((speed_J > limit_J * self._limits.max_overspeed) & ~self._gripper_J)[:1]:
            joint = self._joints[j]
            self._act(
                self._limits.on_speed,
                f"joint {joint.name!r}: chunk moves at {speed_J[j]:.2f} {joint.unit}/s, limit {limit_J[j]:.2f}, more "
                f"than limits.max_overspeed ({self._limits.max_overspeed:g}) times as fast",
            )
        fast = [self._names[j] for j in np.flatnonzero(speed_J > limit_J)]
        if not fast:
            return chunk
        corrections.append(f"slowed {', '.join(fast)}")
        return dataclasses.replace(chunk, velocity_HJ=np.clip(chunk.velocity_HJ, -limit_J, limit_J))

    def _act(self, action: RuleAction, fault: str) -> None:
        if action == "stop":
            raise EmergencyStop(fault)
        if action == "refuse":
            raise SafetyRefusal(fault)


def extremes(motion: Motion) -> tuple[NDArray[np.float64], ...]:
    """Lowest and highest position, highest speed and acceleration [J] of the cubics through the motion's instants.

    Speed and acceleration are less what the rounding of positions makes of them: a joint that turns without end may be
    at 1e6 rad, where doubles are 1e-10 apart and a point every 2 ms is off by 1e-4 rad/s^2.

    These cubics are what joint_trajectory_controller makes of positions and velocities. In a piece of length T with
    s = t / T, u = T * velocity and d = p1 - p0: position p0 + u0 s + b s^2 + c s^3 with b = 3 d - 2 u0 - u1 and
    c = u0 + u1 - 2 d; velocity (u0 + 2 b s + 3 c s^2) / T; acceleration (2 b + 6 c s) / T^2, extreme at the ends.
    """
    if len(motion.time_N) == 1:
        still = np.zeros_like(motion.position_NJ[0])
        return motion.position_NJ[0], motion.position_NJ[0], np.abs(motion.velocity_NJ[0]), still
    period_G = np.diff(motion.time_N)[:, None] / NS_PER_S
    p0, u0 = motion.position_NJ[:-1], motion.velocity_NJ[:-1] * period_G
    u1, d = motion.velocity_NJ[1:] * period_G, np.diff(motion.position_NJ, axis=0)
    b, c = 3.0 * d - 2.0 * u0 - u1, u0 + u1 - 2.0 * d
    # Where velocity is zero (positions turn) and where it is extreme; 0 stands for "not inside the piece". The roots
    # come from q, not from the textbook formula, which loses digits where b is near the root.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        root = np.sqrt(b * b - 3.0 * c * u0)
        q = -(b + np.copysign(root, b))
        turns = [q / (3.0 * c), u0 / q]
        steepest = -b / (3.0 * c)
    turns_GJ = [np.where((s > 0.0) & (s < 1.0), s, 0.0) for s in turns]
    steepest_GJ = np.where((steepest > 0.0) & (steepest < 1.0), steepest, 0.0)
    positions = np.vstack([motion.position_NJ] + [p0 + s * (u0 + s * (b + s * c)) for s in turns_GJ])
    rounding_GJ = np.spacing(np.maximum(np.abs(p0), np.abs(motion.position_NJ[1:])))
    within_GJ = (np.abs(u0 + steepest_GJ * (2.0 * b + 3.0 * c * steepest_GJ)) - 2.0 * rounding_GJ) / period_G
    speeds = np.vstack([np.abs(motion.velocity_NJ), within_GJ])
    accelerations = (np.maximum(np.abs(2.0 * b), np.abs(2.0 * b + 6.0 * c)) - 8.0 * rounding_GJ) / period_G**2
    return positions.min(axis=0), positions.max(axis=0), speeds.max(axis=0), np.maximum(accelerations.max(axis=0), 0.0)
