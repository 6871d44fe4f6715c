"""When to infer, and which actions of a chunk still lie ahead when it is done.

Inference runs while the arm executes the chunk before (asynchronous execution): by the time a chunk exists, time has
consumed its first actions; they are dropped and the rest starts at the right moment. An executor is any class with the
five methods of `AsynchronousExecutor`; it knows neither ROS nor a clock. Legend: H horizon, J joints. Times in ns on
the node's clock.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.errors import SafetyRefusal
from ki_vla_ros.records import NS_PER_S, ActionChunk


@dataclass(frozen=True, eq=False)
class Reach:
    """Where the arm is, its speed limits (per second), and how far ahead in time an action may be joined."""

    measured_J: NDArray[np.float64]
    speed_J: NDArray[np.float64]
    within_ns: int


@dataclass(frozen=True)
class _Running:
    chunk: ActionChunk
    accepted_ns: int


class AsynchronousExecutor:
    def __init__(self) -> None:
        self._running: _Running | None = None

    def wants_chunk(self, tick_ns: int, execution_horizon_ns: int, tick_period_ns: int) -> bool:
        """Whether the tick that starts at `tick_ns` shall infer: the running chunk has had its time, to half a tick."""
        if self._running is None:
            return True
        return tick_ns - self._running.accepted_ns >= execution_horizon_ns - tick_period_ns // 2

    def join(self, chunk: ActionChunk, now_ns: int, lead_ns: int, reach: Reach) -> ActionChunk:
        """The actions of `chunk` due `lead_ns` after `now_ns` or later, from the first one within reach.

        The arm trails its command: an action due in a few milliseconds may lie farther ahead than the arm can go until
        then. Where none is within reach, nothing is skipped and the gate judges the way to the first action.
        SafetyRefusal if time has consumed all actions: inference took longer than the chunk lasts.
        """
        first = next((k for k in range(chunk.horizon) if chunk.due_ns(k) >= now_ns + lead_ns), None)
        if first is None:
            raise SafetyRefusal(
                f"chunk: its last action was due {(now_ns - chunk.due_ns(chunk.horizon - 1)) / 1e6:.0f} ms ago; "
                "inference is slower than the chunk lasts: fewer flow_steps or a faster engine?"
            )
        for k in range(first, chunk.horizon):
            until_due_ns = chunk.due_ns(k) - now_ns
            if until_due_ns > reach.within_ns:
                break
            way_J = np.abs(chunk.position_HJ[k] - reach.measured_J)
            if np.all(way_J <= reach.speed_J * (until_due_ns / NS_PER_S)):
                return drop_actions(chunk, k)
        return drop_actions(chunk, first)

    def accept(self, command: ActionChunk, tick_ns: int) -> None:
        """`command`, computed by the tick that started at `tick_ns`, went onto the wire."""
        self._running = _Running(command, tick_ns)

    def commanded_J(self, now_ns: int) -> NDArray[np.float64] | None:
        """Where the running chunk wants the joints at `now_ns` (linear between actions), None if no chunk runs."""
        if self._running is None:
            return None
        chunk = self._running.chunk
        if now_ns >= chunk.due_ns(chunk.horizon - 1):
            return None
        due_ns = [chunk.due_ns(k) for k in range(chunk.horizon)]
        return np.array([np.interp(now_ns, due_ns, chunk.position_HJ[:, j]) for j in range(len(chunk.joints))])

    def stop(self) -> None:
        """The running chunk was ended by a hold; the next tick may infer."""
        self._running = None


def drop_actions(chunk: ActionChunk, count: int) -> ActionChunk:
    """`chunk` without its first `count` actions; the others keep their times."""
    return ActionChunk(
        start_ns=chunk.start_ns + count * chunk.period_ns,
        period_ns=chunk.period_ns,
        joints=chunk.joints,
        position_HJ=chunk.position_HJ[count:],
        velocity_HJ=chunk.velocity_HJ[count:],
    )
