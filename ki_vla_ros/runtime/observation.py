"""The newest inputs that belong together in time, or a refusal that names what is missing.

The executor thread adds and the worker thread observes, under one lock. Nothing here reads a clock: `now_ns` comes from
the caller. Only `await_burst` waits. Legend: M signals in the robot file's order, G those of them that come in one
message. Stamps in integer ns on the node's clock.
"""

from __future__ import annotations

import bisect
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.bundle import PolicySpec
from ki_vla_ros.errors import InputError, StaleInput
from ki_vla_ros.records import CameraFrame, JointReading, Observation, PoseReading, SignalReading, to_ns
from ki_vla_ros.robot import Signal
from ki_vla_ros.runtime.readings import Reading, Readings, insert
from ki_vla_ros.settings import Settings

# Frames per camera that an observation may be chosen from: at 30 Hz the last 0.27 s. No more, as these are full images.
FRAMES_KEPT = 8
# How many arrivals of frames are searched for bursts, and the gap that separates one burst from the next.
ARRIVALS_KEPT, BURST_GAP_NS = 96, 5_000_000
# How near the end of a burst must be for a tick to wait for it, and how long it waits at most.
BURST_WAIT_NS = 3_000_000
# Stamps farther ahead of the node's clock than this are refused: of another clock, they would hide all that come later.
# As much as an image may be old by default: clocks of several machines, and of a simulator, are never quite the same.
AHEAD_NS = 250_000_000
# How many kinds of joint states, by the joints in them, are remembered of a topic, and how many names of other joints.
KINDS_KEPT, NAMES_KEPT = 32, 64
# How far a quaternion's length may be from 1: rounding to a few digits leaves more, a driver that sends none does not.
LENGTH_OFF = 0.01
FIELDS = ("position", "velocity", "effort")


@dataclass(frozen=True)
class CameraSource:
    """A camera of the model and, for error messages, the topic its frames come from.

    `max_age_ns`: the greatest age at which a frame may be acted upon; None: the caller's limit holds.
    """

    name: str
    topic: str
    optional: bool = False
    max_age_ns: int | None = None


@dataclass
class _Frames:
    source: CameraSource
    frames: deque[CameraFrame] = field(default_factory=lambda: deque(maxlen=FRAMES_KEPT))
    count: int = 0
    arrived_ns: int = 0
    repeats: bool = False  # the last frame had the stamp of one before

    def limit_ns(self, max_age_ns: int) -> int:
        return max_age_ns if self.source.max_age_ns is None else self.source.max_age_ns


@dataclass(frozen=True)
class InputStatus:
    """How many images, or accepted joint states, have come so far, and the newest one's age (None: none yet)."""

    count: int
    age_ns: int | None


class Latest(NamedTuple):
    """The newest values of all signals, the oldest of their stamps, and the stamps of each part and of each signal."""

    stamp_ns: int
    signal_M: NDArray[np.float64]
    joint_ns: tuple[int, ...]
    stamp_M: NDArray[np.int64]


# Which numbers of a joint state are a part's: by field, their places in the message.
_Places = tuple[tuple[str, NDArray[np.intp]], ...]


@dataclass
class _Topic:
    """What is known of a topic that signals come from, and of its last message."""

    name: str
    names: tuple[str, ...] | None = None
    heard_ns: int = 0
    plan: Sequence[tuple[Readings, _Places]] = ()
    plans: dict[tuple[str, ...], Sequence[tuple[Readings, _Places]]] = field(default_factory=dict)
    kinds: set[frozenset[str]] = field(default_factory=set)
    others: dict[str, None] = field(default_factory=dict)  # names that came, and are no signal's
    frame_id: str | None = None
    refused: str | None = None
    refused_of: tuple[str, ...] | None = None  # the joints in the message that was refused


