"""ROS 2's controllers as they are documented, for judging what the node sends. Nothing of ki_vla_ros is used here.

`TrajectoryController` is joint_trajectory_controller with `interpolate_from_desired_state: true`, `PositionController`
is forward_command_controller. Both read the bytes of the messages, and know nothing else of the sender.

Legend: J joints, K points of a trajectory, N instants. Positions in rad or m, times in ns on the controller's steady
clock; stamps are on its ROS clock, which may be set while the steady clock goes on.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NS_PER_S = 1_000_000_000
Array = NDArray[np.float64]
Times = NDArray[np.int64]


class Trajectory(NamedTuple):
    """A trajectory_msgs/JointTrajectory; `velocity_KJ` is None where the points give positions only."""

    stamp_ns: int
    joints: tuple[str, ...]
    time_K: Times
    position_KJ: Array
    velocity_KJ: Array | None


def read_trajectory(data: bytes) -> Trajectory:
    """Reads little-endian CDR: each number at a multiple of its size, counted from after the four-byte header.

    All points but the first begin at a multiple of eight, so that they are rows of one table.
    """

    def text(at: int) -> tuple[str, int]:
        (length,) = struct.unpack_from("<I", data, at)
        return data[at + 4 : at + 3 + length].decode(), at + 4 + length + -length % 4

    sec, nanosec = struct.unpack_from("<iI", data, 4)
    _, at = text(12)
    (count,) = struct.unpack_from("<I", data, at)
    at += 4
    names = []
    for _ in range(count):
        name, at = text(at)
        names.append(name)
    points, positions = struct.unpack_from("<II", data, at)
    row = np.dtype(
        [
            ("counts", "<u4", 2),  # of positions, and the gap after it
            ("position", "<f8", (positions,)),
            ("velocities", "<u4", 2),
            ("velocity", "<f8", (positions,)),
            ("rest", "<u4", 2),  # accelerations, effort
            ("sec", "<i4"),
            ("nanosec", "<u4"),
        ]
    )
    at += 4
    if at % 8 == 0:  # the first point has no gap: give it one
        data, at = data[: at + 4] + b"0000" + data[at + 4 :], at
    table = np.frombuffer(data, row, offset=at)
    assert len(table) == points, f"{len(table)} points, expected {points}"
    assert np.all(table["counts"][:, 0] == positions) and np.all(table["velocities"][:, 0] == positions)
    assert not table["rest"].any(), "accelerations and effort are not used"
    time_K = table["sec"].astype(np.int64) * NS_PER_S + table["nanosec"]
    return Trajectory(sec * NS_PER_S + nanosec, tuple(names), time_K, table["position"], table["velocity"])


@dataclass(frozen=True, eq=False)
class Piece:
    """What one message makes of the motion from `from_ns` on, until the next one's begins."""

    from_ns: int
    start_ns: int  # when its time_from_start is 0
    time_K: Times  # `from_ns` or a point that has passed, then the points ahead
    position_KJ: Array
    velocity_KJ: Array
    straight: bool
    label: object = None

    def at(self, time_N: Times) -> tuple[Array, Array]:
        """Position and velocity [N, J]: cubics (or straight lines) between the points, rest after the last."""
        last = len(self.time_K) - 1
        k_N = np.searchsorted(self.time_K, time_N, side="right") - 1
        a_N, b_N = np.clip(k_N, 0, last), np.clip(k_N + 1, 0, last)
        length_N = np.maximum(self.time_K[b_N] - self.time_K[a_N], 1)[:, None] / NS_PER_S
        s_N = np.where(k_N >= last, 0.0, (time_N - self.time_K[a_N]) / NS_PER_S)[:, None] / length_N
        p0_NJ, way_NJ = self.position_KJ[a_N], self.position_KJ[b_N] - self.position_KJ[a_N]
        if self.straight:
            return p0_NJ + s_N * way_NJ, way_NJ / length_N
        u0_NJ, u1_NJ = self.velocity_KJ[a_N] * length_N, self.velocity_KJ[b_N] * length_N
        b_NJ, c_NJ = 3.0 * way_NJ - 2.0 * u0_NJ - u1_NJ, u0_NJ + u1_NJ - 2.0 * way_NJ
        still_N = (k_N >= last)[:, None]
        position_NJ = p0_NJ + s_N * (u0_NJ + s_N * (b_NJ + s_N * c_NJ))
        velocity_NJ = (u0_NJ + s_N * (2.0 * b_NJ + 3.0 * s_N * c_NJ)) / length_N
        return position_NJ, np.where(still_N, self.velocity_KJ[a_N], velocity_NJ)


