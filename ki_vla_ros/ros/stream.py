"""A motion as a stream of values, for controllers that leave timing and interpolation to us.

`Player` says what is next; `MotionStream` sends it from a thread, to all outputs that are streams in the same period.
After a motion's end its last position goes out once, and the velocity 0 a few times, and then nothing until the next
motion: such a controller keeps its last command.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.records import NS_PER_S, Motion, MotionInterrupted, to_ns

Array = NDArray[np.float64]
# The longest wait for a motion to end: under simulated time its clock may stand still.
LONGEST_WAIT_S = 2.0
# Simulated time may run at any speed, so a waiting thread checks it this often.
SIMULATED_CLOCK_POLL_S = 0.005
# How often the velocity 0 goes out at the end: a controller that misses it goes on for ever.
ZEROS = 3


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """What goes out in one period: of each axis its position or, if it is a velocity, its velocity [J]."""

    position_J: Array
    velocity_J: Array
    reference_P4: Array


@dataclass(frozen=True, eq=False)
class Streamed:
    """Which axes are streamed [J], which of them are velocities, and how fast those may change (per second squared)."""

    axis_J: NDArray[np.bool_]
    velocity_J: NDArray[np.bool_]
    acceleration_J: Array

    @classmethod
    def positions(cls, count: int) -> Streamed:
        """Axes that are all streamed, as positions."""
        return cls(np.ones(count, dtype=np.bool_), np.zeros(count, dtype=np.bool_), np.full(count, np.inf))


class Player:
    """Plays a motion in steps of at most one period, however late a step is.

    A forwarding controller stands still until the next position comes. So the motion's time stops as well while one is
    late, and a step never is longer than the arm may go in a period. After a gap of more than a whole period the arm
    has come to a halt: the motion is dropped, and the next one has to start from rest where the last position left the
    arm. Times in ns; `now_ns` is given by the caller and never goes back.

    `on_grid`: other axes of the robot move by trajectories, whose time does not stop. Positions then go out for fixed
    instants of `now_ns`; a late one does not delay the next, and of two that are late the first is left out.

    A velocity goes on where it is not replaced. None differs from the one before by more than its acceleration allows,
    and after a gap they brake from the last one to 0.
    """

    def __init__(self, period_ns: int, streamed: Streamed, on_grid: bool = False) -> None:
        self.period_ns = period_ns
        self.motion: Motion | None = None
        self.braking = False  # the motion is what an interruption left of another one
        self._streamed, self._on_grid = streamed, on_grid
        self._step_J = streamed.acceleration_J * (period_ns / NS_PER_S) * (1.0 + 1e-6)
        self._played_ns = 0  # how far the motion has been played
        self._sent_ns = 0  # when its last position went out, or should have on the grid
        # What went out last.
        self._sent_J: Array = np.zeros(len(streamed.axis_J))
        self._sent_velocity_J: Array = np.zeros(len(streamed.axis_J))
        self._zeros = 0
        self._interruption: MotionInterrupted | None = None

    def motion_ns(self, now_ns: int) -> int:
        """The time on the clock of the motion, by which the controller moves; it stands still after a gap."""
        if self._on_grid:
            return now_ns
        if self.motion is None:
            return now_ns if self._interruption is None else self._played_ns
        return self._played_ns + min(now_ns - self._sent_ns, self.period_ns)

    def play(self, motion: Motion, now_ns: int) -> None:
        """Plays `motion` instead of the one that is playing; MotionInterrupted, once, if that one was dropped."""
        if (interruption := self.take_interruption()) is not None:
            raise interruption
        if self.motion is None or now_ns < self._sent_ns:  # the latter: simulated time was set back
            # It stands where the motion starts, as if just sent there.
            self._played_ns = self._sent_ns = now_ns
            self._sent_J = motion.at(now_ns)[0].copy()
        self.motion, self.braking = motion, False
        self._zeros = ZEROS if self._streamed.velocity_J.any() else 1

    def take_interruption(self) -> MotionInterrupted | None:
        """What has become of the motion if it was dropped; said once."""
        interruption, self._interruption = self._interruption, None
        return interruption

    def interrupt(self, reason: str, next_ns: int) -> None:
        """Drops the motion: from `next_ns` on velocities brake, and all else stays."""
        assert self.motion is not None
        if self._interruption is not None:  # nobody has heard of the first one yet
            reason = str(self._interruption)
        self._sent_ns = next_ns - self.period_ns
        if self._on_grid:
            self._played_ns = self._sent_ns
        rest = self._brake(self.motion)
        self._interruption = MotionInterrupted(reason, rest, self._streamed.axis_J)
        self.motion, self.braking = (rest if len(rest.time_N) > 1 else None), True
        self._zeros = ZEROS

    def set_back(self, now_ns: int) -> None:
        """Brakes velocities if simulated time was set back: nobody knows when it will have come to where it was."""
        if now_ns < self._sent_ns and self.moves:
            self._played_ns = now_ns
            self.interrupt("stream: simulated time was set back", now_ns)
            self._interruption = None  # whoever sends motions has seen it, too

    def due_ns(self) -> int:
        """When the next position is due; only while a motion is playing."""
        return self._sent_ns + self.period_ns

    def next(self, now_ns: int) -> Sample | None:
        """What is due at `now_ns`, for `sent` to be told what of it went out; None: the motion had to be dropped."""
        gap_ns = now_ns - self._sent_ns
        if gap_ns >= 3 * self.period_ns if self._on_grid else gap_ns > 2 * self.period_ns:
            # Not where the motion was by then: it may have replaced another one since the last position went out.
            self.interrupt(
                f"stream: no position went out for {gap_ns / 1e6:.0f} ms, expected one every "
                f"{self.period_ns / 1e6:.0f} ms; the arm has stopped and starts again from there",
                now_ns,
            )
        if (motion := self.motion) is None:
            return None
        if self._on_grid:
            self._sent_ns += (now_ns - self._sent_ns) // self.period_ns * self.period_ns
            self._played_ns = self._sent_ns
        else:
            self._played_ns, self._sent_ns = self.motion_ns(now_ns), now_ns
        position_J, velocity_J = motion.at(self._played_ns)
        before_J = self._sent_velocity_J
        velocity_J = np.minimum(np.maximum(velocity_J, before_J - self._step_J), before_J + self._step_J)
        if self._played_ns >= motion.end_ns and not velocity_J[self._streamed.velocity_J].any():
            self._zeros -= 1
            if self._zeros <= 0:
                self.motion = None
        return Sample(position_J, velocity_J, motion.reference_P4)

    def sent(self, sample: Sample, axes: slice) -> None:
        """Notes that these axes of a sample went out."""
        self._sent_J[axes] = sample.position_J[axes]
        self._sent_velocity_J[axes] = np.where(self._streamed.velocity_J[axes], sample.velocity_J[axes], 0.0)

    @property
    def moves(self) -> bool:
        """Whether the last velocities are not 0."""
        return bool(self._sent_velocity_J.any())

    def _brake(self, motion: Motion) -> Motion:
        """From what went out last: positions stay, velocities fall to 0."""
        velocity_J, step_J = self._sent_velocity_J, self._streamed.acceleration_J * (self.period_ns / NS_PER_S)
        steps = math.ceil(float((np.abs(velocity_J) / step_J).max(initial=0.0)) - 1e-9)
        number_N = np.arange(steps + 1)
        speed_NJ = np.abs(velocity_J) - np.multiply.outer(number_N, np.where(velocity_J, step_J, 0.0))
        velocity_NJ = np.sign(velocity_J) * np.maximum(speed_NJ, 0.0)
        velocity_NJ[-1] = 0.0
        gone_NJ = 0.5 * (velocity_NJ[:-1] + velocity_NJ[1:]) * (self.period_ns / NS_PER_S)
        position_NJ = self._sent_J + np.concatenate([np.zeros((1, len(velocity_J))), np.cumsum(gone_NJ, axis=0)])
        time_N = self._played_ns + self.period_ns * number_N
        return Motion(motion.joints, self._played_ns, time_N, position_NJ, velocity_NJ, motion.reference_P4)


class StreamOutput(Protocol):
    """One output that is a stream; `send` raises what the middleware does."""

    @property
    def axes(self) -> slice: ...
    def send(self, sample: Sample) -> None: ...


class MotionStream:
    """Plays motions on the clock `now_ns`, to all `outputs` in turn, from a thread that the first motion starts.

    If one of them cannot be sent to, the motion is dropped for all. `simulated`: the clock runs at any speed, so its
    gaps say nothing about the process, and no motion is dropped for one. `failed` is told what an output raised.
    """

    def __init__(
        self,
        outputs: Sequence[StreamOutput],
        streamed: Streamed,
        now_ns: Callable[[], int],
        period_s: float,
        *,
        simulated: bool = False,
        on_grid: bool = False,
        failed: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        self._outputs, self._now_ns, self._simulated, self._failed = tuple(outputs), now_ns, simulated, failed
        self._player = Player(to_ns(period_s), streamed, on_grid)
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

    def take_interruption(self) -> MotionInterrupted | None:
        with self._changed:
            return self._player.take_interruption()

    def wait_until_ended(self) -> None:
        """Waits for the motion's end; velocities that are not 0 by then, as simulated time stands still, are braked."""
        player = self._player
        with self._changed:
            left_s = 0.0
            if player.motion is not None and not self._simulated:
                left_s = (player.motion.end_ns - player.motion_ns(self._now_ns())) / NS_PER_S
            self._changed.wait_for(lambda: player.motion is None, LONGEST_WAIT_S + max(left_s, 0.0))
            self._brake_now()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._brake_now()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _brake_now(self) -> None:
        """Brings velocities to 0 and sends it, by real time, whatever clock there is."""
        player = self._player
        if player.motion is None or not player.moves:
            return
        player.interrupt("stream: ended before its velocities were 0", player.due_ns())
        most = ZEROS if player.motion is None else len(player.motion.time_N) + ZEROS
        while player.motion is not None and most:  # an output that fails must not keep us here
            self._send_next(player.due_ns())
            time.sleep(player.period_ns / NS_PER_S)
            most -= 1

    def _run(self) -> None:
        player = self._player
        with self._changed:
            while not self._closed:
                if player.motion is None:
                    self._changed.notify_all()
                    self._changed.wait()
                    continue
                now_ns = self._now_ns()
                if self._simulated:
                    player.set_back(now_ns)
                left_s = (player.due_ns() - now_ns) / NS_PER_S
                if left_s > 0.0:
                    self._changed.wait(min(left_s, SIMULATED_CLOCK_POLL_S) if self._simulated else left_s)
                    continue
                # Under the lock: a motion that replaces this one must not be told that it starts elsewhere.
                self._send_next(min(now_ns, player.due_ns()) if self._simulated else now_ns)

    def _send_next(self, now_ns: int) -> None:
        player = self._player
        playing = player.motion
        sample = player.next(now_ns)
        if sample is None:
            return
        for output in self._outputs:
            try:
                output.send(sample)
            except Exception as error:
                self._failed(error)
                if player.braking:  # whatever one does not get, the others come to rest
                    continue
                player.motion = player.motion or playing
                reason = (
                    f"stream: a command could not be sent: {error!r}; the arm has stopped and starts again from there"
                )
                player.interrupt(reason, now_ns + player.period_ns)
                return
            player.sent(sample, output.axes)
