"""Where a robot's state and actions are in a dataset, and in what unit, as its robot file says: both ways.

Legend: N frames, S state, D action.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.errors import ConfigurationError, InputError
from ki_vla_ros.robot import ActionDimension, Column, Lines, Robot, StateDimension, find_columns
from training.data.lerobot.dataset import Dataset
from training.data.lerobot.layout import ACTION, STATE, make_features

Array = NDArray[np.float64]
# The columns that every dataset of ours has beside the robot's.
OWN = frozenset(make_features({}, {}))


@dataclass(frozen=True)
class _Part:
    """The state or the actions: their mapping, and where in which column each is."""

    lines: Lines
    columns: tuple[str, ...]
    places: tuple[int, ...]


class RobotColumns:
    """The columns of the datasets that are made for a robot; `names` has those of each column's elements.

    ConfigurationError if the robot file leaves a place in a column empty, or has a column for both.
    """

    def __init__(self, robot: Robot) -> None:
        self.robot = robot
        self.names: dict[str, list[str]] = {}
        self.units: dict[str, list[str]] = {}
        self._state = self._plan(robot.state, STATE, robot.state_lines, "state")
        self._action = self._plan(robot.actions, ACTION, robot.action_lines, "actions")

    def rows(self, state_NS: Array, action_ND: Array) -> dict[str, NDArray[np.float32]]:
        """By column [N, elements], in the dataset's units."""
        count = len(state_NS)
        rows = {column: np.empty((count, len(names)), dtype=np.float32) for column, names in self.names.items()}
        for part, values in ((self._state, state_NS), (self._action, action_ND)):
            for i, foreign_N in enumerate(part.lines.to_foreign(values).T):
                rows[part.columns[i]][:, part.places[i]] = foreign_N
        return rows

    def _plan(
        self, dimensions: Sequence[StateDimension | ActionDimension], default: str, lines: Lines, what: str
    ) -> _Part:
        columns = tuple(d.dataset.column or default for d in dimensions)
        places = place_in_order(columns, [d.dataset for d in dimensions])
        for column in dict.fromkeys(columns):
            if column in self.names or column in OWN or column in [camera.key for camera in self.robot.cameras]:
                raise ConfigurationError(
                    f"robot {self.robot.name}: {what}: dataset.column: expected a column of the {what} alone, got "
                    f"{column!r}"
                )
            found = {places[i]: d for i, d in enumerate(dimensions) if columns[i] == column}
            if sorted(found) != list(range(len(found))):
                raise ConfigurationError(
                    f"robot {self.robot.name}: {what}: dataset.index: expected 0 to {len(found) - 1} in column "
                    f"{column!r}, as a dataset is to be written, got {', '.join(map(str, sorted(found)))}"
                )
            ordered = [found[place] for place in range(len(found))]
            self.names[column] = [d.dataset.name or d.name for d in ordered]
            self.units[column] = [_unit(d) for d in ordered]
        return _Part(lines, columns, places)


def place_in_order(columns: Sequence[str], given: Sequence[Column]) -> tuple[int, ...]:
    """The place of each dimension in its column: the one that is given, or the first that is free."""
    taken = {(column, one.index) for column, one in zip(columns, given, strict=True)}
    places = []
    for column, one in zip(columns, given, strict=True):
        place = one.index
        if place is None:
            place = next(i for i in range(len(columns) + len(taken)) if (column, i) not in taken)
        taken.add((column, place))
        places.append(place)
    return tuple(places)


def _unit(dimension: StateDimension | ActionDimension) -> str:
    column = dimension.dataset
    if column.range is not None:
        return f"{column.range[0]:g} to {column.range[1]:g}"
    if column.open is not None:
        return f"{column.closed:g} closed, {column.open:g} open"
    plain = (column.scale, column.offset, column.sign) == (1.0, 0.0, 1)
    return (column.unit or dimension.own_unit()) if plain else "as the robot file says"


def read_robot_columns(
    dataset: Dataset, robot: Robot, columns: Mapping[str, NDArray[Any]], *, actions: bool = True
) -> tuple[Array, Array | None]:
    """State [N, S] and actions [N, D] of rows of the dataset, in the robot's units; no actions: it has none at all.

    ConfigurationError names the dimension that the dataset lacks, and what to write into the robot file; InputError a
    number that is none. Without `actions` only the state is read.
    """
    state_NS = robot.state_lines.to_robot(_pick(dataset, robot.state, dataset.state_key or STATE, columns))
    if not actions or (dataset.action_key is None and not any(a.dataset.column for a in robot.actions)):
        return state_NS, None
    action_ND = _pick(dataset, robot.actions, dataset.action_key or ACTION, columns)
    return state_NS, robot.action_lines.to_robot(action_ND)


def read_robot_chunks(
    dataset: Dataset, robot: Robot, columns: Mapping[str, NDArray[Any]], chunk: str, horizon: int
) -> Array:
    """Chunks [N, H, D] of rows of the dataset, in the robot's units, from a column that has H rows of actions in each.

    Each row is laid out as the actions' column is, where the dataset has one, else in the order of the robot file.
    Errors as in `read_robot_columns`.
    """
    names = list(dict.fromkeys(a.dataset.column or dataset.action_key or ACTION for a in robot.actions))
    feature = dataset.info.features[chunk]
    here = f"dataset {dataset.folder}: {chunk}"
    if len(names) != 1:
        raise ConfigurationError(f"{here}: expected a robot whose actions are in one column, got {', '.join(names)}")
    like = dataset.info.features.get(names[0])
    width = like.width if like is not None else len(robot.actions)
    if feature.shape not in ((horizon * width,), (horizon, width)):
        raise ConfigurationError(
            f"{here}: expected {horizon} x {width} numbers (a chunk of actions), got "
            f"{' x '.join(map(str, feature.shape))}; set the horizon that the dataset was made with"
        )
    count = len(columns[chunk])
    steps: dict[str, NDArray[Any]] = {names[0]: columns[chunk].reshape(count * horizon, width)}
    steps["episode_index"] = np.repeat(columns["episode_index"], horizon)
    features = {names[0]: (width, like.element_names if like is not None else ())}
    action_ND = robot.action_lines.to_robot(_pick(dataset, robot.actions, names[0], steps, features, horizon))
    return action_ND.reshape(count, horizon, -1)


def _pick(
    dataset: Dataset,
    dimensions: Sequence[StateDimension | ActionDimension],
    default: str,
    columns: Mapping[str, NDArray[Any]],
    features: Mapping[str, tuple[int, Sequence[str]]] | None = None,
    rows_per_frame: int = 1,
) -> Array:
    features = features or {
        name: (feature.width, feature.element_names)
        for name, feature in dataset.info.features.items()
        if feature.is_number
    }
    try:
        places = find_columns(dimensions, default, features)
    except ConfigurationError as error:
        raise ConfigurationError(f"dataset {dataset.folder}: robot file: {error}") from error
    picked = [columns[name].reshape(len(columns[name]), -1)[:, place] for name, place in places]
    value_ND = np.stack([values.astype(np.float64) for values in picked], axis=1)
    if len(wrong := np.argwhere(~np.isfinite(value_ND))):
        row, d = wrong[0]
        raise InputError(
            f"dataset {dataset.folder}: episode {columns['episode_index'][row]}: expected finite numbers in "
            f"{places[d][0]}, got {value_ND[row, d]} at index {places[d][1]} for frame {row // rows_per_frame}"
        )
    return value_ND
