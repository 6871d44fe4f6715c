"""Places in an image, and where they are in the square that the model sees of it.

`resize_with_pad` puts an image of other proportions into the middle of a square, so a place of the image is another one
of the square: texts of places, boxes and labels go through `Frame`. u is to the right and v down, each in 0..1. A text
has PaliGemma's places, each in 1024 bins: v before u, a box as `<loc v0><loc u0><loc v1><loc u1>`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from ki_vla_ros.errors import InputError, short_repr
from ki_vla_ros.policy import fit_square
from training.tokens import LOCATION_BINS

SLACK: Final = 1e-3  # of the image's side, less than one of 1024 bins: boxes are rounded
Unit = Literal["thousandths", "pixels", "fractions"]
_RUN: Final = re.compile(r"<loc\d{4}>(?:\s*<loc\d{4}>)*")
_PLACE: Final = re.compile(r"<loc(\d{4})>")
_NUMBER: Final = r"\s*(-?\d+(?:\.\d+)?)\s*"
_PAIR: Final = rf"\({_NUMBER},{_NUMBER}\)"
_LIST: Final = rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]"
# As Qwen-VL and Qwen2-VL write a box; as InternVL does; and as Qwen2.5-VL and Qwen3-VL do, in JSON.
_BOXES: Final = (
    re.compile(rf"<box>{_PAIR}\s*,?\s*{_PAIR}</box>"),
    re.compile(rf"<\|box_start\|>{_PAIR}\s*,?\s*{_PAIR}<\|box_end\|>"),
    re.compile(rf"<box>\[?{_LIST}\]?</box>"),
    re.compile(rf'(?<="bbox_2d":)\s*{_LIST}'),
    re.compile(rf'(?<="point_2d":)\s*\[{_NUMBER},{_NUMBER}\]'),
)
_BOX_TAG: Final = re.compile(r"</?box>|<\|box_(?:start|end)\|>|<\|?quad|\"(?:bbox|point)_2d\":\s*\[")
_NAME_TAG: Final = re.compile(r"</?ref>|<\|object_ref_(?:start|end)\|>")


@dataclass(frozen=True)
class Frame:
    """An image's size in pixels, and the part of the square that it fills, as shares of the square's side."""

    width: float
    height: float
    left: float = 0.0
    top: float = 0.0
    across: float = 1.0
    down: float = 1.0

    @classmethod
    def of(cls, width: int, height: int, size: int) -> Frame:
        top, left, new_height, new_width = fit_square(height, width, size)
        return cls(width, height, left / size, top / size, new_width / size, new_height / size)

    def place(self, u: float, v: float) -> tuple[float, float]:
        """Where a place of the image is in the square; InputError outside the image."""
        for value in (u, v):
            if not 0.0 <= value <= 1.0:
                raise InputError(f"place: expected u and v in 0 to 1, got {u:g}, {v:g}")
        return self.left + u * self.across, self.top + v * self.down

    def box(self, corners: Sequence[float], unit: Unit) -> str:
        """The tokens of a box x0, y0, x1, y1 of the image, or of a point x, y; InputError if it leaves the image."""
        sides = {"thousandths": (1000.0, 1000.0), "fractions": (1.0, 1.0)}.get(unit, (self.width, self.height))
        inside = [-SLACK * side <= value <= (1 + SLACK) * side for value, side in zip(corners, sides * 2, strict=False)]
        if not all(inside) or any(a > b for a, b in zip(corners, corners[2:], strict=False)):
            raise InputError(
                f"box: expected x0 <= x1 <= {sides[0]:g} and y0 <= y1 <= {sides[1]:g} ({unit}), got "
                f"{', '.join(f'{value:g}' for value in corners)}; is it in another unit?"
            )
        shares = [min(max(value / side, 0.0), 1.0) for value, side in zip(corners, sides * 2, strict=False)]
        places = [self.place(u, v) for u, v in zip(shares[::2], shares[1::2], strict=True)]
        return "".join(_token(v) + _token(u) for u, v in places)

    def move(self, text: str) -> str:
        """The text with its places where they are in the square; InputError unless they come in pairs, v before u."""
        return _RUN.sub(lambda found: self._move_run(found[0]), text)

    def _move_run(self, run: str) -> str:
        found = _PLACE.findall(run)
        if len(found) % 2:
            raise InputError(f"text: expected places in pairs, first down and then across, got {run[:80]!r}")
        turn = iter(range(len(found)))

        def moved(token: re.Match[str]) -> str:
            middle = (int(token[1]) + 0.5) / LOCATION_BINS
            return _token(self.place(0.0, middle)[1] if next(turn) % 2 == 0 else self.place(middle, 0.0)[0])

        return _PLACE.sub(moved, run)


ANYWHERE: Final = Frame(float("inf"), float("inf"))
"""For texts whose places do not matter."""


def _token(value: float) -> str:
    return f"<loc{min(int(value * LOCATION_BINS), LOCATION_BINS - 1):04d}>"


def write_boxes(text: str, frame: Frame, unit: Unit) -> str:
    """The text with Qwen's and InternVL's boxes as PaliGemma's tokens, and without the marks around names."""
    for pattern in _BOXES:
        text = pattern.sub(lambda found: frame.box([float(number) for number in found.groups()], unit), text)
    if left := _BOX_TAG.search(text):
        raise InputError(
            "box: expected (x0,y0),(x1,y1) or [x0, y0, x1, y1], got "
            f"{short_repr(text[left.start() : left.start() + 60])}"
        )
    return _NAME_TAG.sub("", text)


def only_place(text: str) -> tuple[float, float] | None:
    """The middle of the one box, or the one point, that the text has; None where it has none or several."""
    runs = [[(int(found) + 0.5) / LOCATION_BINS for found in _PLACE.findall(run)] for run in _RUN.findall(text)]
    if len(runs) != 1 or len(runs[0]) not in (2, 4):
        return None
    values = runs[0]
    return sum(values[1::2]) / len(values[1::2]), sum(values[::2]) / len(values[::2])
