"""Where a dataset has each dimension: its column, and the place in it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ki_vla_ros.errors import ConfigurationError, did_you_mean
from ki_vla_ros.robot.dimensions import ActionDimension, StateDimension

Dimension = StateDimension | ActionDimension
Feature = tuple[int, Sequence[str]]
"""Width of a dataset's column, and the names of its elements; no names: the dataset does not say."""
# Names that say no more than a place: 3, motor_3, dim 3.
_PLACE = re.compile(r"((motors?|joints?|axis|dim|state|actions?|x|[a-z])?[ _.\[-]*)\d+\]?", re.IGNORECASE)


def find_columns(
    dimensions: Sequence[Dimension], column: str, features: Mapping[str, Feature]
) -> list[tuple[str, int]]:
    """Column and index of each dimension; `column` is where those are that name none.

    By index where the robot file gives one, else by name if the dataset has one of their names, else in the order of
    the list, if the dataset's names say no more than that. ConfigurationError names the dimension that is not there, or
    that the dataset's names put elsewhere or call otherwise.
    """
    names = {d.dataset.column or column for d in dimensions}
    by_name = {name: _has_a_name(dimensions, column, name, features) for name in names}
    found = []
    counts = dict.fromkeys(names, 0)
    others: list[str] = []  # what the dataset calls otherwise
    for dimension in dimensions:
        own = dimension.dataset.column or column
        here = f"{dimension.name!r}: dataset"
        if own not in features:
            raise ConfigurationError(
                f"{here}.column: expected one of {', '.join(features) or 'none'}, got {own}"
                f"{did_you_mean(own, features)}"
            )
        width, _ = features[own]
        index = dimension.dataset.index
        if index is None and by_name[own]:
            index = _index_of(dimension, own, features[own])
        elif index is None:
            index = counts[own]
            counts[own] += 1
            alike = [i for i, name in enumerate(features[own][1]) if _alike(dimension.name, name)]
            if len(alike) == 1 and alike[0] != index:
                raise ConfigurationError(
                    f"{here}.name: expected {features[own][1][alike[0]]!r} at index {index} of {own}, as the robot "
                    f"file has it, got it at {alike[0]}{_named(features[own])}; give name or index of each"
                )
            if not alike and index < len(features[own][1]) and not _PLACE.fullmatch(features[own][1][index]):
                others.append(
                    f"{here}.name: expected the data's name for it, got {features[own][1][index]!r} at index {index} "
                    f"of {own}{_named(features[own])}; give name or index of each, or take the robot file of this data"
                )
        if index >= width:
            raise ConfigurationError(f"{here}.index: expected at most {width - 1} in {own}, got {index}")
        found.append((own, index))
    for own, count in counts.items():
        width = features[own][0]
        # In order only where nothing is left over: which of them are meant is otherwise a guess.
        if count and count != width:
            raise ConfigurationError(
                f"dataset: expected {count} values in {own} (one per dimension, in the order of the robot file), got "
                f"{width}{_named(features[own])}; give name or index of each"
            )
    if others:
        raise ConfigurationError(others[0])
    return found


def _has_a_name(dimensions: Sequence[Dimension], column: str, own: str, features: Mapping[str, Feature]) -> bool:
    if own not in features:
        return False
    open_ones = [d for d in dimensions if (d.dataset.column or column) == own and d.dataset.index is None]
    return any(d.dataset.name is not None or d.name in features[own][1] for d in open_ones)


def _index_of(dimension: Dimension, own: str, feature: Feature) -> int:
    name, names = dimension.dataset.name or dimension.name, list(feature[1])
    if names.count(name) != 1:
        raise ConfigurationError(
            f"{dimension.name!r}: dataset.name: expected one of the names of {own}"
            + (f" ({', '.join(names)})" if names else ", which the dataset does not give")
            + f", got {name}{' ' + str(names.count(name)) + ' times' if name in names else did_you_mean(name, names)}"
            "; give its index"
        )
    return names.index(name)


def _alike(one: str, other: str) -> bool:
    """Whether one name is the other with something before or behind it: elbow, main_elbow, elbow.pos."""
    a, b = (f"_{re.sub('[^a-z0-9]+', '_', name.lower()).strip('_')}_" for name in (one, other))
    return a in b or b in a


def _named(feature: Feature) -> str:
    return f" ({', '.join(feature[1])})" if feature[1] else ""


def flatten_names(names: Any) -> list[str]:
    """["a", "b"] for ["a", "b"], [["a", "b"]], {"motors": ["a", "b"]} and {"a": 0, "b": 1}, as LeRobot has them.

    Groups may be in groups, and a group of one may be its name.
    """
    if isinstance(names, dict):
        if names and sorted(names.values(), key=repr) == sorted(range(len(names)), key=repr):
            return sorted(names, key=lambda name: int(names[name]))
        names = [group for group in names.values() if isinstance(group, list | dict | str)]
    if isinstance(names, list):
        return [
            name for part in names for name in (flatten_names(part) if isinstance(part, list | dict) else [str(part)])
        ]
    return []
