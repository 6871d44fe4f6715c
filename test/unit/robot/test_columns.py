"""Where a dataset has a robot file's dimensions: by index, by name, or in order; never by guessing."""

from __future__ import annotations

from typing import Any

import pytest

from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.robot import StateDimension, find_columns, flatten_names

STATE = "observation.state"


def dimensions(**datasets: dict[str, Any]) -> list[StateDimension]:
    return [
        StateDimension.model_validate({"name": name, "kind": "joint_position", "unit": "rad", "dataset": dataset})
        for name, dataset in datasets.items()
    ]


@pytest.mark.parametrize(
    ("datasets", "features", "places"),
    [
        ({"a": {}, "b": {}}, {STATE: (2, ())}, [(STATE, 0), (STATE, 1)]),
        ({"a": {}, "b": {}}, {STATE: (2, ("motor_0", "1"))}, [(STATE, 0), (STATE, 1)]),
        ({"a": {}, "b": {}}, {STATE: (3, ("c", "b", "a"))}, [(STATE, 2), (STATE, 1)]),
        ({"a": {"name": "a.pos"}}, {STATE: (2, ("b.pos", "a.pos"))}, [(STATE, 1)]),
        ({"a": {"index": 4}, "b": {"index": 0}}, {STATE: (5, ())}, [(STATE, 4), (STATE, 0)]),
        ({"a": {}, "b": {"column": "grip"}}, {STATE: (1, ()), "grip": (1, ())}, [(STATE, 0), ("grip", 0)]),
        ({"a": {}, "b": {}}, {STATE: (2, ("main_a", "main_b"))}, [(STATE, 0), (STATE, 1)]),
        ({"b": {}, "c": {}}, {STATE: (2, ("a.b", "b.c"))}, [(STATE, 0), (STATE, 1)]),
        # LIBERO names two elements alike; their indices tell them apart.
        ({"a": {"index": 0}, "b": {"index": 1}}, {STATE: (2, ("g", "g"))}, [(STATE, 0), (STATE, 1)]),
    ],
)
def test_dimensions_are_found(datasets: Any, features: Any, places: list[tuple[str, int]]) -> None:
    assert find_columns(dimensions(**datasets), STATE, features) == places


@pytest.mark.parametrize(
    ("datasets", "features", "fault"),
    [
        ({"a": {}}, {STATE: (2, ())}, "expected 1 values in observation.state .* got 2; give name or index"),
        ({"a": {}}, {STATE: (2, ("x", "y"))}, r"got 2 \(x, y\); give name or index of each"),
        ({"a": {}, "bb": {}}, {STATE: (2, ("a", "bc"))}, r"'bb': dataset.name: .* got bb; did you mean 'bc'\?"),
        ({"a": {"name": "a.pos"}}, {STATE: (1, ())}, "dataset.name: .* which the dataset does not give, got a"),
        ({"a": {}}, {STATE: (2, ("a", "a"))}, r"'a': dataset.name: .* got a 2 times; give its index"),
        ({"a": {"index": 2}}, {STATE: (2, ())}, "'a': dataset.index: expected at most 1 in observation.state, got 2"),
        # Names with something before or behind them still say that this is another order.
        ({"a": {}, "b": {}}, {STATE: (2, ("b.pos", "a.pos"))}, "expected 'a.pos' at index 0 .* got it at 1"),
        ({"a_joint": {}, "b": {}}, {STATE: (2, ("b", "x.A-joint"))}, r"'a_joint': dataset.name: .* got a_joint"),
        ({"a": {}, "b": {}}, {STATE: (2, ("main_x", "main_a"))}, r"\(main_x, main_a\); give name or index of each"),
        # The names of another robot, of equal width.
        ({"a": {}, "b": {}}, {STATE: (2, ("x", "y"))}, r"'a': dataset.name: .* got 'x' at index 0 .*; give name or"),
        ({"a": {}, "b": {}}, {STATE: (2, ("a.pos", "grip"))}, "'b': dataset.name: .* got 'grip' at index 1"),
        ({"arm_0": {}, "arm_1": {}}, {STATE: (2, ("leg_0", "leg_1"))}, "'arm_0': dataset.name: .* got 'leg_0'"),
        ({"a": {"column": "stat"}}, {"state": (1, ())}, r"'a': dataset.column: expected one of state, got stat; did"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_named(datasets: Any, features: Any, fault: str) -> None:
    with pytest.raises(ConfigurationError, match=fault):
        find_columns(dimensions(**datasets), STATE, features)


@pytest.mark.parametrize(
    "names",
    [
        ["a", "b"],
        [["a", "b"]],
        {"motors": ["a", "b"]},
        {"b": 1, "a": 0},
        {"left": {"motors": ["a"]}, "right": {"motors": ["b"]}},
        {"motors": {"b": 1, "a": 0}},
        {"arm": ["a"], "hand": "b"},
        [{"motors": ["a", "b"]}],
    ],
)
def test_every_form_of_names_is_read(names: Any) -> None:
    assert flatten_names(names) == ["a", "b"]
