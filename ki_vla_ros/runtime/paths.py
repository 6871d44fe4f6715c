"""What the arm really did, or was really told: the reference that predicted actions are compared with.

Legend: J joints in the manifest's order, N instants. Positions in rad or m, stamps in ns on the bag's clock.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.errors import InputError
from ki_vla_ros.records import NS_PER_S, JointReading

# Joint states farther apart than this say nothing of the time between them.
LONGEST_GAP_NS = 250_000_000
# An arm that is farther from its last reading than its joints can turn in the time between, and this, was set
# elsewhere: a simulator's reset, or a bag made of pieces.
JUMP_S = 0.05


class Reference(Protocol):
    def at(self, time_N: NDArray[np.int64]) -> NDArray[np.float64]:
        """[N, J]; NaN where the bag does not say."""
        ...

    def forget(self, before_ns: int) -> None:
        """Nothing before then will be asked for any more."""
        ...


class MeasuredPath:
    """The joint states that followed: linear between readings at most 250 ms apart.

    `max_velocity_J` (per second): what is faster was not a motion. `jump_after` says where.
    """

    def __init__(self, joints: Sequence[str], max_velocity_J: Sequence[float]) -> None:
        self._joints = tuple(joints)
        self._max_velocity_J = np.asarray(max_velocity_J)
        self._jumps: deque[int] = deque()  # stamps of the readings before
        self.jumps = 0
        self._stamps: deque[int] = deque()
        self._positions: deque[NDArray[np.float64]] = deque()
        self._names: tuple[str, ...] = ()
        self._index: list[int] = []

    def add(self, reading: JointReading) -> None:
        """One that the observation has accepted. What is older than the newest is left out."""
        if self._stamps and reading.stamp_ns <= self._stamps[-1]:
            return
        if reading.names != self._names:
            self._names, self._index = reading.names, [reading.names.index(name) for name in self._joints]
        position_J = reading.position_J[self._index]
        if self._stamps:
            passed_s = (reading.stamp_ns - self._stamps[-1]) / NS_PER_S
            if np.any(np.abs(position_J - self._positions[-1]) > self._max_velocity_J * (passed_s + JUMP_S)):
                self._jumps.append(self._stamps[-1])
                self.jumps += 1
        self._stamps.append(reading.stamp_ns)
        self._positions.append(position_J)

    def jump_after(self, since_ns: int) -> int | None:
        """The last instant before the arm was set elsewhere, if it was after `since_ns`."""
        return next((stamp_ns for stamp_ns in self._jumps if stamp_ns >= since_ns), None)

    def at(self, time_N: NDArray[np.int64]) -> NDArray[np.float64]:
        path_NJ = np.full((len(time_N), len(self._joints)), np.nan)
        first = bisect_right(self._stamps, int(time_N.min())) - 1
        last = bisect_right(self._stamps, int(time_N.max())) + 1
        keep = range(max(first, 0), min(last, len(self._stamps)))
        if len(keep) < 2:
            return path_NJ
        stamp_M = np.array([self._stamps[i] for i in keep], dtype=np.int64)
        position_MJ = np.array([self._positions[i] for i in keep])
        after_N = np.clip(np.searchsorted(stamp_M, time_N), 1, len(stamp_M) - 1)
        before_ns, after_ns = stamp_M[after_N - 1], stamp_M[after_N]
        known_N = (time_N >= before_ns) & (time_N <= after_ns) & (after_ns - before_ns <= LONGEST_GAP_NS)
        weight_N = ((time_N - before_ns) / (after_ns - before_ns))[:, None]
        between_NJ = position_MJ[after_N - 1] * (1.0 - weight_N) + position_MJ[after_N] * weight_N
        path_NJ[known_N] = between_NJ[known_N]
        return path_NJ

    def forget(self, before_ns: int) -> None:
        while len(self._stamps) > 1 and self._stamps[1] < before_ns:
            self._stamps.popleft()
            self._positions.popleft()
        while self._jumps and self._jumps[0] < before_ns:
            self._jumps.popleft()


class CommandedPath:
    """What the arm's controller was told: trajectories, each in force until the next one, or single positions.

    Before a trajectory's first point the way leads there from where the command before it was; without one nothing is
    known. After its last point the arm is told to stay.
    """

    def __init__(self, joints: Sequence[str]) -> None:
        self._joints = tuple(joints)
        self._starts: deque[int] = deque()
        self._paths: deque[tuple[NDArray[np.int64], NDArray[np.float64]]] = deque()

    def add_trajectory(self, log_ns: int, message: Any) -> None:
        """A trajectory_msgs/JointTrajectory received at `log_ns`; InputError where it does not fit the joints."""
        index = {name: i for i, name in enumerate(message.joint_names)}
        if missing := [name for name in self._joints if name not in index]:
            raise InputError(f"command: expected joints {', '.join(self._joints)}, but {', '.join(missing)} missing")
        stamp_ns = int(message.header.stamp.sec) * NS_PER_S + int(message.header.stamp.nanosec)
        start_ns = stamp_ns or log_ns
        order = [index[name] for name in self._joints]
        if not message.points or any(len(point.positions) != len(index) for point in message.points):
            raise InputError(f"command: expected points with {len(index)} positions each")
        times = [
            start_ns + int(p.time_from_start.sec) * NS_PER_S + int(p.time_from_start.nanosec) for p in message.points
        ]
        self._add(start_ns, times, [np.asarray(point.positions, dtype=np.float64)[order] for point in message.points])

    def add_positions(self, log_ns: int, message: Any) -> None:
        """A std_msgs/Float64MultiArray in the bundle's joint order."""
        if len(message.data) != len(self._joints):
            raise InputError(f"command: expected {len(self._joints)} positions, got {len(message.data)}")
        self._add(log_ns, [log_ns], [np.asarray(message.data, dtype=np.float64)])

    def _add(self, start_ns: int, times: list[int], positions: list[NDArray[np.float64]]) -> None:
        if not np.all(np.isfinite(positions)) or np.any(np.diff(times) <= 0):
            raise InputError("command: expected numbers at rising times")
        if self._starts and start_ns <= self._starts[-1]:
            return
        if times[0] > start_ns and self._starts:
            before_J = self._sample(len(self._starts) - 1, np.array([start_ns]))[0]
            times, positions = [start_ns, *times], [before_J, *positions]
        self._starts.append(start_ns)
        self._paths.append((np.array(times, dtype=np.int64), np.array(positions)))

    def at(self, time_N: NDArray[np.int64]) -> NDArray[np.float64]:
        path_NJ = np.full((len(time_N), len(self._joints)), np.nan)
        in_force_N = np.array([bisect_right(self._starts, int(time)) - 1 for time in time_N])
        for number in np.unique(in_force_N[in_force_N >= 0]):
            those_N = in_force_N == number
            path_NJ[those_N] = self._sample(int(number), time_N[those_N])
        return path_NJ

    def _sample(self, number: int, time_N: NDArray[np.int64]) -> NDArray[np.float64]:
        time_M, position_MJ = self._paths[number]
        since_M, since_N = (time_M - time_M[0]) / NS_PER_S, (time_N - time_M[0]) / NS_PER_S
        columns = [np.interp(since_N, since_M, position_M, left=np.nan) for position_M in position_MJ.T]
        return np.stack(columns, axis=1)

    def forget(self, before_ns: int) -> None:
        while len(self._starts) > 1 and self._starts[1] < before_ns:
            self._starts.popleft()
            self._paths.popleft()