class ObservationBuffer:
    """Joint states may come from several topics, and in parts: each part has its own readings, and its own age.

    A part is what always came in one message so far. It begins as all signals of a topic, and is divided when a message
    has only some of them.
    """

    def __init__(
        self,
        cameras: Sequence[CameraSource],
        signals: Sequence[Signal],
        joint_max_age_ns: int | None = None,
        state: Callable[[NDArray[np.float64]], NDArray[np.float64]] | None = None,
    ) -> None:
        """`signals`: with the full names of their topics.

        `state` makes the policy's state of the signals (None: they are it). `joint_max_age_ns`: the greatest age at
        which a joint state or pose may be acted upon; None: the caller's limit holds.
        """
        self._cameras = {camera.name: _Frames(camera) for camera in cameras}
        self._signals = tuple(signals)
        self._topics = {signal.topic: _Topic(signal.topic) for signal in self._signals}
        self._parts: list[Readings] = []
        for topic in self._topics:
            index = [m for m, signal in enumerate(self._signals) if signal.topic == topic]
            index = _by_field(index, self._signals)
            self._parts.append(Readings([self._signals[m] for m in index], index))
        self._joint_max_age_ns = joint_max_age_ns
        self._state = state or (lambda signal_M: signal_M)
        self._arrivals: deque[int] = deque(maxlen=ARRIVALS_KEPT)
        self._refused: dict[str, str] = {}
        self._lock = threading.Lock()
        self._frame_came = threading.Condition(self._lock)

    def add_frame(self, frame: CameraFrame, arrived_ns: int | None = None) -> None:
        """InputError for a stamp that cannot be right at `arrived_ns` (the node's clock)."""
        with self._lock:
            camera = self._cameras[frame.camera]
            _check_stamp(f"camera {frame.camera!r}", camera.source.topic, frame.stamp_ns, arrived_ns)
            frames = camera.frames
            stamps = [kept.stamp_ns for kept in frames]
            place = bisect.bisect_left(stamps, frame.stamp_ns)
            camera.count += 1
            camera.repeats = place < len(stamps) and stamps[place] == frame.stamp_ns
            if camera.repeats:
                return  # a frozen camera repeats its stamp: its frame must go stale
            insert(frames, place, frame)
            if arrived_ns is not None:
                self._arrivals.append(arrived_ns)
                camera.arrived_ns = arrived_ns
                self._frame_came.notify_all()
            self._refused.pop(frame.camera, None)

    def add_joints(
        self, reading: JointReading, arrived_ns: int | None = None, topic: str | None = None
    ) -> tuple[SignalReading, ...]:
        """Picks the signals of `topic` (None: there is one) from `reading` by name; returns them as they are kept.

        Joints that are not the robot's are left alone, and a message may have some of the robot's, or none. InputError
        if a value is not finite, in another unit or farther from the last reading than the joint can move, if a field
        is missing, or for a stamp that cannot be right at `arrived_ns` (the node's clock).
        """
        known = self._topics[topic] if topic else next(iter(self._topics.values()))
        if reading.names != known.names:
            with self._lock:
                self._plan(known, reading.names)
        known.heard_ns = reading.stamp_ns if arrived_ns is None else arrived_ns
        taken = [(part, self._pick(part, places, reading)) for part, places in known.plan]
        if not taken:
            return ()
        _check_stamp("joint state", known.name, reading.stamp_ns, arrived_ns)
        return self._keep(known, reading.stamp_ns, taken)

    def add_pose(
        self, reading: PoseReading, arrived_ns: int | None = None, topic: str | None = None
    ) -> tuple[SignalReading, ...]:
        """As `add_joints`, for a pose; InputError also for a quaternion that is none, and for another frame."""
        known = self._topics[topic] if topic else next(iter(self._topics.values()))
        part = next(part for part in self._parts if part.topic == known.name)
        pose_7 = reading.pose_7
        if not np.isfinite(pose_7).all():
            raise InputError(f"pose: expected finite numbers, got {pose_7.tolist()} on {known.name}")
        length = float(np.linalg.norm(pose_7[3:]))
        if abs(length - 1.0) > LENGTH_OFF:
            raise InputError(
                f"pose: expected an orientation of length 1 on {known.name}, got the quaternion {pose_7[3:].tolist()} "
                f"of length {length:.4g}; does its driver fill it in?"
            )
        self._check_frame(known, part, reading.frame_id)
        _check_stamp("pose", known.name, reading.stamp_ns, arrived_ns)
        pose_7 = np.concatenate([pose_7[:3], pose_7[3:] / length])
        kept = self._keep(known, reading.stamp_ns, [(part, pose_7)])
        known.frame_id = reading.frame_id
        return kept

    def _keep(
        self, known: _Topic, stamp_ns: int, taken: Sequence[tuple[Readings, NDArray[np.float64]]]
    ) -> tuple[SignalReading, ...]:
        with self._lock:
            kept = tuple([SignalReading(stamp_ns, part.index, part.add(stamp_ns, value_G)) for part, value_G in taken])
            if known.refused_of == known.names or known.refused_of is None:
                known.refused = None
        return kept

    def _plan(self, known: _Topic, names: tuple[str, ...]) -> None:
        """Finds the robot's joints among `names`, and divides parts of which only some came; with the lock."""
        if (plan := known.plans.get(names)) is None:
            place_of = {name: place for place, name in enumerate(names)}
            here = {m for m, s in enumerate(self._signals) if s.topic == known.name and s.part in place_of}
            for part in [part for part in self._parts if 0 < len(here.intersection(part.index)) < len(part.index)]:
                at = self._parts.index(part)
                self._parts[at : at + 1] = [part.of(here), part.of(set(part.index) - here)]
                known.plans.clear()
            # Not as they came first: a replay, which may meet them otherwise, tells their stamps apart by their order.
            topics = list(self._topics)
            self._parts.sort(key=lambda part: (topics.index(part.topic), min(part.index)))
            plan = [(part, _places(part, place_of)) for part in self._parts if part.index[0] in here]
            known.plans = {**(known.plans if len(known.plans) < KINDS_KEPT else {}), names: plan}
            ours = {self._signals[m].part for m in here}
            if len(known.kinds) < KINDS_KEPT:
                known.kinds.add(frozenset(names))
            for name in names[: NAMES_KEPT - len(known.others)]:
                if name not in ours:
                    known.others[name] = None
        known.names, known.plan = names, plan

    def _pick(self, part: Readings, places: _Places, reading: JointReading) -> NDArray[np.float64]:
        """The part's values [G] in the robot's units; InputError if one cannot be right."""
        fields = []
        for name, index in places:
            values = reading.position_J if name == "position" else getattr(reading, name)
            if len(values) != len(reading.names):
                joint = next(signal.name for signal in part.signals if signal.field == name)
                raise InputError(
                    f"joint state: expected one {name} per name on {part.topic}, which {joint!r} is read from, got "
                    f"{len(reading.names)} names and {len(values)}; does its driver fill in this field?"
                )
            fields.append(np.asarray(values, dtype=np.float64)[index])
        came_G = fields[0] if len(fields) == 1 else np.concatenate(fields)
        value_G = part.to_robot(came_G)
        plausible_G = (value_G >= part.low_G) & (value_G <= part.high_G)
        if not plausible_G.all():  # also for NaN
            raise _implausible(part, value_G, came_G, int(np.argmin(plausible_G)))
        return value_G

    def _check_frame(self, known: _Topic, part: Readings, frame_id: str) -> None:
        declared = part.signals[0].frame
        if declared and frame_id and frame_id != declared:
            raise InputError(
                f"pose: expected frame {declared!r} on {known.name}, as the robot file says, got {frame_id!r}"
            )
        if known.frame_id is not None and frame_id != known.frame_id:
            raise InputError(
                f"pose: expected frame {known.frame_id!r} on {known.name}, as in its messages before, got "
                f"{frame_id!r}; do two programs publish it?"
            )

    def refuse(self, subject: str, reason: str) -> None:
        """Remembers why the newest message of a camera (by name), or of a topic of signals, could not be used."""
        with self._lock:
            if subject in self._topics:
                known = self._topics[subject]
                known.refused, known.refused_of = reason, known.names
            else:
                self._refused[subject] = reason

    @property
    def kinds(self) -> dict[str, int]:
        """How many kinds of joint states came on each topic, by the joints that are in them."""
        with self._lock:
            return {name: len(known.kinds) for name, known in self._topics.items()}

    def discard(self, frame: CameraFrame, reason: str) -> None:
        """Takes out a frame that has turned out to be of no use, and remembers why as `refuse` does."""
        with self._lock:
            self._cameras[frame.camera].frames.remove(frame)
            self._refused[frame.camera] = reason

    def clear(self) -> None:
        """Forgets all inputs, for instance after the clock was set back; the counts stay."""
        with self._lock:
            for camera in self._cameras.values():
                camera.frames.clear()
                camera.arrived_ns, camera.repeats = 0, False
            for part in self._parts:
                part.clear()
            self._topics = {name: _Topic(name) for name in self._topics}
            self._refused.clear()
            self._arrivals.clear()

    def status(self, now_ns: int) -> dict[str, InputStatus]:
        """What has come in, by camera name, and under "joint state" for the signals: of the part that is behind."""
        with self._lock:
            newest = {
                name: (camera.count, camera.frames[-1].stamp_ns if camera.frames else None)
                for name, camera in self._cameras.items()
            }
            heard = [part.kept[-1][0] for part in self._parts if part.kept]
            count = min((part.count for part in self._parts), default=0)
            newest["joint state"] = count, min(heard) if heard and len(heard) == len(self._parts) else None
        return {
            name: InputStatus(count, None if stamp_ns is None else now_ns - stamp_ns)
            for name, (count, stamp_ns) in newest.items()
        }

    def since_burst_ns(self, now_ns: int) -> int | None:
        """How long before `now_ns` the nearest burst of frames ended (negative: it is still to end); None: unknown.

        Frames of cameras that are triggered together arrive in bursts. Each burst comes some milliseconds early or
        late, so the end of the present one is taken from a line fitted through the ends of the previous ones.
        """
        with self._lock:
            arrivals = list(self._arrivals)
        ends = [end - now_ns for end, after in pairwise([*arrivals, now_ns]) if after - end > BURST_GAP_NS]
        if len(ends) < 2:
            return None
        ends_N = np.array(ends, dtype=np.float64)
        number_N = np.round((ends_N - ends_N[0]) / np.median(np.diff(ends_N)))  # a burst may be missing
        off_N = number_N - number_N.mean()
        period_ns = off_N @ ends_N / (off_N @ off_N)
        since_last_ns = -(ends_N.mean() + period_ns * off_N[-1])
        return int((since_last_ns + period_ns / 2) % period_ns - period_ns / 2)

    def await_burst(self, now_ns: int, since_ns: int | None) -> None:
        """If a burst is ending about now, waits for each required camera's frame of it, 3 ms at most.

        `since_ns` is `since_burst_ns(now_ns)`.
        """
        if since_ns is None or abs(since_ns) > BURST_WAIT_NS:
            return
        with self._frame_came:
            self._frame_came.wait_for(lambda: self.has_burst(now_ns), BURST_WAIT_NS / 1e9)

    def has_burst(self, now_ns: int) -> bool:
        """Whether all required frames of the burst that ends about now have arrived."""
        required = [camera for camera in self._cameras.values() if not camera.source.optional]
        return all(camera.arrived_ns > now_ns - 2 * BURST_WAIT_NS for camera in required)

    def observe(self, now_ns: int, max_age_ns: int, slop_ns: int) -> Observation:
        """The newest set: one frame per required camera, all within `slop_ns`, and the joint state at the oldest one.

        With parts of the robot's signals in messages of their own, each part is as it was at that time.
        An optional camera joins if it has a frame in that span. StaleInput if there is no such set, or if a frame in it
        is older than `max_age_ns` (or its camera's own limit). Stamps more than `slop_ns` ahead of `now_ns` are
        ignored.
        """
        with self._lock:
            usable = {
                name: [frame for frame in camera.frames if frame.stamp_ns <= now_ns + slop_ns]
                for name, camera in self._cameras.items()
            }
            parts = [(part, list(part.kept)) for part in self._parts]
            fault = self._fault(now_ns, max_age_ns)
            refused = dict(self._refused)
        required = {name: kept for name, kept in usable.items() if not self._cameras[name].source.optional}
        for name, kept in required.items():
            self._check_camera(self._cameras[name], kept, now_ns, max_age_ns, refused)
        frames = _newest_set(required, slop_ns)
        if frames is None:
            raise StaleInput(_out_of_step(required, slop_ns))
        stamp_ns = min(frame.stamp_ns for frame in frames.values())
        for name, frame in frames.items():
            limit_ns = self._cameras[name].limit_ns(max_age_ns)
            if now_ns - frame.stamp_ns > limit_ns:
                raise StaleInput(
                    f"cameras: newest images that match within sync_slop_s are {_ms(now_ns - frame.stamp_ns)} ms old, "
                    f"limit {_ms(limit_ns)} ms (max_age_s, for {name!r}); do all cameras run at a steady rate?"
                )
        for name, candidates in usable.items():
            if name not in frames:
                in_span = [frame for frame in candidates if stamp_ns <= frame.stamp_ns <= stamp_ns + slop_ns]
                if in_span:
                    frames[name] = in_span[0]
        if fault:
            raise StaleInput(fault)
        signal_M, joint_ns = self._signals_at(parts, stamp_ns, max_age_ns)
        return Observation(stamp_ns, frames, self._state(signal_M), joint_ns, signal_M)

    def measured(self, now_ns: int, max_age_ns: int) -> Latest:
        """`latest`, for what is about to be sent; a replay tells the two apart."""
        return self.latest(now_ns, max_age_ns)

    def latest(self, now_ns: int, max_age_ns: int) -> Latest:
        """The newest of all signals; StaleInput if one is older than `max_age_ns` (or their own limit)."""
        with self._lock:
            if fault := self._fault(now_ns, max_age_ns):
                raise StaleInput(fault)
            newest = [(part, part.kept[-1]) for part in self._parts]
        joint_ns = tuple([reading[0] for _, reading in newest])
        return self._latest(self._together([(part, value_G) for part, (_, value_G) in newest]), joint_ns)

    def _latest(self, signal_M: NDArray[np.float64], joint_ns: tuple[int, ...]) -> Latest:
        """`joint_ns`: the stamp of each part."""
        stamp_M = np.empty(len(self._signals), dtype=np.int64)
        for part, stamp_ns in zip(self._parts, joint_ns, strict=True):
            stamp_M[part.index_G] = stamp_ns
        return Latest(min(joint_ns), signal_M, joint_ns, stamp_M)

    def _together(self, parts: Sequence[tuple[Readings, NDArray[np.float64]]]) -> NDArray[np.float64]:
        """All signals [M] of their parts."""
        if len(parts) == 1 and parts[0][0].in_order:
            return parts[0][1]
        signal_M = np.empty(len(self._signals))
        for part, value_G in parts:
            signal_M[part.index_G] = value_G
        return signal_M

    def _check_camera(
        self, camera: _Frames, usable: list[CameraFrame], now_ns: int, max_age_ns: int, refused: Mapping[str, str]
    ) -> None:
        name, topic = camera.source.name, camera.source.topic
        why = f"; last message refused: {refused[name]}" if name in refused else f"; is {topic} published?"
        if camera.repeats:
            why = f"; images on {topic} all have one stamp: is it frozen, or does it not stamp (use_receive_time)?"
        if not usable and camera.frames:
            raise StaleInput(
                f"camera {name!r}: stamps on {topic} are ahead of the node's clock by "
                f"{_ms(camera.frames[0].stamp_ns - now_ns)} ms; do both use the same clock (use_sim_time)?"
            )
        if not usable:
            raise StaleInput(f"camera {name!r}: no image yet{why}")
        age_ns, limit_ns = now_ns - usable[-1].stamp_ns, camera.limit_ns(max_age_ns)
        if age_ns > limit_ns:
            raise StaleInput(
                f"camera {name!r}: newest frame {_ms(age_ns)} ms old, limit {_ms(limit_ns)} ms (max_age_s){why}"
            )

    def _fault(self, now_ns: int, max_age_ns: int) -> str | None:
        """Why the newest readings say nothing about where the robot is; the caller has the lock."""
        max_age_ns = max_age_ns if self._joint_max_age_ns is None else self._joint_max_age_ns
        for part in self._parts:
            kind, which = part.kind, self._which(part)
            if (reason := self._reason(part)) is not None:
                why = f"; last message refused: {reason}"
            elif part.repeats:
                why = f"; those on {part.topic} all have one stamp"
                why += ": is it frozen, or does it not stamp (use_receive_time)?"
            else:
                why = f"; is {part.topic} published?"
            if not part.kept:
                return (reason is None and self._missing(part.topic)) or f"{kind}: none yet{which}{why}"
            if part.in_doubt:
                last = f"; the last: {reason}" if reason else ""
                return f"{kind}: expected one arm on {part.topic}, got readings of two places in turn{which}{last}"
            age_ns = now_ns - part.kept[-1][0]
            if age_ns > max_age_ns:
                if reason is None and (came := self._came_without(part, now_ns - max_age_ns)):
                    why = f"; {part.names} missing among {came}, which came last on {part.topic}"
                return f"{kind}: newest{which} {_ms(age_ns)} ms old, limit {_ms(max_age_ns)} ms (max_age_s){why}"
            if age_ns < -AHEAD_NS:
                return (
                    f"{kind}: stamps{which} on {part.topic} are ahead of the node's clock by {_ms(-age_ns)} ms; "
                    "do both use the same clock (use_sim_time)?"
                )
        return None

    def _which(self, part: Readings) -> str:
        """Which part it is, in words, where there are several."""
        if len(self._parts) == 1:
            return ""
        return f" of {part.names}" if part.is_pose else f" of {part.names} on {part.topic}"

    def _came_without(self, part: Readings, since_ns: int) -> str:
        """The joints in the topic's last message if it is newer than that, but has none of the part; else ""."""
        known = self._topics[part.topic]
        names = known.names or ()
        return ", ".join(names) if known.heard_ns >= since_ns and part.signals[0].part not in names else ""

    def _reason(self, part: Readings) -> str | None:
        """Why the last message that had the part was refused; None: it was not."""
        known = self._topics[part.topic]
        had = known.refused_of is None or part.signals[0].part in known.refused_of
        return known.refused if had else None

    def _missing(self, topic: str) -> str | None:
        """Which joints never came on a topic and what came instead; None: nothing did."""
        known = self._topics[topic]
        if not known.kinds:
            return None
        wanted = [signal.part for signal in self._signals if signal.topic == known.name]
        came = [
            self._signals[m].part for part in self._parts if part.topic == known.name and part.kept for m in part.index
        ]
        missing = [name for name in dict.fromkeys(wanted) if name not in came]
        return (
            f"joint state: expected joints {', '.join(dict.fromkeys(wanted))}, but {', '.join(missing)} missing among "
            f"{', '.join([*dict.fromkeys(came), *known.others]) or 'no names'} on {known.name}; is this the robot that "
            "the bundle was made for?"
        )

    def _signals_at(
        self, parts: Sequence[tuple[Readings, Sequence[Reading]]], stamp_ns: int, max_age_ns: int
    ) -> tuple[NDArray[np.float64], tuple[int, ...]]:
        """All signals [M] at `stamp_ns`, and the stamps that each part comes from: between two readings of it.

        Never extrapolated: a frame newer than every reading gets the newest reading unchanged. No reading farther than
        `max_age_ns` from the frame is used.
        """
        values, joint_ns = [], []
        for part, readings in parts:
            after = bisect.bisect_left([stamp for stamp, _ in readings], stamp_ns)
            if after == 0 and readings[0][0] != stamp_ns:
                raise StaleInput(
                    f"{part.kind}: the oldest kept{self._which(part)} is {_ms(readings[0][0] - stamp_ns)} ms newer "
                    f"than the images; was {part.topic} already published when the images were taken?"
                )
            near = [readings[i] for i in (after - 1, after) if 0 <= i < len(readings)]
            if near[-1][0] == stamp_ns:
                near = near[-1:]
            gap_ns = max(abs(stamp - stamp_ns) for stamp, _ in near)
            if gap_ns > max_age_ns:
                raise StaleInput(
                    f"{part.kind}: none{self._which(part)} within {_ms(max_age_ns)} ms (max_age_s) of the images, "
                    f"nearest pair reaches {_ms(gap_ns)} ms; does {part.topic} stall?"
                )
            values.append((part, near[0][1] if len(near) == 1 else part.between(near[0], near[1], stamp_ns)))
            joint_ns += [stamp for stamp, _ in near]
        return self._together(values), tuple(joint_ns)


