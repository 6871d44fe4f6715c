"""The demo's data in the formats that anyone's data has, made by the simulator, whole or not at all.

    robot/          LeRobot dataset: demonstrations by the script; `action_chunk` has each frame's own actions
    validation/     the same on combinations that `robot/` never commands
    scenes/         images of random scenes, wrist and scene camera
    scenes.jsonl    questions about the scene camera's images, as PaliGemma's data has them
    views.jsonl     the images of both cameras, and what each of their cells shows
    meta.json       settings, counts and fingerprint

Frames of one episode are not consecutive in time, though the format numbers them as if they were: each lies somewhere
around one demonstration. So actions are read from `action_chunk`, never from the rows that follow.

Legend: F frames, V cameras, S image size, H horizon, J joints, O objects, N image cells.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ki_vla_ros.errors import ConfigurationError, SimulationError
from ki_vla_ros.robot import Robot
from ki_vla_ros.sim import Split, World
from training.convert import PixelCounts, Tables
from training.data.lerobot import ACTION, PLACE, STAMP, STATE, VERSION, Feature, Info, make_features
from training.data.simulated.generate import (
    CAMERAS,
    RENDER_SIZE,
    Episode,
    Sizes,
    View,
    record_episode,
    record_scene,
)
from training.data.simulated.questions import draw_sample
from training.storage import whole_folder

FORMAT: Final = 4
META: Final = "meta.json"
CHUNK: Final = "action_chunk"
QUESTION: Final = "Question: {question}\nAnswer:"
HELD_OUT_OF: Final[Mapping[str, Split]] = {"train": "held_out", "known": "recombined"}
VALIDATION_FRAMES: Final = 6  # of each episode
AT_ONCE: Final = 50  # episodes or scenes of one job
# Seeds of episodes and scenes; those of closed-loop evaluation are above (training/evaluate/closed_loop.py).
FIRST_SEED: Final = {"robot": 0, "scenes": 10_000_000, "validation": 20_000_000}
README: Final = """\
Demonstrations of the simulated arm (`python -m training.data.simulated`), as a LeRobot dataset.

**The frames of an episode are not consecutive in time.** Each shows a position somewhere around one demonstration, and
timestamps (index / fps) only number them. What the arm should do from there is in `action_chunk` [{horizon}, {joints}]:
actions {period:g} s apart, the first of them is `action`. Never take the actions of the rows that follow; in a training
configuration: `{{lerobot: FOLDER, chunk: action_chunk}}`.

`hint.place` is u, v of the task's object in the image of the camera `scene`, in 0..1, to the right and down.
"""


@dataclass(frozen=True)
class Settings:
    """What the data are made from; unchanged settings make the same data."""

    robot_episodes: int
    frames: int
    scenes: int
    questions: int
    validation: int
    seed: int
    robot: str
    sizes: Sizes
    split: Literal["train", "known"] = "train"
    """What is commanded in robot/. validation/ has the combinations that this split holds out."""


def make_folder(out: Path, settings: Settings, robot: Robot, workers: int) -> dict[str, Any]:
    """Make the folder, unless it has been made from the same settings; returns `meta.json`.

    ConfigurationError if there is something else, which is then left alone.
    """
    described = json.loads(json.dumps(asdict(settings) | {"format": FORMAT}))
    meta = _read_meta(out / META)
    if meta is None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigurationError(
            f"simulated data {out}: expected a new folder, or one with such data ({META}), got something else, which "
            "would be replaced; name another folder"
        )
    if meta is not None and {"split": "train"} | meta["settings"] == described:  # earlier versions had no other
        return meta
    with whole_folder(out) as folder, ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        make = _Maker(folder, settings, robot, pool)
        counts = {"scenes": make.scenes(), "robot": make.episodes("robot"), "validation": make.episodes("validation")}
        meta = {"settings": described, "counts": counts, "fingerprint": fingerprint(folder)}
        (folder / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
    return meta


def _read_meta(path: Path) -> dict[str, Any] | None:
    """What the data was made from; None if there is no data."""
    try:
        meta: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for key in ("settings", "counts", "fingerprint"):
            meta[key]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{path}: expected settings, counts and fingerprint of the data as JSON, got something else ({error!r}); "
            "delete the folder, and the data is made again"
        ) from error
    return meta


def fingerprint(folder: Path) -> str:
    """SHA-256 over all files, names included: two runs trained on the same data if and only if these agree."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != META):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size} ".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


