"""How tests wait for what must come: they poll, and give up after a time that is set only here."""

from __future__ import annotations

import time
from collections.abc import Callable

# For a process to start, ROS discovery to end, a message to come: seconds on a quiet machine. Only a test that fails
# waits so long, so it may be generous to a busy machine; two of them fit into pytest's own limit (pyproject.toml).
PATIENCE_S = 60.0


def until(condition: Callable[[], object], what: str | Callable[[], object] = "") -> None:
    """Returns as soon as `condition()` is true; after `PATIENCE_S` the test fails and names what never came."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() >= deadline_s:
            told = what() if callable(what) else what
            raise AssertionError(f"waited {PATIENCE_S:.0f} s in vain{told and ' for '}{told}")
        time.sleep(0.01)
