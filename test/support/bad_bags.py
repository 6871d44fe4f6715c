"""Bags as robots leave them: cases that are generated, and what their reader must find.

`CASES[name].make(folder)` returns the bag's path. `faults`: regular expressions, one for each fault that reading must
name; no other fault may be named. `lost`: how many messages of the good recording cannot be read from this bag, by
topic. The recording is of the shipped demo bundle's robot, so that the replay and the doctor can be tested on the same
cases.
"""

from __future__ import annotations

import re
import shutil
import sqlite3
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rosbags.rosbag2 import CompressionMode

from ki_vla_ros.messages.decoding import BagMessage
from ki_vla_ros.records import NS_PER_S
from support.sample_bags import (
    COMPRESSORS,
    JOINT_TOPIC,
    SCENE,
    STRING,
    Messages,
    image,
    jpeg,
    recording,
    text,
    write_bag,
    write_mcap,
)


@dataclass(frozen=True)
class Case:
    make: Callable[[Path], Path]
    faults: tuple[str, ...] = ()
    lost: dict[str, int] | None = field(default_factory=dict)  # None: how much is lost varies


def counts(messages: Messages) -> Counter[str]:
    return Counter(message.topic for message in messages)


def _cut(path: Path, share: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def _cut_to(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def _cut_in_chunk(path: Path, number: int = 4) -> Path:
    """The file ends 1500 bytes after a chunk's beginning: power was lost while it was written."""
    path.write_bytes(path.read_bytes()[: _chunk_starts(path)[number] + 1500])
    return path


def _flip(path: Path, at: int, mask: int = 0xFF, count: int = 1) -> Path:
    content = bytearray(path.read_bytes())
    for i in range(at, at + count):
        content[i] ^= mask
    path.write_bytes(content)
    return path


def _chunk_starts(path: Path) -> list[int]:
    content, at, found = path.read_bytes(), 8, []
    while at < len(content) - 8:
        kind, size = struct.unpack_from("<BQ", content, at)
        if kind == 6:
            found.append(at)
        at += 9 + size
    return found


def _damaged_message_index(path: Path) -> Path:
    """The second message index after the first chunk gives a wrong length for its entries."""
    content = bytearray(path.read_bytes())
    chunk = _chunk_starts(path)[0]
    first = chunk + 9 + struct.unpack_from("<Q", content, chunk + 1)[0]
    second = first + 9 + struct.unpack_from("<Q", content, first + 1)[0]
    assert content[first] == content[second] == 7
    struct.pack_into("<I", content, second + 9 + 2, 3)
    path.write_bytes(content)
    return path


def _single(folder: Path, storage: str) -> Path:
    bag = write_bag(folder / "bag", recording(), storage)
    return next(file for file in bag.iterdir() if file.suffix in (".mcap", ".db3"))


def _no_metadata(folder: Path, storage: str) -> Path:
    bag = write_bag(folder / "bag", recording(), storage)
    (bag / "metadata.yaml").unlink()
    return bag


def _damaged_sqlite(folder: Path) -> Path:
    """A page in the middle of the table is overwritten."""
    path = _single(folder, "sqlite3")
    database = sqlite3.connect(path)
    size, pages = (database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_size", "page_count"))
    database.close()
    return _flip(path, (pages // 2) * size, count=4 * size)


def _split(folder: Path, with_metadata: bool = False) -> Path:
    messages = recording()
    half = len(messages) // 2
    (folder / "bag").mkdir()
    write_mcap(folder / "bag" / "bag_10.mcap", messages[half:])
    write_mcap(folder / "bag" / "bag_9.mcap", messages[:half])
    if with_metadata:
        topics = "".join(
            f"  - topic_metadata: {{name: {topic}, type: {kind}, serialization_format: cdr}}\n    message_count: 1\n"
            for topic, kind in dict.fromkeys((m.topic, m.type) for m in messages)
        )
        (folder / "bag" / "metadata.yaml").write_text(
            "rosbag2_bagfile_information:\n  version: 5\n  storage_identifier: mcap\n"
            f"  relative_file_paths: [bag_9.mcap, bag_10.mcap]\n  topics_with_message_count:\n{topics}"
        )
    return folder / "bag"


def _unfinished_wal(folder: Path) -> Path:
    """The recorder was killed: half of the messages are still in the write-ahead log."""
    path = _single(folder, "sqlite3")
    live = folder / "live.db3"
    shutil.copy(path, live)
    writer = sqlite3.connect(live, isolation_level=None)
    rows = writer.execute("SELECT topic_id, timestamp, data FROM messages ORDER BY id").fetchall()
    writer.execute("DELETE FROM messages WHERE id > 150")
    writer.execute("PRAGMA journal_mode=WAL")
    writer.execute("PRAGMA wal_autocheckpoint=0")
    writer.executemany("INSERT INTO messages (topic_id, timestamp, data) VALUES (?, ?, ?)", rows[150:])
    (folder / "killed").mkdir()
    for name in ("live.db3", "live.db3-wal"):
        shutil.copy(folder / name, folder / "killed" / name)
    writer.close()
    return folder / "killed" / "live.db3"


def _of(changed: Callable[[Messages], Messages], **how: Any) -> Callable[[Path], Path]:
    return lambda folder: write_mcap(folder / "bag.mcap", changed(recording(**how)))


def change(topic: str, to: Callable[[int, BagMessage], BagMessage | None]) -> Callable[[Messages], Messages]:
    """Changes the k-th message on a topic, or takes it out."""

    def changed(messages: Messages) -> Messages:
        found, k = [], 0
        for message in messages:
            if message.topic == topic:
                message, k = to(k, message), k + 1
            if message is not None:
                found.append(message)
        return found

    return changed


def with_data(message: BagMessage, data: bytes, **fields: Any) -> BagMessage:
    return replace(message, data=data, **fields)


def _stamp(message: BagMessage) -> int:
    sec, nanosec = struct.unpack_from("<iI", message.data, 4)
    return sec * NS_PER_S + nanosec


# A zstd frame that claims to hold 2**40 bytes.
HUGE = b"\x28\xb5\x2f\xfd\xe0" + (1 << 40).to_bytes(8, "little") + bytes(60)
WITHOUT_METADATA = r"metadata.yaml: is missing"
CASES: dict[str, Case] = {
    "good mcap": Case(lambda f: write_bag(f / "bag", recording())),
    "good sqlite": Case(lambda f: write_bag(f / "bag", recording(), "sqlite3")),
    "good mcap, one file": Case(lambda f: _single(f, "mcap")),
    "good sqlite, one file": Case(lambda f: _single(f, "sqlite3")),
    "good mcap, many chunks, lz4": Case(lambda f: write_mcap(f / "b.mcap", recording(), "lz4")),
    "good mcap, no chunks": Case(lambda f: write_mcap(f / "b.mcap", recording(), per_chunk=0)),
    "good mcap, no index": Case(lambda f: write_mcap(f / "b.mcap", recording(), index=False, summary=False)),
    "good, compressed file": Case(lambda f: write_bag(f / "bag", recording(), "sqlite3", CompressionMode.FILE)),
    "good, compressed messages": Case(lambda f: write_bag(f / "bag", recording(), "sqlite3", CompressionMode.MESSAGE)),
    "split by time": Case(lambda f: _split(f, with_metadata=True)),
    "split, without metadata": Case(_split, (WITHOUT_METADATA,)),
    "mcap without metadata": Case(lambda f: _no_metadata(f, "mcap"), (WITHOUT_METADATA,)),
    "sqlite without metadata": Case(lambda f: _no_metadata(f, "sqlite3"), (WITHOUT_METADATA,)),
    "damaged metadata": Case(
        lambda f: (bag := write_bag(f / "bag", recording()), _cut(bag / "metadata.yaml", 0.02))[0],
        (r"metadata.yaml: cannot be read, all files of the folder are",),
    ),
    "a split file is gone": Case(
        lambda f: (bag := _split(f, with_metadata=True), (bag / "bag_10.mcap").unlink())[0],
        (r"bag_10.mcap: is listed in metadata.yaml, but is not there",),
        None,
    ),
    "truncated mcap, zstd": Case(
        lambda f: _cut_in_chunk(write_mcap(f / "b.mcap", recording())), (r"the file ends in this chunk",), None
    ),
    "truncated mcap, lz4": Case(
        lambda f: _cut_in_chunk(write_mcap(f / "b.mcap", recording(), "lz4")), (r"the file ends in this chunk",), None
    ),
    "truncated mcap, not compressed": Case(
        lambda f: _cut_in_chunk(write_mcap(f / "b.mcap", recording(), "")), (r"the file ends in this chunk",), None
    ),
    "truncated mcap, between chunks": Case(
        lambda f: (p := write_mcap(f / "b.mcap", recording()), _cut_to(p, _chunk_starts(p)[4]))[0],
        (r"the file ends without an index",),
        None,
    ),
    "truncated mcap, in a chunk's index": Case(
        lambda f: (p := write_mcap(f / "b.mcap", recording()), _cut_to(p, _chunk_starts(p)[4] - 300))[0],
        (r"no record can be read from here to the end",),
        None,
    ),
    "truncated mcap, no chunks": Case(
        lambda f: _cut(write_mcap(f / "b.mcap", recording(), per_chunk=0), 0.6),
        (r"no record can be read from here to the end",),
        None,
    ),
    "truncated mcap, zeros behind": Case(
        lambda f: (
            p := _cut(write_mcap(f / "b.mcap", recording()), 0.6),
            p.write_bytes(p.read_bytes() + bytes(9000)),
        )[0],
        (r"cannot be decompressed|no record can be read|the file ends in this chunk",),
        None,
    ),
    "mcap without its end": Case(
        lambda f: _cut(write_mcap(f / "b.mcap", recording()), 0.999), (r"ends without an index|no record can be read",)
    ),
    "a damaged chunk": Case(
        lambda f: (p := write_mcap(f / "b.mcap", recording()), _flip(p, _chunk_starts(p)[2] + 200, count=3))[0],
        (r"byte \d+: this chunk (cannot be decompressed|does not have the checksum)",),
        None,
    ),
    "a compression of no kind": Case(
        lambda f: (
            p := write_mcap(f / "b.mcap", recording()),
            p.write_bytes(p.read_bytes().replace(b"zstd", b"gzip")),
        )[0],
        (r"this chunk cannot be decompressed and is left out: expected zstd, lz4 or no compression, got 'gzip'",),
        None,
    ),
    "a flipped bit, no compression": Case(
        lambda f: (p := write_mcap(f / "b.mcap", recording(), ""), _flip(p, _chunk_starts(p)[2] + 3000, 1))[0],
        (r"byte \d+: this chunk does not have the checksum that it says; it is left out",),
        None,
    ),
    "a damaged record length": Case(
        lambda f: (p := write_mcap(f / "b.mcap", recording()), _flip(p, _chunk_starts(p)[2] + 6))[0],
        (r"this chunk's record has a wrong length",),
    ),
    "a record of no kind": Case(
        lambda f: (p := write_mcap(f / "b.mcap", recording()), _flip(p, _chunk_starts(p)[2]))[0],
        (
            r"no record can be read; continued at the next chunk",
            r"statistics announce",
            r"index has a chunk here, but there is none",
        ),
        None,
    ),
    "a damaged message index": Case(
        lambda f: _damaged_message_index(write_mcap(f / "b.mcap", recording())),
        (r"a record of kind 7 cannot be read and is left out: 3 bytes of entries",),
    ),
    "truncated sqlite": Case(
        lambda f: _cut(_single(f, "sqlite3"), 0.6), (r"messages can be read up to an error",), None
    ),
    "damaged sqlite": Case(_damaged_sqlite, (r"messages can be read up to an error, \d+ after it",), None),
    "sqlite with a write-ahead log": Case(_unfinished_wal),
    "truncated compressed file": Case(
        lambda f: (
            bag := write_bag(f / "bag", recording(), "mcap", CompressionMode.FILE),
            _cut(next(bag.glob("*.zstd")), 0.5),
        )[0],
        (r"the compressed file ends too early", r"file ends in this chunk|ends without an index|no record can be read"),
        None,
    ),
    "empty file": Case(lambda f: (p := f / "b.mcap", p.touch())[0], (r"b.mcap: is empty",), None),
    "no mcap": Case(
        lambda f: (p := f / "b.mcap", p.write_bytes(b"no bag" * 99))[0], (r"does not begin as an mcap file",), None
    ),
    "no database": Case(
        lambda f: (p := f / "b.db3", p.write_bytes(b"no bag" * 99))[0], (r"b.db3: cannot be read: file is not",), None
    ),
    "zero messages": Case(lambda f: write_mcap(f / "b.mcap", []), (), None),
    "missing topics": Case(_of(lambda found: [m for m in found if m.topic != SCENE]), (), {SCENE: 40}),
    "other types": Case(
        _of(change(SCENE, lambda k, m: with_data(m, text("an image?"), type=STRING) if k % 2 else m)),
        (r"image_raw: has messages of sensor_msgs/msg/Image and of std_msgs/msg/String",),
    ),
    "another serialization": Case(
        lambda f: write_mcap(f / "b.mcap", recording(), encoding="protobuf"), (r"encoded as 'protobuf'",) * 5, None
    ),
    "recorder's clock goes back": Case(
        _of(lambda found: [replace(m, log_ns=m.log_ns - NS_PER_S * (i > 250)) for i, m in enumerate(found)]),
        (r"the recorder's clock goes back by at least (1.0|0.9|0.8) s",),
    ),
    "stamps go back": Case(
        _of(change(SCENE, lambda k, m: with_data(m, image(_stamp(m) - (NS_PER_S if k > 20 else 0)))))
    ),
    "a gap of minutes": Case(
        _of(lambda found: [replace(m, log_ns=m.log_ns + 180 * NS_PER_S * (i > 250)) for i, m in enumerate(found)])
    ),
    "trailing bytes": Case(_of(change(JOINT_TOPIC, lambda _, m: with_data(m, m.data + bytes(37))))),
    "corrupt jpegs": Case(
        _of(
            change(f"{SCENE}/compressed", lambda k, m: with_data(m, jpeg(_stamp(m), b"\xff\xd8 none")) if k % 3 else m),
            transport="compressed",
        )
    ),
    "cut jpegs": Case(
        _of(
            change(f"{SCENE}/compressed", lambda k, m: with_data(m, jpeg(_stamp(m), _half_jpeg())) if k % 3 else m),
            transport="compressed",
        )
    ),
    "mixed encodings": Case(
        _of(change(SCENE, lambda k, m: with_data(m, image(_stamp(m), ("rgb8", "bgr8", "mono8")[k % 3]))))
    ),
    "cut compressed messages": Case(
        _of(change(JOINT_TOPIC, lambda k, m: m if k % 5 else with_data(m, COMPRESSORS["zstd"](m.data)[:-3]))),
        (r"joint_states at \d+: cannot be decompressed and is left out",),
        None,
    ),
    "compressed messages that claim to be huge": Case(
        _of(change(JOINT_TOPIC, lambda k, m: m if k % 5 else with_data(m, HUGE))),
        (r"joint_states at \d+: cannot be decompressed and is left out: it is larger than any message",),
        None,
    ),
    "cut messages": Case(_of(change(JOINT_TOPIC, lambda k, m: with_data(m, m.data[: 7 * (k % 20)])))),
}  # fmt: skip


def _half_jpeg() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    content = cv2.imencode(".jpg", pixels)[1].tobytes()
    return content[: len(content) // 2]


def fits(faults: Sequence[object], expected: Sequence[str]) -> bool:
    """Every expected fault is named, and every named one is expected."""
    named = [str(fault) for fault in faults]
    return all(any(re.search(e, n) for n in named) for e in expected) and all(
        any(re.search(e, n) for e in expected) for n in named
    )
