"""A live run over real topics, recorded by the demo, and the replay of that bag."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import ROOT

from ki_vla_ros.replay.__main__ import main


def metrics_of(out: Path, bag: Path, *arguments: str) -> dict[str, Any]:
    assert main([str(bag), "--out", str(out), "--no-mcap", *arguments]) == 0
    metrics: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return metrics


def test_a_recorded_demo_replays_to_the_chunks_that_were_published(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "ROS_DOMAIN_ID"}  # the demo finds one
    command = [
        sys.executable,
        "-m",
        "ki_vla_ros.demo",
        "--episodes",
        "2",
        "--no-video",
        "--out",
        str(tmp_path / "demo"),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    bag = tmp_path / "demo" / "bag"

    # The bag says by itself which bundle, parameters and topics: nothing else is given.
    recorded = metrics_of(tmp_path / "recorded", bag, "--ticks", "recorded")
    parity = recorded["parity"]
    assert parity["chunks"] >= 20 and parity["max_difference"] < 1e-5
    # Images are best effort: the recorder may have missed one that the node got, and then says so.
    assert sum(parity["not_reproduced"].values()) + parity["unmatched"] <= 0.1 * parity["chunks"], parity
    changed = metrics_of(tmp_path / "changed", bag, "--ticks", "recorded", "--set", "noise_seed=1")
    assert changed["parity"]["max_difference"] > 1e-3

    # At its own pace the replay ticks where the node was active, and so about as often.
    paced = metrics_of(tmp_path / "paced", bag, "--latency", "0.02")
    assert paced["ticks"]["chunks"] == pytest.approx(recorded["ticks"]["chunks"], rel=0.15, abs=3)
