"""Reads files that someone else made, without trust: regular files only, of bounded size, JSON and zip strictly.

A named pipe would block for ever, `/dev/zero` would fill the memory, and a small archive may say that it is large.
Whatever is wrong is an OSError or a ValueError; each reader turns both into an error that says what it had expected.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import struct
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

# As objects, JSON takes up to 25 times its size in memory, and YAML more.
LARGEST_TEXT: Final = 16 << 20
LONGEST_NAME: Final = 255  # of a file, in bytes, on all usual file systems
MOST_PARTS: Final = 2_000_000
_KINDS: Final = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def check_file(path: Path, most: int | None = None) -> int:
    """The file's size; OSError unless it is a regular file (or a link to one) of at most `most` bytes."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise OSError(errno.EINVAL, f"expected a file, got {kind}", str(path))
    if most is not None and found.st_size > most:
        raise OSError(errno.EFBIG, f"expected at most {most} bytes, got {found.st_size}", str(path))
    return found.st_size


def is_name(text: str) -> bool:
    """Whether a file in a folder can be called so: no path, nothing that no file system takes."""
    if text in ("", ".", ".."):
        return False
    return text.isprintable() and Path(text).name == text and len(text.encode()) <= LONGEST_NAME


def open_file(path: Path) -> BinaryIO:
    """The file, opened for reading; OSError unless it is a regular one."""
    check_file(path)
    return path.open("rb")


def read_file(path: Path, most: int = LARGEST_TEXT) -> bytes:
    """The whole file; OSError unless it is a regular one of at most `most` bytes."""
    check_file(path, most)
    with path.open("rb") as file:
        return file.read(most)


def read_text(path: Path, most: int = LARGEST_TEXT) -> str:
    """The file as UTF-8; OSError as in `read_file`, ValueError if it is none."""
    return read_file(path, most).decode("utf-8")


def parse_json(text: str | bytes, most: int = LARGEST_TEXT) -> Any:
    """The value that a JSON text holds; ValueError if it is none, too large or too deep, or has a key twice.

    Other readers take the first, the last or both of two values for one key.
    """
    opening = ("[", "{") if isinstance(text, str) else (b"[", b"{")
    if len(text) > most or sum(map(text.count, opening)) > MOST_PARTS:  # type: ignore[arg-type]
        raise ValueError(f"expected at most {most} characters and {MOST_PARTS} objects and lists")
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path) -> Any:
    """The value in a JSON file; OSError as in `read_file`, ValueError as in `parse_json`."""
    return parse_json(read_file(path))


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"expected each key once, got {twice[:80]!r} again")
    return content


@contextmanager
def open_stored(path: Path) -> Iterator[zipfile.ZipFile]:
    """A zip file whose members are stored as they are, each once; OSError or ValueError if it is none.

    So no member is larger than the file, and there are no two of one name, of which two readers may take either.
    """
    size = check_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            names = {member.filename for member in members}
            for member in members:
                if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                    raise ValueError(f"expected members without compression, got {member.filename!r}")
                if member.flag_bits & 0x1:
                    raise ValueError(f"expected members without encryption, got {member.filename!r}")
                if member.orig_filename != member.filename:
                    raise ValueError(f"expected plain names, got {member.orig_filename!r}")
            if len(names) != len(members):
                raise ValueError("expected each name once, got one twice")
            if (total := sum(member.file_size for member in members)) > size:
                raise ValueError(f"expected members inside the file of {size} bytes, got {total}")
            yield archive
    except (zipfile.BadZipFile, EOFError, NotImplementedError, OverflowError, RuntimeError, struct.error) as error:
        raise ValueError(str(error) or type(error).__name__) from error
