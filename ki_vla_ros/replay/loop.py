"""Drives the policy loop over a bag: the same loop as in the node, on the bag's clock.

    for tick in Replay(bag, bundle, engine, settings, topics, options).ticks():
        ...

The replay is open loop: the arm in the bag does what it did, so every chunk starts from what the robot really saw, and
the governor's motion is made against the recorded joint states.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.bundle import Bundle
from ki_vla_ros.engines.base import Engine
from ki_vla_ros.errors import ConfigurationError, InputError, KiVlaError, cause_of
from ki_vla_ros.messages import TEXT, BagMessage, decode
from ki_vla_ros.policy import check_instruction
from ki_vla_ros.records import NS_PER_S, ActionChunk, Motion, Observation, to_ns
from ki_vla_ros.replay.inputs import Feed, Inbox, ReplayBuffer
from ki_vla_ros.replay.latency import RecordedLatency, choose_latency
from ki_vla_ros.replay.policy import ReplayPolicy
from ki_vla_ros.replay.recorded import Activity, RecordedTick, read_tick
from ki_vla_ros.replay.setup import ReplayOptions
from ki_vla_ros.replay.ticks import Prediction, Seam, Tick
from ki_vla_ros.replay.topics import ReplayTopics, read_later_session
from ki_vla_ros.replay.wire import ReplayWire
from ki_vla_ros.runtime import (
    BURST_WAIT_NS,
    WATCHDOG_NS,
    Diagnostics,
    Pacer,
    PolicyLoop,
    alignment_ns,
    camera_sources,
    cubic,
    input_signals,
    own_limit_ns,
)
from ki_vla_ros.runtime.paths import LONGEST_GAP_NS
from ki_vla_ros.settings import Settings

# The first tick waits this long at most for the first message of every input.
START_WAIT_NS = 1_000_000_000
# No ticks are made after this long, this many periods, and this many times the oldest usable input without a message:
# they could only be held until the next one.
SILENCE_NS, SILENCE_PERIODS, SILENCE_AGES = 1_000_000_000, 3, 2
# A tick is recorded within a second of its stamp; one farther off was stamped by a clock that was not set, or another.
LARGEST_TICK_OFFSET_NS = 10_000_000_000


class MessageSource(Protocol):
    """The part of a bag that a replay needs."""

    @property
    def path(self) -> Path: ...

    def messages(self, topics: Collection[str] | None = None) -> Iterator[BagMessage]: ...


class Replay:
    """One pass over `bag`; `ticks` may be called once, and the caller keeps and closes the engine.

    `on_message` gets each message when its time has come. `on_tick` gets each tick at once, still without its
    reference, and the observation that its chunk was made from (None: it has no chunk).
    """

    def __init__(
        self,
        bag: MessageSource,
        bundle: Bundle,
        engine: Engine,
        settings: Settings,
        topics: ReplayTopics,
        options: ReplayOptions,
        on_message: Callable[[BagMessage], None] = lambda message: None,
        on_tick: Callable[[Tick, Observation | None], None] = lambda tick, observation: None,
    ) -> None:
        settings.validate_against(bundle.manifest)
        bundle = bundle.on_robot(settings.robot_description)
        # A replay sends nothing anyway, and a dry run would start each motion where the arm is.
        self.settings = settings.model_copy(update={"dry_run": False})
        self.topics, self.options, self.bundle = topics, options, bundle
        self._on_message, self._on_tick = on_message, on_tick
        self.refused, self.messages, self.not_reproduced = (Counter[str]() for _ in range(3))
        manifest = bundle.manifest
        self.latency = options.latency or choose_latency("", settings, topics.tick is not None)
        if isinstance(self.latency, RecordedLatency) and topics.tick is None:
            raise ConfigurationError(
                f"--latency recorded: expected a bag with the node's ticks, got none in {bag.path}; give seconds, or "
                "the metrics.json of a replay"
            )
        self._diagnostics = Diagnostics()
        self._wire = ReplayWire(self.latency)
        self._policy = ReplayPolicy(bundle, engine, self.latency, settings.guidance_jacobian)
        self._policy.warm_up()
        self._buffer = ReplayBuffer(
            camera_sources(manifest, settings, lambda name: name, topics.cameras),
            input_signals(manifest, topics.signals),
            own_limit_ns(settings.joint_max_age_s),
            self._policy.space.state,
        )
        self._loop = PolicyLoop(self._policy, self._buffer, self._wire, self._diagnostics, lambda: self.settings)
        for instruction in (settings.instruction, options.instruction, options.other_instruction):
            if instruction:
                check_instruction(bundle, instruction)
        self._loop.instruction = options.instruction or settings.instruction
        if not (self._loop.instruction or topics.instruction or topics.tick):
            raise ConfigurationError(f"bag {bag.path}: expected an instruction, got none; give one with --instruction")
        if options.as_recorded and topics.tick is None:
            raise ConfigurationError(
                f"bag {bag.path}: expected recorded ticks, got none; replay without --ticks recorded"
            )
        self.inbox = Inbox(
            topics,
            options,
            self._buffer,
            manifest.robot,
            manifest.image.size,
            settings.use_receive_time,
            self._where,
        )
        self._recorded: deque[RecordedTick] = deque()
        self._activity = Activity(settings.rate_hz)
        self._took: deque[tuple[int, int]] = deque()  # stamp and duration of recorded ticks, from the present one on
        self._pending: deque[Tick] = deque()
        self._motion: Motion | None = None
        self._number, self._probed_ns = 0, 0
        self.feed = Feed(iter(bag.messages(topics.all)), self._receive, self._foresee, _silence_ns(settings))
        self._buffer.feed, self._buffer.watch, self._buffer.paused = self.feed, self._watch, self.latency.paused
        self._buffer.count_refusal = self._count_refusal
        self.start_ns = self.feed.now_ns

    @property
    def now_ns(self) -> int:
        """How far the bag has been read, in its own time."""
        return self.feed.now_ns

    @property
    def stopped(self) -> str | None:
        return self._loop.latched

    def ticks(self) -> Iterator[Tick]:
        """Yields each tick as soon as the bag has shown what happened until its chunk's last action was due."""
        for known in self.steps():
            yield from known

    def steps(self) -> Iterator[Sequence[Tick]]:
        """Advances by one tick each time and yields the ticks known by then, to drive several replays side by side."""
        self._wire.clock_ns = self.feed.now_ns
        for tick in self._recorded_ticks() if self.options.as_recorded else self._paced_ticks():
            self._pending.append(tick)
            known = []
            while self._pending and self._is_known(self._pending[0]):
                known.append(self._with_reference(self._pending.popleft()))
            yield known
        yield self.take_pending()

    def take_pending(self) -> Sequence[Tick]:
        """The ticks not yielded yet, with the reference as far as the bag was read; for a pass that ends early."""
        pending = [self._with_reference(tick) for tick in self._pending]
        self._pending.clear()
        return pending

    # --- ticks

    def _paced_ticks(self) -> Iterator[Tick]:
        """Ticks as the node's thread would make them: on time, aligned with the cameras, while the node was active."""
        missed = 0
        while (start_ns := self._next_start()) is not None:
            self._loop.begin()
            self._advance(start_ns)
            pacer = Pacer(start_ns)
            pacer.missed = missed
            behind_ns: int | None = None
            while self._is_active(pacer.due_ns):
                self._advance(pacer.due_ns)
                settings = self.settings
                now_ns = self.feed.now_ns
                behind_before_ns, behind_ns = behind_ns, self._buffer.since_burst_ns(now_ns)
                if settings.align_to_cameras and behind_ns is not None and abs(behind_ns) <= BURST_WAIT_NS:
                    self.feed.advance(now_ns + BURST_WAIT_NS, until=lambda at=now_ns: self._buffer.has_burst(at))  # type: ignore[misc]
                tick, ended_ns = self._make_tick(self.feed.now_ns, pacer.missed, None)
                if tick.hold is not None and self.feed.ended:
                    return  # the bag ended while the tick was computed, so its outcome is unknown
                yield tick
                pacer.advance(ended_ns, to_ns(1.0 / settings.rate_hz))
                if settings.align_to_cameras:
                    pacer.shift(alignment_ns(behind_before_ns, behind_ns))
            missed = pacer.missed
            self._loop.rest()

    def _recorded_ticks(self) -> Iterator[Tick]:
        last_ns: int | None = None
        missed, period_ns = 0, to_ns(1.0 / self.settings.rate_hz)
        while True:
            self.feed.foresee(self.feed.now_ns + self._activity.gap_ns)
            if not self._recorded:
                if self.feed.ended:
                    return
                self._loop.rest()
                self._advance(max(self.feed.now_ns + self._activity.gap_ns, self.feed.next_ns))
                continue
            recorded = self._recorded.popleft()
            if last_ns is None or recorded.stamp_ns - last_ns > self._activity.gap_ns:
                self._loop.rest()
                self._loop.begin()
            last_ns = recorded.stamp_ns
            self._advance(recorded.stamp_ns)
            if not self.options.instruction:
                self._instruct(recorded.instruction)
            tick, ended_ns = self._make_tick(recorded.stamp_ns, missed, recorded)
            missed += (ended_ns - recorded.stamp_ns) // period_ns
            yield tick

    def _make_tick(self, tick_ns: int, missed: int, recorded: RecordedTick | None) -> tuple[Tick, int]:
        """Runs one tick; returns it and the time at which it ended."""
        ages = {name: status.age_ns for name, status in self._buffer.status(tick_ns).items()}
        target_before = self._loop.executing
        self._policy.decoded, self._diagnostics.last_corrections = None, ()
        self._buffer.recorded = recorded
        self._policy.chunk_index = None if recorded is None else recorded.chunk_index
        if self.options.noise_by_tick:
            self._policy.chunk_index = self._number
        self.latency.begin(self._number, self._took_ns(tick_ns) if recorded is None else recorded.took_ns)
        self._wire.begin_tick(tick_ns)
        if recorded is None or recorded.chunk_index is not None or recorded.hold is not None:
            self._loop.step(self.settings, tick_ns, missed)  # otherwise no chunk was due
        ended_ns = self._wire.end_tick()
        self._buffer.recorded = None
        report, motions = self._wire.report, self._wire.take_motions()
        prediction = None
        if self._policy.decoded is not None:
            seam = self._seam(target_before, motions, report.command_ns)
            prediction = self._prediction(*self._policy.decoded, tick_ns, ended_ns, seam)
            if recorded is not None and report.command_ns is not None:
                self.inbox.parity.add_made(prediction.start_ns, prediction.position_HJ)
        elif recorded is not None and recorded.chunk_index is not None:
            self.not_reproduced[report.hold or "executor: no chunk was due"] += 1
        if motions:
            self._motion = motions[-1]
        tick = Tick(
            number=self._number,
            stamp_ns=tick_ns,
            instruction=self._loop.instruction,
            hold=report.hold,
            age_ns=ages,
            latency_ns=ended_ns - tick_ns,
            missed=missed,
            stage_ms=report.stage_ms,
            motions=motions,
            prediction=prediction,
        )
        self._number += 1
        self._on_tick(tick, self._policy.decoded and self._policy.decoded[1])
        return tick, ended_ns

    def _prediction(
        self, chunk: ActionChunk, observation: Observation, tick_ns: int, ended_ns: int, seam: Seam | None
    ) -> Prediction:
        probes, every_ns = {}, self.options.probe_every_s * NS_PER_S
        if every_ns and tick_ns - self._probed_ns >= every_ns:
            self._probed_ns = tick_ns
            probes = self._policy.probe(observation, self.options.other_instruction, list(observation.frames))
        report = self._wire.report
        acted_ns = (report.command_ns or ended_ns) + to_ns(self.settings.lead_s)
        return Prediction(
            index=self._policy.drawn_index,
            start_ns=chunk.start_ns,
            period_ns=chunk.period_ns,
            position_HJ=chunk.position_HJ,
            reference_HJ=np.full_like(chunk.position_HJ, np.nan),
            measured_J=self._policy.space.measured(observation.signals),
            frame_ns={name: frame.stamp_ns for name, frame in observation.frames.items()},
            joint_ns=observation.joint_ns,
            command_ns=report.command_ns,
            refusal=report.hold if report.command_ns is None else None,
            corrections=self._diagnostics.last_corrections,
            consumed=sum(chunk.due_ns(k) < acted_ns for k in range(chunk.horizon)),
            seam=seam,
            probe_HJ=probes,
            counted_P4=self._policy.space.reference_P4.copy(),
        )

    def _seam(self, before: ActionChunk | None, motions: tuple[Motion, ...], command_ns: int | None) -> Seam | None:
        """The seam at which this tick's motion took over from one that was still running; None: there was none."""
        after, old = self._loop.executing, self._motion
        if before is None or after is None or command_ns is None or old is None or not motions:
            return None
        motion = motions[-1]
        at_ns = motion.from_ns
        if at_ns >= old.end_ns and before.due_ns(before.horizon - 1) < at_ns:
            return None
        time_N = np.array([at_ns])
        position_J, speed_J = (np.abs(a - b) for a, b in zip(motion.at(at_ns), old.at(at_ns), strict=True))
        jump_J = np.abs(cubic(after, time_N)[0][0] - cubic(before, time_N)[0][0])
        return Seam(at_ns, jump_J, position_J, speed_J, restarted=bool(np.any(position_J > 1e-6)))

    # --- the clock

    def _next_start(self) -> int | None:
        """When ticks are to begin, for the first time or again; None: the bag is over."""
        if self.topics.tick is None:
            return self._next_inputs()
        while True:
            self.feed.foresee(self.feed.now_ns + self._activity.gap_ns)
            if (start_ns := self._activity.begin_next()) is not None:
                return max(start_ns, self.feed.now_ns)
            if self.feed.ended:
                return None
            self._advance(max(self.feed.now_ns + self._activity.gap_ns // 2, self.feed.next_ns))

    def _next_inputs(self) -> int | None:
        """Goes to the next messages, however far away, and waits there until every input has come, or long enough."""
        while not self.feed.ended:
            has_all = partial(self._has_more, self._counts())
            first_ns = self.feed.next_ns
            self._advance(first_ns - 1)
            self.feed.advance(first_ns + START_WAIT_NS, until=has_all)
            if has_all() or not self.feed.in_silence:
                return self.feed.now_ns
        return None

    def _is_active(self, at_ns: int) -> bool:
        if self.topics.tick is None:
            self.feed.foresee(at_ns)
            return not (self.feed.ended or self.feed.silent_at(at_ns))
        self.feed.foresee(at_ns + self._activity.gap_ns)
        return at_ns <= self._activity.end_ns

    def _counts(self) -> Sequence[int]:
        """How many messages of every input have come."""
        status = self._buffer.status(self.feed.now_ns)
        return [status[name].count for name in (*self.topics.cameras, "joint state")]

    def _has_more(self, before: Sequence[int]) -> bool:
        return all(count > known for count, known in zip(self._counts(), before, strict=True))

    def _where(self, now_ns: int) -> NDArray[np.float64] | None:
        """Where the axes are, by what has come so far."""
        signal_M = self._buffer.newest(now_ns, to_ns(self.settings.max_age_s))
        return None if signal_M is None else self._policy.space.measured(signal_M)

    def _advance(self, until_ns: int) -> None:
        """Moves the clock, running the watchdog on the way."""
        self._watch(until_ns)
        self.feed.advance(until_ns)
        self._wire.clock_ns = max(self._wire.clock_ns, self.feed.now_ns)

    def _watch(self, until_ns: int) -> None:
        """Runs the watchdog up to `until_ns`, where a motion has gone so long without a fresh chunk that it matters.

        The node runs it every 20 ms; skipping the calls that could do nothing makes a replay faster.
        """
        motion, hold_ns = self._motion, to_ns(self.settings.hold_after_s)
        if motion is None or until_ns - motion.from_ns <= hold_ns:
            return
        first_ns = max(self.feed.now_ns, motion.from_ns + hold_ns - 2 * WATCHDOG_NS)
        for at_ns in range(first_ns, min(until_ns, motion.end_ns), WATCHDOG_NS):
            self.feed.advance(at_ns)
            with self._wire.standing_at(at_ns):
                self._loop.watch()

    # --- messages

    def _foresee(self, message: BagMessage) -> None:
        if message.topic != self.topics.tick:
            return
        try:
            tick = read_tick(decode(message, TEXT).data)
            if abs(off_ns := tick.stamp_ns - message.log_ns) > LARGEST_TICK_OFFSET_NS:
                raise InputError(
                    f"tick: expected a stamp within {LARGEST_TICK_OFFSET_NS / NS_PER_S:g} s of when it was recorded, "
                    f"got one {off_ns / NS_PER_S:+.1f} s from it"
                )
        except InputError as refusal:
            self._count_refusal(refusal)
            return
        if self.options.as_recorded:
            self._recorded.append(tick)
        elif tick.took_ns is not None:
            self._took.append((tick.stamp_ns, tick.took_ns))
        self._activity.add(tick.stamp_ns)
        if tick.instruction and not self._loop.instruction:
            self._instruct(tick.instruction)

    def _receive(self, message: BagMessage) -> None:
        self.messages[message.topic] += 1
        self._on_message(message)
        try:
            self._take(message)
        except (InputError, ConfigurationError) as refusal:
            self._count_refusal(refusal)

    def _take(self, message: BagMessage) -> None:
        if message.topic == self.topics.instruction:
            if not self.options.instruction:
                self._instruct(decode(message, TEXT).data)
        elif message.topic == self.topics.session:
            session = read_later_session(decode(message, TEXT).data)
            if session is not None and self.options.follow_session:
                settings = session.settings
                settings.validate_against(self.bundle.manifest)
                self.settings = settings.model_copy(update={"dry_run": False})
        else:
            self.inbox.take(message)

    def _instruct(self, instruction: str) -> None:
        if instruction == self._loop.instruction:
            return
        try:
            if instruction:
                check_instruction(self.bundle, instruction)
        except InputError as refusal:
            self._count_refusal(refusal)
        else:
            self._loop.instruction = instruction

    def _count_refusal(self, refusal: KiVlaError) -> None:
        self.refused[cause_of(str(refusal))] += 1

    def _took_ns(self, tick_ns: int) -> int | None:
        """What the chunk of the last recorded tick up to `tick_ns` took, else of the first one after; None: unknown."""
        while len(self._took) > 1 and self._took[1][0] <= tick_ns:
            self._took.popleft()
        return self._took[0][1] if self._took else None

    # --- reference

    def _is_known(self, tick: Tick) -> bool:
        """Whether the bag has passed everything that the tick's chunk covers."""
        chunk = tick.prediction
        return chunk is None or self.feed.now_ns > chunk.due_ns(len(chunk.position_HJ) - 1) + LONGEST_GAP_NS

    def _with_reference(self, tick: Tick) -> Tick:
        chunk = tick.prediction
        if chunk is None or self.inbox.reference is None:
            return tick
        due_H = chunk.start_ns + (np.arange(len(chunk.position_HJ)) + 1) * chunk.period_ns
        reference_HJ = self.inbox.answer(self.inbox.reference, due_H, chunk.start_ns)
        reference_HJ = self._policy.space.nearest(reference_HJ, chunk.position_HJ, chunk.counted_P4)
        if self.topics.tick is not None:  # after the node had stopped, the arm no longer answered the chunk
            reference_HJ[due_H > self._activity.end_of(tick.stamp_ns)] = np.nan
        return dataclasses.replace(tick, prediction=dataclasses.replace(chunk, reference_HJ=reference_HJ))


def _silence_ns(settings: Settings) -> int:
    ages_s = (settings.max_age_s, settings.joint_max_age_s, *(camera.max_age_s for camera in settings.cameras.values()))
    return max(SILENCE_NS, to_ns(SILENCE_PERIODS / settings.rate_hz), to_ns(SILENCE_AGES * max(ages_s)))
