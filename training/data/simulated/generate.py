"""What the simulator knows of one episode or one scene, as arrays.

Legend: F frames, V cameras, S image size, J joints, H horizon, O objects, N image cells, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

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
from training.data.simulated.questions import COMBINATIONS, SeenObject

CAMERAS = ("wrist", "scene")  # as config/robots/demo_arm.yaml orders them (tested)
LEAST_PIXELS = 135  # visible pixels of the scene image that an object needs before it is asked about
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


@dataclass(frozen=True)
class Episode:
    """Frames around one demonstration; `place_F2` is u and v of the task's object in the scene image."""

    task: str
    images_FVSSC: NDArray[np.uint8]
    state_FJ: NDArray[np.float32]
    chunk_FHJ: NDArray[np.float32]
    place_F2: NDArray[np.float32]


@dataclass(frozen=True)
class View:
    """A scene as the cameras see it: what each image cell shows (24 kinds, or background), and what may be asked about.

    `seen` are the objects of which the scene image shows enough.
    """

    images_VSSC: NDArray[np.uint8]
    cells_VN: NDArray[np.int8]
    seen: tuple[SeenObject, ...]


def record_episode(world: World, seed: int, split: Split, frames: int, sizes: Sizes) -> Episode | None:
    """Frames of one demonstration; None if the demonstrator did not solve it (the caller counts these).

    Nor did it if no position around its path is free, or none from which it finds a way, in `MOST_TRIES` draws.

    The frames do not lie on the flawless demonstration but around it (see `_draw_position`), each with the chunk that
    the demonstrator would execute from there: a policy must learn the way back from its mistakes.
    """
    rng = np.random.default_rng([seed, 7])
    scene = sample_scene(seed, split=split)
    decoy = scene.objects[rng.integers(len(scene.objects))]
    wrong = replace(scene, task=Task(scene.task.verb, decoy.colour, decoy.shape))
    demonstrator = Demonstrator(world)
    start_J = _random_start(rng)
    reference, astray = demonstrator.plan(start_J, None, scene), demonstrator.plan(start_J, None, wrong)
    due_s = LAG_S + (np.arange(sizes.horizon) + 1) * sizes.period_s
    images: list[NDArray[np.uint8]] = []
    states, chunks, places = (list[NDArray[np.float32]]() for _ in range(3))
    tries = 0
    while len(states) < frames:
        if (tries := tries + 1) > MOST_TRIES:
            return None
        position_J = _draw_position(rng, astray if rng.random() < 0.3 else reference, world)
        if not _is_free(world, scene, position_J):
            continue
        try:
            chunk_HJ = _plan_chunk(demonstrator, scene, position_J, due_s)
        except SimulationError:  # the motion would leave the arm's reach
            continue
        images.append(render_views(world, sizes.image_size))
        states.append(position_J.astype(np.float32))
        chunks.append(chunk_HJ)
        places.append(_project_objects(world)[scene.target])
        tries = 0
    world.reset(scene, start_J)
    _follow(world, reference)
    if not world.judge.success:
        return None
    return Episode(scene.task.instruction, np.stack(images), np.stack(states), np.stack(chunks), np.stack(places))


def record_scene(world: World, seed: int, sizes: Sizes) -> View:
    """Random objects, the arm anywhere."""
    rng = np.random.default_rng([seed, 11])
    scene = sample_scene(seed, split="all")
    world.reset(scene, _random_start(rng, away=0.7))
    kinds = np.array([COMBINATIONS.index((item.colour, item.shape)) for item in scene.objects], dtype=np.int8)
    cells, pixels = [], np.zeros(len(kinds), dtype=np.int64)
    for camera in CAMERAS:
        mask = world.segment(camera)
        cells.append(_label_cells(mask, kinds, sizes.grid))
        if camera == "scene":
            pixels = np.array([(mask == index).sum() for index in range(len(kinds))])
    seen = tuple(
        SeenObject(item.colour, item.shape, float(u), float(v))
        for item, (u, v), count in zip(scene.objects, _project_objects(world), pixels, strict=True)
        if count >= LEAST_PIXELS and 0 <= u < 1 and 0 <= v < 1
    )
    return View(render_views(world, sizes.image_size), np.stack(cells), seen)


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


def _project_objects(world: World) -> NDArray[np.float32]:
    """[O, 2]: u and v of each object's centre in the scene image."""
    places = [np.array(world.project("scene", centre)) / RENDER_SIZE for centre in world.object_positions]
    return np.array(places, dtype=np.float32)


def _label_cells(mask: NDArray[np.int8], kinds: NDArray[np.int8], grid: int) -> NDArray[np.int8]:
    """For each cell, the kind of the object with the most pixels in it, if it covers an eighth; else `BACKGROUND`."""
    side = mask.shape[0] // grid
    blocks = mask.reshape(grid, side, grid, side).transpose(0, 2, 1, 3).reshape(grid * grid, -1)
    counts = np.stack([(blocks == index).sum(axis=1) for index in range(len(kinds))], axis=1)
    best = counts.argmax(axis=1)
    return np.where(counts.max(axis=1) * 8 >= blocks.shape[1], kinds[best], BACKGROUND).astype(np.int8)


def check_robot(robot: Robot) -> None:
    """ConfigurationError unless the robot file describes the arm that the simulator moves."""
    for what, expected, got in (("cameras", CAMERAS, robot.camera_names), ("joints", JOINTS, robot.axis_names)):
        if got != expected:
            raise ConfigurationError(
                f"simulated data for robot {robot.name!r}: {what}: expected {', '.join(expected)} (the simulated "
                f"arm's), got {', '.join(got)}; set robot: demo_arm"
            )
