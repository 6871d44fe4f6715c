"""ROS 2's controllers as they are documented, for judging what the node sends. Nothing of ki_vla_ros is used here.

`TrajectoryController` is joint_trajectory_controller with `interpolate_from_desired_state: true`. It reads the bytes of
the messages and knows nothing else of the sender.

Legend: J joints, K points of a trajectory, N instants. Positions in rad or m, times in ns on the controller's steady
clock; stamps are on its ROS clock, which may be set while the steady clock goes on.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

NS_PER_S = 1_000_000_000
Array = NDArray[np.float64]
Times = NDArray[np.int64]


class Trajectory(NamedTuple):
    """A trajectory_msgs/JointTrajectory whose points have positions and velocities."""

    stamp_ns: int
    joints: tuple[str, ...]
    time_K: Times
    position_KJ: Array
    velocity_KJ: Array


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
    if at % 8 == 0:  # counted from after the header, its doubles follow without a gap: give it one
        data = data[: at + 4] + bytes(4) + data[at + 4 :]
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
    time_K: Times  # `from_ns` or a point that has passed, then the points ahead
    position_KJ: Array
    velocity_KJ: Array
    start_ns: int = 0  # when the message's time_from_start is 0
    message: Trajectory | None = None
    label: object = None

    def at(self, time: Any) -> tuple[Array, Array]:
        """Position and velocity [N, J] at times [N], or [J] at one: cubics between the points, rest after the last."""
        if len(self.time_K) == 1:
            shape = (*np.shape(time), self.position_KJ.shape[1])
            return np.broadcast_to(self.position_KJ[0], shape), np.broadcast_to(self.velocity_KJ[0], shape)
        k = np.minimum(self.time_K.searchsorted(time, side="right"), len(self.time_K) - 1) - 1
        length = (self.time_K[k + 1] - self.time_K[k])[..., None] / NS_PER_S
        s = np.minimum((time - self.time_K[k])[..., None] / NS_PER_S / length, 1.0)
        p, way = self.position_KJ[k], self.position_KJ[k + 1] - self.position_KJ[k]
        u, w = self.velocity_KJ[k] * length, self.velocity_KJ[k + 1] * length
        b, c = 3.0 * way - 2.0 * u - w, u + w - 2.0 * way
        return p + s * (u + s * (b + s * c)), (u + s * (2.0 * b + 3.0 * s * c)) / length


class TrajectoryController:
    """Follows the newest trajectory that has begun; one that is stamped ahead waits for its time.

    `offset_ns`: its ROS clock minus its steady clock. Messages are to come in the order of their arrival.
    """

    def __init__(self, joints: Sequence[str], position_J: Array, now_ns: int, offset_ns: int) -> None:
        self.joints, self.offset_ns = tuple(joints), offset_ns
        self.pieces: list[Piece] = []
        self.refused: list[str] = []
        self.rest(position_J, now_ns)

    def rest(self, position_J: Array, now_ns: int) -> None:
        """Forgets every trajectory and rests here, as when it is activated."""
        self._begin(Piece(now_ns, np.array([now_ns]), position_J[None], np.zeros_like(position_J)[None]))

    def set_clock(self, offset_ns: int, now_ns: int) -> None:
        """Its ROS clock is set. What runs goes on by the steady clock; what waits begins at its stamp."""
        moved_ns, self.offset_ns = offset_ns - self.offset_ns, offset_ns
        waiting = [piece for piece in self.pieces if piece.from_ns > now_ns]
        self.pieces = [piece for piece in self.pieces if piece.from_ns <= now_ns]
        for piece in waiting:
            assert piece.message is not None
            self._start(piece.message, piece.start_ns - moved_ns, now_ns, piece.label)

    def receive(self, data: bytes, now_ns: int, label: object = None) -> Piece | None:
        """Takes a message; None if it is refused, and then what is in force stays in force."""
        message = read_trajectory(data)
        start_ns = message.stamp_ns - self.offset_ns if message.stamp_ns else now_ns
        reasons = {
            "joints": message.joints != self.joints,
            "times": not len(message.time_K)
            or message.time_K[0] < 0
            or (message.time_K[1:] <= message.time_K[:-1]).any(),
            "not finite": not (np.isfinite(message.position_KJ).all() and np.isfinite(message.velocity_KJ).all()),
            "moving at the end": message.velocity_KJ[-1:].any(),
            "past": len(message.time_K) and start_ns + message.time_K[-1] < now_ns,
        }
        if any(reasons.values()):
            self.refused += [reason for reason, holds in reasons.items() if holds]
            return None
        return self._start(message, start_ns, now_ns, label)

    def _start(self, message: Trajectory, start_ns: int, now_ns: int, label: object) -> Piece:
        from_ns, due_K = max(start_ns, now_ns), start_ns + message.time_K
        position_KJ, velocity_KJ = message.position_KJ, message.velocity_KJ
        if due_K[0] > from_ns:  # it sets out from the state in which it is
            position_J, velocity_J = self.sample(from_ns)
            due_K = np.concatenate([[from_ns], due_K])
            position_KJ, velocity_KJ = np.vstack([position_J, position_KJ]), np.vstack([velocity_J, velocity_KJ])
        ahead = slice(int(np.searchsorted(due_K, from_ns, side="right")) - 1, None)
        piece = Piece(from_ns, due_K[ahead], position_KJ[ahead], velocity_KJ[ahead], start_ns, message, label)
        self._begin(piece)
        return piece

    def _begin(self, piece: Piece) -> None:
        """What was to begin later waits no more."""
        self.pieces = [earlier for earlier in self.pieces if earlier.from_ns < piece.from_ns]
        self.pieces.append(piece)

    def sample(self, time_ns: int) -> tuple[Array, Array]:
        """Where it tells the arm to be, and how fast to move [J]; where it began, for times before that."""
        piece = next((piece for piece in reversed(self.pieces) if piece.from_ns <= time_ns), self.pieces[0])
        return piece.at(max(time_ns, piece.from_ns))

    def walk(self, time_N: Times) -> tuple[Array, Array, NDArray[np.int64]]:
        """Positions and velocities [N, J], and the number of the piece in force [N]."""
        begin_P = np.searchsorted(time_N, [piece.from_ns for piece in self.pieces]).tolist()
        parts = [
            piece.at(time_N[begin:end])
            for piece, begin, end in zip(self.pieces, begin_P, [*begin_P[1:], len(time_N)], strict=True)
        ]
        number_N = np.repeat(np.arange(len(parts)), [len(position_NJ) for position_NJ, _ in parts])
        return np.concatenate([p for p, _ in parts]), np.concatenate([v for _, v in parts]), number_N


State = tuple[float, float, float]  # position, velocity, acceleration of one joint


def polynomial(states: tuple[State, State], orders: int, lasts_s: float, since_s: float) -> State:
    """The polynomial of `2 * orders` coefficients with the given states at both ends, from its linear equations."""

    def derivative(order: int, at_s: float) -> list[float]:
        return [math.perm(power, order) * at_s ** max(power - order, 0) for power in range(2 * orders)]

    rows = [derivative(order, at_s) for at_s in (0.0, lasts_s) for order in range(orders)]
    factors = np.linalg.solve(np.array(rows), [state[order] for state in states for order in range(orders)])
    position, velocity, acceleration = (float(np.dot(derivative(order, since_s), factors)) for order in range(3))
    return position, velocity, acceleration


@dataclass
class LiteralController:
    """The controller's documentation taken literally: a step per millisecond, joint by joint, nothing vectorised."""

    state: dict[str, State]
    active: Any = None
    waiting: tuple[Any, ...] = ()
    start_ns: int = 0
    before_ns: int = 0
    before: dict[str, State] | None = None

    def receive(self, trajectory: Any, now_ns: int) -> None:
        stamp_ns = trajectory.stamp_ns
        if stamp_ns and stamp_ns + trajectory.points[-1].time_from_start_ns < now_ns:
            return
        self.waiting = tuple(earlier for earlier in self.waiting if earlier.stamp_ns < max(stamp_ns, now_ns))
        if stamp_ns > now_ns:
            self.waiting += (trajectory,)
        else:
            self.install(trajectory, now_ns)

    def install(self, trajectory: Any, now_ns: int) -> None:
        self.active, self.start_ns = trajectory, trajectory.stamp_ns or now_ns
        self.before_ns, self.before = now_ns, dict(self.state)

    def step(self, now_ns: int) -> list[float]:
        if self.waiting and now_ns >= self.waiting[0].stamp_ns:
            self.state = self.desired(now_ns)
            self.install(self.waiting[0], now_ns)
            self.waiting = self.waiting[1:]
        self.state = self.desired(now_ns)
        return [position for position, _, _ in self.state.values()]

    def desired(self, now_ns: int) -> dict[str, State]:
        if self.active is None or self.before is None:
            return self.state
        found = {}
        for joint in self.state:
            if joint not in self.active.joints:
                found[joint] = self.left_out(joint, now_ns)
                continue
            i = list(self.active.joints).index(joint)
            knots = [
                (self.start_ns + p.time_from_start_ns, [float(v[i]) for v in p[1:4] if len(v)])
                for p in self.active.points
            ]
            found[joint] = self.follow([(self.before_ns, list(self.before[joint]))], knots, now_ns)
        return found

    def left_out(self, joint: str, now_ns: int) -> State:
        """The state of a joint that is left out: where it was, and at rest if the other joints give velocities."""
        assert self.active is not None and self.before is not None
        stays = self.before[joint][0]
        knots = [
            (self.start_ns + p.time_from_start_ns, [stays, 0.0, 0.0][: sum(len(v) > 0 for v in p[1:4])])
            for p in self.active.points
        ]
        return self.follow([(self.before_ns, list(self.before[joint]))], knots, now_ns)

    @staticmethod
    def follow(before: list[tuple[int, list[float]]], knots: list[tuple[int, list[float]]], now_ns: int) -> State:
        if now_ns >= knots[-1][0]:
            position, velocity, acceleration = (*knots[-1][1], 0.0, 0.0)[:3]
            return position, velocity, acceleration
        way = knots if now_ns >= knots[0][0] else before + knots
        k = max(k for k in range(len(way)) if way[k][0] <= now_ns)
        (one_ns, one), (two_ns, two) = way[k], way[k + 1]
        orders = min(len(one), len(two))
        ends = [(*values, 0.0, 0.0)[:3] for values in (one, two)]
        return polynomial((ends[0], ends[1]), orders, (two_ns - one_ns) / NS_PER_S, (now_ns - one_ns) / NS_PER_S)
