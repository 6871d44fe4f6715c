"""The line from inputs to command, once per tick. No ROS: it ends at the `Wire`. thread.py runs it in real time."""

from __future__ import annotations

import dataclasses
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.engines.base import KVCache
from ki_vla_ros.errors import (
    EmergencyStop,
    InstructionError,
    KiVlaError,
    SafetyRefusal,
    StaleInput,
    cause_of,
)
from ki_vla_ros.policy import Policy, state_token
from ki_vla_ros.records import ActionChunk, Motion, MotionInterrupted, Observation, to_ns
from ki_vla_ros.robot import led_axes
from ki_vla_ros.runtime.chunking import ChunkExecutor
from ki_vla_ros.runtime.diagnostics import Diagnostics, Stopwatch
from ki_vla_ros.runtime.governor import START_GAP_S, Bounds, Governor, moved_room
from ki_vla_ros.runtime.observation import Latest, ObservationBuffer
from ki_vla_ros.runtime.pacing import READING_NS
from ki_vla_ros.runtime.safety import SafetyGate, axis_bounds
from ki_vla_ros.settings import Settings

# An arm may still trail this long after its motion has ended.
ARRIVING_NS = 100_000_000
# How often a motion that was finished too late is thrown away and made again, or two clocks are read again.
ATTEMPTS = 3
# Share of the speed limits that the ramp over ramp_in_s starts from.
FIRST_SHARE = 0.1
# How often the node and a replay call `watch`. An arm is held at most this much later than hold_after_s: a fifth of a
# tick at 10 Hz.
WATCHDOG_NS = 20_000_000


class Wire(Protocol):
    """The node's clocks, and where commands and reports go: ROS topics, a replay or a simulation."""

    def now_ns(self) -> int:
        """The node's time, which stamps are on; 0 while there is none (simulated, before the first /clock)."""
        ...

    def motion_ns(self) -> int:
        """The time by which the controller moves the arm: steady, whatever happens to the node's time.

        Simulated time moves a simulated arm too, so there both are the same.
        """
        ...

    def simulated_clock(self) -> bool: ...

    def moves_arm(self) -> bool:
        """Whether an arm follows the commands; in a replay and in shadow mode it does what someone else says."""
        ...

    def send_command(self, motion: Motion, now_ns: int, hold: bool = False) -> None:
        """Sends the motion, whose times are on the clock of `motion_ns`; `now_ns` is the present on it.

        All outputs of the robot get their part of it, or none does; a `hold` goes to all that can be reached.
        MotionInterrupted if it did not come to that, or if the motion before was cut short on the way to a controller.
        """
        ...

    def report_chunk(self, chunk: ActionChunk) -> None:
        """The whole chunk as predicted, before anything is dropped or corrected."""
        ...

    def report_tick(self, fields: Mapping[str, object]) -> None: ...

    def log(self, message: str, cause: str) -> None:
        """Logs a warning; repetitions with the same cause may be thinned out."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Prefix:
    """The backbone's keys and values, and what they were computed from."""

    cache: KVCache
    observation: Observation
    instruction: str
    tick_ns: int


@dataclasses.dataclass(frozen=True, eq=False)
class Sent:
    """A chunk that went out: its number, its observation, the time its motion was made for, and when it was sent.

    Times on the node's clock.
    """

    index: int
    observation: Observation
    joined_ns: int
    command_ns: int


