"""Reads mcap files (mcap.dev/spec, version 0) front to back, whole or not: a robot that lost power leaves one cut off.

The file's index at its end is not needed, so a wrong one cannot mislead: opening walks over the records' headers, which
tell chunks' times and messages' counts. Chunks are read when their time comes.
"""

from __future__ import annotations

import struct
import sys
from binascii import crc32
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from lz4.frame import LZ4FrameDecompressor

from ki_vla_ros.bags.storage import CLOCK_STEP_NS, Faults, Pending, Piece, Topic, in_time_order
from ki_vla_ros.messages import BagMessage

if sys.version_info >= (3, 14):
    from compression.zstd import ZstdDecompressor
else:
    from backports.zstd import ZstdDecompressor

MAGIC = b"\x89MCAP0\r\n"
HEADER, FOOTER, SCHEMA, CHANNEL, MESSAGE, CHUNK, MESSAGE_INDEX, CHUNK_INDEX = range(1, 9)
STATISTICS, DATA_END = 0x0B, 0x0F
_RECORD = struct.Struct("<BQ")  # kind, length
_MESSAGE = struct.Struct("<HIQQ")  # channel, sequence, log time, publish time
# First and last log time, size and CRC of the content (0: none), length of the compression's name.
_CHUNK = struct.Struct("<QQQII")
# Read of a record to know what it is: the longest of the above, a compression's name and the length of the content.
_PEEK = _RECORD.size + _CHUNK.size + 32 + 8
# Raised where a damaged record is taken apart.
_DAMAGE = (struct.error, UnicodeDecodeError, ValueError)

# A larger chunk is refused: recorders write some 1 MB, and a damaged size must not fill the memory.
LARGEST_CHUNK = 128 << 20
# Content of begun chunks that is kept; beyond, chunks are read again when it is their turn.
CONTENT_KEPT = 128 << 20
# Messages outside of chunks are read in runs of about so many bytes.
RUN_BYTES = 1 << 20


class _Channel(NamedTuple):
    topic: str
    type: str
    encoding: str


@dataclass(slots=True)
class _Span:
    """A chunk (its content compressed) or a run of messages without one; `start` and `size` say where in the file."""

    record: int  # where its first record begins
    start: int
    size: int
    first_ns: int
    last_ns: int
    compression: str | None = None  # None: a run, its bytes are the records
    content_size: int = 0
    crc: int = 0
    cut: bool = False  # the file ends in it
    counts: Counter[int] = field(default_factory=Counter)  # messages by channel
    doubted: bool = False  # the counts may be wrong: it must be read to know them


