"""The simulated robot: physics, objects, cameras and judge."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from ki_vla_ros.errors import SimulationError
from ki_vla_ros.sim.demonstrator import Demonstrator, tip_to_joints
from ki_vla_ros.sim.task import COLOURS, Scene, SceneObject, Task, sample_scene
from ki_vla_ros.sim.world import CAMERAS, HOME_J, JOINTS, RGBA, TIMESTEP_S, World

CUBE = SceneObject("red", "cube", 0.36, 0.10, 0.4, 1.0)
BALL = SceneObject("red", "ball", 0.46, -0.05, 0.0, 1.1)
DISC = SceneObject("blue", "disc", 0.33, -0.15, 0.0, 0.9)
POLE = SceneObject("green", "pole", 0.48, 0.15, 0.0, 1.0)
OBJECTS = (CUBE, BALL, DISC, POLE)


def scene_of(task: Task, objects: tuple[SceneObject, ...] = OBJECTS) -> Scene:
    return Scene(0, objects, task)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = World(render_size=192)
    yield world
    world.close()


@pytest.fixture(scope="module")
def blind() -> World:
    """A world without images."""
    return World(render=False)


def carry_out(world: World, task: Task, scene: Scene) -> None:
    """Lets the demonstrator do `task` in the world's running `scene`, whose own task may differ."""
    reference = Demonstrator(world).plan(world.joint_position_J, None, Scene(0, scene.objects, task))
    begin_s = world.time_s
    while world.time_s < begin_s + reference.duration_s + 0.8:
        world.step(reference.position(world.time_s - begin_s + TIMESTEP_S))


# --- physics


def test_reset_puts_everything_in_place(blind: World) -> None:
    blind.reset(scene_of(Task("touch", "red", "ball")))
    assert blind.joints == JOINTS
    assert blind.time_s == 0.0
    np.testing.assert_allclose(blind.joint_position_J, HOME_J)
    np.testing.assert_array_equal(blind.joint_velocity_J, np.zeros(7))
    np.testing.assert_allclose(blind.tip_position, (0.30, 0.0, 0.25), atol=1e-8)
    expected = [(item.x, item.y, item.top_m / 2.0) for item in OBJECTS]
    np.testing.assert_allclose(blind.object_positions, expected, atol=1e-12)


def test_same_commands_same_motion(blind: World) -> None:
    scene = sample_scene(3, split="all")
    runs = []
    for _ in range(2):
        blind.reset(scene)
        carry_out(blind, scene.task, scene)
        runs.append(np.concatenate([blind.joint_position_J, blind.joint_velocity_J, blind.object_positions.ravel()]))
    np.testing.assert_array_equal(runs[0], runs[1])


def test_objects_stay_where_they_stand(blind: World) -> None:
    for seed in range(4):
        blind.reset(sample_scene(seed, split="all"))
        before = blind.object_positions
        for _ in range(500):
            blind.step(HOME_J)
        assert np.abs(blind.object_positions - before).max() < 1e-3
        assert not blind.judge.done


def test_unused_slots_touch_nothing_and_keep_still(blind: World) -> None:
    """After a scene of four objects comes a scene of one: the other bodies wait below the floor."""
    blind.reset(scene_of(Task("touch", "red", "ball")))
    blind.reset(scene_of(Task("touch", "red", "cube"), (CUBE,)))
    parked = blind._data.xpos[blind._bodies[1:]].copy()
    assert np.all(parked[:, 2] < -0.5)
    for _ in range(200):
        blind.step(HOME_J)
    np.testing.assert_allclose(blind._data.xpos[blind._bodies[1:]], parked, atol=1e-9)
    bodies = blind._model.geom_bodyid[blind._data.contact.geom]
    assert not np.isin(bodies, blind._bodies[1:]).any()


def test_arm_follows_closely_and_holds(blind: World) -> None:
    """At a tenth of a radian per 0.1 s in every joint, the arm is a few ms behind in motion and exact at rest."""
    blind.reset(scene_of(Task("touch", "red", "ball")))
    speed_J = np.array([1.0, 0.5, -0.5, 0.5, -0.5, 1.0, 0.02])
    for k in range(250):
        command_J = HOME_J + speed_J * (k + 1) * TIMESTEP_S
        blind.step(command_J)
    lag_J = (command_J - blind.joint_position_J) / speed_J
    assert np.all(lag_J > 0.0) and np.all(lag_J < 0.010)
    for _ in range(250):
        blind.step(command_J)
    np.testing.assert_allclose(blind.joint_position_J, command_J, atol=1e-5)


def test_command_beyond_the_limits_ends_at_the_limit(blind: World) -> None:
    blind.reset(scene_of(Task("touch", "red", "ball")))
    command_J = HOME_J.copy()
    command_J[0], command_J[6] = 99.0, -1.0
    for _ in range(1500):
        blind.step(command_J)
    assert blind.joint_position_J[0] == pytest.approx(blind.upper_J[0], abs=1e-3)
    assert blind.joint_position_J[6] == pytest.approx(0.0, abs=1e-3)


