"""LeRobot's dataset format v3.0 as data: which files there are, and what is in them.

Facts from the format's description and its reference implementation (huggingface/lerobot, docs/source/
lerobot-dataset-v3.mdx and src/lerobot/datasets, version 0.6.2 of 2026-08-23):

    meta/info.json                                  `Info`
    meta/stats.json                                 figures of every feature over the whole dataset (statistics.py)
    meta/tasks.parquet                              task_index by task; the task is the table's index
    meta/episodes/chunk-000/file-000.parquet        one row per episode: where its frames are, and its figures
    data/chunk-000/file-000.parquet                 one row per frame, one episode after the other
    videos/KEY/chunk-000/file-000.mp4               the frames of one camera, one episode after the other

Frame i of an episode has timestamp i / fps exactly; the format does not say when it was really taken. We keep that in
an extra feature, `STAMP`, and what a dataset was made from in an extra file, `SOURCE`.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ki_vla_ros.errors import ConfigurationError, short_repr
from ki_vla_ros.files import read_json

VERSION: Final = "v3.0"
CHUNK_FILE: Final = "chunk-{chunk_index:03d}/file-{file_index:03d}"
INFO: Final = "meta/info.json"
STATS: Final = "meta/stats.json"
TASKS: Final = "meta/tasks.parquet"
EPISODES: Final = f"meta/episodes/{CHUNK_FILE}.parquet"
SOURCE: Final = "meta/ki_vla_ros.json"

STATE: Final = "observation.state"
ACTION: Final = "action"
IMAGES: Final = "observation.images."
STAMP: Final = "stamp_ns"  # no "observation." in front: LeRobot's policies take such features as inputs

MIB: Final = 1 << 20
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]


class Feature(BaseModel):
    """One feature. `info` describes a video; the names of a vector's elements may be grouped (by motor, say)."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    dtype: str
    shape: tuple[int, ...]
    names: list[str] | dict[str, Any] | None = None
    info: dict[str, Any] | None = None

    @property
    def element_names(self) -> tuple[str, ...]:
        """The names in order, grouped or not."""
        if isinstance(self.names, dict):
            groups = [group for group in self.names.values() if isinstance(group, list)]
            return tuple(str(name) for group in groups for name in group)
        return tuple(self.names or ())


class Info(BaseModel):
    """The content of meta/info.json; other keys (v2's total_videos, say) are not an error."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    codebase_version: Literal["v3.0"] = VERSION
    robot_type: str | None = None
    total_episodes: Count = 0
    total_frames: Count = 0
    total_tasks: Count = 0
    chunks_size: Positive = 1000  # files per folder
    data_files_size_in_mb: Positive = 100
    video_files_size_in_mb: Positive = 200
    fps: Positive
    splits: dict[str, str] = {}
    data_path: str = f"data/{CHUNK_FILE}.parquet"
    video_path: str | None = f"videos/{{video_key}}/{CHUNK_FILE}.mp4"
    features: dict[str, Feature]

    @property
    def cameras(self) -> dict[str, str]:
        """Camera name by feature key, for the features that are videos."""
        return {key: key.removeprefix(IMAGES) for key, feature in self.features.items() if feature.dtype == "video"}

    def write(self, folder: Path) -> None:
        content = self.model_dump()
        for feature in content["features"].values():
            if feature["info"] is None:
                del feature["info"]
        write_json(folder / INFO, content)


def read_info(folder: Path) -> Info:
    """Read meta/info.json; ConfigurationError names what `folder` lacks, or the key that breaks the format."""
    path = folder / INFO
    try:
        return Info.model_validate(read_json(path))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigurationError(f"dataset {folder}: expected a LeRobot dataset with {INFO}, found none") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "content"
        version = " (datasets of v2.1 must be converted with LeRobot's own tool)" if "version" in where else ""
        raise ConfigurationError(
            f"{path}: {where}: {first['msg']}, got {short_repr(first['input'])}{version}"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{path}: expected the description of a dataset as JSON, got none ({error})"
        ) from error


def fill_path(pattern: str, **values: object) -> str:
    """A file's name from its pattern in meta/info.json; ConfigurationError if the pattern asks for anything else.

    Python's patterns can ask for any attribute of a value, and for a width of gigabytes.
    """
    try:
        for _, name, width, conversion in string.Formatter().parse(pattern):
            if name is not None and (name not in values or conversion or not re.fullmatch(r"0?\d?d?", width or "")):
                raise ValueError(f"{{{name}:{width}}}")
        return pattern.format(**values)
    except ValueError as error:
        raise ConfigurationError(
            f"{INFO}: expected a path with {', '.join(values)} in braces, got {pattern!r:.200} ({error})"
        ) from error


def vector(dtype: str, names: Sequence[str]) -> Feature:
    return Feature(dtype=dtype, shape=(len(names),), names=list(names))


def scalar(dtype: str) -> Feature:
    return Feature(dtype=dtype, shape=(1,))


def make_features(joints: Sequence[str], images: Mapping[str, Feature]) -> dict[str, Feature]:
    """The features of our datasets: the robot's, our own, and those that every dataset has."""
    return {
        STATE: vector("float32", joints),
        ACTION: vector("float32", joints),
        **images,
        STAMP: scalar("int64"),
        "timestamp": scalar("float32"),
        "frame_index": scalar("int64"),
        "episode_index": scalar("int64"),
        "index": scalar("int64"),
        "task_index": scalar("int64"),
    }


def arrow_schema(features: Mapping[str, Feature]) -> pa.Schema:
    """The schema of data/*.parquet: a number for shape (1,), else a list of fixed length; no videos."""
    fields = []
    for name, feature in features.items():
        if feature.dtype != "video":
            kind = pa.type_for_alias(feature.dtype)
            fields.append(pa.field(name, kind if feature.shape == (1,) else pa.list_(kind, feature.shape[0])))
    return pa.schema(fields)


def tasks_table(tasks: Sequence[str]) -> pa.Table:
    """A data frame whose index is the task, as pandas writes it (its metadata says which column is the index)."""
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), "task": pa.array(tasks, pa.string())})

    def column(name: str | None, kind: str, numpy: str) -> dict[str, Any]:
        return {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy, "metadata": None}

    pandas = {
        "index_columns": ["task"],
        "column_indexes": [column(None, "unicode", "object") | {"metadata": {"encoding": "UTF-8"}}],
        "columns": [column("task_index", "int64", "int64"), column("task", "unicode", "object")],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.0.0",
    }
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})


def next_file(chunk_index: int, file_index: int, chunks_size: int) -> tuple[int, int]:
    """The place after this one: `chunks_size` files, then the next folder."""
    return (chunk_index + 1, 0) if file_index + 1 >= chunks_size else (chunk_index, file_index + 1)


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=4, ensure_ascii=False))
