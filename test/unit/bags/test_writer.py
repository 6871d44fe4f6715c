"""The writer's bags, also when the disk is full or too slow; bags/bag.py reads them back."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.disks import largest_file
from support.waiting import until

from ki_vla_ros.bags.bag import open_bag
from ki_vla_ros.bags.writer import BagFile, BagWriter, typestore
from ki_vla_ros.errors import ConfigurationError, InputError, KiVlaError
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


def test_a_topic_without_a_message_is_no_fault(tmp_path: Path) -> None:
    """Its channel is in the file's statistics, which count no message on it."""
    writer = BagWriter(tmp_path / "bag", TOPICS)
    writer.write("/text", 10, text("only"))
    writer.close()
    with open_bag(tmp_path / "bag") as bag:
        assert [message.topic for message in bag.messages()] == ["/text"]
        assert bag.topics["/image"].count == 0 and bag.faults == []


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


FULL = r"bag .*/(bag|full) cannot be written: File too large; what was written until then can be read; make room"
NOISE = b"\0\1\0\0" + np.random.default_rng(0).bytes(300_000)


def test_a_full_disk_is_reported_at_once_and_what_was_written_stays(tmp_path: Path) -> None:
    warnings: list[str] = []
    writer = BagWriter(tmp_path / "bag", TOPICS, warnings.append)
    writer.write("/text", 1, text("before"))
    until(lambda: contents(tmp_path / "bag"))
    with largest_file(100_000):
        writer.write("/image", 2, NOISE)
        until(lambda: writer.failure)
        writer.write("/text", 3, text("after"))
        with pytest.raises(KiVlaError, match=FULL):
            writer.close()
    assert warnings == []  # whoever records says it once
    assert contents(tmp_path / "bag") == [("/text", 1, "before")]


def test_whatever_ends_the_writing_thread_is_reported(tmp_path: Path) -> None:
    """Not only what the operating system refuses: a time before 1970 is no number that the format has."""
    writer = BagWriter(tmp_path / "bag", TOPICS)
    writer.write("/text", 1, text("before"))
    writer.write("/text", -1, text("impossible"))
    until(lambda: writer.failure)
    with pytest.raises(KiVlaError, match=r"cannot be written: .*; what was written until then can be read"):
        writer.close()


def test_a_warning_that_cannot_be_given_does_not_hide_that_messages_are_missing(tmp_path: Path) -> None:
    def warn(_: str) -> None:
        raise RuntimeError("no logger any more")

    writer = BagWriter(tmp_path / "bag", TOPICS, warn, largest_backlog=10)
    writer.write("/image", 1, SERIALIZED_IMAGE)  # dropped
    with pytest.raises(KiVlaError, match=r"recording ended: .*no logger any more"):
        writer.close()


def test_a_bag_that_is_deleted_while_it_is_written_is_reported(tmp_path: Path) -> None:
    writer = BagWriter(tmp_path / "bag", TOPICS)
    writer.write("/text", 1, text("lost"))
    shutil.rmtree(tmp_path / "bag")
    until(lambda: writer.failure)
    with pytest.raises(KiVlaError, match="bag cannot be written: it was deleted meanwhile"):
        writer.close()


def test_a_bag_file_keeps_what_was_written_before_an_error(tmp_path: Path) -> None:
    with largest_file(2_000_000), pytest.raises(KiVlaError, match=FULL), BagFile(tmp_path / "full") as bag:
        for k in range(20):
            bag.write("/image", TOPICS["/image"], k, NOISE)
    kept = contents(tmp_path / "full")
    assert 4 <= len(kept) < 20 and kept == [("/image", k, NOISE) for k in range(len(kept))]
    with pytest.raises(InputError, match="broken"), BagFile(tmp_path / "ended") as bag:
        bag.write("/text", TOPICS["/text"], 1, text("before"))
        raise InputError("broken")
    assert contents(tmp_path / "ended") == [("/text", 1, "before")]
    with open_bag(tmp_path / "ended") as opened:
        assert "metadata.yaml: is missing (the recorder did not close the bag)" in str(opened.faults[0])


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
