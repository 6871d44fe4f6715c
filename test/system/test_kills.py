"""Killed while it writes, whatever has several files is one whole version: the earlier or the new one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import MORE_CASES, ROOT

RANDOM = 40 * MORE_CASES  # kills; a trainer's folder is the one that a run depends on
CASES = ("run_checkpoint", f"run_checkpoint={RANDOM}", "policy", "data", "policy_without_exchange")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What support/kills.py found, by case."""
    folder = tmp_path_factory.mktemp("kills")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'test'}", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, str(Path(ROOT, "test/support/kills.py")), str(folder), *CASES],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {found["what"]: found for found in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("case", CASES)
def test_there_is_always_one_whole_version(figures: dict[str, dict[str, Any]], case: str) -> None:
    found = figures[case]
    assert found["none"] == 0
    assert found["newest"] >= 2  # some came through
    assert found["kills"] >= (RANDOM if "=" in case else 10)
    assert set(found["left"]) - {"place"} <= {".place.part"} | ({".place.old"} if case == CASES[-1] else set())