class McapFile:
    """`faults` gets what cannot be read; nothing but OSError is raised."""

    def __init__(self, path: Path, faults: Faults, name: str = "") -> None:
        """`name`: how faults call the file, by default its own name."""
        self._name, self._faults = name or path.name, faults
        self._file, self._size = path.open("rb"), path.stat().st_size
        self._schemas: dict[int, str] = {0: ""}
        self._channels: dict[int, _Channel] = {}
        self._content: OrderedDict[int, bytes] = OrderedDict()
        self._spans: list[_Span] = []
        self._announced: int | None = None  # messages, by the file's own statistics
        self._indexed: list[int] = []  # where chunks begin, by the file's own index
        self._scan()
        self._survey()
        self.topics = self._topics()
        self._check()
        self.start_ns = min((span.first_ns for span in self._spans), default=None)
        self.end_ns = max((span.last_ns for span in self._spans), default=None)

    def close(self) -> None:
        self._content.clear()
        self._file.close()

    def messages(self, topics: Collection[str] | None) -> Iterator[Pending]:
        channels = [item for item in self._channels.items() if item[1].encoding == "cdr"]
        wanted = {key for key, channel in channels if topics is None or channel.topic in topics}
        spans = [span for span in self._spans if span.counts.keys() & wanted]
        return in_time_order([Piece(span.first_ns, partial(self._pending, span, wanted)) for span in spans])

    # --- the walk over the file

    def _read(self, at: int, size: int) -> bytes:
        self._file.seek(at)
        return self._file.read(max(0, min(size, self._size - at)))  # a file that is being recorded grows meanwhile

    def _fault(self, kind: Any, at: int, message: str) -> None:
        self._faults.add(kind, f"{self._name}, byte {at}", message)

    def _scan(self) -> None:
        if self._read(0, len(MAGIC)) != MAGIC:
            what = "is empty" if self._size == 0 else "does not begin as an mcap file does"
            self._faults.add("file", self._name, f"{what}; nothing of it is read")
            return
        at: int | None = len(MAGIC)
        while at is not None:
            peek = self._read(at, _PEEK)
            if len(peek) < _RECORD.size:
                self._fault("truncated", at, "the file ends without an index (the recorder did not close it)")
                return self._doubt_last()
            kind, size = _RECORD.unpack_from(peek)
            start, end = at + _RECORD.size, at + _RECORD.size + size
            if kind == FOOTER and end + len(MAGIC) == self._size:
                return None
            if kind == FOOTER or not 1 <= kind <= DATA_END or end > self._size:
                at = self._pass(at, peek)
                continue
            try:
                self._note(kind, start, size, peek[_RECORD.size :])
            except _DAMAGE as error:
                self._fault("damaged", at, f"a record of kind {kind} cannot be read and is left out: {error}")
                self._doubt_last()
            at = end

    def _pass(self, at: int, peek: bytes) -> int | None:
        """Where to go on after something that is no whole record, or None: nowhere."""
        chunk, start = None, at + _RECORD.size
        if peek[0] == CHUNK:
            with suppress(*_DAMAGE):
                chunk = _chunk(start, self._size - start, peek[_RECORD.size :], cut=True)
        if chunk is None:
            self._doubt_last()
        elif not chunk.cut:
            self._fault(
                "damaged", at, "this chunk's record has a wrong length; the chunk is read as long as it says itself"
            )
            self._spans.append(chunk)
            return chunk.start + chunk.size
        following = self._next_chunk(at)
        if following is not None:
            self._fault("damaged", at, f"no record can be read; continued at the next chunk, byte {following}")
        elif chunk is not None:
            self._fault("truncated", at, "the file ends in this chunk; the part of it that is there is read")
            self._spans.append(chunk)
        else:
            self._fault("truncated", at, f"no record can be read from here to the end ({self._size})")
        return following

    def _doubt_last(self) -> None:
        """The indexes behind the last chunk may be there in part."""
        if self._spans and self._spans[-1].compression is not None:
            self._spans[-1].doubted = True

    def _note(self, kind: int, start: int, size: int, peek: bytes) -> None:
        last = self._spans[-1] if self._spans else None
        if kind in (SCHEMA, CHANNEL):
            self._define(kind, self._read(start, size))
        elif kind == MESSAGE:
            channel, _, log_ns, _ = _MESSAGE.unpack_from(peek)
            begin = start - _RECORD.size
            run = last is not None and last.compression is None and last.start + last.size == begin
            if last is None or not run or last.size > RUN_BYTES:
                last = _Span(begin, begin, 0, log_ns, log_ns)
                self._spans.append(last)
            last.size = start + size - last.start
            last.first_ns, last.last_ns = min(last.first_ns, log_ns), max(last.last_ns, log_ns)
            last.counts[channel] += 1
        elif kind == CHUNK:
            self._spans.append(_chunk(start, size, peek))
        elif kind == MESSAGE_INDEX and last is not None and last.compression is not None:
            channel, entries_size = struct.unpack_from("<HI", peek)
            if entries_size + 6 != size:
                raise ValueError(f"{entries_size} bytes of entries in a record of {size}")
            if entries_size:
                last.counts[channel] = entries_size // 16
        elif kind == CHUNK_INDEX:
            self._indexed.append(struct.unpack_from("<QQQ", peek)[2])
        elif kind == STATISTICS:
            (self._announced,) = struct.unpack_from("<Q", peek)

    def _next_chunk(self, at: int) -> int | None:
        """By the index at the file's end, if there is one."""
        tail = self._read(self._size - 37, 37) if self._size > 37 else b""
        if len(tail) != 37 or tail[-8:] != MAGIC or tail[0] != FOOTER:
            return None
        (summary,) = struct.unpack_from("<Q", tail, 9)
        index = self._read(summary, self._size - summary) if at < summary < self._size else b""
        entries = [start for kind, start, size in _records(index) if kind == CHUNK_INDEX and size >= 32]
        found = [struct.unpack_from("<QQQ", index, start)[2] for start in entries]
        # The summary comes after the last chunk; it tells the topics of chunks that do not define them.
        return min((place for place in [*found, summary] if at < place < self._size), default=None)

    # --- what the records say

    def _define(self, kind: int, record: bytes) -> None:
        if kind == SCHEMA:
            self._schemas[struct.unpack_from("<H", record)[0]] = _text(record, 2)[0]
        else:
            key, schema = struct.unpack_from("<HH", record)
            topic, at = _text(record, 4)
            encoding, _ = _text(record, at)
            if key not in self._channels or not self._channels[key].type:
                self._channels[key] = _Channel(topic, self._schemas.get(schema, ""), encoding)

    def _survey(self) -> None:
        """Reads chunks that have no index, or messages on channels that are not defined elsewhere."""
        for span in self._spans:
            unknown = span.doubted or not span.counts
            if unknown or (span.compression is not None and not span.counts.keys() <= self._channels.keys()):
                found = list(self._entries(span, self._read_content(span), define=True))
                if unknown:
                    span.counts = Counter(channel for _, channel, _, _ in found)
                    times = [log_ns for log_ns, *_ in found]
                    span.first_ns, span.last_ns = min(times, default=0), max(times, default=0)

    def _topics(self) -> dict[str, Topic]:
        topics: dict[str, Topic] = {}
        counts = self._counts()
        for key, (name, kind, encoding) in self._channels.items():
            where, count, before = f"{self._name}, {name}", counts[key], topics.get(name, Topic(name, kind, 0))
            if encoding != "cdr":
                self._faults.add("type", where, f"encoded as {encoding!r}, not as cdr; left out")
                count = 0
            if before.type != kind:
                self._faults.add("type", where, f"has messages of {before.type} and of {kind}")
            topics[name] = Topic(name, before.type, count + (before.count or 0))
        return topics

    def _counts(self) -> Counter[int]:
        return sum((span.counts for span in self._spans), Counter())

    def _check(self) -> None:
        """What the file says against what is there."""
        for at in set(self._indexed) - {span.record for span in self._spans}:
            self._fault("damaged", at, "the file's index has a chunk here, but there is none that can be read")
        self._spans = [span for span in self._spans if span.counts]
        counts = self._counts()
        if lost := sum(count for key, count in counts.items() if key not in self._channels):
            self._faults.add("damaged", self._name, f"{lost} messages are on channels that nothing defines; left out")
        if self._announced not in (None, found := counts.total()):
            self._faults.add("count", self._name, f"its statistics announce {self._announced} messages, found {found}")
        steps = [(before.last_ns - span.first_ns, span.start) for before, span in pairwise(self._spans)]
        if back := [step for step in steps if step[0] > CLOCK_STEP_NS]:
            far = f"goes back by at least {max(back)[0] / 1e9:.1f} s"
            self._fault("clock", back[0][1], f"the recorder's clock {far}; messages from before and after are mixed")

    # --- chunks

    def _pending(self, span: _Span, wanted: Collection[int]) -> Iterator[Pending]:
        entries = list(self._entries(span, content := self._content_of(span)))
        if content and (announced := span.counts.total()) != len(entries):
            self._fault("count", span.start, f"this chunk's index has {announced} messages, found {len(entries)}")
        found = sorted((log_ns, at, channel, size) for log_ns, channel, at, size in entries if channel in wanted)
        del content, entries
        for log_ns, at, channel, size in found:
            yield log_ns, partial(self._message, span, log_ns, at, size, self._channels[channel])

    def _message(self, span: _Span, log_ns: int, at: int, size: int, channel: _Channel) -> BagMessage:
        return BagMessage(channel.topic, channel.type, log_ns, self._content_of(span)[at : at + size])

    def _entries(self, span: _Span, content: bytes, define: bool = False) -> Iterator[tuple[int, int, int, int]]:
        """(log time, channel, offset, size) of each message in a chunk's content."""
        end = 0
        for kind, start, size in _records(content):
            end = start + size
            try:
                if kind == MESSAGE:
                    channel, _, log_ns, _ = _MESSAGE.unpack_from(content, start)
                    if size < _MESSAGE.size or log_ns >= 1 << 63:
                        raise ValueError("its log time or size is none")
                    yield log_ns, channel, start + _MESSAGE.size, size - _MESSAGE.size
                elif define and kind in (SCHEMA, CHANNEL):
                    self._define(kind, content[start:end])
            except _DAMAGE as error:
                self._fault("damaged", span.start, f"a record in this chunk is left out: {error}")
        if end != len(content) and not span.cut:
            self._fault("damaged", span.start, f"{len(content) - end} bytes at this chunk's end are no records")

    def _content_of(self, span: _Span) -> bytes:
        content = self._content.pop(span.start, None)
        if content is None:
            content = self._read_content(span)
            kept = len(content) + sum(map(len, self._content.values()))
            while self._content and kept > CONTENT_KEPT:
                kept -= len(self._content.popitem(last=False)[1])
        self._content[span.start] = content
        return content

    def _read_content(self, span: _Span) -> bytes:
        stored = self._read(span.start, span.size)
        if span.compression is None:
            return stored
        try:
            content = _decompress(stored, span.compression, span.content_size)
        except Exception as error:  # zstd's, lz4's and MemoryError have no base in common but this
            self._fault("damaged", span.start, f"this chunk cannot be decompressed and is left out: {error}")
            return b""
        if span.cut and len(content) < span.content_size:
            return content
        if len(content) != span.content_size:
            problem = f"has {len(content)} bytes, not {span.content_size} as it says"
        elif span.crc and crc32(content) != span.crc:
            problem = "does not have the checksum that it says"
        else:
            return content
        self._fault("damaged", span.start, f"this chunk {problem}; it is left out")
        return b""


