"""FSDP2 in two real processes against a model that is whole in each of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT
from support.recipes import tiny_run
from support.sharded_training import adapted_run, check_loaded, stopped

from training.evaluate import offline


def test_sharded_training_equals_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of every stage, insulation, bfloat16 with offload, resuming: see support/sharded_training.py.

    One process begins the run that is resumed by both, and ends it.
    """
    monkeypatch.setattr(offline, "FRAMES", 4)
    settings = tiny_run(tmp_path, steps=1)
    one = adapted_run(settings, tmp_path / "run" / "adapted", {"dtype": "bfloat16"})
    assert len(stopped(one, 1)) == 1
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(settings))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "test/support/sharded_training.py",
    ]
    done = subprocess.run(
        [*command, str(path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'test'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert all((tmp_path / "run" / f"{rank}.passed").exists() for rank in (0, 1))
    check_loaded(one, 2)
    assert len(stopped(one, 100)) == 2  # the last two of its four steps
    assert (one.out / "adapter").is_dir() and (one.out / "policy").is_dir()