def test_both_fingers_move(blind: World) -> None:
    blind.reset(scene_of(Task("touch", "red", "ball")))
    command_J = HOME_J.copy()
    command_J[6] = 0.03
    for _ in range(500):
        blind.step(command_J)
    assert blind._data.qpos[blind._mirror] == pytest.approx(0.03, abs=2e-4)


@pytest.mark.parametrize("command", [[0.0] * 6, [np.nan] * 7])
def test_unusable_command_is_refused(blind: World, command: list[float]) -> None:
    blind.reset(scene_of(Task("touch", "red", "ball")))
    with pytest.raises(SimulationError, match="joint positions: expected finite numbers for shoulder_pan"):
        blind.step(command)


def test_world_without_a_scene_says_so() -> None:
    with pytest.raises(SimulationError, match="no scene yet; call reset"):
        World(render=False).step(HOME_J)


def test_scene_that_does_not_fit_is_refused(blind: World) -> None:
    ball = Task("touch", "red", "ball")
    with pytest.raises(SimulationError, match="expected at most 5 objects, got 8"):
        blind.reset(scene_of(ball, OBJECTS * 2))
    giant = SceneObject("red", "ball", 0.4, 0.0, 0.0, 2.0)
    with pytest.raises(SimulationError, match=r"size of the red ball: expected 0.9..1.1, got 2.0"):
        blind.reset(scene_of(ball, (giant,)))


# --- judge


@pytest.mark.parametrize("index", range(4))
def test_touching_the_instructed_object_succeeds(blind: World, index: int) -> None:
    task = Task("touch", OBJECTS[index].colour, OBJECTS[index].shape)
    scene = scene_of(task)
    blind.reset(scene)
    assert (blind.judge.reached, blind.judge.success, blind.judge.done) == (None, False, False)
    carry_out(blind, task, scene)
    assert (blind.judge.reached, blind.judge.success, blind.judge.done) == (index, True, True)


def test_touching_the_wrong_object_is_reported_and_stays(blind: World) -> None:
    scene = scene_of(Task("touch", "red", "cube"))
    blind.reset(scene)
    carry_out(blind, Task("touch", "blue", "disc"), scene)
    assert (blind.judge.reached, blind.judge.success, blind.judge.done) == (2, False, True)
    carry_out(blind, scene.task, scene)
    assert (blind.judge.reached, blind.judge.success, blind.judge.done) == (2, False, True)
    blind.reset(scene)
    assert (blind.judge.reached, blind.judge.done) == (None, False)


@pytest.mark.parametrize("index", range(4))
def test_pointing_at_the_instructed_object_succeeds(blind: World, index: int) -> None:
    task = Task("point at", OBJECTS[index].colour, OBJECTS[index].shape)
    scene = scene_of(task)
    blind.reset(scene)
    carry_out(blind, task, scene)
    assert (blind.judge.reached, blind.judge.success) == (index, True)


def test_pointing_at_the_wrong_object_is_reported(blind: World) -> None:
    scene = scene_of(Task("point at", "red", "cube"))
    blind.reset(scene)
    carry_out(blind, Task("point at", "green", "pole"), scene)
    assert (blind.judge.reached, blind.judge.success, blind.judge.done) == (3, False, True)


def test_touching_where_pointing_was_asked_fails(blind: World) -> None:
    scene = scene_of(Task("point at", "red", "cube"))
    blind.reset(scene)
    carry_out(blind, Task("touch", "red", "cube"), scene)
    assert (blind.judge.reached, blind.judge.success, blind.judge.done) == (0, False, True)


@pytest.mark.parametrize(
    ("offset", "hold_s", "reached"),
    [
        ((0.0, 0.0, 0.06), 0.55, 1),
        ((0.0, 0.0, 0.06), 0.45, None),
        ((0.0, 0.0, 0.11), 0.8, None),
        ((0.025, 0.0, 0.06), 0.8, 1),
        ((0.035, 0.0, 0.06), 0.8, None),
    ],
)
def test_pointing_needs_place_and_time(
    blind: World, offset: tuple[float, float, float], hold_s: float, reached: int | None
) -> None:
    scene = scene_of(Task("point at", "red", "ball"))
    joint_J = tip_to_joints(np.array([BALL.x, BALL.y, BALL.top_m]) + offset, 0.02)
    blind.reset(scene, joint_J)
    for _ in range(round(hold_s / TIMESTEP_S)):
        blind.step(joint_J)
    assert blind.judge.reached == reached


def test_hovering_is_no_touch(blind: World) -> None:
    scene = scene_of(Task("touch", "red", "ball"))
    joint_J = tip_to_joints((BALL.x, BALL.y, BALL.top_m + 0.06))
    blind.reset(scene, joint_J)
    for _ in range(400):
        blind.step(joint_J)
    assert not blind.judge.done


