"""Parquet files with images inside, as the Hugging Face Hub has them: captions, questions and answers, labelled boxes.

A row's images are structs of bytes and path, or bytes; the texts are in columns, or in parts of them (`objects.bbox`).
Several captions of an image are a sample each; of several answers to a question the most frequent counts.
"""

from __future__ import annotations

import json
import re
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from ki_vla_ros.errors import ConfigurationError, InputError, short_repr
from ki_vla_ros.files import check_file
from training.data.language.places import ANYWHERE, Frame, Unit
from training.data.language.records import OWN_KEYS, Entry, LanguageData, Record, name_images, read_labels, text_of
from training.tokens import check_text

IMAGE: Final = ("image", "images", "img", "picture")
QUESTION: Final = ("question", "query", "instruction", "problem", "prefix", "prompt")
ANSWER: Final = ("answer", "multiple_choice_answer", "answers", "suffix", "response", "solution", "label")
CAPTION: Final = ("caption", "captions", "text", "sentences", "description")
BOX: Final = ("bbox", "bboxes", "boxes", "objects.bbox")
LABEL: Final = ("label", "labels", "category", "objects.category", "objects.label", "objects.categories")
TASKS: Final = (  # the columns that a sample of each needs
    {"question": QUESTION, "answer": ANSWER},
    {"bbox": BOX, "label": LABEL},
    {"caption": CAPTION},
)
Write = Callable[[Frame], tuple[str, str]]
AT_ONCE: Final = 16  # rows in memory while one is looked for
_SPLIT: Final = re.compile(r"(train|test|val|validation|dev)(?![a-z])")


class ParquetEntry(Entry):
    """`{parquet: FILE or FOLDER}`; columns that are not named are recognised by their usual names."""

    parquet: Path = Field(description="a file, a folder of shards, or a pattern such as FOLDER/train-*.parquet")
    image: str | None = None
    question: str | None = None
    answer: str | None = None
    caption: str | None = None
    bbox: str | None = Field(
        default=None, description="boxes of a row, one or a list; objects.bbox is a part of objects"
    )
    label: str | None = Field(default=None, description="what is in the boxes")
    boxes: Literal["xywh", "xyxy"] | None = Field(
        default=None, description="a corner, width and height (COCO), or two corners; needed where there are boxes"
    )
    unit: Unit = Field(default="pixels", description="of the boxes' numbers")
    prefix: str | None = Field(
        default=None,
        description="how a sample begins: '{question}' for questions, 'caption en' for captions, 'detect {label}' for "
        "boxes; PaliGemma's own questions begin with 'answer en {question}'",
    )


