"""What the arm was told to be at any moment, from the command messages of a bag; or where it then was.

Legend: N instants, J joints in the dataset's order.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.errors import InputError
from ki_vla_ros.messages.type_names import POSITIONS, TRAJECTORY
from ki_vla_ros.records import NS_PER_S, JointReading, header_ns

KEPT: Final = 1024  # messages; of a stream of 500 a second the last two seconds


class Reference(Protocol):
    """Positions over time. Times are asked for soon after they have passed, in rising order."""

    def at(self, time_ns: int) -> NDArray[np.float64] | None:
        """[J]; None where nothing is known of that time."""
        ...

    def known(self, time_ns: int, now_ns: int) -> bool:
        """Whether `at(time_ns)` is settled when everything up to `now_ns` has been taken in."""
        ...

    def clear(self) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """One message: in force from `from_ns` on, where the arm was told to be at `before_J` (None: nobody had told it).

    `velocity_NJ` None: straight from instant to instant.
    """

    from_ns: int
    before_J: NDArray[np.float64] | None
    time_N: Sequence[int]
    position_NJ: NDArray[np.float64]
    velocity_NJ: NDArray[np.float64] | None


class Commands:
    """What a controller makes of its commands, as joint_trajectory_controller does.

    A trajectory replaces the one before it from its stamp on (0: from its arrival on); it runs from where that one was
    then to its first point, through its points as a cubic where they have velocities, and stays at its last point. An
    array of positions (in the dataset's order of joints) is in force from its arrival on.
    """

    def __init__(self, joints: Sequence[str]) -> None:
        self._joints = tuple(joints)
        self._pieces: deque[_Piece] = deque(maxlen=KEPT)

    def add(self, message: Any, kind: str, arrived_ns: int) -> None:
        """InputError where it does not command all joints."""
        if kind == TRAJECTORY:
            self._pieces.append(self._trajectory(message, arrived_ns))
        elif kind == POSITIONS:
            position_J = np.array(message.data, dtype=np.float64)
            if len(position_J) != len(self._joints):
                raise InputError(f"command: expected {len(self._joints)} positions, got {len(position_J)}")
            self._pieces.append(_Piece(arrived_ns, None, (arrived_ns,), position_J[None], None))
        else:
            raise InputError(f"command: expected {TRAJECTORY} or {POSITIONS}, got {kind}")

    def at(self, time_ns: int) -> NDArray[np.float64] | None:
        """By the newest message that is in force then."""
        piece = next((piece for piece in reversed(self._pieces) if piece.from_ns <= time_ns), None)
        if piece is None or time_ns >= piece.time_N[0]:
            return None if piece is None else _interpolate(piece, time_ns)
        if piece.before_J is None:
            return None
        share = (time_ns - piece.from_ns) / (piece.time_N[0] - piece.from_ns)
        return piece.before_J + share * (piece.position_NJ[0] - piece.before_J)

    def known(self, time_ns: int, now_ns: int) -> bool:
        return now_ns > time_ns

    def clear(self) -> None:
        self._pieces.clear()

    def _trajectory(self, message: Any, arrived_ns: int) -> _Piece:
        index = {name: i for i, name in enumerate(message.joint_names)}
        missing = [name for name in self._joints if name not in index]
        if missing or not message.points:
            what = f"{', '.join(missing)} missing" if missing else "no points"
            raise InputError(f"command: expected points for joints {', '.join(self._joints)}, got {what}")
        order = [index[name] for name in self._joints]
        widths = {len(point.positions) for point in message.points}
        if widths != {len(index)}:
            raise InputError(f"command: expected {len(index)} positions in every point, got {sorted(widths)}")
        from_ns = header_ns(message) or arrived_ns
        offsets = [point.time_from_start for point in message.points]
        time_N = [from_ns + int(offset.sec) * NS_PER_S + int(offset.nanosec) for offset in offsets]
        if any(after <= before for before, after in pairwise(time_N)):
            raise InputError("command: expected rising times from point to point")
        with_velocities = all(len(point.velocities) == len(index) for point in message.points)
        return _Piece(
            from_ns,
            self.at(from_ns),
            time_N,
            np.array([point.positions for point in message.points], dtype=np.float64)[:, order],
            np.array([point.velocities for point in message.points], dtype=np.float64)[:, order]
            if with_velocities
            else None,
        )


class Readings:
    """Where the arm was: between two joint states on a straight line, nothing outside."""

    def __init__(self, joints: Sequence[str], max_gap_ns: int) -> None:
        """`max_gap_ns`: joint states farther apart say nothing about the time between them."""
        self._joints, self._max_gap_ns = tuple(joints), max_gap_ns
        self._time: deque[int] = deque(maxlen=KEPT)
        self._position: deque[NDArray[np.float64]] = deque(maxlen=KEPT)

    def add(self, reading: JointReading) -> None:
        """Of a reading that `ObservationBuffer` has taken."""
        if self._time and reading.stamp_ns <= self._time[-1]:
            return
        order = [reading.names.index(name) for name in self._joints]
        self._time.append(reading.stamp_ns)
        self._position.append(reading.position_J[order])

    def at(self, time_ns: int) -> NDArray[np.float64] | None:
        after = bisect.bisect_left(self._time, time_ns)
        if after == len(self._time):
            return None
        if self._time[after] == time_ns:
            return self._position[after]
        if after == 0 or self._time[after] - self._time[after - 1] > self._max_gap_ns:
            return None
        share = (time_ns - self._time[after - 1]) / (self._time[after] - self._time[after - 1])
        return self._position[after - 1] + share * (self._position[after] - self._position[after - 1])

    def known(self, time_ns: int, now_ns: int) -> bool:
        reached = bool(self._time) and self._time[-1] >= time_ns
        return reached or now_ns > time_ns + self._max_gap_ns

    def clear(self) -> None:
        self._time.clear()
        self._position.clear()


def _interpolate(piece: _Piece, time_ns: int) -> NDArray[np.float64]:
    """At or after the first instant."""
    after = bisect.bisect_right(piece.time_N, time_ns)
    if after == len(piece.time_N):
        return piece.position_NJ[-1]
    start_ns, end_ns = piece.time_N[after - 1], piece.time_N[after]
    one_J, two_J = piece.position_NJ[after - 1], piece.position_NJ[after]
    share = (time_ns - start_ns) / (end_ns - start_ns)
    if piece.velocity_NJ is None:
        return one_J + share * (two_J - one_J)
    length_s = (end_ns - start_ns) / NS_PER_S
    one_slope_J, two_slope_J = piece.velocity_NJ[after - 1] * length_s, piece.velocity_NJ[after] * length_s
    bend_J = one_slope_J + two_slope_J - 2.0 * (two_J - one_J)
    rise_J = 3.0 * (two_J - one_J) - 2.0 * one_slope_J - two_slope_J
    return one_J + share * (one_slope_J + share * (rise_J + share * bend_J))
