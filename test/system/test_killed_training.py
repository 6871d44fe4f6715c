"""Killed at random moments, also in a save, a run goes on to the losses of one that was not, and leaves no worker."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import MORE_CASES, ROOT
from support.waiting import until

pytest.importorskip("torch")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("processes", "kills"), [(1, 4), (2, MORE_CASES)])
def test_losses_are_the_whole_runs_bit_for_bit(tmp_path: Path, processes: int, kills: int) -> None:
    """Twenty kills: `python test/support/killed_training.py FOLDER 1 20`, with test/ on PYTHONPATH."""
    done = subprocess.run(
        [sys.executable, "test/support/killed_training.py", str(tmp_path), str(processes), str(kills)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'test'}", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == kills and found["steps"] == 10 * processes
    assert processes > 1 or found["in_a_save"] >= 1


TRAINER = """
import os, sys, time
from training.data.loader import Loader
def make(step):
    if step > 3:
        time.sleep(1000)
    return os.getpid()
batches = Loader(make, 2).iterate(range(100))
print(next(batches), next(batches), flush=True)
next(batches), next(batches), next(batches)
"""


def test_no_worker_outlives_a_trainer_that_is_killed() -> None:
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert trainer.stdout is not None
    processes = [int(word) for word in trainer.stdout.readline().split()]
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    assert len(processes) == 2

    def gone(process: int) -> bool:
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            return "\nState:\tZ" in Path(f"/proc/{process}/status").read_text()  # where nobody waits for orphans
        return True

    until(lambda: all(map(gone, processes)))
