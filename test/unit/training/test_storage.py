"""Folders and files that appear whole: what is on the disk before the name is, and who else is writing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ki_vla_ros.errors import ConfigurationError
from training import storage


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a loss of power, a folder with its name must have its files' content too."""
    done: list[str] = []
    fsync, rename = os.fsync, storage.replace_folder
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), fsync(fd)))
    monkeypatch.setattr(storage, "replace_folder", lambda *paths: (done.append("named"), rename(*paths)))
    for _ in range(2):
        done.clear()
        with storage.whole_folder(tmp_path / "place") as part:
            (part / "one").write_text("1")
            (part / "below").mkdir()
            (part / "below" / "two").write_text("2")
        named = done.index("named")
        assert sorted(done[:named]) == [".place.part", "below", "one", "two"] and done[named + 1 :] == [tmp_path.name]
    done.clear()
    storage.write_whole(tmp_path / "file", "3")
    assert done == [".file.part", tmp_path.name] and (tmp_path / "file").read_text() == "3"


def test_what_fails_leaves_the_earlier_folder_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "one").write_text("1")
    with pytest.raises(ZeroDivisionError), storage.whole_folder(tmp_path / "place") as part:
        (part / "one").write_text("2")
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["place"]
    assert (tmp_path / "place" / "one").read_text() == "1"


def test_two_that_write_one_place_do_not_mix(tmp_path: Path) -> None:
    with storage.whole_folder(tmp_path / "place") as part:
        (part / "one").write_text("1")
        with (
            pytest.raises(ConfigurationError, match="place: expected to be the only one who writes there"),
            storage.whole_folder(tmp_path / "place"),
        ):
            pass
    assert (tmp_path / "place" / "one").read_text() == "1"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk" / "big").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "big")
    with storage.whole_folder(tmp_path / "link") as part:
        (part / "one").write_text("1")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "big" / "one").exists()
