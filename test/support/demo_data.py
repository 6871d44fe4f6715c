"""The demo's data without its simulator: the same files, tiny, of frames that show nothing, in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ki_vla_ros.robot import find_robot, read_robot
from ki_vla_ros.sim import COLOURS, SHAPES, VERBS
from training.data.simulated import folder as module
from training.data.simulated.folder import Settings, make_folder
from training.data.simulated.generate import BACKGROUND, CAMERAS, Episode, Sizes, View
from training.data.simulated.questions import SeenObject

TINY = Settings(
    robot_episodes=6,  # all words of all instructions
    frames=2,
    scenes=8,
    questions=2,
    validation=2,
    seed=0,
    robot="demo_arm",
    sizes=Sizes(image_size=96, grid=8, horizon=16, period_s=0.05),
)


class Inline:
    """In place of a pool of processes."""

    def __init__(self, *_: object, **__: object) -> None: ...
    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *_: object) -> None: ...

    def map(self, work: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
        return map(work, jobs)


def write_demo_data(out: Path, settings: Settings = TINY) -> dict[str, Any]:
    """As `make_folder` does; returns meta.json."""
    with without_simulator():
        return make_folder(out, settings, read_robot(find_robot("demo_arm")), workers=1)


@contextmanager
def without_simulator() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ProcessPoolExecutor", Inline)
        patch.setattr(module, "World", lambda **_: None)
        patch.setattr(module, "record_episode", _make_episode)
        patch.setattr(module, "record_scene", _make_view)
        yield


def _make_episode(_world: object, seed: int, _split: str, frames: int, sizes: Sizes) -> Episode:
    """The joints are anywhere within their limits; the chunk goes on from there."""
    rng = np.random.default_rng(seed)
    lower_J, upper_J = np.array([action.limits for action in read_robot(find_robot("demo_arm")).actions]).T
    state_FJ = rng.uniform(lower_J, upper_J, (frames, len(lower_J)))
    step_FHJ = rng.normal(0.0, 0.01 * (upper_J - lower_J), (frames, sizes.horizon, len(lower_J)))
    return Episode(
        task=f"{VERBS[seed % len(VERBS)]} the {COLOURS[seed % len(COLOURS)]} {SHAPES[seed % len(SHAPES)]}",
        images_FVSSC=_images(rng, (frames, len(CAMERAS)), sizes),
        state_FJ=state_FJ.astype(np.float32),
        chunk_FHJ=(state_FJ[:, None] + step_FHJ.cumsum(axis=1)).astype(np.float32),
        place_F2=rng.uniform(0.1, 0.9, (frames, 2)).astype(np.float32),
    )


def _make_view(_world: object, seed: int, sizes: Sizes) -> View:
    rng = np.random.default_rng(seed)
    kinds = [("red", "ball"), ("blue", "cube"), ("blue", "ball")]
    return View(
        images_VSSC=_images(rng, (len(CAMERAS),), sizes),
        cells_VN=rng.integers(0, BACKGROUND + 1, (len(CAMERAS), sizes.grid**2)).astype(np.int8),
        seen=tuple(SeenObject(*kind, *rng.uniform(0.1, 0.9, 2)) for kind in kinds),
    )


def _images(rng: np.random.Generator, count: tuple[int, ...], sizes: Sizes) -> np.ndarray:
    """Of one colour each."""
    shape = (*count, sizes.image_size, sizes.image_size, 3)
    return np.broadcast_to(rng.integers(0, 256, (*count, 1, 1, 3), dtype=np.uint8), shape).copy()
