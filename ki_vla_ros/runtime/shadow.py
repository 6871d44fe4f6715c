"""Shadow mode: what the policy would do, beside what the arm does under someone else's command. No ROS.

The loop's thread adds chunks, the executor thread joint states and commands, and asks for figures once a second; a lock
keeps them apart. Legend: H horizon, J joints. Stamps in ns on the node's clock.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.records import NS_PER_S, ActionChunk, JointReading
from ki_vla_ros.robot import JointSpec
from ki_vla_ros.runtime.diagnostics import WINDOW
from ki_vla_ros.runtime.paths import LONGEST_GAP_NS, CommandedPath, MeasuredPath
from ki_vla_ros.settings import ReferenceName

# What happened is kept for so long after it: a chunk speaks from its images' stamp on, which may be some time ago.
KEPT_NS = 10 * NS_PER_S


class ShadowComparison:
    """Chunks against the reference, over the last WINDOW of them."""

    def __init__(self, joints: Sequence[JointSpec], reference: ReferenceName) -> None:
        self._joints, self._reference = tuple(joints), reference
        self._lock = threading.Lock()
        self._newest_ns = 0
        self._clear()

    def add_chunk(self, chunk: ActionChunk) -> None:
        with self._lock:
            self._waiting.append(chunk)

    def add_joints(self, reading: JointReading) -> None:
        """One that the observation has accepted."""
        with self._lock:
            self._measured.add(reading)

    def add_command(self, received_ns: int, message: Any) -> None:
        """A JointTrajectory or Float64MultiArray to the arm; InputError where it does not fit the joints."""
        with self._lock:
            self._commanded.take(message, received_ns)

    def values(self, now_ns: int) -> dict[str, str]:
        """Figures by name, for /diagnostics; errors are root mean squares in the joint's unit, empty if not known."""
        with self._lock:
            self._compare(now_ns)
            return dict(self._figures())

    def _clear(self) -> None:
        names = [joint.name for joint in self._joints]
        self._measured, self._commanded = (
            MeasuredPath(names, [j.max_velocity for j in self._joints]),
            CommandedPath(names),
        )
        self._waiting: deque[ActionChunk] = deque(maxlen=WINDOW)
        self._errors: deque[NDArray[np.float64]] = deque(maxlen=WINDOW)  # [H, J], NaN where the reference has nothing

    def _compare(self, now_ns: int) -> None:
        """Judges the chunks whose last action was due, and what came of it is known."""
        if now_ns < self._newest_ns:  # the clock was set back
            self._clear()
        self._newest_ns = now_ns
        path = self._measured if self._reference == "joint_states" else self._commanded
        while self._waiting and self._waiting[0].due_ns(self._waiting[0].horizon - 1) + LONGEST_GAP_NS < now_ns:
            chunk = self._waiting.popleft()
            due_H = chunk.start_ns + (np.arange(chunk.horizon) + 1) * chunk.period_ns
            self._errors.append(chunk.position_HJ - path.at(due_H))
        for kept in (self._measured, self._commanded):
            kept.forget(now_ns - KEPT_NS)

    def _figures(self) -> Iterator[tuple[str, str]]:
        yield "shadow reference", self._reference
        yield "shadow chunks compared", str(sum(bool(np.isfinite(error).any()) for error in self._errors))
        yield "shadow chunks without reference", str(sum(not np.isfinite(error).any() for error in self._errors))
        if not self._errors:
            return
        error_NHJ = np.array(self._errors)
        for j, joint in enumerate(self._joints):
            yield f"shadow rms {joint.name}", _rms(error_NHJ[..., j])
        units = [joint.unit for joint in self._joints]
        turning = error_NHJ[..., [unit == ("rad" if "rad" in units else "m") for unit in units]]
        yield "shadow rms", _rms(turning)
        horizon = error_NHJ.shape[1]
        for k in sorted({0, horizon // 2, horizon - 1}):
            yield f"shadow rms action {k + 1}", _rms(turning[:, k])


def _rms(error: NDArray[np.float64]) -> str:
    known = error[np.isfinite(error)]
    return f"{np.sqrt(np.mean(np.square(known))):.4f}" if known.size else ""
