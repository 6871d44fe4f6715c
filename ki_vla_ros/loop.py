"""The line from inputs to command, once per tick, in a thread of its own. No ROS: it ends at the `Wire`."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Protocol

from ki_vla_ros.chunking import AsynchronousExecutor, Reach
from ki_vla_ros.diagnostics import Diagnostics, Stopwatch
from ki_vla_ros.errors import InstructionError, KiVlaError, SafetyRefusal, StaleInput
from ki_vla_ros.observation import ObservationBuffer
from ki_vla_ros.pacing import Pacer
from ki_vla_ros.policy import Policy
from ki_vla_ros.preprocess import make_model_input
from ki_vla_ros.records import NS_PER_S, ActionChunk
from ki_vla_ros.safety import SafetyGate
from ki_vla_ros.settings import Settings

# Simulated time may run at any speed, so a waiting loop looks at it this often.
SIMULATED_CLOCK_POLL_S = 0.005


class Wire(Protocol):
    """Where commands and reports go, and the node's clock."""

    def now_ns(self) -> int:
        """0 while there is no time yet (simulated time before the first message on /clock)."""
        ...

    def simulated_clock(self) -> bool: ...

    def send_command(self, command: ActionChunk, now_ns: int) -> None: ...

    def report_chunk(self, chunk: ActionChunk) -> None:
        """The whole chunk as predicted, before anything is dropped or corrected."""
        ...

    def report_tick(self, fields: Mapping[str, object]) -> None: ...

    def log(self, message: str, cause: str) -> None:
        """A warning; repetitions with the same cause may be thinned out."""
        ...


