"""What becomes of a bag's messages in a replay: inputs of the policy, the reference, the chunks that were published."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.errors import InputError
from ki_vla_ros.messages.decode import BagMessage, decode
from ki_vla_ros.messages.type_names import POSITIONS, TRAJECTORY
from ki_vla_ros.records import NS_PER_S, CameraFrame, JointReading, header_ns
from ki_vla_ros.replay.inputs import Parity, ReplayBuffer
from ki_vla_ros.replay.options import ReplayOptions
from ki_vla_ros.replay.topics import ReplayTopics
from ki_vla_ros.robot.robot import JointSpec
from ki_vla_ros.runtime.paths import CommandedPath, MeasuredPath, Reference


class Inbox:
    """`reference` is None where the bag has none."""

    def __init__(
        self,
        topics: ReplayTopics,
        options: ReplayOptions,
        buffer: ReplayBuffer,
        joints: Sequence[JointSpec],
        image_size: int,
        use_receive_time: bool,
    ) -> None:
        self.parity = Parity()
        self._topics, self._options, self._buffer = topics, options, buffer
        self._image_size, self._use_receive_time = image_size, use_receive_time
        self._cameras = {topic: name for name, topic in topics.cameras.items()}
        names = [joint.name for joint in joints]
        self.measured = MeasuredPath(names, [joint.max_velocity for joint in joints])
        self._commanded = CommandedPath(names)
        self.reference: Reference | None = None
        if topics.missing_reference is None:
            self.reference = self._commanded if topics.command else self.measured

    def take(self, message: BagMessage) -> None:
        """InputError where it cannot be used."""
        topic, topics = message.topic, self._topics
        if (camera := self._cameras.get(topic)) is not None:
            try:
                self._buffer.add_frame(self._frame(message), message.log_ns)
            except InputError as refusal:
                self._buffer.refuse(camera, str(refusal))
                raise
        elif topic == topics.joint_states:
            try:
                reading = self._reading(message)
                self._buffer.add_joints(reading)
            except InputError as refusal:
                self._buffer.refuse("joint state", str(refusal))
                raise
            self.measured.add(reading)
        elif topic == topics.command:
            add = self._commanded.add_trajectory if message.type == TRAJECTORY else self._commanded.add_positions
            add(message.log_ns, decode(message, TRAJECTORY, POSITIONS))
        elif topic == topics.chunk and self._options.as_recorded:
            published = decode(message, TRAJECTORY)
            positions = np.array([point.positions for point in published.points], dtype=np.float64)
            self.parity.add_published(header_ns(published), positions)

    def answer(self, reference: Reference, due_N: NDArray[np.int64], since_ns: int) -> NDArray[np.float64]:
        """[N, J]: what the arm did at these instants, in answer to what began at `since_ns`; earlier ones are not asked
        for any more. NaN where nothing says so, and after the arm was set elsewhere.
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

    def _reading(self, message: BagMessage) -> JointReading:
        reading = self._options.read_joints(message)
        return dataclasses.replace(reading, stamp_ns=message.log_ns) if self._use_receive_time else reading
