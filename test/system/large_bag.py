"""Writes a synthetic recording of any size, and measures reading it.

    PYTHONPATH=test python -m system.large_bag write out/large --gigabytes 5 [--storage sqlite3] [--cut]
    PYTHONPATH=test python -m system.large_bag read out/large

It has the demo robot's two cameras at 640 x 480 and 30 Hz as raw noise (which does not compress), and joint states at
200 Hz.
`--cut`: the last part is missing, and so are the index and metadata.yaml, as after a power loss.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections import Counter
from pathlib import Path

import numpy as np
from rosbags.rosbag2 import StoragePlugin, Writer
from support.sample_bags import (
    CAMERAS,
    INSTRUCTION_TOPIC,
    JOINT_STATE,
    JOINT_TOPIC,
    START_NS,
    STRING,
    joint_state,
    text,
    where,
)

from ki_vla_ros.bags.bag import open_bag
from ki_vla_ros.messages.decoding import camera_frame, joint_reading, typestore
from ki_vla_ros.messages.type_names import IMAGE
from ki_vla_ros.records import NS_PER_S

WIDTH, HEIGHT, FPS, JOINT_HZ = 640, 480, 30, 200


def write(folder: Path, gigabytes: float, storage: str, cut: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, HEIGHT * WIDTH * 3, dtype=np.uint8)
    plugin = StoragePlugin.MCAP if storage == "mcap" else StoragePlugin.SQLITE3
    kinds = {f"/camera/{name}/image_raw": IMAGE for name in CAMERAS} | {
        JOINT_TOPIC: JOINT_STATE,
        INSTRUCTION_TOPIC: STRING,
    }
    types, fields = typestore().types, {"encoding": "rgb8", "is_bigendian": 0, "step": 3 * WIDTH}
    with Writer(folder, version=9, storage_plugin=plugin) as writer:
        topics = {topic: writer.add_connection(topic, kind, typestore=typestore()) for topic, kind in kinds.items()}
        writer.write(topics[INSTRUCTION_TOPIC], START_NS, text("touch the red cube"))
        for k in range(round(gigabytes * 1e9 / (pixels.size * len(CAMERAS)))):
            time_ns = START_NS + k * NS_PER_S // FPS
            stamp = types["builtin_interfaces/msg/Time"](sec=time_ns // NS_PER_S, nanosec=time_ns % NS_PER_S)
            header = types["std_msgs/msg/Header"](stamp=stamp, frame_id="")
            image = types[IMAGE](header=header, height=HEIGHT, width=WIDTH, data=pixels, **fields)
            data = typestore().serialize_cdr(image, IMAGE)
            for name in CAMERAS:
                writer.write(topics[f"/camera/{name}/image_raw"], time_ns, data)
            for j in range(k * JOINT_HZ // FPS, (k + 1) * JOINT_HZ // FPS):
                at_ns = START_NS + j * NS_PER_S // JOINT_HZ
                writer.write(topics[JOINT_TOPIC], at_ns, joint_state(at_ns, where(j / JOINT_HZ)))
    if cut:
        (folder / "metadata.yaml").unlink()
        path = next(file for file in folder.iterdir())
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size * 9 // 10)


def read(folder: Path) -> None:
    began_s = time.monotonic()
    counts: Counter[str] = Counter()
    with open_bag(folder) as bag:
        opened_s = time.monotonic() - began_s
        for message in bag.messages():
            counts[message.topic] += 1
            if message.type == IMAGE:
                camera_frame(message, "camera")
            elif message.topic == JOINT_TOPIC:
                joint_reading(message)
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{size / 1e9:.2f} GB, {counts.total()} messages, {(bag.end_ns - bag.start_ns) / 1e9:.0f} s of recording")
        print(f"opened after {opened_s:.2f} s, read and decoded after {time.monotonic() - began_s:.1f} s")
        print(f"largest resident memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
        print(*bag.faults, sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("write", "read"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--storage", choices=("mcap", "sqlite3"), default="mcap")
    parser.add_argument("--cut", action="store_true")
    given = parser.parse_args()
    if given.command == "write":
        write(given.folder, given.gigabytes, given.storage, given.cut)
    else:
        read(given.folder)


if __name__ == "__main__":
    main()
