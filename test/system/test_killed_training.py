"""Killed at random moments, also in the middle of a save, a run goes on to the losses of one that nobody killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

pytest.importorskip("torch")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("processes", "kills"), [(1, 6), (2, 2)])
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
