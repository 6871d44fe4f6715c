"""What comes in, from a bag or from running topics, against what the bundle and the settings expect.

`InputWatch` takes every message and keeps only numbers; `check_inputs` reads them. Stamps are in integer ns. Legend: N
messages, J joints.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.bundle import Bundle
from ki_vla_ros.errors import InputError
from ki_vla_ros.messages import (
    COMPRESSED_IMAGE,
    IMAGE,
    JOINT_STATE,
    POSE,
    TRAJECTORY,
    BagMessage,
    camera_frame,
    decode,
    joint_reading,
    pose_reading,
    read_image,
    read_stamp_ns,
)
from ki_vla_ros.records import NS_PER_S, time_to_ns
from ki_vla_ros.robot import ACTIONS, Robot, Signal
from ki_vla_ros.runtime import CameraSource, ObservationBuffer, input_signals
from ki_vla_ros.settings import CommandTopic, Session, Settings, resolve, signal_topics

# Images per camera that are decoded; of all others only the header is read.
IMAGES_DECODED = 200
# Joint positions and commands that are kept; when there are more, every second one is dropped.
ROWS_KEPT = 20_000


@dataclass
class Traffic:
    """The messages of one topic: when they were taken and received, and why some could not be read."""

    topic: str
    kinds: Counter[str] = field(default_factory=Counter)
    stamps: array[int] = field(default_factory=lambda: array("q"))
    received: array[int] = field(default_factory=lambda: array("q"))
    refused: Counter[str] = field(default_factory=Counter)  # reasons without their numbers
    reasons: dict[str, str] = field(default_factory=dict)  # the first one in full
    encodings: Counter[str] = field(default_factory=Counter)

    @property
    def count(self) -> int:
        return sum(self.kinds.values())

    def refuse(self, error: InputError) -> None:
        kind = re.sub(r"[-+]?\d[\d.e+-]*", "#", str(error))[:60]
        self.refused[kind] += 1
        self.reasons.setdefault(kind, str(error))


def image_type(settings: Settings, camera: str) -> str:
    return COMPRESSED_IMAGE if settings.camera(camera).transport == "compressed" else IMAGE


@dataclass(frozen=True)
class Expected:
    """The inputs that are to be there: those of the bundle, or only those that parameters and session name.

    `topics` are those of joint states and poses, with their types. `signals` are what is read from them, `trained` the
    range of training by the index of the signal. `robot` is None without a bundle.
    """

    optional_cameras: Mapping[str, bool]
    topics: Mapping[str, str]
    signals: tuple[Signal, ...] = ()
    trained: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    robot: Robot | None = None

    @classmethod
    def of(cls, bundle: Bundle | None, settings: Settings, session: Session | None, node: str) -> Expected:
        """Without a bundle only topics, rates and stamps can be judged: its joints are not known."""
        if bundle is None:
            cameras = dict.fromkeys([*settings.cameras, *(session.topics.cameras if session else ())], False)
            return cls(cameras, _topics_without_bundle(settings, session, node))
        manifest = bundle.manifest
        robot = manifest.robot
        signals = tuple(input_signals(manifest, signal_topics(settings, robot, node, session)))
        keys = [signal.key for signal in robot.signals]
        trained = {
            keys.index((d.source.topic, d.joint, d.source.field)): (low, high)
            for d, low, high in zip(robot.state, manifest.state.low, manifest.state.high, strict=True)
            if d.kind != "pose"
        }
        cameras = {camera.name: camera.optional for camera in manifest.cameras}
        return cls(cameras, {signal.topic: signal.type for signal in signals}, signals, trained, robot)

    @property
    def joint_names(self) -> tuple[str, ...]:
        return tuple(signal.name for signal in self.signals)


def _topics_without_bundle(settings: Settings, session: Session | None, node: str) -> dict[str, str]:
    if session is None:
        return {resolve(settings.joint_states_topic or "joint_states", node): JOINT_STATE}
    told = session.topics
    joints = [topic for topic in (told.joint_states, *told.states.values()) if topic]
    return {**dict.fromkeys(joints, JOINT_STATE), **dict.fromkeys(told.poses.values(), POSE)}


class Rows:
    """Pairs of time and values, kept evenly over the whole recording, however long it is."""

    def __init__(self) -> None:
        self._kept: list[tuple[int, NDArray[np.float64]]] = []
        self._every = 1
        self._seen = 0

    def add(self, time_ns: int, values: NDArray[np.float64]) -> None:
        if self._seen % self._every == 0:
            self._kept.append((time_ns, values))
            if len(self._kept) > ROWS_KEPT:
                self._kept, self._every = self._kept[::2], 2 * self._every
        self._seen += 1

    def arrays(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Times [N] in order and values [N, ...]."""
        kept = sorted(self._kept, key=lambda row: row[0])
        return np.array([row[0] for row in kept], dtype=np.int64), np.array([row[1] for row in kept])


@dataclass
class Part(Traffic):
    """What always came in one message of joint states, or in one of poses."""

    rows: Rows = field(default_factory=Rows)


