"""Writes mcap rosbag2s: `BagFile` in the caller's thread, `BagWriter` in its own, so that nothing waits for the disk.

Messages come in serialised and are written unchanged. Once a second a `BagWriter` puts everything on the disk, so a
power failure or a killed process loses at most about one second. Such a bag, and one whose disk was full, has neither
index nor metadata.yaml; bags/bag.py reads it.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, Queue
from types import TracebackType
from typing import Final, NoReturn

from rosbags.interfaces import Connection
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer, WriterError
from rosbags.rosbag2.storage_mcap import McapWriter

from ki_vla_ros.errors import ConfigurationError, KiVlaError, cannot_write
from ki_vla_ros.messages import typestore

FLUSH_PERIOD_S: Final = 1.0
# Bytes that may wait in memory for the disk, which is seconds of several cameras; beyond, messages are dropped and
# counted.
LARGEST_BACKLOG: Final = 256 * 1024 * 1024


class BagFile:
    """A bag being written. Where that fails there is a KiVlaError, and what was written until then can be read.

    As a context manager it is closed with its index, or, after an exception, without one: a reader then says so.
    """

    def __init__(self, folder: Path, compress: bool = False) -> None:
        """ConfigurationError if `folder` exists already or cannot be created."""
        if folder.exists():
            raise ConfigurationError(f"bag {folder} exists already; remove it or choose another --out")
        self.folder = folder
        self.failure: BaseException | None = None
        self._connections: dict[tuple[str, str], Connection] = {}
        self._writer = Writer(folder, version=Writer.VERSION_LATEST, storage_plugin=StoragePlugin.MCAP)
        if compress:
            self._writer.set_compression(CompressionMode.STORAGE, CompressionFormat.ZSTD)
        try:
            self._writer.open()
        except (OSError, WriterError) as error:
            with suppress(OSError):
                folder.rmdir()  # made, but the file in it could not be
            raise ConfigurationError(f"bag {folder} cannot be created: {error}; choose another --out") from error

    def write(self, topic: str, kind: str, log_ns: int, serialised: bytes) -> None:
        with self._trying():
            self._writer.write(self._connect(topic, kind), log_ns, serialised)

    def add_topic(self, topic: str, kind: str) -> None:
        """Names a topic in the bag, whether or not a message of it comes."""
        with self._trying():
            self._connect(topic, kind)

    def flush(self) -> None:
        """Ends the chunk, whatever its size, and puts it on the disk."""
        with self._trying():
            storage = self._storage()
            if storage.chunk.bio.tell():
                storage.close_chunk()
            storage.bio.flush()
            os.fsync(storage.bio.fileno())
            if os.fstat(storage.bio.fileno()).st_nlink == 0:
                raise FileNotFoundError(0, "it was deleted meanwhile")

    def close(self) -> None:
        """Writes what is left, the index and metadata.yaml; raises the error again with which writing failed."""
        with self._trying():
            self._writer.close()

    def abandon(self) -> None:
        """Closes the file as far as it was written."""
        with suppress(Exception):
            if self.failure is None:  # or a part of the chunk may be in the file, and the whole one would follow it
                self._storage().close_chunk()
        with suppress(Exception):
            self._writer.abort()

    def __enter__(self) -> BagFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def _storage(self) -> McapWriter:
        storage = self._writer.storage
        assert isinstance(storage, McapWriter)
        return storage

    def _connect(self, topic: str, kind: str) -> Connection:
        if (topic, kind) not in self._connections:
            self._connections[topic, kind] = self._writer.add_connection(topic, kind, typestore=typestore())
        return self._connections[topic, kind]

    @contextmanager
    def _trying(self) -> Iterator[None]:
        if self.failure is not None:
            raise self.failure
        try:
            yield
        except Exception as error:  # whatever it is, what comes after would not be in the bag
            left = "what was written until then can be read"
            self._fail(KiVlaError(f"bag {cannot_write(self.folder, error, left)}"), error)
        except BaseException as interrupt:
            self._fail(interrupt, None)

    def _fail(self, failure: BaseException, cause: BaseException | None) -> NoReturn:
        self.failure = failure
        self.abandon()
        raise failure from cause


class BagWriter:
    """A bag being written in a thread; `write` and `add_topic` may be called from any thread until `close`."""

    def __init__(
        self,
        folder: Path,
        topics: Mapping[str, str],
        warn: Callable[[str], None] = lambda _: None,
        largest_backlog: int = LARGEST_BACKLOG,
    ) -> None:
        """`topics`: message type by topic. `warn` is called by the writing thread where messages are dropped.

        ConfigurationError if `folder` exists already or cannot be created.
        """
        self.failure: Exception | None = None
        self._queue: Queue[tuple[str, int, bytes] | None] = Queue()
        self._backlog, self._largest_backlog = 0, largest_backlog
        self._dropped: Counter[str] = Counter()
        self._counting, self._writing = threading.Lock(), threading.Lock()
        self._warn = warn
        self._file = BagFile(folder, compress=True)
        self._types: dict[str, str] = {}
        for topic, kind in topics.items():
            self.add_topic(topic, kind)
        self._thread = threading.Thread(target=self._run, name="bag writer")
        self._thread.start()

    def add_topic(self, topic: str, kind: str) -> None:
        with self._writing:
            self._types[topic] = kind
            self._file.add_topic(topic, kind)

    def write(self, topic: str, time_ns: int, serialised: bytes) -> None:
        """Queues a message received at `time_ns`; drops and counts it if the backlog is full."""
        with self._counting:
            if self._backlog + len(serialised) > self._largest_backlog:
                self._dropped[topic] += 1
                return
            self._backlog += len(serialised)
        self._queue.put((topic, time_ns, serialised))

    def close(self) -> None:
        """Writes what is still queued, then the bag's index; KiVlaError if writing fails or has failed before."""
        self._queue.put(None)
        self._thread.join()
        if self.failure is not None:
            self._file.abandon()
            raise self.failure
        self._file.close()

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:  # whatever it is, `close` and the recorder must say that messages are missing
            self.failure = error if isinstance(error, KiVlaError) else KiVlaError(f"recording ended: {error!r}")

    def _work(self) -> None:
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
                with self._writing:
                    self._file.flush()
                self._report_dropped()
                flush_s = time.monotonic() + FLUSH_PERIOD_S

    def _write(self, topic: str, time_ns: int, serialised: bytes) -> None:
        with self._counting:
            self._backlog -= len(serialised)
        with self._writing:
            self._file.write(topic, self._types[topic], time_ns, serialised)

    def _report_dropped(self) -> None:
        with self._counting:
            dropped, self._dropped = self._dropped, Counter()
        if dropped:
            lost = ", ".join(f"{count} of {topic}" for topic, count in dropped.items())
            self._warn(f"recording: messages were dropped, the disk is too slow: {lost}")
