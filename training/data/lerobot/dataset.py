"""Reads datasets of formats v2.0, v2.1 and v3.0, whoever made them: episodes, their rows and their images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Final, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ki_vla_ros.errors import ConfigurationError, InputError, did_you_mean, short_repr
from ki_vla_ros.files import read_file
from ki_vla_ros.messages import decode_compressed
from training.data.lerobot.layout import ACTIONS, STATES, Info, depth_reason, fill_path, read_info
from training.data.lerobot.meta import Episode, read_episodes, read_tasks
from training.data.lerobot.tables import described, read_parquet, read_rows
from training.data.lerobot.video import TOLERANCE, read_frames

Number = TypeVar("Number", int, float)

# What every dataset's rows have, whether meta/info.json lists it or not.
ROWS: Final = ("timestamp", "episode_index", "task_index")


class Dataset:
    """A dataset on disk, with `tasks` by task_index; ConfigurationError if it is none or its parts do not fit.

    Values are the dataset's own, in its units and under its names.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.info: Info = read_info(folder)
        with described(folder):
            self.tasks = read_tasks(folder, self.info)
            self.episodes = read_episodes(folder, self.info)
        self._arrays: tuple[str, ...] = ()  # features of several dimensions that `columns` has beside the others
        self._table: tuple[Path, pa.Table, _Runs] | None = None  # the last file that was read

    @property
    def cameras(self) -> tuple[str, ...]:
        return tuple(self.info.cameras.values())

    @property
    def ignored(self) -> dict[str, str]:
        """The features that are not read, with the reason: depth, texts, arrays."""
        return self.info.ignored

    @property
    def state_key(self) -> str | None:
        """The column of the state, where it is one; other datasets have parts of it in several."""
        return self._vector(STATES)

    @property
    def action_key(self) -> str | None:
        return self._vector(ACTIONS)

    @property
    def state_names(self) -> tuple[str, ...] | None:
        """A name for each element of the state; None where the dataset has none."""
        return self.names(self.state_key)

    @property
    def action_names(self) -> tuple[str, ...] | None:
        return self.names(self.action_key)

    def names(self, key: str | None) -> tuple[str, ...] | None:
        """A name for each element of a column; None where the dataset has none."""
        feature = self.info.features.get(key) if key else None
        return feature.element_names or None if feature else None

    def columns(self, episode: Episode) -> dict[str, NDArray[Any]]:
        """The episode's rows by feature, [N] or [N, D]; InputError if they are not as meta/ describes them.

        They are the features that are numbers or vectors of numbers; shape (1,) is [N], however it is stored.
        """
        with described(self.folder):
            path, first = self._find(episode)
            assert self._table is not None
            part = self._table[1].slice(first, episode.length)
            columns = {}
            for name in part.column_names:
                try:
                    shape = self.info.features[name].shape if name in self.info.features else ()
                    columns[name] = _array(part[name].combine_chunks(), *(shape if name in self._arrays else shape[:1]))
                except ValueError as error:
                    raise InputError(f"{path}: episode {episode.index}: column {name!r}: {error}") from error
            self._check(path, episode, columns)
            return columns

    @contextmanager
    def reading(self, *arrays: str) -> Iterator[None]:
        """Within it `columns` has these features as well, [N, rows, D]; afterwards no table is kept in memory."""
        for key in arrays:
            if key not in self.info.features:
                raise ConfigurationError(
                    f"dataset {self.folder}: expected a column {key}, got {', '.join(self.info.features)}"
                    f"{did_you_mean(key, self.info.features)}"
                )
        self._arrays, self._table = arrays, None
        try:
            yield
        finally:
            self._arrays, self._table = (), None

    def images(self, episode: Episode, camera: str) -> Iterator[NDArray[np.uint8]]:
        """The image [H, W, 3] of each frame, of a camera named as in `cameras` or by its key; InputError without one.

        ConfigurationError names a camera that is not there, or is not a colour camera.
        """
        key = self.camera_key(camera)
        with described(self.folder):
            if self.info.features[key].dtype == "image":
                path, first = self._find(episode)
                return self._pictures(path, key, first, episode)
            path, from_s = self.video_of(episode, key)
            return read_frames(path, from_s, episode.length, self.info.fps)

    def camera_key(self, camera: str) -> str:
        """The key of a camera that is named as in `cameras`, or by its key; ConfigurationError as in `images`."""
        key = next((key for key, name in self.info.cameras.items() if camera in (name, key)), None)
        if key is None:
            found = self.info.features.get(camera)
            reason = found and found.is_image and depth_reason(camera, found)
            raise ConfigurationError(
                f"dataset {self.folder}: expected colour images of camera {camera!r}, got "
                + (f"{reason}" if reason else f"those of {', '.join(self.cameras) or 'none'}")
            )
        return key

    def video_of(self, episode: Episode, key: str) -> tuple[Path, float]:
        """The video that has an episode's images of a camera, and when the first of them is in it, in s."""
        if (pattern := self.info.video_path) is None:
            raise ConfigurationError(f"dataset {self.folder}: expected a video_path for {key} in meta/info.json")
        prefix = f"videos/{key}"
        path = self._inside(fill_path(pattern, video_key=key, **self._place(episode, prefix, pattern)))
        shared = "{episode_index" not in pattern
        return path, self._note(episode, f"{prefix}/from_timestamp", float) if shared else 0.0

    def table_of(self, episode: Episode) -> Path:
        """The table that has an episode's rows."""
        pattern = self.info.data_path
        return self._inside(fill_path(pattern, **self._place(episode, "data", pattern)))

    def first_row(self, episode: Episode) -> int:
        """Where in its table an episode begins."""
        with described(self.folder):
            return self._find(episode)[1]

    def decode(self, where: str, value: Any) -> NDArray[np.uint8]:
        """The image [H, W, 3] that a table has: a jpeg or png file, or its name; InputError begins with `where`."""
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is None and isinstance(value, dict) and value.get("path"):
            content = self._beside(where, str(value["path"]))
        if not isinstance(content, bytes):
            raise InputError(f"{where}: expected the bytes of an image, got {'none' if content is None else 'others'}")
        return decode_compressed(where, content)

    def task_of(self, columns: Mapping[str, NDArray[Any]]) -> list[str]:
        """The task of each frame."""
        numbers = columns["task_index"].tolist()
        if unknown := [number for number in numbers if number not in self.tasks]:
            known = ", ".join(str(number) for number in list(self.tasks)[:20]) or "none"
            raise InputError(f"dataset {self.folder}: expected a task_index of meta/ ({known}), got {unknown[0]}")
        return [self.tasks[number] for number in numbers]

    def _vector(self, keys: tuple[str, ...]) -> str | None:
        return next((k for k in keys if k in self.info.features and self.info.features[k].is_number), None)

    def _find(self, episode: Episode) -> tuple[Path, int]:
        """The table's file and the episode's first row in it; the file is then the last that was read."""
        path = self.table_of(episode)
        if self._table is None or self._table[0] != path:
            numbers = [name for name, feature in self.info.features.items() if feature.is_number]
            table = read_parquet(path, list(dict.fromkeys((*numbers, *ROWS, *self._arrays))))
            self._table = path, table, _runs(_array(table["episode_index"].combine_chunks(), 1))
        number, first, count = self._table[2]
        own = number == episode.index
        if own.sum() != 1 or count[own][0] != episode.length:
            rows = self._table[1].num_rows
            got = int(count[own].sum())
            others = f" and {rows - got} of others" if got < rows else ""
            raise InputError(
                f"{path}: expected {episode.length} rows of episode {episode.index} on end, got {got}{others}"
            )
        return path, int(first[own][0])

    def _check(self, path: Path, episode: Episode, columns: Mapping[str, NDArray[Any]]) -> None:
        """InputError unless frames are evenly spaced, and state and action are numbers."""
        fps, time_N = self.info.fps, columns["timestamp"]
        due_N = np.arange(episode.length) / fps
        if (late := ~(np.abs(time_N - due_N) <= TOLERANCE / fps)).any():  # a NaN is late
            i = int(late.argmax())
            raise InputError(
                f"{path}: episode {episode.index}: expected a timestamp every 1 / {fps} s, got {time_N[i]:g} s for "
                f"frame {i}, not {due_N[i]:g} s"
            )
        for key in filter(None, (self.state_key, self.action_key)):
            finite_N = np.isfinite(columns[key].reshape(episode.length, -1)).all(axis=1)
            if not finite_N.all():
                i = int(finite_N.argmin())
                raise InputError(
                    f"{path}: episode {episode.index}: expected finite numbers in {key}, got "
                    f"{columns[key][i].tolist()} for frame {i}"
                )

    def _pictures(self, path: Path, key: str, first: int, episode: Episode) -> Iterator[NDArray[np.uint8]]:
        with described(self.folder):
            for i, value in enumerate(read_rows(path, key, first, episode.length)):
                yield self.decode(f"{path}: episode {episode.index}, frame {i}: {key}", value)

    def _beside(self, where: str, name: str) -> bytes:
        """The image file that a table names instead of holding it."""
        try:
            return read_file(self._inside(name))
        except (ConfigurationError, OSError) as error:
            raise InputError(
                f"{where}: expected an image in the table or in the dataset's folder, got only the path {name!r} "
                f"({error}); ask whoever made the dataset for its images"
            ) from error

    def _place(self, episode: Episode, prefix: str, pattern: str) -> dict[str, int]:
        """The numbers that a file's name is made of: the episode's own, and in v3.0 those of a file of several."""
        place = {"episode_chunk": episode.index // self.info.chunks_size, "episode_index": episode.index}
        for name in ("chunk_index", "file_index"):
            if f"{{{name}" in pattern:
                place[name] = self._note(episode, f"{prefix}/{name}", int)
        return place

    def _note(self, episode: Episode, name: str, kind: Callable[[Any], Number]) -> Number:
        """A number that meta/episodes has of an episode; InputError if there is none."""
        try:
            value = kind(episode.row[name])
            if not 0 <= value < math.inf:
                raise ValueError(value)
        except (KeyError, OverflowError, TypeError, ValueError):
            raise InputError(
                f"dataset {self.folder}: expected {name} of episode {episode.index} in meta/episodes, got "
                f"{short_repr(episode.row.get(name))}"
            ) from None
        return value

    def _inside(self, name: str) -> Path:
        """The path of a file in the dataset; ConfigurationError if the metadata points outside the folder.

        A link in the folder may lead elsewhere: the cache of the Hugging Face Hub consists of links.
        """
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ConfigurationError(f"dataset {self.folder}: expected paths inside it in meta/info.json, got {name}")
        return self.folder / name


_Runs = tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]
"""Of each stretch of equal numbers: the number, where it begins, and how many they are."""


