"""Bags as robots leave them: what can be read is read, what cannot is named, and nothing is made up."""

from __future__ import annotations

import sqlite3
import struct
from binascii import crc32
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from rosbags.rosbag2 import CompressionMode
from support import bad_bags, sample_bags
from support.bad_bags import CASES, counts, fits
from support.sample_bags import JOINT_TOPIC, SCENE, record, recording, sized, write_bag, write_mcap

from ki_vla_ros.bags import mcap as bag_mcap
from ki_vla_ros.bags.bag import open_bag
from ki_vla_ros.bags.storage import FAULTS_LISTED, Faults
from ki_vla_ros.errors import ConfigurationError, InputError
from ki_vla_ros.messages.decoding import BagMessage, camera_frame, decode, joint_reading

SMALL = recording(seconds=0.2)


@pytest.mark.parametrize("name", CASES)
def test_what_can_be_read_is_read_and_the_rest_is_named(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    path = case.make(tmp_path)
    before = {file: file.read_bytes() for file in path.parent.rglob("*") if file.is_file()}
    with open_bag(path) as bag:
        found = list(bag.messages())
        faults = list(bag.faults)
        again = list(bag.messages())
        assert bag.faults == faults  # reading once more finds nothing new
    assert fits(faults, case.faults), [str(fault) for fault in faults]
    assert [(m.topic, m.log_ns, m.data) for m in again] == [(m.topic, m.log_ns, m.data) for m in found]
    times = [message.log_ns for message in found]
    assert times == sorted(times)
    whole = recording(transport="compressed" if "jpegs" in name else "raw")
    if case.lost is not None:
        assert counts(found) == counts(whole) - Counter(case.lost)
        assert {topic: t.count for topic, t in bag.topics.items()} == counts(found)
        assert (bag.start_ns, bag.end_ns) == (times[0], times[-1])
        if name.startswith("good"):
            assert {(m.topic, m.log_ns, m.data) for m in found} == {(m.topic, m.log_ns, m.data) for m in whole}
    else:
        assert counts(found) <= counts(whole)
        original = {(m.topic, m.log_ns): m.data for m in whole}
        assert all(original[m.topic, m.log_ns] == m.data for m in found)  # never a wrong message
    assert {file: file.read_bytes() for file in path.parent.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    "name, least",
    [
        ("truncated mcap, zstd", 0.55),
        ("truncated mcap, lz4", 0.55),
        ("truncated mcap, not compressed", 0.55),
        ("truncated mcap, no chunks", 0.55),
        ("truncated mcap, zeros behind", 0.5),
        ("a damaged chunk", 0.8),
        ("a flipped bit, no compression", 0.8),
        ("a damaged record length", 0.8),
        ("truncated sqlite", 0.3),
        ("damaged sqlite", 0.8),
        ("truncated compressed file", 0.0),
    ],
)
def test_most_of_a_damaged_bag_is_read(name: str, least: float, tmp_path: Path) -> None:
    with open_bag(CASES[name].make(tmp_path)) as bag:
        assert len(list(bag.messages())) >= least * len(recording())


def test_topics_are_chosen_and_typed(tmp_path: Path) -> None:
    with open_bag(write_bag(tmp_path / "bag", recording())) as bag:
        assert bag.topics[SCENE].type == "sensor_msgs/msg/Image" and bag.topics[SCENE].count == 40
        found = list(bag.messages([SCENE, JOINT_TOPIC, "/not/there"]))
        assert counts(found) == {SCENE: 40, JOINT_TOPIC: 200}
        frame = camera_frame(next(m for m in found if m.topic == SCENE), "scene")
        assert frame.rgb_HWC.shape == (32, 32, 3) and frame.stamp_ns == sample_bags.START_NS
        reading = joint_reading(next(m for m in found if m.topic == JOINT_TOPIC))
        assert reading.names == sample_bags.JOINTS and np.array_equal(reading.position_J, sample_bags.where(0.0))


def test_no_bag(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="nowhere: no such file or folder"):
        open_bag(tmp_path / "nowhere")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigurationError, match=r"notes\.txt: expected a folder or a file"):
        open_bag(tmp_path / "notes.txt")
    with pytest.raises(ConfigurationError, match=r"expected metadata\.yaml or files \.mcap or \.db3 in it, got none"):
        open_bag(tmp_path)


# --- a message belongs to one topic and one type, or it is left out and said so


