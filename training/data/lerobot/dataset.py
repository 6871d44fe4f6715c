"""Reads datasets of format v3.0, whoever made them: episodes, their rows, and the images of their videos."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ki_vla_ros.errors import ConfigurationError, InputError
from ki_vla_ros.files import check_file
from training.data.lerobot.layout import EPISODES, TASKS, Info, fill_path, read_info
from training.data.lerobot.video import read_frames

# Bytes of a table once it is read: LeRobot begins another file after 100 MB.
LARGEST_TABLE = 1 << 29


@dataclass(frozen=True)
class Episode:
    """One episode; `row` is its row of meta/episodes, by column."""

    index: int
    length: int
    tasks: tuple[str, ...]
    row: Mapping[str, Any]


class Dataset:
    """A dataset on disk, with `tasks` by task_index; ConfigurationError if it is none or its parts do not fit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.info: Info = read_info(folder)
        if inside := [key for key, feature in self.info.features.items() if feature.dtype == "image"]:
            raise ConfigurationError(
                f"dataset {folder}: expected images as videos, got {', '.join(inside)} inside the tables; LeRobot's "
                "own tools can turn them into videos"
            )
        with _described(folder):
            self.tasks = self._read_tasks()
            self.episodes = self._read_episodes()
        self._table: tuple[Path, pa.Table] | None = None  # the last file that was read
        frames = sum(episode.length for episode in self.episodes)
        if (frames, len(self.episodes)) != (self.info.total_frames, self.info.total_episodes):
            raise ConfigurationError(
                f"dataset {folder}: expected {self.info.total_episodes} episodes of {self.info.total_frames} frames as "
                f"meta/info.json says, got {len(self.episodes)} of {frames} in meta/episodes; is the copy whole?"
            )

    @property
    def cameras(self) -> tuple[str, ...]:
        return tuple(self.info.cameras.values())

    def columns(self, episode: Episode) -> dict[str, NDArray[Any]]:
        """The episode's rows by feature, [N] or [N, D]; InputError if they are not as meta/ describes them."""
        with _described(self.folder):
            place = {name: episode.row[f"data/{name}"] for name in ("chunk_index", "file_index")}
            path = self._inside(fill_path(self.info.data_path, **place))
            if self._table is None or self._table[0] != path:
                names = [name for name, feature in self.info.features.items() if len(feature.shape) == 1]
                self._table = path, _read_parquet(path).select(names)
            table = self._table[1]
            rows = np.flatnonzero(table["episode_index"].to_numpy() == episode.index)
            if len(rows) != episode.length or np.any(np.diff(rows) != 1):
                raise InputError(f"{path}: expected {episode.length} rows of episode {episode.index}, got {len(rows)}")
            part = table.slice(int(rows[0]), len(rows))
            columns = {name: _array(part[name].combine_chunks()) for name in part.column_names}
            wanted = np.arange(episode.length) / self.info.fps
            if not np.allclose(columns["timestamp"], wanted, rtol=1e-6, atol=1e-4):
                raise InputError(f"{path}: episode {episode.index}: expected a timestamp every 1 / {self.info.fps} s")
            return columns

    def images(self, episode: Episode, camera: str) -> Iterator[NDArray[np.uint8]]:
        """The image [H, W, 3] of each frame; InputError if the video lacks one."""
        key = next((key for key, name in self.info.cameras.items() if name == camera), None)
        if key is None or self.info.video_path is None:
            raise ConfigurationError(
                f"dataset {self.folder}: expected videos of camera {camera!r}, got those of "
                f"{', '.join(self.cameras) or 'none'}"
            )
        with _described(self.folder):
            place = {name: episode.row[f"videos/{key}/{name}"] for name in ("chunk_index", "file_index")}
            path = self._inside(fill_path(self.info.video_path, video_key=key, **place))
            from_s = float(episode.row[f"videos/{key}/from_timestamp"])
            return read_frames(path, from_s, episode.length, self.info.fps)

    def task_of(self, columns: Mapping[str, NDArray[Any]]) -> list[str]:
        """The task of each frame."""
        with _described(self.folder):
            return [self.tasks[int(index)] for index in columns["task_index"]]

    def _read_tasks(self) -> dict[int, str]:
        table = _read_parquet(self.folder / TASKS)
        # Older writers gave the index no name.
        name = next((n for n in ("task", "__index_level_0__") if n in table.column_names), None)
        if name is None or "task_index" not in table.column_names:
            raise ConfigurationError(f"{self.folder / TASKS}: expected columns task and task_index")
        return dict(zip(table["task_index"].to_pylist(), table[name].to_pylist(), strict=True))

    def _read_episodes(self) -> list[Episode]:
        pattern = EPISODES.format(chunk_index=0, file_index=0).replace("000", "*")
        paths = sorted(self.folder.glob(pattern))
        if not paths:
            raise ConfigurationError(f"dataset {self.folder}: expected episodes in {pattern}, found none")
        episodes = []
        for path in paths:
            table = _read_parquet(path)
            for row in table.select([n for n in table.column_names if not n.startswith("stats/")]).to_pylist():
                episodes.append(Episode(row["episode_index"], row["length"], tuple(row["tasks"]), row))
        return sorted(episodes, key=lambda episode: episode.index)

    def _inside(self, name: str) -> Path:
        """The path of a file in the dataset; ConfigurationError if the metadata points outside the folder."""
        path = self.folder / name
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise ConfigurationError(f"dataset {self.folder}: expected paths inside it in meta/info.json, got {name}")
        return path


@contextmanager
def _described(folder: Path) -> Iterator[None]:
    """Makes of what a table of other columns, types or numbers leads to an InputError."""
    try:
        yield
    except (ArithmeticError, LookupError, OSError, TypeError, ValueError, pa.ArrowException) as error:
        raise InputError(
            f"dataset {folder}: expected tables as meta/info.json describes them, got others ({error!r})"
        ) from error


def _read_parquet(path: Path) -> pa.Table:
    try:
        check_file(path)
        with pq.ParquetFile(path) as file:
            # A value that is stored once may stand in millions of rows, so what a part becomes is seen before the next.
            texts = any(word in str(file.schema_arrow) for word in ("string", "binary"))
            parts, read = [], 0
            size = sum(file.metadata.row_group(k).total_byte_size for k in range(file.num_row_groups))
            for part in file.iter_batches(batch_size=256 if texts else 65536):
                parts.append(part)
                read += part.nbytes
                if max(size, read) > LARGEST_TABLE:
                    raise ValueError(f"it has more than {LARGEST_TABLE} bytes")
            return pa.Table.from_batches(parts, file.schema_arrow)
    except FileNotFoundError:
        raise ConfigurationError(f"dataset: expected {path}, found none; is the copy whole?") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ConfigurationError(f"{path}: not a whole parquet file: {error}") from error


def _array(column: pa.Array) -> NDArray[Any]:
    kind = column.type
    if pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind):
        return np.asarray(column.flatten()).reshape(len(column), -1)
    return np.asarray(column)
