"""The thread that runs the policy loop: one tick per period, on absolute deadlines, until it is stopped."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable

from ki_vla_ros.records import NS_PER_S, to_ns
from ki_vla_ros.runtime.loop import PolicyLoop
from ki_vla_ros.runtime.pacing import ClockWatch, Pacer, alignment_ns

# Simulated time may run at any speed, so a waiting thread checks it this often.
SIMULATED_CLOCK_POLL_S = 0.005
# How long the thread waits before it tries again after a bug between two ticks.
FAILED_TICK_S = 0.1


class LoopThread:
    """Runs a loop from `start` to `stop`; may be started again."""

    def __init__(self, loop: PolicyLoop) -> None:
        self._loop = loop
        # From now on, not from `start`: while the loop stands still, inputs come in and the clock may step too.
        self._clock = ClockWatch(loop.wire.now_ns, loop.wire.simulated_clock())
        self._clock.step_ns()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._stop.clear()
        self._loop.begin()
        self._thread = threading.Thread(target=self._run, name="policy loop")
        self._thread.start()

    def stop(self) -> None:
        """Brings the arm to rest and ends the thread; does nothing if it was not started."""
        if self._thread is None:
            return
        self._stop.set()
        self._loop.end()  # before the join: a tick that hangs in the engine must not keep the arm going
        self._thread.join()
        self._thread = None
        self._loop.rest()

    def _run(self) -> None:
        loop, wire = self._loop, self._loop.wire
        while wire.now_ns() == 0 and not self._stop.wait(SIMULATED_CLOCK_POLL_S):
            pass
        # Ticks are paced on the steady clock, so that a step of the node's clock neither crowds nor delays them.
        pace_ns = wire.now_ns if wire.simulated_clock() else time.monotonic_ns
        pacer = Pacer(pace_ns())
        behind_ns: int | None = None
        while not self._stop.is_set():
            try:
                self._note_step(pacer)
                settings = loop.settings()
                now_ns = wire.now_ns()
                behind_before_ns, behind_ns = behind_ns, loop.buffer.since_burst_ns(now_ns)
                if settings.align_to_cameras:
                    loop.buffer.await_burst(now_ns, behind_ns)
                loop.step(settings, wire.now_ns(), pacer.missed)
                pacer.advance(pace_ns(), to_ns(1.0 / settings.rate_hz))
                if settings.align_to_cameras:
                    pacer.shift(alignment_ns(behind_before_ns, behind_ns))
                self._sleep_until_due(pacer, pace_ns)
            except Exception:  # a bug between two ticks must not leave a node that is active and does nothing
                wire.log(traceback.format_exc(), "internal error")
                loop.diagnostics.record_refusal("internal error")
                loop.rest()
                self._stop.wait(FAILED_TICK_S)

    def _sleep_until_due(self, pacer: Pacer, pace_ns: Callable[[], int]) -> None:
        simulated = self._loop.wire.simulated_clock()
        while not self._stop.is_set():
            left_s = (pacer.due_ns - pace_ns()) / NS_PER_S
            if left_s <= 0.0:
                return
            self._stop.wait(min(left_s, SIMULATED_CLOCK_POLL_S) if simulated else left_s)
            if simulated:
                self._note_step(pacer)

    def _note_step(self, pacer: Pacer) -> None:
        step_ns = self._clock.step_ns()
        if not step_ns:
            return
        loop, wire = self._loop, self._loop.wire
        way = "back" if step_ns < 0 else "forward"
        wire.log(f"clock: it was set {way} by {abs(step_ns) / NS_PER_S:.3f} s; the running chunk is dropped", "clock")
        loop.diagnostics.record_clock_step()
        if not wire.simulated_clock():
            loop.clock_stepped(back=step_ns < 0)
            return
        if step_ns < 0:
            loop.forget()
        else:
            loop.clock_stepped(back=False)
        pacer.restart(wire.now_ns())
