"""The cache of built engines ("plans"): one file per graph, library version and GPU, with a record of what it is.

A plan serves one version of one library on one GPU, so its file name holds all three and the graph's hash. The
record (JSON, the file's name with .json) is written last: a plan without one, or whose bytes it does not describe, was
cut off or damaged and is built again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from ki_vla_ros.bundle import Bundle, read_header
from ki_vla_ros.errors import ConfigurationError, EngineError
from ki_vla_ros.files import open_file, read_json


class PlanKey(BaseModel):
    """What a plan was built from and for; `gpu` is, say, sm89, followed by the product's name for `tensorrt`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    graph: str
    graph_sha256: str
    library: str
    version: str
    gpu: str

    @property
    def file_name(self) -> str:
        parts = (Path(self.graph).stem, self.graph_sha256[:16], self.library, self.version, self.gpu)
        return "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", part) for part in parts) + ".plan"

    @property
    def target(self) -> str:
        """Which software on which GPU can run it, in words."""
        return f"{self.library} {self.version} on {self.gpu}"


class PlanRecord(PlanKey):
    """The key, and what was written."""

    plan_sha256: str
    size: int
    created: str
    build_s: float


def graph_sha256(bundle: Bundle, graph: str) -> str:
    """Hash of a graph and its weight files, made of the manifest's hashes, which `load_bundle` has checked."""
    files = bundle.manifest.files
    digest = hashlib.sha256(files[graph].encode())
    for name in sorted(read_header(bundle.path / graph).external_files):
        digest.update(f"{name} {files[name]}".encode())
    return digest.hexdigest()


def default_folder() -> Path:
    """$XDG_CACHE_HOME/ki_vla_ros/engines, or below ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG rules: a relative path counts as unset.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "ki_vla_ros" / "engines"


@dataclass(frozen=True)
class PlanCache:
    """Plans in `folder`; ConfigurationError if it cannot be made or written to."""

    folder: Path

    def __post_init__(self) -> None:
        try:
            self.folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            check_trusted(self.folder)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise ConfigurationError(
                f"engine cache: expected a folder to write to, got {self.folder} ({error.strerror}); choose another one"
            ) from error

    def path(self, key: PlanKey) -> Path:
        return self.folder / key.file_name

    def read(self, key: PlanKey) -> memoryview | None:
        """The plan, mapped from its file; None if it is missing or damaged.

        EngineError if its record says that it is for something else.
        """
        path = self.path(key)
        try:
            record = self._record(_record_path(path))
            check_trusted(path)
            with open_file(path) as file:
                plan = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (FileNotFoundError, ValueError):  # ValidationError among them, and mmap's for an empty file
            return None
        except OSError as error:
            raise EngineError(
                f"{path}: cannot be trusted: {error.strerror}; delete it, and it is built again"
            ) from error
        got = PlanKey(**record.model_dump(include=set(PlanKey.model_fields)))
        if got != key:
            raise EngineError(
                f"{path}: expected an engine of {key.graph} {key.graph_sha256[:12]} for {key.target}, got one of "
                f"{got.graph} {got.graph_sha256[:12]} for {got.target}; delete it, and the right one is built"
            )
        if len(plan) != record.size or hashlib.sha256(plan).hexdigest() != record.plan_sha256:
            return None
        return plan

    def write(self, record: PlanRecord, plan: memoryview) -> Path:
        """Each file appears whole or not at all; the old record goes first, since it would not fit the new plan."""
        path = self.path(record)
        _record_path(path).unlink(missing_ok=True)
        _write_whole(path, plan)
        _write_whole(_record_path(path), record.model_dump_json(indent=2).encode())
        return path

    def others(self, key: PlanKey) -> list[str]:
        """Other software and GPUs for which this same graph has a plan here."""
        found = set()
        for path in self.folder.glob("*.plan.json"):
            try:
                record = self._record(path)
            except (OSError, ValueError):
                continue
            if (record.graph, record.graph_sha256) == (key.graph, key.graph_sha256) and record.target != key.target:
                found.add(record.target)
        return sorted(found)

    def _record(self, path: Path) -> PlanRecord:
        check_trusted(path)
        return PlanRecord.model_validate(read_json(path))

    def timing_path(self, library: str, version: str, gpu: str) -> Path:
        return self.folder / re.sub(r"[^A-Za-z0-9.]+", "_", f"timing-{library}-{version}-{gpu}.cache")

    def write_timing(self, path: Path, timings: memoryview) -> None:
        _write_whole(path, timings)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One build at a time in this folder: two at once need twice the memory, and disturb each other's timings."""
        with (self.folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def check_trusted(path: Path) -> None:
    """OSError unless only this user (or root) can change the file or folder: whoever can also runs code here.

    An engine is loaded as it is; its record, beside it, vouches for nothing.
    """
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        raise OSError(errno.EPERM, f"expected no symbolic link, got one to {os.readlink(path)}", str(path))
    if found.st_uid not in (0, os.geteuid()):
        raise OSError(errno.EPERM, f"expected it to be yours, got one of user {found.st_uid}", str(path))
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.filemode(found.st_mode)
        raise OSError(errno.EPERM, f"expected it to be writable for you alone (chmod go-w), got {mode}", str(path))


def _record_path(plan: Path) -> Path:
    return plan.with_name(plan.name + ".json")


def _write_whole(path: Path, content: memoryview | bytes) -> None:
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".part-", delete=False) as file:
            try:
                file.write(content)
                file.flush()
                os.fchmod(file.fileno(), 0o644)  # the node may run as another user than the build did
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise ConfigurationError(
            f"{path}: expected to write {len(content) / 1e6:.0f} MB, got {error.strerror}; make room or choose another "
            "engine cache"
        ) from error
