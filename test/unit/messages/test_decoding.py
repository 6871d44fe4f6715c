"""What is read from serialized messages before anything else: their stamps."""

from __future__ import annotations

import struct

import pytest

from ki_vla_ros.errors import InputError, cause_of
from ki_vla_ros.messages import IMAGE, BagMessage, decode, read_image, read_stamp_ns


@pytest.mark.parametrize("nanosec", [1_000_000_000, 2**32 - 1])
def test_a_stamp_that_no_clock_gives_is_refused(nanosec: int) -> None:
    """Its nanoseconds would move it by up to four seconds."""
    header = b"\0\1\0\0" + struct.pack("<iII4x", 5, nanosec, 1)
    body = struct.pack("<IIIx3xB3xII", 1, 1, 1, 0, 0, 0)
    for read in (lambda: read_stamp_ns(BagMessage("/i", IMAGE, 0, header)), lambda: read_image("i", header + body)):
        with pytest.raises(InputError, match=f"stamp: expected nanosec below 1000000000, got {nanosec}"):
            read()


def test_damaged_messages_of_a_topic_are_counted_together() -> None:
    causes = set()
    for n, data in enumerate((b"", b"\0\1\0\0", b"x" * 20)):
        with pytest.raises(InputError, match=f"{n} ns: expected") as refused:
            decode(BagMessage("/joint_states", "sensor_msgs/msg/JointState", n, data))
        causes.add(cause_of(str(refused.value)))
    assert causes == {"/joint_states"}
