"""Folders and files that appear whole: what is on the disk before the name is, and who else is writing."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import time
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


def test_a_run_has_its_folder_alone_until_it_is_killed(tmp_path: Path) -> None:
    """A process that the killed one had forked, as those that make batches, holds the folder no longer."""
    out = tmp_path / "run"
    alive, left = os.pipe(), os.pipe()
    trainer = os.fork()
    if trainer == 0:
        with storage.only_run(out):
            if os.fork() == 0:
                os.write(alive[1], b"%d\n" % os.getpid())
                time.sleep(60)
            os.write(left[1], b"x")
            time.sleep(60)
        os._exit(0)
    worker = int(os.read(alive[0], 20))
    os.read(left[0], 1)
    try:
        with (
            pytest.raises(
                ConfigurationError, match=rf"out {out}: expected to be .* \(process {trainer} on \S+\); wait"
            ),
            storage.only_run(out),
        ):
            pass
        os.kill(trainer, signal.SIGKILL)
        os.waitpid(trainer, 0)
        os.kill(worker, 0)  # it is still there
        with storage.only_run(out):
            (out / "checkpoint").touch()
    finally:
        os.kill(worker, signal.SIGKILL)
        for end in (*alive, *left):
            os.close(end)
    assert sorted(path.name for path in out.iterdir()) == [".lock", "checkpoint"]


def test_a_run_that_writes_nothing_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), storage.only_run(tmp_path / "run"):
        raise ZeroDivisionError
    assert not (tmp_path / "run").exists()


def test_where_there_are_no_locks_it_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """NFS locks no folder (EBADF), and without its lock service no file (ENOLCK); the work goes on."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with storage.only_run(tmp_path / "run"):
        for number in range(3):
            with storage.whole_folder(tmp_path / "run" / f"place_{number}") as part:
                (part / "one").write_text("1")
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[0] for line in said] == [str(tmp_path), str(tmp_path / "run")]
    assert all("has no such locks (No locks available)" in line and "let only one write there" in line for line in said)
