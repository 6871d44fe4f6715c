"""Parts of a dataset, each made of one bag, become one dataset: tables are written anew, videos stay as they are.

A video is not copied but gets a second name (a hard link), so that this needs no room and no time, however large the
bags are.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ki_vla_ros.files import read_json
from training.convert.integrity import Report, stopped_report
from training.convert.parts import Part
from training.convert.statistics import FeatureFigures
from training.convert.writer import Tables
from training.data.lerobot import EPISODES, REPORTS, SOURCE, Dataset, Feature, Info, next_file
from training.storage import whole_folder

Place = tuple[int, int]
"""Chunk index and file index."""
PLACES = ("timestamp", "frame_index", "episode_index", "index", "task_index")  # of rows: the union has its own


def unite(parts: Sequence[Part], out: Path) -> tuple[Info, list[Report], dict[str, str]]:
    """Make the dataset `out` of all frames of `parts`, in their order; an earlier one there is replaced in one step.

    At least one part has frames. Returns what its meta/info.json says, a report of each episode, and by bag why one was
    left out: its joints or images are not those of the first.
    """
    filled = [part for part in parts if part.dataset is not None]
    refused = {}
    with whole_folder(out) as folder:
        union = _Union(folder, filled[0])
        for part in filled:
            if reason := union.misfit(part):
                refused[part.bag] = reason
            else:
                union.add(part)
        return *union.close(), refused


class _Union:
    def __init__(self, folder: Path, first: Part) -> None:
        assert first.dataset is not None
        self._first, self._info = first, Dataset(first.dataset).info
        features = {name: feature for name, feature in self._info.features.items() if feature.dtype != "video"}
        self._tables = Tables(folder, self._info.model_copy(update={"features": features}), list(first.pixels))
        self._reports: list[Report] = []
        self._sources: list[dict[str, Any]] = []
        self._next = dict.fromkeys(self._info.cameras, (0, 0))  # where the next file of each camera goes

    def misfit(self, part: Part) -> str | None:
        assert part.dataset is not None
        mine, first = Dataset(part.dataset).info.features, self._info.features
        for key in dict.fromkeys((*first, *mine)):
            wanted, got = (_told(features.get(key)) for features in (first, mine))
            if wanted != got:
                return (
                    f"bag {part.bag}: expected {key} as in {self._first.bag}, {wanted}, got {got}; convert it into a "
                    "separate dataset"
                )
        return None

    def add(self, part: Part) -> None:
        assert part.dataset is not None
        dataset = Dataset(part.dataset)
        self._sources.append(read_json(part.dataset / SOURCE))
        figures = _image_figures(part.dataset, list(part.pixels))
        places: dict[tuple[str, int, int], Place] = {}
        for episode, image_figures, report in zip_longest(dataset.episodes, figures, part.conversion.reports):
            index = {"episode_index": len(self._tables.episodes), "bag": Path(part.bag).name}
            self._reports.append(index | (report or stopped_report(episode.length)))
            columns, row = dataset.columns(episode), episode.row
            videos: dict[str, int | float] = {}
            for key in dataset.info.cameras:
                file = (key, row[f"videos/{key}/chunk_index"], row[f"videos/{key}/file_index"])
                if file not in places:
                    places[file] = self._take_video(part.dataset, *file)
                videos |= dict(
                    zip((f"videos/{key}/chunk_index", f"videos/{key}/file_index"), places[file], strict=True)
                )
                videos |= {name: row[name] for name in (f"videos/{key}/{end}_timestamp" for end in ("from", "to"))}
            own = {name: array for name, array in columns.items() if name not in PLACES}
            self._tables.add_episode(own, dataset.task_of(columns), videos, image_figures)
        for name, counts in part.pixels.items():
            self._tables.pixels[name].merge(counts)

    def close(self) -> tuple[Info, list[Report]]:
        """The rest of what the first is made from is that of all."""
        source = {**self._sources[0], "bags": [bag for source in self._sources for bag in source["bags"]]}
        info = self._tables.close(self._info.features, source)
        lines = [json.dumps(report, ensure_ascii=False) + "\n" for report in self._reports]
        (self._tables.folder / REPORTS).write_text("".join(lines), encoding="utf-8")
        return info, self._reports

    def _take_video(self, dataset: Path, key: str, chunk_index: int, file_index: int) -> Place:
        place, info = self._next[key], self._info
        assert info.video_path is not None
        file, name = (
            info.video_path.format(video_key=key, chunk_index=chunk, file_index=number)
            for chunk, number in ((chunk_index, file_index), place)
        )
        target = self._tables.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(dataset / file, target)
        except OSError:  # a file system without hard links
            shutil.copyfile(dataset / file, target)
        self._next[key] = next_file(*place, info.chunks_size)
        return place


def _told(feature: Feature | None) -> str:
    """What must be the same in all parts of a dataset."""
    if feature is None:
        return "none"
    if feature.dtype != "video":
        return f"{feature.dtype} of {', '.join(feature.element_names) or feature.shape}"
    height, width, _ = feature.shape
    information = feature.info or {}
    return f"{width} x {height} pixels, {information.get('video.codec')} {information.get('video.pix_fmt')}"


def _image_figures(dataset: Path, cameras: Sequence[str]) -> Iterator[dict[str, FeatureFigures]]:
    """Each episode's figures of images, by camera, from meta/episodes."""
    for path in sorted(dataset.glob(EPISODES.format(chunk_index=0, file_index=0).replace("000", "*"))):
        for row in pq.read_table(path).to_pylist():
            yield {
                name: {
                    key.removeprefix(prefix): value
                    for key, value in row.items()
                    if key.startswith(prefix := f"stats/{name}/")
                }
                for name in cameras
            }
