"""What the vision-language data sets have in common: a row becomes a sample, and what is wrong with it has a place."""

from __future__ import annotations

import math
import os
import sys
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from tqdm import tqdm

from ki_vla_ros.errors import ConfigurationError, InputError, did_you_mean, printable, short_repr
from ki_vla_ros.files import read_file
from ki_vla_ros.messages import decode_compressed
from ki_vla_ros.policy import resize_with_pad
from ki_vla_ros.robot import Frozen
from training.data.language.places import ANYWHERE, Frame, only_place
from training.data.samples import Image, Labels, LanguageSample
from training.tokens import check_text

LARGEST_IMAGE: Final = 64 << 20
MOST_IMAGES: Final = 32
LOOKED_AT: Final = 4  # samples that are tried when a data set is opened
NAMED: Final = 5  # broken samples of a data set that are named in a run; all are counted
OWN_KEYS: Final = ("place", "cells")
# What files have beside a sample, and no training needs.
PASSED_OVER: Final = ("id", "image_id", "question_id", "width", "height", "size", "source", "split", "metadata")


class Entry(Frozen):
    """What all vision-language data sets of a configuration may say."""

    weight: Annotated[float, Field(gt=0)] = Field(default=1.0, description="how often, beside the others of the list")
    images: Path | None = Field(
        default=None, description="the folder that images are named in; if none is given, that of the file"
    )
    ignore: tuple[str, ...] = Field(default=(), description="keys or columns of the file that may be left alone")
    broken_percent: Annotated[float, Field(ge=0, lt=100)] = Field(
        default=0.0,
        description="how many of a hundred samples may be broken: the next one takes their place, and they are counted "
        "in the log; 0: the first is an error",
    )


@dataclass(frozen=True)
class Record:
    """A row before its images are read; `write` makes prefix and suffix, whose places are in the last image."""

    images: Sequence[Path | bytes]
    write: Callable[[Frame], tuple[str, str]]
    place: tuple[float, float] | None = None
    cells: Sequence[Sequence[int]] | None = None


class LanguageData(ABC):
    """A vision-language data set of a file: `len` and `read` are its format's, the rest is the same for all."""

    def __init__(self, path: Path, size: int, broken_percent: float) -> None:
        """`size`: side of the images that samples have; `broken_percent` as of `Entry`."""
        self.name, self.path, self.size, self._broken_percent = str(path), path, size, broken_percent
        self.notes: list[str] = []
        # The samples that were passed over: on disk, since the processes that make batches are forks of the trainer.
        file, name = tempfile.mkstemp()
        os.close(file)
        self._passed_over = os.open(name, os.O_RDWR | os.O_APPEND)
        weakref.finalize(self, os.close, self._passed_over)
        os.unlink(name)

    def look(self) -> None:
        """Try the first samples, as a check on opening; ConfigurationError if they cannot be used."""
        if not len(self):
            raise ConfigurationError(f"{self.path}: expected samples, got none: {'; '.join(self.notes) or 'no rows'}")
        for row in range(min(LOOKED_AT, len(self))):
            try:
                self.take([row])
            except InputError as error:
                raise ConfigurationError(
                    f"{error}; 'python -m training.data check' names all that is broken"
                ) from error

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def where(self, row: int) -> str:
        """The file and line, or row, of a sample."""

    @abstractmethod
    def read(self, row: int) -> Record:
        """InputError says what is wrong, not where."""

    def take(self, rows: Sequence[int]) -> list[LanguageSample]:
        """In the place of a broken sample the next one, as far as `broken_percent` allows."""
        return [self._take(int(row)) for row in rows]

    def one(self, row: int) -> LanguageSample:
        """This sample; InputError says where it is and what is wrong with it."""
        try:
            return self._finish(self.read(row))
        except InputError as error:
            raise InputError(f"{self.where(row)}: {error}") from error

    def texts(self) -> Iterator[str]:
        """Of all samples that can be read; whoever takes one of the others is told why not."""
        for row in range(len(self)):
            try:
                yield from self._write(self.read(row), ANYWHERE)
            except InputError:
                continue

    def told(self) -> str | None:
        """How many samples were passed over until now, and the first of them; None if none was."""
        if not (broken := self.broken):
            return None
        first = [f"\n  {reason}" for reason in list(broken.values())[:NAMED]]
        more = f"\n  and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
        return (
            f"{self.path}: {len(broken)} of {len(self)} samples are broken and were passed over since this process "
            f"began ('python -m training.data check' names all that is broken):{''.join(first)}{more}"
        )

    @property
    def broken(self) -> dict[int, str]:
        """By row: the samples that this process and its forks have passed over until now, and why."""
        content = os.pread(self._passed_over, os.fstat(self._passed_over).st_size, 0).decode()
        return {int(line.partition(" ")[0]): line.partition(" ")[2] for line in content.splitlines()}

    def _take(self, row: int) -> LanguageSample:
        while True:  # ends: each turn finds a whole sample or another broken one, of which there may be only so many
            try:
                return self.one(row)
            except InputError as error:
                known = self.broken
                if row not in known:
                    if 100 * (len(known) + 1) > self._broken_percent * len(self):
                        before = f"; passed over before: {len(known)}" if known else ""
                        raise InputError(f"{error}{before}") from error
                    os.write(self._passed_over, f"{row} {' '.join(str(error).split())}\n".encode())
                    if len(known) < NAMED:  # now, since a run that is killed does not come to its end
                        tqdm.write(printable(f"{error}; passed over, the next sample takes its place"), file=sys.stderr)
            row = (row + 1) % len(self)

    def _finish(self, record: Record) -> LanguageSample:
        pixels = [self._decode(image) for image in record.images]
        frame = Frame.of(pixels[-1].shape[1], pixels[-1].shape[0], self.size) if pixels else ANYWHERE
        prefix, suffix = self._write(record, frame)
        if not suffix.strip() and (record.cells is None or prefix.strip()):
            raise InputError("expected an answer, got an empty one")
        place = only_place(suffix) if record.place is None else frame.place(*record.place)
        cells_VN = None if record.cells is None else _cells(record.cells, pixels)
        images = tuple(resize_with_pad(rgb_HWC, self.size) for rgb_HWC in pixels)
        return LanguageSample(images, prefix, suffix, Labels(place if pixels else None, cells_VN))

    def _write(self, record: Record, frame: Frame) -> tuple[str, str]:
        prefix, suffix = record.write(frame)
        for text in (prefix, suffix):
            check_text(text)
            if not text.isascii():
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    raise InputError(f"text: expected characters, got half of one in {text[:80]!r}") from error
        return prefix, suffix

    def _decode(self, image: Path | bytes) -> Image:
        if isinstance(image, bytes):
            return decode_compressed("image", image)
        try:
            content = read_file(image, LARGEST_IMAGE)
        except FileNotFoundError:
            raise InputError(f"image: expected {image}, found no such file") from None
        except (OSError, ValueError) as error:  # a name may have a zero byte in it
            raise InputError(f"image: expected a file, got none ({error})") from error
        return decode_compressed(f"image {image}", content)


