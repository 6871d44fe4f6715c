"""From frames of episodes to a dataset's folder.

The dataset is not there before its end, when videos are ended, meta/ is written, and the folder gets its name. Rows are
kept in memory until their episode ends; images go straight to their video.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ki_vla_ros.errors import ConfigurationError, InputError, KiVlaError
from training.convert.episodes import Frame
from training.convert.statistics import FeatureFigures, PixelCounts, describe_values
from training.data.lerobot import (
    EPISODES,
    IMAGE,
    MIB,
    SOURCE,
    STAMP,
    STATS,
    TASKS,
    VERSION,
    Feature,
    Info,
    Video,
    VideoWriter,
    arrow_schema,
    make_features,
    next_file,
    tasks_table,
    write_json,
)
from training.storage import whole_folder

EpisodeRow = dict[str, Any]
# Room that must stay free: a video that meets a full disk cannot be ended, and nothing of it can be read. Ending takes
# the frames that the encoders hold back, indexes and meta/.
RESERVE: Final = 256 * MIB


class Tables:
    """The tables of a dataset, episode by episode: data/, and at the end meta/. Its videos are others' work.

    Rows are kept in memory for their figures, about 100 bytes each; images in the tables are not.
    """

    def __init__(self, folder: Path, info: Info, cameras: Sequence[str]) -> None:
        self.folder, self.info = folder, info
        self.pixels = {name: PixelCounts() for name in cameras}
        self.tasks: dict[str, int] = {}
        self.episodes: list[EpisodeRow] = []
        self.frames = 0
        self._schema = arrow_schema(info.features)
        numbers = [name for name in self._schema.names if self._schema.field(name).type != IMAGE]
        self._all: dict[str, list[Any]] = {name: [] for name in numbers}  # arrays, one per episode
        self._rows_in_file = 0
        self._place = (0, 0)
        self._file: BinaryIO | None = None
        self._parquet: pq.ParquetWriter | None = None

    def add_episode(
        self,
        columns: Mapping[str, Any],
        tasks: Sequence[str],
        videos: Mapping[str, int | float],
        image_figures: Mapping[str, FeatureFigures],
    ) -> None:
        """Its times and its place among the others are made here; `columns` [N, ...] are all that it has else.

        An image's column is a list of files' bytes. `tasks` has that of each row; `videos` says where its images are if
        they are in videos, in the names of meta/episodes; `image_figures` are by camera.
        """
        rows = len(tasks)
        arrays = {
            **columns,
            "timestamp": np.arange(rows) / self.info.fps,
            "frame_index": np.arange(rows),
            "episode_index": np.full(rows, len(self.episodes)),
            "index": self.frames + np.arange(rows),
            "task_index": np.array([self.tasks.setdefault(task, len(self.tasks)) for task in tasks]),
        }
        arrays = {name: arrays[name] for name in self._schema.names}
        kinds = {name: self._schema.field(name).type for name in arrays}
        place = self._write_rows(pa.table({n: _column(arrays[n], kinds[n]) for n in arrays}, self._schema))
        self.episodes.append(
            {
                "episode_index": len(self.episodes),
                "tasks": list(dict.fromkeys(tasks)),
                "length": rows,
                "data/chunk_index": place[0],
                "data/file_index": place[1],
                "dataset_from_index": self.frames,
                "dataset_to_index": self.frames + rows,
            }
            | dict(videos)
            | _flat(_figures({name: arrays[name] for name in self._all}, image_figures))
        )
        for name, kept in self._all.items():
            kept.append(arrays[name])
        self.frames += rows

    def close(self, features: Mapping[str, Feature], source: Mapping[str, Any]) -> Info:
        """Write meta/; `features` are all, with the images, and `source` is what the dataset is made from.

        InputError if there is not a single episode.
        """
        self.close_rows()
        if not self.episodes:
            raise InputError("dataset: expected at least one frame, got none; nothing was written")
        info = self.info.model_copy(
            update={
                "features": features,
                "total_episodes": len(self.episodes),
                "total_frames": self.frames,
                "total_tasks": len(self.tasks),
                "splits": {"train": f"0:{len(self.episodes)}"},
            }
        )
        whole = {name: np.concatenate(arrays) for name, arrays in self._all.items()}
        images = {name: counts.describe() for name, counts in self.pixels.items()}
        write_json(self.folder / STATS, _figures(whole, images))
        write_json(self.folder / SOURCE, {"format": VERSION, **source})
        pq.write_table(tasks_table(list(self.tasks)), self.folder / TASKS)
        self._write_episodes()
        info.write(self.folder)
        return info

    def close_rows(self) -> None:
        parquet, file = self._parquet, self._file
        self._parquet, self._file, self._rows_in_file = None, None, 0
        if parquet is not None and file is not None:
            with file:
                parquet.close()

    def _write_rows(self, table: pa.Table) -> tuple[int, int]:
        """Write a row group; into a new file if another episode like those in this one would make it too large."""
        if self._file is not None:
            size = self._file.tell()
            if size + size / self._rows_in_file * len(table) >= self.info.data_files_size_in_mb * MIB:
                self.close_rows()
                self._place = next_file(*self._place, self.info.chunks_size)
        if self._parquet is None:
            chunk_index, file_index = self._place
            path = self.folder / self.info.data_path.format(chunk_index=chunk_index, file_index=file_index)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("wb")
            self._parquet = pq.ParquetWriter(self._file, table.schema, compression="snappy")
        self._parquet.write_table(table)
        self._rows_in_file += len(table)
        return self._place

    def _write_episodes(self) -> None:
        table = pa.Table.from_pylist(self.episodes)
        rows_per_file = max(1, int(self.info.data_files_size_in_mb * MIB / (table.nbytes / len(table))))
        place = (0, 0)
        for start in range(0, len(table), rows_per_file):
            part = table.slice(start, rows_per_file)
            for name, index in zip(("chunk_index", "file_index"), place, strict=True):
                part = part.append_column(f"meta/episodes/{name}", pa.array([index] * len(part), pa.int64()))
            path = self.folder / EPISODES.format(chunk_index=place[0], file_index=place[1])
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(part, path, compression="snappy")
            place = next_file(*place, self.info.chunks_size)


class DiskFull(KiVlaError):
    """There is only room left to end the dataset in order."""


class _Abandoned(Exception):
    """Nothing is to be left of the dataset."""


def check_place(folder: Path, left: str = "") -> None:
    """ConfigurationError if nothing can be written where `folder` is to be, DiskFull if there is no room.

    `left` says what there is in that case.
    """
    place = next(parent for parent in folder.absolute().parents if parent.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        got = "one that may not be written to" if place.is_dir() else "a file"
        raise ConfigurationError(f"dataset {folder}: expected a folder at {place}, got {got}; choose another --out")
    if (free := shutil.disk_usage(place).free) < RESERVE:
        raise DiskFull(
            f"dataset {folder}: expected {RESERVE // MIB} MiB free on its disk, to end the dataset in order, got "
            f"{free // MIB}; {left}make room or choose another --out"
        )


class DatasetWriter:
    """Use as a context manager: leaving it, even by an exception, makes what was written so far a valid dataset.

    So does a disk that fills up, because `add` stops while there is room to finish. Without a frame, or where a write
    fails all the same (ConfigurationError), there is no folder at all. Until then it is the hidden `.NAME.part`.
    """

    def __init__(
        self,
        out: Path,
        *,
        fps: int,
        columns: Mapping[str, Sequence[str]],
        cameras: Mapping[str, str],
        source: Mapping[str, Any],
        robot_type: str | None = None,
        video: Video = "h264",
        info: Info | None = None,
        name: Path | None = None,
        keep_begun: bool = True,
    ) -> None:
        """`out` must not exist; `source` is what the dataset is made from; `info` gives the sizes of its files.

        `columns` has the names of the elements of each vector, `cameras` the key of each camera in the dataset.
        `video`: encode the images, or keep the JPEGs that they were recorded as. `name`: what errors call the dataset,
        where this is only a part of it. `keep_begun` False: an exception leaves nothing.
        """
        self.out, self.name, self.source, self._video = out, name or out, source, video
        self.names, self.cameras = dict(columns), dict(cameras)
        if not cameras:
            raise ConfigurationError("dataset: expected at least one camera, got none; name one with --camera")
        features = make_features(columns, {})
        base = info or Info(codebase_version=VERSION, fps=fps, features=features)
        self.info = base.model_copy(update={"fps": fps, "features": features, "robot_type": robot_type})
        self._broken, self._frames, self._keep_begun = False, 0, keep_begun
        self._part = ExitStack()  # the folder in which the dataset grows
        check_place(self.name)
        if out.exists():
            raise ConfigurationError(f"dataset {out} exists already; remove it or choose another --out")

    def __enter__(self) -> DatasetWriter:
        self.folder = self._part.enter_context(whole_folder(self.out))
        keys = self.cameras.values()
        self.videos = {key: VideoWriter(self.folder, key, self.info, self._video) for key in keys}
        self.tables = Tables(self.folder, self.info, list(keys))
        self._part.callback(self.tables.close_rows)
        self._begin_episode()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        with suppress(_Abandoned), self._writing(), self._part:
            if self._broken or (kind is not None and not (self._frames and self._keep_begun)):
                raise _Abandoned
            self._close()

    @property
    def episodes(self) -> list[EpisodeRow]:
        return self.tables.episodes

    def add(self, frame: Frame) -> None:
        """Add a frame; InputError if image sizes change, or cameras, state or action are not those of the dataset.

        DiskFull if the disk is nearly full.
        """
        check_place(self.name, "what was added before is a valid dataset; " if self._frames else "")
        with self._writing():
            self._add(frame)

    def end_episode(self) -> None:
        with self._writing():
            self._end_episode()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._broken = True
            with suppress(Exception):
                self.tables.close_rows()
            raise ConfigurationError(
                f"dataset {self.name}: expected to write it whole, got {error}; nothing of it is left: make room on "
                "the disk, and convert again"
            ) from error

    def _add(self, frame: Frame) -> None:
        wanted = sorted(self.cameras), {name: len(names) for name, names in self.names.items()}
        got = sorted(frame.images), {name: len(values) for name, values in frame.columns.items()}
        if wanted != got:
            raise InputError(
                f"frame: expected cameras {wanted[0]} and numbers {wanted[1]}, got cameras {got[0]} and numbers "
                f"{got[1]}"
            )
        if not self._tasks:
            for video in self.videos.values():
                video.begin_episode()
        for name, rgb_HWC in frame.images.items():
            key = self.cameras[name]
            self.videos[key].add(rgb_HWC, frame.files.get(name))
            self._pixels[key].add(rgb_HWC)
        for name, values in frame.columns.items():
            # A vector of one number is a number in the tables.
            self._columns[name].append(np.asarray(values if len(values) > 1 else values[0], dtype=np.float32))
        self._columns[STAMP].append(frame.stamp_ns)
        self._tasks.append(frame.task)
        self._frames += 1

    def _begin_episode(self) -> None:
        self._columns: dict[str, list[Any]] = {name: [] for name in (*self.names, STAMP)}
        self._tasks: list[str] = []
        self._pixels = {name: PixelCounts() for name in self.videos}

    def _end_episode(self) -> None:
        if not self._tasks:
            return
        self.tables.add_episode(
            {name: np.array(values) for name, values in self._columns.items()},
            self._tasks,
            {key: value for video in self.videos.values() for key, value in video.end_episode().items()},
            {name: counts.describe() for name, counts in self._pixels.items()},
        )
        for name, counts in self._pixels.items():
            self.tables.pixels[name].merge(counts)
        self._begin_episode()

    def _close(self) -> None:
        self._end_episode()
        for video in self.videos.values():
            video.close()
        images = {key: video.feature for key, video in self.videos.items()} if self.tables.episodes else {}
        if self.out.exists():  # meanwhile
            raise ConfigurationError(f"dataset {self.out} exists already; remove it or choose another --out")
        self.tables.close(make_features(self.names, images), self.source)


def _figures(arrays: Mapping[str, Any], images: Mapping[str, FeatureFigures]) -> dict[str, FeatureFigures]:
    values = {name: describe_values(array) for name, array in arrays.items()}
    return values | dict(images)


def _column(array: Any, kind: pa.DataType) -> pa.Array:
    if kind == IMAGE:
        return pa.array([{"bytes": file, "path": None} for file in array], kind)
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(pa.array(array.ravel(), kind.value_type), type=kind)
    if pa.types.is_list(kind):
        inner = _column(array.reshape(-1, *array.shape[2:]), kind.value_type)
        return pa.ListArray.from_arrays(np.arange(len(array) + 1, dtype=np.int32) * array.shape[1], inner, type=kind)
    return pa.array(array.ravel().astype(kind.to_pandas_dtype()), kind)


def _flat(figures: Mapping[str, FeatureFigures]) -> EpisodeRow:
    return {f"stats/{name}/{key}": value for name, entry in figures.items() for key, value in entry.items()}
