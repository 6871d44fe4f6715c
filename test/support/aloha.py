"""The simulated ALOHA's model comes with a package of its own, which a machine may lack."""

from __future__ import annotations

import importlib.util

import pytest

needs_aloha = pytest.mark.skipif(importlib.util.find_spec("gym_aloha") is None, reason="gym_aloha is not installed")
