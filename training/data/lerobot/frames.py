"""The frames of a LeRobot dataset as samples of a robot, read at random.

Opening reads all tables once and checks them; state, actions, tasks and labels then lie in a temporary file, as a
record of a fixed size per frame, and images are read when they are asked for. So memory holds a few numbers per
episode, however many there are.

Legend: E episodes, F frames, V cameras, S image side (or state, in `state_FS`), H horizon, D actions, N image cells.
"""

from __future__ import annotations

import os
import sys
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ki_vla_ros.errors import ConfigurationError, InputError
from ki_vla_ros.policy import fit_square, resize_with_pad
from ki_vla_ros.robot import Robot
from training.data.cache import CACHE_BYTES, ImageCache
from training.data.lerobot.dataset import Dataset
from training.data.lerobot.layout import ACTIONS, CELLS, PLACE
from training.data.lerobot.meta import Episode
from training.data.lerobot.pictures import Pictures, Wanted
from training.data.lerobot.ranges import Ranges
from training.data.lerobot.robot_columns import read_robot_chunks, read_robot_columns
from training.data.samples import Image, Labels, RobotSample

Array = NDArray[np.float64]
Ends = Literal["mask", "hold", "drop"]
# What may be picked from a faster dataset. A step or a velocity is of one frame: of several, it would be another.
PLACES: Final = ("joint_position", "gripper", "pose")
AT_ONCE: Final = 1024  # frames of `numbers`