class ParquetData(LanguageData):
    """A sample for each row, or for each caption of it."""

    def __init__(self, entry: ParquetEntry, size: int) -> None:
        super().__init__(entry.parquet, size, entry.broken_percent)
        self.entry, self.folder = entry, entry.images
        self.files = find_files(entry.parquet)
        self.groups: list[list[int]] = []  # of each file, the row that each group begins with, and the file's end
        schema: pa.Schema | None = None
        for path in self.files:
            with _opened(path) as file:
                counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
                self.groups.append([0, *accumulate(counts)])
                if schema is not None and not schema.equals(file.schema_arrow):
                    raise ConfigurationError(
                        f"{path}: expected the columns of {self.files[0].name} ({', '.join(schema.names)}), got "
                        f"{', '.join(file.schema_arrow.names)} or other types; name a part, such as "
                        "FOLDER/train-*.parquet"
                    )
                schema = schema or file.schema_arrow
        assert schema is not None
        self.first_row = [0, *accumulate(groups[-1] for groups in self.groups)]
        self.chosen = choose_columns(entry, schema)
        tops = {name.partition(".")[0] for name in self.chosen.values()}
        self.columns = [name for name in schema.names if name in tops or name in OWN_KEYS]
        self.notes.append(f"columns: {', '.join(f'{what}: {name}' for what, name in self.chosen.items())}")
        self.label_names = read_label_names(schema, self.chosen.get("label") or self.chosen.get("answer", ""))
        self._sample_row, self._part = array("q"), array("H")
        if "caption" not in self.chosen:
            self._sample_row.extend(range(self.first_row[-1]))
        else:
            for row, content in enumerate(self._rows([self.chosen["caption"].partition(".")[0]])):
                captions = self._of(content, "caption")
                parts = max(1, len(captions)) if isinstance(captions, list) else 1
                self._sample_row.extend([row] * parts)
                self._part.extend(range(parts))

    def __len__(self) -> int:
        return len(self._sample_row)

    def where(self, row: int) -> str:
        number = self._sample_row[row]
        file = bisect_right(self.first_row, number) - 1
        part = f", caption {self._part[row] + 1}" if self._part and self._part[row] else ""
        return f"{self.files[file]}: row {number - self.first_row[file]}{part}"

    def read(self, row: int) -> Record:
        content = self._row(self._sample_row[row])
        images = self._images(self._of(content, "image"))
        return Record(images, self._texts(row, content), **read_labels(content))

    def texts(self) -> Iterator[str]:
        """As of the other data sets, without reading any image."""
        image = self.chosen["image"].partition(".")[0]
        contents = self._rows([name for name in self.columns if name != image])
        at, content = -1, dict[str, Any]()
        for row, number in enumerate(self._sample_row):
            while at < number:
                at, content = at + 1, next(contents)
            with suppress(InputError):
                yield from self._write(Record((), self._texts(row, content)), ANYWHERE)

    def _texts(self, row: int, content: dict[str, Any]) -> Write:
        if "question" in self.chosen:
            return self._asked(self._of(content, "question"), self._of(content, "answer"))
        if "bbox" in self.chosen:
            return self._boxed(self._of(content, "bbox"), self._of(content, "label"))
        captions = self._of(content, "caption")
        return self._captioned(captions[self._part[row]] if isinstance(captions, list) and captions else captions)

    def _of(self, content: dict[str, Any], what: str) -> Any:
        return _part(content, self.chosen[what])

    def _row(self, number: int) -> dict[str, Any]:
        """One row's columns; a few rows are in memory at a time."""
        index = bisect_right(self.first_row, number) - 1
        path, groups, row = self.files[index], self.groups[index], number - self.first_row[index]
        group = bisect_right(groups, row) - 1
        begin = groups[group]
        try:
            with _opened(path) as file:
                for part in file.iter_batches(AT_ONCE, row_groups=[group], columns=self.columns, use_threads=False):
                    if row < begin + len(part):
                        return dict(part.slice(row - begin, 1).to_pylist()[0])
                    begin += len(part)
        except ConfigurationError as error:
            raise InputError(f"expected a table that can be read, got a damaged one ({error})") from error
        raise InputError(f"expected {groups[group + 1] - groups[group]} rows in its group, got fewer")

    def _rows(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """These columns of all rows, in order."""
        for path in self.files:
            with _opened(path) as file:
                for part in file.iter_batches(batch_size=1024, columns=columns, use_threads=False):
                    yield from part.to_pylist()

    def _images(self, value: Any) -> list[Path | bytes]:
        images: list[Path | bytes] = []
        for image in value if isinstance(value, list) else [value]:
            content = image.get("bytes") if isinstance(image, dict) else image
            if isinstance(content, bytes):
                images.append(content)
            elif (isinstance(image, dict) and image.get("path")) or isinstance(image, str):
                folder = self.folder or self.files[0].parent
                images += name_images(image["path"] if isinstance(image, dict) else image, folder)
            else:
                raise InputError(f"image: expected bytes or a path, got {short_repr(image)}")
        return images

    def _asked(self, question: Any, answer: Any) -> Write:
        if isinstance(answer, list):
            answers = [text_of(item.get("answer") if isinstance(item, dict) else item, "answer") for item in answer]
            if not answers:
                raise InputError("answer: expected at least one, got an empty list")
            answer = Counter(answers).most_common(1)[0][0]
        if isinstance(answer, int) and self.label_names:
            answer = self._label(answer)
        asked, answer = text_of(question, "question"), text_of(answer, "answer")
        prefix = (self.entry.prefix or "{question}").replace("{question}", asked)
        check_text(prefix)
        check_text(answer)
        return lambda frame: (frame.move(prefix), frame.move(answer))

    def _captioned(self, caption: Any) -> Write:
        text = text_of(caption, "caption")
        check_text(text)
        return lambda frame: (self.entry.prefix or "caption en", frame.move(text))

    def _boxed(self, boxes: Any, labels: Any) -> Write:
        if isinstance(boxes, list) and boxes and not isinstance(boxes[0], list | dict):
            boxes = [boxes]
        labels = labels if isinstance(labels, list) else [labels]
        if not isinstance(boxes, list) or not boxes:
            raise InputError(f"bbox: expected at least one box, got {short_repr(boxes)}")
        if len(labels) != len(boxes):
            raise InputError(f"label: expected one for each of {len(boxes)} boxes, got {len(labels)}")
        names = [self._label(label) for label in labels]
        prefix = (self.entry.prefix or "detect {label}").replace("{label}", " ; ".join(dict.fromkeys(names)))
        corners = [self._corners(box) for box in boxes]

        def write(frame: Frame) -> tuple[str, str]:
            unit = self.entry.unit
            found = [f"{frame.box(box, unit)} {name}" for box, name in zip(corners, names, strict=True)]
            return prefix, " ; ".join(found)

        return write

    def _label(self, label: Any) -> str:
        if isinstance(label, int) and self.label_names:
            if not 0 <= label < len(self.label_names):
                raise InputError(f"label: expected 0 to {len(self.label_names) - 1}, got {label}")
            return self.label_names[label]
        if isinstance(label, int):
            raise InputError(f"label: expected a name, got the number {label}, and the file has no names for it")
        return text_of(label, "label")

    def _corners(self, box: Any) -> list[float]:
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(x, int | float) for x in box):
            raise InputError(f"bbox: expected four numbers, got {short_repr(box)}")
        x0, y0, x1, y1 = map(float, box)
        return [x0, y0, x0 + x1, y0 + y1] if self.entry.boxes == "xywh" else [x0, y0, x1, y1]


