"""Single images out of a dataset's files, without reading the rest: of videos, of tables, and beside tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ki_vla_ros.errors import ConfigurationError, InputError
from training.data.lerobot.dataset import Dataset
from training.data.lerobot.layout import MIB
from training.data.lerobot.meta import Episode
from training.data.lerobot.tables import described, open_parquet, read_group, read_rows
from training.data.lerobot.video import TOLERANCE, VideoReader
from training.data.recent import Recent

OPEN_FILES: Final = 16
TABLE_BYTES: Final = 256 * MIB


class Wanted(NamedTuple):
    """Frame `frame` of an episode, whose first row is `row` in its table, as the camera with this key saw it."""

    episode: Episode
    frame: int
    row: int
    key: str


class _Table(NamedTuple):
    """A table's file, and after how many rows each of its groups ends."""

    file: pq.ParquetFile
    end_G: NDArray[np.int64]

    @classmethod
    def open(cls, path: Path, key: str) -> _Table:
        file = open_parquet(path, key)
        rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        return cls(file, np.cumsum(rows, dtype=np.int64))

    def close(self) -> None:
        self.file.close()


class Pictures:
    """Reads images at random. Open files and pieces of tables are kept, of each a bounded number."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self._videos: Recent[VideoReader] = Recent(OPEN_FILES, close=VideoReader.close)
        self._tables: Recent[_Table] = Recent(OPEN_FILES, close=_Table.close)
        self._groups: Recent[pa.ChunkedArray | None] = Recent(TABLE_BYTES, size=lambda c: c.nbytes if c else 0)

    def read(self, wanted: Sequence[Wanted]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Number in `wanted` and image [H, W, 3] of each, file by file, in the order in which the files have them.

        InputError names file, episode and frame of an image that is not there, or broken.
        """
        files: dict[tuple[Path, str], list[tuple[float, int]]] = defaultdict(list)
        for number, one in enumerate(wanted):
            if self.dataset.info.features[one.key].dtype == "image":
                files[self.dataset.table_of(one.episode), one.key].append((one.row + one.frame, number))
            else:
                path, from_s = self.dataset.video_of(one.episode, one.key)
                files[path, ""].append((from_s + one.frame / self.dataset.info.fps, number))
        for (path, key), places in files.items():
            for place, number in sorted(places):
                where = f"episode {wanted[number].episode.index}, frame {wanted[number].frame}: "
                if key:
                    rgb_HWC = self._from_table(path, key, int(place), where)
                else:
                    rgb_HWC = self._from_video(path, place, where)
                yield number, rgb_HWC

    def close(self) -> None:
        self._videos.clear()
        self._tables.clear()
        self._groups.clear()

    def _from_video(self, path: Path, due_s: float, where: str) -> NDArray[np.uint8]:
        try:
            return self._videos.get(path, lambda: VideoReader(path, threads=1)).read(
                due_s, TOLERANCE / self.dataset.info.fps
            )
        except InputError as error:
            self._videos.drop(path)
            raise InputError(f"{where}{error}") from error

    def _from_table(self, path: Path, key: str, row: int, where: str) -> NDArray[np.uint8]:
        try:
            with described(self.dataset.folder):
                table = self._tables.get(path, lambda: _Table.open(path, key))
                group = int(np.searchsorted(table.end_G, row, side="right"))
                most, begin = TABLE_BYTES // 2, int(table.end_G[group - 1]) if group else 0
                column = self._groups.get((path, key, group), lambda: read_group(path, table.file, key, group, most))
                value = column[row - begin].as_py() if column is not None else next(read_rows(path, key, row, 1))
        except (ConfigurationError, InputError) as error:
            self._tables.drop(path)
            raise InputError(f"{where}{error}") from error
        return self.dataset.decode(f"{path}: {where}{key}", value)
