"""An evaluation that is killed goes on where it was, and any number of processes comes to the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import ROOT

from training.evaluate.__main__ import main

DEMO = str(ROOT / "models" / "demo")


@pytest.mark.slow
def test_a_killed_run_goes_on_and_any_number_of_workers_gives_the_same(tmp_path: Path) -> None:
    """kill -9 in the middle, then two processes: the table is that of one process which was left alone."""
    path = tmp_path / "arms.yaml"
    path.write_text("name: arms\ntasks: {all: [arm/known, arm/novel]}\ntrials: 2\nsteps: 40\nimage_size: 64\n")
    whole, out = tmp_path / "whole.json", tmp_path / "figures.json"
    command = ["-m", "training.evaluate", DEMO, "--protocol", str(path), "--out"]
    assert main([*command[2:], str(whole)]) == 0
    process = subprocess.Popen([sys.executable, *command, str(out)], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        until_s = time.monotonic() + 60.0
        while not out.exists() and time.monotonic() < until_s:
            time.sleep(0.02)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    left = sum(map(len, json.loads(out.read_text())["outcomes"].values()))
    assert 0 < left < 4
    assert main([*command[2:], str(out), "--workers", "2"]) == 0
    assert out.read_text() == whole.read_text()
