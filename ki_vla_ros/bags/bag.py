"""Reads rosbag2 recordings without ROS: sqlite3 and mcap, files and folders, compressed or not, whole or damaged.

    with open_bag(path) as bag:
        for message in bag.messages(["/joint_states"]):
            reading = joint_reading(message)
        for fault in bag.faults:
            print(fault)

Whatever can be read comes in the order of log time and in bounded memory. Whatever cannot is listed in `faults`, which
grows while reading.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from types import TracebackType

from zstandard import ZstdDecompressor, ZstdError, frame_content_size

from ki_vla_ros.bags.mcap import LARGEST_CHUNK, McapFile
from ki_vla_ros.bags.sqlite import SqliteFile
from ki_vla_ros.bags.storage import BagFault, Faults, Piece, Storage, Topic, in_time_order
from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.files import check_file, open_file, read_text
from ki_vla_ros.messages import BagMessage
from ki_vla_ros.share import expand
from ki_vla_ros.yaml_file import LARGEST_YAML, parse_yaml

METADATA = "metadata.yaml"
STORAGES: Mapping[str, Callable[[Path, Faults, str], Storage]] = {".mcap": McapFile, ".db3": SqliteFile}
# The first bytes of a zstd frame; CDR begins with a zero byte.
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
# Read of a compressed file at a time: zstd makes at most 128 MiB of so much.
BLOCK = 4096
# A file that was compressed as a whole may become so many times larger, or this large if that is more.
MOST_RATIO, LARGEST_UNPACKED = 100, 1 << 28


class Bag:
    """An open bag.

    `start_ns` and `end_ns`: log times of the first and last message, as far as the files say; None: there is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._faults = Faults()
        self._folder = tempfile.TemporaryDirectory(prefix="bag")
        self._storages: list[Storage] = []
        try:
            announced = self._open_files()
        except BaseException:
            self.close()
            raise
        self.topics = self._merge_topics(announced)
        self.start_ns = min((s.start_ns for s in self._storages if s.start_ns is not None), default=None)
        self.end_ns = max((s.end_ns for s in self._storages if s.end_ns is not None), default=None)

    @property
    def faults(self) -> list[BagFault]:
        return self._faults.found

    def has_messages(self, topic: str) -> bool:
        """Whether there are any on `topic`: recorders note topics on which nothing came, too."""
        if topic not in self.topics:
            return False
        count = self.topics[topic].count
        return next(iter(self.messages({topic})), None) is not None if count is None else count > 0

    def messages(self, topics: Collection[str] | None = None) -> Iterator[BagMessage]:
        """The messages on `topics` (default: all) in the order of log time; may be called again for the same result."""
        parts = [
            Piece(storage.start_ns, partial(storage.messages, topics))
            for storage in self._storages
            if storage.start_ns is not None
        ]
        last_ns = 0
        for log_ns, read in in_time_order(parts):
            message = read()
            if message is not None and message.data[:4] == ZSTD_MAGIC:
                message = self._decompressed(message)
            if message is None:
                continue
            if log_ns < last_ns:
                # Happens only where a chunk's header is wrong about its times. The caller is promised the order.
                self._faults.add(
                    "damaged", message.topic, "messages outside the times in their chunk's header are left out"
                )
                continue
            last_ns = log_ns
            yield message

    def close(self) -> None:
        for storage in self._storages:
            storage.close()
        self._folder.cleanup()

    def __enter__(self) -> Bag:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        self.close()

    # --- files

    def _open_files(self) -> Mapping[str, str]:
        """Opens all files; returns the message type by topic, as the metadata announces them."""
        if self.path.is_dir():
            files, announced = self._files_of_folder()
        else:
            files, announced = [self.path], {}
            if _storage_suffix(self.path) is None:
                raise ConfigurationError(
                    f"bag {self.path}: expected a folder or a file .mcap, .db3, .mcap.zstd or .db3.zstd"
                )
        for file in files:
            suffix = _storage_suffix(file)
            if suffix is None:
                self._faults.add("file", file.name, "is neither .mcap nor .db3 and is left out")
                continue
            try:
                whole = self._unpacked(file) if file.suffix == ".zstd" else file
                self._storages.append(STORAGES[suffix](whole, self._faults, file.name))
            except OSError as error:
                self._faults.add("file", file.name, f"cannot be opened: {error.strerror or error}")
        return announced

    def _files_of_folder(self) -> tuple[list[Path], dict[str, str]]:
        there = sorted(file for file in self.path.iterdir() if _storage_suffix(file))
        metadata = self._metadata()
        if metadata is None:
            if not there:
                raise ConfigurationError(f"bag {self.path}: expected {METADATA} or files .mcap or .db3 in it, got none")
            for file in there:
                if file.suffix == ".zstd" and file.with_suffix("") in there:
                    told = "is there without compression as well and is left out (the recorder did not finish it)"
                    self._faults.add("file", file.name, told)
            return [file for file in there if not (file.suffix == ".zstd" and file.with_suffix("") in there)], {}
        files, announced = metadata
        listed = list(dict.fromkeys(self.path / PurePosixPath(file).name for file in files))
        if len(listed) < len(files):
            self._faults.add("metadata", METADATA, "lists a file more than once; it is read once")
        for file in listed:
            if not file.is_file():
                self._faults.add("file", file.name, f"is listed in {METADATA}, but is not there")
        for file in there:
            if file not in listed:
                self._faults.add("file", file.name, f"is not listed in {METADATA} and is left out; open it by itself")
        return [file for file in listed if file.is_file()], announced

    def _metadata(self) -> tuple[list[str], dict[str, str]] | None:
        path = self.path / METADATA
        try:
            information = parse_yaml(read_text(path, LARGEST_YAML))["rosbag2_bagfile_information"]
            files = [str(file) for file in information["relative_file_paths"]]
            topics = [topic["topic_metadata"] for topic in information["topics_with_message_count"]]
            announced = {str(topic["name"]): str(topic["type"]) for topic in topics}
        except FileNotFoundError:
            self._faults.add(
                "metadata", METADATA, "is missing (the recorder did not close the bag); all files are read"
            )
            return None
        except (OSError, KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:120]
            self._faults.add("metadata", METADATA, f"cannot be read, all files of the folder are: {reason}")
            return None
        return files, announced

    def _unpacked(self, file: Path) -> Path:
        """Decompresses a file that was compressed as a whole, as far as possible, into a temporary folder."""
        whole = Path(self._folder.name, file.stem)
        decompressor = ZstdDecompressor().decompressobj()
        largest = max(LARGEST_UNPACKED, MOST_RATIO * check_file(file))
        with open_file(file) as packed, whole.open("wb") as out:
            try:
                while not decompressor.eof:
                    if out.tell() > largest:
                        self._faults.add(
                            "damaged",
                            file.name,
                            f"is more than {largest} bytes when decompressed; its beginning is read",
                        )
                        break
                    if not (block := packed.read(BLOCK)):
                        self._faults.add(
                            "truncated", file.name, "the compressed file ends too early; its beginning is read"
                        )
                        break
                    out.write(decompressor.decompress(block))
            except ZstdError as error:
                self._faults.add("damaged", file.name, f"can be decompressed in part only: {error}")
        return whole

    def _merge_topics(self, announced: Mapping[str, str]) -> dict[str, Topic]:
        merged = {name: Topic(name, kind, 0) for name, kind in announced.items()}
        seen: dict[str, str] = {}
        for storage in self._storages:
            for name, topic in storage.topics.items():
                before = merged.get(name)
                if before is not None and name not in seen and before.type != topic.type:
                    told = f"has messages of {topic.type}, not of {before.type} as {METADATA} says"
                    self._faults.add("type", name, told)
                if seen.setdefault(name, topic.type) != topic.type:
                    self._faults.add("type", name, f"has messages of {seen[name]} and of {topic.type}")
                count = None if topic.count is None else topic.count + ((before.count or 0) if before else 0)
                merged[name] = Topic(name, seen[name], count)
        return merged

    def _decompressed(self, message: BagMessage) -> BagMessage | None:
        """The decompressed message, for a bag recorded with compression by message; None, and a fault, if damaged."""
        try:
            if frame_content_size(message.data) > LARGEST_CHUNK:  # -1: it does not say
                raise ZstdError("it is larger than any message")
            data = ZstdDecompressor().decompress(message.data, max_output_size=LARGEST_CHUNK)
        except (ZstdError, MemoryError) as error:
            where = f"{message.topic} at {message.log_ns}"
            self._faults.add("message", where, f"cannot be decompressed and is left out: {error}")
            return None
        return BagMessage(message.topic, message.type, message.log_ns, data)


def open_bag(path: str | Path) -> Bag:
    """Opens the bag at `path`; a damaged one opens too, and lists the damage in its `faults`.

    ConfigurationError if there is no bag at `path` or it cannot be opened.
    """
    path = expand(path)
    if not path.exists():
        raise ConfigurationError(f"bag {path}: no such file or folder")
    try:
        return Bag(path)
    except OSError as error:
        raise ConfigurationError(f"bag {path}: cannot be opened: {error}") from error


def _storage_suffix(file: Path) -> str | None:
    suffix = Path(file.stem).suffix if file.suffix == ".zstd" else file.suffix
    return suffix if suffix in STORAGES else None
