"""What is kept of a replay for the report: a few numbers per tick, some chunks, and the worst moments.

Memory is bounded, however long the bag is, except for the few numbers (about 100 bytes a tick). Legend: H horizon,
J joints. Times in s from the first tick, less long stretches without one.
"""

from __future__ import annotations

import heapq
import itertools
import math
from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.bundle import PolicySpec
from ki_vla_ros.errors import cause_of
from ki_vla_ros.messages import camera_frame
from ki_vla_ros.records import NS_PER_S, CameraFrame, Observation, to_ns
from ki_vla_ros.replay.frames import BagFrame
from ki_vla_ros.replay.ticks import Prediction, Tick, axis_scales

# How many chunks are drawn over the whole bag; how many worst moments, and for how long around each chunks are drawn.
MOST_CHUNKS = 240
MOMENTS, AROUND_S = 4, 3.0
# Lines have a gap where ticks, or chunks, are farther apart than this: the node was not active.
GAP_S = 1.0
# Longer stretches without a tick are left out of the time axis: an hour of nothing would leave no width for the rest.
LONGEST_DRAWN_S = 60.0
# Instants kept per lane of the timeline; the page is only 1000 units wide.
MOST_INSTANTS = 4000
THUMB_PX, THUMB_QUALITY = 224, 78


@dataclass(frozen=True, slots=True, eq=False)
class Moment:
    """A chunk with a larger error than all those around it; `error` is in the model's units."""

    error: float
    at_s: float
    instruction: str
    worst: Prediction
    around: Sequence[Prediction]
    jpegs: Mapping[str, bytes]


@dataclass(slots=True, eq=False)
class _Kept:
    """A recent chunk, kept until all its neighbours are known."""

    error: float
    instruction: str
    prediction: Prediction
    jpegs: Mapping[str, bytes]


class Lane:
    """Instants at which something happened; every second one is dropped whenever there are too many."""

    def __init__(self) -> None:
        self.count = 0
        self.instants_s = array("d")
        self._every = 1

    def add(self, at_s: float) -> None:
        if self.count % self._every == 0:
            self.instants_s.append(at_s)
            if len(self.instants_s) > MOST_INSTANTS:
                self.instants_s = self.instants_s[::2]
                self._every *= 2
        self.count += 1


