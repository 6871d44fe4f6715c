"""Reads mcap files (mcap.dev/spec, version 0) front to back, whole or not: a robot that lost power leaves one cut off.

The file's index at its end is not needed, so a wrong one cannot mislead: opening walks over the records' headers, which
tell chunks' times and messages' counts. Chunks are read when their time comes.

The readers of the package `mcap` stop at the first damage, and most of its records are read whole or not at all: a
flipped bit in a channel's metadata would cost its topic. So its streams and its names of records are used, and chunks.
"""

from __future__ import annotations

import struct
from binascii import crc32
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, NamedTuple

from lz4.frame import LZ4FrameDecompressor
from mcap.data_stream import ReadDataStream
from mcap.exceptions import McapError
from mcap.opcode import Opcode
from mcap.records import Chunk
from mcap.writer import MCAP0_MAGIC as MAGIC
from zstandard import ZstdDecompressor

from ki_vla_ros.bags.storage import CLOCK_STEP_NS, Faults, Pending, Piece, Topic, in_time_order
from ki_vla_ros.files import open_file
from ki_vla_ros.messages import BagMessage

# Bytes of a record's kind and length, and of the whole record of the footer.
_HEAD, _FOOTER = 1 + 8, 1 + 8 + 20
# Records of this kind and above are a writer's own; others must skip them.
PRIVATE = 0x80
# Raised where a damaged record is taken apart.
_DAMAGE = (McapError, struct.error, ValueError)

# A larger chunk is refused: recorders write some 1 MB, and a damaged size must not fill the memory.
LARGEST_CHUNK = 128 << 20
# And so is one that is large only when it is decompressed: a file of a few kB would take minutes.
SMALL_CHUNK, MOST_RATIO = 16 << 20, 1000
# Messages of a chunk, which are listed before they are read; the smallest take 31 bytes.
MOST_MESSAGES = 1 << 20
# Content of begun chunks that is kept; beyond, chunks are read again when it is their turn.
CONTENT_KEPT = 128 << 20
# Messages outside of chunks are read in runs of about so many bytes.
RUN_BYTES = 1 << 20
# Of what is stored and the most bytes to give; fewer where it is cut. The package reads no part of a chunk, and
# believes any size.
_DECOMPRESSORS: dict[str, Callable[[bytes, int], bytes]] = {
    "": lambda stored, _: stored,
    "zstd": lambda stored, most: ZstdDecompressor().stream_reader(stored).read(most),
    "lz4": lambda stored, most: LZ4FrameDecompressor().decompress(stored, max_length=most),
}


Place = tuple[int, int]
"""Where in the file something is: a record's or a chunk's offset, and within a chunk the offset in its content."""
_NOWHERE: Place = (1 << 64, 0)


class _Channel(NamedTuple):
    topic: str
    type: str  # "": it names no schema, or one that nothing defines
    encoding: str
    until: Place  # from here on it is defined otherwise, and nobody knows what its messages are


@dataclass(slots=True)
class _Span:
    """A chunk or a run of messages without one; `start` and `size` say where in the file its record or records are."""

    start: int
    size: int
    first_ns: int
    last_ns: int
    chunk: bool
    cut: bool = False  # the file ends in it
    counts: Counter[int] = field(default_factory=Counter)  # messages by channel
    doubted: bool = False  # the counts may be wrong: it must be read to know them


