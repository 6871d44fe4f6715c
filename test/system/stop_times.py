"""How long `~/stop` takes to act, whatever the settings are: a table for docs/results/node.md.

    PYTHONPATH=test python -m system.stop_times

The loop runs in real time on the test bundle, for about five minutes. Each row: STOPS stops at random moments, from the
call to the command that brakes.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from support.bundles import JOINTS, demo_observation, demo_policy, write_test_bundle
from support.loop_rig import FakeWire, Rig

from ki_vla_ros.bundle import load_bundle
from ki_vla_ros.records import JointReading, Motion

STOPS, JOINT = 10, "shoulder_pan"
CASES: dict[str, Mapping[str, object]] = {
    "defaults": {},
    "points every 2 ms": {"command_period_s": 0.002},
    "points every 2 ms, 10 s to reach full speed": {"command_period_s": 0.002, "limits.time_to_speed_s": 10.0},
    "the least acceleration of one joint": {f"limits.joints.{JOINT}.acceleration": 0.3},
    "one joint nearly locked": {f"limits.joints.{JOINT}.velocity": 1e-3},
    "two ticks per second": {"rate_hz": 2.0, "hold_after_s": 2.0, "execution_horizon_s": 0.3},
}
# Joints that turn as far as one likes: a hold must not depend on how far.
RANGES = {"": None, ", joints of +-1e4 rad": 1e4, ", joints of +-1e9 rad": 1e9}


class RealTimeWire(FakeWire):
    def __init__(self) -> None:
        super().__init__()
        self.sent = threading.Event()

    def now_ns(self) -> int:
        return time.time_ns()

    def motion_ns(self) -> int:
        return time.monotonic_ns()

    def simulated_clock(self) -> bool:
        return False

    def send_command(self, motion: Motion, now_ns: int, hold: bool = False) -> None:
        super().send_command(motion, now_ns, hold)
        self.sent.set()


def measure(bundle: Path, changes: Mapping[str, object]) -> list[float]:
    """Milliseconds from `latch` to the braking command, for STOPS stops of a moving arm."""
    clamp = {f"limits.on_{rule}": "clamp" for rule in ("position", "jump", "speed")}
    rig = Rig(load_bundle(bundle), **clamp, **changes)
    wire = RealTimeWire()
    rig.wire = rig.loop.wire = wire  # type: ignore[assignment]
    draw, found, closing = np.random.default_rng(0), [], threading.Event()

    def supply() -> None:
        while not closing.wait(0.02):
            observation = demo_observation(time.time_ns())
            for frame in observation.frames.values():
                rig.buffer.add_frame(frame)
            running = rig.loop._governor.running  # the arm does what it is told
            state_S = observation.state_S if running is None else running.at(wire.motion_ns())[0]
            rig.buffer.add_joints(JointReading(observation.stamp_ns, JOINTS, state_S))

    inputs = threading.Thread(target=supply)
    inputs.start()
    rig.thread.start()
    try:
        while len(found) < STOPS:
            time.sleep(float(draw.uniform(0.35, 0.6)))
            if rig.loop._governor.at_rest(wire.motion_ns()) or rig.loop._held:
                continue
            wire.sent.clear()
            began_s = time.monotonic()
            rig.loop.latch("for the table")
            assert wire.sent.is_set()
            found.append((time.monotonic() - began_s) * 1e3)
            rig.loop.reset()
    finally:
        rig.thread.stop()
        closing.set()
        inputs.join()
        rig.engine.close()
    return found


def main() -> None:
    argparse.ArgumentParser(prog="system.stop_times", description=__doc__).parse_args()
    print(f"| settings | tick | median | longest of {STOPS} |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for ending, reach in RANGES.items():
            policy = demo_policy()
            if reach is not None:
                joints = [joint.model_copy(update={"lower": -reach, "upper": reach}) for joint in policy.axes]
                policy = policy.model_copy(update={"joints": tuple(joints)})
            bundle = Path(write_test_bundle(Path(folder) / f"bundle{reach}", policy).path)
            for name, changes in CASES.items():
                took_ms = measure(bundle, changes)
                tick_ms = 1e3 / float(str(changes.get("rate_hz", 10.0)))
                times = f"{np.median(took_ms):.1f} ms | {max(took_ms):.1f} ms"
                print(f"| {name}{ending} | {tick_ms:.0f} ms | {times} |", flush=True)


if __name__ == "__main__":
    main()
