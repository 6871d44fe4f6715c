"""Reads mcap files front to back, whole or not: a robot that lost power leaves one without index and end.

The file's index at its end is not needed, so a wrong one cannot mislead: opening walks over the records' headers, which
tell chunks' times and messages' counts. Chunks are read when their time comes.
"""

from __future__ import annotations

import struct
from binascii import crc32
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from ki_vla_ros.bags.mcap_format import (
    CHANNEL,
    CHUNK,
    CHUNK_INDEX,
    DATA_END,
    FOOTER,
    MAGIC,
    MESSAGE,
    MESSAGE_HEAD,
    MESSAGE_INDEX,
    PEEK,
    RECORD,
    SCHEMA,
    STATISTICS,
    Span,
    chunk_span,
    decompress,
    records,
    text_at,
)
from ki_vla_ros.bags.storage import CLOCK_STEP_NS, Faults, Part, Pending, Topic, in_time_order
from ki_vla_ros.messages.decode import BagMessage

# A larger chunk is refused: recorders write some 1 MB, and a damaged size must not fill the memory.
LARGEST_CHUNK = 128 << 20
# Content of begun chunks that is kept; beyond, chunks are read again when it is their turn.
CONTENT_KEPT = 128 << 20
# Messages outside of chunks are read in runs of about so many bytes.
RUN_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class _Channel:
    topic: str
    type: str
    encoding: str


@dataclass(slots=True)
class _Scan:
    """What the walk over the records found."""

    spans: list[Span] = field(default_factory=list)
    announced: int | None = None  # messages, by the file's own statistics
    chunks: list[int] = field(default_factory=list)  # where they begin, by the file's own index


