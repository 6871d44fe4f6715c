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


@pytest.mark.ros
def test_a_recorded_demo_replays_to_the_chunks_that_were_published(tmp_path: Path) -> None:
    pytest.importorskip("mujoco")
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
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    bag = tmp_path / "demo" / "bag"

    # The bag says by itself which bundle, parameters and topics: nothing else is given.
    recorded = metrics_of(tmp_path / "recorded", bag, "--ticks", "recorded")
    parity = recorded["parity"]
    assert parity["chunks"] >= 10 and parity["max_difference"] < 1e-5
    # The recorder of a busy machine misses inputs that the node got, and the replay then says which.
    missed = parity["not_reproduced"]
    assert all("is not in the bag" in cause for cause in missed), parity
    assert sum(missed.values()) < parity["chunks"], parity
    assert parity["unmatched"] <= sum(missed.values()) + 0.1 * parity["chunks"], parity
    changed = metrics_of(tmp_path / "changed", bag, "--ticks", "recorded", "--set", "noise_seed=1")
    assert changed["parity"]["max_difference"] > 1e-3

    # At its own pace the replay ticks where the node was active: as often, or oftener than on a busy machine.
    paced = metrics_of(tmp_path / "paced", bag, "--latency", "0.02")
    most = paced["bag"]["duration_s"] * paced["settings"]["rate_hz"]
    assert 0.85 * recorded["ticks"]["chunks"] - 3 <= paced["ticks"]["chunks"] <= most