def schema(key: int, name: str, text: str = "") -> bytes:
    return record(3, struct.pack("<H", key) + sized(name) + sized("ros2msg") + sized(text))


def channel(key: int, schema_key: int, topic: str, encoding: str = "cdr") -> bytes:
    return record(4, struct.pack("<HH", key, schema_key) + sized(topic) + sized(encoding) + sized(b""))


def put(key: int, log_ns: int) -> bytes:
    return record(5, struct.pack("<HIQQ", key, 0, log_ns, log_ns) + sample_bags.text(f"{key} {log_ns}"))


def chunk(*records: bytes, times: tuple[int, int], index: dict[int, int] | None = None) -> bytes:
    """`index`: entries of the message indexes behind it, by channel."""
    content = b"".join(records)
    head = struct.pack("<QQQI", *times, len(content), crc32(content)) + sized("") + struct.pack("<Q", len(content))
    indexes = ((key, bytes(16 * count)) for key, count in (index or {}).items())
    behind = (record(7, struct.pack("<H", key) + sized(entries)) for key, entries in indexes)
    return record(6, head + content) + b"".join(behind)


def mcap_of(path: Path, data: bytes, summary: bytes = b"") -> Path:
    begin = b"\x89MCAP0\r\n" + record(1, sized("ros2") + sized("test")) + data + record(15, struct.pack("<I", 0))
    footer = record(2, struct.pack("<QQI", len(begin) if summary else 0, 0, 0))
    path.write_bytes(begin + summary + footer + b"\x89MCAP0\r\n")
    return path


def statistics(total: int, on: dict[int, int]) -> bytes:
    by_channel = b"".join(struct.pack("<HQ", *item) for item in on.items())
    return record(11, struct.pack("<QHIIIIQQ", total, 1, 1, 0, 0, 0, 0, 0) + sized(by_channel))


