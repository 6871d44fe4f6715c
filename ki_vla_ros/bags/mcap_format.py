"""The mcap format's records (mcap.dev/spec, version 0), as far as reading messages needs them."""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lz4.frame import LZ4FrameDecompressor

if sys.version_info >= (3, 14):
    from compression.zstd import ZstdDecompressor
else:
    from backports.zstd import ZstdDecompressor

MAGIC = b"\x89MCAP0\r\n"
HEADER, FOOTER, SCHEMA, CHANNEL, MESSAGE, CHUNK, MESSAGE_INDEX, CHUNK_INDEX = range(1, 9)
STATISTICS, DATA_END = 0x0B, 0x0F
# A record begins with its kind and its length.
RECORD = struct.Struct("<BQ")
# channel, sequence, log time, publish time
MESSAGE_HEAD = struct.Struct("<HIQQ")
# first and last log time, size and CRC of the content (0: none), length of the compression's name
CHUNK_HEAD = struct.Struct("<QQQII")
# What is read of a record to know what it is: the longest of the above and a compression's name.
PEEK = RECORD.size + CHUNK_HEAD.size + 32


@dataclass(slots=True)
class Span:
    """A chunk (its content compressed) or a run of messages without one; `start` and `size` say where in the file."""

    start: int
    size: int
    first_ns: int
    last_ns: int
    compression: str | None  # None: a run, its bytes are the records
    content_size: int
    crc: int = 0
    record: int = 0  # where a chunk's record begins
    cut: bool = False  # the file ends in it
    counts: dict[int, int] | None = None  # messages by channel; None: not known without reading it


def chunk_span(start: int, size: int, peek: bytes, cut: bool = False) -> Span:
    """`peek`: the beginning of a chunk's record, without kind and length."""
    first_ns, last_ns, content_size, crc, name_size = CHUNK_HEAD.unpack_from(peek)
    if name_size > 32 or len(peek) < CHUNK_HEAD.size + name_size + 8:
        raise ValueError("its compression has no name")
    compression = peek[CHUNK_HEAD.size : CHUNK_HEAD.size + name_size].decode()
    (stored,) = struct.unpack_from("<Q", peek, CHUNK_HEAD.size + name_size)
    head, record = CHUNK_HEAD.size + name_size + 8, start - RECORD.size
    if not cut and head + stored > size:
        raise ValueError(f"{stored} bytes of content in a record of {size}")
    cut = head + stored > size
    return Span(start + head, min(stored, size - head), first_ns, last_ns, compression, content_size, crc, record, cut)


def decompress(stored: bytes, compression: str, size: int) -> bytes:
    """At most one byte more than `size`, and less where `stored` ends too early."""
    if compression == "":
        return stored
    if compression not in ("zstd", "lz4"):
        raise ValueError(f"compression {compression!r} is not read, expected zstd, lz4 or none")
    decompressor: Any = ZstdDecompressor() if compression == "zstd" else LZ4FrameDecompressor()
    content: bytes = decompressor.decompress(stored, max_length=size + 1)
    while not decompressor.eof and len(content) <= size:
        more = decompressor.decompress(b"", max_length=size + 1 - len(content))
        if not more:
            break
        content += more
    return content


def records(content: bytes) -> Iterator[tuple[int, int, int]]:
    """(kind, offset, size) of the whole records one after another."""
    at = 0
    while at + RECORD.size <= len(content):
        kind, size = RECORD.unpack_from(content, at)
        start = at + RECORD.size
        if kind == 0 or start + size > len(content):
            return
        yield kind, start, size
        at = start + size


def text_at(record: bytes, at: int) -> tuple[str, int]:
    """A string and where it ends."""
    (size,) = struct.unpack_from("<I", record, at)
    end = at + 4 + size
    if end > len(record):
        raise ValueError(f"a text of {size} bytes in a record of {len(record)}")
    return record[at + 4 : end].decode(), end
