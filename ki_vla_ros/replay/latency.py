"""How long a tick takes in a replay: as recorded, as given, or as measured here.

The replay's clock stands still while the policy computes; a latency model says what the robot's clock would have shown.
Input ages, consumed actions and missed deadlines are thus those of the machine in question, not of the one that
replays. Durations in ns.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np

from ki_vla_ros.errors import ConfigurationError, short_repr
from ki_vla_ros.files import read_json
from ki_vla_ros.records import to_ns
from ki_vla_ros.settings import Settings
from ki_vla_ros.statistics import spread

MEASURED, RECORDED, ASSUMED = "measured", "recorded", "assumed"
# The assumed latency as a share of the period: a machine that keeps up with its rate.
ASSUMED_SHARE = 0.5
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

    def __init__(self, prefill_ns: int, expert_ns: int, reason: str = "") -> None:
        super().__init__()
        self._prefill_ns, self._expert_ns = prefill_ns, expert_ns
        again = f" ({expert_ns / 1e6:g} ms where keys and values are used again)" if prefill_ns else ""
        self.description = f"{(prefill_ns + expert_ns) / 1e6:g} ms{again}{reason}"

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
    """Each tick that makes a chunk takes as long as the node's own at that time did."""

    def __init__(self, otherwise_ns: int) -> None:
        """`otherwise_ns`: where no recorded tick says how long it took."""
        super().__init__()
        self._otherwise_ns = otherwise_ns
        self._recorded_ns: int | None = 0  # until the first tick: warming up is none
        self._assumed = 0

    @property
    def description(self) -> str:
        told = "as recorded by the node's own ticks"
        if self._assumed:
            told += f", but {self._otherwise_ns / 1e6:g} ms assumed for {self._assumed} that do not say it"
        return told

    def begin(self, number: int, recorded_ns: int | None) -> None:
        self._recorded_ns, self._elapsed_ns = recorded_ns, 0

    def computed(self, prefill: bool) -> None:
        if not prefill:
            self._assumed += self._recorded_ns is None
            self._elapsed_ns = self._otherwise_ns if self._recorded_ns is None else self._recorded_ns


def choose_latency(text: str, settings: Settings, recorded_ticks: bool) -> Latency:
    """The latency model that `text` names, or "" the one that two runs agree on.

    That is `recorded`, or `assumed` for a bag without the node's ticks. ConfigurationError as from `parse_latency`.
    """
    name = text or (RECORDED if recorded_ticks else ASSUMED)
    return parse_latency(name, settings.noise_seed, 1.0 / settings.rate_hz)


def parse_latency(text: str, seed: int = 0, period_s: float = 0.1) -> Latency:
    """The latency model that a text names; ConfigurationError if it names none.

    "measured", "recorded", "assumed" (half of the period between ticks), seconds ("0.012"), backbone and expert
    ("0.030+0.012"), or a JSON file: a list of seconds, or the metrics.json of a replay, whose `timing.latency_s` is
    what that machine took.
    """
    assumed_ns = to_ns(ASSUMED_SHARE * period_s)
    if text == MEASURED:
        return MeasuredLatency()
    if text == RECORDED:
        return RecordedLatency(assumed_ns)
    if text == ASSUMED:
        return FixedLatency(0, assumed_ns, ", assumed: half of the period between ticks")
    try:
        parts = [float(part) for part in text.split("+")]
    except ValueError:
        return DrawnLatency(_durations_ns(Path(text)), Path(text).name, seed)
    if len(parts) > 2 or not all(math.isfinite(part) and 0.0 <= part <= LONGEST_S for part in parts):
        raise ConfigurationError(f"--latency {text}: expected 0 to {LONGEST_S:g} s, for example 0.012 or 0.030+0.012")
    expert_s, prefill_s = parts[-1], parts[0] if len(parts) == 2 else 0.0
    return FixedLatency(to_ns(prefill_s), to_ns(expert_s))


def _durations_ns(path: Path) -> list[int]:
    expected = (
        f"--latency {path}: expected {RECORDED}, {ASSUMED}, {MEASURED}, seconds, or a JSON file with a list of seconds "
        "or metrics.json"
    )
    try:
        content = read_json(path)
        listed = content["timing"]["latency_s"] if isinstance(content, dict) else content
        durations_s = [float(value) for value in listed]
    except FileNotFoundError:
        raise ConfigurationError(f"{expected}; there is no such file") from None
    except (ArithmeticError, OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"{expected}; got {short_repr(error)}") from error
    if not all(math.isfinite(value) and 0.0 <= value <= LONGEST_S for value in durations_s):
        raise ConfigurationError(f"{expected}; got durations outside 0 to {LONGEST_S:g} s")
    return [to_ns(value) for value in durations_s]
