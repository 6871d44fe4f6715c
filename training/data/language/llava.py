"""Conversations about images, as LLaVA and Qwen-VL have them: a sample for each answer, after all that was said before.

A file is one list, or has an object on each line: {"image": "a.jpg", "conversations": [{"from": "human", "value":
"<image>\\nWhere is the mug?"}, {"from": "gpt", "value": "<box>(120,300),(260,480)</box>"}]}; or with `images`,
`messages`, `role` and `content`. Boxes become PaliGemma's places.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field

from ki_vla_ros.errors import InputError, short_repr
from training.data.language.places import Frame, Unit, write_boxes
from training.data.language.records import Entry, LanguageData, Record, check_keys, name_images, read_labels, value_of
from training.data.language.rows import Rows
from training.tokens import check_text

IMAGE: Final = ("image", "images")
TURNS: Final = ("conversations", "conversation", "messages")
WHO: Final = ("from", "role")
WHAT: Final = ("value", "content")
ASKING: Final = ("human", "user")
ANSWERING: Final = ("gpt", "assistant")
MARK: Final = re.compile(r"[ \t]*<image>[ \t]*\n?")


class LlavaEntry(Entry):
    """`{llava: FILE.json, images: FOLDER}`."""

    llava: Path
    boxes: Unit = Field(
        default="thousandths",
        description="what a box's numbers are: thousandths (Qwen-VL, Qwen2-VL, Qwen3-VL, InternVL), pixels "
        "(Qwen2.5-VL) or fractions of the image's width and height",
    )
    text_only: Literal["leave out", "keep"] = Field(
        default="leave out", description="rows without an image; those left out are counted and named"
    )


class LlavaData(LanguageData):
    """A sample for each answer."""

    def __init__(self, entry: LlavaEntry, size: int) -> None:
        super().__init__(entry.llava, size, entry.broken_percent)
        self.rows = Rows(entry.llava)
        self.folder = entry.images or entry.llava.parent
        self.boxes, self.ignored = entry.boxes, entry.ignore
        # The row of each sample, and which of its answers it is. A broken row counts as one sample, so it is missed.
        self._row, self._answer = array("q"), array("H")
        left_out: list[int] = []
        for row, content in enumerate(self.rows):
            if isinstance(content, InputError):
                answers = 1
            elif entry.text_only == "leave out" and not _shows_something(content):
                left_out.append(row)
                continue
            else:
                answers = max(1, _count_answers(content))
            self._row.extend([row] * answers)
            self._answer.extend(range(answers))
        if left_out:
            self.notes.append(
                f"{len(left_out)} rows without an image left out (text_only: leave out), the first: "
                f"{self.rows.where(left_out[0])}"
            )

    def __len__(self) -> int:
        return len(self._row)

    def where(self, row: int) -> str:
        answers = f", answer {self._answer[row] + 1}" if self._answer[row] else ""
        return self.rows.where(self._row[row]) + answers

    def read(self, row: int) -> Record:
        content = {key: value for key, value in self.rows.read(self._row[row]).items() if key not in self.ignored}
        check_keys(content, (*IMAGE, *TURNS))
        listed = name_images(value_of(content, IMAGE, "image", needed=False) or [], self.folder)
        turns, named = read_turns(value_of(content, TURNS, "conversation"))
        images = [*listed, *name_images(named, self.folder)]
        marks = sum(turn.count("<image>") for turn in turns)
        if marks not in (0, len(listed)):
            raise InputError(f"<image>: expected it once for each of {len(listed)} images, got it {marks} times")
        last = 2 * self._answer[row] + 1
        before, answer = [MARK.sub("", turn).strip() for turn in turns[:last]], turns[last].strip()
        if "<image>" in answer:
            raise InputError("expected <image> in questions alone, got it in an answer")

        def write(frame: Frame) -> tuple[str, str]:
            return self._write_turn("\n".join(before), frame), self._write_turn(answer, frame)

        return Record(images, write, **read_labels(content))

    def _write_turn(self, text: str, frame: Frame) -> str:
        check_text(text)
        return write_boxes(frame.move(text), frame, self.boxes)


def _shows_something(content: Mapping[str, Any]) -> bool:
    """Whether a row has images, or a video, which is refused by name."""
    if any(content.get(key) for key in (*IMAGE, "video", "videos")):
        return True
    parts = [turn.get(key) for turn in _turns(content) for key in WHAT]
    return any(
        isinstance(part, dict) and part.get("type") != "text"
        for content in parts
        if isinstance(content, list)
        for part in content
    )


def _count_answers(content: Mapping[str, Any]) -> int:
    return sum(any(turn.get(key) in ANSWERING for key in WHO) for turn in _turns(content))


def _turns(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    listed = [content[key] for key in TURNS if isinstance(content.get(key), list)]
    return [turn for turn in (listed[0] if listed else ()) if isinstance(turn, dict)]


def read_turns(turns: Any) -> tuple[list[str], list[str]]:
    """What was said, questions and answers by turns, and the images that the turns name themselves.

    What a system said stands before the first question. InputError if questions and answers do not take turns.
    """
    if not isinstance(turns, list) or not turns:
        raise InputError(f"conversation: expected a list of turns, got {short_repr(turns)}")
    said: list[str] = []
    images: list[str] = []
    system = ""
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise InputError(f"turn {number}: expected who says what, got {short_repr(turn)}")
        who, text = value_of(turn, WHO, "speaker"), _text_of_turn(value_of(turn, WHAT, "text"), images, number)
        if who == "system" and number == 1:
            system = f"{text.strip()}\n"
            continue
        expected = ANSWERING if len(said) % 2 else ASKING
        if who not in expected:
            raise InputError(f"turn {number}: expected {' or '.join(expected)}, got {short_repr(who)}")
        said.append(system + text)
        system = ""
    if len(said) < 2 or len(said) % 2:
        raise InputError(f"conversation: expected an answer to each question, got {len(said)} turns")
    return said, images


def _text_of_turn(content: Any, images: list[str], number: int) -> str:
    """A turn's text; of a list of parts (text, image) the texts, and the images go to `images`."""
    if isinstance(content, str):
        return content
    texts = []
    for part in content if isinstance(content, list) else [content]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image" and isinstance(part.get("image"), str):
            images.append(part["image"])
        else:
            raise InputError(f"turn {number}: expected text or image, got {short_repr(part)}")
    return "\n".join(texts)


def is_conversation(content: Mapping[str, Any]) -> bool:
    """Whether a row is of this format."""
    return any(key in content for key in TURNS)
