"""Recent figures for /diagnostics and the log: latencies by stage, rates, refusals by cause, missed deadlines.

The worker thread records and the executor thread reads once a second, under one lock. Durations in ms, from a steady
clock.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum

from ki_vla_ros.errors import cause_of
from ki_vla_ros.runtime.observation import InputStatus
from ki_vla_ros.statistics import spread

# Ticks that percentiles are taken over: half a minute at 10 Hz.
WINDOW = 300


class Level(IntEnum):
    OK = 0
    WARNING = 1
    ERROR = 2


@dataclass
class Stopwatch:
    """The duration of each stage of one tick in ms, in the order in which they ran."""

    stage_ms: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start_ns = time.perf_counter_ns()
        try:
            yield
        finally:
            self.stage_ms[name] = self.stage_ms.get(name, 0.0) + (time.perf_counter_ns() - start_ns) / 1e6

    @property
    def total_ms(self) -> float:
        return sum(self.stage_ms.values())


class CollectorWatch:
    """The longest time in ms that Python's garbage collector has stopped the process; for `gc.callbacks`."""

    def __init__(self) -> None:
        self.longest_ms = 0.0
        self._began_ns = 0

    def __call__(self, phase: str, _info: Mapping[str, object]) -> None:
        now_ns = time.perf_counter_ns()
        if phase == "start":
            self._began_ns = now_ns
        elif self._began_ns:
            self.longest_ms = max(self.longest_ms, (now_ns - self._began_ns) / 1e6)


@dataclass(frozen=True)
class Report:
    """One line for people, and everything by name for tools."""

    level: Level
    summary: str
    values: Mapping[str, str]


class Diagnostics:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stage_ms: dict[str, deque[float]] = {}
        self._chunk_times_s: deque[float] = deque(maxlen=WINDOW)
        self._prefill_times_s: deque[float] = deque(maxlen=WINDOW)
        self._age_ms: deque[float] = deque(maxlen=WINDOW)
        self._skew_ms: deque[float] = deque(maxlen=WINDOW)
        self._delay = 0
        self._inputs: tuple[float, Mapping[str, InputStatus]] | None = None  # at the previous report
        self.collector = CollectorWatch()
        self._holds = 0
        self._refusals: Counter[str] = Counter()
        self._corrections: Counter[str] = Counter()
        # What the gate changed in the newest chunk, in words; replay reads it after every tick.
        self.last_corrections: tuple[str, ...] = ()
        self._chunks = 0
        self._missed = 0
        self._clock_steps = 0
        self._hold: str | None = None
        self._instruction = ""

    def record_chunk(
        self,
        stage_ms: Mapping[str, float],
        corrections: tuple[str, ...],
        time_s: float,
        age_ms: float = 0.0,
        skew_ms: float = 0.0,
        delay: int = 0,
    ) -> None:
        """Counts a chunk that went onto the wire at `time_s` (steady clock), `age_ms` after its observation's stamp.

        `skew_ms`: between the oldest and the newest of its images' stamps. `delay`: the inference delay, in actions,
        that the executor assumes.
        """
        with self._lock:
            self._chunks += 1
            self._age_ms.append(age_ms)
            self._skew_ms.append(skew_ms)
            self._delay = delay
            self._chunk_times_s.append(time_s)
            if "prefill" in stage_ms:
                self._prefill_times_s.append(time_s)
            self.last_corrections = corrections
            self._corrections.update(correction.split(" ")[0] for correction in corrections)
            for stage, duration_ms in {**stage_ms, "total": sum(stage_ms.values())}.items():
                self._stage_ms.setdefault(stage, deque(maxlen=WINDOW)).append(duration_ms)

    def record_refusal(self, reason: str) -> None:
        """Counts a refusal by its cause, which is the part of `reason` before the first colon."""
        with self._lock:
            self._refusals[cause_of(reason)] += 1

    def record_clock_step(self) -> None:
        with self._lock:
            self._clock_steps += 1

    def record_tick(self, hold: str | None, instruction: str, missed: int) -> None:
        """Records why the arm is held (None: it is not), the instruction, and deadlines missed since activation."""
        if hold is not None:
            self.record_refusal(hold)
        with self._lock:
            self._holds += hold is not None and self._hold is None
            self._hold, self._instruction, self._missed = hold, instruction, missed

    def report(
        self,
        lifecycle: str,
        engine: str,
        now_s: float,
        inputs: Mapping[str, InputStatus] | None = None,
        faults: Mapping[str, Level] | None = None,
    ) -> Report:
        """The figures so far; `inputs` by name, with their rates taken over the time since the previous report.

        `faults` are sentences on what is wrong around the node, whatever it is doing; they come first in the summary.
        """
        with self._lock:
            rate_hz, prefill_hz = (_rate_hz(times, now_s) for times in (self._chunk_times_s, self._prefill_times_s))
            values = {
                "state": lifecycle,
                "engine": engine,
                "instruction": self._instruction,
                "hold": self._hold or "",
                "chunks": str(self._chunks),
                "chunk_rate_hz": f"{rate_hz:.2f}",
                "prefill_rate_hz": f"{prefill_hz:.2f}",
                "chunk_delay_actions": str(self._delay),
                "deadline_misses": str(self._missed),
                "clock_steps": str(self._clock_steps),
                "holds": str(self._holds),
                "gc_pause_ms_max": f"{self.collector.longest_ms:.2f}",
            }
            values.update(self._describe_inputs(inputs or {}, now_s))
            durations = {f"{stage}_ms": of_stage for stage, of_stage in self._stage_ms.items()}
            for name, kept in {
                "skew_ms": self._skew_ms,
                "observation_to_command_ms": self._age_ms,
                **durations,
            }.items():
                if kept:
                    found = spread(kept)
                    values |= {f"{name}_{percentile}": f"{found[percentile]:.2f}" for percentile in ("p50", "p99")}
            values.update({f"refused {cause}": str(count) for cause, count in self._refusals.items()})
            values.update({f"corrected {what}": str(count) for what, count in self._corrections.items()})
            hold = self._hold
        level, summary = Level.OK, lifecycle
        if lifecycle == "active":
            held = hold is not None
            level = Level.WARNING if held else Level.OK
            summary = f"holding: {hold}" if held else f"{rate_hz:.1f} chunks per second"
        faults = faults or {}
        return Report(max(level, *faults.values(), Level.OK), "; ".join([*faults, summary]), values)

    def _describe_inputs(self, inputs: Mapping[str, InputStatus], now_s: float) -> Iterator[tuple[str, str]]:
        before_s, before = self._inputs or (now_s, {})
        self._inputs = now_s, inputs
        for name, status in inputs.items():
            yield f"{name} messages", str(status.count)
            yield f"{name} age_ms", "" if status.age_ns is None else f"{status.age_ns / 1e6:.1f}"
            if name in before and now_s > before_s:
                # The count starts again from 0 when the node is configured again.
                arrived = max(0, status.count - before[name].count)
                yield f"{name} rate_hz", f"{arrived / (now_s - before_s):.1f}"


def _rate_hz(times_s: deque[float], now_s: float) -> float:
    """Events per second over the last five seconds."""
    recent = [t for t in times_s if now_s - t <= 5.0]
    return (len(recent) - 1) / (recent[-1] - recent[0]) if len(recent) > 1 else 0.0
