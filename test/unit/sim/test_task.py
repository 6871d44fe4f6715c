"""Tasks and scenes: what may be commanded in which split, and that every scene needs its whole instruction."""

from __future__ import annotations

from itertools import combinations, product
from typing import get_args

import numpy as np
import pytest

from ki_vla_ros.errors import InstructionError, SimulationError
from ki_vla_ros.sim.task import (
    COLOURS,
    HELD_OUT,
    MIN_DISTANCE_M,
    NOVEL_COLOUR,
    SHAPES,
    SIZE_RANGE,
    VERBS,
    X_RANGE_M,
    Y_RANGE_M,
    Scene,
    SceneObject,
    Split,
    Task,
    sample_scene,
)

SEEDS = range(150)


def kind(item: SceneObject | Task) -> tuple[str, str]:
    return item.colour, item.shape


def test_held_out_names_each_colour_once_and_every_shape() -> None:
    assert len(HELD_OUT) == 6
    assert sorted(colour for colour, _ in HELD_OUT) == sorted(COLOURS)
    assert {shape for _, shape in HELD_OUT} == set(SHAPES)


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", set(product(COLOURS, SHAPES)) - HELD_OUT),
        ("held_out", set(HELD_OUT)),
        ("all", set(product(COLOURS, SHAPES))),
        ("known", {kind for kind in product(COLOURS, SHAPES) if kind not in HELD_OUT and kind[0] != NOVEL_COLOUR}),
        ("recombined", {kind for kind in HELD_OUT if kind[0] != NOVEL_COLOUR}),
        ("novel", set(product([NOVEL_COLOUR], SHAPES))),
    ],
)
def test_split_commands_exactly_its_combinations(split: str, expected: set[tuple[str, str]]) -> None:
    tasks = [sample_scene(seed, split=split).task for seed in range(400)]
    assert {kind(task) for task in tasks} == expected
    assert {task.verb for task in tasks} == set(VERBS)


def test_held_out_combinations_appear_as_distractors_in_training() -> None:
    scenes = [sample_scene(seed, split="train") for seed in SEEDS]
    assert any(kind(item) in HELD_OUT for scene in scenes for item in scene.objects)


@pytest.mark.parametrize("split", ["known", "recombined"])
def test_nothing_of_the_novel_colour_is_in_sight(split: str) -> None:
    scenes = [sample_scene(seed, split=split) for seed in SEEDS]
    assert not any(item.colour == NOVEL_COLOUR for scene in scenes for item in scene.objects)
    assert {len(scene.objects) for scene in scenes} == {3, 4, 5}


@pytest.mark.parametrize("split", get_args(Split))
def test_every_scene_needs_its_whole_instruction(split: str) -> None:
    for seed in SEEDS:
        scene = sample_scene(seed, split=split)
        kinds = [kind(item) for item in scene.objects]
        assert 3 <= len(kinds) <= 5
        assert len(set(kinds)) == len(kinds)
        target = scene.objects[scene.target]
        assert kind(target) == kind(scene.task)
        others = [item for item in scene.objects if item is not target]
        assert any(item.colour == target.colour for item in others)
        assert any(item.shape == target.shape for item in others)


def test_objects_lie_apart_within_reach() -> None:
    for seed in SEEDS:
        objects = sample_scene(seed, split="all").objects
        for item in objects:
            assert X_RANGE_M[0] <= item.x <= X_RANGE_M[1]
            assert Y_RANGE_M[0] <= item.y <= Y_RANGE_M[1]
            assert SIZE_RANGE[0] <= item.size <= SIZE_RANGE[1]
        assert all(np.hypot(a.x - b.x, a.y - b.y) >= MIN_DISTANCE_M for a, b in combinations(objects, 2))


def test_target_takes_every_place_in_the_list() -> None:
    assert {sample_scene(seed, split="all").target for seed in SEEDS} == set(range(5))


def test_seed_decides_the_scene() -> None:
    """The numbers are pinned: recorded episodes and reported figures name scenes by their seeds."""
    scene = sample_scene(1, split="train")
    assert scene == sample_scene(1, split="train") != sample_scene(2, split="train")
    assert scene.task == Task("touch", "white", "pole")
    assert [kind(item) for item in scene.objects] == [
        ("red", "ball"),
        ("yellow", "pole"),
        ("yellow", "cube"),
        ("white", "ball"),
        ("white", "pole"),
    ]
    first = scene.objects[0]
    assert (first.x, first.y, first.yaw, first.size) == pytest.approx(
        (0.312170, -0.042630, 0.887991, 1.070527), abs=1e-6
    )


def test_splits_share_no_scene() -> None:
    splits = get_args(Split)
    places = [{sample_scene(seed, split=split).objects[0].x for seed in SEEDS} for split in splits]
    # Seeds beyond 32 bits, whose low bits are those of the small ones.
    places += [
        {sample_scene(2**32 * k + seed, split=split).objects[0].x for seed in SEEDS} for split in splits for k in (1, 2)
    ]
    assert all(a.isdisjoint(b) for a, b in combinations(places, 2))


def test_scene_is_built_around_a_given_task() -> None:
    task = Task("point at", "red", "disc")
    for seed in range(20):
        scene = sample_scene(seed, split="all", task=task)
        assert scene.task == task
        assert kind(scene.objects[scene.target]) == ("red", "disc")


def test_task_outside_its_split_is_refused() -> None:
    with pytest.raises(SimulationError, match=r"'touch the red disc' is never commanded in split 'train'"):
        sample_scene(0, split="train", task=Task("touch", "red", "disc"))
    with pytest.raises(SimulationError, match=r"never commanded in split 'held_out'"):
        sample_scene(0, split="held_out", task=Task("touch", "red", "cube"))


def test_unusable_arguments_are_refused() -> None:
    with pytest.raises(SimulationError, match=r"split 'test': expected one of train, held_out, all"):
        sample_scene(0, split="test")  # type: ignore[arg-type]
    with pytest.raises(SimulationError, match=r"scene seed -1: expected 0 to \d+"):
        sample_scene(-1, split="all")


def test_scene_without_its_target_says_so() -> None:
    scene = Scene(7, (SceneObject("red", "cube", 0.4, 0.0, 0.0, 1.0),), Task("touch", "blue", "ball"))
    with pytest.raises(SimulationError, match="scene 7 has no blue ball"):
        _ = scene.target


@pytest.mark.parametrize("words", list(product(VERBS, COLOURS, SHAPES)))
def test_instruction_parses_back(words: tuple[str, str, str]) -> None:
    task = Task(*words)
    assert Task.parse(task.instruction) == task


def test_parse_forgives_case_and_spacing_only() -> None:
    assert Task.parse("  Point AT the  blue ball ") == Task("point at", "blue", "ball")
    for text in ("", "touch", "touch the pink cube", "touch the red cube now", "touch red cube", "push the red cube"):
        with pytest.raises(InstructionError, match="simulated robot knows"):
            Task.parse(text)