def value_of(content: Mapping[str, Any], names: Sequence[str], what: str, needed: bool = True) -> Any:
    """The value of the one of `names` that the row has; InputError for several, or for none if it is needed."""
    found = [name for name in names if content.get(name) is not None]
    if len(found) > 1:
        raise InputError(f"expected one {what}, got {' and '.join(found)}")
    if not found and needed:
        raise InputError(f"expected {what} ({' or '.join(names)}), got the keys {short_repr(list(content))}")
    return content[found[0]] if found else None


def check_keys(content: Mapping[str, Any], known: Sequence[str]) -> None:
    """InputError names a key that nobody reads: it may be another one, misspelt."""
    for key in content:
        if key not in known and key not in OWN_KEYS and key not in PASSED_OVER:
            near = did_you_mean(key, [*known, *OWN_KEYS])
            raise InputError(f"{short_repr(key)}: expected no such key{near}; if it is of no use, list it under ignore")


def text_of(value: Any, what: str) -> str:
    """A text, or a number as text."""
    if _is_number(value):
        return str(value)
    if not isinstance(value, str):
        raise InputError(f"{what}: expected a text, got {short_repr(value)}")
    return value


def name_images(value: Any, folder: Path) -> list[Path]:
    """The files of one name or a list of them."""
    names = value if isinstance(value, list) else [value]
    if len(names) > MOST_IMAGES:
        raise InputError(f"image: expected at most {MOST_IMAGES} images, got {len(names)}")
    for name in names:
        if not isinstance(name, str) or not name:
            raise InputError(f"image: expected the name of a file, got {short_repr(name)}")
        if name.startswith(("http://", "https://", "gs://", "s3://", "data:")):
            raise InputError(f"image: expected the name of a file, got {short_repr(name)}; download it first")
    return [folder / name for name in names]


def read_labels(content: Mapping[str, Any]) -> dict[str, Any]:
    """`place` and `cells` of a row, for `Record`; InputError if they have another form."""
    place, cells = content.get("place"), content.get("cells")
    if place is not None:
        if not isinstance(place, list) or len(place) != 2 or not all(map(_is_number, place)):
            raise InputError(f"place: expected [u, v] in 0 to 1, got {short_repr(place)}")
        place = (float(place[0]), float(place[1]))
    if cells is not None:
        rows = cells if isinstance(cells, list) and all(isinstance(row, list) for row in cells) else [cells]
        if not all(isinstance(row, list) and all(type(cell) is int and cell >= 0 for cell in row) for row in rows):
            raise InputError(f"cells: expected a list of whole numbers for each image, got {short_repr(cells)}")
        cells = rows
    return {"place": place, "cells": cells}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _cells(cells: Sequence[Sequence[int]], pixels: Sequence[Image]) -> NDArray[np.int64]:
    counts = {len(row) for row in cells}
    if len(cells) != len(pixels) or len(counts) != 1 or math.isqrt(count := counts.pop()) ** 2 != count or not count:
        raise InputError(
            f"cells: expected a square of cells for each of {len(pixels)} images, got {[len(row) for row in cells]}"
        )
    if any(rgb_HWC.shape[0] != rgb_HWC.shape[1] for rgb_HWC in pixels):
        raise InputError("cells: expected square images, whose cells are those that the model sees, got another shape")
    return np.array(cells, dtype=np.int64)
