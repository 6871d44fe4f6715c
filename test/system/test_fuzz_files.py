"""A slice of the fuzz command: ten cases of every kind of file, without a fault."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from support import ROOT

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "test"), "OMP_NUM_THREADS": "1"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "system.fuzz_files", *arguments]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)


@pytest.mark.slow
def test_damaged_files_are_read_or_refused() -> None:
    done = run("--cases", "350", "--seed", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"350 cases in .*, 0 faults", done.stdout)
    assert len(re.findall(r"^\| [a-z]", done.stdout, re.MULTILINE)) > 30  # kinds


@pytest.mark.slow
def test_a_fault_is_counted() -> None:
    """With a limit of no time every case is a fault."""
    code = "import system.fuzz_files as f; f.LONGEST_S = -1.0; raise SystemExit(f.main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "--cases", "3"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 1 and "3 faults" in done.stdout, done.stdout + done.stderr