def _by_field(index: Sequence[int], signals: Sequence[Signal]) -> list[int]:
    """Signals of one topic in the order in which they are picked from a message: field by field."""
    return sorted(index, key=lambda m: FIELDS.index(signals[m].field) if signals[m].field in FIELDS else 0)


def _places(part: Readings, place_of: Mapping[str, int]) -> _Places:
    places: dict[str, list[int]] = {}
    for signal in part.signals:
        places.setdefault(signal.field, []).append(place_of[signal.part])
    return tuple((name, np.array(index, dtype=np.intp)) for name, index in places.items())


def _implausible(part: Readings, value_G: NDArray[np.float64], came_G: NDArray[np.float64], g: int) -> InputError:
    """The message asks about degrees where the value of signal `g` would fit if it were in degrees."""
    signal = part.signals[g]
    if not np.isfinite(came_G[g]):
        return InputError(f"joint {signal.name!r}: expected a finite {signal.field}, got {came_G[g]} on {part.topic}")
    low, high = part.low_G[g], part.high_G[g]
    radians, got = np.radians(value_G[g]), f"{came_G[g]:.4g} on {part.topic}"
    hint = ""
    if came_G[g] != value_G[g]:
        got += f", which the robot file makes {value_G[g]:.4g} {signal.unit}"
        hint = "; as it came it would fit: is it in the robot's unit?" if low <= came_G[g] <= high else ""
    elif signal.unit == "rad" and low <= radians <= high:
        hint = f"; as degrees it would be {radians:.3f} rad: is it published in degrees?"
    return InputError(
        f"joint {signal.name!r}: expected about {signal.lower:.3f} to {signal.upper:.3f} {signal.unit}, its limits, "
        f"got {got}{hint}"
    )


