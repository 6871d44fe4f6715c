"""Writes the demo's topics into an mcap rosbag2, in a thread that never holds up who delivers the messages.

Messages come in serialised and are written as they are. Only images are changed: two raw cameras of 288 pixels at 20 Hz
would fill 10 MB per second, so they are recorded as JPEG under `<topic>/compressed`, as image_transport names it.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any, Final

import cv2
import numpy as np
from rosbags.rosbag2 import Reader, StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from ki_vla_ros.errors import ConfigurationError, KiVlaError

JPEG_QUALITY: Final = 90
IMAGE_TYPE: Final = "sensor_msgs/msg/Image"
JPEG_TYPE: Final = "sensor_msgs/msg/CompressedImage"
TYPESTORE: Final = get_typestore(Stores.ROS2_JAZZY)


@dataclass(frozen=True, slots=True)
class Recorded:
    """One message of the bag: `time_ns` when it was received, `message` deserialised."""

    topic: str
    time_ns: int
    message: Any


class Recorder:
    """`record` may be called from any thread until `close`."""

    def __init__(self, folder: Path, topics: Mapping[str, str]) -> None:
        """`topics`: message type by topic. `folder` must not exist yet."""
        if folder.exists():
            raise ConfigurationError(f"recording: {folder} exists already; remove it or choose another --out")
        self._queue: Queue[tuple[str, int, bytes] | None] = Queue()
        self._failure: Exception | None = None
        self._writer = Writer(folder, version=Writer.VERSION_LATEST, storage_plugin=StoragePlugin.MCAP)
        self._writer.open()
        self._connections = {}
        for topic, kind in topics.items():
            name, kind = (f"{topic}/compressed", JPEG_TYPE) if kind == IMAGE_TYPE else (topic, kind)
            self._connections[topic] = self._writer.add_connection(name, kind, typestore=TYPESTORE)
        self._thread = threading.Thread(target=self._write, name="recorder")
        self._thread.start()

    def record(self, topic: str, time_ns: int, serialised: bytes) -> None:
        """Keeps a message received at `time_ns`."""
        self._queue.put((topic, time_ns, serialised))

    def close(self) -> None:
        """Writes what is still queued and the bag's index; raises KiVlaError if writing had failed."""
        self._queue.put(None)
        self._thread.join()
        self._writer.close()
        if self._failure is not None:
            raise KiVlaError(f"recording to {self._writer.path} failed: {self._failure}; is the disk full?")

    def _write(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._failure is not None:
                continue
            try:
                topic, time_ns, serialised = item
                connection = self._connections[topic]
                data = compress(serialised) if connection.msgtype == JPEG_TYPE else serialised
                self._writer.write(connection, time_ns, data)
            except Exception as error:  # close() reports it
                self._failure = error


def compress(serialised: bytes) -> bytes:
    """A serialised rgb8 Image -> a serialised CompressedImage (JPEG) with the same header."""
    image = TYPESTORE.deserialize_cdr(serialised, IMAGE_TYPE)
    rgb_HWC = np.frombuffer(image.data, dtype=np.uint8).reshape(image.height, image.width, 3)  # type: ignore[attr-defined]
    _, jpeg = cv2.imencode(".jpg", cv2.cvtColor(rgb_HWC, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    kind = TYPESTORE.types[JPEG_TYPE]
    message = kind(header=image.header, format="rgb8; jpeg compressed bgr8", data=jpeg.ravel())  # type: ignore[attr-defined]
    return bytes(TYPESTORE.serialize_cdr(message, JPEG_TYPE))


@contextmanager
def open_bag(folder: Path, topics: Collection[str]) -> Iterator[Iterator[Recorded]]:
    """The messages on `topics` in the order they were received."""
    with Reader(folder) as reader:
        connections = [connection for connection in reader.connections if connection.topic in topics]
        yield (
            Recorded(connection.topic, time_ns, TYPESTORE.deserialize_cdr(data, connection.msgtype))
            for connection, time_ns, data in reader.messages(connections)
        )
