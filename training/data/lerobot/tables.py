"""Reads a dataset's tables, without trust: parquet files, and JSON with one object per line (v2.1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from ki_vla_ros.errors import ConfigurationError, InputError
from ki_vla_ros.files import check_file, open_file, parse_json, read_text

# Bytes of a table once it is read: LeRobot begins another file after 100 MB.
LARGEST_TABLE = 1 << 29
LARGEST_LINES: Final = 1 << 28  # DROID's 95,000 episodes take 12 MB
IMAGES_AT_ONCE: Final = 16
LFS_POINTER: Final = b"version https://git-lfs"


def read_parquet(path: Path, names: Sequence[str] | None = None) -> pa.Table:
    """The columns of these names, or all but the figures of meta/episodes.

    ConfigurationError if the table is not whole, or lacks one of `names`.
    """
    with _open(path) as file:
        parts, read = [], 0
        if names is None:
            names = [name for name in file.schema_arrow.names if not name.startswith("stats/")]
        schema = pa.schema([_field(path, file, name) for name in names])
        # A value that is stored once may stand in millions of rows, so what a part becomes is seen before the next.
        texts = any(word in str(schema) for word in ("string", "binary"))
        for part in file.iter_batches(batch_size=256 if texts else 4096, columns=names):
            parts.append(part.select(schema.names))
            read += part.nbytes
            if read > LARGEST_TABLE:
                raise ValueError(f"it has more than {LARGEST_TABLE} bytes")
        return pa.Table.from_batches(parts, schema)


def read_rows(path: Path, name: str, first: int, count: int) -> Iterator[Any]:
    """`count` values of one column from row `first` on, a few in memory at a time; errors as in `read_parquet`."""
    with _open(path) as file:
        _field(path, file, name)
        begin = 0
        for group in range(file.num_row_groups):
            end = begin + file.metadata.row_group(group).num_rows
            if end > first and begin < first + count:
                for part in file.iter_batches(batch_size=IMAGES_AT_ONCE, row_groups=[group], columns=[name]):
                    if part.nbytes > LARGEST_TABLE:
                        raise ValueError(f"{IMAGES_AT_ONCE} rows of {name} have more than {LARGEST_TABLE} bytes")
                    after = begin + len(part)
                    if after > first and begin < first + count:
                        column = part.column(name)
                        yield from column[max(first - begin, 0) : first + count - begin].to_pylist()
                    begin = after
            begin = end


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; ConfigurationError names the file, or the line that is none."""
    try:
        lines = read_text(path, LARGEST_LINES).split("\n")  # a JSON text may have other ends of lines in it
    except FileNotFoundError:
        raise ConfigurationError(f"dataset: expected {path}, found none; is the copy whole?") from None
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{path}: expected a text with one JSON object per line, got none ({error})"
        ) from error
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(_object(line))
            except ValueError as error:
                raise ConfigurationError(
                    f"{path}: line {number}: expected one JSON object, got {line[:80]!r} ({error}); is the copy whole?"
                ) from error
    return found


def is_pointer(path: Path) -> bool:
    """Whether a file only says which one git-lfs would fetch."""
    try:
        with open_file(path) as file:
            return file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False


@contextmanager
def described(folder: Path) -> Iterator[None]:
    """Makes of what a table of other columns, types or numbers leads to an InputError."""
    try:
        yield
    except (ArithmeticError, LookupError, OSError, TypeError, ValueError, pa.ArrowException) as error:
        raise InputError(
            f"dataset {folder}: expected tables as meta/info.json describes them, got others ({error!r})"
        ) from error


def _object(line: str) -> dict[str, Any]:
    value = parse_json(line)
    if not isinstance(value, dict):
        raise ValueError("it is none")
    return value


def open_parquet(path: Path, name: str) -> pq.ParquetFile:
    """The file, which has this column and is to be closed; errors as in `read_parquet`."""
    with _whole(path):
        check_file(path)
        file = pq.ParquetFile(path)
        _field(path, file, name)
        return file


def read_group(path: Path, file: pq.ParquetFile, name: str, group: int, most: int) -> pa.ChunkedArray | None:
    """One column of a row group; None if it has more than `most` bytes, errors as in `read_parquet`."""
    with _whole(path):
        parts: list[pa.Array] = []
        read = 0
        for part in file.iter_batches(batch_size=IMAGES_AT_ONCE, row_groups=[group], columns=[name], use_threads=False):
            parts.append(part.column(name))
            read += part.nbytes
            if read > most:
                return None
        return pa.chunked_array(parts)


@contextmanager
def _open(path: Path) -> Iterator[pq.ParquetFile]:
    with _whole(path):
        check_file(path)
        with pq.ParquetFile(path) as file:
            yield file


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Errors that name the file."""
    try:
        yield
    except FileNotFoundError:
        raise ConfigurationError(f"dataset: expected {path}, found none; is the copy whole?") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        if is_pointer(path):
            raise ConfigurationError(
                f"{path}: expected a table, got git-lfs's pointer to it; run 'git lfs pull'"
            ) from None
        raise ConfigurationError(f"{path}: not a whole parquet file: {error}") from error


def _field(path: Path, file: pq.ParquetFile, name: str) -> pa.Field:
    if file.schema_arrow.names.count(name) != 1:
        raise ConfigurationError(
            f"{path}: expected one column {name!r}, as meta/info.json says, got {', '.join(file.schema_arrow.names)}"
        )
    return file.schema_arrow.field(name)
