"""What comes in, from a bag or from running topics, against what the bundle and the settings expect.

`InputWatch` takes every message and keeps only numbers; `check_inputs` reads them. Stamps are in integer ns. Legend: N
messages, J joints.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.bundle import Bundle
from ki_vla_ros.errors import InputError
from ki_vla_ros.messages import (
    COMPRESSED_IMAGE,
    IMAGE,
    JOINT_STATE,
    POSITIONS,
    TRAJECTORY,
    BagMessage,
    camera_frame,
    decode,
    joint_reading,
    read_image,
    read_stamp_ns,
)
from ki_vla_ros.records import NS_PER_S, time_to_ns
from ki_vla_ros.robot import Signal
from ki_vla_ros.runtime import CameraSource, ObservationBuffer
from ki_vla_ros.settings import Session, Settings

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


def command_type(settings: Settings) -> str:
    return POSITIONS if settings.publish_mode == "stream" else TRAJECTORY


@dataclass(frozen=True)
class Expected:
    """The inputs that are to be there: those of the bundle, or only those that parameters and session name."""

    optional_cameras: Mapping[str, bool]
    joints: tuple[Signal, ...] = ()
    trained: tuple[Sequence[float], Sequence[float]] | None = None

    @classmethod
    def of(cls, bundle: Bundle | None, settings: Settings, session: Session | None) -> Expected:
        """Without a bundle only topics, rates and stamps can be judged: its joints are not known."""
        if bundle is None:
            return cls(dict.fromkeys([*settings.cameras, *(session.topics.cameras if session else ())], False))
        manifest = bundle.manifest
        cameras = {camera.name: camera.optional for camera in manifest.cameras}
        return cls(cameras, manifest.robot.signals, (manifest.state.low, manifest.state.high))

    @property
    def joint_names(self) -> tuple[str, ...]:
        return tuple(joint.name for joint in self.joints)


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


class InputWatch:
    """Takes messages of the cameras, joint states and commands, whose topics are given by their resolved names."""

    def __init__(
        self,
        expected: Expected,
        settings: Settings,
        cameras: dict[str, str],
        joints: str,
        command: str,
        expected_images: dict[str, int] | None = None,
    ) -> None:
        self.expected, self.settings = expected, settings
        self.cameras = {name: Traffic(topic) for name, topic in cameras.items()}
        self.image_types = {name: image_type(settings, name) for name in cameras}
        self.joints, self.command = Traffic(joints), Traffic(command)
        self.positions, self.commands = Rows(), Rows()
        self.orders: Counter[tuple[str, ...]] = Counter()
        self.other_joints: Counter[tuple[str, ...]] = Counter()  # messages with none of the arm's, such as wheels
        counts = expected_images or {}
        self._every = {name: max(1, counts.get(topic, 0) // IMAGES_DECODED) for name, topic in cameras.items()}
        sources = [CameraSource(name, topic) for name, topic in cameras.items()]
        self._buffer = ObservationBuffer(sources, expected.joint_names, joints, expected.joints)
        self._camera_of = {topic: name for name, topic in cameras.items()}

    @property
    def topics(self) -> list[str]:
        return [*self._camera_of, self.joints.topic, self.command.topic]

    def add(self, message: BagMessage) -> None:
        if message.topic in self._camera_of:
            self._add_image(self._camera_of[message.topic], message)
        elif message.topic == self.joints.topic:
            self._add_joints(message)
        elif message.topic == self.command.topic:
            self._add_command(message)

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

    def _add_joints(self, message: BagMessage) -> None:
        self.joints.kinds[message.type] += 1
        if message.type != JOINT_STATE:
            return
        try:
            reading = joint_reading(message)
            if reading.names and self.expected.joints and set(reading.names).isdisjoint(self.expected.joint_names):
                self.other_joints[reading.names] += 1
                return
            kept = self._buffer.add_joints(reading)
        except InputError as error:
            self.joints.refuse(error)
        else:
            self.orders[reading.names] += 1
            self.joints.stamps.append(reading.stamp_ns)
            self.joints.received.append(message.log_ns)
            self.positions.add(message.log_ns, kept.position_J)

    def _add_command(self, message: BagMessage) -> None:
        """Keeps the last point within a tenth of a second: its position, and when it is due."""
        self.command.kinds[message.type] += 1
        if message.type != TRAJECTORY:
            return
        try:
            command = decode(message)
            names = list(command.joint_names)
            points = [(time_to_ns(p.time_from_start), p.positions) for p in command.points]
            near = [p for p in points if p[0] <= NS_PER_S // 10] or points[:1]
            if not near or not set(names) >= set(self.expected.joint_names):
                return
            order = [names.index(name) for name in self.expected.joint_names]
            self.commands.add(message.log_ns + near[-1][0], np.array(near[-1][1], dtype=np.float64)[order])
        except (InputError, ValueError, IndexError) as error:
            self.command.refuse(InputError(f"command: {error}"))