def _newest_set(frames: Mapping[str, Sequence[CameraFrame]], slop_ns: int) -> dict[str, CameraFrame] | None:
    """Each camera's first frame at or after t, for the newest t from which every camera has one within `slop_ns`."""
    for start_ns in sorted({frame.stamp_ns for kept in frames.values() for frame in kept}, reverse=True):
        chosen = {
            name: next((f for f in kept if start_ns <= f.stamp_ns <= start_ns + slop_ns), None)
            for name, kept in frames.items()
        }
        found = {name: frame for name, frame in chosen.items() if frame is not None}
        if len(found) == len(frames):
            return found
    return None


def _out_of_step(frames: Mapping[str, Sequence[CameraFrame]], slop_ns: int) -> str:
    """Names, in words, the two cameras whose nearest frames are farthest apart."""
    names = list(frames)
    gap_ns, first, second = max(
        (min(abs(a.stamp_ns - b.stamp_ns) for a in frames[one] for b in frames[two]), one, two)
        for i, one in enumerate(names)
        for two in names[i + 1 :]
    )
    return (
        f"cameras {first!r} and {second!r}: nearest stamps {_ms(gap_ns)} ms apart, limit {_ms(slop_ns)} ms "
        "(sync_slop_s) for all cameras together; do they stamp with one clock?"
    )