class LeRobotSamples:
    """Implements `RobotSamples`; ConfigurationError names what of dataset and robot file does not fit.

    Images are `image_size` wide and high; `horizon` is the robot's if left out. Where fewer actions than that are left
    of an episode, the last one is repeated: not known (`ends` "mask"), known ("hold": right if the robot stays), or
    such frames are left out ("drop"). With `chunk`, that column has the whole chunk of each frame, H rows as the
    actions' column has them, and frames need not follow each other.

    `episodes` are those with these numbers, or a slice of all, in their order. Up to `cache_bytes` of images that were
    decoded are kept. It cannot be pickled; processes that are forked share its numbers and images.
    """

    def __init__(
        self,
        dataset: Dataset,
        robot: Robot,
        *,
        image_size: int,
        horizon: int | None = None,
        ends: Ends = "mask",
        chunk: str | None = None,
        episodes: slice | Sequence[int] | None = None,
        cache_bytes: int = CACHE_BYTES,
        name: str | None = None,
    ) -> None:
        if ends not in get_args(Ends):
            raise ConfigurationError(f"ends: expected one of {', '.join(get_args(Ends))}, got {ends!r}")
        self.dataset, self.robot, self.image_size, self.ends = dataset, robot, image_size, ends
        self.name = name or str(dataset.folder)
        self.horizon = horizon or robot.horizon
        self._chunk = chunk
        self._keys = find_cameras(dataset, robot)
        self._stride = find_stride(dataset, robot, chunk)
        self.episodes = choose_episodes(dataset, episodes)
        self._pictures = Pictures(dataset)
        frames = sum(episode.length for episode in self.episodes)
        self._cache = ImageCache(frames * len(self._keys), image_size, cache_bytes)

        length_E = np.array([episode.length for episode in self.episodes])
        self._begin_E = np.cumsum(length_E) - length_E  # the first record of each
        left_out = self.horizon * self._stride - 1 if ends == "drop" and chunk is None else 0
        self._end_row_E = np.cumsum(np.maximum(length_E - left_out, 0))
        if not len(self):
            raise ConfigurationError(
                f"{self.name}: no episode has the {left_out + 1} frames of a chunk (ends: drop); take ends: mask or "
                "hold, a shorter horizon, or longer episodes"
            )
        self._record = self._plan_record()
        self._file, path = tempfile.mkstemp()  # read with pread, which forked processes can do side by side
        weakref.finalize(self, os.close, self._file)
        os.unlink(path)
        self.ranges = Ranges(robot)
        self._row_E = np.zeros(len(self.episodes), dtype=np.int64)  # where in its table each begins
        self._tasks = sorted(self._read_tables())

    def __len__(self) -> int:
        return int(self._end_row_E[-1])

    def take(self, rows: Sequence[int]) -> list[RobotSample]:
        """The frames with these numbers; InputError names file, episode and frame of an image that is broken."""
        places = [self._place(row) for row in rows]
        images = self._images(places)
        return [self._sample(e, i, images[e, i]) for e, i in places]

    def texts(self) -> Iterator[str]:
        yield from (self.dataset.tasks[number] for number in self._tasks)

    def numbers(self) -> Iterator[tuple[Array, Array, NDArray[np.bool_]]]:
        """State [F, S], chunks [F, H, D] and what of them is known [F, H], piece by piece."""
        count_E = np.diff(self._end_row_E, prepend=0)
        for e, count in enumerate(count_E.tolist()):
            for first in range(0, count, AT_ONCE):
                frames = range(first, min(first + AT_ONCE, count))
                records = self._read(e, first, len(frames) + self._reach)
                chunk_FHD, known_FH = self._chunks(e, np.arange(len(frames)), first, records)
                yield records["state"][: len(frames)], chunk_FHD, known_FH

    @property
    def _reach(self) -> int:
        """How many records after a frame's own its chunk is made of."""
        return 0 if self._chunk else self.horizon * self._stride - 1

    def _place(self, row: int) -> tuple[int, int]:
        """Number of the episode, among those that were chosen, and of the frame in it."""
        if not 0 <= row < len(self):
            raise IndexError(f"{self.name}: expected a row of 0 to {len(self) - 1}, got {row}")
        e = int(np.searchsorted(self._end_row_E, row, side="right"))
        return e, row - (int(self._end_row_E[e - 1]) if e else 0)

    def _sample(self, e: int, i: int, images: tuple[Image | None, ...]) -> RobotSample:
        records = self._read(e, i, 1 + self._reach)
        chunk_FHD, known_FH = self._chunks(e, np.zeros(1, dtype=np.int64), i, records)
        one = records[0]
        labels = Labels()
        if PLACE in one.dtype.names or CELLS in one.dtype.names:
            place = self._in_square(*one[PLACE].tolist()) if PLACE in one.dtype.names else (np.nan, np.nan)
            cells = one[CELLS].astype(np.int64).reshape(len(self._keys), -1) if CELLS in one.dtype.names else None
            labels = Labels(None if np.isnan(place).any() else place, cells)
        return RobotSample(
            images, self.dataset.tasks[int(one["task"])], one["state"].copy(), chunk_FHD[0], known_FH[0], labels
        )

    def _in_square(self, u: float, v: float) -> tuple[float, float]:
        """Where a place of the last camera's image is in the square that it is padded to."""
        key = next((key for key in reversed(self._keys) if key is not None), None)
        if key is None:
            return u, v
        shape = self.dataset.info.features[key].shape  # [H, W, 3], or the channels first
        height, width = shape[1:] if shape[0] == 3 else shape[:2]
        top, left, new_height, new_width = fit_square(height, width, self.image_size)
        return (left + u * new_width) / self.image_size, (top + v * new_height) / self.image_size

    def _chunks(
        self, e: int, at_F: NDArray[np.int64], first: int, records: NDArray[Any]
    ) -> tuple[Array, NDArray[np.bool_]]:
        """Chunks [F, H, D] of the frames at `at_F` of the records, which begin at frame `first`; and what is known."""
        if self._chunk:
            chunk_FHD = records["action"][at_F]
            return chunk_FHD, np.ones(chunk_FHD.shape[:2], dtype=bool)
        # An action is due one of the dataset's periods after its frame, so of those of one of the robot's periods, the
        # last one is due at its end.
        due_FH = at_F[:, None] + np.arange(1, self.horizon + 1) * self._stride - 1
        known_FH = due_FH + first < self.episodes[e].length
        chunk_FHD = records["action"][np.minimum(due_FH, self.episodes[e].length - 1 - first)]
        return chunk_FHD, known_FH | (self.ends == "hold")

    def _images(self, places: Sequence[tuple[int, int]]) -> dict[tuple[int, int], tuple[Image | None, ...]]:
        """The images of each frame; those that lie in one file are read in one go."""
        found: dict[tuple[int, int], list[Image | None]] = {place: [None] * len(self._keys) for place in places}
        due: list[tuple[list[Image | None], int, int]] = []
        wanted = []
        for (e, i), images in found.items():
            first = (int(self._begin_E[e]) + i) * len(self._keys)
            for v, key in enumerate(self._keys):
                if key is not None and (known := self._cache.get(first + v)) is not None:
                    images[v] = known
                elif key is not None:
                    due.append((images, v, first + v))
                    wanted.append(Wanted(self.episodes[e], i, int(self._row_E[e]), key))
        for number, rgb_HWC in self._pictures.read(wanted):
            images, v, place = due[number]
            images[v] = resized = resize_with_pad(rgb_HWC, self.image_size)
            self._cache.put(place, resized)
        return {place: tuple(images) for place, images in found.items()}

    def _read(self, e: int, first: int, count: int) -> NDArray[Any]:
        """The records of up to `count` frames of an episode from frame `first` on."""
        size = self._record.itemsize
        count = min(count, self.episodes[e].length - first)
        content = os.pread(self._file, count * size, (int(self._begin_E[e]) + first) * size)
        return np.frombuffer(content, dtype=self._record, count=count)

    def _plan_record(self) -> np.dtype[Any]:
        """What is kept of each frame."""
        actions: tuple[int, ...] = (len(self.robot.actions),)
        fields: list[Any] = [
            ("state", np.float64, (len(self.robot.state),)),
            ("action", np.float64, (self.horizon, *actions) if self._chunk else actions),
            ("task", np.int64),
        ]
        features = self.dataset.info.features
        if PLACE in features:
            if features[PLACE].shape != (2,):
                raise ConfigurationError(
                    f"{self.name}: {PLACE}: expected 2 numbers (u and v), got shape {features[PLACE].shape}"
                )
            fields.append((PLACE, np.float64, (2,)))
        if CELLS in features:
            if len(shape := features[CELLS].shape) != 1 or shape[0] % len(self._keys):
                raise ConfigurationError(
                    f"{self.name}: {CELLS}: expected as many numbers for each of {len(self._keys)} cameras, got shape "
                    f"{shape}"
                )
            fields.append((CELLS, np.int32, shape))
        return np.dtype(fields)

    def _read_tables(self) -> set[int]:
        """Check all episodes and write their records; the tasks that they have."""
        tasks: set[int] = set()
        for key, reason in self.dataset.ignored.items():
            if key != self._chunk:
                tqdm.write(f"{self.name}: {key} is left out: {reason}", file=sys.stderr)
        arrays = filter(None, [self._chunk])
        with self.dataset.reading(*arrays), self._writing(), open(self._file, "wb", closefd=False) as file:
            for e, episode in enumerate(tqdm(self.episodes, desc=self.name, unit="episode", delay=5)):
                columns = self.dataset.columns(episode)
                self._row_E[e] = self.dataset.first_row(episode)
                self.dataset.task_of(columns)
                records = np.zeros(episode.length, dtype=self._record)
                state_FS, action_FD = read_robot_columns(self.dataset, self.robot, columns, actions=not self._chunk)
                if self._chunk:
                    action_FD = read_robot_chunks(self.dataset, self.robot, columns, self._chunk, self.horizon)
                elif action_FD is None:
                    raise ConfigurationError(f"{self.name}: expected a column {' or '.join(ACTIONS)}, got none")
                self.ranges.add(episode.index, state_FS, action_FD)
                records["state"], records["action"], records["task"] = state_FS, action_FD, columns["task_index"]
                if PLACE in columns:
                    records[PLACE] = check_places(self.dataset, episode, columns[PLACE])
                if CELLS in columns:
                    records[CELLS] = check_cells(self.dataset, episode, columns[CELLS])
                tasks.update(np.unique(columns["task_index"]).tolist())
                file.write(records.tobytes())
        return tasks

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            needed_mb = self._record.itemsize * int(self._begin_E[-1] + self.episodes[-1].length) / 1e6
            raise ConfigurationError(
                f"{self.name}: expected room for {needed_mb:.0f} MB of its numbers in {tempfile.gettempdir()}, got "
                f"{error.strerror}; make room, or name another folder in TMPDIR"
            ) from error


