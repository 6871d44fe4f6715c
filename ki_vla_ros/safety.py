"""The last gate before the wire: it judges exactly what the wire will carry.

joint_trajectory_controller joins positions and velocities by cubics, so the gate looks at those cubics: their extreme
positions and speeds between the points, not only the points. The way from the controller's present state to the first
point is judged by its mean speed from the measured position. Small faults are corrected and reported, others refuse the
chunk; whatever passes has been verified after the last correction. Legend: H points, J joints. Positions in rad or m,
times in ns on the node's clock.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.errors import SafetyRefusal
from ki_vla_ros.records import NS_PER_S, ActionChunk
from ki_vla_ros.settings import LimitSettings

# Slack for rounding in the final verification, as a share of a limit.
_ROUNDING = 1e-9


class JointLimit(Protocol):
    """What the gate needs of a joint; the manifest's JointSpec has it."""

    @property
    def name(self) -> str: ...
    @property
    def unit(self) -> str: ...
    @property
    def lower(self) -> float: ...
    @property
    def upper(self) -> float: ...
    @property
    def max_velocity(self) -> float: ...


@dataclass(frozen=True)
class Verdict:
    """A command that may go onto the wire, and what was corrected on the way (in words, empty for a clean chunk)."""

    command: ActionChunk
    corrections: tuple[str, ...]