class McapFile:
    """`faults` gets what cannot be read; nothing but OSError is raised."""

    def __init__(self, path: Path, faults: Faults, name: str = "") -> None:
        """`name`: how faults call the file, by default its own name."""
        self._name, self._faults = name or path.name, faults
        self._file, self._size = open_file(path), path.stat().st_size
        # By kind of record and id: each content that it was defined with, and the first place where.
        self._definitions: dict[tuple[int, int], dict[tuple[Any, ...], Place]] = {}
        self._settled = True  # the channels are what the definitions say
        self._channels: dict[int, _Channel] = {}
        self._content: OrderedDict[int, bytes] = OrderedDict()
        self._spans: list[_Span] = []
        self._announced: int | None = None  # messages, by the file's own statistics
        self._announced_on: dict[int, int] = {}  # the same by channel, as far as they say
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
        channels = [item for item in self._channels.items() if item[1].encoding == "cdr" and item[1].type]
        wanted = {key for key, channel in channels if topics is None or channel.topic in topics}
        spans = [span for span in self._spans if span.counts.keys() & wanted]
        return in_time_order([Piece(span.first_ns, partial(self._pending, span, wanted)) for span in spans])

    # --- the walk over the file

    def _read(self, at: int, size: int) -> bytes:
        self._file.seek(at)
        return self._file.read(max(0, min(size, self._size - at)))  # a file that is being recorded grows meanwhile

    def _stream(self, at: int, size: int) -> ReadDataStream:
        return ReadDataStream(BytesIO(self._read(at, size)))

    def _fault(self, kind: Any, at: int, message: str) -> None:
        self._faults.add(kind, f"{self._name}, byte {at}", message)

    def _scan(self) -> None:
        at: int | None = len(MAGIC)
        if self._read(0, len(MAGIC)) != MAGIC:
            what = "is empty" if self._size == 0 else "does not begin as an mcap file does"
            self._faults.add("file", self._name, f"{what}; nothing of it is read")
            at = None
        while at is not None:
            for kind, start, size in _records(self._file, at, self._size):
                if kind == Opcode.FOOTER and start + size + len(MAGIC) == self._size:
                    return
                if kind == Opcode.FOOTER or kind > Opcode.DATA_END:
                    break
                try:
                    self._note(kind, start, size)
                except _DAMAGE as error:
                    self._fault("damaged", at, f"a record of kind {kind} cannot be read and is left out: {_why(error)}")
                    self._doubt_last()
                at = start + size
            at = self._pass(at)

    def _pass(self, at: int) -> int | None:
        """Where to go on after something that is no whole record, or None: nowhere."""
        self._doubt_last()
        if self._size - at < _HEAD:
            self._fault("truncated", at, "the file ends without an index (the recorder did not close it)")
            return None
        chunk = None
        if self._read(at, 1) == bytes([Opcode.CHUNK]):
            with suppress(*_DAMAGE):
                chunk = self._chunk(at + _HEAD)
        if chunk is not None and not chunk.cut:
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
        if self._spans and self._spans[-1].chunk:
            self._spans[-1].doubted = True

    def _note(self, kind: int, start: int, size: int) -> None:
        last = self._spans[-1] if self._spans else None
        whole = kind in (Opcode.SCHEMA, Opcode.CHANNEL, Opcode.STATISTICS)
        record = self._stream(start, size if whole else min(size, 32))  # chunks and messages are not read yet
        if kind in (Opcode.SCHEMA, Opcode.CHANNEL):
            self._define(kind, record, (start, 0))
        elif kind == Opcode.MESSAGE:
            channel, _, log_ns = record.read2(), record.read4(), record.read8()
            begin = start - _HEAD
            run = last is not None and not last.chunk and last.start + last.size == begin
            if last is None or not run or last.size > RUN_BYTES:
                last = _Span(begin, 0, log_ns, log_ns, chunk=False)
                self._spans.append(last)
            last.size = start + size - last.start
            last.first_ns, last.last_ns = min(last.first_ns, log_ns), max(last.last_ns, log_ns)
            last.counts[channel] += 1
        elif kind == Opcode.CHUNK:
            self._spans.append(self._chunk(start))
        elif kind == Opcode.MESSAGE_INDEX and last is not None and last.chunk:
            channel, entries_size = record.read2(), record.read4()
            if entries_size + 6 != size:
                raise ValueError(f"{entries_size} bytes of entries in a record of {size}")
            if entries_size:
                last.counts[channel] += entries_size // 16
        elif kind == Opcode.CHUNK_INDEX:
            self._indexed.append(self._indexed_chunk(start))
        elif kind == Opcode.STATISTICS:
            self._announced = record.read8()
            record.read(2 + 4 * 4 + 2 * 8)  # counts of other records, and times
            self._announced_on = {record.read2(): record.read8() for _ in range(record.read4() // 10)}

    def _chunk(self, start: int) -> _Span:
        """The chunk whose record's content begins there; one of _DAMAGE if it is none that is read."""
        head = self._stream(start, 80)  # a compression's name has at most 32 bytes
        first_ns, last_ns, content_size, _ = head.read8(), head.read8(), head.read8(), head.read4()
        head.read_prefixed_string()
        stored = head.read8()
        if max(content_size, stored) > LARGEST_CHUNK or content_size > max(SMALL_CHUNK, MOST_RATIO * stored):
            raise ValueError(f"a chunk of {stored} bytes that are {content_size}, more than {LARGEST_CHUNK}")
        end = start + head.count + stored
        return _Span(start, end - start, first_ns, last_ns, chunk=True, cut=end > self._size)

    def _indexed_chunk(self, start: int) -> int:
        return self._stream(start + 16, 8).read8()

    def _next_chunk(self, at: int) -> int | None:
        """By the index at the file's end, if there is one."""
        found: list[int] = []
        end = self._size - len(MAGIC)
        for kind, start, _ in _records(self._file, max(at, end - _FOOTER), end):
            if kind == Opcode.FOOTER:
                # The summary comes after the last chunk; it tells the topics of chunks that do not define them.
                found.append(summary := self._stream(start, 8).read8())
                records = _records(self._file, summary, end)
                indexes = [start for kind, start, size in records if kind == Opcode.CHUNK_INDEX and size >= 24]
                found += [self._indexed_chunk(start) for start in indexes]
        return min((place for place in found if at < place < self._size), default=None)

    # --- what the records say

    def _define(self, kind: int, record: ReadDataStream, place: Place) -> None:
        """A text that is cut comes as a shorter one: the length that should follow it then fails."""
        key = record.read2()
        content: tuple[Any, ...]
        if kind == Opcode.SCHEMA:
            name, size = record.read_prefixed_string(), record.read4()
            content = (name, crc32(record.read(size)), crc32(record.read(1 << 30)))
        else:
            schema, topic = record.read2(), record.read_prefixed_string()
            encoding, _ = record.read_prefixed_string(), record.read4()
            content = (topic, schema, encoding)
        known = self._definitions.setdefault((kind, key), {})
        if place < known.get(content, _NOWHERE):
            known[content], self._settled = place, False

    def _survey(self) -> None:
        """Reads the first chunk of each channel, which defines it, and chunks that have no index."""
        seen: set[int] = set()
        for span in self._spans:
            unknown = span.doubted or not span.counts
            if unknown or (span.chunk and not span.counts.keys() <= seen):
                found = list(self._entries(span, self._read_content(span)))
                if unknown:
                    span.counts = Counter(channel for _, channel, _, _ in found)
                    times = [log_ns for log_ns, *_ in found]
                    span.first_ns, span.last_ns = min(times, default=0), max(times, default=0)
            seen |= span.counts.keys()
        self._settle()

    def _settle(self) -> None:
        """Says what each channel is: the first definition counts, until another one contradicts it."""
        if self._settled:
            return
        self._settled = True
        until: dict[tuple[int, int], Place] = {}
        first: dict[tuple[int, int], tuple[Any, ...]] = {}
        for (kind, key), known in self._definitions.items():
            in_order = sorted(known, key=lambda content: known[content])
            before = first[kind, key] = in_order[0]
            for other in in_order[1:]:
                what = f"{'schema' if kind == Opcode.SCHEMA else 'channel'} {key}, {_told(before)},"
                if kind == Opcode.SCHEMA and other[0] == before[0]:
                    self._fault("type", known[other][0], f"{what} is defined again with another text")
                else:
                    told = f"is defined again as {_told(other)}; messages on it from here on are left out"
                    self._fault("type", known[other][0], f"{what} {told}")
                    until.setdefault((kind, key), known[other])
        for (kind, key), content in first.items():
            if kind == Opcode.CHANNEL:
                topic, schema, encoding = content
                name = first.get((Opcode.SCHEMA, schema), ("",))[0] if schema else ""
                end = min(until.get((kind, key), _NOWHERE), until.get((Opcode.SCHEMA, schema), _NOWHERE))
                self._channels[key] = _Channel(topic, name, encoding, end)

    def _topics(self) -> dict[str, Topic]:
        topics: dict[str, Topic] = {}
        for key, (name, kind, encoding, until) in self._channels.items():
            where, before = f"{self._name}, {name}", topics.get(name, Topic(name, kind, 0))
            count = sum(span.counts[key] for span in self._spans if (span.start, 0) < until)
            if encoding != "cdr":
                self._faults.add("type", where, f"encoded as {encoding!r}, not as cdr; left out")
                count = 0
            elif not kind:
                self._faults.add("type", where, "its channel names no schema, so its messages have no type; left out")
                count = 0
            if kind and before.type and before.type != kind:
                self._faults.add("type", where, f"has messages of {before.type} and of {kind}")
            topics[name] = Topic(name, before.type or kind, count + (before.count or 0))
        return topics

    def _counts(self) -> Counter[int]:
        return sum((span.counts for span in self._spans), Counter())

    def _check(self) -> None:
        """What the file says against what is there."""
        for at in set(self._indexed) - {span.start - _HEAD for span in self._spans}:
            self._fault("damaged", at, "the file's index has a chunk here, but there is none that can be read")
        self._spans = [span for span in self._spans if span.counts]
        counts = self._counts()
        if lost := sum(count for key, count in counts.items() if key not in self._channels):
            self._faults.add("damaged", self._name, f"{lost} messages are on channels that nothing defines; left out")
        if self._announced not in (None, found := counts.total()):
            self._faults.add("count", self._name, f"its statistics announce {self._announced} messages, found {found}")
        elif self._announced_on:
            told_of = {**counts, **self._announced_on}.items()
            for key, announced in sorted((key, count) for key, count in told_of if count != counts[key]):
                topic = self._channels[key].topic if key in self._channels else f"channel {key}"
                told = f"its statistics announce {announced} messages on {topic}, found {counts[key]}"
                self._faults.add("count", self._name, told)
        steps = [(before.last_ns - span.first_ns, span.start) for before, span in pairwise(self._spans)]
        if back := [step for step in steps if step[0] > CLOCK_STEP_NS]:
            far = f"goes back by at least {max(back)[0] / 1e9:.1f} s"
            self._fault("clock", back[0][1], f"the recorder's clock {far}; messages from before and after are mixed")

    # --- chunks

    def _pending(self, span: _Span, wanted: Collection[int]) -> Iterator[Pending]:
        entries = list(self._entries(span, content := self._content_of(span)))
        self._settle()
        if content and Counter(channel for _, channel, _, _ in entries) != span.counts:
            announced = span.counts.total()
            told = f"has {announced} messages, found {len(entries)}"
            if announced == len(entries):
                told = "has its messages on other channels than they are"
            self._fault("count", span.start, f"this chunk's index {told}")
        found = sorted(
            (log_ns, at, channel, size)
            for log_ns, channel, at, size in entries
            if channel in wanted and (span.start, at) < self._channels[channel].until
        )
        del content, entries
        for log_ns, at, channel, size in found:
            yield log_ns, partial(self._message, span, log_ns, at, size, self._channels[channel])

    def _message(self, span: _Span, log_ns: int, at: int, size: int, channel: _Channel) -> BagMessage:
        return BagMessage(channel.topic, channel.type, log_ns, self._content_of(span)[at : at + size])

    def _entries(self, span: _Span, content: bytes) -> Iterator[tuple[int, int, int, int]]:
        """(log time, channel, offset, size) of each message in a chunk's content; notes its definitions."""
        end, count, file = 0, 0, BytesIO(content)
        for kind, start, size in _records(file, 0, len(content)):
            end, record = start + size, ReadDataStream(file)
            try:
                if kind == Opcode.MESSAGE:
                    channel, _, log_ns, _ = record.read2(), record.read4(), record.read8(), record.read8()
                    if size < record.count or log_ns >= 1 << 63:
                        raise ValueError("its log time or size is none")
                    if (count := count + 1) > MOST_MESSAGES:
                        self._fault(
                            "damaged", span.start, f"more than {MOST_MESSAGES} messages in this chunk are left out"
                        )
                        return
                    yield log_ns, channel, start + record.count, size - record.count
                elif kind in (Opcode.SCHEMA, Opcode.CHANNEL):
                    self._define(kind, ReadDataStream(BytesIO(content[start:end])), (span.start, start))
                elif kind < PRIVATE:
                    what = "a chunk" if kind == Opcode.CHUNK else f"a record of kind {kind}"
                    raise ValueError(f"{what} has no place in a chunk")
            except _DAMAGE as error:
                self._fault("damaged", span.start, f"a record in this chunk is left out: {_why(error)}")
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
        if not span.chunk:
            return stored
        try:
            chunk = Chunk.read(ReadDataStream(BytesIO(stored)))
            if (decompress := _DECOMPRESSORS.get(chunk.compression)) is None:
                raise ValueError(f"expected zstd, lz4 or no compression, got {chunk.compression!r}")
            content = decompress(chunk.data, chunk.uncompressed_size + 1)
        except Exception as error:  # zstd's, lz4's and MemoryError have no base in common but this
            self._fault("damaged", span.start, f"this chunk cannot be decompressed and is left out: {_why(error)}")
            return b""
        if span.cut and len(content) < chunk.uncompressed_size:
            return content
        if len(content) != chunk.uncompressed_size:
            problem = f"has {len(content)} bytes, not {chunk.uncompressed_size} as it says"
        elif chunk.uncompressed_crc and crc32(content) != chunk.uncompressed_crc:
            problem = "does not have the checksum that it says"
        else:
            return content
        self._fault("damaged", span.start, f"this chunk {problem}; it is left out")
        return b""


def _records(file: IO[bytes], at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(kind, offset, size of the content) of the whole records one after another."""
    head = ReadDataStream(file)
    while at + _HEAD <= end:
        file.seek(at)
        kind, size, start = head.read1(), head.read8(), at + _HEAD
        if kind == 0 or start + size > end:
            return
        yield kind, start, size
        at = start + size


def _why(error: Exception) -> str:
    """Some errors of the package, and MemoryError, say nothing but their name."""
    return str(error) or type(error).__name__


def _told(definition: tuple[Any, ...]) -> str:
    """A schema's or a channel's definition in words."""
    if len(definition) == 3 and isinstance(definition[2], str):
        topic, schema, encoding = definition
        return f"{topic} with schema {schema} in {encoding}"
    return str(definition[0])