def test_time_runs_out_after_eight_seconds(blind: World) -> None:
    blind.reset(scene_of(Task("touch", "red", "ball")))
    for _ in range(3999):
        blind.step(HOME_J)
    assert not blind.judge.done
    for _ in range(2):
        blind.step(HOME_J)
    assert (blind.judge.reached, blind.judge.success, blind.judge.done) == (None, False, True)


# --- cameras


@pytest.mark.parametrize("camera", CAMERAS)
def test_picture_is_square_rgb_and_repeatable(world: World, camera: str) -> None:
    world.reset(scene_of(Task("touch", "red", "ball")))
    picture = world.render(camera)
    assert picture.shape == (192, 192, 3) and picture.dtype == np.uint8
    assert picture.std() > 10.0
    np.testing.assert_array_equal(picture, world.render(camera))


@pytest.mark.parametrize("colour", COLOURS)
def test_objects_are_drawn_in_their_colours(world: World, colour: str) -> None:
    """In an object's pixels, as the segmentation gives them, the nearest named colour is its own, brightness aside."""
    world.reset(scene_of(Task("touch", colour, "cube"), (SceneObject(colour, "cube", 0.45, 0.1, 0.3, 1.0),)))
    seen = world.render("scene")[world.segment("scene") == 0].astype(float).mean(axis=0)
    directions = {name: np.array(rgba[:3]) / np.linalg.norm(rgba[:3]) for name, rgba in RGBA.items()}
    assert max(directions, key=lambda name: float(directions[name] @ seen)) == colour


def test_segmentation_shows_each_object_once_and_large_enough(world: World) -> None:
    """At 96 px, half of this size, every object is about 8 px across."""
    scene = scene_of(Task("touch", "red", "ball"))
    world.reset(scene)
    labels = world.segment("scene")
    assert labels.dtype == np.int8
    assert set(np.unique(labels)) == {-1, 0, 1, 2, 3}
    for index in range(4):
        assert (labels == index).sum() > np.pi / 4 * (2 * 7.5) ** 2


def test_projection_agrees_with_segmentation(world: World) -> None:
    """The middle of a ball's pixels is where its centre is projected, anywhere on the table, in both images."""
    for x, y in ((0.32, -0.2), (0.32, 0.2), (0.50, -0.2), (0.50, 0.2), (0.40, 0.0)):
        ball = SceneObject("green", "ball", x, y, 0.0, 1.0)
        # The arm looks at it from above and aside, so that the fingers hide nothing.
        joint_J = tip_to_joints((x - 0.03, y * 0.8, 0.22), 0.04)
        world.reset(scene_of(Task("touch", "green", "ball"), (ball,)), joint_J)
        for camera in CAMERAS:
            rows, columns = np.nonzero(world.segment(camera) == 0)
            if camera == "scene" and rows.size < 150:
                continue  # behind the gripper
            seen = (columns.mean() + 0.5, rows.mean() + 0.5)
            np.testing.assert_allclose(world.project(camera, world.object_positions[0]), seen, atol=1.5)


def test_hidden_slots_are_not_drawn(world: World) -> None:
    world.reset(scene_of(Task("touch", "red", "ball")))
    world.reset(scene_of(Task("touch", "red", "cube"), (CUBE,)))
    for camera in CAMERAS:
        assert set(np.unique(world.segment(camera))) <= {-1, 0}


def test_images_show_the_present_state(world: World) -> None:
    """After a step the images show the arm at the joint positions that are read then."""
    scene = scene_of(Task("touch", "red", "ball"))
    world.reset(scene)
    command_J = HOME_J + np.array([0.5, 0.2, 0.0, 0.0, 0.0, 0.0, 0.0])
    for _ in range(20):
        world.step(command_J)
    moving = world.render("scene")
    reached_J = world.joint_position_J
    world.reset(scene, reached_J)
    assert np.abs(moving.astype(int) - world.render("scene").astype(int)).mean() < 0.05


def test_unknown_camera_and_point_behind_it_are_refused(world: World) -> None:
    world.reset(scene_of(Task("touch", "red", "ball")))
    for look in (world.render, world.segment, lambda name: world.project(name, (0, 0, 0))):
        with pytest.raises(SimulationError, match="camera 'front': expected one of scene, wrist"):
            look("front")
    with pytest.raises(SimulationError, match="behind camera 'scene'"):
        world.project("scene", (3.0, 0.0, 2.0))


def test_world_without_pictures_refuses_them(blind: World) -> None:
    blind.reset(scene_of(Task("touch", "red", "ball")))
    with pytest.raises(SimulationError, match=r"use World\(render=True\)"):
        blind.render("scene")


@pytest.mark.parametrize("size", [0, 100_000])
def test_impossible_picture_size_is_refused(size: int) -> None:
    with pytest.raises(SimulationError, match=rf"render_size: expected 1..2048 pixels, got {size}"):
        World(render_size=size)