class PolicyLoop:
    """Runs from `start` to `stop`; may be started again.

    `settings` is called once per tick, so that a change applies from one chunk to the next. `instruction` may be set at
    any time to one that the bundle understands; "" means hold.
    """

    def __init__(
        self,
        policy: Policy,
        buffer: ObservationBuffer,
        wire: Wire,
        diagnostics: Diagnostics,
        settings: Callable[[], Settings],
    ) -> None:
        self.instruction = ""
        self._policy = policy
        self._buffer = buffer
        self._wire = wire
        self._diagnostics = diagnostics
        self._settings = settings
        self._executor = AsynchronousExecutor()
        self._limits = settings().limits
        self._gate = SafetyGate(policy.bundle.manifest.joints, self._limits)
        self._chunks = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def tick(self, settings: Settings, tick_ns: int, watch: Stopwatch) -> int | None:
        """One tick that starts at `tick_ns`; the index of the chunk that went out, or None if none was due.

        InputError, EngineError or SafetyRefusal when the arm must be held instead.
        """
        policy, bundle, wire = self._policy, self._policy.bundle, self._wire
        max_age_ns, tick_period_ns = _ns(settings.max_age_s), _ns(1.0 / settings.rate_hz)
        with watch.stage("observation"):
            observation = self._buffer.observe(tick_ns, max_age_ns, _ns(settings.sync_slop_s))
        instruction = self.instruction
        if not instruction:
            raise InstructionError("instruction: none yet; publish one on the policy's ~/instruction")
        if not self._executor.wants_chunk(tick_ns, _ns(settings.execution_horizon_s), tick_period_ns):
            return None
        with watch.stage("preprocess"):
            model_input = make_model_input(bundle.manifest, bundle.tokenizer, observation, instruction)
        with watch.stage("prefill"):
            cache = policy.prefill(model_input)
        with watch.stage("denoise"):
            actions_HA = policy.denoise(cache, policy.noise(self._chunks), model_input.state_J)
            chunk = policy.decode(actions_HA, observation)
        now_ns = wire.now_ns()
        with watch.stage("chunking"):
            measured_J = self._buffer.measured(now_ns, max_age_ns)
            reach = Reach(measured_J, self._gate.speed_J, _ns(settings.join_within_s))
            remaining = self._executor.join(chunk, now_ns, _ns(settings.lead_s), reach)
        with watch.stage("safety"):
            verdict = self._gate.judge(remaining, observation.stamp_ns, measured_J, now_ns)
        with watch.stage("publish"):
            wire.send_command(verdict.command, now_ns)
            self._executor.accept(verdict.command, tick_ns)
            wire.report_chunk(chunk)
        self._diagnostics.record_chunk(watch.stage_ms, verdict.corrections, time.monotonic())
        self._chunks += 1
        return self._chunks - 1

    def start(self) -> None:
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, name="policy loop")
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread, then brings the arm to rest; does nothing when not started."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._thread = None
        self._hold(self._settings())

    def _run(self) -> None:
        while self._wire.now_ns() == 0 and not self._stop.wait(SIMULATED_CLOCK_POLL_S):
            pass
        pacer = Pacer(self._wire.now_ns())
        while not self._stop.is_set():
            settings = self._settings()
            self._adopt(settings)
            self._tick_or_hold(settings, self._wire.now_ns(), pacer.missed)
            pacer.advance(self._wire.now_ns(), _ns(1.0 / settings.rate_hz))
            self._sleep_until_due(pacer)

    def _adopt(self, settings: Settings) -> None:
        self._policy.flow_steps = settings.flow_steps or self._policy.bundle.manifest.flow.steps
        self._policy.noise_seed = settings.noise_seed
        if settings.limits != self._limits:
            self._limits = settings.limits
            self._gate = SafetyGate(self._policy.bundle.manifest.joints, settings.limits)

    def _tick_or_hold(self, settings: Settings, tick_ns: int, missed: int) -> None:
        watch, instruction = Stopwatch(), self.instruction
        chunk_index: int | None = None
        hold: str | None = None
        try:
            chunk_index = self.tick(settings, tick_ns, watch)
        except KiVlaError as refusal:
            hold = str(refusal)
        except Exception as error:  # whatever it is, the arm must come to rest, and the next tick may do better
            hold = f"internal error: {error!r}"
            self._wire.log(traceback.format_exc(), "internal error")
        if hold is not None:
            self._wire.log(f"holding: {hold}", hold.partition(":")[0])
            self._hold(settings)
        self._diagnostics.record_tick(hold, instruction, missed)
        self._wire.report_tick(
            {
                "stamp_ns": tick_ns,
                "chunk_index": chunk_index,
                "instruction": instruction,
                "hold": hold,
                "stage_ms": {**watch.stage_ms, "total": watch.total_ms},
                "deadline_misses": missed,
            }
        )

    def _sleep_until_due(self, pacer: Pacer) -> None:
        while not self._stop.is_set():
            now_ns = self._wire.now_ns()
            if pacer.set_back(now_ns):
                self._wire.log("clock: it was set back; buffers and the running chunk are dropped", "clock")
                self._buffer.clear()
                self._executor.stop()
            left_s = (pacer.due_ns - now_ns) / NS_PER_S
            if left_s <= 0.0:
                return
            self._stop.wait(min(left_s, SIMULATED_CLOCK_POLL_S) if self._wire.simulated_clock() else left_s)

    def _hold(self, settings: Settings) -> None:
        """Ends a running chunk at the measured position, or, when that is not known, where the chunk is by now."""
        now_ns = self._wire.now_ns()
        commanded_J = self._executor.commanded_J(now_ns)
        self._executor.stop()
        if commanded_J is None:
            return  # nothing of ours moves the arm
        try:
            measured_J = self._buffer.measured(now_ns, _ns(settings.max_age_s))
            command = self._gate.hold(measured_J, now_ns, _ns(settings.hold_s))
        except (StaleInput, SafetyRefusal) as refusal:
            self._wire.log(f"hold: at the commanded position, because {refusal}", "hold")
            command = self._gate.hold(commanded_J, now_ns, _ns(settings.hold_s))
        self._wire.send_command(command, now_ns)


def _ns(duration_s: float) -> int:
    return round(duration_s * NS_PER_S)
