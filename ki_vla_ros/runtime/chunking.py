"""The executors: when to infer, how the running chunk conditions the next one, and which of its actions count.

The policy loop calls `wants_chunk` at each tick; if the answer is yes, it calls `condition` before the flow is
integrated and `join` with the finished chunk. What `join` returns is a target, not a command: the governor
(runtime/governor.py) turns it into a motion that continues the running one without a seam, whichever executor made it.

    synchronous        execute s seconds, come to rest, then infer again
    asynchronous       infer while executing; actions whose time has passed are dropped
    temporal_ensemble  the same, with the weighted mean of all chunks that cover an instant (ACT, arXiv 2304.13705)
    rtc                the flow is guided towards the running chunk: its first d actions firmly, fading out until
                       the guidance horizon (real-time chunking, arXiv 2506.07339)
    rtc_trained        the first d actions are given clean, as in training (arXiv 2512.05964)

H actions per chunk, s executed before the next takes over (`execution_horizon_s`), d consumed while the next is being
computed (`inference_delay`). Legend: J joints. Times in ns on the node's clock.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.errors import SafetyRefusal
from ki_vla_ros.records import ActionChunk, Condition, to_ns
from ki_vla_ros.settings import ExecutorName

# `inference_delay: auto` is this percentile of the last five seconds' delays at 10 Hz. The first ones are left out: the
# processor's caches and clocks are still cold then.
DELAYS_KEPT, WARM_UP, DELAY_PERCENTILE = 50, 3, 95.0


class ChunkSettings(Protocol):
    """What the executors need of `settings.Settings`."""

    @property
    def executor(self) -> ExecutorName: ...
    @property
    def execution_horizon_s(self) -> float: ...
    @property
    def rate_hz(self) -> float: ...
    @property
    def inference_delay(self) -> int: ...
    @property
    def guidance_horizon_s(self) -> float: ...
    @property
    def guidance_weight(self) -> float: ...
    @property
    def ensemble_decay(self) -> float: ...


@dataclass(frozen=True, eq=False)
class _Running:
    chunk: ActionChunk
    accepted_ns: int


class ChunkExecutor:
    """All five executors: they differ in three places, each of which reads the executor's name from the settings."""

    def __init__(
        self, horizon: int, period_ns: int, max_prefix_delay: int, velocity_J: NDArray[np.bool_] | None = None
    ) -> None:
        """`velocity_J`: axes of which only the velocity counts (None: no axis)."""
        self._velocity_J = velocity_J
        self._horizon, self._period_ns, self._max_prefix = horizon, period_ns, max_prefix_delay
        self._running: _Running | None = None
        self._past: deque[ActionChunk] = deque(maxlen=horizon)
        self._delays: deque[int] = deque(maxlen=DELAYS_KEPT)
        self._joined = 0

    @property
    def running(self) -> ActionChunk | None:
        """The chunk accepted last, unless it has been stopped since."""
        return None if self._running is None else self._running.chunk

    def wants_chunk(self, settings: ChunkSettings, tick_ns: int, at_rest: bool) -> bool:
        """Whether the tick that starts at `tick_ns` should infer; `at_rest`: the running motion has ended."""
        if self._running is None:
            return True
        if settings.executor == "synchronous":
            return at_rest
        if settings.executor == "temporal_ensemble":
            return True
        waited_ns = tick_ns - self._running.accepted_ns
        return waited_ns >= to_ns(settings.execution_horizon_s) - to_ns(1.0 / settings.rate_hz) // 2

    def delay(self, settings: ChunkSettings) -> int:
        """d: actions that will be consumed before the chunk now being computed takes over."""
        if settings.inference_delay >= 0:
            return settings.inference_delay
        return math.ceil(np.percentile(self._delays, DELAY_PERCENTILE)) if self._delays else 0

    def condition(self, settings: ChunkSettings, start_ns: int) -> Condition | None:
        """The condition on a chunk whose observation was made at `start_ns`; None: it is unconditioned."""
        if settings.executor not in ("rtc", "rtc_trained") or self._running is None:
            return None
        due_H = start_ns + (np.arange(self._horizon) + 1) * self._period_ns
        known = int(np.searchsorted(due_H, self._running.chunk.due_ns(self._running.chunk.horizon - 1), side="right"))
        delay = min(self.delay(settings), known)
        if settings.executor == "rtc_trained":
            delay = min(delay, self._max_prefix)
            weight_H = (np.arange(self._horizon) < delay).astype(np.float64)
        else:
            end = math.floor(to_ns(settings.guidance_horizon_s) / self._period_ns) or known
            weight_H = soft_mask(self._horizon, delay, min(end, known))
        if not weight_H.any():
            return None
        position_HJ, velocity_HJ = cubic(self._running.chunk, due_H)
        return Condition(
            position_HJ, velocity_HJ, weight_H, settings.executor == "rtc_trained", settings.guidance_weight
        )

    def join(
        self, settings: ChunkSettings, chunk: ActionChunk, now_ns: int, lead_ns: int, still: bool = False
    ) -> ActionChunk:
        """What the arm is to do from `now_ns + lead_ns` on.

        `still`: the arm has rested since before the chunk's observation, and will until then. It begins with the
        chunk's first action; were its time counted from the observation, the arm would have to catch up at a start with
        what the chunk says of its wait.
        SafetyRefusal if the time of every action has passed: inference took longer than the chunk lasts.
        """
        if settings.executor == "synchronous":
            # The arm has been waiting at rest: the chunk starts when it is ready, not when it was asked for.
            count = max(1, min(chunk.horizon, round(to_ns(settings.execution_horizon_s) / chunk.period_ns)))
            return dataclasses.replace(
                chunk,
                start_ns=now_ns + lead_ns,
                position_HJ=chunk.position_HJ[:count],
                velocity_HJ=chunk.velocity_HJ[:count],
            )
        begins_ns = now_ns + lead_ns
        consumed = sum(chunk.due_ns(k) < (now_ns if still else begins_ns) for k in range(chunk.horizon))
        if consumed == chunk.horizon:
            raise SafetyRefusal(
                f"chunk: its last action was due {(now_ns - chunk.due_ns(chunk.horizon - 1)) / 1e6:.0f} ms ago; "
                "inference takes longer than the chunk lasts: try fewer flow_steps or a faster engine"
            )
        if still:
            chunk = dataclasses.replace(chunk, start_ns=begins_ns)
        self._joined += 1
        if self._joined > WARM_UP and not still:
            self._delays.append(consumed)
        if settings.executor != "temporal_ensemble":
            self._past.clear()
            return chunk
        self._past.append(chunk)
        return ensemble(list(self._past), settings.ensemble_decay, self._velocity_J)

    def accept(self, chunk: ActionChunk, tick_ns: int) -> None:
        """Notes that what `join` returned in the tick that started at `tick_ns` is now being executed."""
        self._running = _Running(chunk, tick_ns)

    def stop(self) -> None:
        """Notes that a hold has ended the running chunk; the next tick may infer."""
        self._running = None
        self._past.clear()