@dataclass
class Trace:
    """Collects what the report draws: `see` each observation, `add` each tick, then `finish`."""

    spec: PolicySpec
    start_ns: int | None = None
    time_s: array[float] = field(default_factory=lambda: array("d"))
    latency_ms: array[float] = field(default_factory=lambda: array("f"))
    ages_ms: dict[str, array[float]] = field(default_factory=dict)
    state_s: array[float] = field(default_factory=lambda: array("d"))
    state_JT: list[array[float]] = field(default_factory=list)
    lanes: dict[tuple[str, str], Lane] = field(default_factory=dict)
    """By kind ("hold", "refused", "corrected", "restart") and cause."""
    chunks: list[Prediction] = field(default_factory=list)
    """At most `MOST_CHUNKS`, spread evenly over the bag."""

    def __post_init__(self) -> None:
        self.state_JT = [array("f") for _ in self.spec.axes]
        self._scale_J = axis_scales(self.spec)
        self._left_out: list[tuple[int, int]] = []  # from when on, how many ns are left out of the axis in all
        self._last_ns = 0
        self._every, self._seen = 1, 0
        self._frames: deque[CameraFrame] = deque()
        self._latest: deque[_Kept] = deque()
        self._waiting = 0  # index of the first of the latest not yet compared with its neighbours
        self._order = itertools.count()
        self._moments: list[tuple[float, int, Moment]] = []

    def see(self, observation: Observation) -> None:
        """Takes the observation that a chunk is made from, before the chunk's tick is added."""
        self._frames.extend(observation.frames.values())

    def add(self, tick: Tick) -> None:
        if self.start_ns is None:
            self.start_ns = self._last_ns = tick.stamp_ns
        if (apart_ns := tick.stamp_ns - self._last_ns) > to_ns(LONGEST_DRAWN_S):
            before_ns = self._left_out[-1][1] if self._left_out else 0
            # The gap that stays tells the two stretches apart.
            self._left_out.append((tick.stamp_ns - NS_PER_S, before_ns + apart_ns - to_ns(2.0 * GAP_S)))
        self._last_ns = tick.stamp_ns
        at_s = self.seconds(tick.stamp_ns)
        if self.time_s and at_s - self.time_s[-1] > GAP_S:
            self._add_row(self.time_s[-1], {}, float("nan"))
        self._add_row(at_s, tick.age_ns, tick.latency_ns / 1e6)
        refused = tick.prediction is not None and tick.prediction.refusal is not None
        if tick.hold is not None and not refused:
            self._mark("hold", cause_of(tick.hold), at_s)
        if tick.prediction is not None:
            self._add_prediction(tick.prediction, tick.instruction, at_s)

    def finish(self) -> Sequence[Moment]:
        """The worst moments, the worst first; no tick may be added afterwards."""
        self._compare(None)
        return [moment for _, _, moment in sorted(self._moments, key=lambda entry: (-entry[0], entry[1]))]

    def seconds(self, time_ns: int) -> float:
        """Where `time_ns` is on the time axis."""
        left_out_ns = next((ns for from_ns, ns in reversed(self._left_out) if time_ns >= from_ns), 0)
        return (time_ns - (self.start_ns or 0) - left_out_ns) / NS_PER_S

    def _add_row(self, at_s: float, age_ns: Mapping[str, int | None], latency_ms: float) -> None:
        for name in age_ns:
            self.ages_ms.setdefault(name, array("f", [float("nan")] * len(self.time_s)))
        for name, ages in self.ages_ms.items():
            known_ns = age_ns.get(name)
            ages.append(float("nan") if known_ns is None else known_ns / 1e6)
        self.time_s.append(at_s)
        self.latency_ms.append(latency_ms)

    def _add_prediction(self, prediction: Prediction, instruction: str, at_s: float) -> None:
        start_s = self.seconds(prediction.start_ns)
        if self.state_s and start_s - self.state_s[-1] > GAP_S:
            self._add_state(self.state_s[-1], np.full(len(prediction.measured_J), np.nan))
        self._add_state(start_s, prediction.measured_J)
        if prediction.refusal is not None:
            self._mark("refused", cause_of(prediction.refusal), at_s)
        for words in prediction.corrections:
            verb, _, joints = words.partition(" ")
            for joint in joints.split(", "):
                self._mark("corrected", f"{verb} {joint}", at_s)
        if prediction.seam is not None and prediction.seam.restarted:
            self._mark("restart", "the arm was elsewhere", at_s)
        if self._seen % self._every == 0:
            self.chunks.append(prediction)
            if len(self.chunks) > MOST_CHUNKS:
                self.chunks = self.chunks[::2]
                self._every *= 2
        self._seen += 1
        deviation_HJ = (prediction.position_HJ - prediction.reference_HJ) / self._scale_J
        deviation_HJ = deviation_HJ[:, np.isfinite(deviation_HJ).any(axis=0)]  # the axes that somebody measures
        known_H = np.isfinite(deviation_HJ).all(axis=1) & bool(deviation_HJ.size)
        error = float(np.sqrt(np.mean(deviation_HJ[known_H] ** 2))) if known_H.mean() >= 0.5 else float("nan")
        jpegs = {}
        while self._frames and self._frames[0].stamp_ns <= max(prediction.frame_ns.values()):
            frame = self._frames.popleft()
            if prediction.frame_ns.get(frame.camera) == frame.stamp_ns and self._is_candidate(error):
                jpegs[frame.camera] = _thumbnail(frame)
        self._latest.append(_Kept(error, instruction, prediction, jpegs))
        self._compare(prediction.start_ns)

    def _add_state(self, at_s: float, measured_J: NDArray[np.float64]) -> None:
        self.state_s.append(at_s)
        for row, value in zip(self.state_JT, measured_J, strict=True):
            row.append(value)

    def _compare(self, now_ns: int | None) -> None:
        """Keeps each chunk that has the largest error of its neighbourhood, once all its neighbours are known."""
        around_ns = to_ns(AROUND_S)
        while self._waiting < len(self._latest):
            kept = self._latest[self._waiting]
            start_ns = kept.prediction.start_ns
            if now_ns is not None and now_ns - start_ns < around_ns:
                return
            near = [other for other in self._latest if abs(other.prediction.start_ns - start_ns) <= around_ns]
            highest = max((other for other in near if math.isfinite(other.error)), key=lambda o: o.error, default=None)
            if kept is highest:
                self._keep(kept, [other.prediction for other in near])
            self._waiting += 1
            while self._latest and start_ns - self._latest[0].prediction.start_ns > around_ns:
                self._latest.popleft()
                self._waiting -= 1

    def _keep(self, kept: _Kept, near: Sequence[Prediction]) -> None:
        if not self._is_candidate(kept.error):
            return
        at_s = self.seconds(kept.prediction.start_ns)
        moment = Moment(kept.error, at_s, kept.instruction, kept.prediction, near, kept.jpegs)
        heapq.heappush(self._moments, (kept.error, next(self._order), moment))
        if len(self._moments) > MOMENTS:
            heapq.heappop(self._moments)

    def _is_candidate(self, error: float) -> bool:
        return math.isfinite(error) and (len(self._moments) < MOMENTS or error > self._moments[0][0])

    def _mark(self, kind: str, why: str, at_s: float) -> None:
        self.lanes.setdefault((kind, why), Lane()).add(at_s)


def _thumbnail(frame: CameraFrame) -> bytes:
    """The frame as a small JPEG, made from the message if there is one: the frame itself is padded for the model."""
    rgb_HWC = camera_frame(frame.message, frame.camera).rgb_HWC if isinstance(frame, BagFrame) else frame.rgb_HWC
    height, width = rgb_HWC.shape[:2]
    if width > THUMB_PX:
        size = (THUMB_PX, max(1, round(THUMB_PX * height / width)))
        rgb_HWC = np.asarray(cv2.resize(rgb_HWC, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
    done, data = cv2.imencode(".jpg", rgb_HWC[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, THUMB_QUALITY])
    if not done:  # cannot happen with an image of this type and size
        raise ValueError(f"thumbnail: expected a JPEG, got nothing of an image of shape {rgb_HWC.shape}")
    return data.tobytes()
