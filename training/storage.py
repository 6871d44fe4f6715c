"""Folders and files that stand on the disk whole or not at all, whenever a process is killed or the power fails."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.share import expand

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of renameat2(2), which Python's os does not have
LOCK = ".lock"  # in a run's folder
_held: set[int] = set()  # descriptors of locks that are this process's own


def _let_go() -> None:
    for opened in _held:
        os.close(opened)
    _held.clear()


# A lock is free when the last copy of its descriptor is closed: one in a worker must not outlive the trainer.
os.register_at_fork(after_in_child=_let_go)


@contextmanager
def whole_folder(place: Path) -> Iterator[Path]:
    """An empty folder to fill, which then becomes `place`; an earlier folder there is replaced in the same step.

    If the work inside fails or is killed, `place` stays as it was. What a killed process leaves behind, the hidden
    folder `.NAME.part`, is cleared the next time. ConfigurationError if another process is writing the same place.
    """
    place = expand(place).resolve()  # a link stays a link
    place.parent.mkdir(parents=True, exist_ok=True)
    part, aside = (place.with_name(f".{place.name}.{what}") for what in ("part", "old"))
    part.mkdir(exist_ok=True)
    with alone(part, place) as folder:
        try:
            for left in part.iterdir():
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
            yield part
            for path in part.rglob("*"):
                sync(path)
            os.fsync(folder)
            replace_folder(part, place, aside)
            sync(place.parent)
        finally:
            shutil.rmtree(part, ignore_errors=True)


@contextmanager
def alone(folder: Path, place: Path) -> Iterator[int]:
    """Its descriptor; ConfigurationError, with `place`, if another process has opened `folder` so."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if not lock(opened, place):
            raise ConfigurationError(
                f"{place}: expected to be the only one who writes there, got another process that is writing it now; "
                "wait for it, or name another folder"
            )
        yield opened
    finally:
        os.close(opened)


@contextmanager
def only_run(out: Path) -> Iterator[None]:
    """A run's folder, made if needed, for this process alone, until it leaves here or ends in whichever way.

    ConfigurationError names the process that has it. A file is locked, since NFS does not lock folders; nobody needs to
    remove it. Where nothing was written, no folder is left.
    """
    out.mkdir(parents=True, exist_ok=True)
    opened = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    _held.add(opened)
    try:
        if not lock(opened, out):
            other = os.pread(opened, 200, 0).decode(errors="replace")
            raise ConfigurationError(
                f"out {out}: expected to be the only run that writes there, got another one that does ({other}); wait "
                "for it or end it, and this one goes on from its last checkpoint, or name another folder under out"
            )
        os.ftruncate(opened, 0)
        os.pwrite(opened, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        try:
            yield
        finally:
            with suppress(OSError):
                if opened in _held and os.listdir(out) == [LOCK]:
                    (out / LOCK).unlink()
                    out.rmdir()
    finally:
        if opened in _held:  # and not in a fork of this process
            _held.remove(opened)
            os.close(opened)


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """ConfigurationError if another process writes this file in such a block."""
    beside = path.with_name(f".{path.name}.lock")
    opened = os.open(beside, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not lock(opened, path):
            raise ConfigurationError(
                f"{path}: expected to be the only one who writes it, got another process that is writing it now; wait "
                "for it, or name another file"
            )
        try:
            yield
        finally:
            with suppress(OSError):
                beside.unlink()
    finally:
        os.close(opened)


def lock(opened: int, place: Path) -> bool:
    """Whether nobody else holds this file or folder. Where there are no locks, the user is told, and it is as if so."""
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        tell_unguarded(place.parent, error.strerror)
    return True


@cache  # once, not for each checkpoint
def tell_unguarded(folder: Path, reason: str) -> None:
    print(
        f"{folder}: this file system has no such locks ({reason}), so two processes that write one place in it are not "
        "noticed: let only one write there",
        file=sys.stderr,
        flush=True,
    )


def replace_folder(new: Path, place: Path, aside: Path) -> None:
    """Move `new` to `place`; an earlier folder there is then at `new`, or gone.

    The two change places in one step. Some file systems (NFS) cannot do that; there, `place` is missing for a moment.
    Who is killed in that moment leaves the earlier folder at `aside`.
    """
    if not place.exists():
        new.rename(place)
        return
    try:
        exchange(new, place)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        shutil.rmtree(aside, ignore_errors=True)
        place.rename(aside)
        new.rename(place)
        shutil.rmtree(aside)


def exchange(one: Path, other: Path) -> None:
    """Two existing paths change places in one step; OSError (EINVAL, ENOSYS) where the system cannot do that."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(one), None, str(other))


def write_whole(path: Path, text: str) -> None:
    """Write a file, or replace it in one step."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Return when what a file or folder holds is on the disk and survives a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """For calls that do nothing but write `path`: ConfigurationError if they fail.

    torch, safetensors and tokenizers raise errors of their own, not OSError, when a disk is full.
    """
    try:
        yield
    except Exception as error:
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise ConfigurationError(
            f"{path}: expected to write it whole, got {reason}; make room on the disk, or name another folder; what "
            "was there before is still there"
        ) from error
