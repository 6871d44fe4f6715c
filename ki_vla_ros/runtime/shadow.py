"""Shadow mode, without ROS: what the policy would do, beside what the arm does under someone else's command.

The loop's thread adds chunks. The executor thread adds joint states and commands, and reads the figures once a second,
under the same lock. Legend: H horizon, J joints. Stamps in ns on the node's clock.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.records import NS_PER_S, ActionChunk, SignalReading
from ki_vla_ros.robot import CommandSpace, main_axes
from ki_vla_ros.runtime.diagnostics import WINDOW
from ki_vla_ros.runtime.paths import LONGEST_GAP_NS, CommandedAxes, MeasuredPath
from ki_vla_ros.settings import ReferenceName

# How long the paths are kept: a chunk begins at its images' stamp, which may lie some time back.
KEPT_NS = 10 * NS_PER_S


class ShadowComparison:
    """Compares the last WINDOW chunks with the reference."""

    def __init__(self, space: CommandSpace, reference: ReferenceName) -> None:
        """`space`: the policy's, whose rotations are counted as those of the chunks."""
        self._space, self._joints, self._reference = space, space.axes, reference
        self._lock = threading.Lock()
        self._newest_ns = 0
        self._clear()

    def add_chunk(self, chunk: ActionChunk) -> None:
        with self._lock:
            self._waiting.append((chunk, self._space.reference_P4.copy()))

    def add_readings(self, readings: Iterable[SignalReading]) -> None:
        """Adds what the observation has accepted of a message."""
        with self._lock:
            self._measured.add(readings)

    def add_command(self, output: str, received_ns: int, message: Any) -> None:
        """Adds what this output's controller was sent; InputError if it does not fit it."""
        with self._lock:
            self._commanded.take(output, message, received_ns)

    def values(self, now_ns: int) -> dict[str, str]:
        """Figures by name, for /diagnostics; errors are root mean squares in the joint's unit, empty if not known."""
        with self._lock:
            self._compare(now_ns)
            return dict(self._figures())

    def _clear(self) -> None:
        robot = self._space.robot
        self._measured, self._commanded = MeasuredPath(robot.signals, robot), CommandedAxes(robot)
        # With what the chunk's rotations are counted from.
        self._waiting: deque[tuple[ActionChunk, NDArray[np.float64]]] = deque(maxlen=WINDOW)
        self._errors: deque[NDArray[np.float64]] = deque(maxlen=WINDOW)  # [H, J], NaN where the reference has nothing

    def _compare(self, now_ns: int) -> None:
        """Compares the chunks whose last action was due so long ago that the reference is complete."""
        if now_ns < self._newest_ns:  # the clock was set back
            self._clear()
        self._newest_ns = now_ns
        path = self._measured if self._reference == "joint_states" else self._commanded
        while self._waiting and _last_due_ns(self._waiting[0][0]) + LONGEST_GAP_NS < now_ns:
            chunk, counted_P4 = self._waiting.popleft()
            due_H = chunk.start_ns + (np.arange(chunk.horizon) + 1) * chunk.period_ns
            reference_HJ = self._space.nearest(path.at(due_H), chunk.position_HJ, counted_P4)
            self._errors.append(chunk.position_HJ - reference_HJ)
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
        arm = error_NHJ[..., main_axes(self._joints)[0]]
        yield "shadow rms", _rms(arm)
        horizon = error_NHJ.shape[1]
        for k in sorted({0, horizon // 2, horizon - 1}):
            yield f"shadow rms action {k + 1}", _rms(arm[:, k])


def _last_due_ns(chunk: ActionChunk) -> int:
    return chunk.due_ns(chunk.horizon - 1)


def _rms(error: NDArray[np.float64]) -> str:
    known = error[np.isfinite(error)]
    return f"{np.sqrt(np.mean(np.square(known))):.4f}" if known.size else ""