class InputWatch:
    """Takes messages of the cameras, joint states, poses and commands; topics are given by their resolved names."""

    def __init__(
        self,
        expected: Expected,
        settings: Settings,
        cameras: dict[str, str],
        commands: Mapping[str, CommandTopic],
        expected_images: dict[str, int] | None = None,
    ) -> None:
        self.expected, self.settings = expected, settings
        self.cameras = {name: Traffic(topic) for name, topic in cameras.items()}
        self.image_types = {name: image_type(settings, name) for name in cameras}
        self.states = {topic: Traffic(topic) for topic in expected.topics}
        self.outputs = commands
        self.commands = {c.topic: Traffic(c.topic) for c in commands.values() if c.type not in ACTIONS}
        # Where joints were told to be, by the topic and the signals that are these joints.
        self.told: dict[tuple[str, tuple[int, ...]], Rows] = {}
        self._parts: dict[tuple[int, ...], Part] = {}  # by the signals that come together
        self.orders: dict[str, Counter[tuple[str, ...]]] = {topic: Counter() for topic in expected.topics}
        # Messages with none of the arm's, such as wheels, by topic.
        self.other_joints: dict[str, Counter[tuple[str, ...]]] = {topic: Counter() for topic in expected.topics}
        counts = expected_images or {}
        self._every = {name: max(1, counts.get(topic, 0) // IMAGES_DECODED) for name, topic in cameras.items()}
        sources = [CameraSource(name, topic) for name, topic in cameras.items()]
        self._buffer = ObservationBuffer(sources, expected.signals)
        self._camera_of = {topic: name for name, topic in cameras.items()}

    @property
    def topics(self) -> list[str]:
        return [*self.inputs, *self.commands]

    @property
    def inputs(self) -> list[str]:
        """The topics without those of commands."""
        return [*self._camera_of, *self.states]

    def signal(self, m: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Times [N] in order and values [N] of one signal."""
        found = [(part.rows.arrays(), index.index(m)) for index, part in self._parts.items() if m in index]
        if not found:
            return np.zeros(0, dtype=np.int64), np.zeros(0)
        times = np.concatenate([time_N for (time_N, _), _ in found])
        values = np.concatenate([value_NG[:, place] for (_, value_NG), place in found])
        order = np.argsort(times, kind="stable")
        return times[order], values[order]

    def parts(self, topic: str) -> list[Traffic]:
        """What came on a topic, by the joints in it; all as one where the joints are not known."""
        signals = self.expected.signals
        parts: list[Traffic] = [part for index, part in self._parts.items() if signals[index[0]].topic == topic]
        return parts or [self.states[topic]]

    def kinds(self, topic: str) -> int:
        """How many kinds of joint states came on a topic, by the joints in them."""
        return len({frozenset(names) for names in (*self.orders[topic], *self.other_joints[topic])})

    def add(self, message: BagMessage) -> None:
        if message.topic in self._camera_of:
            self._add_image(self._camera_of[message.topic], message)
        elif message.topic in self.states:
            self._add_state(message, self.states[message.topic])
        elif message.topic in self.commands:
            self._add_command(message, self.commands[message.topic])

    def _add_image(self, name: str, message: BagMessage) -> None:
        traffic = self.cameras[name]
        traffic.kinds[message.type] += 1
        if message.type not in (IMAGE, COMPRESSED_IMAGE):
            return
        try:
            stamp_ns = read_stamp_ns(message)
            if message.type == IMAGE:
                traffic.encodings[read_image(f"camera {name!r}", message.data).encoding] += 1
            if traffic.count % self._every[name] == 0:
                camera_frame(message, name)
        except InputError as error:
            traffic.refuse(error)
        else:
            traffic.stamps.append(stamp_ns)
            traffic.received.append(message.log_ns)

    def _add_state(self, message: BagMessage, traffic: Traffic) -> None:
        topic = message.topic
        traffic.kinds[message.type] += 1
        if message.type != self.expected.topics[topic]:
            return
        names: tuple[str, ...] = ()
        try:
            if message.type == POSE:
                pose = pose_reading(message)
                stamp_ns = pose.stamp_ns
                kept = self._buffer.add_pose(pose, topic=topic) if self.expected.signals else ()
            else:
                joints = joint_reading(message)
                stamp_ns, names = joints.stamp_ns, joints.names
                kept = self._buffer.add_joints(joints, topic=topic) if self.expected.signals else ()
        except InputError as error:
            traffic.refuse(error)
            return
        if self.expected.signals and not kept and names:
            self.other_joints[topic][names] += 1
            return
        self.orders[topic][names] += 1
        traffic.stamps.append(stamp_ns)
        traffic.received.append(message.log_ns)
        for reading in kept:
            part = self._part(topic, reading.signals)
            part.stamps.append(stamp_ns)
            part.received.append(message.log_ns)
            part.rows.add(message.log_ns, reading.value_G)

    def _part(self, topic: str, index: tuple[int, ...]) -> Part:
        if index not in self._parts:
            signals = self.expected.signals
            whole = len(index) == sum(signal.topic == topic for signal in signals)
            names = ", ".join(signals[m].name for m in index)
            self._parts[index] = Part(topic if whole else f"{topic} ({names})")
        return self._parts[index]

    def _add_command(self, message: BagMessage, traffic: Traffic) -> None:
        """Keeps the last point within a tenth of a second: its position, and when it is due."""
        traffic.kinds[message.type] += 1
        if message.type != TRAJECTORY:
            return
        try:
            command = decode(message)
            names = list(command.joint_names)
            points = [(time_to_ns(p.time_from_start), p.positions) for p in command.points]
            near = [p for p in points if p[0] <= NS_PER_S // 10] or points[:1]
            signals = tuple(m for m, name in enumerate(self.expected.joint_names) if name in names)
            if not near or not signals:
                return
            order = [names.index(self.expected.joint_names[m]) for m in signals]
            rows = self.told.setdefault((message.topic, signals), Rows())
            rows.add(message.log_ns + near[-1][0], np.array(near[-1][1], dtype=np.float64)[order])
        except (InputError, ValueError, IndexError) as error:
            traffic.refuse(InputError(f"command: {error}"))
