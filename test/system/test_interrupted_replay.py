"""Ctrl-C during a replay: the process ends soon and leaves the figures and predictions it had by then."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from support import ROOT
from support.bundles import write_test_bundle
from support.recordings import record_inputs
from support.waiting import PATIENCE_S, until

from ki_vla_ros.bags.bag import open_bag
from ki_vla_ros.console import ExitCode

# Random weights leave the arm's reach now and then; this test is not about that.
LOOSE = {"limits.on_jump": "clamp", "limits.on_speed": "clamp", "limits.on_position": "clamp", "ramp_in_s": 0.0}


def test_an_interrupted_replay_leaves_its_figures(tmp_path: Path) -> None:
    bundle = write_test_bundle(tmp_path / "bundle")
    record_inputs(tmp_path / "bag", 60.0)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "ki_vla_ros.replay", str(tmp_path / "bag"), "--bundle", str(bundle.path)]
    command += [argument for name, value in LOOSE.items() for argument in ("--set", f"{name}={value}")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([*command, "--out", str(out)], env=environment, cwd=ROOT)
    mcap = out / "predicted" / "predicted.mcap"
    until(lambda: (mcap.exists() and mcap.stat().st_size > 50_000) or process.poll() is not None, "predictions")
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE_S) == ExitCode.INTERRUPTED
    metrics = json.loads((out / "metrics.json").read_text())
    assert not metrics["complete"] and metrics["stopped"] == "interrupted"
    assert 0.0 < metrics["bag"]["duration_s"] < 59.0 and metrics["ticks"]["chunks"] > 0
    with open_bag(out / "predicted") as predicted:
        assert sum(1 for _ in predicted.messages(["/policy/replay/chunk"])) == metrics["ticks"]["chunks"]
        assert predicted.faults == []
