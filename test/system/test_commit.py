"""What a policy says of its origin."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from support import ROOT

from training import policy


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_the_commit_is_that_of_the_code_wherever_the_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "another project")
    monkeypatch.chdir(tmp_path)
    assert policy.commit() == git(ROOT, "describe", "--always", "--dirty=+", "--abbrev=12")
    inside = Path(shutil.copy(policy.__file__, tmp_path))  # as in a virtual environment within another project
    monkeypatch.setattr(policy, "__file__", str(inside))
    assert policy.commit() == "unknown"
