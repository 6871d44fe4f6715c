"""Writes messages into an mcap rosbag2, in a thread, so that `write` never waits for the disk.

Messages come in serialised and are written unchanged, in chunks compressed with zstd. Once a second everything goes to
the disk, so a power failure or a killed process loses at most about one second. Such a bag has neither index nor
metadata.yaml; bags/bag.py reads it.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import Empty, Queue
from typing import Final

from rosbags.interfaces import Connection
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from rosbags.rosbag2.storage_mcap import McapWriter

from ki_vla_ros.errors import ConfigurationError, KiVlaError
from ki_vla_ros.messages import typestore

FLUSH_PERIOD_S: Final = 1.0
# Bytes that may wait in memory for the disk, which is seconds of several cameras; beyond, messages are dropped and
# counted.
LARGEST_BACKLOG: Final = 256 * 1024 * 1024


class BagWriter:
    """A bag being written; `write` and `add_topic` may be called from any thread until `close`."""

    def __init__(
        self,
        folder: Path,
        topics: Mapping[str, str],
        warn: Callable[[str], None] = lambda _: None,
        largest_backlog: int = LARGEST_BACKLOG,
    ) -> None:
        """`topics`: message type by topic. `warn` is called by the writing thread.

        ConfigurationError if `folder` exists already or cannot be created.
        """
        if folder.exists():
            raise ConfigurationError(f"recording: {folder} exists already; remove it or choose another --out")
        self.failure: Exception | None = None
        self._queue: Queue[tuple[Connection, int, bytes] | None] = Queue()
        self._backlog, self._largest_backlog = 0, largest_backlog
        self._dropped: Counter[str] = Counter()
        self._counting, self._writing = threading.Lock(), threading.Lock()
        self._warn = warn
        self._writer = Writer(folder, version=Writer.VERSION_LATEST, storage_plugin=StoragePlugin.MCAP)
        self._writer.set_compression(CompressionMode.STORAGE, CompressionFormat.ZSTD)
        try:
            self._writer.open()
        except OSError as error:
            raise ConfigurationError(f"recording: {folder} cannot be created: {error}; choose another --out") from error
        self._connections: dict[str, Connection] = {}
        for topic, kind in topics.items():
            self.add_topic(topic, kind)
        self._thread = threading.Thread(target=self._run, name="bag writer")
        self._thread.start()

    def add_topic(self, topic: str, kind: str) -> None:
        with self._writing:
            self._connections[topic] = self._writer.add_connection(topic, kind, typestore=typestore())

    def write(self, topic: str, time_ns: int, serialised: bytes) -> None:
        """Queues a message received at `time_ns`; drops and counts it if the backlog is full."""
        connection = self._connections[topic]
        with self._counting:
            if self._backlog + len(serialised) > self._largest_backlog:
                self._dropped[topic] += 1
                return
            self._backlog += len(serialised)
        self._queue.put((connection, time_ns, serialised))

    def close(self) -> None:
        """Writes what is still queued, then the bag's index; KiVlaError if writing fails or has failed before."""
        self._queue.put(None)
        self._thread.join()
        if self.failure is None:
            try:
                self._writer.close()
            except OSError as error:
                self.failure = error
        if self.failure is not None:
            self._writer.abort()  # what was written before can be read
            raise KiVlaError(f"recording to {self._writer.path} failed: {self.failure}; is the disk full?")

    def _run(self) -> None:
        flush_s = time.monotonic() + FLUSH_PERIOD_S
        while True:
            try:
                item = self._queue.get(timeout=max(0.0, flush_s - time.monotonic()))
                if item is None:
                    self._report_dropped()
                    return
                self._write(*item)
            except Empty:
                pass
            if time.monotonic() >= flush_s:
                self._flush()
                self._report_dropped()
                flush_s = time.monotonic() + FLUSH_PERIOD_S

    def _write(self, connection: Connection, time_ns: int, serialised: bytes) -> None:
        with self._counting:
            self._backlog -= len(serialised)
        if self.failure is not None:
            return
        try:
            with self._writing:
                self._writer.write(connection, time_ns, serialised)
        except OSError as error:  # close() reports it
            self._fail(error)

    def _flush(self) -> None:
        """Ends the chunk, whatever its size, and syncs it to the disk."""
        storage = self._writer.storage
        assert isinstance(storage, McapWriter)
        if self.failure is not None:
            return
        try:
            with self._writing:
                if storage.chunk.bio.tell():
                    storage.close_chunk()
                storage.bio.flush()
            os.fsync(storage.bio.fileno())
        except OSError as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.failure = error
        self._warn(f"recording to {self._writer.path} failed: {error}")

    def _report_dropped(self) -> None:
        with self._counting:
            dropped, self._dropped = self._dropped, Counter()
        if dropped:
            lost = ", ".join(f"{count} of {topic}" for topic, count in dropped.items())
            self._warn(f"recording: messages were dropped, the disk is too slow: {lost}")
