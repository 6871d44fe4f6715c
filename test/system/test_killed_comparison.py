"""A comparison whose driver is killed: its run ends with it, and the same command goes on from the last checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from support import ROOT
from support.ablations import write_tiny

from training.ablation import Job, load_ablation, run_job
from training.results import read_result, result_path


def wait_for(met: Callable[[], bool], what: str) -> None:
    until_s = time.monotonic() + 120.0
    while not met():
        assert time.monotonic() < until_s, what
        time.sleep(0.02)


def runs(process: int) -> bool:
    """Whether any of its threads is there, and no zombie: the last one frees its locks."""
    for task in Path(f"/proc/{process}/task").glob("*/stat"):
        with suppress(OSError):
            if task.read_text().rpartition(")")[2].split()[0] != "Z":
                return True
    return False


@pytest.mark.slow
def test_a_killed_driver_takes_its_run_with_it_and_the_next_one_goes_on(tmp_path: Path) -> None:
    path = write_tiny(tmp_path, grid={"rates": [1e-3], "steps": 2, "seed": 100}, knowledge=None)
    config, out = load_ablation(path), tmp_path / "out/ki-0"
    run_job(config, Job("start"), None)
    command = [sys.executable, "-m", "training.ablate", "--config", str(path), "--arms", "ki"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as driver:
        wait_for(lambda: (out / "checkpoint-000001").exists() or driver.poll() is not None, "no checkpoint came")
        assert driver.poll() is None, driver.stderr.read().decode() if driver.stderr else ""
        child = int((out / ".lock").read_text().split()[1])
        assert child != driver.pid and runs(child)
        os.kill(driver.pid, signal.SIGKILL)
        wait_for(lambda: not runs(child), "the run goes on without its driver")
    result = result_path(config.results, "ki-0")
    assert read_result(result) is None and not (out / "checkpoint-000002").exists()
    start = read_result(result_path(config.results, "start"))
    run_job(config, Job("run", "ki", 0, 1e-3), start)
    found = read_result(result)
    assert found is not None and [point["step"] for point in found["points"]] == [2, 4]
    steps = [json.loads(line)["step"] for line in (out / "figures.jsonl").read_text().splitlines()]
    assert set(steps) == {4}