def _check_stamp(what: str, topic: str, stamp_ns: int, arrived_ns: int | None) -> None:
    if arrived_ns is None:
        return
    if stamp_ns - arrived_ns > AHEAD_NS:
        raise InputError(
            f"{what} from the future: stamped {_ms(stamp_ns - arrived_ns)} ms ahead of the node's clock on {topic}, "
            f"limit {_ms(AHEAD_NS)} ms; do both use the same clock (use_sim_time)?"
        )
    if stamp_ns <= 0:
        raise InputError(
            f"{what} without a stamp: got {stamp_ns} ns on {topic}, expected the time at which it was taken; for "
            "drivers that do not stamp set use_receive_time"
        )


def _ms(duration_ns: int) -> str:
    return f"{duration_ns / 1e6:.0f}"


def camera_sources(
    manifest: PolicySpec,
    settings: Settings,
    resolve: Callable[[str], str],
    topics: Mapping[str, str] | None = None,
) -> list[CameraSource]:
    """The bundle's cameras with their full topic names.

    They come from `topics`; for a camera that is not in it, `resolve` makes the full name from the one in the settings.
    """
    sources = []
    for camera in manifest.cameras:
        chosen = settings.camera(camera.name)
        topic = (topics or {}).get(camera.name) or resolve(chosen.topic)
        sources.append(CameraSource(camera.name, topic, camera.optional, own_limit_ns(chosen.max_age_s)))
    return sources


def input_signals(manifest: PolicySpec, topics: Mapping[str, str]) -> list[Signal]:
    """The robot's signals with the full names of their topics, which `topics` has by those in the robot file."""
    return [replace(signal, topic=topics[signal.topic]) for signal in manifest.robot.signals]


def own_limit_ns(max_age_s: float) -> int | None:
    """An input's own `max_age_s` in ns; None for 0: it has none of its own."""
    return to_ns(max_age_s) or None
