"""The loop's `Wire` in a replay: where its commands go, and the clock that it reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from ki_vla_ros.records import ActionChunk, Motion
from ki_vla_ros.replay.latency import Latency


@dataclass(frozen=True)
class TickReport:
    """What the loop reported about a tick: why it holds, when the command went out, how long the stages took."""

    hold: str | None = None
    command_ns: int | None = None
    stage_ms: Mapping[str, float] = field(default_factory=dict)


class ReplayWire:
    """Within a tick, the clock shows the tick's start plus the time that the latency model says has passed."""

    def __init__(self, latency: Latency) -> None:
        self._latency = latency
        self._tick_ns: int | None = None
        self._standing_ns: int | None = None
        self.clock_ns = 0
        self.report = TickReport()
        self._motions: list[Motion] = []

    def begin_tick(self, tick_ns: int) -> None:
        self._tick_ns, self.report = tick_ns, TickReport()

    def end_tick(self) -> int:
        """Ends the tick and returns the time at which it ended."""
        self.clock_ns = self.now_ns()
        self._tick_ns = None
        return self.clock_ns

    @contextmanager
    def standing_at(self, time_ns: int) -> Iterator[None]:
        """Stops the clock at `time_ns`, for the watchdog, which runs while a tick computes."""
        self._standing_ns = time_ns
        try:
            yield
        finally:
            self._standing_ns = None

    def take_motions(self) -> tuple[Motion, ...]:
        """The motions sent since the last call."""
        motions, self._motions = tuple(self._motions), []
        return motions

    def now_ns(self) -> int:
        if self._standing_ns is not None:
            return self._standing_ns
        return self.clock_ns if self._tick_ns is None else self._tick_ns + self._latency.elapsed_ns()

    def motion_ns(self) -> int:
        return self.now_ns()

    def simulated_clock(self) -> bool:
        return True

    def moves_arm(self) -> bool:
        return False

    def send_command(self, motion: Motion, now_ns: int, hold: bool = False) -> None:
        self._motions.append(motion)

    def report_chunk(self, chunk: ActionChunk) -> None: ...

    def report_tick(self, fields: Mapping[str, object]) -> None:
        hold, command_ns, stage_ms = fields["hold"], fields["command_ns"], fields["stage_ms"]
        assert isinstance(hold, str | None) and isinstance(command_ns, int | None) and isinstance(stage_ms, Mapping)
        self.report = TickReport(hold, command_ns, stage_ms)

    def log(self, message: str, cause: str) -> None: ...
