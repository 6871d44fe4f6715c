"""A motion as a stream of positions, for forwarding controllers: they leave timing and interpolation to us.

`Player` says which position is next; `MotionStream` sends it from a thread. After a motion's end its last position goes
out once, and then nothing until the next motion: a forwarding controller keeps its last command.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.errors import MotionInterrupted
from ki_vla_ros.records import NS_PER_S, Motion, to_ns

# The longest wait for a motion to end: under simulated time its clock may stand still.
LONGEST_WAIT_S = 2.0
# Simulated time may run at any speed, so a waiting thread checks it this often.
SIMULATED_CLOCK_POLL_S = 0.005


class Player:
    """Plays a motion in steps of at most one period, however late a step is.

    A forwarding controller stands still until the next position comes. So the motion's time stops as well while one is
    late, and a step never is longer than the arm may go in a period. After a gap of more than a whole period the arm
    has come to a halt: the motion is dropped, and the next one has to start from rest where the last position left the
    arm. Times in ns; `now_ns` is given by the caller and never goes back.
    """

    def __init__(self, period_ns: int) -> None:
        self.period_ns = period_ns
        self.motion: Motion | None = None
        self._played_ns = 0  # how far the motion has been played
        self._sent_ns = 0  # when its last position went out
        self._sent_J: NDArray[np.float64] = np.empty(0)
        self._interruption: tuple[int, NDArray[np.float64]] | None = None  # how long the gap was, and where it ended

    def motion_ns(self, now_ns: int) -> int:
        """The time on the clock of the motion, by which the controller moves; it stands still after a gap."""
        if self._interruption is not None:
            return self._played_ns
        return now_ns if self.motion is None else self._played_ns + min(now_ns - self._sent_ns, self.period_ns)

    def play(self, motion: Motion, now_ns: int) -> None:
        """Plays `motion` instead of the one that is playing; MotionInterrupted, once, if that one was dropped."""
        if self._interruption is not None:
            (gap_ns, position_J), self._interruption = self._interruption, None
            raise MotionInterrupted(
                f"stream: no position went out for {gap_ns / 1e6:.0f} ms, expected one every "
                f"{self.period_ns / 1e6:.0f} ms; the arm has stopped and starts again from there",
                position_J,
            )
        if self.motion is None or now_ns < self._sent_ns:  # the latter: simulated time was set back
            # It stands where the motion starts, as if just sent there.
            self._played_ns = self._sent_ns = now_ns
            self._sent_J = motion.at(now_ns)[0]
        self.motion = motion

    def interrupt(self, now_ns: int) -> None:
        """Drops the motion, because its last position did not go out or comes too late."""
        self._interruption = now_ns - self._sent_ns, self._sent_J
        self.motion = None

    def due_ns(self) -> int:
        """When the next position is due; only while a motion is playing."""
        return self._sent_ns + self.period_ns

    def next(self, now_ns: int) -> NDArray[np.float64] | None:
        """The position [J] that is due at `now_ns`; None: the motion had to be dropped."""
        assert self.motion is not None
        gap_ns = now_ns - self._sent_ns
        if gap_ns > 2 * self.period_ns:
            # Not where the motion was by then: it may have replaced another one since the last position went out.
            self.interrupt(now_ns)
            return None
        self._played_ns, self._sent_ns = self.motion_ns(now_ns), now_ns
        self._sent_J = self.motion.at(self._played_ns)[0]
        if self._played_ns >= self.motion.end_ns:
            self.motion = None
        return self._sent_J


class MotionStream:
    """Plays motions on the clock `now_ns`; `send` is called from the stream's thread, which the first motion starts.

    `simulated`: the clock runs at any speed, so its gaps say nothing about the process, and no motion is dropped.
    """

    def __init__(
        self,
        send: Callable[[NDArray[np.float64]], None],
        now_ns: Callable[[], int],
        period_s: float,
        simulated: bool = False,
    ) -> None:
        self._send, self._now_ns, self._simulated = send, now_ns, simulated
        self._player = Player(to_ns(period_s))
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def motion_ns(self) -> int:
        with self._changed:
            return self._player.motion_ns(self._now_ns())

    def play(self, motion: Motion) -> None:
        """Plays `motion` from now on, instead of the one that was playing; MotionInterrupted as `Player.play`."""
        with self._changed:
            self._player.play(motion, self._now_ns())
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="stream")
                self._thread.start()

    def wait_until_ended(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._player.motion is None, LONGEST_WAIT_S)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        player = self._player
        while True:
            with self._changed:
                self._changed.wait_for(lambda: player.motion is not None or self._closed)
                if not self._wait_until_due():
                    return
                now_ns = self._now_ns()
                position_J = player.next(min(now_ns, player.due_ns()) if self._simulated else now_ns)
                # Under the lock: a motion that replaces this one must not be told that it starts elsewhere.
                if position_J is not None:
                    try:
                        self._send(position_J)
                    except Exception:  # whoever sends has said why; the next motion starts where the arm stands
                        player.interrupt(now_ns)
                if player.motion is None:
                    self._changed.notify_all()

    def _wait_until_due(self) -> bool:
        """Waits for the next position's time; False if the stream was closed meanwhile."""
        while not self._closed:
            left_s = (self._player.due_ns() - self._now_ns()) / NS_PER_S
            if left_s <= 0.0:
                return True
            self._changed.wait(min(left_s, SIMULATED_CLOCK_POLL_S) if self._simulated else left_s)
        return False
