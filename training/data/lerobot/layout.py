"""LeRobot's dataset formats as data: which files there are, and what is in them.

Facts from the format's description and its reference implementation (huggingface/lerobot, docs/source/
lerobot-dataset-v3.mdx and src/lerobot/datasets, version 0.6.2 of 2026-08-23; v2.1 of version 0.3.3). We write v3.0:

    meta/info.json                                  `Info`
    meta/stats.json                                 figures of every feature over the whole dataset (statistics.py)
    meta/tasks.parquet                              task_index by task; the task is the table's index
    meta/episodes/chunk-000/file-000.parquet        one row per episode: where its frames are, and its figures
    data/chunk-000/file-000.parquet                 one row per frame, one episode after the other
    videos/KEY/chunk-000/file-000.mp4               the frames of one camera, one episode after the other

v2.0 and v2.1 have a file per episode and no `chunk_index` or `file_index`:

    meta/tasks.jsonl, meta/episodes.jsonl           a line per task, a line per episode
    meta/stats.json (v2.0), episodes_stats.jsonl    figures, which we do not need
    data/chunk-000/episode_000000.parquet           one row per frame
    videos/chunk-000/KEY/episode_000000.mp4         the frames of one camera

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

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ki_vla_ros.errors import ConfigurationError, short_repr
from ki_vla_ros.files import read_json
from ki_vla_ros.robot import flatten_names
from training.data.lerobot.tables import is_pointer

VERSION: Final = "v3.0"
CHUNK_FILE: Final = "chunk-{chunk_index:03d}/file-{file_index:03d}"
INFO: Final = "meta/info.json"
STATS: Final = "meta/stats.json"
TASKS: Final = "meta/tasks.parquet"
EPISODES: Final = f"meta/episodes/{CHUNK_FILE}.parquet"
TASK_LINES: Final = "meta/tasks.jsonl"
EPISODE_LINES: Final = "meta/episodes.jsonl"
SOURCE: Final = "meta/ki_vla_ros.json"
REPORTS: Final = "meta/ki_vla_ros_episodes.jsonl"

STATE: Final = "observation.state"
ACTION: Final = "action"
IMAGES: Final = "observation.images."
STAMP: Final = "stamp_ns"  # no "observation." in front: LeRobot's policies take such features as inputs
STATES: Final = (STATE, "state")  # the second as openpi's converters write them, for LIBERO, say
ACTIONS: Final = (ACTION, "actions")
PLACE: Final = "hint.place"  # u and v of what the task is about, in the last camera's image
CELLS: Final = "hint.cells"  # what each cell of the images shows

MIB: Final = 1 << 20
IMAGE: Final = pa.struct({"bytes": pa.binary(), "path": pa.string()})  # an image in a table: a png or jpeg file
CHUNK: Final = 1000  # files per folder
DEPTH_WORD: Final = re.compile(r"(?<![a-z])depth(?![a-z])", re.IGNORECASE)
HUB_NAME: Final = re.compile(r"(?:(?:https?:/+huggingface\.co/|hf:/+)?datasets/)?([\w.-]+/[\w.-]+)", re.ASCII)
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Version = Annotated[
    Literal["v2.0", "v2.1", "v3.0"],
    BeforeValidator(lambda value: f"v{value}" if value in ("2.0", "2.1", "3.0") else value),
]


def as_integer(value: Any) -> Any:
    """10 for 10.0, as some writers make all numbers floats; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Feature(BaseModel):
    """One feature. `info` (in v2.0 `video_info`) describes a video; foreign ones may have a text or nothing there."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    dtype: str
    shape: tuple[int, ...]
    names: Any = None  # of a vector's elements: a list, perhaps in a list, or grouped in a dictionary
    info: Any = None
    video_info: Any = None

    @property
    def width(self) -> int:
        """Elements of a vector; 1 for a number."""
        return self.shape[0] if self.shape else 1

    @property
    def element_names(self) -> tuple[str, ...]:
        """A vector's names in order, grouped or not; none where they are not one for each element."""
        names = tuple(flatten_names(self.names))
        return names if len(self.shape) < 2 and len(names) == self.width else ()

    @property
    def is_image(self) -> bool:
        return self.dtype in ("video", "image")

    @property
    def is_number(self) -> bool:
        """Whether it is a number or a vector of numbers."""
        try:
            return len(self.shape) < 2 and np.dtype(self.dtype).kind in "biuf"
        except TypeError:
            return False


def depth_reason(key: str, feature: Feature) -> str | None:
    """Why the images of a feature are no colour images; None if nothing says so."""
    for info in (feature.info, feature.video_info):
        flags = info if isinstance(info, dict) else {}
        if any(flags.get(name) for name in ("is_depth_map", "video.is_depth_map", "video_is_depth_map")):
            return "depth, by its is_depth_map"
    if DEPTH_WORD.search(key):
        return "depth, by its name"
    if len(feature.shape) == 3 and 1 in (feature.shape[0], feature.shape[2]):
        return "one channel, as depth has"
    return None