class McapFile:
    """`faults` gets what cannot be read; nothing but OSError is raised."""

    def __init__(self, path: Path, faults: Faults, name: str = "") -> None:
        """`name`: how faults call the file, by default its own name."""
        self._name = name or path.name
        self._faults = faults
        self._file = path.open("rb")
        self._size = path.stat().st_size
        self._schemas: dict[int, str] = {0: ""}
        self._channels: dict[int, _Channel] = {}
        self._content: OrderedDict[int, bytes] = OrderedDict()
        scan = self._scan()
        self._spans = self._survey(scan)
        self.topics = self._topics(scan)
        self.start_ns = min((span.first_ns for span in self._spans), default=None)
        self.end_ns = max((span.last_ns for span in self._spans), default=None)

    def close(self) -> None:
        self._content.clear()
        self._file.close()

    def messages(self, topics: Collection[str] | None) -> Iterator[Pending]:
        wanted = {key for key, channel in self._channels.items() if topics is None or channel.topic in topics}
        wanted = {key for key in wanted if self._channels[key].encoding == "cdr"}
        spans = [span for span in self._spans if span.counts and span.counts.keys() & wanted]
        return in_time_order([Part(span.first_ns, partial(self._pending, span, wanted)) for span in spans])

    # --- the walk over the file

    def _read(self, at: int, size: int) -> bytes:
        self._file.seek(at)
        return self._file.read(max(0, min(size, self._size - at)))  # a file that is being recorded grows meanwhile

    def _fault(self, kind: Any, at: int, message: str) -> None:
        self._faults.add(kind, f"{self._name}, byte {at}", message)

    def _scan(self) -> _Scan:
        scan = _Scan()
        if self._read(0, len(MAGIC)) != MAGIC:
            what = "is empty" if self._size == 0 else "does not begin as an mcap file does"
            self._faults.add("file", self._name, f"{what}; nothing of it is read")
            return scan
        at = len(MAGIC)
        while True:
            peek = self._read(at, PEEK)
            if len(peek) < RECORD.size:
                self._fault("truncated", at, "the file ends without an index (the recorder did not close it)")
                _distrust_index(scan)
                return scan
            kind, size = RECORD.unpack_from(peek)
            start = at + RECORD.size
            if kind == FOOTER and start + size + len(MAGIC) == self._size:
                self._check_index(scan)
                return scan
            if kind == FOOTER or not 1 <= kind <= DATA_END or start + size > self._size:
                following = self._pass(scan, at, peek)
                if following is None:
                    return scan
                at = following
                continue
            try:
                self._note(scan, kind, start, size, peek[RECORD.size :])
            except (struct.error, UnicodeDecodeError, ValueError) as error:
                self._fault("damaged", at, f"a record of kind {kind} cannot be read and is left out: {error}")
                _distrust_index(scan)
            at = start + size

    def _pass(self, scan: _Scan, at: int, peek: bytes) -> int | None:
        """Where to go on after something that is no whole record, or None: nowhere."""
        chunk = None
        if peek[0] == CHUNK:
            with suppress(struct.error, UnicodeDecodeError, ValueError):
                chunk = chunk_span(at + RECORD.size, self._size - at - RECORD.size, peek[RECORD.size :], cut=True)
        if chunk is None or chunk.content_size > LARGEST_CHUNK:
            _distrust_index(scan)
        elif not chunk.cut:
            self._fault(
                "damaged", at, "this chunk's record has a wrong length; the chunk is read as long as it says itself"
            )
            scan.spans.append(chunk)
            return chunk.start + chunk.size
        following = self._resume_after(at)
        if following is not None:
            self._fault("damaged", at, f"no record can be read; continued at the next chunk, byte {following}")
        elif chunk is not None:
            self._fault("truncated", at, "the file ends in this chunk; the part of it that is there is read")
            scan.spans.append(chunk)
        else:
            self._fault("truncated", at, f"no record can be read from here to the end ({self._size})")
        return following

    def _note(self, scan: _Scan, kind: int, start: int, size: int, peek: bytes) -> None:
        if kind in (SCHEMA, CHANNEL):
            self._define(kind, self._read(start, size))
        elif kind == MESSAGE:
            channel, _, log_ns, _ = MESSAGE_HEAD.unpack_from(peek)
            span = scan.spans[-1] if scan.spans else None
            begin = start - RECORD.size
            if span is None or span.compression is not None or span.start + span.size != begin or span.size > RUN_BYTES:
                span = Span(begin, 0, log_ns, log_ns, None, 0, counts={})
                scan.spans.append(span)
            span.size = span.content_size = start + size - span.start
            span.first_ns, span.last_ns = min(span.first_ns, log_ns), max(span.last_ns, log_ns)
            assert span.counts is not None  # of a run they are always known
            span.counts[channel] = span.counts.get(channel, 0) + 1
        elif kind == CHUNK:
            span = chunk_span(start, size, peek)
            if span.content_size > LARGEST_CHUNK:
                raise ValueError(f"a chunk of {span.content_size} bytes, more than {LARGEST_CHUNK}")
            scan.spans.append(span)
        elif kind == MESSAGE_INDEX and scan.spans:
            channel, entries_size = struct.unpack_from("<HI", peek)
            if entries_size + 6 != size:
                raise ValueError(f"{entries_size} bytes of entries in a record of {size}")
            span = scan.spans[-1]
            if entries_size and span.compression is not None:
                span.counts = {**(span.counts or {}), channel: entries_size // 16}
        elif kind == CHUNK_INDEX:
            scan.chunks.append(struct.unpack_from("<QQQ", peek)[2])
        elif kind == STATISTICS:
            (scan.announced,) = struct.unpack_from("<Q", peek)

    def _check_index(self, scan: _Scan) -> None:
        found = {span.record for span in scan.spans}
        for at in scan.chunks:
            if at not in found:
                self._fault("damaged", at, "the file's index has a chunk here, but there is none that can be read")

    def _resume_after(self, at: int) -> int | None:
        """The next chunk by the index at the file's end, if there is one."""
        tail = self._read(self._size - 37, 37) if self._size > 37 else b""
        if len(tail) != 37 or tail[-8:] != MAGIC or tail[0] != FOOTER:
            return None
        (summary,) = struct.unpack_from("<Q", tail, 9)
        index = self._read(summary, self._size - summary) if at < summary < self._size else b""
        found = []
        for kind, start, size in records(index):
            if kind == CHUNK_INDEX and size >= 32:
                found.append(struct.unpack_from("<QQQ", index, start)[2])
        # The summary comes after the last chunk; it tells the topics of chunks that do not define them.
        return min((offset for offset in [*found, summary] if at < offset < self._size), default=None)

    # --- what the records say

    def _define(self, kind: int, record: bytes) -> None:
        if kind == SCHEMA:
            (key,) = struct.unpack_from("<H", record)
            self._schemas[key] = text_at(record, 2)[0]
        else:
            key, schema = struct.unpack_from("<HH", record)
            topic, at = text_at(record, 4)
            encoding, _ = text_at(record, at)
            if key not in self._channels or not self._channels[key].type:
                self._channels[key] = _Channel(topic, self._schemas.get(schema, ""), encoding)

    def _survey(self, scan: _Scan) -> list[Span]:
        """Reads chunks that have no index, or messages on channels that are not defined elsewhere."""
        for span in scan.spans:
            if span.counts is None or (
                span.compression is not None and not span.counts.keys() <= self._channels.keys()
            ):
                found = list(self._entries(span, self._read_content(span), define=True))
                if span.counts is None:
                    span.counts = Counter(channel for _, channel, _, _ in found)
                    times = [log_ns for log_ns, *_ in found]
                    span.first_ns, span.last_ns = min(times, default=0), max(times, default=0)
        return [span for span in scan.spans if span.counts]

    def _topics(self, scan: _Scan) -> dict[str, Topic]:
        topics: dict[str, Topic] = {}
        counts: Counter[int] = Counter()
        for span in self._spans:
            counts.update(span.counts or {})
        for key, channel in self._channels.items():
            count, known = counts[key], topics.get(channel.topic)
            if channel.encoding != "cdr":
                self._faults.add(
                    "type", f"{self._name}, {channel.topic}", f"encoded as {channel.encoding!r}, not as cdr; left out"
                )
                count = 0
            if known is not None and known.type != channel.type:
                self._faults.add(
                    "type", f"{self._name}, {channel.topic}", f"has messages of {known.type} and of {channel.type}"
                )
            topics[channel.topic] = Topic(
                channel.topic, known.type if known else channel.type, count + ((known.count or 0) if known else 0)
            )
        if unknown := sorted(set(counts) - set(self._channels)):
            lost = sum(counts[key] for key in unknown)
            self._faults.add("damaged", self._name, f"{lost} messages are on channels that nothing defines; left out")
        found = sum(counts.values())
        if scan.announced is not None and scan.announced != found:
            self._faults.add("count", self._name, f"its statistics announce {scan.announced} messages, found {found}")
        self._check_clock()
        return topics

    def _check_clock(self) -> None:
        steps = [(before.last_ns - span.first_ns, span.start) for before, span in pairwise(self._spans)]
        steps = [step for step in steps if step[0] > CLOCK_STEP_NS]
        if steps:
            back_s = max(steps)[0] / 1e9
            self._fault(
                "clock",
                steps[0][1],
                f"the recorder's clock goes back by at least {back_s:.1f} s; messages from before and after are mixed",
            )

    # --- chunks

    def _pending(self, span: Span, wanted: Collection[int]) -> Iterator[Pending]:
        entries = list(self._entries(span, content := self._content_of(span)))
        announced = sum((span.counts or {}).values())
        if content and announced != len(entries):
            self._fault("count", span.start, f"this chunk's index has {announced} messages, found {len(entries)}")
        found = sorted((log_ns, at, channel, size) for log_ns, channel, at, size in entries if channel in wanted)
        del content, entries
        for log_ns, at, channel, size in found:
            yield log_ns, partial(self._message, span, log_ns, at, size, self._channels[channel])

    def _message(self, span: Span, log_ns: int, at: int, size: int, channel: _Channel) -> BagMessage:
        content = self._content_of(span)
        return BagMessage(channel.topic, channel.type, log_ns, content[at : at + size])

    def _entries(self, span: Span, content: bytes, define: bool = False) -> Iterator[tuple[int, int, int, int]]:
        """(log time, channel, offset, size) of each message in a chunk's content."""
        end = 0
        for kind, start, size in records(content):
            end = start + size
            try:
                if kind == MESSAGE:
                    channel, _, log_ns, _ = MESSAGE_HEAD.unpack_from(content, start)
                    if size < MESSAGE_HEAD.size or log_ns >= 1 << 63:
                        raise ValueError("its log time or size is none")
                    yield log_ns, channel, start + MESSAGE_HEAD.size, size - MESSAGE_HEAD.size
                elif define and kind in (SCHEMA, CHANNEL):
                    self._define(kind, content[start:end])
            except (struct.error, UnicodeDecodeError, ValueError) as error:
                self._fault("damaged", span.start, f"a record in this chunk is left out: {error}")
        if end != len(content) and not span.cut:
            self._fault("damaged", span.start, f"{len(content) - end} bytes at this chunk's end are no records")

    def _content_of(self, span: Span) -> bytes:
        content = self._content.pop(span.start, None)
        if content is None:
            content = self._read_content(span)
            kept = len(content) + sum(map(len, self._content.values()))
            while self._content and kept > CONTENT_KEPT:
                kept -= len(self._content.popitem(last=False)[1])
        self._content[span.start] = content
        return content

    def _read_content(self, span: Span) -> bytes:
        stored = self._read(span.start, span.size)
        if span.compression is None:
            return stored
        try:
            content = decompress(stored, span.compression, span.content_size)
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


def _distrust_index(scan: _Scan) -> None:
    """The indexes behind the last chunk may be there in part: it will be read to know what is in it."""
    if scan.spans and scan.spans[-1].compression is not None:
        scan.spans[-1].counts = None
