"""Readings of the robot in the order of their stamps, each one that it can have made since the one before.

A reading farther from its neighbour than a joint can turn in the time between is refused: two joints have changed
places in it, or another program publishes the same topic. Where such readings go on and no other comes, the arm has
really been put elsewhere (a simulator's reset, a driver's restart, a push while no readings came), and they are
accepted. Two programs that publish in turn never are. Legend: G the signals that come together in one message. Stamps
in integer ns on the node's clock.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.errors import InputError, StaleInput
from ki_vla_ros.robot import POSE_STAMPED, TURN, Signal, continuous, nearest_turn
from ki_vla_ros.runtime.paths import reach

# Readings to interpolate between: 2.5 s at 200 Hz, half a second at 1 kHz.
READINGS_KEPT = 512
# How long and how often the arm must be read elsewhere until that is where it is. By then the first of these readings
# has made the loop hold, and the arm is at rest.
ELSEWHERE_NS, ELSEWHERE_READINGS = 500_000_000, 5
# For so long after readings of two places came in turn, no place counts as new.
CONTRADICTED_NS = 10_000_000_000
# Each refused reading adds to the doubt, each accepted one takes one away; from the limit on, where the arm is counts
# as unknown. So a single wrong reading holds nothing, but one in five does.
DOUBT_ADDED, DOUBT_LIMIT, DOUBT_MOST = 4, 16, 32
# A refused reading that is newer than the last accepted one by more than this leaves open where the arm is: where
# readings are rare, many refusals would take too long.
UNKNOWN_NS = 50_000_000

Reading = tuple[int, NDArray[np.float64]]


class Readings:
    """What is known of the signals `index` of one topic, which come together in messages.

    `kept` are stamps and values [G] in the robot's units. Those of continuous joints are unwound: they pass pi without
    a jump. Quaternions do not change their sign.
    """

    def __init__(self, signals: Sequence[Signal], index: Sequence[int] | None = None) -> None:
        """`signals`: those of `index`, all of one topic; an infinite speed: nothing is known, every reading is kept."""
        self.kept: deque[Reading] = deque(maxlen=READINGS_KEPT)
        self.signals, self.index = tuple(signals), tuple(range(len(signals)) if index is None else index)
        self.index_G = np.array(self.index, dtype=np.intp)
        self.in_order = self.index == tuple(range(len(self.index)))
        self.topic, self.is_pose = self.signals[0].topic, self.signals[0].type == POSE_STAMPED
        self.kind = "pose" if self.is_pose else "joint state"
        self.count = 0  # of those that were kept
        self.low_G, self.high_G = plausible(self.signals)
        self._scale_G = np.array([signal.scale for signal in self.signals])
        self._offset_G = np.array([signal.offset for signal in self.signals])
        self._is_mapped = bool((self._scale_G != 1.0).any() or self._offset_G.any())
        self._speed_G = np.array([signal.max_velocity for signal in self.signals])
        self._continuous_G = continuous(self.signals)
        self._unwinds = self.is_pose or bool(self._continuous_G.any())
        self._knows_speed = bool(np.isfinite(self._speed_G).any())
        self._angle_G = np.array([signal.unit == "rad" for signal in self.signals])
        self.clear()

    def clear(self) -> None:
        self.kept.clear()
        self.repeats = False  # the last reading had the stamp of one before
        self._doubt = 0
        self._contradicted_ns: int | None = None
        self._forget_elsewhere()

    def _forget_elsewhere(self) -> None:
        self._elsewhere: Reading | None = None  # the last refused reading
        self._elsewhere_from_ns, self._elsewhere_count = 0, 0

    def of(self, chosen: Collection[int]) -> Readings:
        """The same for some of the signals, which come in messages of their own from now on."""
        places = [place for place, m in enumerate(self.index) if m in chosen]
        part = Readings([self.signals[place] for place in places], [self.index[place] for place in places])
        part.kept.extend((stamp_ns, value_G[places]) for stamp_ns, value_G in self.kept)
        part.count, part.repeats, part._doubt = self.count, self.repeats, self._doubt
        part._contradicted_ns = self._contradicted_ns
        if self._elsewhere is not None:
            part._elsewhere = self._elsewhere[0], self._elsewhere[1][places]
            part._elsewhere_from_ns, part._elsewhere_count = self._elsewhere_from_ns, self._elsewhere_count
        return part

    @property
    def names(self) -> str:
        """The signals in words."""
        return self.topic if self.is_pose else ", ".join(signal.name for signal in self.signals)

    @property
    def in_doubt(self) -> bool:
        """Whether so many readings were refused of late, or for so long, that nobody knows where the arm is."""
        unknown = self._elsewhere is not None and self._elsewhere[0] - self.kept[-1][0] > UNKNOWN_NS
        return unknown or self._doubt >= DOUBT_LIMIT

    def to_robot(self, value_G: NDArray[np.float64]) -> NDArray[np.float64]:
        """Values in the topic's units -> the robot's."""
        return value_G * self._scale_G + self._offset_G if self._is_mapped else value_G

    def add(self, stamp_ns: int, value_G: NDArray[np.float64]) -> NDArray[np.float64]:
        """Keeps a reading; returns it as kept. InputError for one that the robot cannot have made."""
        kept = self.kept
        place = len(kept)
        if place and kept[-1][0] >= stamp_ns:  # rare: a search through all stamps
            place = bisect.bisect_left(kept, stamp_ns, key=lambda reading: reading[0])
            self.repeats = kept[place][0] == stamp_ns
            if self.repeats:
                return kept[place][1]
        else:
            self.repeats = False
        if kept and (self._knows_speed or self._unwinds):
            near_ns, near_G = kept[max(place - 1, 0)]
            published_G = value_G
            value_G = self._unwound(value_G, near_G)
            distance_G = np.abs(value_G - near_G)
            if (distance_G > reach(self._speed_G, stamp_ns - near_ns)).any():
                if not self._goes_on_elsewhere(stamp_ns, value_G):
                    raise self._refusal(distance_G, value_G, stamp_ns - near_ns)
                self.clear()
                place, value_G = 0, published_G
            elif self._doubt:
                self._doubt -= 1
                if self._elsewhere is not None and stamp_ns > self._elsewhere[0]:
                    self._contradicted_ns = stamp_ns
                    self._forget_elsewhere()
        insert(kept, place, (stamp_ns, value_G))
        self.count += 1
        return value_G

    def between(self, before: Reading, after: Reading, stamp_ns: int) -> NDArray[np.float64]:
        """Values on the line between two readings; StaleInput where a joint goes half a turn, and no value is right."""
        (before_ns, before_G), (after_ns, after_G) = before, after
        turned_G = np.abs(after_G - before_G) > np.pi
        if turned_G.any() and (turned_G & self._angle_G).any():
            g = int(np.argmax(turned_G & self._angle_G))
            raise StaleInput(
                f"joint state: joint {self.signals[g].name!r} goes from {before_G[g]:.3f} to {after_G[g]:.3f} around "
                "the images, and no value between is right; if it turns without end, its robot file must say continuous"
            )
        value_G = before_G + (stamp_ns - before_ns) / (after_ns - before_ns) * (after_G - before_G)
        if self.is_pose:
            value_G[3:] /= np.linalg.norm(value_G[3:])
        return value_G

    def _unwound(self, value_G: NDArray[np.float64], near_G: NDArray[np.float64]) -> NDArray[np.float64]:
        """The same place, without whole turns or a change of sign since `near_G`."""
        if not self._unwinds:
            return value_G
        if not self.is_pose:
            return nearest_turn(value_G, near_G, self._continuous_G)
        return value_G if value_G[3:] @ near_G[3:] >= 0.0 else np.concatenate([value_G[:3], -value_G[3:]])

    def _goes_on_elsewhere(self, stamp_ns: int, value_G: NDArray[np.float64]) -> bool:
        """Takes in a reading that is too far away; whether there have been enough of them, each near the last."""
        self._doubt = min(self._doubt + DOUBT_ADDED, DOUBT_MOST)
        last, self._elsewhere = self._elsewhere, (stamp_ns, value_G)
        if last is not None:
            distance_G = np.abs(self._unwound(value_G, last[1]) - last[1])
        if last is None or (distance_G > reach(self._speed_G, stamp_ns - last[0])).any():
            self._elsewhere_from_ns, self._elsewhere_count = stamp_ns, 0
        self._elsewhere_count += 1
        from_ns = self._elsewhere_from_ns
        if self._contradicted_ns is not None:
            from_ns = max(from_ns, self._contradicted_ns + CONTRADICTED_NS)
        return stamp_ns - from_ns >= ELSEWHERE_NS and self._elsewhere_count >= ELSEWHERE_READINGS

    def _refusal(self, distance_G: NDArray[np.float64], value_G: NDArray[np.float64], since_ns: int) -> InputError:
        g = int(np.argmax(distance_G / self._speed_G))
        signal = self.signals[g]
        hint = "do two programs publish it, or do two joints change places?"
        if self.is_pose:
            hint = "do two programs publish it?"
        elif signal.unit == "rad" and abs(distance_G[g] - TURN) < TURN / 4:
            hint = (
                "that is about a whole turn: if the joint turns without end, its robot file or URDF must say continuous"
            )
        what = signal.part if self.is_pose else f"joint {signal.name!r}"
        return InputError(
            f"{self.kind} that jumps: {what}: at {value_G[g]:.3f} {signal.unit} on {self.topic}, "
            f"{distance_G[g]:.3f} from the reading {since_ns / 1e6:.0f} ms before, expected at most "
            f"{reach(self._speed_G, since_ns)[g]:.3f} (max_velocity {signal.max_velocity:g}); {hint}"
        )


def plausible(signals: Sequence[Signal]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Values [G] that no signal is beyond: its limits, and on either side as much again as they are apart.

    A joint that turns without end may be anywhere that a float tells small angles apart.
    """
    rows = [(-1e6, 1e6) if s.continuous else (2.0 * s.lower - s.upper, 2.0 * s.upper - s.lower) for s in signals]
    low_G, high_G = np.array(rows).reshape(-1, 2).T.copy()
    largest = np.finfo(np.float64).max  # also where there is no limit, infinity is no reading
    return np.maximum(low_G, -largest), np.minimum(high_G, largest)


def insert(kept: deque, place: int, item: object) -> None:  # type: ignore[type-arg]
    """Inserts in order; a full deque drops its oldest item and refuses one older than all it holds."""
    if kept.maxlen is not None and len(kept) == kept.maxlen:
        if place == 0:
            return
        kept.popleft()
        place -= 1
    kept.insert(place, item)