class _Maker:
    """Fills `folder`; deterministic in the seed, however many processes `pool` has."""

    def __init__(self, folder: Path, settings: Settings, robot: Robot, pool: ProcessPoolExecutor) -> None:
        self.folder, self.settings, self.robot, self.pool = folder, settings, robot, pool

    def simulate(self, source: str, count: int) -> Iterator[dict[str, Any] | None]:
        """What the simulator makes of each seed, in their order; None where the demonstrator failed."""
        first = FIRST_SEED[source] + self.settings.seed * 100_000_000
        seeds = [range(first + start, first + min(start + AT_ONCE, count)) for start in range(0, count, AT_ONCE)]
        jobs = [(source, block, self.settings) for block in seeds]
        for made in tqdm(self.pool.map(_record_many, jobs), total=len(jobs), desc=f"simulate {source}", unit="50"):
            yield from made

    def scenes(self) -> dict[str, int]:
        count, questions = self.settings.scenes, 0
        (self.folder / "scenes").mkdir()
        with (self.folder / "scenes.jsonl").open("w") as asked, (self.folder / "views.jsonl").open("w") as views:
            for number, scene in enumerate(self.simulate("scenes", count)):
                assert scene is not None
                names = [f"scenes/{number:06d}_{camera}.png" for camera in CAMERAS]
                for name, png, cells_N in zip(names, scene["png"], scene["cells"], strict=True):
                    (self.folder / name).write_bytes(png)
                    _write_line(views, {"image": name, "prefix": "", "suffix": "", "cells": [cells_N]})
                for question in scene["questions"]:
                    _write_line(asked, {"image": names[CAMERAS.index("scene")]} | question)
                    questions += 1
        return {"scenes": count, "questions": questions, "views": count * len(CAMERAS)}

    def episodes(self, source: str) -> dict[str, int]:
        """One of the two datasets; an episode that the demonstrator did not solve is left out and counted."""
        sizes = self.settings.sizes
        count = self.settings.validation if source == "validation" else self.settings.robot_episodes
        joints = [dimension.name for dimension in self.robot.actions]
        shape = (sizes.image_size, sizes.image_size, 3)
        keys = [camera.key for camera in self.robot.cameras]
        features = make_features({STATE: joints, ACTION: joints, PLACE: ["u", "v"]}, {})
        del features[STAMP]  # nothing was recorded at any time
        features |= {key: Feature(dtype="image", shape=shape, names=["height", "width", "channels"]) for key in keys}
        features[CHUNK] = Feature(dtype="float32", shape=(sizes.horizon, len(joints)))
        fps = round(1.0 / sizes.period_s, 6)
        info = Info(codebase_version=VERSION, robot_type=self.robot.name, fps=fps, video_path=None, features=features)
        tables, failed = Tables(self.folder / source, info, keys), 0
        for episode in self.simulate(source, count):
            if episode is None:
                failed += 1
                continue
            columns = {name: episode[name] for name in features if name in episode}
            columns |= {key: [pngs[view] for pngs in episode["png"]] for view, key in enumerate(keys)}
            pixels = dict(zip(keys, episode["pixels"], strict=True))
            for key in keys:
                tables.pixels[key].merge(pixels[key])
            figures = {key: counts.describe() for key, counts in pixels.items()}
            tables.add_episode(columns, [episode["task"]] * len(episode[STATE]), {}, figures)
        if not tables.frames:
            raise SimulationError(f"simulated data: the demonstrator solved none of {count} episodes of '{source}'")
        tables.close(features, {"robot": self.robot.name, "consecutive": False, "chunk": CHUNK})
        text = README.format(horizon=sizes.horizon, joints=len(joints), period=sizes.period_s)
        (self.folder / source / "README.md").write_text(text)
        return {"episodes": count, "frames": tables.frames, "demonstrator_failed": failed}


def _write_line(file: Any, row: dict[str, Any]) -> None:
    file.write(json.dumps(row) + "\n")


def _record_many(job: tuple[str, Sequence[int], Settings]) -> list[dict[str, Any] | None]:
    """In a process of its own: a job's episodes or scenes, with images as png files."""
    source, seeds, settings = job
    world = World(render_size=RENDER_SIZE)
    made: list[dict[str, Any] | None] = []
    for seed in seeds:
        if source == "scenes":
            made.append(_describe_scene(record_scene(world, seed, settings.sizes), seed, settings.questions))
            continue
        split: Split = HELD_OUT_OF[settings.split] if source == "validation" else settings.split
        frames = VALIDATION_FRAMES if source == "validation" else settings.frames
        episode = record_episode(world, seed, split, frames, settings.sizes)
        made.append(_describe_episode(episode) if episode else None)
    return made


def _describe_scene(view: View, seed: int, questions: int) -> dict[str, Any]:
    """Its images as files [V], its cells and the lines of its questions; none are asked where nothing is seen."""
    rng = np.random.default_rng([seed, 13])
    asked = []
    for sample in (draw_sample(view.seen, rng) for _ in range(questions if view.seen else 0)):
        row: dict[str, Any] = {"prefix": QUESTION.format(question=sample.question), "suffix": sample.answer}
        if sample.about is not None:
            row["place"] = [round(sample.about.u, 5), round(sample.about.v, 5)]
        asked.append(row)
    return {"png": [_encode(image) for image in view.images_VSSC], "cells": view.cells_VN.tolist(), "questions": asked}


def _describe_episode(episode: Episode) -> dict[str, Any]:
    """An episode's columns, its task, its images as files [F][V], and its cameras' pixels."""
    pixels = [PixelCounts() for _ in CAMERAS]
    for images in episode.images_FVSSC:
        for counts, image in zip(pixels, images, strict=True):
            counts.add(image)
    return {
        STATE: episode.state_FJ,
        ACTION: episode.chunk_FHJ[:, 0],
        CHUNK: episode.chunk_FHJ,
        PLACE: episode.place_F2,
        "task": episode.task,
        "png": [[_encode(image) for image in images] for images in episode.images_FVSSC],
        "pixels": pixels,
    }


def _encode(image: NDArray[np.uint8]) -> bytes:
    """A png file of an RGB image."""
    return cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()
