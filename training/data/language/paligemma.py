"""PaliGemma's files: on each line an image, a prefix and a suffix, in which places are tokens (big_vision's jsonl)."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from pydantic import Field

from ki_vla_ros.errors import InputError
from training.data.language.places import Frame
from training.data.language.records import (
    Entry,
    LanguageData,
    Record,
    check_keys,
    name_images,
    read_labels,
    text_of,
    value_of,
)
from training.data.language.rows import Rows
from training.tokens import check_text

# big_vision's transfers make prefix and suffix of such keys; a configuration may name others.
IMAGE: Final = ("image", "images", "image_path", "file_name")
PREFIX: Final = ("prefix", "question", "prompt")
SUFFIX: Final = ("suffix", "label", "answer", "caption", "text")


class PaliGemmaEntry(Entry):
    """`{paligemma: FILE.jsonl}`: {"image": "a.png", "prefix": "detect mug", "suffix": "<loc0100>... mug"} on a line."""

    paligemma: Path
    prefix: str | None = Field(default=None, description="the prefix of rows that have none, such as 'caption en'")


class PaliGemmaData(LanguageData):
    """A sample for each line."""

    def __init__(self, entry: PaliGemmaEntry, size: int) -> None:
        super().__init__(entry.paligemma, size, entry.broken_percent)
        self.rows = Rows(entry.paligemma)
        self.folder = entry.images or entry.paligemma.parent
        self.prefix, self.ignored = entry.prefix, entry.ignore

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, row: int) -> str:
        return self.rows.where(row)

    def read(self, row: int) -> Record:
        content = self.rows.read(row)
        content = {key: value for key, value in content.items() if key not in self.ignored}
        check_keys(content, (*IMAGE, *PREFIX, *SUFFIX))
        images = name_images(value_of(content, IMAGE, "image"), self.folder)
        needed = content.get("cells") is None
        suffix, prefix = value_of(content, SUFFIX, "suffix", needed), value_of(content, PREFIX, "prefix", needed=False)
        if prefix is None and self.prefix is None and needed:
            raise InputError("prefix: expected one in the row, or for all rows in the configuration, got none")
        suffix = "" if suffix is None else text_of(suffix, "suffix")
        prefix = (self.prefix or "") if prefix is None else text_of(prefix, "prefix")

        def write(frame: Frame) -> tuple[str, str]:
            check_text(prefix)
            check_text(suffix)
            return frame.move(prefix), frame.move(suffix)

        return Record(images, write, **read_labels(content))
