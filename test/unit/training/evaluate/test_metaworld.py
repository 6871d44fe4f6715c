"""MetaWorld as an environment. What needs the package runs where it is (`make metaworld`); the rest everywhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import pytest
from support.metaworld import needs_metaworld

from ki_vla_ros.errors import ConfigurationError, SimulationError
from training.evaluate import HELD_OUT, open_environment
from training.evaluate.metaworld import INSTRUCTIONS, SETS, MetaWorld, tasks_of

TASKS = "drawer-open-v3,drawer-close-v3"


@pytest.fixture(scope="module")
def environment() -> Iterator[MetaWorld]:
    environment = MetaWorld(TASKS, 64)
    yield environment
    environment.close()


def test_a_name_means_a_task_several_or_a_set() -> None:
    assert tasks_of("reach-v3") == ("reach-v3",)
    assert tasks_of(TASKS) == ("drawer-open-v3", "drawer-close-v3")
    levels = [tasks_of(level) for level in ("easy", "medium", "hard", "very_hard")]
    assert [len(level) for level in levels] == [28, 11, 6, 5]  # LeRobot's
    assert sorted(task for level in levels for task in level) == sorted(INSTRUCTIONS) == sorted(tasks_of("mt50"))
    assert len(tasks_of("mt10")) == len(set(SETS["mt10"])) == 10
    assert len({INSTRUCTIONS[task] for task in tasks_of("mt10")}) == 10


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("drawer-open-v2", "got 'drawer-open-v2'"),
        ("mt11", "one of easy, mt10, mt50, .*got 'mt11'"),
        ("reach-v3,", "got ''"),
        ("reach-v3,reach-v3", "each task once"),
    ],
)
def test_a_task_that_there_is_not_is_refused_without_the_package(name: str, fault: str) -> None:
    with pytest.raises(ConfigurationError, match=f"environment metaworld/{name}: .*{fault}"):
        open_environment(f"metaworld/{name}")


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"cameras": ("topview",)}, "cameras: expected corner2, got 'topview'"),
        ({"image_size": 0}, "image_size: expected 16 to 1024 pixels, got 0"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, object], fault: str) -> None:
    with pytest.raises(ConfigurationError, match=fault):
        open_environment("metaworld/reach-v3", **options)


def test_a_missing_package_names_the_environment_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mujoco")
    monkeypatch.setitem(sys.modules, "metaworld", None)
    with pytest.raises(SimulationError, match=r"the package metaworld, got .*; run 'make metaworld', and then this"):
        open_environment("metaworld/reach-v3")


@needs_metaworld
def test_a_seed_decides_task_and_episode(environment: MetaWorld) -> None:
    def play(seed: int) -> list[np.ndarray]:
        environment.reset(seed)
        seen = []
        for _ in range(6):
            images, state_S = environment.observe()
            seen += [images["corner2"], state_S, environment.demonstrate()]
            environment.step(environment.demonstrate())
        return seen

    first, other, again = play(HELD_OUT), play(HELD_OUT + 2), play(HELD_OUT)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])
    environment.reset(HELD_OUT + 1)
    assert environment.instruction == "Push and close a drawer"
    environment.reset(HELD_OUT)
    assert environment.instruction == "Open a drawer"


@needs_metaworld
def test_numbers_are_the_robot_files(environment: MetaWorld) -> None:
    """m: the hand begins at 0, 0.6, 0.2; action 1 of the package is 0.01 m, and 1 closes its gripper."""
    environment.reset(0)
    images, state_S = environment.observe()
    assert images["corner2"].shape == (64, 64, 3)
    np.testing.assert_allclose(state_S[:3], [0.0, 0.6, 0.2], atol=0.02)
    opened, closed = environment.robot.actions[3].ends or (0.0, 0.0)
    for _ in range(40):
        environment.step(np.array([0.0025, 0.0, 0.0, closed]))
    after_S = environment.observe()[1]
    # The hand follows a little behind its target.
    np.testing.assert_allclose(after_S[:3] - state_S[:3], [0.1, 0.0, 0.0], atol=0.015)
    assert after_S[3] == pytest.approx(closed, abs=0.006)
    for _ in range(40):
        environment.step(np.array([0.0, 0.0, 0.0, opened]))
    assert environment.observe()[1][3] == pytest.approx(opened, abs=0.002)


@needs_metaworld
def test_images_are_the_right_way_up(environment: MetaWorld) -> None:
    """A hand that rises goes up, and one that leaves the robot (y grows) to the right, as in LeRobot's datasets."""

    def place() -> np.ndarray:
        """Row and column of the left finger, the only thing that is turquoise."""
        red, green, blue = np.moveaxis(environment.observe()[0]["corner2"].astype(int), -1, 0)
        found: np.ndarray = np.argwhere((blue - red > 40) & (green - red > 40)).mean(0)
        return found

    def moved(*direction: float) -> np.ndarray:
        environment.reset(0)
        before = place()
        for _ in range(12):
            environment.step(np.array([*direction, 0.1]))
        return place() - before

    assert moved(0.0, 0.0, 0.01)[0] < -3.0
    assert moved(0.0, 0.01, 0.0)[1] > 2.0


@needs_metaworld
@pytest.mark.parametrize("action_D", [np.zeros(3), np.array([0.0, 0.0, np.nan, 0.1])])
def test_actions_that_are_none_are_refused(environment: MetaWorld, action_D: np.ndarray) -> None:
    with pytest.raises(SimulationError, match="MetaWorld: action: expected 4 finite numbers"):
        environment.step(action_D)


@needs_metaworld
@pytest.mark.slow
@pytest.mark.parametrize("name", ["reach-v3", "peg-insert-side-v3", "button-press-topdown-v3"])
def test_the_expert_succeeds(name: str) -> None:
    environment = MetaWorld(name, cameras=())
    environment.reset(3)
    for _ in range(round(environment.time_limit_s / environment.robot.action_period_s)):
        assert environment.observe()[0] == {}
        environment.step(environment.demonstrate())
        if environment.success:
            break
    assert environment.success
    environment.reset(3)
    assert not environment.success
    environment.close()


@needs_metaworld
def test_every_task_has_its_expert() -> None:
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    from training.evaluate.metaworld import _find

    assert set(ALL_V3_ENVIRONMENTS) == set(INSTRUCTIONS)
    for task in INSTRUCTIONS:
        assert all(_find(task))


@needs_metaworld
@pytest.mark.slow
def test_every_task_opens_and_is_drawn() -> None:
    """Whether its expert solves it: docs/results/benchmarks.md, metaworld_mt50_expert."""
    seen = set()
    for name in INSTRUCTIONS:
        environment = MetaWorld(name, 64)
        environment.reset(HELD_OUT)
        image = environment.observe()[0]["corner2"]
        assert image.shape == (64, 64, 3) and image.std() > 20.0, name
        seen.add(image.tobytes())
        environment.close()
    assert len(seen) > 45, "not the same picture"