def _chunk(start: int, size: int, peek: bytes, cut: bool = False) -> _Span:
    """`peek`: the beginning of a chunk's record, without kind and length. ValueError if it is none that is read."""
    first_ns, last_ns, content_size, crc, name_size = _CHUNK.unpack_from(peek)
    if name_size > 32 or len(peek) < (head := _CHUNK.size + name_size + 8):
        raise ValueError("its compression has no name")
    if content_size > LARGEST_CHUNK:
        raise ValueError(f"a chunk of {content_size} bytes, more than {LARGEST_CHUNK}")
    compression = peek[_CHUNK.size : head - 8].decode()
    (stored,) = struct.unpack_from("<Q", peek, head - 8)
    if not cut and head + stored > size:
        raise ValueError(f"{stored} bytes of content in a record of {size}")
    kept, record = min(stored, size - head), start - _RECORD.size
    return _Span(record, start + head, kept, first_ns, last_ns, compression, content_size, crc, kept < stored)


def _decompress(stored: bytes, compression: str, size: int) -> bytes:
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


def _records(content: bytes) -> Iterator[tuple[int, int, int]]:
    """(kind, offset, size) of the whole records one after another."""
    at = 0
    while at + _RECORD.size <= len(content):
        kind, size = _RECORD.unpack_from(content, at)
        start = at + _RECORD.size
        if kind == 0 or start + size > len(content):
            return
        yield kind, start, size
        at = start + size


def _text(record: bytes, at: int) -> tuple[str, int]:
    """A string and where it ends."""
    (size,) = struct.unpack_from("<I", record, at)
    end = at + 4 + size
    if end > len(record):
        raise ValueError(f"a text of {size} bytes in a record of {len(record)}")
    return record[at + 4 : end].decode(), end