def find_cameras(dataset: Dataset, robot: Robot) -> list[str | None]:
    """The dataset's key of each of the robot's cameras; None for an optional one that it has not."""
    keys: list[str | None] = []
    for camera in robot.cameras:
        if camera.optional and camera.key not in dataset.info.features:
            keys.append(None)
            continue
        try:
            keys.append(dataset.camera_key(camera.key))
        except ConfigurationError as error:
            raise ConfigurationError(
                f"{error}; name its key in the robot file, as `dataset` of camera {camera.name!r}, or write `optional: "
                "true` there if the policy runs without it"
            ) from None
    return keys


def find_stride(dataset: Dataset, robot: Robot, chunk: str | None) -> int:
    """How many of the dataset's frames make one of the robot's periods."""
    frames = dataset.info.fps * robot.action_period_s
    stride = round(frames)
    here = f"dataset {dataset.folder}"
    wanted = (
        f"{here}: expected {1.0 / robot.action_period_s:g} frames per second, as the robot's actions are "
        f"{robot.action_period_s:g} s apart"
    )
    remedy = f"set action_period_s of the robot file to {1.0 / dataset.info.fps:g}, or record at that rate"
    if stride < 1 or abs(frames - stride) > 1e-6 * stride:
        raise ConfigurationError(f"{wanted}, or a whole multiple of it, got {dataset.info.fps:g}; {remedy}")
    if stride > 1 and chunk is not None:
        raise ConfigurationError(f"{wanted} where {chunk} has whole chunks, got {dataset.info.fps:g}; {remedy}")
    if stride > 1 and (steps := [a for a in robot.actions if a.kind not in PLACES]):
        raise ConfigurationError(
            f"{wanted}, got {dataset.info.fps:g}: {steps[0].name!r} is a {steps[0].kind}, of which none may be left "
            f"out; {remedy}"
        )
    return stride


