"""MetaWorld lives in an environment of its own (`make metaworld`), which a machine may lack."""

from __future__ import annotations

import importlib.util

import pytest

needs_metaworld = pytest.mark.skipif(importlib.util.find_spec("metaworld") is None, reason="metaworld is not installed")
