"""ROS for tests: every test that asks for it talks on a domain of its own, to this machine only."""

from __future__ import annotations

import itertools
import os
import tempfile
from pathlib import Path

import pytest

# Fast DDS takes its ports from the domain id; above 101 they reach into those that Linux gives to others.
_DOMAINS = 100
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
# Another run on this machine begins at another domain.
_run = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
_own_domains = itertools.cycle([1 + (_run + i) % _DOMAINS for i in range(_worker, _DOMAINS, _workers)])

# For tests that start ROS without the fixture, and for whatever they start; a domain must never be the user's.
os.environ["ROS_DOMAIN_ID"] = str(next(_own_domains))
os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
os.environ["ROS_PYTHON_CHECK_FIELDS"] = "1"  # otherwise a misspelt message field is published without a word
os.environ.setdefault("ROS_LOG_DIR", tempfile.mkdtemp(prefix="ros_log_"))


@pytest.fixture
def ros_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """Puts this test on a domain of its own, with its logs in `tmp_path`; returns the environment for its processes."""
    monkeypatch.setenv("ROS_DOMAIN_ID", str(next(_own_domains)))
    monkeypatch.setenv("ROS_LOG_DIR", str(tmp_path / "ros_log"))
    return dict(os.environ)
