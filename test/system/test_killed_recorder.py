"""A writer that is killed, as by a power cut, leaves a bag with everything it had written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from support import ROOT
from support.waiting import until

from ki_vla_ros.bags.bag import open_bag
from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.messages.decoding import decode

IMAGE, TEXT = b"\0\1\0\0" + bytes(100_000), "std_msgs/msg/String"
RECORD_FOREVER = """
import itertools, sys, time
from pathlib import Path
from ki_vla_ros.bags.writer import BagWriter, typestore

text, image, out = sys.argv[1], bytes.fromhex(sys.argv[2]) + bytes(100_000), Path(sys.argv[3])
types = typestore()
writer = BagWriter(out, {"/image": "sensor_msgs/msg/Image", "/text": text})
for k in itertools.count(1):
    writer.write("/text", k, bytes(types.serialize_cdr(types.types[text](data=str(k)), text)))
    writer.write("/image", k, image)
    time.sleep(0.002)
"""


def contents(bag: Path) -> list[tuple[str, int]]:
    """Topic and time of all complete messages; none while the bag's first bytes are not there yet."""
    try:
        with open_bag(bag) as opened:
            return [(message.topic, message.log_ns) for message in opened.messages()]
    except ConfigurationError:
        return []


def test_a_killed_recorder_leaves_what_it_had_on_the_disk(tmp_path: Path) -> None:
    bag = tmp_path / "bag"
    process = subprocess.Popen(
        [sys.executable, "-c", RECORD_FOREVER, TEXT, IMAGE[:4].hex(), str(bag)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        until(lambda: len(contents(bag)) > 100, "a hundred messages on the disk")
        before = contents(bag)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (bag / "metadata.yaml").exists()
    after = contents(bag)
    assert after[: len(before)] == before
    last = after[-1][1]
    assert [time_ns for topic, time_ns in after if topic == "/text"] == list(range(1, last + 1))
    with open_bag(bag) as opened:
        messages = list(opened.messages())
        assert {int(decode(m).data) == m.log_ns for m in messages if m.topic == "/text"} == {True}
        assert {m.data for m in messages if m.topic == "/image"} == {IMAGE}
