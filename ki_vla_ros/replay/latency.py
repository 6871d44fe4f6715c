"""How long a tick takes in a replay: as measured here, as given, or as recorded.

The replay's clock stands still while the policy computes; a latency model says what the robot's clock would have shown.
Input ages, consumed actions and missed deadlines are thus those of the machine in question, not of the one that
replays. Durations in ns.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np

from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.records import to_ns
from ki_vla_ros.statistics import spread

MEASURED, RECORDED = "measured", "recorded"
LONGEST_S = 60.0


class Latency(Protocol):
    @property
    def description(self) -> str: ...

    def begin(self, number: int, recorded_ns: int | None) -> None:
        """Starts tick `number`; `recorded_ns` is how long it took when it was recorded, if that is known."""
        ...

    def computed(self, prefill: bool) -> None:
        """Notes that the backbone (`prefill`) or the expert has just run."""
        ...

    def elapsed_ns(self) -> int:
        """Time since the tick's start on the robot."""
        ...

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes work that the robot does not do within its tick."""
        ...


class MeasuredLatency:
    """The time this machine takes, without the work that only a replay does; it differs from run to run."""

    description = "measured on this machine"

    def __init__(self) -> None:
        self._began_ns = time.perf_counter_ns()

    def begin(self, number: int, recorded_ns: int | None) -> None:
        self._began_ns = time.perf_counter_ns()

    def computed(self, prefill: bool) -> None: ...

    def elapsed_ns(self) -> int:
        return time.perf_counter_ns() - self._began_ns

    @contextmanager
    def paused(self) -> Iterator[None]:
        paused_ns = time.perf_counter_ns()
        try:
            yield
        finally:
            self._began_ns += time.perf_counter_ns() - paused_ns


class _Simulated:
    """A latency in which only the model's own figures count, not this machine's time."""

    def __init__(self) -> None:
        self._elapsed_ns = 0

    def elapsed_ns(self) -> int:
        return self._elapsed_ns

    @contextmanager
    def paused(self) -> Iterator[None]:
        yield


class FixedLatency(_Simulated):
    """A tick that makes a chunk takes `prefill_ns` for the backbone, if it runs, and `expert_ns` for all the rest."""

    def __init__(self, prefill_ns: int, expert_ns: int) -> None:
        super().__init__()
        self._prefill_ns, self._expert_ns = prefill_ns, expert_ns
        self.description = f"{(prefill_ns + expert_ns) / 1e6:g} ms" + (
            f" ({expert_ns / 1e6:g} ms where keys and values are used again)" if prefill_ns else ""
        )

    def begin(self, number: int, recorded_ns: int | None) -> None:
        self._elapsed_ns = 0

    def computed(self, prefill: bool) -> None:
        self._elapsed_ns += self._prefill_ns if prefill else self._expert_ns


class DrawnLatency(_Simulated):
    """A latency drawn for each tick that makes a chunk; the same seed and tick number give the same latency."""

    def __init__(self, durations_ns: Sequence[int], source: str, seed: int) -> None:
        super().__init__()
        if len(durations_ns) == 0:
            raise ConfigurationError(f"latency: expected at least one duration in {source}, got none")
        self._durations_ns, self._seed, self._number = np.sort(np.asarray(durations_ns, dtype=np.int64)), seed, 0
        ms = spread(self._durations_ns / 1e6)
        self.description = f"drawn from {len(durations_ns)} of {source}, p50 {ms['p50']:.1f} ms, p99 {ms['p99']:.1f} ms"

    def begin(self, number: int, recorded_ns: int | None) -> None:
        self._number, self._elapsed_ns = number, 0

    def computed(self, prefill: bool) -> None:
        if not prefill:
            drawn = np.random.default_rng((self._seed, self._number)).integers(len(self._durations_ns))
            self._elapsed_ns = int(self._durations_ns[drawn])


class RecordedLatency(_Simulated):
    """Each tick takes as long as when it was recorded; for replays of recorded ticks."""

    description = "of each tick as it was recorded"

    def __init__(self) -> None:
        super().__init__()
        self._recorded_ns = 0

    def begin(self, number: int, recorded_ns: int | None) -> None:
        self._recorded_ns, self._elapsed_ns = recorded_ns or 0, 0

    def computed(self, prefill: bool) -> None:
        if not prefill:
            self._elapsed_ns = self._recorded_ns


def parse_latency(text: str, seed: int = 0) -> Latency:
    """The latency model that a text names; ConfigurationError if it names none.

    "measured", "recorded", seconds ("0.012"), backbone and expert ("0.030+0.012"), or a JSON file: a list of seconds,
    or the metrics.json of a replay, whose `timing.latency_s` is what that machine took.
    """
    if text == MEASURED:
        return MeasuredLatency()
    if text == RECORDED:
        return RecordedLatency()
    try:
        parts = [float(part) for part in text.split("+")]
    except ValueError:
        return DrawnLatency(_durations_ns(Path(text)), Path(text).name, seed)
    if len(parts) > 2 or not all(math.isfinite(part) and 0.0 <= part <= LONGEST_S for part in parts):
        raise ConfigurationError(f"--latency {text}: expected 0 to {LONGEST_S:g} s, for example 0.012 or 0.030+0.012")
    expert_s, prefill_s = parts[-1], parts[0] if len(parts) == 2 else 0.0
    return FixedLatency(to_ns(prefill_s), to_ns(expert_s))


def _durations_ns(path: Path) -> list[int]:
    expected = f"--latency {path}: expected {MEASURED}, seconds, or a JSON file with a list of seconds or metrics.json"
    try:
        content = json.loads(path.read_text())
        listed = content["timing"]["latency_s"] if isinstance(content, dict) else content
        durations_s = [float(value) for value in listed]
    except FileNotFoundError:
        raise ConfigurationError(f"{expected}; there is no such file") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"{expected}; got {error!r}") from error
    if not all(math.isfinite(value) and 0.0 <= value <= LONGEST_S for value in durations_s):
        raise ConfigurationError(f"{expected}; got durations outside 0 to {LONGEST_S:g} s")
    return [to_ns(value) for value in durations_s]
