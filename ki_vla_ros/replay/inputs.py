"""A bag's messages as the policy's inputs, at the pace of a clock that a replay moves by hand."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.errors import InputError, StaleInput
from ki_vla_ros.messages.decode import BagMessage, camera_frame, decode, header_ns
from ki_vla_ros.messages.pixels import read_image
from ki_vla_ros.messages.type_names import COMPRESSED_IMAGE, IMAGE
from ki_vla_ros.policy.preprocess import resize_with_pad
from ki_vla_ros.records import CameraFrame, Observation
from ki_vla_ros.runtime.observation import ObservationBuffer

# A recorder may get a message so much later than the node did. Not longer than the frames that a buffer keeps.
RECORDER_LAG_NS = 200_000_000


class BagFrame(CameraFrame):
    """A frame whose pixels are decoded, and shrunk to the model's size, only when a tick looks at them.

    `rgb_HWC` raises InputError if they cannot be.
    """

    message: BagMessage
    _size: int
    _pixels: NDArray[np.uint8] | None

    def __init__(self, camera: str, stamp_ns: int, message: BagMessage, size: int) -> None:
        values = {"camera": camera, "stamp_ns": stamp_ns, "message": message, "_size": size, "_pixels": None}
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the base is frozen

    @property
    def rgb_HWC(self) -> NDArray[np.uint8]:
        if self._pixels is None:
            whole = camera_frame(self.message, self.camera)
            object.__setattr__(self, "_pixels", resize_with_pad(whole.rgb_HWC, self._size))
        assert self._pixels is not None
        return self._pixels


def bag_frame(message: BagMessage, camera: str, size: int, use_receive_time: bool) -> BagFrame:
    """InputError where even the stamp cannot be read; faults in the pixels come to light when they are looked at."""
    if use_receive_time:
        stamp_ns = message.log_ns
    elif message.type == IMAGE:
        stamp_ns = read_image(f"camera {camera!r}", message.data).stamp_ns
    else:
        stamp_ns = header_ns(decode(message, IMAGE, COMPRESSED_IMAGE))
    return BagFrame(camera, stamp_ns, message, size)


@dataclass(frozen=True)
class RecordedTick:
    """What the live node said of a tick: enough to make it again from the bag."""

    stamp_ns: int
    chunk_index: int | None
    frame_ns: Mapping[str, int]
    joint_ns: tuple[int, ...]
    joined_ns: int | None
    instruction: str
    hold: str | None
    total_ms: float


def read_tick(text: str) -> RecordedTick:
    """InputError if the text is not a tick's, or one of a version that did not name its frames."""
    try:
        fields = json.loads(text)
        index = fields["chunk_index"]
        return RecordedTick(
            stamp_ns=int(fields["stamp_ns"]),
            chunk_index=None if index is None else int(index),
            frame_ns={str(name): int(stamp) for name, stamp in (fields.get("frame_ns") or {}).items()},
            joint_ns=tuple(int(stamp) for stamp in fields.get("joint_ns") or ()),
            joined_ns=int(fields["joined_ns"]) if fields.get("joined_ns") else None,
            instruction=str(fields["instruction"]),
            hold=None if fields["hold"] is None else str(fields["hold"]),
            total_ms=float(fields["stage_ms"]["total"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"tick: expected what the node writes there, got {text[:60]!r}: {error}") from error


class Parity:
    """How far the chunks made again are from those that the node published, by their stamp and order."""

    def __init__(self) -> None:
        self._published: dict[int, deque[NDArray[np.float64]]] = {}
        self._made: dict[int, deque[NDArray[np.float64]]] = {}
        self._count, self._largest = 0, 0.0

    def add_published(self, start_ns: int, position_HJ: NDArray[np.float64]) -> None:
        self._meet(self._published, self._made, start_ns, position_HJ)

    def add_made(self, start_ns: int, position_HJ: NDArray[np.float64]) -> None:
        self._meet(self._made, self._published, start_ns, position_HJ)

    def summary(self) -> dict[str, float | int | None]:
        """`unmatched`: chunks made again without a published one in the bag, or the other way round."""
        left = sum(len(chunks) for table in (self._published, self._made) for chunks in table.values())
        return {"chunks": self._count, "max_difference": self._largest if self._count else None, "unmatched": left}

    def _meet(
        self, own: dict[int, Any], other: dict[int, Any], start_ns: int, position_HJ: NDArray[np.float64]
    ) -> None:
        waiting = other.get(start_ns)
        if not waiting:
            own.setdefault(start_ns, deque()).append(position_HJ)
            return
        met_HJ = waiting.popleft()
        if not waiting:
            del other[start_ns]
        same = met_HJ.shape == position_HJ.shape
        self._count += 1
        self._largest = max(self._largest, float(np.abs(met_HJ - position_HJ).max()) if same else float("inf"))


class Feed:
    """Hands messages on when the clock passes their log time. `foreseen` gets each as soon as it is read."""

    def __init__(
        self,
        messages: Iterator[BagMessage],
        received: Callable[[BagMessage], None],
        foreseen: Callable[[BagMessage], None],
    ) -> None:
        self._messages, self._received, self._foreseen = messages, received, foreseen
        self._ahead: deque[BagMessage] = deque()
        self._all_read = False
        self.now_ns = 0
        self.foresee(0)
        if self._ahead:
            self.now_ns = self._ahead[0].log_ns

    @property
    def ended(self) -> bool:
        return self._all_read and not self._ahead

    def foresee(self, until_ns: int) -> None:
        """Reads on until a message beyond that time, without handing anything on."""
        while not self._all_read and (not self._ahead or self._ahead[-1].log_ns <= until_ns):
            message = next(self._messages, None)
            if message is None:
                self._all_read = True
                return
            self._ahead.append(message)
            self._foreseen(message)

    def advance(self, to_ns: int, until: Callable[[], bool] = lambda: False) -> None:
        """Sets the clock to `to_ns`, or to where `until` became true."""
        while not until():
            self.foresee(self.now_ns)
            if not self._ahead or self._ahead[0].log_ns > to_ns:
                self.now_ns = max(self.now_ns, to_ns)
                return
            message = self._ahead.popleft()
            self.now_ns = max(self.now_ns, message.log_ns)
            self._received(message)


class ReplayBuffer(ObservationBuffer):
    """Asked for the present, it first takes in what the bag has until then.

    `recorded` is set while a recorded tick is made again: then the observation is of the frames and joint states that
    it used, wherever the recorder's own delays put them.
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

    def latest(self, now_ns: int, max_age_ns: int) -> tuple[int, NDArray[np.float64]]:
        with self.paused():
            if self.recorded is not None and self.recorded.joint_ns:
                stamp_ns = self.recorded.joint_ns[-1]
                self._await_recorded(self.recorded, {})
                return stamp_ns, self._reading(stamp_ns)
            self.feed.advance(now_ns)
        return super().latest(now_ns, max_age_ns)

    def measured(self, now_ns: int, max_age_ns: int) -> NDArray[np.float64]:
        with self.paused():
            self.watch(now_ns)
            self.feed.advance(now_ns)
        return super().latest(now_ns, max_age_ns)[1]

    def _broken(self, observation: Observation) -> CameraFrame | None:
        """The first frame whose pixels cannot be read; the node would have refused it when it came."""
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
            raise StaleInput("recorded: the node that ran then did not say which frames it used")
        self._await_recorded(tick, tick.frame_ns)
        frames = {}
        for name, stamp_ns in tick.frame_ns.items():
            camera = self._cameras.get(name)
            found = [frame for frame in camera.frames if frame.stamp_ns == stamp_ns] if camera else []
            if not found:
                raise StaleInput(f"recorded: camera {name!r}: the frame of stamp {stamp_ns} is not in the bag")
            frames[name] = found[0]
        stamp_ns = min(tick.frame_ns.values())
        readings = [self._reading(stamp) for stamp in tick.joint_ns]
        if len(readings) == 1:
            return Observation(stamp_ns, frames, readings[0], tick.joint_ns)
        before_ns, after_ns = tick.joint_ns
        weight = (stamp_ns - before_ns) / (after_ns - before_ns)
        state_J = readings[0] + weight * (readings[1] - readings[0])
        return Observation(stamp_ns, frames, state_J, tick.joint_ns)

    def _await_recorded(self, tick: RecordedTick, frame_ns: Mapping[str, int]) -> None:
        """Until the bag has given what the tick used, or the recorder cannot have been that late."""
        joints = set(tick.joint_ns)

        def has_all() -> bool:
            stamps = {name: [frame.stamp_ns for frame in camera.frames] for name, camera in self._cameras.items()}
            frames = all(stamp in stamps.get(name, ()) for name, stamp in frame_ns.items())
            return frames and joints <= {stamp for stamp, _ in self._readings}

        self.feed.advance(tick.stamp_ns + RECORDER_LAG_NS, until=has_all)

    def _reading(self, stamp_ns: int) -> NDArray[np.float64]:
        for stamp, position_J in reversed(self._readings):
            if stamp == stamp_ns:
                return position_J
        raise StaleInput(f"recorded: joint state: the one of stamp {stamp_ns} is not in the bag")