def _runs(number_N: NDArray[Any]) -> _Runs:
    first = np.flatnonzero(np.diff(number_N, prepend=number_N[:1] - 1))
    return number_N[first], first, np.diff(first, append=len(number_N))


def _array(column: pa.Array, *shape: int) -> NDArray[Any]:
    """[N], or [N, *shape] if that is more than 1; ValueError if rows lack a number or are wider or narrower."""
    rows = len(column)
    for width in shape or (1,):
        if isinstance(column, pa.ExtensionArray):
            column = column.storage
        if isinstance(column, pa.FixedSizeListArray | pa.ListArray | pa.LargeListArray):
            lengths = column.value_lengths()
            found = set(lengths.unique().to_pylist())
            if found != {width}:
                raise ValueError(
                    f"expected {width} numbers in each row, got {', '.join(map(str, sorted(found, key=repr)))}"
                )
            column = column.flatten()
        elif width != 1:
            raise ValueError(f"expected {width} numbers in each row, got {column.type}")
    if column.null_count:
        raise ValueError(f"expected numbers, got none in {column.null_count} places")
    values = np.asarray(column)
    if values.dtype.kind not in "biuf":
        raise ValueError(f"expected numbers, got {column.type}")
    return values if shape in ((), (1,)) else values.reshape(rows, *shape)
