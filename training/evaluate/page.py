"""The page of a run: what it has learned so far, on what data, and where it is still wrong. It needs no other file."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import cv2
import numpy as np
import yaml

from ki_vla_ros.report import Axes, Span, figure, page, section, spark, table, tiles
from training.config import TrainingConfig
from training.evaluate.offline import Measured, Prediction, half_widths
from training.record import Record
from training.storage import write_whole

if TYPE_CHECKING:
    from training.sources import Sources

COLOURS: Final = ("c0", "c1", "c2", "c3", "c4")
CURVES: Final = 60  # plots; a run with more figures has the others in figures.jsonl
DIMENSIONS: Final = 16  # plots of one sample, those with the largest errors
POINTS: Final = 60  # of a curve in them
ROWS: Final = 200  # of the table of dimensions
WAYS: Final = {"flow": "expert", "regression": "regression", "fast": "FAST", "readout": "readout"}
QUALITY: Final = 80
SIDE: Final = 224  # pixels of a picture, at most

Lines = Sequence[Mapping[str, Any]]


def write_page(config: TrainingConfig, data: Sources, measured: Measured, figures: Record, losses: Record) -> Path:
    """Write OUT/report/index.html in place of an earlier one, and return it."""
    path = config.out / "report" / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    found, learned = figures.lines(), losses.lines()
    last = found[-1] if found else {"stage": "nothing", "step": 0}
    here = f"after step {last['step']} of stage {last['stage']}"
    sections = [
        section("Now", tiles(_tiles(measured)), note=f"Figures {here}, on held-out data."),
        _curves(config, "Figures", found, "On held-out data, over the steps of all stages (docs/training.md)."),
        _curves(config, "Losses", learned, "Of the batches that are learned from, and the norms of gradients by part."),
        _dimensions(data, measured, found),
        _worst(measured.worst),
        _data(data),
        section("Configuration", f"<details><summary>as checked</summary>{_configuration(config)}</details>"),
    ]
    text = page(f"Training of {config.name}", f"{config.robot}, {here}; out {config.out}", sections)
    write_whole(path, text)
    return path


def _whole(figures: Iterable[str]) -> Iterator[str]:
    """Those that are not of one dimension."""
    return (name for name in figures if "_error." not in name)


def _tiles(measured: Measured) -> Iterator[tuple[str, str, str]]:
    for name in _whole(measured.figures):
        value = measured.figures[name]
        yield name, "none" if np.isnan(value) else f"{value:.3g}", ""


def _curves(config: TrainingConfig, title: str, lines: Lines, note: str) -> str:
    begun, curves = 0, dict[str, tuple[list[int], list[float]]]()
    begin: dict[str, int] = {}
    for stage in config.stages:
        begin[stage.name] = begun
        begun += stage.steps
    for line in lines:
        if line["stage"] in begin and "_error." not in line["name"]:
            x, y = curves.setdefault(line["name"], ([], []))
            x.append(begin[line["stage"]] + line["step"])
            y.append(line["value"])
    if not curves:
        return ""
    span = Span(0.0, float(begun))
    plots = []
    for number, (name, (x, y)) in enumerate(sorted(curves.items())[:CURVES]):
        axes = Axes(span, Span.of(y if any(y) else [0.0, 1.0], margin=0.08))
        ends = axes.marks(list(begin.values())[1:], "grid") if len(begin) > 1 else ""
        colour = COLOURS[number % len(COLOURS)]
        layers = [ends, axes.line(x, y, colour), axes.dot(x[-1], y[-1], colour, f"{y[-1]:.4g}")]
        plots.append(figure(name, f"{y[-1]:.4g}", axes, layers, x_unit="steps", height=110))
    return section(title, f'<div class="plots">{"".join(plots)}</div>', note=note)


def _dimensions(data: Sources, measured: Measured, lines: Lines) -> str:
    """Errors by dimension, with their units."""
    before: dict[str, list[float]] = {}
    for line in lines:
        before.setdefault(line["name"], []).append(line["value"])
    rows, shown = [], [way for way in WAYS if any(name.endswith(f"{way}_error") for name in measured.figures)]
    for embodiment in data.embodiments.values():
        robot = embodiment.robot.name
        prefix = "" if embodiment is data.embodiment else f"{robot}/"
        ways = [w for w in shown if f"{prefix}{w}_error" in measured.figures]
        for action in embodiment.robot.actions if ways else ():
            names = {way: f"{prefix}{way}_error.{action.name}" for way in ways}
            cells = [f"{measured.figures[names[way]]:.4g}" if way in ways else "" for way in shown]
            unit = html.escape(action.own_unit())
            rows.append([html.escape(f"{robot}: {action.name}"), unit, *cells, spark(before.get(names[ways[0]], []))])
    head = ("dimension", "unit", *(WAYS[way] for way in shown), "so far")
    note = "Mean distance between the predicted and the recorded action, in the robot file's units."
    return section("Errors by dimension", table(head, rows[:ROWS]), note=note) if rows else ""


def _worst(worst: Sequence[Prediction]) -> str:
    if not worst:
        return ""
    note = (
        "The held-out frames where the expert errs most: what it sees, and its actions (blue) beside the recorded ones "
        f"(black) over the chunk, for at most {DIMENSIONS} dimensions, those with the largest errors first."
    )
    return section("Worst samples", *map(_sample, worst), note=note)


def _sample(prediction: Prediction) -> str:
    sample, robot = prediction.sample, prediction.embodiment.robot
    pictures = [
        f'<figure><img alt="camera {html.escape(camera.name)}" src="data:image/jpeg;base64,{_jpeg(image)}">'
        f"<figcaption>{html.escape(camera.name)}</figcaption></figure>"
        for camera, image in zip(robot.cameras, sample.images, strict=True)
        if image is not None
    ]
    known = int(sample.known_H.sum())
    off_D = np.abs(prediction.predicted_HD - sample.chunk_HD)[sample.known_H].mean(axis=0)
    order = np.argsort(-off_D / half_widths(prediction.embodiment), kind="stable")[:DIMENSIONS].tolist()
    shown = np.unique(np.linspace(0, robot.horizon - 1, min(POINTS, robot.horizon)).astype(int))
    time_s = (shown + 1) * robot.action_period_s
    plots = []
    for d in order:
        action = robot.actions[d]
        # What lies past the episode's end is not known.
        recorded = np.where(sample.known_H[shown], sample.chunk_HD[shown, d], np.nan)
        predicted = prediction.predicted_HD[shown, d]
        axes = Axes(Span.of([0.0], time_s), Span.of(recorded, predicted, margin=0.08))
        layers = [axes.line(time_s, recorded, "recorded"), axes.line(time_s, predicted, "mean")]
        layers.append(axes.dot(time_s[0], recorded[0], "recorded", "recorded"))  # perhaps all that is known
        unit = action.own_unit()
        plots.append(figure(action.name, f"{unit}, off by {off_D[d]:.3g} in the mean", axes, layers, height=90))
    ends = "" if known == robot.horizon else f" · {known} of {robot.horizon} actions before the episode's end"
    told = f"{prediction.robot} · source {prediction.source} · “{sample.task}”{ends}"
    return (
        f'<div class="moment"><h3>error {prediction.error:.3f}</h3><p>{html.escape(told)}</p>'
        f'<div class="thumbs">{"".join(pictures)}</div><div class="plots">{"".join(plots)}</div></div>'
    )


def _jpeg(image: Any) -> str:
    if len(image) > SIDE:
        image = cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    _, jpeg = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    return base64.b64encode(jpeg.tobytes()).decode()


def _data(data: Sources) -> str:
    rows = []
    for source, place, robot, weight, episodes, frames, kept in data.summary():
        given = (source, place, robot, f"{weight:g}" if weight else "held out", episodes or "", frames, kept)
        rows.append([html.escape(str(cell)) for cell in given])
    names = ("source", "data", "robot", "weight", "episodes", "frames or samples", "held out")
    return section("Data", table(names, rows))


def _configuration(config: TrainingConfig) -> str:
    told = yaml.safe_dump(config.model_dump(mode="json", exclude_none=True), sort_keys=False)
    return f"<pre>{html.escape(told)}</pre>"