class SafetyGate:
    """`speed_J` is the speed limit of each joint, per second."""

    def __init__(self, joints: Sequence[JointLimit], limits: LimitSettings) -> None:
        self._joints = tuple(joints)
        self._names = tuple(joint.name for joint in joints)
        self._limits = limits
        self._lower_J = np.array([joint.lower for joint in joints])
        self._upper_J = np.array([joint.upper for joint in joints])
        self.speed_J = np.array([joint.max_velocity for joint in joints]) * limits.velocity_scale

    def judge(self, chunk: ActionChunk, observed_ns: int, measured_J: NDArray[np.float64], now_ns: int) -> Verdict:
        """The command to publish at `now_ns`: what is left of a chunk that was computed from what `observed_ns` showed.

        It ends at rest. SafetyRefusal names the rule, the joint, the value and the limit.
        """
        self._check_form(chunk, observed_ns, measured_J, now_ns)
        corrections: list[str] = []
        command = self._clamp_positions(chunk, corrections)
        command = self._come_to_rest(command)
        command = self._limit_overshoot(command)
        command = self._slow_down(command, measured_J, now_ns, corrections)
        self._verify(command, measured_J, now_ns)
        return Verdict(command, tuple(corrections))

    def hold(self, position_J: NDArray[np.float64], now_ns: int, hold_ns: int) -> ActionChunk:
        """At rest at `position_J` (clipped to the limits) `hold_ns` from now, or as long as the way there needs."""
        self._check_measured(position_J)
        target_J = np.clip(position_J, self._lower_J, self._upper_J)
        way_ns = int(np.ceil(np.max(np.abs(target_J - position_J) / self.speed_J) * NS_PER_S))
        return ActionChunk(
            start_ns=now_ns,
            period_ns=max(hold_ns, way_ns),
            joints=self._names,
            position_HJ=target_J[None, :],
            velocity_HJ=np.zeros((1, len(self._names))),
        )

    def _check_form(self, chunk: ActionChunk, observed_ns: int, measured_J: NDArray[np.float64], now_ns: int) -> None:
        if chunk.joints != self._names:
            raise SafetyRefusal(f"chunk: expected joints {', '.join(self._names)}, got {', '.join(chunk.joints)}")
        shape = (chunk.horizon, len(self._names))
        if chunk.horizon < 1 or chunk.position_HJ.shape != shape or chunk.velocity_HJ.shape != shape:
            raise SafetyRefusal(
                f"chunk: expected positions and velocities [1 or more, {len(self._names)}], got "
                f"{list(chunk.position_HJ.shape)} and {list(chunk.velocity_HJ.shape)}"
            )
        for what, value_HJ in (("position", chunk.position_HJ), ("velocity", chunk.velocity_HJ)):
            bad = np.argwhere(~np.isfinite(value_HJ))
            if len(bad):
                k, j = (int(i) for i in bad[0])
                raise SafetyRefusal(
                    f"joint {self._names[j]!r}: {what} of action {k} is {value_HJ[k, j]}, expected a number"
                )
        for k, j in np.argwhere(np.abs(chunk.velocity_HJ) > self.speed_J * self._limits.max_slowdown)[:1]:
            raise SafetyRefusal(
                f"joint {self._names[j]!r}: velocity of action {k} is {chunk.velocity_HJ[k, j]:.4g}, limit "
                f"{self.speed_J[j]:.4g} per second, too fast for limits.max_slowdown"
            )
        self._check_measured(measured_J)
        if chunk.period_ns <= 0 or chunk.due_ns(0) <= now_ns:
            raise SafetyRefusal(
                f"chunk: first action is due {(now_ns - chunk.due_ns(0)) / 1e6:.1f} ms ago, expected one in the future"
            )
        age_ns = now_ns - observed_ns
        if age_ns > self._limits.max_chunk_age_s * NS_PER_S:
            raise SafetyRefusal(
                f"chunk: its observation is {age_ns / 1e6:.0f} ms old, limit {self._limits.max_chunk_age_s * 1e3:.0f} "
                "ms "
                "(limits.max_chunk_age_s); inference takes too long"
            )

    def _check_measured(self, position_J: NDArray[np.float64]) -> None:
        if position_J.shape != self._lower_J.shape:
            raise SafetyRefusal(f"measured state: expected {len(self._names)} positions, got {list(position_J.shape)}")
        range_J = self._upper_J - self._lower_J
        plausible_J = (position_J >= self._lower_J - range_J) & (position_J <= self._upper_J + range_J)  # not for NaN
        for j in np.flatnonzero(~plausible_J)[:1]:
            joint = self._joints[j]
            raise SafetyRefusal(
                f"joint {joint.name!r}: measured at {position_J[j]:.4g} {joint.unit}, farther outside its limits "
                f"{joint.lower:.4f} to {joint.upper:.4f} than these lie apart; is it published in {joint.unit}?"
            )

    def _clamp_positions(self, chunk: ActionChunk, corrections: list[str]) -> ActionChunk:
        position_HJ = chunk.position_HJ
        excess_HJ = np.maximum(self._lower_J - position_HJ, position_HJ - self._upper_J)
        allowed_J = self._limits.position_margin * (self._upper_J - self._lower_J)
        for k, j in np.argwhere(excess_HJ > allowed_J)[:1]:
            joint = self._joints[j]
            raise SafetyRefusal(
                f"joint {joint.name!r}: position of action {k} is {position_HJ[k, j]:.4f} {joint.unit}, limits "
                f"{joint.lower:.4f} to "
                f"{joint.upper:.4f}, beyond limits.position_margin"
            )
        clamped = [self._names[j] for j in np.flatnonzero((excess_HJ > 0).any(axis=0))]
        if not clamped:
            return chunk
        corrections.append(f"clamped {', '.join(clamped)}")
        return dataclasses.replace(chunk, position_HJ=np.clip(position_HJ, self._lower_J, self._upper_J))

    def _come_to_rest(self, chunk: ActionChunk) -> ActionChunk:
        """One more action that brakes evenly, within the limits.

        If no newer chunk replaces this one, the arm stops by itself; and joint_trajectory_controller by default refuses
        a trajectory whose last velocity is not zero. Even braking keeps the cubic's speed below that of the last
        action.
        """
        braked_J = chunk.position_HJ[-1] + chunk.velocity_HJ[-1] * (chunk.period_ns / NS_PER_S / 2.0)
        return dataclasses.replace(
            chunk,
            position_HJ=np.vstack([chunk.position_HJ, np.clip(braked_J, self._lower_J, self._upper_J)]),
            velocity_HJ=np.vstack([chunk.velocity_HJ, np.zeros_like(braked_J)]),
        )

    def _limit_overshoot(self, chunk: ActionChunk) -> ActionChunk:
        """Flatten the velocities of joints whose cubic leaves the limits between points that are inside.

        With |velocity| at most three times the slopes on both sides, and zero where they differ in sign, a cubic stays
        between its end points (Fritsch and Carlson 1980, Monotone Piecewise Cubic Interpolation).
        """
        low_J, high_J, _ = cubic_extremes(chunk)
        outside_J = (low_J < self._lower_J) | (high_J > self._upper_J)
        if not outside_J.any():
            return chunk
        slope_GJ = np.diff(chunk.position_HJ, axis=0) / (chunk.period_ns / NS_PER_S)
        before_HJ, after_HJ = np.vstack([slope_GJ[:1], slope_GJ]), np.vstack([slope_GJ, slope_GJ[-1:]])
        largest_HJ = np.where(before_HJ * after_HJ > 0, 3.0 * np.minimum(np.abs(before_HJ), np.abs(after_HJ)), 0.0)
        same_way_HJ = chunk.velocity_HJ * after_HJ > 0
        limited_HJ = np.where(same_way_HJ, np.clip(chunk.velocity_HJ, -largest_HJ, largest_HJ), 0.0)
        return dataclasses.replace(chunk, velocity_HJ=np.where(outside_J, limited_HJ, chunk.velocity_HJ))

    def _slow_down(
        self, chunk: ActionChunk, measured_J: NDArray[np.float64], now_ns: int, corrections: list[str]
    ) -> ActionChunk:
        """Stretch time so that the fastest joint keeps its limit; the path stays as it is."""
        speed_J = _peak_speed_J(chunk, measured_J, now_ns)
        j = int(np.argmax(speed_J / self.speed_J))
        factor = float(speed_J[j] / self.speed_J[j])
        if factor <= 1.0:
            return chunk
        if factor > self._limits.max_slowdown:
            joint = self._joints[j]
            raise SafetyRefusal(
                f"joint {joint.name!r}: chunk needs {speed_J[j]:.2f} {joint.unit}/s, limit {self.speed_J[j]:.2f}, "
                "too fast for "
                "limits.max_slowdown"
            )
        corrections.append(f"slowed {factor:.2f}x for {self._names[j]}")
        first_ns = int(np.ceil((chunk.due_ns(0) - now_ns) * factor))
        period_ns = int(np.ceil(chunk.period_ns * factor))
        return dataclasses.replace(
            chunk,
            start_ns=now_ns + first_ns - period_ns,
            period_ns=period_ns,
            velocity_HJ=chunk.velocity_HJ * (chunk.period_ns / period_ns),
        )

    def _verify(self, command: ActionChunk, measured_J: NDArray[np.float64], now_ns: int) -> None:
        low_J, high_J, _ = cubic_extremes(command)
        speed_J = _peak_speed_J(command, measured_J, now_ns)
        slack_J = _ROUNDING * (self._upper_J - self._lower_J)
        inside_J = (low_J >= self._lower_J - slack_J) & (high_J <= self._upper_J + slack_J)
        kept_J = inside_J & (speed_J <= self.speed_J * (1.0 + _ROUNDING))
        if not kept_J.all():
            j = int(np.argmin(kept_J))
            raise SafetyRefusal(
                f"joint {self._names[j]!r}: command reaches {low_J[j]:.6f} to {high_J[j]:.6f} at up to "
                f"{speed_J[j]:.4f} per second "
                f"after correction, limits {self._lower_J[j]:.6f} to {self._upper_J[j]:.6f} and {self.speed_J[j]:.4f}"
            )


