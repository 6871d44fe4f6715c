"""One bag's share of a dataset, on disk: converted once, kept until all bags of the dataset are in it.

    .DATASET.parts/BAG-1b2c3d4e/part.json    what was converted how, and what became of it
    .DATASET.parts/BAG-1b2c3d4e/dataset/     its frames, a dataset of their own; missing where there are none

A part being written has `.part` at the end of its name, until it is whole. So whoever is killed leaves parts that are
whole, and others that count as none.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.files import read_json
from ki_vla_ros.share import expand
from training.convert.episodes import Conversion
from training.convert.statistics import PixelCounts
from training.convert.writer import check_place
from training.data.lerobot import INFO
from training.storage import alone, sync, write_whole

PART: Final = "part.json"
DATASET: Final = "dataset"
FORMAT: Final = 1  # of what a part holds: those of another are converted again
Files = list[list[Any]]
"""Name, size and time of change in ns of each file of a bag."""


@dataclass(frozen=True)
class Part:
    """`whole`: all of the bag is in it, as it was while `files` were so; `pixels`: of each camera, over its frames."""

    folder: Path
    bag: str
    files: Files
    options: Mapping[str, str]
    whole: bool
    conversion: Conversion
    faults: Sequence[str]
    pixels: Mapping[str, PixelCounts]

    @property
    def dataset(self) -> Path | None:
        folder = self.folder / DATASET
        return folder if (folder / INFO).exists() else None


def list_files(bag: Path) -> Files:
    """What tells whether a bag is still the same: reading all of it to see would take as long as converting it."""
    paths = sorted(path for path in bag.iterdir() if path.is_file()) if bag.is_dir() else [bag]
    return [[path.name, (found := path.stat()).st_size, found.st_mtime_ns] for path in paths]


def part_folder(parts: Path, bag: Path) -> Path:
    place = str(bag.absolute())
    return parts / f"{bag.name[:100]}-{hashlib.sha256(place.encode(errors='surrogateescape')).hexdigest()[:8]}"


def write_part(part: Part) -> None:
    part.folder.mkdir(exist_ok=True)  # a bag without frames
    content = {
        "format": FORMAT,
        "bag": part.bag,
        "files": part.files,
        "options": part.options,
        "whole": part.whole,
        "conversion": {**vars(part.conversion), "left_out": dict(part.conversion.left_out)},
        "faults": part.faults,
        "pixels": {name: [counts.frames, counts.count_CV.tolist()] for name, counts in part.pixels.items()},
    }
    write_whole(part.folder / PART, json.dumps(content))


def read_part(folder: Path) -> Part | None:
    """None if there is none, or one that this version cannot read."""
    try:
        content = read_json(folder / PART)
        if content["format"] != FORMAT:
            return None
        pixels = {}
        for name, (frames, count_CV) in content["pixels"].items():
            pixels[name] = PixelCounts()
            pixels[name].frames, pixels[name].count_CV = frames, np.array(count_CV, dtype=np.int64)
        conversion = Conversion(**content["conversion"])
        conversion.left_out = Counter(conversion.left_out)
        same = {name: content[name] for name in ("bag", "files", "options", "whole", "faults")}
        return Part(folder=folder, conversion=conversion, pixels=pixels, **same)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def finish_part(writing: Path, folder: Path) -> None:
    """`writing` becomes the part `folder` for good, in place of an earlier one; its files are on the disk already."""
    sync(writing)
    clear_part(folder)
    writing.rename(folder)
    sync(folder.parent)


@contextmanager
def open_parts(out: Path) -> Iterator[Path]:
    """The folder of the parts of the dataset `out`, for this process alone; removed if there is nothing in it.

    ConfigurationError if there is such a dataset that is whole, another process makes it, or its place is no folder.
    """
    out = expand(out).absolute()
    check_place(out)
    parts = out.with_name(f".{out.name}.parts")
    shutil.rmtree(parts.with_suffix(".done"), ignore_errors=True)  # of one that was killed in `remove_parts`
    if out.exists() and not _is_made_of(out, parts):
        raise ConfigurationError(f"dataset {out} exists already; remove it or choose another --out")
    parts.mkdir(parents=True, exist_ok=True)
    with alone(parts, out):
        try:
            yield parts
        finally:
            if parts.exists() and not any(parts.iterdir()):
                parts.rmdir()


def remove_parts(parts: Path) -> None:
    """All at once for who comes after a kill: no dataset is begun anew because some parts of it are gone."""
    done = parts.with_suffix(".done")
    parts.rename(done)
    shutil.rmtree(done)


def _is_made_of(out: Path, parts: Path) -> bool:
    """Whether a dataset is what an earlier run made of these parts: they share their videos."""
    made, there = ({path.stat().st_ino for path in folder.rglob("*.mp4")} for folder in (out, parts))
    return bool(made) and made <= there


def find_begun(writing: Path, options: Mapping[str, str]) -> Part | None:
    """What there is of a bag whose conversion was stopped."""
    part = read_part(writing)
    return part if part is not None and part.options == options else None


def find_part(parts: Path, bag: Path, options: Mapping[str, str]) -> Part | str | None:
    """The whole part of a bag that is still the same; or why there is none (None: it was never converted).

    ConfigurationError if it was converted with other options.
    """
    folder = part_folder(parts, bag)
    if not (folder.exists() and bag.exists()):
        return None
    part = read_part(folder)
    if part is None:
        return "what was converted of it is another version's"
    if part.options != options:
        other = next(name for name in sorted({*options, *part.options}) if options.get(name) != part.options.get(name))
        raise ConfigurationError(
            f"bag {bag}: expected the options with which the conversion in {parts} began, got {other} "
            f"{options.get(other, 'not given')} (there: {part.options.get(other, 'not given')}); give the same "
            f"options to go on, or remove {parts} to begin anew"
        )
    return part if part.files == list_files(bag) else "it has changed since it was converted"


def clear_part(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
