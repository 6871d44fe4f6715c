"""Simulated data: robot episodes by the demonstrator, and vision-language frames of random scenes.

Legend: F frames, V cameras, S image size, J joints, H horizon, O objects (at most `MAX_OBJECTS`, unused rows are -1).
Arrays are plain `.npy` files in a folder; `meta.json` says what they were made from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ki_vla_ros.errors import ConfigurationError, SimulationError
from ki_vla_ros.policy import resize_with_pad
from ki_vla_ros.robot import Robot
from ki_vla_ros.sim import (
    HOME_J,
    JOINTS,
    TIMESTEP_S,
    Demonstration,
    Demonstrator,
    Scene,
    Split,
    Task,
    World,
    sample_scene,
    tip_to_joints,
)
from training.data.batch import Arrays, ChunkTiming
from training.data.simulated.questions import COMBINATIONS, SeenObject
from training.data.simulated.settings import DataConfig
from training.storage import whole_folder, write_whole, writing

FORMAT = 3
CAMERAS = ("wrist", "scene")  # as config/robots/demo_arm.yaml orders them (tested)
MAX_OBJECTS = 5
RENDER_SIZE = 288  # what the robot's cameras publish; the model's size is a whole fraction of it
SETTLE_S = 0.6  # how long an episode goes on after the arm has arrived, so that the policy learns to stay
LAG_S = 0.007  # by which the simulated arm trails its command (arm.xml)
UNDER_WAY_S = 0.3  # see `_plan_chunk`
MOST_TRIES = 1000  # draws of a frame's position; the demo's scenes need a few
LOWEST_TIP_M = 0.01
BACKGROUND = len(COMBINATIONS)


@dataclass(frozen=True)
class Sizes:
    """What the model's sizes and the robot's timing decide of the data."""

    image_size: int
    grid: int  # image cells along one side
    horizon: int
    period_s: float


def load_arrays(folder: Path) -> Arrays:
    """The arrays of one source (`folder/robot`, `folder/validation` or `folder/scenes`), in memory.

    Memory-mapped, a batch's random reads took as long as its gradients on a machine short of page cache.
    """
    return {path.stem: np.load(path) for path in sorted(folder.glob("*.npy"))}


def seen_objects(arrays: Arrays, frame: int, *, least_pixels: int = 0) -> list[SeenObject]:
    """The objects of a frame with their centre in the scene image and at least `least_pixels` visible pixels."""
    seen = []
    for kind, (u, v), pixels in zip(arrays["kind"][frame], arrays["uv"][frame], arrays["pixels"][frame], strict=True):
        if kind >= 0 and pixels >= least_pixels and 0 <= u < 1 and 0 <= v < 1:
            colour, shape = COMBINATIONS[kind]
            seen.append(SeenObject(colour, shape, float(u), float(v)))
    return seen


def record_episode(
    world: World, seed: int, split: Split, frames: int, timing: ChunkTiming | Sizes, with_rivals: bool
) -> Arrays | None:
    """Frames of one demonstration; None if the demonstrator did not solve it (the caller counts these).

    Nor did it if no position around its path is free, or none from which it finds a way, in `MOST_TRIES` draws.

    The frames do not lie on the flawless demonstration but around it (see `_draw_position`), each with the chunk that
    the demonstrator would execute from there: a policy must learn the way back from its mistakes. `with_rivals` adds,
    for each frame, the chunks that the demonstrator would execute for every object of the scene.
    """
    rng = np.random.default_rng([seed, 7])
    scene = sample_scene(seed, split=split)
    decoy = scene.objects[rng.integers(len(scene.objects))]
    wrong = replace(scene, task=Task(scene.task.verb, decoy.colour, decoy.shape))
    demonstrator = Demonstrator(world)
    start_J = _random_start(rng)
    reference, astray = demonstrator.plan(start_J, None, scene), demonstrator.plan(start_J, None, wrong)
    due_s = LAG_S + (np.arange(timing.horizon) + 1) * timing.period_s
    rows: dict[str, list[Any]] = {name: [] for name in ("images", "state", "chunk", "uv", "rivals")}
    tries = 0
    while len(rows["state"]) < frames:
        if (tries := tries + 1) > MOST_TRIES:
            return None
        position_J = _draw_position(rng, astray if rng.random() < 0.3 else reference, world)
        if not _is_free(world, scene, position_J):
            continue
        try:
            chunks = [_plan_chunk(demonstrator, scene, position_J, due_s)]
            if with_rivals:
                rows["rivals"].append(_plan_rivals(demonstrator, scene, position_J, due_s))
        except SimulationError:  # the motion would leave the arm's reach
            continue
        rows["images"].append(render_views(world, timing.image_size))
        rows["state"].append(position_J.astype(np.float32))
        rows["chunk"] += chunks
        rows["uv"].append(_project_objects(world, scene))
        tries = 0
    world.reset(scene, start_J)
    _follow(world, reference)
    if not world.judge.success:
        return None
    arrays = {name: np.stack(values) for name, values in rows.items() if values}
    arrays["kind"] = np.tile(_kinds(scene), (frames, 1))
    # Episodes are not segmented; any object may count as visible.
    arrays["pixels"] = np.where(arrays["kind"] >= 0, 999, -1).astype(np.int16)
    arrays["target"] = np.full(frames, scene.target, np.int8)
    arrays["verb"] = np.full(frames, scene.task.verb == "point at", np.int8)
    arrays["episode"] = np.full(frames, seed, np.int64)
    return arrays


def record_scene(world: World, seed: int, timing: ChunkTiming | Sizes) -> Arrays:
    """One vision-language frame: random objects, the arm anywhere.

    `cells` says what each image cell shows (24 kinds, or background).
    """
    rng = np.random.default_rng([seed, 11])
    scene = sample_scene(seed, split="all")
    world.reset(scene, _random_start(rng, away=0.7))
    views, cells, pixels = [], [], np.full(MAX_OBJECTS, -1, np.int16)
    for camera in CAMERAS:
        views.append(resize_with_pad(world.render(camera), timing.image_size))
        mask = world.segment(camera)
        cells.append(_label_cells(mask, _kinds(scene), timing.grid))
        if camera == "scene":  # 9 rendered pixels make one of 96 x 96, the size that LEAST_PIXELS refers to
            pixels[: len(scene.objects)] = [(mask == i).sum() // 9 for i in range(len(scene.objects))]
    return {
        "images": np.stack(views)[None],
        "cells": np.stack(cells)[None],
        "uv": _project_objects(world, scene)[None],
        "kind": _kinds(scene)[None],
        "pixels": pixels[None],
    }


def render_views(world: World, size: int) -> NDArray[np.uint8]:
    """[V, S, S, 3], in the order of `CAMERAS`, through the robot's own resizing."""
    return np.stack([resize_with_pad(world.render(camera), size) for camera in CAMERAS])


