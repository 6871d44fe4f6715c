"""A bag's messages as inputs of the policy, paced by a clock that the replay moves by hand.

`Feed` is the clock, `Inbox` sorts incoming messages, `ReplayBuffer` holds the inputs that the policy observes.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.errors import InputError, StaleInput
from ki_vla_ros.messages import POSE, TRAJECTORY, BagMessage, decode, pose_reading
from ki_vla_ros.records import NS_PER_S, CameraFrame, Observation, SignalReading, header_ns
from ki_vla_ros.replay.recorded import Parity, RecordedTick
from ki_vla_ros.replay.setup import ReplayOptions
from ki_vla_ros.replay.topics import ReplayTopics
from ki_vla_ros.robot import Robot
from ki_vla_ros.runtime import Latest, ObservationBuffer, Reading, Readings
from ki_vla_ros.runtime.paths import ArmPath, CommandedAxes, MeasuredPath

# A recorder may receive a message this much later than the node did. The buffer keeps frames for longer.
RECORDER_LAG_NS = 200_000_000


class Feed:
    """Passes messages to `received` when the clock reaches their log time, to `foreseen` as soon as they are read.

    `silences` and `silent_ns`: how many stretches longer than `silence_ns` had no message so far, and their sum.
    """

    def __init__(
        self,
        messages: Iterator[BagMessage],
        received: Callable[[BagMessage], None],
        foreseen: Callable[[BagMessage], None],
        silence_ns: int,
    ) -> None:
        self._messages, self._received, self._foreseen = messages, received, foreseen
        self.silence_ns, self.silences, self.silent_ns = silence_ns, 0, 0
        self._ahead: deque[BagMessage] = deque()
        self._all_read = False
        self.now_ns = 0
        self.foresee(0)
        if self._ahead:
            self.now_ns = self._ahead[0].log_ns
        self._heard_ns = self.now_ns  # log time of the last message that was passed on

    @property
    def ended(self) -> bool:
        return self._all_read and not self._ahead

    @property
    def next_ns(self) -> int:
        """When the next message is due; now, if there is none."""
        self.foresee(self.now_ns)
        return max(self.now_ns, self._ahead[0].log_ns) if self._ahead else self.now_ns

    @property
    def in_silence(self) -> bool:
        """Whether the next message, if there is one, comes more than `silence_ns` after the last."""
        self.foresee(self.now_ns)
        return not self._ahead or self._ahead[0].log_ns - self._heard_ns > self.silence_ns

    def silent_at(self, at_ns: int) -> bool:
        """Whether no message is due at or before `at_ns`, and none was passed on for `silence_ns` before it."""
        self.foresee(self.now_ns)
        return at_ns - self._heard_ns >= self.silence_ns and (self.ended or self._ahead[0].log_ns > at_ns)

    def foresee(self, until_ns: int) -> None:
        """Reads ahead to the first message after `until_ns`, without moving the clock."""
        while not self._all_read and (not self._ahead or self._ahead[-1].log_ns <= until_ns):
            message = next(self._messages, None)
            if message is None:
                self._all_read = True
                return
            self._ahead.append(message)
            self._foreseen(message)

    def advance(self, at_ns: int, until: Callable[[], bool] = lambda: False) -> None:
        """Moves the clock to `at_ns`, or to the moment at which `until` becomes true."""
        while not until():
            self.foresee(self.now_ns)
            if not self._ahead or self._ahead[0].log_ns > at_ns:
                self.now_ns = max(self.now_ns, at_ns)
                return
            message = self._ahead.popleft()
            if (silent_ns := message.log_ns - self._heard_ns) > self.silence_ns:
                self.silences, self.silent_ns = self.silences + 1, self.silent_ns + silent_ns
            self._heard_ns = message.log_ns
            self.now_ns = max(self.now_ns, message.log_ns)
            self._received(message)


class ReplayBuffer(ObservationBuffer):
    """An observation buffer that first takes in what the bag has up to the time it is asked about.

    `recorded` is set while a recorded tick is repeated: the observation is then made of the frames and joint states
    that the tick used, even if the recorder received them later than the node did.
    """

    feed: Feed
    watch: Callable[[int], None]
    paused: Callable[[], AbstractContextManager[None]]
    count_refusal: Callable[[InputError], None]
    recorded: RecordedTick | None = None

    def observe(self, now_ns: int, max_age_ns: int, slop_ns: int) -> Observation:
        with self.paused():
            self.feed.advance(now_ns)
            if self.recorded is not None:
                return self._as_recorded(self.recorded)
            while True:
                observation = super().observe(now_ns, max_age_ns, slop_ns)
                if (broken := self._broken(observation)) is None:
                    return observation
                self._drop(broken)

    def latest(self, now_ns: int, max_age_ns: int) -> Latest:
        with self.paused():
            if (tick := self.recorded) is not None and tick.joint_ns:
                spans = self._await_recorded(tick, {})
                joint_ns = tuple(span[-1] for span in spans)
                return self._latest(self._recorded_signals([(stamp,) for stamp in joint_ns], 0), joint_ns)
            self.feed.advance(now_ns)
        return super().latest(now_ns, max_age_ns)

    def newest(self, now_ns: int, max_age_ns: int) -> NDArray[np.float64] | None:
        """The signals [M] by what has come so far; None if they are not known."""
        try:
            return super().latest(now_ns, max_age_ns).signal_M
        except InputError:
            return None

    def measured(self, now_ns: int, max_age_ns: int) -> Latest:
        with self.paused():
            self.watch(now_ns)
            self.feed.advance(now_ns)
        return super().latest(now_ns, max_age_ns)

    def _broken(self, observation: Observation) -> CameraFrame | None:
        """The first frame whose pixels cannot be read; the node would have refused it on arrival."""
        for frame in observation.frames.values():
            try:
                _ = frame.rgb_HWC
            except InputError as refusal:
                self.count_refusal(refusal)
                self.refuse(frame.camera, str(refusal))
                return frame
        return None

    def _drop(self, frame: CameraFrame) -> None:
        with self._lock:
            kept = self._cameras[frame.camera].frames
            del kept[next(i for i, other in enumerate(kept) if other is frame)]

    def _as_recorded(self, tick: RecordedTick) -> Observation:
        if tick.chunk_index is None:
            raise StaleInput(tick.hold or "recorded: no chunk was due")
        if not (tick.frame_ns and tick.joint_ns):
            raise StaleInput("recorded: the recorded node did not say which frames it used")
        spans = self._await_recorded(tick, tick.frame_ns)
        frames = {}
        for name, stamp_ns in tick.frame_ns.items():
            camera = self._cameras.get(name)
            found = [frame for frame in camera.frames if frame.stamp_ns == stamp_ns] if camera else []
            if not found:
                raise StaleInput(f"recorded: camera {name!r}: the frame of stamp {stamp_ns} is not in the bag")
            frames[name] = found[0]
        stamp_ns = min(tick.frame_ns.values())
        signal_M = self._recorded_signals(spans, stamp_ns)
        return Observation(stamp_ns, frames, self._state(signal_M), tick.joint_ns, signal_M)

    def _await_recorded(self, tick: RecordedTick, frame_ns: Mapping[str, int]) -> Sequence[tuple[int, ...]]:
        """Advances until the bag has given what the tick used, or until it is too late for the recorder's lag.

        Returns the stamps of the readings that the tick used of each part.
        """

        def has_all() -> bool:
            stamps = {name: [frame.stamp_ns for frame in camera.frames] for name, camera in self._cameras.items()}
            frames = all(stamp in stamps.get(name, ()) for name, stamp in frame_ns.items())
            spans = tick.spans(len(self._parts))
            return (
                frames
                and spans is not None
                and all(
                    set(span) <= {stamp for stamp, _ in part.kept}
                    for part, span in zip(self._parts, spans, strict=True)
                )
            )

        self.feed.advance(tick.stamp_ns + RECORDER_LAG_NS, until=has_all)
        spans = tick.spans(len(self._parts))
        if spans is None:
            raise StaleInput(
                f"recorded: joint states: expected stamps of the {len(self._parts)} parts in which they come in the "
                f"bag, got {len(tick.joint_ns)}"
            )
        return spans

    def _recorded_signals(self, spans: Sequence[tuple[int, ...]], stamp_ns: int) -> NDArray[np.float64]:
        """All signals [M] at `stamp_ns`, made of each part's readings with these stamps."""
        values = []
        for part, span in zip(self._parts, spans, strict=True):
            readings = [self._reading(part, stamp) for stamp in span]
            value_G = readings[0][1] if len(span) == 1 else part.between(readings[0], readings[1], stamp_ns)
            values.append((part, value_G))
        return self._together(values)

    @staticmethod
    def _reading(part: Readings, stamp_ns: int) -> Reading:
        for reading in reversed(part.kept):
            if reading[0] == stamp_ns:
                return reading
        raise StaleInput(f"recorded: {part.kind}: the one of stamp {stamp_ns} is not in the bag")


