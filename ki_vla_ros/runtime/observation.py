"""The newest inputs that belong together in time, or a refusal that names what is missing.

The executor thread adds and the worker thread observes, under one lock. Nothing here reads a clock: `now_ns` comes from
the caller. Only `await_burst` waits. Legend: J joints in the manifest's order. Stamps in integer ns on the node's
clock.
"""

from __future__ import annotations

import bisect
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.bundle import PolicySpec
from ki_vla_ros.errors import InputError, StaleInput
from ki_vla_ros.records import CameraFrame, JointReading, Observation, to_ns
from ki_vla_ros.robot import Signal
from ki_vla_ros.runtime.readings import Readings, insert
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


class ObservationBuffer:
    def __init__(
        self,
        cameras: Sequence[CameraSource],
        joints: Sequence[str],
        joint_topic: str,
        specs: Sequence[Signal] | None = None,
        joint_max_age_ns: int | None = None,
        state: Callable[[NDArray[np.float64]], NDArray[np.float64]] | None = None,
    ) -> None:
        """`specs`: what is known of `joints`, to tell degrees from radians and readings from impossible ones.

        `state` makes the policy's state of the signals (None: they are it). `joint_max_age_ns`: the greatest age at
        which a joint state may be acted upon; None: the caller's limit holds.
        """
        self._cameras = {camera.name: _Frames(camera) for camera in cameras}
        self._joints = tuple(joints)
        self._joint_topic = joint_topic
        self._names: tuple[str, ...] = ()  # of the last reading, and where in them each joint is
        self._index: list[int] = []
        self._readings = Readings(specs, joint_topic)
        self._specs = tuple(specs or ())
        self._plausible = _plausible(len(self._joints), self._specs)
        self._joint_max_age_ns = joint_max_age_ns
        self._state = state or (lambda signal_M: signal_M)
        self._readings_count = 0
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

    def add_joints(self, reading: JointReading, arrived_ns: int | None = None) -> JointReading:
        """Picks the manifest's joints from `reading` by name; returns them as they are kept.

        InputError if one is missing, not finite, in another unit or farther from the last reading than it can turn, or
        for a stamp that cannot be right at `arrived_ns` (the node's clock).
        """
        if reading.names != self._names:
            self._index = self._find(reading.names)
            self._names = reading.names
        position_J = reading.position_J[self._index]
        low_J, high_J = self._plausible
        plausible_J = (position_J >= low_J) & (position_J <= high_J)
        if not plausible_J.all():  # also for NaN
            raise self._implausible(position_J, int(np.argmin(plausible_J)))
        _check_stamp("joint state", self._joint_topic, reading.stamp_ns, arrived_ns)
        with self._lock:
            position_J = self._readings.add(reading.stamp_ns, position_J)
            self._readings_count += not self._readings.repeats
            self._refused.pop("joint state", None)
        return JointReading(reading.stamp_ns, self._joints, position_J)

    def _find(self, names: tuple[str, ...]) -> list[int]:
        missing = [name for name in self._joints if name not in names]
        if missing:
            raise InputError(
                f"joint state: expected joints {', '.join(self._joints)}, but {', '.join(missing)} missing among "
                f"{', '.join(names) or 'no names'} on {self._joint_topic}; is this the robot that the bundle "
                "was made for?"
            )
        return [names.index(name) for name in self._joints]

    def _implausible(self, position_J: NDArray[np.float64], j: int) -> InputError:
        """The message asks about degrees where the value of joint `j` would fit if it were in degrees."""
        if not np.isfinite(position_J[j]):
            return InputError(
                f"joint {self._joints[j]!r}: expected a finite position, got {position_J[j]} on {self._joint_topic}"
            )
        low_J, high_J = self._plausible
        joint, radians = self._specs[j], np.radians(position_J[j])
        fits = joint.unit == "rad" and low_J[j] <= radians <= high_J[j]
        hint = f"; as degrees it would be {radians:.3f} rad: is it published in degrees?" if fits else ""
        return InputError(
            f"joint {joint.name!r}: expected about {joint.lower:.3f} to {joint.upper:.3f} {joint.unit}, its limits, "
            f"got {position_J[j]:.4g} on {self._joint_topic}{hint}"
        )

    def refuse(self, subject: str, reason: str) -> None:
        """Remembers why the newest message of a camera (by name) or of "joint state" could not be used."""
        with self._lock:
            self._refused[subject] = reason

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
            self._readings.clear()
            self._refused.clear()
            self._arrivals.clear()

    def status(self, now_ns: int) -> dict[str, InputStatus]:
        """What has come in, by camera name, and under "joint state" for the joints."""
        with self._lock:
            newest = {
                name: (camera.count, camera.frames[-1].stamp_ns if camera.frames else None)
                for name, camera in self._cameras.items()
            }
            kept = self._readings.kept
            newest["joint state"] = self._readings_count, kept[-1][0] if kept else None
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

        An optional camera joins if it has a frame in that span. StaleInput if there is no such set, or if a frame in it
        is older than `max_age_ns` (or its camera's own limit). Stamps more than `slop_ns` ahead of `now_ns` are
        ignored.
        """
        with self._lock:
            usable = {
                name: [frame for frame in camera.frames if frame.stamp_ns <= now_ns + slop_ns]
                for name, camera in self._cameras.items()
            }
            readings = list(self._readings.kept)
            joint_fault = self._joint_fault(now_ns, max_age_ns)
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
        if joint_fault:
            raise StaleInput(joint_fault)
        signal_M, joint_ns = self._joints_at(readings, stamp_ns, max_age_ns)
        return Observation(stamp_ns, frames, self._state(signal_M), joint_ns, signal_M)

    def measured(self, now_ns: int, max_age_ns: int) -> tuple[int, NDArray[np.float64]]:
        """`latest`, for what is about to be sent; a replay tells the two apart."""
        return self.latest(now_ns, max_age_ns)

    def latest(self, now_ns: int, max_age_ns: int) -> tuple[int, NDArray[np.float64]]:
        """The stamp of the newest joint positions, and the positions [J].

        StaleInput if they are older than `max_age_ns` (or their own limit).
        """
        with self._lock:
            if fault := self._joint_fault(now_ns, max_age_ns):
                raise StaleInput(fault)
            return self._readings.kept[-1]

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

    def _joint_fault(self, now_ns: int, max_age_ns: int) -> str | None:
        """Why the newest joint positions say nothing about where the arm is; the caller has the lock."""
        topic, kept = self._joint_topic, self._readings.kept
        if (reason := self._refused.get("joint state")) is not None:
            why = f"; last message refused: {reason}"
        elif self._readings.repeats:
            why = f"; those on {topic} all have one stamp: is it frozen, or does it not stamp (use_receive_time)?"
        else:
            why = f"; is {topic} published?"
        if not kept:
            return f"joint state: none yet{why}"
        if self._readings.in_doubt:
            last = f"; the last: {reason}" if reason else ""
            return f"joint state: expected one arm on {topic}, got readings of two places in turn{last}"
        max_age_ns = max_age_ns if self._joint_max_age_ns is None else self._joint_max_age_ns
        age_ns = now_ns - kept[-1][0]
        if age_ns > max_age_ns:
            return f"joint state: newest {_ms(age_ns)} ms old, limit {_ms(max_age_ns)} ms (max_age_s){why}"
        if age_ns < -AHEAD_NS:
            return (
                f"joint state: stamps on {topic} are ahead of the node's clock by {_ms(-age_ns)} ms; "
                "do both use the same clock (use_sim_time)?"
            )
        return None

    def _joints_at(
        self, readings: list[tuple[int, NDArray[np.float64]]], stamp_ns: int, max_age_ns: int
    ) -> tuple[NDArray[np.float64], tuple[int, ...]]:
        """Joint positions at `stamp_ns` and the stamps they come from: interpolated between two readings.

        Never extrapolated: a frame newer than every reading gets the newest reading unchanged. No reading farther than
        `max_age_ns` from the frame is used.
        """
        after = bisect.bisect_left([stamp for stamp, _ in readings], stamp_ns)
        if after == 0 and readings[0][0] != stamp_ns:
            raise StaleInput(
                f"joint state: the oldest kept is {_ms(readings[0][0] - stamp_ns)} ms newer than the images; "
                f"was {self._joint_topic} already published when the images were taken?"
            )
        near = [readings[i] for i in (after - 1, after) if 0 <= i < len(readings)]
        if near[-1][0] == stamp_ns:
            return near[-1][1], (stamp_ns,)
        gap_ns = max(abs(stamp - stamp_ns) for stamp, _ in near)
        if gap_ns > max_age_ns:
            raise StaleInput(
                f"joint state: none within {_ms(max_age_ns)} ms (max_age_s) of the images, nearest pair reaches "
                f"{_ms(gap_ns)} ms; does {self._joint_topic} stall?"
            )
        if len(near) == 1:
            return near[0][1], (near[0][0],)
        (before_ns, before_J), (after_ns, after_J) = near
        if (np.abs(after_J - before_J) > np.pi).any():
            j = int(np.argmax(np.abs(after_J - before_J)))
            raise StaleInput(
                f"joint state: joint {self._joints[j]!r} goes from {before_J[j]:.3f} to {after_J[j]:.3f} around the "
                "images, and no value between is right; if it turns without end, its robot file must say continuous"
            )
        weight = (stamp_ns - before_ns) / (after_ns - before_ns)
        return before_J + weight * (after_J - before_J), (before_ns, after_ns)


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


def _plausible(joints: int, specs: Sequence[Signal]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Positions [J] that no joint is beyond: its limits, and on either side as much again as they are apart.

    A joint that turns without end may be anywhere that a float tells small angles apart; where `specs` is empty,
    anywhere.
    """
    if not specs:
        return np.full(joints, -np.finfo(np.float64).max), np.full(joints, np.finfo(np.float64).max)
    rows = [(-1e6, 1e6) if s.continuous else (2.0 * s.lower - s.upper, 2.0 * s.upper - s.lower) for s in specs]
    low_J, high_J = np.array(rows).T.copy()
    largest = np.finfo(np.float64).max  # also where there is no limit, infinity is no reading
    return np.maximum(low_J, -largest), np.minimum(high_J, largest)


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


def own_limit_ns(max_age_s: float) -> int | None:
    """An input's own `max_age_s` in ns; None for 0: it has none of its own."""
    return to_ns(max_age_s) or None
