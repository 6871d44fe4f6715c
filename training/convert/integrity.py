"""What a look at an episode's recording says: rates and gaps, stamps and clocks, black and frozen images, jumps, lag.

A report is a line of `meta/ki_vla_ros_episodes.jsonl`; its words are the doctor's, and so is what counts as rare. It
changes nothing: "look at it" means that a person should, before a policy learns from the episode.
Legend: N messages or frames, G the signals of one message, S state, D action, P pairs of these two.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.records import NS_PER_S, SignalReading
from ki_vla_ros.robot import Robot, Signal
from ki_vla_ros.survey import FASTEST

Report = dict[str, Any]
FINE, LOOK = "fine", "look at it"
RARE: Final = 0.01  # a smaller share of an episode's frames is not worth a look
LOSS: Final = 0.05  # of messages, as the doctor has it
OTHER_CLOCK_S: Final = 3600.0
BLACK: Final = 8  # mean grey level, of 255
SAMPLED: Final = 8  # every so many pixels of a row and a column say how bright an image is, or that it is another
MOVED: Final = 1e-3  # rad or m from one frame to the next: then a camera's image must change, too
UNKNOWN: Final = 1e6  # a speed that says nothing
TOO_FAST: Final = 1.5  # times a joint's speed
MOST_WITHOUT_FRAMES: Final = 10_000  # readings that are kept while no frame comes
LAGS: Final = 10  # frames
LONGEST_LAG_S: Final = 0.5
LEAST_FRAMES: Final = 20  # that a lag is told from


@dataclass
class Arrivals:
    """Of one topic: stamps, and how much later each message was logged; `limit_s`: how old the node lets one get."""

    limit_s: float
    stamps: array[int] = field(default_factory=lambda: array("q"))
    late: array[int] = field(default_factory=lambda: array("q"))

    def add(self, stamp_ns: int, log_ns: int) -> None:
        self.stamps.append(stamp_ns)
        self.late.append(log_ns - stamp_ns)

    def forget(self, before_ns: int) -> None:
        keep = [i for i, stamp_ns in enumerate(self.stamps) if stamp_ns >= before_ns]
        self.stamps, self.late = (array("q", [values[i] for i in keep]) for values in (self.stamps, self.late))

    def describe(self, what: str, first_ns: int, last_ns: int, why: list[str]) -> Report:
        """Figures of the time between two stamps; adds what is wrong to `why`."""
        stamp_N, late_N = np.array(self.stamps, dtype=np.int64), np.array(self.late, dtype=np.int64)
        inside_N = (stamp_N >= first_ns) & (stamp_N <= last_ns)
        stamp_N, late_N = stamp_N[inside_N], late_N[inside_N]
        edges = np.sort(np.concatenate([[first_ns], stamp_N, [last_ns]]))
        gaps_s = np.diff(edges) / NS_PER_S
        steps: NDArray[np.int64] = np.diff(np.unique(stamp_N)).astype(np.int64)
        period = float(np.median(steps)) if len(steps) else None
        missing = 0 if period is None else int(np.maximum(np.round(steps / period) - 1, 0).sum())
        age_s = float(np.median(late_N)) / NS_PER_S if len(late_N) else None
        worst = int(gaps_s.argmax())
        repeated = len(stamp_N) - len(np.unique(stamp_N))
        report = {
            "rate_hz": None if period is None else _rounded(NS_PER_S / period),
            "largest_gap_s": _rounded(gaps_s[worst]),
            "missing": missing,
            "stamp_age_s": _rounded(age_s),
            "repeated_stamps": repeated,
        }
        if gaps_s[worst] > self.limit_s:
            at_s = (edges[worst] - first_ns) / NS_PER_S
            why.append(f"gap: no {what} for {gaps_s[worst]:.2f} s, {at_s:.1f} s after the beginning")
        if missing > LOSS * (len(stamp_N) + missing):
            why.append(f"loss: {missing} of {len(stamp_N) + missing} {what} are missing")
        if repeated > RARE * len(stamp_N):
            why.append(f"stamps: {repeated} of {len(stamp_N)} {what} repeat one")
        if age_s is not None and abs(age_s) > OTHER_CLOCK_S:
            why.append(f"clock: stamps of {what} are {-age_s:+.0f} s from the time of arrival: two clocks")
        elif age_s is not None and not -self.limit_s <= age_s <= self.limit_s:
            why.append(f"stamps: {what} is {age_s:.3f} s old when it arrives")
        return report


class _Step(NamedTuple):
    """The fastest joint of a reading: how far it came in what time, and which share of its speed that was."""

    stamp_ns: int
    joint: int
    by: float
    in_s: float
    share: float


@dataclass
class _Images:
    black: int = 0
    frozen: int = 0


class EpisodeWatch:
    """Sees the messages and frames of a bag in their order, and reports on each episode at its end."""

    def __init__(
        self,
        cameras: Mapping[str, float],
        signals: Sequence[Signal],
        limit_s: float,
        fps: float,
        pairs: Sequence[tuple[int, int]],
    ) -> None:
        """`cameras`: the greatest age of an image, by name; `limit_s`: of a signal; `pairs`: as of `find_pairs`."""
        self._signals, self._limit_s, self._fps = tuple(signals), limit_s, fps
        self._pairs_P2 = np.array(pairs, dtype=np.intp).reshape(-1, 2)
        speed_M = np.array([signal.max_velocity for signal in signals])
        self._speed_M = np.where(speed_M < UNKNOWN, speed_M, FASTEST)
        self._cameras = {name: Arrivals(limit_s) for name, limit_s in cameras.items()}
        # By the signals that come together.
        self._readings: dict[tuple[int, ...], Arrivals] = {}
        self._last_reading: dict[tuple[int, ...], tuple[int, NDArray[np.float64]]] = {}
        self._steps: list[_Step] = []
        self._before: Counter[str] = Counter()
        self._begin()

    def _begin(self) -> None:
        self._stamps: list[int] = []
        self._states: list[NDArray[np.float64]] = []
        self._actions: list[NDArray[np.float64]] = []
        self._images = {name: _Images() for name in self._cameras}
        self._last: Mapping[str, Any] = {}

    def add_image(self, camera: str, stamp_ns: int, log_ns: int) -> None:
        self._cameras[camera].add(stamp_ns, log_ns)

    def add_readings(self, readings: Sequence[SignalReading], log_ns: int) -> None:
        for reading in readings:
            index, stamp_ns = reading.signals, reading.stamp_ns
            self._readings.setdefault(index, Arrivals(self._limit_s)).add(stamp_ns, log_ns)
            before_ns, before_G = self._last_reading.get(index, (0, None))
            if stamp_ns <= before_ns:
                continue
            self._last_reading[index] = stamp_ns, reading.value_G
            if before_G is None:
                continue
            by_G, in_s = np.abs(reading.value_G - before_G), (stamp_ns - before_ns) / NS_PER_S
            share_G = by_G / (self._speed_M[list(index)] * in_s)
            g = int(share_G.argmax())
            self._steps.append(_Step(stamp_ns, index[g], float(by_G[g]), in_s, float(share_G[g])))
            if not self._stamps and len(self._steps) > MOST_WITHOUT_FRAMES:
                self._forget(self._steps[len(self._steps) // 2].stamp_ns)

    def add_frame(
        self,
        stamp_ns: int,
        state: NDArray[np.float64],
        action: NDArray[np.float64],
        images: Mapping[str, NDArray[np.uint8]],
    ) -> None:
        moved = bool(self._states) and bool(np.any(np.abs(state - self._states[-1]) > MOVED))
        for name, rgb_HWC in images.items():
            seen = self._images[name]
            if rgb_HWC[::SAMPLED, ::SAMPLED].mean() < BLACK:
                seen.black += 1
            elif moved and stamp_ns != self._stamps[-1]:
                last_HWC = self._last[name]
                like = np.array_equal(rgb_HWC[::SAMPLED, ::SAMPLED], last_HWC[::SAMPLED, ::SAMPLED])
                seen.frozen += like and np.array_equal(rgb_HWC, last_HWC)
        self._stamps.append(stamp_ns)
        self._states.append(state)
        self._actions.append(action)
        self._last = images

    def end_episode(self, left_out: Counter[str]) -> Report:
        """Its report; `left_out` is of the whole bag until now, and what came since the last report is this one's."""
        why: list[str] = []
        frames, first_ns, last_ns = len(self._stamps), self._stamps[0], self._stamps[-1]
        since, self._before = left_out - self._before, Counter(left_out)
        repeated = sum(one == two for one, two in zip(self._stamps, self._stamps[1:], strict=False))
        if repeated > RARE * frames:
            why.append(f"rate: {repeated} of {frames} frames have the images of the one before")
        cameras = {}
        for name, arrivals in self._cameras.items():
            seen = self._images[name]
            cameras[name] = arrivals.describe(f"image of {name!r}", first_ns, last_ns, why)
            cameras[name] |= {"black_frames": int(seen.black), "frozen_frames": int(seen.frozen)}
            if seen.black > RARE * frames:
                why.append(f"black: {seen.black} of {frames} images of {name!r}")
            if seen.frozen > RARE * frames:
                why.append(f"frozen: {seen.frozen} of {frames} images of {name!r} stay the same while the arm moves")
        joints = self._describe_readings(first_ns, last_ns, why)
        joints["largest_jump"] = self._jump(first_ns, last_ns, why)
        lag_s = self._lag_s()
        if lag_s is not None and abs(lag_s) > LONGEST_LAG_S:
            why.append(f"lag: the state follows the actions by {lag_s:.2f} s")
        self._forget(last_ns)
        self._begin()
        return {
            "frames": frames,
            "duration_s": _rounded((last_ns - first_ns) / NS_PER_S),
            "left_out": dict(since),
            "repeated_frames": repeated,
            "cameras": cameras,
            "joint_states": joints,
            "action_lag_s": _rounded(lag_s),
            "verdict": LOOK if why else FINE,
            "why": why,
        }

    def _forget(self, before_ns: int) -> None:
        self._steps = [step for step in self._steps if step.stamp_ns >= before_ns]
        for arrivals in (*self._cameras.values(), *self._readings.values()):
            arrivals.forget(before_ns)

    def _describe_readings(self, first_ns: int, last_ns: int, why: list[str]) -> Report:
        """The figures of those that come together, and, of several such parts, of the one with the largest gap."""
        parts = []
        for index, arrivals in self._readings.items():
            named = f" of {', '.join(self._signals[m].name for m in index)}" if len(self._readings) > 1 else ""
            parts.append(arrivals.describe(f"joint state{named}", first_ns, last_ns, why))
        return dict(max(parts, key=lambda part: part["largest_gap_s"]))

    def _jump(self, first_ns: int, last_ns: int, why: list[str]) -> Report | None:
        """The fastest step from one joint state to the next, measured by each joint's speed."""
        steps = [step for step in self._steps if first_ns <= step.stamp_ns <= last_ns]
        if not steps:
            return None
        step = max(steps, key=lambda step: step.share)
        name, at_s = self._signals[step.joint].name, (step.stamp_ns - first_ns) / NS_PER_S
        if step.share > TOO_FAST and step.by > 10 * MOVED:
            why.append(f"jump: {name!r} by {step.by:.3g} in {step.in_s:.3g} s, {at_s:.1f} s after the beginning")
        return {"joint": name, "by": _rounded(step.by), "in_s": _rounded(step.in_s), "at_s": _rounded(at_s)}

    def _lag_s(self) -> float | None:
        """How much later than it was due the state is where the action was; None where that cannot be told."""
        if len(self._states) < LEAST_FRAMES or not len(self._pairs_P2):
            return None
        state_NP = np.array(self._states)[:, self._pairs_P2[:, 0]]
        action_NP = np.array(self._actions)[:, self._pairs_P2[:, 1]]
        spread_P = state_NP.std(axis=0)
        if spread_P.max() < 10 * MOVED:
            return None
        most = min(LAGS, len(state_NP) // 2)
        count = len(state_NP) - most
        scale_P = np.where(spread_P > MOVED, spread_P, np.inf)
        error_L = np.array(
            [np.mean(((state_NP[d : d + count] - action_NP[:count]) / scale_P) ** 2) for d in range(most + 1)]
        )
        best = int(error_L.argmin())
        if 0 < best < most:  # between two frames: the lowest point of a parabola
            left, middle, right = error_L[best - 1 : best + 2]
            curve = left - 2 * middle + right
            return float((best - 1 + (0.5 * (left - right) / curve if curve > 0 else 0.0)) / self._fps)
        return (best - 1) / self._fps


def find_pairs(robot: Robot) -> list[tuple[int, int]]:
    """Index in the state, and in the actions, of each place that the robot has in both, in one unit."""
    kinds = ("joint_position", "gripper")
    return [
        (s, d)
        for d, action in enumerate(robot.actions)
        for s, state in enumerate(robot.state)
        if action.kind in kinds and state.kind in kinds and state.source.field == "position"
        if action.target in (state.joint, state.name) and (action.unit, action.ends) == (state.unit, state.ends)
    ]


def stopped_report(frames: int) -> Report:
    """Of an episode in which the conversion was stopped."""
    return {"frames": frames, "verdict": LOOK, "why": ["stopped: the conversion was stopped in it"]}


def as_table(reports: Sequence[Report], most: int = 20) -> str:
    """A row for each episode, or, where they are more than `most`, for the first of those to look at."""
    worth = [report for report in reports if report["verdict"] != FINE]
    shown = list(reports) if len(reports) <= most else worth[:most]
    rows = [("episode", "frames", "s", "images Hz", "gap s", "joints Hz", "gap s", "lag s", "verdict")]
    for report in shown:
        cameras, joints = report.get("cameras", {}).values(), report.get("joint_states", {})
        rates = [camera["rate_hz"] for camera in cameras if camera["rate_hz"] is not None]
        rows.append(
            (
                str(report["episode_index"]),
                str(report["frames"]),
                _shown(report.get("duration_s"), 1),
                _shown(min(rates, default=None), 1),
                _shown(max((camera["largest_gap_s"] for camera in cameras), default=None), 3),
                _shown(joints.get("rate_hz"), 1),
                _shown(joints.get("largest_gap_s"), 3),
                _shown(report.get("action_lag_s"), 3),
                f"{report['verdict']}: {'; '.join(report['why'])}" if report["why"] else report["verdict"],
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = [
        "  ".join((*(cell.rjust(width) for cell, width in zip(row, widths, strict=False)), row[-1])) for row in rows
    ]
    more = f"{len(worth) - most} more are to be looked at; " if len(reports) > most and len(worth) > most else ""
    summary = f"{more}{len(reports) - len(worth)} of {len(reports)} episodes fine"
    return "\n".join([*(lines if shown else []), summary])


def _rounded(value: Any) -> float | None:
    """To six digits after the point, for a file that people read."""
    return None if value is None else round(float(value), 6)


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
