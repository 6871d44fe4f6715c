"""The engine that the settings choose, and none in the place of another."""

import pytest

from ki_vla_ros.bundle import load_bundle
from ki_vla_ros.engines import open_engine
from ki_vla_ros.errors import EngineError
from ki_vla_ros.settings import Settings
from ki_vla_ros.share import find_bundle


def test_an_engine_that_nothing_opens_is_refused() -> None:
    """A name that is added to the setting alone must not fall back to onnxruntime."""
    forgotten = Settings.model_construct(**{**dict(Settings()), "engine": "forgotten"})
    with pytest.raises(EngineError, match=r"engine 'forgotten': .*engines/choice\.py does not open it"):
        open_engine(load_bundle(find_bundle("demo")), forgotten)
