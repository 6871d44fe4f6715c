"""A motion as a stream of positions, for forwarding controllers: they leave timing and interpolation to us.

A thread samples the motion once per period on the node's clock. After a motion's end its last position goes out once,
and then nothing until the next motion: a forwarding controller keeps its last command.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.records import Motion

# The longest wait for a motion to end: under simulated time its clock may stand still.
LONGEST_WAIT_S = 2.0


class MotionStream:
    """Plays motions; `send` is called from the stream's own thread, which starts with the first motion."""

    def __init__(self, send: Callable[[NDArray[np.float64]], None], now_ns: Callable[[], int], period_s: float) -> None:
        self._send, self._now_ns, self._period_s = send, now_ns, period_s
        self._motion: Motion | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def play(self, motion: Motion) -> None:
        """Plays `motion` from now on, instead of the one that was playing."""
        with self._changed:
            self._motion = motion
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="stream")
                self._thread.start()

    def wait_until_ended(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._motion is None, LONGEST_WAIT_S)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._motion is not None or self._closed)
                if self._closed:
                    return
                motion, now_ns = self._motion, self._now_ns()
            assert motion is not None
            self._send(motion.at(now_ns)[0])
            with self._changed:
                if now_ns >= motion.end_ns and self._motion is motion:
                    self._motion = None
                    self._changed.notify_all()
                self._changed.wait_for(lambda: self._closed, self._period_s)