def choose_columns(entry: ParquetEntry, schema: pa.Schema) -> dict[str, str]:
    """Image and texts by what they are: as the configuration names them, else by the first usual names."""
    known, where = list(_paths(schema)), entry.parquet

    def choose(what: str, usual: Sequence[str]) -> str | None:
        named: str | None = getattr(entry, what)
        if named is None:
            return next((name for name in usual if name in known), None)
        if named not in known:
            raise ConfigurationError(f"{where}: {what}: expected one of {', '.join(known)}, got {named!r}")
        return named

    named = [task for task in TASKS if any(getattr(entry, what) is not None for what in task)]
    if len(named) > 1:
        raise ConfigurationError(
            f"{where}: expected columns of one task, got those of {len(named)}; list the file once for each"
        )
    for task in named or TASKS:
        found = {what: choose(what, usual) for what, usual in {"image": IMAGE, **task}.items()}
        chosen = {what: name for what, name in found.items() if name is not None}
        if len(chosen) == len(found):
            break
    else:
        raise ConfigurationError(
            f"{where}: expected image, and question and answer, bbox and label, or caption, got {', '.join(known)}; "
            "name the columns, such as image: photo"
        )
    if "bbox" in chosen and entry.boxes is None:
        raise ConfigurationError(
            f"{where}: boxes: expected xywh (a corner, width and height) or xyxy (two corners) for {chosen['bbox']}, "
            "got none"
        )
    return chosen


def find_files(path: Path) -> list[Path]:
    """The shards, by name; ConfigurationError for none, or for those of several splits."""
    if path.is_dir():
        files = sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))
    elif "*" in path.name:
        files = sorted(path.parent.glob(path.name))
    else:
        files = [path]
    if not files:
        raise ConfigurationError(f"{path}: expected a parquet file, or a folder of them, found none")
    splits = {found[1] for file in files if (found := _SPLIT.match(file.name))}
    if len(splits) > 1:
        raise ConfigurationError(
            f"{path}: expected the files of one split, got those of {', '.join(sorted(splits))}; name one, such as "
            f"{files[0].parent}/{sorted(splits)[-1]}*.parquet"
        )
    return files


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        check_file(path)
        with pq.ParquetFile(path) as file:
            yield file
    except FileNotFoundError:
        raise ConfigurationError(f"{path}: expected a parquet file, found none") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ConfigurationError(f"{path}: expected a whole parquet file, got another ({error})") from error


def _paths(schema: pa.Schema) -> Iterator[str]:
    """The columns, and the parts of those that are structs or lists of structs."""
    for column in schema:
        yield column.name
        kind = column.type
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            kind = kind.value_type
        if pa.types.is_struct(kind):
            yield from (f"{column.name}.{part.name}" for part in kind)


def _part(row: Any, path: str) -> Any:
    """A column of a row, or the part of one; of a list the parts of its items."""
    top, _, rest = path.partition(".")
    value = row.get(top)
    if not rest:
        return value
    return [item.get(rest) for item in value] if isinstance(value, list) else (value or {}).get(rest)


def read_label_names(schema: pa.Schema, label: str) -> list[str]:
    """The names of numbered labels, as `datasets` writes them into the file; empty where it does not."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return []
    return next(_class_labels(features, label.split(".")), [])


def _class_labels(feature: Any, path: Sequence[str]) -> Iterator[list[str]]:
    if isinstance(feature, list):
        for item in feature:
            yield from _class_labels(item, path)
    elif isinstance(feature, dict):
        if not path and feature.get("_type") == "ClassLabel" and isinstance(feature.get("names"), list):
            yield [str(name) for name in feature["names"]]
        elif path and path[0] in feature:
            yield from _class_labels(feature[path[0]], path[1:])
        elif "feature" in feature:
            yield from _class_labels(feature["feature"], path)