def soft_mask(horizon: int, delay: int, end: int) -> NDArray[np.float64]:
    """RTC's weights [H]: 1 for the first `delay` actions, then falling exponentially, 0 from `end` on (their eq. 5)."""
    k_H = np.arange(horizon)
    share_H = np.clip((end - k_H) / max(end - delay + 1, 1), 0.0, 1.0)
    weight_H = share_H * np.expm1(share_H) / math.expm1(1.0)
    return np.where(k_H < delay, 1.0, np.where(k_H < end, weight_H, 0.0))


def ensemble(chunks: list[ActionChunk], decay: float, velocity_J: NDArray[np.bool_] | None = None) -> ActionChunk:
    """The weighted mean of all chunks at the newest chunk's instants; weights exp(-decay * i), i = 0 the oldest."""
    newest = chunks[-1]
    due_H = np.array([newest.due_ns(k) for k in range(newest.horizon)])
    covers_NH = np.array(
        [(due_H >= chunk.due_ns(0)) & (due_H <= chunk.due_ns(chunk.horizon - 1)) for chunk in chunks], dtype=np.bool_
    )
    # At each instant the largest weight is 1: of many chunks, exp(-decay * i) itself is 0 for all, or too large.
    exponent_NH = np.where(covers_NH, -decay * np.arange(len(chunks))[:, None], -np.inf)
    weight_NH = np.exp(exponent_NH - exponent_NH.max(axis=0))
    total_HJ, speed_HJ = np.zeros_like(newest.position_HJ), np.zeros_like(newest.position_HJ)
    for chunk, weight_H in zip(chunks, weight_NH, strict=True):
        place_HJ, slope_HJ = cubic(chunk, due_H)
        total_HJ += weight_H[:, None] * place_HJ
        speed_HJ += weight_H[:, None] * slope_HJ
    sum_H = weight_NH.sum(axis=0)[:, None]
    position_HJ = total_HJ / sum_H
    velocity_HJ = np.gradient(position_HJ, newest.period_ns / 1e9, axis=0)
    if velocity_J is not None:  # the places of such axes are counted from a different one in each chunk
        velocity_HJ = np.where(velocity_J, speed_HJ / sum_H, velocity_HJ)
    return dataclasses.replace(newest, position_HJ=position_HJ, velocity_HJ=velocity_HJ)


def resample(chunk: ActionChunk, time_N: NDArray[np.int64]) -> NDArray[np.float64]:
    """Positions [N, J] of the chunk's cubic at `time_N`; see `cubic` for times before and after the chunk."""
    return cubic(chunk, time_N)[0]


def cubic(chunk: ActionChunk, time_N: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Position and velocity [N, J] of the cubic Hermite spline through the chunk's actions.

    Before the first action it is the line through that action with its velocity; after the last one it rests.
    """
    period_s = chunk.period_ns / 1e9
    phase_N = (np.asarray(time_N, dtype=np.int64) - chunk.due_ns(0)) / chunk.period_ns
    k_N = np.clip(np.floor(phase_N).astype(np.int64), 0, max(chunk.horizon - 2, 0))
    s = np.clip(phase_N - k_N, None, 1.0 if chunk.horizon > 1 else 0.0)[:, None]
    p0, m0 = chunk.position_HJ[k_N], chunk.velocity_HJ[k_N] * period_s
    after_N = np.minimum(k_N + 1, chunk.horizon - 1)
    p1, m1 = chunk.position_HJ[after_N], chunk.velocity_HJ[after_N] * period_s
    c2, c3 = 3.0 * (p1 - p0) - 2.0 * m0 - m1, 2.0 * (p0 - p1) + m0 + m1
    inside = p0 + s * (m0 + s * (c2 + s * c3))
    slope = (m0 + s * (2.0 * c2 + 3.0 * s * c3)) / period_s
    before = s < 0.0
    slope = np.where((phase_N > chunk.horizon - 1)[:, None], 0.0, slope)
    return np.where(before, p0 + s * m0, inside), np.where(before, m0 / period_s, slope)