def choose_episodes(dataset: Dataset, chosen: slice | Sequence[int] | None) -> list[Episode]:
    """All, a slice of all, or those with these numbers."""
    here = f"dataset {dataset.folder}: episodes"
    if chosen is None or isinstance(chosen, slice):
        episodes = dataset.episodes[chosen or slice(None)]
    else:
        by_index = {episode.index: episode for episode in dataset.episodes}
        if unknown := [number for number in chosen if number not in by_index]:
            numbers = list(by_index)
            between = f"{numbers[0]} to {numbers[-1]}" if numbers else "none"
            raise ConfigurationError(f"{here}: expected numbers of episodes ({between}), got {unknown[0]!r}")
        if len(set(chosen)) != len(chosen):
            raise ConfigurationError(f"{here}: expected each once, got one twice")
        episodes = [by_index[number] for number in chosen]
    if not episodes:
        raise ConfigurationError(f"{here}: expected at least one of {len(dataset.episodes)}, got none")
    return episodes


def check_places(dataset: Dataset, episode: Episode, place_F2: NDArray[Any]) -> NDArray[Any]:
    """Outside of 0 to 1 is outside of the image; both nan: nowhere."""
    fine_F = np.isfinite(place_F2).all(axis=1) | np.isnan(place_F2).all(axis=1)
    if not fine_F.all():
        i = int(fine_F.argmin())
        raise InputError(
            f"dataset {dataset.folder}: episode {episode.index}: expected two numbers in {PLACE}, or nan twice for "
            f"none, got {place_F2[i].tolist()} for frame {i}"
        )
    return place_F2


def check_cells(dataset: Dataset, episode: Episode, cells_FN: NDArray[Any]) -> NDArray[Any]:
    wrong_F = ~((cells_FN >= 0) & (cells_FN < 1 << 16) & (cells_FN % 1 == 0)).all(axis=1)
    if wrong_F.any():
        i = int(wrong_F.argmax())
        raise InputError(
            f"dataset {dataset.folder}: episode {episode.index}: expected whole numbers from 0 on in {CELLS}, got "
            f"{cells_FN[i].min()} to {cells_FN[i].max()} for frame {i}"
        )
    return cells_FN