TEXT, OTHER = sample_bags.STRING, sample_bags.JOINT_STATE
KNOWN = schema(1, TEXT) + schema(2, OTHER) + channel(1, 1, "/a")
A_TWICE = chunk(put(1, 1), put(1, 2), times=(1, 2), index={1: 2})
NESTED = chunk(KNOWN, put(1, 1), chunk(put(1, 2), times=(2, 2)), put(1, 3), times=(1, 3))
CONTRADICTIONS: dict[str, tuple[bytes, bytes, list[tuple[str, str, int]], str]] = {
    "a channel, outside of chunks": (
        KNOWN + put(1, 1) + channel(1, 1, "/b") + put(1, 2),
        b"",
        [("/a", TEXT, 1)],
        "channel 1, /a with schema 1 in cdr, is defined again as /b with schema 1 in cdr; messages on it from here on",
    ),
    "a channel, in a later chunk": (
        chunk(KNOWN, put(1, 1), times=(1, 1), index={1: 1})
        + chunk(put(1, 2), channel(1, 1, "/b"), put(1, 3), times=(2, 3), index={1: 2})
        + chunk(put(1, 4), times=(4, 4), index={1: 1}),
        b"",
        [("/a", TEXT, 1), ("/a", TEXT, 2)],
        "channel 1, /a with schema 1 in cdr, is defined again as /b",
    ),
    "a channel's type": (
        KNOWN + put(1, 1) + channel(1, 2, "/a") + put(1, 2),
        b"",
        [("/a", TEXT, 1)],
        "is defined again as /a with schema 2 in cdr",
    ),
    "a channel's encoding": (
        KNOWN + put(1, 1) + channel(1, 1, "/a", "json") + put(1, 2),
        b"",
        [("/a", TEXT, 1)],
        "is defined again as /a with schema 1 in json",
    ),
    "a channel, in the summary": (
        chunk(KNOWN, put(1, 1), times=(1, 1), index={1: 1}),
        channel(1, 2, "/b"),
        [("/a", TEXT, 1)],
        "channel 1, /a with schema 1 in cdr, is defined again as /b with schema 2 in cdr",
    ),
    "a schema's name": (
        KNOWN + put(1, 1) + schema(1, OTHER) + put(1, 2),
        b"",
        [("/a", TEXT, 1)],
        "schema 1, std_msgs/msg/String, is defined again as sensor_msgs/msg/JointState; messages on it from here on",
    ),
    "a schema's text": (
        KNOWN + put(1, 1) + schema(1, TEXT, "string text") + put(1, 2),
        b"",
        [("/a", TEXT, 1), ("/a", TEXT, 2)],
        "schema 1, std_msgs/msg/String, is defined again with another text",
    ),
    "a channel without a schema": (
        KNOWN + channel(2, 0, "/b") + put(1, 1) + put(2, 2),
        b"",
        [("/a", TEXT, 1)],
        "/b: its channel names no schema, so its messages have no type; left out",
    ),
    "a channel whose schema is nowhere": (
        KNOWN + channel(2, 9, "/b") + put(1, 1) + put(2, 2),
        b"",
        [("/a", TEXT, 1)],
        "/b: its channel names no schema",
    ),
    "a message before its channel": (
        chunk(put(1, 1), KNOWN, times=(1, 1)),
        b"",
        [("/a", TEXT, 1)],  # there is no other that it could be on
        "",
    ),
    "a message on no channel": (
        KNOWN + put(1, 1) + put(7, 2),
        b"",
        [("/a", TEXT, 1)],
        "1 messages are on channels that nothing defines; left out",
    ),
    "a chunk in a chunk": (
        NESTED,
        b"",
        [("/a", TEXT, 1), ("/a", TEXT, 3)],
        "left out: a chunk has no place in a chunk",
    ),
    "an attachment in a chunk": (
        chunk(KNOWN, put(1, 1), record(9, b"?"), times=(1, 1)),
        b"",
        [("/a", TEXT, 1)],
        "a record of kind 9 has no place in a chunk",
    ),
    "a writer's own record in a chunk": (
        chunk(KNOWN, put(1, 1), record(0x90, b"?"), times=(1, 1)),
        b"",
        [("/a", TEXT, 1)],
        "",
    ),
    "statistics by channel": (
        KNOWN + channel(2, 1, "/b") + A_TWICE,
        statistics(2, {1: 1, 2: 1}),
        [("/a", TEXT, 1), ("/a", TEXT, 2)],
        "its statistics announce 1 messages on /a, found 2",
    ),
    "an index that names another channel": (
        KNOWN + channel(2, 1, "/b") + chunk(put(1, 1), put(2, 2), times=(1, 2), index={1: 2}),
        b"",
        [("/a", TEXT, 1), ("/b", TEXT, 2)],
        "this chunk's index has its messages on other channels than they are",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_no_message_is_credited_to_another_topic_or_type(name: str, tmp_path: Path) -> None:
    data, summary, expected, told = CONTRADICTIONS[name]
    with open_bag(mcap_of(tmp_path / "b.mcap", data, summary)) as bag:
        for _ in range(2):
            assert [(m.topic, m.type, m.log_ns) for m in bag.messages()] == expected
            assert all(decode(m).data.split() == [str(1 + (m.topic == "/b")), str(m.log_ns)] for m in bag.messages())
        said = [str(fault) for fault in bag.faults]
        assert all(bag.topics[topic].type == kind for topic, kind, _ in expected)
    assert (told in " ".join(said) and len(said) <= 2) if told else not said, said


def database(path: Path, script: str) -> Path:
    """Without the primary keys that a recorder's tables have."""
    with closing(sqlite3.connect(path)) as opened:
        opened.executescript(
            "CREATE TABLE topics (id, name, type, serialization_format); "
            f"CREATE TABLE messages (id, topic_id, timestamp, data); {script}"
        )
    return path


def rows(table: str, *values: str) -> str:
    return "".join(f"INSERT INTO {table} VALUES ({value});" for value in values)


def test_no_row_is_credited_to_another_topic_or_message(tmp_path: Path) -> None:
    topics = rows("topics", f"1, '/a', '{TEXT}', 'cdr'", f"2, '/b', '{TEXT}', 'cdr'", f"1, '/c', '{OTHER}', 'cdr'")
    messages = rows("messages", "1, 1, 10, x'0001'", "2, 2, 20, x'0002'", "2, 2, 30, x'0003'", "3, 2, -5, x'0004'")
    with open_bag(database(tmp_path / "b.db3", topics + messages)) as bag:
        found = [(m.topic, m.log_ns, m.data) for m in bag.messages()]
        said = " ".join(map(str, bag.faults))
    assert found == [("/b", 20, b"\0\2"), ("/b", 30, b"\0\3")]
    told = "topic 1 is /a (std_msgs/msg/String) and /c (sensor_msgs/msg/JointState); its messages are left out"
    assert told in said and "2 messages without a time or a known topic are left out" in said


def test_no_file_is_read_twice_and_metadata_is_no_witness(tmp_path: Path) -> None:
    once = write_bag(tmp_path / "bag", SMALL)
    metadata = (once / "metadata.yaml").read_text()
    doubled = metadata.replace("  - bag.mcap\n", "  - bag.mcap\n  - bag.mcap\n", 1).replace(sample_bags.STRING, OTHER)
    (once / "metadata.yaml").write_text(doubled)
    with open_bag(once) as bag:
        assert counts(list(bag.messages())) == counts(SMALL)
        said = " ".join(map(str, bag.faults))
    assert "metadata.yaml: lists a file more than once; it is read once" in said
    assert f"has messages of {TEXT}, not of {OTHER} as metadata.yaml says" in said

    twice = write_bag(tmp_path / "packed", SMALL, compression=CompressionMode.FILE)
    (twice / "metadata.yaml").unlink()
    (packed,) = twice.glob("*.zstd")
    (twice / packed.stem).write_bytes((once / "bag.mcap").read_bytes())
    with open_bag(twice) as bag:
        assert counts(list(bag.messages())) == counts(SMALL)
        assert "is there without compression as well and is left out" in " ".join(map(str, bag.faults))


def message(kind: str, data: bytes) -> BagMessage:
    return BagMessage("/topic", kind, 5, data)


def test_trailing_bytes_are_ignored() -> None:
    data = sample_bags.joint_state(7, sample_bags.MIDDLE_J)
    for trailing in (0, 1, 4, 100):
        reading = joint_reading(message(sample_bags.JOINT_STATE, data + bytes(trailing)))
        assert np.array_equal(reading.position_J, sample_bags.MIDDLE_J) and reading.stamp_ns == 7


@pytest.mark.parametrize(
    "kind, data, fault",
    [
        (sample_bags.JOINT_STATE, b"", "expected CDR, got bytes that begin with ''"),
        (sample_bags.JOINT_STATE, b"{}{}{}{}", "expected CDR"),
        (
            sample_bags.JOINT_STATE,
            sample_bags.joint_state(7, sample_bags.MIDDLE_J)[:60],
            "expected a sensor_msgs/msg/JointState",
        ),
        ("my_msgs/msg/Thing", b"\0\1\0\0", "message type 'my_msgs/msg/Thing' is not known"),
        (sample_bags.STRING, b"\0\1\0\0\xff\xff\xff\xff", "expected a std_msgs/msg/String"),
    ],
)
def test_bytes_that_are_not_a_message_are_refused(kind: str, data: bytes, fault: str) -> None:
    with pytest.raises(InputError, match=fault):
        decode(message(kind, data))


def test_bytes_that_are_not_an_image_are_refused() -> None:
    with pytest.raises(InputError, match="expected sensor_msgs/msg/Image or"):
        camera_frame(message(sample_bags.STRING, sample_bags.text("x")), "scene")
    for content, fault in [
        (b"", "got 0 bytes that are neither"),
        (b"\xff\xd8 no jpeg \xff\xd9", "expected a whole jpeg image, got 13 bytes of a damaged one"),
        (bad_bags._half_jpeg(), "expected a whole jpeg image, got .* bytes of a damaged one"),
    ]:
        with pytest.raises(InputError, match=f"camera 'scene': .*{fault}"):
            camera_frame(message(sample_bags.COMPRESSED_IMAGE, sample_bags.jpeg(0, content)), "scene")


def test_the_list_of_faults_is_limited() -> None:
    faults = Faults()
    for i in range(10 * FAULTS_LISTED):
        faults.add("message", f"message {i}", "is broken")
    assert len(faults.found) == FAULTS_LISTED + 1
    assert "from here on they are not listed" in str(faults.found[-1])


def test_chunks_that_overlap_are_read_again_rather_than_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each chunk has a message from the end of the recording, so all are begun before the first is finished."""
    messages = recording()
    chunk = 20
    last = messages[-len(messages) // chunk :]
    mixed = [m for k, end in enumerate(last) for m in [*messages[k * chunk : (k + 1) * chunk - 1], end]]
    path = write_mcap(tmp_path / "b.mcap", mixed, per_chunk=chunk)
    monkeypatch.setattr(bag_mcap, "CONTENT_KEPT", 100_000)
    with open_bag(path) as bag:
        kept = []
        for _ in bag.messages():
            storage = bag._storages[0]
            kept.append(sum(map(len, storage._content.values())))
        assert len(kept) == len(mixed) and {fault.kind for fault in bag.faults} == {"clock"}
    assert max(kept) < 300_000