def _peak_speed_J(chunk: ActionChunk, measured_J: NDArray[np.float64], now_ns: int) -> NDArray[np.float64]:
    first_J = np.abs(chunk.position_HJ[0] - measured_J) / ((chunk.due_ns(0) - now_ns) / NS_PER_S)
    peak_J: NDArray[np.float64] = np.maximum(first_J, cubic_extremes(chunk)[2])
    return peak_J


def cubic_extremes(chunk: ActionChunk) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Lowest and highest position and highest speed [J] of the cubics through the chunk's points, from first to last.

    In a segment of length T with s = t / T, u = T * velocity and d = the way: position p0 + u0 s + b s^2 + c s^3 with
    b = 3 d - 2 u0 - u1 and c = u0 + u1 - 2 d; velocity (u0 + 2 b s + 3 c s^2) / T.
    """
    period_s = chunk.period_ns / NS_PER_S
    p0, u0 = chunk.position_HJ[:-1], chunk.velocity_HJ[:-1] * period_s
    u1, d = chunk.velocity_HJ[1:] * period_s, np.diff(chunk.position_HJ, axis=0)
    b, c = 3.0 * d - 2.0 * u0 - u1, u0 + u1 - 2.0 * d
    # Where velocity is zero (positions turn) and where it is extreme; 0 stands for "not inside the segment".
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        root = np.sqrt(b * b - 3.0 * c * u0)
        q = -(b + np.copysign(root, b))
        turns = [q / (3.0 * c), u0 / q]
        steepest = -b / (3.0 * c)
    turns_GJ = [np.where((s > 0.0) & (s < 1.0), s, 0.0) for s in turns]
    steepest_GJ = np.where((steepest > 0.0) & (steepest < 1.0), steepest, 0.0)
    positions = [chunk.position_HJ] + [p0 + s * (u0 + s * (b + s * c)) for s in turns_GJ]
    speeds = [chunk.velocity_HJ, (u0 + steepest_GJ * (2.0 * b + 3.0 * c * steepest_GJ)) / period_s]
    return (
        np.vstack(positions).min(axis=0),
        np.vstack(positions).max(axis=0),
        np.abs(np.vstack(speeds)).max(axis=0),
    )
