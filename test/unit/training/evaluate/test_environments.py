"""Environments: each speaks its robot file's language, and a seed decides an episode."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from support.aloha import needs_aloha

from ki_vla_ros.errors import ConfigurationError, SimulationError
from ki_vla_ros.sim import ArmEnvironment, Demonstrator, Split, Task, World, sample_scene
from training.evaluate import Environment, open_environment
from training.evaluate.environments import NAMES


@pytest.fixture(
    scope="module",
    params=["arm", *(pytest.param(f"aloha/{task}", marks=needs_aloha) for task in ("transfer_cube", "insertion"))],
)
def environment(request: pytest.FixtureRequest) -> Iterator[Environment]:
    environment = open_environment(request.param, image_size=64)
    yield environment
    environment.close()


def play(environment: Environment, seed: int, steps: int) -> list[np.ndarray]:
    """All that an episode shows."""
    environment.reset(seed)
    seen: list[np.ndarray] = []
    for _ in range(steps):
        images, state_S = environment.observe()
        action_D = environment.demonstrate()
        seen += [*images.values(), state_S, action_D]
        environment.step(action_D)
    return seen


def test_a_seed_decides_the_episode(environment: Environment) -> None:
    first, other, again = (play(environment, seed, 8) for seed in (3, 4, 3))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_images_state_and_actions_are_those_of_the_robot_file(environment: Environment) -> None:
    environment.reset(5)
    robot = environment.robot
    images, state_S = environment.observe()
    assert tuple(images) == robot.camera_names and environment.instruction
    for image in images.values():
        assert image.dtype == np.uint8 and image.shape[2] == 3 and max(image.shape) == 64 and image.std() > 5.0
    assert state_S.shape == (len(robot.state),)
    low_D, high_D = np.array([action.span for action in robot.actions]).T
    for _ in range(20):
        action_D = environment.demonstrate()
        assert np.all(action_D >= low_D) and np.all(action_D <= high_D)
        environment.step(action_D)
    # Every action is a place of what the state measures, and was nearly reached.
    np.testing.assert_allclose(environment.observe()[1], action_D, atol=0.1)
    assert not environment.success


@pytest.mark.slow
def test_the_expert_succeeds(environment: Environment) -> None:
    environment.reset(7)
    for _ in range(round(environment.time_limit_s / environment.robot.action_period_s)):
        environment.step(environment.demonstrate())
        if environment.success:
            break
    assert environment.success
    environment.reset(7)
    assert not environment.success


@needs_aloha
def test_the_image_shows_the_cube_where_its_place_is() -> None:
    environment = open_environment("aloha/transfer_cube", image_size=320, cameras=("top",))
    for seed in (0, 1, 2):
        environment.reset(seed)
        place = environment.place("top")
        assert place is not None
        red, green, blue = environment.observe()[0]["top"][int(240 * place[1]), int(320 * place[0])].astype(int)
        assert red > max(green, blue) + 60
    environment.close()
    assert open_environment("aloha/insertion", cameras=()).place("top") is None, "it is about two things"


@pytest.mark.parametrize("name", ["aloha", "aloha/", "arms", "arm/", "/", ""])
def test_a_name_that_there_is_not_is_answered_with_those_there_are(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"environment: expected one of {', '.join(NAMES)}, got {name!r}"):
        open_environment(name)


@needs_aloha
@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"cameras": ("front",)}, "cameras: expected some of top, left_wrist, right_wrist, got 'front'"),
        ({"image_size": 0}, "image_size: expected"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, object], fault: str) -> None:
    with pytest.raises((ConfigurationError, SimulationError), match=fault):
        open_environment("aloha/transfer_cube", **options)
    with pytest.raises(ConfigurationError, match=r"ALOHA: task: expected one of .*, got 'juggle'"):
        open_environment("aloha/juggle")


@pytest.mark.parametrize("split", ["known", "recombined", "novel"])
def test_the_arm_is_asked_for_what_its_split_commands(split: Split) -> None:
    environment = open_environment(f"arm/{split}", image_size=32)
    for seed in range(5):
        environment.reset(seed)
        assert environment.instruction == sample_scene(seed, split=split).task.instruction
        assert not environment.followed and not environment.over
    environment.close()


def test_who_reaches_another_object_has_not_followed_and_is_done() -> None:
    """Seed 3 of `known` is asked to touch; what lies elsewhere is touched in its place."""
    environment, scene = ArmEnvironment("known", image_size=32), sample_scene(3, split="known")
    assert scene.task.verb == "touch"
    for wanted in (scene.target, (scene.target + 1) % len(scene.objects)):
        environment.reset(3)
        item = scene.objects[wanted]
        asked = replace(scene, task=Task("touch", item.colour, item.shape))
        demonstrator, step = Demonstrator(World(32, render=False)), 0
        plan = demonstrator.plan(environment.observe()[1], None, asked)
        while not environment.over:
            step += 1
            environment.step(plan.position(step * environment.robot.action_period_s))
        assert environment.followed == environment.success == (wanted == scene.target)
        assert step < 8.0 / environment.robot.action_period_s, "before the time limit"
    environment.close()


def test_a_split_that_there_is_not_is_answered_with_those_there_are() -> None:
    with pytest.raises(ConfigurationError, match=r"expected one of arm/train, .* arm/novel, got 'arm/touch'"):
        open_environment("arm/touch")
