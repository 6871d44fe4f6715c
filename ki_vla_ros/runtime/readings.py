"""Joint readings in the order of their stamps, each one that the arm can have made since the one before.

A reading farther from its neighbour than a joint can turn in the time between is refused: two joints have changed
places in it, or another program publishes the same topic. Where such readings go on and no other comes, the arm has
really been put elsewhere (a simulator's reset, a driver's restart, a push while no readings came), and they are
accepted. Two programs that publish in turn never are. Legend: J joints. Stamps in integer ns on the node's clock.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.errors import InputError
from ki_vla_ros.robot import TURN, Signal, continuous, nearest_turn
from ki_vla_ros.runtime.paths import reach

# Joint readings to interpolate between: 2.5 s at 200 Hz, half a second at 1 kHz.
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
    """`kept` are stamps and positions [J]; those of continuous joints are unwound: they pass pi without a jump."""

    def __init__(self, joints: Sequence[Signal] | None, topic: str) -> None:
        """Without `joints` (None) nothing is known of their speed, and every reading is accepted."""
        self.kept: deque[Reading] = deque(maxlen=READINGS_KEPT)
        self._joints, self._topic = tuple(joints or ()), topic
        self._speed_J = np.array([joint.max_velocity for joint in self._joints])
        self._continuous_J = continuous(self._joints)
        self._turns = bool(self._continuous_J.any())
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

    @property
    def in_doubt(self) -> bool:
        """Whether so many readings were refused of late, or for so long, that nobody knows where the arm is."""
        unknown = self._elsewhere is not None and self._elsewhere[0] - self.kept[-1][0] > UNKNOWN_NS
        return unknown or self._doubt >= DOUBT_LIMIT

    def add(self, stamp_ns: int, position_J: NDArray[np.float64]) -> NDArray[np.float64]:
        """Keeps a reading; returns it as kept. InputError for one that the arm cannot have made."""
        kept = self.kept
        place = len(kept)
        if place and kept[-1][0] >= stamp_ns:  # rare: a search through all stamps
            place = bisect.bisect_left(kept, stamp_ns, key=lambda reading: reading[0])
            self.repeats = kept[place][0] == stamp_ns
            if self.repeats:
                return kept[place][1]
        else:
            self.repeats = False
        if kept and self._joints:
            near_ns, near_J = kept[max(place - 1, 0)]
            published_J = position_J
            if self._turns:
                position_J = nearest_turn(position_J, near_J, self._continuous_J)
            distance_J = np.abs(position_J - near_J)
            if (distance_J > reach(self._speed_J, stamp_ns - near_ns)).any():
                if not self._goes_on_elsewhere(stamp_ns, position_J):
                    raise self._refusal(distance_J, position_J, stamp_ns - near_ns)
                self.clear()
                place, position_J = 0, published_J
            elif self._doubt:
                self._doubt -= 1
                if self._elsewhere is not None and stamp_ns > self._elsewhere[0]:
                    self._contradicted_ns = stamp_ns
                    self._forget_elsewhere()
        insert(kept, place, (stamp_ns, position_J))
        return position_J

    def _goes_on_elsewhere(self, stamp_ns: int, position_J: NDArray[np.float64]) -> bool:
        """Takes in a reading that is too far away; whether there have been enough of them, each near the last."""
        self._doubt = min(self._doubt + DOUBT_ADDED, DOUBT_MOST)
        last, self._elsewhere = self._elsewhere, (stamp_ns, position_J)
        if last is None or (np.abs(position_J - last[1]) > reach(self._speed_J, stamp_ns - last[0])).any():
            self._elsewhere_from_ns, self._elsewhere_count = stamp_ns, 0
        self._elsewhere_count += 1
        from_ns = self._elsewhere_from_ns
        if self._contradicted_ns is not None:
            from_ns = max(from_ns, self._contradicted_ns + CONTRADICTED_NS)
        return stamp_ns - from_ns >= ELSEWHERE_NS and self._elsewhere_count >= ELSEWHERE_READINGS

    def _refusal(self, distance_J: NDArray[np.float64], position_J: NDArray[np.float64], since_ns: int) -> InputError:
        j = int(np.argmax(distance_J / self._speed_J))
        joint = self._joints[j]
        hint = "do two programs publish it, or do two joints change places?"
        if joint.unit == "rad" and abs(distance_J[j] - TURN) < TURN / 4:
            hint = (
                "that is about a whole turn: if the joint turns without end, its robot file or URDF must say continuous"
            )
        return InputError(
            f"joint state that jumps: joint {joint.name!r}: at {position_J[j]:.3f} {joint.unit} on {self._topic}, "
            f"{distance_J[j]:.3f} from the reading {since_ns / 1e6:.0f} ms before, expected at most "
            f"{reach(self._speed_J, since_ns)[j]:.3f} (max_velocity {joint.max_velocity:g}); {hint}"
        )


def insert(kept: deque, place: int, item: object) -> None:  # type: ignore[type-arg]
    """Inserts in order; a full deque drops its oldest item and refuses one older than all it holds."""
    if kept.maxlen is not None and len(kept) == kept.maxlen:
        if place == 0:
            return
        kept.popleft()
        place -= 1
    kept.insert(place, item)
