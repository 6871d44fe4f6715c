"""The node's loop on a policy server, over a wire that delays, loses and fails: a table for docs/results/node.md.

    PYTHONPATH=test python -m system.policy_server_times

The server is a process of its own with the test bundle, the loop runs in real time for SECONDS per row, and the arm
does what it is told. What was sent is judged every millisecond by support/judge.py, as at the moment when it was sent.
A piece is what the wire forwards at once: an observation of two cameras is one or two, a chunk is one.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from support import ROOT
from support.between import Between
from support.bundles import JOINTS, demo_observation, demo_policy, write_test_bundle
from support.controller import NS_PER_S, TrajectoryController
from support.judge import MS, TOLERANCE, Ratios, Told, Track, limits_of
from support.loop_rig import FakeWire, Rig

from ki_vla_ros.bundle import Bundle
from ki_vla_ros.messages.encoding import encode_command
from ki_vla_ros.records import JointReading, Motion
from ki_vla_ros.serve import RemotePolicy, ServerEngine, named_keys

SECONDS, EVERY_S, LASTS_S = 20.0, 3.0, 1.5  # of a row; faults: how often, how long
PARAMETERS = {f"limits.on_{rule}": "clamp" for rule in ("position", "jump", "speed")}


@dataclass(frozen=True)
class Case:
    """What the wire does: `way` is what it does for LASTS_S, every EVERY_S."""

    name: str
    delay_ms: tuple[int, int] = (0, 0)
    lost: float = 0.0
    way: str = ""
    timeout_s: float = 0.5
    remote: bool = True


CASES = (
    Case("an engine here, no server", remote=False),
    Case("a server"),
    Case("delayed by 20 ms each way", (20, 20)),
    Case("by 20 to 60 ms, differently for each piece", (20, 60)),
    Case("by 50 to 100 ms", (50, 100)),
    Case("by 100 to 200 ms; `policy_server_timeout_s` 1", (100, 200), timeout_s=1.0),
    Case("by 5 to 15 ms; 5 % of the pieces lost", (5, 15), 0.05),
    Case("by 5 to 15 ms; 20 % of the pieces lost", (5, 15), 0.2),
    Case("stalls", way="stalls"),
    Case("is cut, and refuses", way="gone"),
)


class Wire(FakeWire):
    """Real clocks, and a controller that gets each command when the loop believes that it does."""

    def __init__(self, at_J: np.ndarray) -> None:
        super().__init__()
        self.controller = TrajectoryController(JOINTS, at_J, time.monotonic_ns(), 0)
        self.told = Told(limits_of(demo_policy().axes, PARAMETERS))
        self.sent_s: list[tuple[float, bool]] = []  # when a command was sent, and whether it is a hold

    def now_ns(self) -> int:
        return time.time_ns()

    def motion_ns(self) -> int:
        return time.monotonic_ns()

    def simulated_clock(self) -> bool:
        return False

    def send_command(self, motion: Motion, now_ns: int, hold: bool = False) -> None:
        super().send_command(motion, now_ns, hold)
        self.controller.receive(encode_command(motion, now_ns, 0), now_ns, self.told)
        self.sent_s.append((time.monotonic(), hold))


@contextmanager
def server(bundle: Bundle) -> Iterator[int]:
    command = [sys.executable, "-m", "ki_vla_ros", "serve", "--bundle", str(bundle.path), "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            found = re.search(r"ws://127\.0\.0\.1:(\d+)", process.stdout.readline())
            assert found
            yield int(found[1])
        finally:
            process.terminate()


def measure(bundle: Bundle, port: int, case: Case) -> str:
    """A row of the table."""
    with closing(Between(port)) as between:
        between.delay_s, between.lost = (case.delay_ms[0] / 1e3, case.delay_ms[1] / 1e3), case.lost
        engine = ServerEngine(f"ws://127.0.0.1:{between.port}", timeout_s=case.timeout_s)
        policy = RemotePolicy(bundle, engine, named_keys(bundle.manifest.robot)) if case.remote else None
        rig = Rig(bundle, policy, **PARAMETERS)
        with closing(rig.engine):
            rig.policy.warm_up()
            wire = Wire(demo_observation().state_S)
            rig.wire = rig.loop.wire = wire  # type: ignore[assignment]
            began_s = time.monotonic()
            with supplied(rig, wire):
                faults_s = disturb(between, case)
            return row(case, wire, faults_s, time.monotonic() - began_s)


@contextmanager
def supplied(rig: Rig, wire: Wire) -> Iterator[None]:
    """The loop runs, watched as by the node, and gets images and the state of an arm that follows its commands."""
    done = threading.Event()

    def supply() -> None:
        while not done.wait(0.02):
            seen = demo_observation(time.time_ns(), image_size=96)
            for frame in seen.frames.values():
                rig.buffer.add_frame(frame)
            at_J = wire.controller.sample(time.monotonic_ns())[0]
            rig.buffer.add_joints(JointReading(seen.stamp_ns, JOINTS, at_J))
            rig.loop.watch()

    inputs = threading.Thread(target=supply)
    inputs.start()
    rig.thread.start()
    try:
        yield
    finally:
        rig.thread.stop()
        done.set()
        inputs.join()


def disturb(between: Between, case: Case) -> list[float]:
    """Lets SECONDS pass, and says when the faults began."""
    began_s: list[float] = []
    end_s = time.monotonic() + SECONDS
    while time.monotonic() < end_s:
        time.sleep(EVERY_S - LASTS_S)
        if case.way:
            began_s.append(time.monotonic())
            between.way = case.way
            if case.way == "gone":
                between.cut()
        time.sleep(LASTS_S)
        if case.way:
            between.way = ""
            between.cut()  # what was held back
    return began_s


def row(case: Case, wire: Wire, faults_s: list[float], lasted_s: float) -> str:
    sent = [tick for tick in wire.ticks if tick["chunk_index"] is not None]
    age_ms = [(tick["command_ns"] - tick["observation_ns"]) / 1e6 for tick in sent]  # type: ignore[operator]
    held = sum(tick["hold"] is not None for tick in wire.ticks)
    braked_s = [min([at for at, hold in wire.sent_s if hold and at >= began], default=np.inf) for began in faults_s]
    since_s = [at - max(chunk for chunk, hold in wire.sent_s if not hold and chunk < at) for at in braked_s]
    brakes = f"{max(since_s):.2f} s" if braked_s else "-"
    beyond = judge(wire)
    return (
        f"| {case.name} | {len(sent) / lasted_s:.1f} | {np.median(age_ms):.0f} / {np.quantile(age_ms, 0.95):.0f} | "
        f"{held} of {len(wire.ticks)} | {brakes} | {beyond} |"
    )


def judge(wire: Wire) -> str:
    """How many of the commands were outside the limits, and the highest share of a limit that was used."""
    pieces = wire.controller.pieces
    begin_ns, end_ns = pieces[0].from_ns, int(pieces[-1].time_K[-1]) + 3 * MS
    time_N = np.arange(begin_ns, end_ns, MS)
    position_NJ, _, number_N = wire.controller.walk(time_N)
    grace_ns = round((0.01 + 0.02) * NS_PER_S) + MS  # lead_s and command_period_s
    told, begun = [wire.told] * len(pieces), [piece.from_ns for piece in pieces]
    judged_N = np.ones(len(time_N), dtype=bool)
    ratios = Ratios(Track(1e-3, time_N, position_NJ, number_N, told, begun, judged_N, time_N, grace_ns, JOINTS))
    refused = len(wire.controller.refused)
    if refused or max(ratios.worst.values()) > TOLERANCE:
        return f"**{refused} refused; {'; '.join(ratios.where)}**"
    return f"0 of {len(wire.commands)} ({100 * max(ratios.worst.values()):.0f} %)"


def main() -> None:
    argparse.ArgumentParser(prog="system.policy_server_times", description=__doc__).parse_args()
    print("| the wire | chunks per s | age in ms: median / 95 % | ticks held | last chunk to brakes | outside limits |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        bundle = write_test_bundle(Path(folder) / "bundle")
        with server(bundle) as port:
            for case in CASES:
                print(measure(bundle, port, case), flush=True)


if __name__ == "__main__":
    main()
