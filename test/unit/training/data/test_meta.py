"""meta.json of simulated data: what it must hold to count."""

from pathlib import Path

import pytest

from ki_vla_ros.errors import ConfigurationError
from training.data.simulated.generate import read_meta


def test_a_damaged_meta_is_named(tmp_path: Path) -> None:
    path = tmp_path / "meta.json"
    assert read_meta(path) is None
    for content in (
        '{"settings": {',
        "[]",
        '{"settings": {}}',
        "\udcff".encode(errors="surrogateescape").decode("latin"),
    ):
        path.write_text(content, encoding="latin")
        with pytest.raises(ConfigurationError, match=r"meta\.json: expected settings, counts .*delete the folder"):
            read_meta(path)