class Inbox:
    """Sorts messages to the buffer, the paths and the parity check; `reference` is None where the bag has none."""

    def __init__(
        self,
        topics: ReplayTopics,
        options: ReplayOptions,
        buffer: ReplayBuffer,
        robot: Robot,
        image_size: int,
        use_receive_time: bool,
        where: Callable[[int], NDArray[np.float64] | None],
    ) -> None:
        """`where` says where the axes are by the newest readings, if they are known: a first command starts there."""
        self._where = where
        self.parity = Parity()
        self._topics, self._options, self._buffer = topics, options, buffer
        self._image_size, self._use_receive_time = image_size, use_receive_time
        self._cameras = {topic: name for name, topic in topics.cameras.items()}
        self._signals = set(topics.signals.values())
        self._outputs = {topic: name for name, topic in topics.commands.items()}
        self._types = {output.name: output.message_types for output in robot.outputs}
        self.measured = MeasuredPath(robot.signals, robot)
        self._commanded = CommandedAxes(robot)
        self.reference: ArmPath | None = None
        if topics.missing_reference is None:
            self.reference = self._commanded if topics.commands else self.measured

    def take(self, message: BagMessage) -> None:
        """Takes a message in; InputError if it cannot be used."""
        topic, topics = message.topic, self._topics
        if (camera := self._cameras.get(topic)) is not None:
            try:
                self._buffer.add_frame(self._frame(message), message.log_ns)
            except InputError as refusal:
                self._buffer.refuse(camera, str(refusal))
                raise
        elif topic in self._signals:
            try:
                kept = self._read_signals(message)
            except InputError as refusal:
                self._buffer.refuse(topic, str(refusal))
                raise
            self.measured.add(kept)
        elif (output := self._outputs.get(topic)) is not None:
            command = decode(message, *self._types[output])
            self._commanded.take(output, command, message.log_ns, self._where(message.log_ns))
        elif topic == topics.chunk and self._options.as_recorded:
            published = decode(message, TRAJECTORY)
            positions = np.array([point.positions for point in published.points], dtype=np.float64)
            self.parity.add_published(header_ns(published), positions)

    def answer(self, reference: ArmPath, due_N: NDArray[np.int64], since_ns: int) -> NDArray[np.float64]:
        """What the arm did [N, J] at the instants `due_N`, as the answer to a chunk that began at `since_ns`.

        NaN where the bag does not say, and after the arm was put elsewhere. Calls must come in order: whatever lies
        before `since_ns`, less a second, is forgotten.
        """
        answer_NJ = reference.at(due_N)
        jump_ns = self.measured.jump_after(since_ns)
        if jump_ns is not None:
            answer_NJ[due_N > jump_ns] = np.nan
        for path in (self.measured, self._commanded):
            path.forget(since_ns - NS_PER_S)
        return answer_NJ

    def _frame(self, message: BagMessage) -> CameraFrame:
        camera = self._cameras[message.topic]
        return self._options.read_frame(message, camera, self._image_size, self._use_receive_time)

    def _read_signals(self, message: BagMessage) -> Sequence[SignalReading]:
        if message.type == POSE:
            pose = pose_reading(message)
            if self._use_receive_time:
                pose = dataclasses.replace(pose, stamp_ns=message.log_ns)
            return self._buffer.add_pose(pose, message.log_ns, message.topic)
        joints = self._options.read_joints(message)
        if self._use_receive_time:
            joints = dataclasses.replace(joints, stamp_ns=message.log_ns)
        return self._buffer.add_joints(joints, message.log_ns, message.topic)