class Info(BaseModel):
    """The content of meta/info.json; other keys (v2's total_videos, say) are not an error."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    codebase_version: Version
    robot_type: str | None = None
    total_episodes: Count = 0
    total_frames: Count = 0
    total_tasks: Count | None = 0
    chunks_size: Annotated[Positive, BeforeValidator(lambda value: CHUNK if value is None else value)] = CHUNK
    data_files_size_in_mb: Annotated[int | float, BeforeValidator(as_integer)] = 100
    video_files_size_in_mb: Annotated[int | float, BeforeValidator(as_integer)] = 200
    fps: Annotated[int | float, Field(gt=1e-3, lt=1e5), BeforeValidator(as_integer)]
    splits: Any = {}
    data_path: str = f"data/{CHUNK_FILE}.parquet"
    video_path: str | None = f"videos/{{video_key}}/{CHUNK_FILE}.mp4"
    features: dict[str, Feature]

    @property
    def cameras(self) -> dict[str, str]:
        """Camera name by feature key, for the features that are colour images.

        The name is the key without `observation.images.` or `observation.`, or the key if two would be called the same.
        """
        keys = [key for key, f in self.features.items() if f.is_image and depth_reason(key, f) is None]
        short = {key: key.removeprefix(IMAGES).removeprefix("observation.") for key in keys}
        names = list(short.values())
        return {key: name if names.count(name) == 1 else key for key, name in short.items()}

    @property
    def ignored(self) -> dict[str, str]:
        """Why not, by key, for the features that we do not read."""
        reasons = {}
        for key, feature in self.features.items():
            if feature.is_image:
                reason = depth_reason(key, feature)
            elif feature.is_number:
                continue
            elif len(feature.shape) > 1:
                reason = f"an array of {' x '.join(map(str, feature.shape))} {feature.dtype}"
            else:
                reason = f"no number, but {feature.dtype}"
            if reason:
                reasons[key] = reason
        return reasons

    def write(self, folder: Path) -> None:
        content = self.model_dump()
        for feature in content["features"].values():
            for name in ("info", "video_info"):
                if feature[name] is None:
                    del feature[name]
        write_json(folder / INFO, content)


def read_info(folder: Path) -> Info:
    """Read meta/info.json; ConfigurationError names what `folder` lacks, or the key that breaks the format."""
    path = folder / INFO
    try:
        return Info.model_validate(read_json(path))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigurationError(f"dataset {folder}: {_say_what_is_there(folder)}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "content"
        version = "; LeRobot's own tools bring older datasets to v2.1 and v3.0" if where == "codebase_version" else ""
        raise ConfigurationError(
            f"{path}: {where}: {first['msg']}, got {short_repr(first['input'])}{version}"
        ) from error
    except (OSError, ValueError) as error:
        if is_pointer(path):
            raise ConfigurationError(
                f"{path}: expected a description, got git-lfs's pointer to it; run 'git lfs pull'"
            ) from None
        raise ConfigurationError(
            f"{path}: expected the description of a dataset as JSON, got none ({error})"
        ) from error


def _say_what_is_there(folder: Path) -> str:
    wanted = f"expected a LeRobot dataset with {INFO}, found"
    if folder.is_dir():
        inside = [path.parent.parent.name for path in sorted(folder.glob(f"*/{INFO}"))[:3]]
        return f"{wanted} none" + (f"; the folders {', '.join(inside)} in it have one: name one of them" * bool(inside))
    if folder.exists():
        return f"{wanted} a file; name the dataset's folder"
    if found := HUB_NAME.fullmatch(str(folder)):
        return (
            f"{wanted} no such folder; if that is its name on the Hugging Face Hub, download it first, with "
            f"'hf download --repo-type dataset {found[1]} --local-dir FOLDER', and name the folder"
        )
    return f"{wanted} no such folder"


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


def make_features(columns: Mapping[str, Sequence[str]], images: Mapping[str, Feature]) -> dict[str, Feature]:
    """The features of our datasets: the robot's vectors by their names, our own, and those that every dataset has."""
    return {
        **{name: vector("float32", names) for name, names in columns.items()},
        **images,
        STAMP: scalar("int64"),
        "timestamp": scalar("float32"),
        "frame_index": scalar("int64"),
        "episode_index": scalar("int64"),
        "index": scalar("int64"),
        "task_index": scalar("int64"),
    }


def arrow_schema(features: Mapping[str, Feature]) -> pa.Schema:
    """The schema of data/*.parquet, without videos.

    A number for shape (1,), a list of fixed length for a vector, lists in lists for an array, as LeRobot has them; an
    image is its file's bytes.
    """
    fields = []
    for name, feature in features.items():
        if feature.dtype == "image":
            fields.append(pa.field(name, IMAGE))
        elif feature.dtype != "video":
            kind = pa.type_for_alias(feature.dtype)
            if len(feature.shape) > 1:
                for _ in feature.shape:
                    kind = pa.list_(kind)
            elif feature.shape != (1,):
                kind = pa.list_(kind, feature.shape[0])
            fields.append(pa.field(name, kind))
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
