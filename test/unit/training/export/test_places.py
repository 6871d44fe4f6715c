"""Where an export may write: an empty place, or an earlier bundle's."""

from pathlib import Path

import pytest

from ki_vla_ros.errors import ConfigurationError
from training.export.bundle import export_bundle


@pytest.mark.parametrize("what", ["a file", "a folder of something else"])
def test_an_export_replaces_nothing_but_a_bundle(tmp_path: Path, what: str) -> None:
    mine = tmp_path / "out" if what == "a file" else tmp_path / "out" / "notes"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(ConfigurationError, match=f"out: expected an empty place or an earlier bundle, got {what}"):
        export_bundle(tmp_path, tmp_path / "out")
    assert mine.read_text() == "mine"