class PolicyLoop:
    """Runs the policy tick by tick: observes, infers, makes the result safe and sends it.

    Between `begin` and `end` the caller calls `adopt` and `step` once per tick, and `watch` every WATCHDOG_NS; after
    `end` it may begin again. `settings` is called once per tick, so a change applies from one chunk to the next.
    `instruction` may be set at any time to one that the bundle understands; "" means hold. `end`, `watch`, `latch` and
    `reset` may be called from another thread: nothing of a tick that is running then reaches the wire after a latched
    stop or the end.
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
        self.buffer = buffer
        self.wire = wire
        self.diagnostics = diagnostics
        self.settings = settings
        manifest = policy.bundle.manifest
        self._space = policy.space
        self._executor = ChunkExecutor(
            manifest.horizon, manifest.action_period_ns, manifest.max_prefix_delay, self._space.velocity_J
        )
        self._governor = Governor(manifest.axis_names, settings().command_period_s, self._space.velocity_J)
        self._led_J = np.array(led_axes(manifest.axes))
        self._limits = settings().limits
        self._gate = self._make_gate(settings())
        self._prefix: Prefix | None = None
        self._chunks = 0
        # On the clock of the motion: when the newest chunk went out, and when the speed limits began to rise.
        self._fresh_ns = 0
        self._ramp_from_ns: int | None = None
        self._interrupted = False  # some axes did not do what they were told, and nothing has gone out since
        self._latched: str | None = None
        self._started = False  # `begin` or `reset` was called, and nothing has gone out since
        self._rest_ns: int | None = None  # since when the arm rests, on the clock of the motion; None: it moves
        self._left_J: NDArray[np.float64] | None = None  # where the axes were when the node let go of them
        self._held = False  # the running motion is already a hold
        self._waiting = ""  # why no chunk may go out before the running motion has ended; "": it may
        self._moving = threading.RLock()  # held by whoever changes what the arm does
        self._ended = False

    def tick(self, settings: Settings, tick_ns: int, watch: Stopwatch) -> Sent | None:
        """Runs the tick that starts at `tick_ns`; returns the chunk that went out, or None if none was due.

        InputError, EngineError or SafetyRefusal when the arm must be held instead.
        """
        policy, wire = self._policy, self.wire
        max_age_ns, lead_ns = to_ns(settings.max_age_s), to_ns(settings.lead_s)
        if self._latched is not None:
            raise SafetyRefusal(f"stopped: {self._latched}; call ~/reset when it is safe to move again")
        instruction = self.instruction
        prefix = self._usable_prefix(settings, tick_ns, instruction)
        with watch.stage("observation"):
            if prefix is None:
                observation = self.buffer.observe(tick_ns, max_age_ns, to_ns(settings.sync_slop_s))
            else:
                newest = self.buffer.latest(tick_ns, max_age_ns)
                frames, state_S = prefix.observation.frames, self._space.state(newest.signal_M)
                observation = Observation(newest.stamp_ns, frames, state_S, newest.joint_ns, newest.signal_M)
        if not instruction:
            raise InstructionError("instruction: none yet; publish one on the policy's ~/instruction")
        at_ns = wire.motion_ns()
        at_rest, waits = self._governor.at_rest(at_ns), self._waits(at_ns)
        if at_rest:
            self._waiting = ""
            self._count_anew(observation)
        if self._waiting:
            raise SafetyRefusal(self._waiting)
        if not self._executor.wants_chunk(settings, tick_ns, at_rest):
            return None
        if prefix is None:
            prefix = self._prefill(observation, instruction, tick_ns, watch)
        with watch.stage("denoise"):
            # A motion that has not begun yet is no reason to go on with it.
            condition = None if waits else self._executor.condition(settings, observation.stamp_ns)
            guide = None if condition is None else policy.guide(condition, observation)
            token_J = state_token(policy.bundle.manifest, observation.state_S)
            actions_HA = policy.denoise(prefix.cache, policy.noise(self._chunks), token_J, guide)
        with watch.stage("decode"):
            commanded_J = self._commanded(observation)
            chunk = policy.decode(actions_HA, observation, commanded_J)
            if self._space.beyond(chunk.position_HJ) and self._space.worn(commanded_J):
                self._waiting = "rotation: too far from where it is counted from; coming to rest to count anew"
                raise SafetyRefusal(self._waiting)
        with self._moving:
            now_ns = wire.now_ns()
            if self._latched is not None:
                raise SafetyRefusal(f"stopped: {self._latched}")
            if self._ended:
                return None
            measured, ahead_ns = self.buffer.measured(now_ns, max_age_ns), self._ahead_ns()
            measured_ns, measured_J = self._arm(measured, ahead_ns)
            self._governor.correct(measured_J, measured_ns)
            with watch.stage("safety"):
                screened, corrections = self._gate.screen(chunk, observation.stamp_ns, measured_J, now_ns)
            start_J, wait_ns = self._start(settings, measured.stamp_ns + ahead_ns, measured_ns, measured_J)
            # A chunk of which too little would be left does not wait: the controller gets to the start first.
            if start_J is not None and wait_ns > screened.horizon * screened.period_ns // 2:
                self._settle(settings, start_J, wait_ns, watch)
                raise SafetyRefusal(self._waiting)
            if start_J is None:  # the controller is on its way to where the running motion begins
                lead_ns, wait_ns = max(lead_ns, wait_ns), 0
            with watch.stage("chunking"):
                still = self._rest_ns is not None and observation.stamp_ns + ahead_ns >= self._rest_ns
                target = self._executor.join(settings, screened, now_ns, lead_ns + wait_ns, still)
                path = dataclasses.replace(target, start_ns=target.start_ns + ahead_ns)

            def follow(from_ns: int, at_ns: int) -> tuple[Motion, Bounds]:
                if self._latched is not None:
                    raise SafetyRefusal(f"stopped: {self._latched}")
                bounds = self._ramped(settings, from_ns, at_ns)
                return self._governor.follow(path, start_J, from_ns, at_ns, bounds), bounds

            self._send(follow, lead_ns, wait_ns, watch, measured_J, dry_run=settings.dry_run)
            with watch.stage("publish"):
                sent = Sent(self._chunks, observation, now_ns, wire.now_ns())
                self._executor.accept(target, tick_ns)
                if settings.dry_run:  # an arm that still moves has nothing fresh; whoever ends the dry run starts it
                    if not self._started:
                        self._leave()
                    self._started, self._ramp_from_ns = True, None
                else:
                    self._fresh_ns = wire.motion_ns()
                    self._held = self._started = self._interrupted = False
                    self._left_J = None
                wire.report_chunk(chunk)
        self._chunks += 1
        self.diagnostics.record_chunk(
            watch.stage_ms,
            corrections,
            time.monotonic(),
            age_ms=(sent.command_ns - prefix.observation.stamp_ns) / 1e6,
            skew_ms=(prefix.observation.newest_ns - prefix.observation.stamp_ns) / 1e6,
            delay=self._executor.delay(settings),
        )
        return sent

    def _arm(self, measured: Latest, ahead_ns: int) -> tuple[int, NDArray[np.float64]]:
        """When (on the clock of the motion) and where the axes were [J], by the newest of all readings.

        A part that was read earlier has gone on since, as it was told to.
        """
        at_ns, running = int(measured.stamp_M.max()) + ahead_ns, self._governor.running
        measured_J = self._place(measured.signal_M, at_ns)
        if running is None or measured.stamp_ns == at_ns - ahead_ns:
            return at_ns, measured_J
        stamp_J = self._space.stamps(measured.stamp_M)
        for stamp_ns in np.unique(stamp_J):
            told_J = running.at(at_ns)[0] - running.at(int(stamp_ns) + ahead_ns)[0]
            measured_J = np.where(stamp_J == stamp_ns, measured_J + told_J, measured_J)
        return at_ns, measured_J

    def _place(self, signal_M: NDArray[np.float64], motion_ns: int) -> NDArray[np.float64]:
        """Where the axes are [J] by the signals of that time; one that nobody measures is where it was sent."""
        measured_J, running = self._space.measured(signal_M), self._governor.running
        if np.isfinite(measured_J).all():
            return measured_J
        sent_J = np.zeros_like(measured_J) if running is None else running.at(motion_ns)[0]
        return np.where(self._space.unmeasured_J, sent_J, measured_J)

    def _commanded(self, observation: Observation) -> NDArray[np.float64]:
        """Where the axes were told to be at the observation [J]; before any command, where they were."""
        running, at_ns = self._governor.running, observation.stamp_ns + self._ahead_ns()
        return self._place(observation.signals, at_ns) if running is None else running.at(at_ns)[0]

    def _count_anew(self, observation: Observation) -> None:
        """Counts the rotations of a resting robot from where it is."""
        if not self._space.poses:
            return
        with self._moving:
            now_ns, running = self.wire.motion_ns(), self._governor.running
            if not self._governor.at_rest(now_ns):
                return
            measured_J = self._place(observation.signals, now_ns)
            sent_J = measured_J if running is None else running.position_NJ[-1]
            if self._space.worn(measured_J - sent_J):  # someone has turned it since, and it goes on from there
                counted_J = self._space.count_from(measured_J, sent_J)
            else:
                counted_J = self._space.count_from(sent_J)
            self._governor.recount(counted_J, self._space.reference_P4, now_ns)
            self._executor.stop()

    def _usable_prefix(self, settings: Settings, tick_ns: int, instruction: str) -> Prefix | None:
        """The last prefill's keys and values, if the expert may go on reading them (`prefill_period_s`)."""
        prefix = self._prefix
        if prefix is None or prefix.instruction != instruction:
            return None
        due = tick_ns - prefix.tick_ns >= to_ns(settings.prefill_period_s) - to_ns(1.0 / settings.rate_hz) // 2
        too_old = tick_ns - prefix.observation.stamp_ns > to_ns(settings.max_kv_age_s)
        return None if due or too_old else prefix

    def _prefill(self, observation: Observation, instruction: str, tick_ns: int, watch: Stopwatch) -> Prefix:
        self._prefix = None  # the engine's buffers are about to be overwritten
        cache = self._policy.see(observation, instruction, watch.stage)
        self._prefix = Prefix(cache, observation, instruction, tick_ns)
        return self._prefix

    def begin(self) -> None:
        """To be called before the first tick: chunks may go out from now on."""
        self._ended = False
        self._ramp_from_ns, self._started = None, True

    def end(self) -> None:
        """Lets no further chunk go out, not even that of a tick that is running, and brings the arm to rest."""
        self._ended = True
        self._hold(self.settings())
        self._leave()

    def rest(self) -> None:
        """Brings the arm to rest; the next tick may move it again."""
        self._hold(self.settings())

    def forget(self) -> None:
        """Drops every input and motion, because simulated time was set back and nothing is where it was."""
        with self._moving:
            self.clock_stepped(back=True)
            self._governor.forget()
            self._ramp_from_ns = None

    def clock_stepped(self, back: bool) -> None:
        """Drops what its stamps say nothing about any more; the motion goes on, because it is on another clock."""
        with self._moving:
            self._executor.stop()
            self._prefix = None
            if back:
                self.buffer.clear()

    def watch(self, interruption: Callable[[], MotionInterrupted | None] = lambda: None) -> None:
        """The watchdog: holds an arm that moves without a fresh chunk; to be called every WATCHDOG_NS.

        `interruption` says, once, if some axes do not do what they were told; then all the others come to rest too.
        """
        settings = self.settings()
        with self._moving:
            if (found := interruption()) is not None:
                self.wire.log(f"holding: {found}", cause_of(str(found)))
                self.diagnostics.record_refusal(str(found))
                self._interrupt(found, self._gate.bounds)
                self._hold(settings)
                return
            at_ns = self.wire.motion_ns()
            late_ns = at_ns - self._fresh_ns
            if self._held or self._governor.at_rest(at_ns) or late_ns <= to_ns(settings.hold_after_s):
                return
            reason = f"watchdog: no fresh chunk for {late_ns / 1e6:.0f} ms, limit {settings.hold_after_s * 1e3:.0f} ms"
            self.wire.log(f"holding: {reason} (hold_after_s)", "watchdog")
            self.diagnostics.record_refusal(reason)
            self._hold(settings)

    def latch(self, reason: str) -> None:
        """Stops the arm at once and keeps it stopped until `reset`."""
        self._latched = reason  # before the lock: a tick that has it sends nothing more
        with self._moving:
            self.wire.log(f"stopped: {reason}", "stop")
            self._hold(self.settings())
            self._leave()

    def describe_limits(self) -> str:
        """The limits in force for each joint, in words: positions, speed and acceleration."""
        names, bounds = self._policy.bundle.manifest.axis_names, self._gate.bounds
        rows = zip(names, bounds.lower_J, bounds.upper_J, bounds.speed_J, bounds.acceleration_J, strict=True)
        return "; ".join(f"{name} {low:.3f} to {high:.3f}, {v:.3f}/s, {a:.2f}/s^2" for name, low, high, v, a in rows)

    def reset(self) -> bool:
        """Releases a latched stop; returns whether there was one."""
        with self._moving:
            was, self._latched, self._ramp_from_ns, self._started = self._latched, None, None, True
        return was is not None

    @property
    def executing(self) -> ActionChunk | None:
        """The target that is being executed; None at rest or after a hold."""
        return self._executor.running

    @property
    def latched(self) -> str | None:
        return self._latched

    def adopt(self, settings: Settings) -> None:
        """Applies, between two ticks, the settings that a tick does not read itself."""
        self._policy.flow_steps = settings.flow_steps or self._policy.bundle.manifest.flow.steps
        self._policy.noise_seed = settings.noise_seed
        if settings.limits == self._limits:
            return
        gate = self._make_gate(settings)
        with self._moving:
            self._limits, self._gate = settings.limits, gate
            if not self._governor.keeps(gate.bounds, self.wire.motion_ns()):
                # Braked as hard as the limits allow that it was made within: the new ones may be too low to stop.
                self._waiting = "limits: became tighter than the running motion; coming to rest first"
                self._hold(settings)

    def _make_gate(self, settings: Settings) -> SafetyGate:
        axes = self._policy.bundle.manifest.axes
        bounds = axis_bounds(axes, settings.limits, settings.robot_description)
        return SafetyGate(axes, settings.limits, bounds)

    def _ramped(self, settings: Settings, from_ns: int, at_ns: int) -> Bounds:
        """The bounds of a motion that takes over at `from_ns`; `at_ns` is the present.

        The speed limits rise over ramp_in_s, from where the first motion after a start or a reset begins.
        """
        if self._ramp_from_ns is None or self._ramp_from_ns > at_ns:
            self._ramp_from_ns = from_ns
        share = self._ramp_share(settings, from_ns)
        if share >= 1.0:
            return self._gate.bounds
        # After an interruption, the limits rise with the next motion: one that is cut short again moved slowly.
        rise_per_s = 0.0 if self._interrupted else (1.0 - FIRST_SHARE) / settings.ramp_in_s
        return dataclasses.replace(self._gate.bounds, ramp=(share, rise_per_s))

    def _ramp_share(self, settings: Settings, now_ns: int) -> float:
        since_ns = 0 if self._ramp_from_ns is None else max(0, now_ns - self._ramp_from_ns)
        if since_ns >= to_ns(settings.ramp_in_s):
            return 1.0
        return FIRST_SHARE + (1.0 - FIRST_SHARE) * since_ns / to_ns(settings.ramp_in_s)

    def step(self, settings: Settings, tick_ns: int, missed: int) -> None:
        """Runs a tick and reports it; whatever it raises becomes a hold."""
        watch, instruction = Stopwatch(), self.instruction
        sent: Sent | None = None
        hold: str | None = None
        try:
            self.adopt(settings)
            sent = self.tick(settings, tick_ns, watch)
        except EmergencyStop as fault:
            hold = str(fault)
            self.latch(hold)
        except KiVlaError as refusal:
            hold = str(refusal)
        except Exception as error:  # whatever it is, the arm must come to rest; the next tick may succeed
            hold = f"internal error: {error!r}"
            self.wire.log(traceback.format_exc(), "internal error")
        if hold is not None:
            self.wire.log(f"holding: {hold}", cause_of(hold))
            self._prefix = None
            self._hold(settings)
        self.diagnostics.record_tick(hold, instruction, missed)
        self.wire.report_tick(
            {
                "stamp_ns": tick_ns,
                "chunk_index": sent and sent.index,
                "observation_ns": sent and sent.observation.stamp_ns,
                "newest_image_ns": sent and sent.observation.newest_ns,
                "frame_ns": sent and {name: frame.stamp_ns for name, frame in sent.observation.frames.items()},
                "joint_ns": sent and sent.observation.joint_ns,
                "joined_ns": sent and sent.joined_ns,
                "command_ns": sent and sent.command_ns,
                "instruction": instruction,
                "hold": hold,
                "stage_ms": {**watch.stage_ms, "total": watch.total_ms},
                "deadline_misses": missed,
            }
        )

    def _send(
        self,
        make: Callable[[int, int], tuple[Motion, Bounds]],
        lead_ns: int,
        wait_ns: int,
        watch: Stopwatch,
        measured_J: NDArray[np.float64] | None,
        dry_run: bool = False,
        hold: bool = False,
    ) -> None:
        """Sends what `make` makes of (when it takes over, now), at least `wait_ns` before it takes over.

        A motion that is finished later is thrown away and made again: the controller has gone on without it. With
        `measured_J` the gate judges it. SafetyRefusal if the gate does not let it pass, or if all were late.
        """
        more_ns = took_ns = 0
        for _ in range(ATTEMPTS):
            with watch.stage("chunking"):
                at_ns = self.wire.motion_ns()
                from_ns = self._governor.handover_ns(at_ns, lead_ns + wait_ns + more_ns)
                motion, bounds = make(from_ns, at_ns)
            if measured_J is not None:
                with watch.stage("verify"):
                    self._gate.judge(motion, measured_J)
            with watch.stage("publish"):
                sent_ns = self.wire.motion_ns()
                # Whatever stopped the process once need not do it again; only then is it slow, and gets more time.
                more_ns, took_ns = 2 * took_ns, sent_ns - at_ns
                late_ns = sent_ns + wait_ns - from_ns
                if late_ns > 0:
                    continue
                if dry_run:
                    return  # the running motion stays what the arm was really told
                try:
                    self.wire.send_command(motion, sent_ns, hold)
                except MotionInterrupted as interruption:
                    self._interrupt(interruption, bounds)
                    raise
                self._governor.commit(motion, bounds)
                return
        raise SafetyRefusal(
            f"motion: finished {late_ns / 1e6:.0f} ms after it had to be sent, {ATTEMPTS} times running; "
            "is this computer overloaded? Free it, or raise lead_s"
        )

    def _interrupt(self, interruption: MotionInterrupted, bounds: Bounds) -> None:
        """Notes what some axes do instead of what they were told; with that, nothing is a hold of all axes any more.

        The next motion begins slowly: a controller that refuses every goal would let the others move on and on.
        """
        motion, running, at_ns = interruption.motion, self._governor.running, self.wire.motion_ns()
        self._held, self._ramp_from_ns, self._interrupted = False, None, True
        if (unknown_NJ := np.isnan(motion.position_NJ)).any():
            if running is None:
                return
            try:
                max_age_ns = to_ns(self.settings().max_age_s)
                place_J = self._place(self.buffer.measured(self.wire.now_ns(), max_age_ns).signal_M, at_ns)
            except StaleInput:
                place_J = running.at(at_ns)[0]  # about so far it had got
            motion = dataclasses.replace(motion, position_NJ=np.where(unknown_NJ, place_J, motion.position_NJ))
        self._governor.interrupt(motion, interruption.axis_J, bounds)

    def _ahead_ns(self) -> int:
        """How far the clock of the motion is ahead of the node's; a process may be stopped between reading the two."""
        for _ in range(ATTEMPTS):
            before_ns, now_ns, after_ns = self.wire.motion_ns(), self.wire.now_ns(), self.wire.motion_ns()
            if after_ns - before_ns < READING_NS:
                break
        return after_ns - now_ns

    def _start(
        self, settings: Settings, oldest_ns: int, measured_ns: int, measured_J: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64] | None, int]:
        """Where the next motion starts at rest, and the time in ns that the controller needs to get there.

        (None, time) if the running motion goes on instead. `measured_ns`, and `oldest_ns` of the oldest reading, are on
        the clock of the motion. SafetyRefusal if the arm is not where a running motion, or a stream, should have
        brought it.
        """
        governor, at_ns = self._governor, self.wire.motion_ns()
        running = governor.running
        if not self._waits(at_ns):  # else it still rests as it did
            self._rest_ns = 0 if running is None else running.end_ns if governor.at_rest(at_ns) else None
        if not self.wire.moves_arm():  # someone else may move it at any time
            self._rest_ns = None
        if running is None:
            return self._start_from_rest(settings, measured_J, measured_J, at_ns)
        # The arm has gone on since it was measured, as it was told to.
        arm_J = measured_J + running.at(at_ns)[0] - running.at(measured_ns)[0]
        if governor.at_rest(at_ns):
            if oldest_ns < running.time_N[0] and self.wire.moves_arm():  # nobody knows how far it went before that
                raise SafetyRefusal(
                    f"start: expected a joint state since the last motion began, got one from "
                    f"{(int(running.time_N[0]) - oldest_ns) / 1e6:.0f} ms before; waiting for the next"
                )
            return self._start_from_rest(settings, running.position_NJ[-1], arm_J, at_ns)
        off_J = np.abs(running.at(at_ns)[0] - arm_J)
        away_J = (off_J > self._trailing_J()) & self._led_J
        if not away_J.any():
            return None, max(0, int(running.time_N[0]) - at_ns)
        if not self.wire.moves_arm():
            return measured_J, 0
        where = self._describe_away(away_J, off_J)
        raise SafetyRefusal(f"{where} (limits.max_jump_s): is it blocked, or moved by someone else?")

    def _waits(self, at_ns: int) -> bool:
        """Whether the running motion has not begun: the controller is on its way to where it starts."""
        running = self._governor.running
        return running is not None and int(running.time_N[0]) > at_ns

    def _trailing_J(self) -> NDArray[np.float64]:
        """How far [J] a moving arm may trail its command."""
        trailing_J: NDArray[np.float64] = self._gate.bounds.speed_J * self._limits.max_jump_s
        return trailing_J

    def _start_from_rest(
        self, settings: Settings, sent_J: NDArray[np.float64], arm_J: NDArray[np.float64], at_ns: int
    ) -> tuple[NDArray[np.float64], int]:
        governor, bounds = self._governor, self._gate.bounds
        # A velocity has no place that it was sent to, and a stream is at once where its first position is.
        velocity_J, streams_J = self._space.velocity_J, self._streams(settings)
        off_J = np.where(velocity_J, 0.0, np.abs(sent_J - arm_J))
        room_J = moved_room(bounds)
        if governor.running is not None and at_ns < governor.running.end_ns + ARRIVING_NS:
            room_J = np.maximum(room_J, bounds.speed_J * START_GAP_S)  # it has just arrived, and may still trail
        away_J = off_J > room_J
        if settings.dry_run or not self.wire.moves_arm():  # no controller has to get there first
            return (arm_J if away_J.any() else np.where(velocity_J, arm_J, sent_J)), 0
        # A gripper that holds something never gets to where it was sent. One that is not where this node left it was
        # moved since, and must not go back, with what it may hold now; nor may a stream jump if nobody knows.
        moved_J = streams_J if self._left_J is None else np.abs(arm_J - self._left_J) > room_J
        away_J &= self._led_J | (moved_J & self._started)
        if away_J.any() and not self._started:  # between deactivation and activation it may be anywhere
            where = self._describe_away(away_J, off_J)
            if (away_J & streams_J).any():
                raise SafetyRefusal(
                    f"{where}, and a stream would make it jump; find out why, then call ~/reset to go on from there"
                )
            self.wire.log(f"{where}; continuing from where it is", "moved")
        if self._ramp_share(settings, at_ns) < 1.0:  # a speed within limits that rise so fast rises no faster
            rise_J = (1.0 - FIRST_SHARE) * bounds.speed_J / settings.ramp_in_s
            bounds = dataclasses.replace(bounds, acceleration_J=np.minimum(bounds.acceleration_J, rise_J))
        start_J, settle_J = governor.start(arm_J, away_J | velocity_J, bounds, first=self._started)
        return start_J, to_ns(float(settle_J[~(streams_J | velocity_J)].max(initial=0.0)))

    def _leave(self) -> None:
        """Notes where the axes are: until the next start anyone may move them."""
        try:
            measured = self.buffer.measured(self.wire.now_ns(), to_ns(self.settings().max_age_s))
        except StaleInput:
            self._left_J = None
        else:
            self._left_J = self._space.measured(measured.signal_M)

    def _streams(self, settings: Settings) -> NDArray[np.bool_]:
        """Which axes' controllers take one value after the other [J]."""
        robot = self._policy.bundle.manifest.robot
        streamed = [output.streams(settings.publish_mode) for output in robot.outputs]
        return np.array([streamed[axis.output] for axis in robot.axes])

    def _describe_away(self, away_J: NDArray[np.bool_], off_J: NDArray[np.float64]) -> str:
        j = int(np.argmax(away_J))
        joint = self._policy.bundle.manifest.axes[j]
        return f"arm: joint {joint.name!r} is {off_J[j]:.3f} {joint.unit} from where it was sent"

    def _settle(self, settings: Settings, start_J: NDArray[np.float64], wait_ns: int, watch: Stopwatch) -> None:
        """Leads the controller to where the next motion starts; chunks wait until it is there."""

        def settle(from_ns: int, at_ns: int) -> tuple[Motion, Bounds]:
            self._ramped(settings, from_ns, at_ns)  # begins with this motion
            return self._governor.settle(start_J, from_ns), self._gate.bounds

        self._waiting = "start: the controller is being led to where the arm is; the next chunk follows from there"
        self._send(settle, to_ns(settings.lead_s), wait_ns, watch, None)
        self._held, self._started = True, False

    def _brake(self, from_ns: int, at_ns: int) -> tuple[Motion, Bounds]:
        return self._governor.brake(from_ns, at_ns, self._gate.bounds.acceleration_J)

    def _hold(self, settings: Settings) -> None:
        """Brakes on the commanded path, if a motion of ours moves the arm that is not a hold already."""
        with self._moving:
            self._executor.stop()
            for _ in range(2):  # again if it was not sent, as a motion before had been cut short
                if self._held or self._governor.at_rest(self.wire.motion_ns()):
                    return
                try:  # in a dry run too: something sent before it is still moving the arm
                    self._send(self._brake, to_ns(settings.lead_s), 0, Stopwatch(), None, hold=True)
                    self._held = True
                except MotionInterrupted as interruption:
                    self.wire.log(f"hold: {interruption}", "hold")
                except SafetyRefusal as refusal:
                    self.wire.log(f"hold: {refusal}", "hold")
                    return
                except Exception:  # whatever it is, who stops or watches goes on; the watchdog tries again
                    self.wire.log(traceback.format_exc(), "internal error")
                    return