def _random_start(rng: np.random.Generator, away: float = 0.35) -> NDArray[np.float64]:
    if rng.random() >= away:
        start = HOME_J + rng.normal(0.0, 0.03, HOME_J.shape)
    else:
        tip = np.array([rng.uniform(0.26, 0.54), rng.uniform(-0.24, 0.24), rng.uniform(0.13, 0.32)])
        start = np.array(tip_to_joints(tip)) + rng.normal(0.0, 0.02, HOME_J.shape)
    start[-1] = rng.uniform(0.0, 0.04)
    return start


def _draw_position(rng: np.random.Generator, path: Demonstration, world: World) -> NDArray[np.float64]:
    """Somewhere on `path`, or at rest at its end, displaced in every joint."""
    moment_s = rng.uniform(0.0, path.duration_s + SETTLE_S)
    spread = rng.choice((0.0, 0.01, 0.04, 0.12), p=(0.1, 0.4, 0.35, 0.15))
    displacement_J = rng.normal(0.0, spread, HOME_J.shape)
    displacement_J[-1] /= 10.0  # the gripper's metres
    return np.clip(path.position(moment_s) + displacement_J, world.lower_J, world.upper_J)


def _is_free(world: World, scene: Scene, position_J: NDArray[np.float64]) -> bool:
    """Place scene and arm; True if the gripper touches nothing there."""
    world.reset(scene, position_J)
    world.step(position_J)
    return not world.judge.done and bool(world.tip_position[2] > LOWEST_TIP_M)


def _follow(world: World, reference: Demonstration) -> None:
    for command_J in reference.sample(np.arange(0.0, reference.duration_s + SETTLE_S, TIMESTEP_S)):
        world.step(command_J)


def _plan_chunk(
    demonstrator: Demonstrator, scene: Scene, position_J: NDArray[np.float64], due_s: NDArray[np.floating]
) -> NDArray[np.float32]:
    """The demonstration from here, already moving: at the velocity that it has `UNDER_WAY_S` after a start here.

    A policy sees where the arm is, not how fast it moves. If chunks began at rest, executing a tenth of a second of
    one would lead nowhere; if they began at whatever velocity a recording had, the policy could only guess it. So the
    velocity is a function of the position. Actions lead the motion by the arm's lag.
    """
    velocity_J = demonstrator.plan(position_J, None, scene).velocity(UNDER_WAY_S)
    return demonstrator.plan(position_J, velocity_J, scene).sample(due_s).astype(np.float32)


def _plan_rivals(
    demonstrator: Demonstrator, scene: Scene, position_J: NDArray[np.float64], due_s: NDArray[np.floating]
) -> NDArray[np.float32]:
    rivals = np.full((MAX_OBJECTS, len(due_s), len(position_J)), np.nan, np.float32)
    for index, other in enumerate(scene.objects):
        task = Task(scene.task.verb, other.colour, other.shape)
        rivals[index] = _plan_chunk(demonstrator, replace(scene, task=task), position_J, due_s)
    return rivals


