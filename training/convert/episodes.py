"""From a bag to frames of episodes: what the node would have observed, tick by tick, and the action that followed.

The bag's messages go through the node's own `ObservationBuffer` in order of arrival; every 1 / fps seconds it is asked
for an observation, as in the node's tick. So a frame's state and images belong together exactly as at run time. Only
the images that become frames are decoded; one that is damaged is then refused, and the tick takes the one before. A
frame's action is what belongs to the instant one period after its stamp (actions.py).
Legend: J axes, H W C of an image.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.bags import Bag
from ki_vla_ros.errors import ConfigurationError, InputError, StaleInput
from ki_vla_ros.files import parse_json
from ki_vla_ros.messages import TEXT, BagMessage, decode, joint_reading, pose_reading, read_stamp_ns
from ki_vla_ros.records import NS_PER_S, Observation
from ki_vla_ros.robot import JOINT_STATE, CommandSpace, continued_rotation
from ki_vla_ros.runtime import CameraSource, ObservationBuffer
from training.convert.actions import ActionPath, Actions, Commanded, Measured
from training.convert.beginning import Beginning
from training.convert.clock import Clock, ClockChoice, choose_clock
from training.convert.images import RecordedImage
from training.convert.integrity import EpisodeWatch, Report, find_pairs
from training.convert.sources import Sources
from training.data.lerobot import RobotColumns

# No observation is possible after this long, and this many times the oldest usable input, without a message.
SILENCE_NS: Final = NS_PER_S
SILENCE_AGES: Final = 2
Cut = Literal["auto", "marker", "instruction", "bag"]


@dataclass(frozen=True)
class Marker:
    """A topic (std_msgs/String, JSON) on which a new value of `key` begins an episode; null only ends one.

    The JSON may also have "instruction", the episode's until another arrives, and "begin_ns", the earliest stamp of
    its images and joint states (default: the marker's time of arrival).
    """

    topic: str
    key: str


DATASET_MARKER: Final = Marker("/dataset/episode", "episode_index")
"""That of the bags that we make from datasets."""
STATUS, RESET_ID = "/status", "reset_id"  # the end of a simulator's topic, and the key that its messages have
LOOKED_AT: Final = 20  # messages of such a topic
MOST_TASKS: Final = 5  # that are named


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One row of a dataset: vectors by column, in its units; images by camera name, and the files that they were
    recorded as, where they were any."""

    stamp_ns: int
    task: str
    columns: Mapping[str, NDArray[np.floating]]
    images: Mapping[str, NDArray[np.uint8]]
    files: Mapping[str, bytes | None] = field(default_factory=dict)


class FrameWriter(Protocol):
    def add(self, frame: Frame) -> None: ...

    def end_episode(self) -> None:
        """End the episode, if a frame was added since the last."""
        ...


@dataclass
class Conversion:
    """What became of a bag: frames and episodes written, and what was left out and why."""

    frames: int = 0
    episodes: int = 0
    repeated: int = 0  # frames with the same observation as the one before
    left_out: Counter[str] = field(default_factory=Counter)  # ticks, and messages, by reason
    first_reason: dict[str, str] = field(default_factory=dict)  # an example of each
    reports: list[Report] = field(default_factory=list)  # of each episode written
    said: list[str] = field(default_factory=list)  # what else to know of it

    def leave_out(self, cause: str, example: str | None = None, count: int = 1) -> None:
        self.left_out[cause] += count
        if example is not None:
            self.first_reason.setdefault(cause, example)


def convert(
    bag: Bag,
    sources: Sources,
    writer: FrameWriter,
    *,
    fps: int,
    actions: Actions,
    cut: Cut = "auto",
    marker: Marker | None = None,
    task: str | None = None,
    least_frames: int = 2,
    clock: ClockChoice = "auto",
    done: Conversion | None = None,
) -> Conversion:
    """Write the bag's frames; ConfigurationError if the bag lacks what was asked for.

    `task` is the instruction until the bag gives one, by default that of the node's settings. A gap, a tick at which
    the node would have held, ends an episode, because an episode's frames are evenly spaced. Episodes of fewer than
    `least_frames` are left out. `done` is kept up to date, for who wants to know after an error, and returned.
    """
    commands = actions == "commands"
    sources = sources.within(bag, commands)
    marker = choose_marker(bag, cut, marker)
    instructed, first_task = bag.has_messages(sources.instruction_topic), sources.instruction if task is None else task
    if not instructed and (cut == "instruction" or (first_task is None and marker is None)):
        raise ConfigurationError(
            f"bag {bag.path}: expected instructions on {sources.instruction_topic}, found none; give one with --task "
            "(and --episodes bag), or name their topic with --instruction"
        )
    at_instructions = marker is None and cut != "bag" and instructed
    done = Conversion() if done is None else done
    beginning = Beginning(bag, sources, commands)
    beginning.check()
    chosen = "log" if sources.use_receive_time and clock == "auto" else clock
    times = choose_clock(beginning.stamps, chosen, f"bag {bag.path}")
    done.said += times.said
    cutter = _Cutter(sources, writer, fps, actions, at_instructions, marker, task, least_frames, times, done)
    topics = {*sources.cameras.values(), *sources.signal_topics, sources.instruction_topic, *cutter.followed.topics}
    return cutter.run(bag.messages(topics | ({marker.topic} if marker else set())))


def choose_marker(bag: Bag, cut: Cut, given: Marker | None) -> Marker | None:
    """The marker to cut at (None: at instructions, or not at all).

    ConfigurationError if the bag lacks it, or if it has several and none was given.
    """
    if cut in ("instruction", "bag"):
        return None
    resets = [] if given else [Marker(topic, RESET_ID) for topic in sorted(bag.topics) if _has_resets(bag, topic)]
    found = [marker for marker in (resets or [given or DATASET_MARKER]) if bag.has_messages(marker.topic)]
    if len(found) > 1:
        topics = ", ".join(marker.topic for marker in found)
        raise ConfigurationError(
            f"bag {bag.path}: expected markers of episodes on one topic, got {topics}; choose with --marker TOPIC "
            f"{RESET_ID}, or take --episodes bag"
        )
    if not found and (given or cut == "marker"):
        wanted = given.topic if given else f"a topic .../status with {RESET_ID!r}, or on {DATASET_MARKER.topic}"
        raise ConfigurationError(
            f"bag {bag.path}: expected markers of episodes on {wanted}, found none; name another with --marker TOPIC "
            "KEY, or take --episodes bag"
        )
    return found[0] if found else None


def _has_resets(bag: Bag, topic: str) -> bool:
    """Whether a topic says in JSON when the robot was put back to its beginning."""
    if not topic.endswith(STATUS) or bag.topics[topic].type != TEXT:
        return False
    for message in islice(bag.messages({topic}), LOOKED_AT):
        with suppress(InputError, ValueError):
            fields = parse_json(decode(message).data)
            if isinstance(fields, dict) and RESET_ID in fields:
                return True
    return False


@dataclass(frozen=True, slots=True, eq=False)
class _Pending:
    """A frame that waits for its action."""

    observation: Observation
    task: str
    due_ns: int


@dataclass(frozen=True, slots=True, eq=False)
class _Ready:
    """A frame, and its numbers in the robot's units."""

    frame: Frame
    state_S: NDArray[np.float64]
    action_D: NDArray[np.float64]


class _Cutter:
    """Takes a bag's messages in order of arrival and cuts them into episodes."""

    def __init__(
        self,
        sources: Sources,
        writer: FrameWriter,
        fps: int,
        actions: Actions,
        cut_at_instructions: bool,
        marker: Marker | None,
        task: str | None,
        least_frames: int,
        clock: Clock,
        done: Conversion,
    ) -> None:
        self.done = done
        self.sources, self.writer, self.marker, self.clock = sources, writer, marker, clock
        self.cut_at_instructions, self.least_frames = cut_at_instructions, least_frames
        self.given_task, self.task = task, sources.instruction if task is None else task
        self.tasks: Counter[str] = Counter()  # frames by task
        self.fps, self.period_ns = fps, round(NS_PER_S / fps)
        robot = sources.robot
        self.space, self.columns = CommandSpace(robot), RobotColumns(robot)
        self.buffer = ObservationBuffer(
            [CameraSource(n, t, max_age_ns=sources.camera_age_ns.get(n)) for n, t in sources.cameras.items()],
            robot.signals,
            sources.joint_age_ns,
            self.space.state,
        )
        oldest_s = {name: sources.camera_age_ns.get(name, sources.max_age_ns) / NS_PER_S for name in sources.cameras}
        joint_age_s = (sources.joint_age_ns or sources.max_age_ns) / NS_PER_S
        self.watch = EpisodeWatch(oldest_s, robot.signals, joint_age_s, fps, find_pairs(robot))
        self.types = {signal.topic: signal.type for signal in robot.signals}
        self.followed: ActionPath = (
            Commanded(sources, self.space, clock) if actions == "commands" else Measured(sources, self.space)
        )
        self.commanded = frozenset(self.followed.topics)
        self.camera_of = {topic: name for name, topic in sources.cameras.items()}
        self.marked: Any = None
        self.begin_ns: int | None = None  # when the first tick is; None: no episode yet
        self.began = False  # an episode, ever
        self.ticks = 0
        self.taken_ns: int | None = None  # earliest stamp that belongs to the episode
        self.waiting: deque[_Pending | str] = deque()  # frames, and the reasons for gaps between them
        self.held: list[_Ready] = []  # the first frames of a piece, until there are enough of them
        self.written = 0  # frames of the piece
        self.before_S: NDArray[np.float64] | None = None  # state and action of the frame before, in the piece
        self.before_D: NDArray[np.float64] | None = None
        self.last_ns: int | None = None
        self.heard_ns = 0  # when the last message came
        ages_ns = (sources.max_age_ns, sources.joint_age_ns or 0, *sources.camera_age_ns.values())
        self.silence_ns = max(SILENCE_NS, SILENCE_AGES * max(ages_ns))

    def run(self, messages: Iterable[BagMessage]) -> Conversion:
        log_ns = taken = 0
        for message in messages:
            log_ns = message.log_ns
            taken += 1
            self._advance(log_ns)
            self.heard_ns = log_ns
            self._forget(log_ns)
            try:
                self._take(message)
            except InputError as error:
                self.done.leave_out(f"message on {message.topic}", str(error))
        self._end_episode(log_ns)
        if taken and not self.began:
            mark = f"mark on {self.marker.topic}" if self.marker is not None else "instruction that can be read"
            self.done.leave_out(f"message of a bag without a {mark}, so that no episode begins", count=taken)
        self.done.said += self._name_tasks()
        return self.done

    def _name_tasks(self) -> list[str]:
        """Which tasks the frames have, and what became of the one that was given."""
        named = [f"{task!r} ({frames} frames)" for task, frames in self.tasks.most_common(MOST_TASKS)]
        more = len(self.tasks) - len(named)
        said = [f"tasks: {', '.join(named)}{f' and {more} more' if more else ''}"] if named else []
        given, instruction = self.given_task, self.sources.instruction
        if given is not None and (lost := self.tasks.total() - self.tasks[given]):
            said.append(f"--task {given!r} is not that of {lost} frames: the bag has instructions of its own for them")
        if given is not None and self.tasks[given] and instruction not in (None, given):
            said.append(f"--task {given!r} stands in place of {instruction!r}, which the node's settings say")
        return said

    # --- messages

    def _take(self, message: BagMessage) -> None:
        sources, topic = self.sources, message.topic
        if topic in self.camera_of:
            self._take_image(message, self.camera_of[topic])
        elif topic in self.types:
            self._take_reading(message)
        if topic in self.commanded:
            self.followed.take(message, self._where)
        if topic == sources.instruction_topic:
            self._take_instruction(decode(message).data, message.log_ns)
        if self.marker is not None and topic == self.marker.topic:
            self._take_marker(decode(message).data, message.log_ns)
        # What the node's settings say is in force before the first instruction.
        if self.begin_ns is None and self.marker is None and not (self.cut_at_instructions and not sources.instruction):
            self._begin(message.log_ns)

    def _take_image(self, message: BagMessage, name: str) -> None:
        try:
            frame = RecordedImage(message, name, self.clock.stamp_ns(message, read_stamp_ns(message)))
        except InputError as error:
            self.buffer.refuse(name, str(error))
            raise
        if not self._is_from_before(frame.stamp_ns):
            self.buffer.add_frame(frame, message.log_ns)
            self.watch.add_image(name, frame.stamp_ns, message.log_ns)

    def _take_reading(self, message: BagMessage) -> None:
        """A joint state, or a pose."""
        topic, is_joints = message.topic, self.types[message.topic] == JOINT_STATE
        try:
            if is_joints:
                joints = self.clock.reading(message, joint_reading(message))
                if self._is_from_before(joints.stamp_ns):
                    return
                readings = self.buffer.add_joints(joints, message.log_ns, topic)
            else:
                pose = self.clock.reading(message, pose_reading(message))
                if self._is_from_before(pose.stamp_ns):
                    return
                readings = self.buffer.add_pose(pose, message.log_ns, topic)
        except InputError as error:
            self.buffer.refuse(topic, str(error))
            raise
        self.followed.add(readings)
        self.watch.add_readings(readings, message.log_ns)

    def _where(self) -> NDArray[np.float64] | None:
        """Where the axes are now, as far as the newest readings say."""
        try:
            return self.space.measured(self.buffer.latest(self.heard_ns, self.sources.max_age_ns).signal_M)
        except InputError:
            return None

    def _is_from_before(self, stamp_ns: int) -> bool:
        """Whether a message is late: taken before the mark, when the robot may have been elsewhere."""
        before = self.taken_ns is not None and stamp_ns < self.taken_ns
        if before:
            self.done.leave_out("late message, from before the episode")
        return before

    def _take_instruction(self, text: str, log_ns: int) -> None:
        changed, self.task = text != self.task, text
        if self.cut_at_instructions and (changed or self.begin_ns is None):
            self._end_episode(log_ns)
            if isinstance(self.followed, Commanded):
                self.followed.begin_task(log_ns)
            self._begin(log_ns)

    def _take_marker(self, text: str, log_ns: int) -> None:
        assert self.marker is not None
        try:
            fields = parse_json(text)
            value = fields[self.marker.key]
        except (KeyError, TypeError, ValueError):
            raise InputError(
                f"marker: expected JSON with {self.marker.key!r} on {self.marker.topic}, got {text[:80]!r}"
            ) from None
        begin_ns, task = fields.get("begin_ns", log_ns), fields.get("instruction", self.task)
        if type(begin_ns) is not int or not isinstance(task, str | None):
            raise InputError(
                f"marker: expected a text as instruction and a whole number as begin_ns on {self.marker.topic}, got "
                f"{text[:80]!r}"
            )
        if value == self.marked:
            return
        self._end_episode(log_ns)
        # The robot may have been moved: what came before may be near in time, but not in place.
        self.buffer.clear()
        self.followed.clear()
        self.marked = value
        if value is not None:
            self.task = task
            self._begin(log_ns, begin_ns)

    # --- ticks

    def _begin(self, log_ns: int, taken_ns: int | None = None) -> None:
        self.begin_ns, self.ticks, self.taken_ns, self.began = log_ns, 0, taken_ns, True

    def _advance(self, log_ns: int) -> None:
        """Run the ticks before `log_ns`; a tick sees what arrives at its own time."""
        while self.begin_ns is not None:
            tick_ns = self.begin_ns + self.ticks * NS_PER_S // self.fps
            if tick_ns >= log_ns:
                return
            if tick_ns - self.heard_ns > self.silence_ns:
                self._skip_to(log_ns)
                continue
            self.ticks += 1
            self._settle(tick_ns)
            self._tick(tick_ns)
        self._settle(log_ns)

    def _skip_to(self, log_ns: int) -> None:
        """Passes over the ticks before `log_ns`: without a message they could only be held, however many they are."""
        assert self.begin_ns is not None
        following = max(-((self.begin_ns - log_ns) * self.fps // NS_PER_S), self.ticks + 1)
        cause = f"no message in the bag for more than {self.silence_ns / NS_PER_S:g} s"
        example = f"{(log_ns - self.heard_ns) / NS_PER_S:.1f} s"
        self.done.leave_out(cause, example, following - self.ticks)
        self.ticks = following

    def _tick(self, tick_ns: int) -> None:
        sources = self.sources
        try:
            observation = self.buffer.observe(tick_ns, sources.max_age_ns, sources.slop_ns)
            while self._discard_damaged(observation):
                observation = self.buffer.observe(tick_ns, sources.max_age_ns, sources.slop_ns)
        except StaleInput as error:
            self.waiting.append(str(error))
            return
        if self.task is None:
            self.done.leave_out("before the first instruction")
        else:
            self.waiting.append(_Pending(observation, self.task, observation.stamp_ns + self.period_ns))

    def _discard_damaged(self, observation: Observation) -> bool:
        """Decode the images; whether one could not be and was taken from the buffer, as if it had been refused."""
        damaged = False
        for name, frame in observation.frames.items():
            try:
                _ = frame.rgb_HWC
            except InputError as error:
                self.buffer.discard(frame, str(error))
                self.done.leave_out(f"message on {self.sources.cameras[name]}", str(error))
                damaged = True
        return damaged

    def _settle(self, now_ns: int) -> None:
        """Hand on the frames whose action is known now."""
        while self.waiting:
            first = self.waiting[0]
            if isinstance(first, _Pending) and not self.followed.known(first.due_ns, now_ns):
                return
            self.waiting.popleft()
            if isinstance(first, str):
                self._gap("no observation", first)
            else:
                self._hand_on_with_action(first)

    def _hand_on_with_action(self, waiting: _Pending) -> None:
        observation = waiting.observation
        measured_J = self.space.measured(observation.signals)
        action_D = self.followed.at(observation.stamp_ns, waiting.due_ns, measured_J)
        if (unknown_D := np.isnan(action_D)).any():
            names = ", ".join(self.sources.robot.actions[d].name for d in np.flatnonzero(unknown_D))
            self._gap("no action", f"nothing says {names} at {waiting.due_ns}")
            return
        robot = self.sources.robot
        state_S = self.before_S = continued_rotation(observation.state_S, self.before_S, robot.state)
        action_D = self.before_D = continued_rotation(action_D, self.before_D, robot.actions)
        columns = self.columns.rows(state_S[np.newaxis], action_D[np.newaxis])
        frames = observation.frames
        images = {name: frames[name].rgb_HWC for name in self.sources.cameras}
        files = {name: frame.file for name, frame in frames.items() if isinstance(frame, RecordedImage)}
        row = {name: values[0] for name, values in columns.items()}
        frame = Frame(observation.stamp_ns, waiting.task, row, images, files)
        self._hand_on(_Ready(frame, state_S, action_D))

    def _forget(self, now_ns: int) -> None:
        """Forget the positions that neither a waiting frame nor one still to come can ask for."""
        oldest_age_ns = max(self.sources.max_age_ns, *self.sources.camera_age_ns.values(), 0)
        waiting = next((w for w in self.waiting if isinstance(w, _Pending)), None)
        wanted_ns = now_ns if waiting is None else waiting.observation.stamp_ns
        self.followed.forget(min(wanted_ns, now_ns - oldest_age_ns))

    def _hand_on(self, row: _Ready) -> None:
        self.done.repeated += row.frame.stamp_ns == self.last_ns
        self.last_ns = row.frame.stamp_ns
        if self.written == 0 and len(self.held) + 1 < self.least_frames:
            self.held.append(row)
            return
        for ready in (*self.held, row):
            self.writer.add(ready.frame)
            self.tasks[ready.frame.task] += 1
            self.watch.add_frame(ready.frame.stamp_ns, ready.state_S, ready.action_D, ready.frame.images)
            self.written += 1
        self.held = []

    def _gap(self, cause: str, example: str) -> None:
        """End the piece being written; before its first frame there is none, so the episode just begins later."""
        began = self.written or self.held
        self.done.leave_out(cause if began else f"{cause} yet, at an episode's beginning", example)
        self._close_piece()

    def _close_piece(self) -> None:
        for _ in self.held:
            self.done.leave_out(f"in a piece of fewer than {self.least_frames} frames")
        if self.written:
            self.writer.end_episode()
            self.done.episodes += 1
            self.done.frames += self.written
            self.done.reports.append(self.watch.end_episode(self.done.left_out))
        self.held, self.written = [], 0
        self.before_S = self.before_D = None

    def _end_episode(self, log_ns: int) -> None:
        """End the episode at `log_ns`; the frames that still wait have no action in it and are left out."""
        self._settle(log_ns + 1)
        for waiting in self.waiting:
            if isinstance(waiting, _Pending):
                self.done.leave_out("action after the episode's end")
        self.waiting.clear()
        self._close_piece()
        self.begin_ns = None