class TrajectoryController:
    """Follows the newest trajectory that has begun; one that is stamped ahead waits for its time.

    `offset_ns`: its ROS clock minus its steady clock.
    """

    def __init__(self, joints: Sequence[str], position_J: Array, now_ns: int, offset_ns: int) -> None:
        self.joints, self.offset_ns = tuple(joints), offset_ns
        self.pieces: list[Piece] = []
        self.refused: list[str] = []
        self.rest(position_J, now_ns)

    def rest(self, position_J: Array, now_ns: int) -> None:
        """Forgets every trajectory and rests here, as when it is activated."""
        self._begin(Piece(now_ns, now_ns, np.array([now_ns]), position_J[None], 0.0 * position_J[None], False))

    def set_clock(self, offset_ns: int, now_ns: int) -> None:
        """Its ROS clock is set. What runs goes on by the steady clock; what waits begins at its stamp."""
        moved_ns, self.offset_ns = offset_ns - self.offset_ns, offset_ns
        waiting = [piece for piece in self.pieces if piece.from_ns > now_ns]
        self.pieces = [piece for piece in self.pieces if piece.from_ns <= now_ns]
        for piece in waiting:
            self._start(piece.start_ns - moved_ns, piece.time_K[1:] - piece.start_ns, piece, now_ns)

    def receive(self, data: bytes, now_ns: int, label: object = None) -> Piece | None:
        """Takes a message; None if it is refused, and then what is in force stays in force."""
        message = read_trajectory(data)
        if message.joints != self.joints or not len(message.time_K) or np.any(np.diff(message.time_K, prepend=-1) <= 0):
            self.refused.append("names or times")
            return None
        if not np.isfinite(message.position_KJ).all():
            self.refused.append("not finite")
            return None
        straight = message.velocity_KJ is None
        velocity_KJ = 0.0 * message.position_KJ if message.velocity_KJ is None else message.velocity_KJ
        if np.any(velocity_KJ[-1] != 0.0) or not np.isfinite(velocity_KJ).all():
            self.refused.append("moving at the end")
            return None
        start_ns = message.stamp_ns - self.offset_ns if message.stamp_ns else now_ns
        if start_ns + int(message.time_K[-1]) < now_ns:
            self.refused.append("past")
            return None
        given = Piece(0, 0, message.time_K, message.position_KJ, velocity_KJ, straight, label)
        return self._start(start_ns, message.time_K, given, now_ns)

    def _start(self, start_ns: int, time_K: Times, given: Piece, now_ns: int) -> Piece:
        from_ns = max(start_ns, now_ns)
        due_K = start_ns + time_K
        position_KJ, velocity_KJ = given.position_KJ[-len(due_K) :], given.velocity_KJ[-len(due_K) :]
        passed = int(np.searchsorted(due_K, from_ns, side="right")) - 1
        if passed < 0:  # no point has passed: it sets out from the state in which it is
            position_J, velocity_J = self.sample(from_ns)
            due_K = np.concatenate([[from_ns], due_K])
            position_KJ = np.concatenate([position_J[None], position_KJ])
            velocity_KJ = np.concatenate([velocity_J[None], velocity_KJ])
            passed = 0
        ahead = slice(passed, None)
        piece = Piece(
            from_ns, start_ns, due_K[ahead], position_KJ[ahead], velocity_KJ[ahead], given.straight, given.label
        )
        self._begin(piece)
        return piece

    def _begin(self, piece: Piece) -> None:
        self.pieces = [earlier for earlier in self.pieces if earlier.from_ns < piece.from_ns]
        self.pieces.append(piece)

    def piece(self, time_ns: int) -> Piece:
        return next(piece for piece in reversed(self.pieces) if piece.from_ns <= time_ns or piece is self.pieces[0])

    def sample(self, time_ns: int) -> tuple[Array, Array]:
        """Where it tells the arm to be, and how fast to move [J]."""
        position_NJ, velocity_NJ = self.piece(time_ns).at(np.array([time_ns]))
        return position_NJ[0], velocity_NJ[0]

    def walk(self, time_N: Times) -> tuple[Array, Array, NDArray[np.int64]]:
        """Positions and velocities [N, J], and the number of the piece in force [N]."""
        begin_N = np.searchsorted(time_N, [piece.from_ns for piece in self.pieces])
        ends = [*begin_N[1:].tolist(), len(time_N)]
        parts = [p.at(time_N[a:b]) for p, a, b in zip(self.pieces, begin_N.tolist(), ends, strict=True)]
        number_N = np.repeat(np.arange(len(parts)), np.array(ends) - begin_N)
        return np.concatenate([p for p, _ in parts]), np.concatenate([v for _, v in parts]), number_N