def _project_objects(world: World, scene: Scene) -> NDArray[np.float32]:
    uv = np.full((MAX_OBJECTS, 2), -1.0, np.float32)
    for index, centre in enumerate(world.object_positions):
        uv[index] = np.array(world.project("scene", centre)) / RENDER_SIZE
    return uv


def _kinds(scene: Scene) -> NDArray[np.int8]:
    kinds = np.full(MAX_OBJECTS, -1, np.int8)
    kinds[: len(scene.objects)] = [COMBINATIONS.index((item.colour, item.shape)) for item in scene.objects]
    return kinds


def _label_cells(mask: NDArray[np.int8], kinds: NDArray[np.int8], grid: int) -> NDArray[np.int8]:
    """For each cell, the kind of the object with the most pixels in it, if it covers an eighth; else `BACKGROUND`."""
    side = mask.shape[0] // grid
    blocks = mask.reshape(grid, side, grid, side).transpose(0, 2, 1, 3).reshape(grid * grid, -1)
    counts = np.stack([(blocks == index).sum(axis=1) for index in range(MAX_OBJECTS)], axis=1)
    best = counts.argmax(axis=1)
    return np.where(counts.max(axis=1) * 8 >= blocks.shape[1], kinds[best], BACKGROUND).astype(np.int8)


def _record_many(job: tuple[str, Sequence[int], DataConfig, ChunkTiming]) -> tuple[Arrays, int]:
    source, seeds, config, timing = job
    world = World(render_size=RENDER_SIZE)
    parts: list[Arrays] = []
    failed = 0
    for seed in seeds:
        if source == "scenes":
            parts.append(record_scene(world, seed, timing))
            continue
        split: Split = "held_out" if source == "validation" else "train"
        frames = 6 if source == "validation" else config.frames_per_episode
        episode = record_episode(world, seed, split, frames, timing, with_rivals=source == "validation")
        failed += episode is None
        parts += [episode] if episode else []
    if not parts:
        raise SimulationError(f"simulated data: the demonstrator solved none of {len(seeds)} episodes of '{source}'")
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, failed


def make_source(source: str, count: int, config: DataConfig, timing: ChunkTiming) -> dict[str, Any]:
    """Write one source to `config.folder / source` and return its counts; deterministic in `config.seed`."""
    offset = {"robot": 0, "scenes": 10_000_000, "validation": 20_000_000}[source] + config.seed * 100_000_000
    seeds = [range(offset + start, offset + min(start + 50, count)) for start in range(0, count, 50)]
    jobs = [(source, block, config, timing) for block in seeds]
    blocks: list[Arrays] = []
    failed = 0
    with ProcessPoolExecutor(config.workers, mp_context=get_context("spawn")) as pool:
        for block, misses in tqdm(pool.map(_record_many, jobs), total=len(jobs), desc=f"simulate {source}", unit="50"):
            blocks.append(block)
            failed += misses
    frames = sum(len(block["uv"]) for block in blocks)
    with whole_folder(config.folder / source) as folder:
        for name in list(blocks[0]):  # popped as they are written, or everything would lie in memory twice
            with writing(config.folder / source / f"{name}.npy"):
                np.save(folder / f"{name}.npy", np.concatenate([block.pop(name) for block in blocks]))
    return {"episodes" if source != "scenes" else "scenes": count, "frames": frames, "demonstrator_failed": failed}


def fingerprint(folder: Path) -> str:
    """SHA-256 over all arrays, names included: two runs trained on the same data if and only if these agree."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*/*.npy")):
        digest.update(f"{path.parent.name}/{path.name}".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def check_robot(robot: Robot) -> None:
    """ConfigurationError unless the robot file describes the arm that the simulator moves."""
    for what, expected, got in (("cameras", CAMERAS, robot.camera_names), ("joints", JOINTS, robot.axis_names)):
        if got != expected:
            raise ConfigurationError(
                f"simulated data for robot {robot.name!r}: {what}: expected {', '.join(expected)} (the simulated "
                f"arm's), got {', '.join(got)}; set robot: demo_arm"
            )


def make_data(config: DataConfig, timing: ChunkTiming) -> dict[str, Any]:
    """Make all sources, unless `config.folder` has them from the same settings; returns `meta.json`.

    While they are made there is no meta.json: data that a killed process left half new is never taken for whole.
    """
    meta_path = config.folder / "meta.json"
    settings = (
        json.loads(config.model_dump_json(exclude={"folder", "workers", "recorded"}))
        | vars(timing)
        | {"format": FORMAT}
    )
    if (meta := read_meta(meta_path)) is not None and meta["settings"] == settings:
        return meta
    meta_path.unlink(missing_ok=True)
    counts = {
        "scenes": make_source("scenes", config.scenes, config, timing),
        "robot": make_source("robot", config.robot_episodes, config, timing),
        "validation": make_source("validation", config.validation_episodes, config, timing),
    }
    meta = {"settings": settings, "counts": counts, "fingerprint": fingerprint(config.folder)}
    write_whole(meta_path, json.dumps(meta, indent=1))
    return meta


def read_meta(path: Path) -> dict[str, Any] | None:
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
