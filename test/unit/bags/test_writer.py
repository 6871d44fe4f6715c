"""The writer's bags, also when the disk is full or too slow; bags/bag.py reads them back."""

from __future__ import annotations

import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.waiting import until

from ki_vla_ros.bags.bag import open_bag
from ki_vla_ros.bags.writer import BagWriter, typestore
from ki_vla_ros.errors import ConfigurationError, KiVlaError
from ki_vla_ros.messages.decoding import decode

TOPICS = {"/image": "sensor_msgs/msg/Image", "/text": "std_msgs/msg/String"}
SERIALIZED_IMAGE = b"\0\1\0\0" + bytes(100_000)


def text(content: str) -> bytes:
    return bytes(
        typestore().serialize_cdr(typestore().types["std_msgs/msg/String"](data=content), "std_msgs/msg/String")
    )


def contents(bag: Path) -> list[tuple[str, int, Any]]:
    with open_bag(bag) as opened:
        return [(m.topic, m.log_ns, decode(m).data if m.topic == "/text" else m.data) for m in opened.messages()]


def test_every_message_is_kept_with_its_time(tmp_path: Path) -> None:
    writer = BagWriter(tmp_path / "bag", TOPICS)
    writer.write("/text", 10, text("first"))
    writer.write("/image", 20, SERIALIZED_IMAGE)
    writer.add_topic("/late", "std_msgs/msg/String")
    writer.write("/late", 30, text("late") + b"\0\0\0\0")  # as rclpy writes it
    writer.close()
    first, image, (topic, time_ns, late) = contents(tmp_path / "bag")
    assert first == ("/text", 10, "first") and image == ("/image", 20, SERIALIZED_IMAGE)
    assert (topic, time_ns, late) == ("/late", 30, text("late") + b"\0\0\0\0")
    metadata = (tmp_path / "bag" / "metadata.yaml").read_text()
    assert "storage_identifier: mcap" in metadata and "/late" in metadata


def test_images_are_compressed_without_loss(tmp_path: Path) -> None:
    writer = BagWriter(tmp_path / "bag", TOPICS)
    for k in range(20):
        writer.write("/image", k, SERIALIZED_IMAGE)
    writer.close()
    assert [data for _, _, data in contents(tmp_path / "bag")] == [SERIALIZED_IMAGE] * 20
    assert (tmp_path / "bag" / "bag.mcap").stat().st_size < len(SERIALIZED_IMAGE)


def test_recording_over_an_old_bag_is_refused(tmp_path: Path) -> None:
    BagWriter(tmp_path / "bag", TOPICS).close()
    with pytest.raises(ConfigurationError, match="exists already; remove it or choose another --out"):
        BagWriter(tmp_path / "bag", TOPICS)


def test_a_folder_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"file/bag cannot be created: .*Not a directory"):
        BagWriter(tmp_path / "file" / "bag", TOPICS)


def so_far(bag: Path) -> list[tuple[str, int, Any]]:
    """The contents of a bag that is being written: its first bytes may not be there yet."""
    try:
        return contents(bag)
    except ConfigurationError:
        return []


def test_a_single_small_message_does_not_wait_for_others(tmp_path: Path) -> None:
    writer = BagWriter(tmp_path / "bag", TOPICS)
    writer.write("/text", 1, text("alone"))
    until(lambda: so_far(tmp_path / "bag") == [("/text", 1, "alone")])
    writer.close()
    assert contents(tmp_path / "bag") == [("/text", 1, "alone")]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Simulates a full disk: no file grows beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_reported_at_once_and_what_was_written_stays(tmp_path: Path) -> None:
    warnings: list[str] = []
    writer = BagWriter(tmp_path / "bag", TOPICS, warnings.append)
    writer.write("/text", 1, text("before"))
    until(lambda: contents(tmp_path / "bag"))
    noise = np.random.default_rng(0)
    with largest_file(100_000):
        writer.write("/image", 2, b"\0\1\0\0" + noise.bytes(300_000))
        until(lambda: writer.failure)
        writer.write("/text", 3, text("after"))
        with pytest.raises(KiVlaError, match=r"recording to .*bag failed: .*too large; is the disk full\?"):
            writer.close()
    assert warnings == [str(w) for w in warnings if "failed" in w] != []
    assert contents(tmp_path / "bag") == [("/text", 1, "before")]


def test_messages_beyond_the_backlog_are_dropped_and_counted(tmp_path: Path) -> None:
    warnings: list[str] = []
    writer = BagWriter(tmp_path / "bag", TOPICS, warnings.append, largest_backlog=250_000)
    with writer._writing:  # a disk that hangs
        for k in range(6):
            writer.write("/image", k, SERIALIZED_IMAGE)
    writer.close()
    kept = [time_ns for _, time_ns, _ in contents(tmp_path / "bag")]
    assert kept[:2] == [0, 1] and 2 <= len(kept) <= 3
    assert warnings == [f"recording: messages were dropped, the disk is too slow: {6 - len(kept)} of /image"]
    assert "bag writer" not in {thread.name for thread in threading.enumerate()}
