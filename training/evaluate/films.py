"""Films of episodes: what the cameras show, the instruction, and each action with the chunk that foretold it.

Legend: H horizon, D actions, T actions that were executed, N points.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Final

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from training.evaluate.environment import Environment

MOST_PER_S: Final = 25
TILE: Final = 240  # height of the images, in pixels
NARROWEST: Final = 480
HEADER: Final = 76  # three lines of text
PLOT: Final = (160, 74)  # least width, and height, of a dimension's curve
LABEL: Final = 16
FEWEST: Final = 16  # steps before and after now
LIGHT, GREY, DARK = (240, 240, 240), (120, 120, 120), (30, 30, 34)
EXECUTED, EXPECTED, LATER = (240, 240, 240), (255, 165, 40), (200, 120, 30)
LEGEND: Final = "light: executed; orange: the chunk, thick: until the next"
FONT: Final = cv2.FONT_HERSHEY_DUPLEX

Picture = NDArray[np.uint8]
Array = NDArray[np.float64]


class Film:
    """One episode. `expect` each chunk, `see` the environment before each of its actions and after the last."""

    def __init__(self, environment: Environment) -> None:
        self._period_s = environment.robot.action_period_s
        self._every = max(1, round(1.0 / (self._period_s * MOST_PER_S)))
        self._names = [action.name for action in environment.robot.actions]
        self._units = [action.own_unit() for action in environment.robot.actions]
        self._pictures: list[tuple[int, Picture]] = []
        self._chunks: list[tuple[int, Array, int]] = []  # the step that it begins at, actions [H, D], how many count
        self._step, self._instruction = -1, ""

    def expect(self, actions_HD: Array, count: int) -> None:
        self._chunks.append((self._step + 1, actions_HD.copy(), count))

    def see(self, environment: Environment) -> None:
        self._step += 1
        self._instruction = environment.instruction
        if self._step % self._every == 0 or environment.over:
            self._pictures.append((self._step, _row(list(environment.observe()[0].values()))))

    def write(self, path: Path, title: str) -> None:
        """An mp4, whole or not at all; `title` stands beside the instruction."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        pictures = (self._picture(step, row, title) for step, row in self._pictures)
        _write(part, pictures, 1.0 / (self._period_s * self._every))
        part.replace(path)

    def _picture(self, step: int, row: Picture, title: str) -> Picture:
        width = row.shape[1]
        header = np.full((HEADER, width, 3), DARK, dtype=np.uint8)
        _text(header, self._instruction, (8, 20), 0.5, LIGHT)
        chunk = max((k for k, (begin, *_) in enumerate(self._chunks) if begin <= step), default=-1)
        _text(header, f"{step * self._period_s:.2f} s, chunk {chunk + 1}; {title}", (8, 44), 0.42, GREY)
        _text(header, LEGEND, (8, 66), 0.36, GREY)
        return np.concatenate([header, row, self._plots(step, chunk, width)])

    def _plots(self, step: int, chunk: int, width: int) -> Picture:
        """A curve for each action: executed up to now, and what the newest chunk has after it."""
        columns = min(len(self._names), max(1, width // PLOT[0]))
        rows = -(-len(self._names) // columns)
        canvas = np.full((rows * PLOT[1], width, 3), DARK, dtype=np.uint8)
        if chunk < 0:
            return canvas
        begin, actions_HD, count = self._chunks[chunk]
        horizon, executed_TD = len(actions_HD), self._executed(step)
        before = max(horizon, FEWEST)
        first = step - before
        for d, (low, high) in enumerate(self._ranges()):
            left, top = (d % columns) * width // columns, d // columns * PLOT[1]
            right = (d % columns + 1) * width // columns - 6
            box = (left + 6, top + LABEL, right, top + PLOT[1] - 6)
            place = partial(_place, box, (first, first + 2 * before), (low, high))
            cv2.rectangle(canvas, box[:2], box[2:], (60, 60, 66), 1)
            _text(canvas, f"{self._names[d]}, {self._units[d]}", (left + 6, top + LABEL - 5), 0.36, GREY, right - left)
            ahead = np.arange(begin, begin + horizon, dtype=float)
            _line(canvas, place(ahead, actions_HD[:, d]), LATER)
            _line(canvas, place(ahead[:count], actions_HD[:count, d]), EXPECTED, 2)
            since = max(0, first)
            _line(canvas, place(np.arange(since, step, dtype=float), executed_TD[since:step, d]), EXECUTED)
            now = place(np.array([step, step], dtype=float), np.array([low, high]))
            cv2.line(canvas, now[0].tolist(), now[1].tolist(), GREY, 1)
        return canvas

    def _executed(self, step: int) -> Array:
        """[T, D]"""
        parts = []
        for k, (begin, actions_HD, count) in enumerate(self._chunks):
            end = self._chunks[k + 1][0] if k + 1 < len(self._chunks) else begin + count
            parts.append(actions_HD[: end - begin])
        return np.concatenate(parts)[:step]

    def _ranges(self) -> list[tuple[float, float]]:
        """What each curve shows: all that any chunk of the episode has."""
        every_ND = np.concatenate([actions_HD for _, actions_HD, _ in self._chunks])
        low_D, high_D = every_ND.min(axis=0), every_ND.max(axis=0)
        pad_D = np.maximum(0.05 * (high_D - low_D), 1e-6)
        return list(zip((low_D - pad_D).tolist(), (high_D + pad_D).tolist(), strict=True))


def _place(
    box: tuple[int, int, int, int],
    steps: tuple[float, float],
    values: tuple[float, float],
    step_N: Array,
    value_N: Array,
) -> NDArray[np.int32]:
    """Pixels [N, 2] of points in a plot that has these steps across and these values upwards."""
    across_N = np.interp(step_N, steps, (box[0], box[2]))
    down_N = np.interp(value_N, values, (box[3], box[1]))
    return np.stack([across_N, down_N], axis=1).round().astype(np.int32)


def _row(images: Sequence[Picture]) -> Picture:
    """All images beside each other, larger where they are few."""
    wide = sum(image.shape[1] / image.shape[0] for image in images)
    height = 2 * round(max(TILE, NARROWEST / wide) / 2)  # even, as the video's colours need it
    tiles = []
    for image in images:
        width = 2 * round(image.shape[1] / image.shape[0] * height / 2)
        smaller = image.shape[0] >= height
        how = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
        tiles.append(np.asarray(cv2.resize(image, (width, height), interpolation=how), dtype=np.uint8))
    return np.concatenate(tiles, axis=1)


def _text(
    canvas: Picture, text: str, place: tuple[int, int], size: float, colour: Sequence[int], width: int | None = None
) -> None:
    """Smaller where it would not fit."""
    taken = cv2.getTextSize(text, FONT, size, 1)[0][0]
    room = (width or canvas.shape[1]) - 16
    cv2.putText(canvas, text, place, FONT, size * min(1.0, room / taken), colour, 1, cv2.LINE_AA)


def _line(canvas: Picture, points_N2: Any, colour: Sequence[int], thickness: int = 1) -> None:
    cv2.polylines(canvas, [points_N2], False, colour, thickness, cv2.LINE_AA)
    if len(points_N2) == 1:
        cv2.circle(canvas, points_N2[0].tolist(), 1, colour, -1)


def _write(path: Path, pictures: Any, per_s: float) -> None:
    rate, stream = Fraction(per_s).limit_denominator(1000), None
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        for number, picture in enumerate(pictures):
            if stream is None:
                stream = container.add_stream("libx264", rate=rate, options={"preset": "veryfast", "crf": "24"})
                stream.height, stream.width = picture.shape[:2]
                stream.pix_fmt = "yuv420p"
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        assert stream is not None, "an episode has at least one picture"
        container.mux(stream.encode())
