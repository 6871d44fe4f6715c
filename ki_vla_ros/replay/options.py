"""What a replay may be asked to do otherwise than the node."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ki_vla_ros.messages.decode import BagMessage, joint_reading
from ki_vla_ros.records import CameraFrame, JointReading, Observation
from ki_vla_ros.replay.inputs import bag_frame
from ki_vla_ros.replay.latency import Latency, MeasuredLatency
from ki_vla_ros.replay.records import TickRecord


@dataclass(frozen=True)
class ReplayOptions:
    """`instruction` replaces those of the bag. `probe_every_s`: bag time between two "what if"s (0: none).

    `as_recorded`: ticks as the node made them, with the frames that it used. `follow_session`: settings change where
    the node's did. `on_message` gets each message read, `on_observation` what each chunk is made of, `on_tick` each
    tick at once, without reference, and the observation of its chunk. `noise_by_tick`: a chunk's noise belongs to its
    tick's number and not to the count of chunks, so that replays with other settings start from the same. `read_frame`
    and `read_joints` make records of messages.
    """

    instruction: str = ""
    other_instruction: str = ""
    probe_every_s: float = 2.0
    as_recorded: bool = False
    follow_session: bool = True
    latency: Latency = dataclasses.field(default_factory=MeasuredLatency)
    on_message: Callable[[BagMessage], None] = lambda message: None
    on_tick: Callable[[TickRecord, Observation | None], None] = lambda tick, observation: None
    on_observation: Callable[[Observation], None] = lambda observation: None
    noise_by_tick: bool = False
    read_frame: Callable[[BagMessage, str, int, bool], CameraFrame] = bag_frame
    read_joints: Callable[[BagMessage], JointReading] = joint_reading


class MessageSource(Protocol):
    """What a replay needs of a bag."""

    @property
    def path(self) -> Path: ...

    def messages(self, topics: Collection[str] | None = None) -> Iterator[BagMessage]: ...
