"""Normalisation statistics from elsewhere, as a bundle's linear maps: low..high of each dimension goes to -1..1.

They are openpi's `norm_stats.json`, or LeRobot's: a dataset's `meta/stats.json`, or the file beside a policy's weights
(`policy_preprocessor_step_*_normalizer_processor.safetensors`). With quantiles (pi0.5) the range is q01..q99, with mean
and standard deviation (pi0) mean - std..mean + std, each with the epsilon that its source adds; LeRobot can also take
min..max and q10..q90.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.errors import ConfigurationError, short_repr
from ki_vla_ros.files import LARGEST_TEXT, parse_json, read_file
from ki_vla_ros.robot import Robot
from training.weights.files import open_safetensors

Method = Literal["quantiles", "mean_std", "min_max", "quantile10"]
FIELDS: dict[Method, tuple[str, str]] = {
    "quantiles": ("q01", "q99"),
    "mean_std": ("mean", "std"),
    "min_max": ("min", "max"),
    "quantile10": ("q10", "q90"),
}
OPENPI, LEROBOT = ("state", "actions"), ("observation.state", "action")
LARGEST = 1e9  # of any joint, in any unit
OPENPI_EPSILON, LEROBOT_EPSILON = 1e-6, 1e-8


class Range(NamedTuple):
    low: tuple[float, ...]
    high: tuple[float, ...]


class Ranges(NamedTuple):
    state: Range
    action: Range


def read_ranges(path: Path, method: Method, state: int, actions: int) -> Ranges:
    """The ranges of so many dimensions of each, in the dataset's units; zeros may follow, as models pad to 32.

    ConfigurationError names field and fault.
    """
    statistics = read_safetensors(path) if path.suffix == ".safetensors" else read_json(path)
    openpi = isinstance(statistics.get("norm_stats"), dict)
    if openpi:
        statistics = statistics["norm_stats"]
    found = []
    for feature, count in zip(OPENPI if openpi else LEROBOT, (state, actions), strict=True):
        if not isinstance(statistics.get(feature), Mapping):
            raise ConfigurationError(
                f"{path}: expected statistics of {feature!r}, got only those of {sorted(statistics)}; give "
                "openpi's norm_stats.json, LeRobot's meta/stats.json, or the policy's "
                "policy_preprocessor_step_*_normalizer_processor.safetensors"
            )
        where = f"{path}: {feature}"
        first, second = (read_field(statistics[feature], name, where, count) for name in FIELDS[method])
        check_padding(first[count:], second[count:], method, where, count)
        first, second = first[:count], second[:count]
        found.append(openpi_range(first, second, method) if openpi else lerobot_range(first, second, method))
        check_order(first, second, method, where)
    return Ranges(*(Range(tuple(low.tolist()), tuple(high.tolist())) for low, high in found))


def to_robot(ranges: Ranges, robot: Robot) -> Ranges:
    """The same ranges in the robot's units; low is above high where the dataset counts the other way round.

    A relative action is a difference: it has the mapping's scale, but no offset. ConfigurationError where state and
    action of one place have different mappings: their difference in the dataset is not one in the robot's units.
    """
    lines, offset_D = robot.action_lines, robot.action_lines.offset_D.copy()
    for d, action in enumerate(robot.actions):
        if not action.relative:
            continue
        state = robot.state[d] if d < len(robot.state) else None
        if state is None or state.joint != action.target or state.lines()[1] != action.line():
            raise ConfigurationError(
                f"robot file: actions: {action.name!r}: expected the same joint and dataset mapping at place {d} of "
                "the state, as openpi and LeRobot subtract the one from the other, got "
                f"{state.name if state else 'none'}"
            )
        offset_D[d] = 0.0
    return Ranges(
        Range(*(tuple(robot.state_lines.to_robot(np.array(end)).tolist()) for end in ranges.state)),
        Range(*(tuple((np.array(end) * lines.scale_D + offset_D).tolist()) for end in ranges.action)),
    )


def openpi_range(first: NDArray[np.float64], second: NDArray[np.float64], method: Method) -> tuple[Any, Any]:
    """The range as openpi uses it, with its epsilon added to the scale."""
    if method == "mean_std":
        return first - (second + OPENPI_EPSILON), first + (second + OPENPI_EPSILON)
    return first, second + OPENPI_EPSILON


def lerobot_range(first: NDArray[np.float64], second: NDArray[np.float64], method: Method) -> tuple[Any, Any]:
    """The range as LeRobot uses it: its epsilon is added to the standard deviation, and replaces a range of zero."""
    if method == "mean_std":
        return first - (second + LEROBOT_EPSILON), first + (second + LEROBOT_EPSILON)
    return first, np.where(second == first, first + LEROBOT_EPSILON, second)


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(read_file(path))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path}: expected a JSON file, got none ({error})") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def read_safetensors(path: Path) -> dict[str, Any]:
    """`feature.field` -> {feature: {field: values}}."""
    found: dict[str, Any] = {}
    with open_safetensors(path) as handle:
        if (size := path.stat().st_size) > LARGEST_TEXT:
            raise ConfigurationError(
                f"{path}: expected normalisation statistics of at most {LARGEST_TEXT} bytes, got {size}; are these the "
                "weights?"
            )
        for key in handle.keys():  # noqa: SIM118 (not a mapping)
            feature, _, field = key.rpartition(".")
            found.setdefault(feature, {})[field] = handle.get_tensor(key).double().tolist()
    return found


def read_field(fields: Mapping[str, Any], name: str, where: str, count: int) -> NDArray[np.float64]:
    """All numbers of a field, of which the first `count` are judged."""
    if fields.get(name) is None:
        remedy = (
            ""
            if name in ("mean", "std", "min", "max")
            else "; older files lack it: compute the statistics again on the training data"
        )
        raise ConfigurationError(f"{where}: expected {name}, got only {sorted(fields)}{remedy}")
    try:
        values = np.asarray(fields[name])
        if values.dtype.kind not in "iuf":  # numpy takes texts and truth values for numbers
            raise ValueError(f"got {short_repr(fields[name])}")
        values = values.astype(np.float64)
    except (OverflowError, TypeError, ValueError) as error:
        raise ConfigurationError(f"{where}.{name}: expected a list of numbers ({error})") from error
    if values.ndim != 1 or len(values) < count:
        raise ConfigurationError(
            f"{where}.{name}: expected at least {count} numbers (one per dimension of the robot file), got shape "
            f"{list(values.shape)}; do robot file and weights belong together?"
        )
    if not np.all(np.abs(values[:count]) <= LARGEST):  # NaN is not either
        raise ConfigurationError(
            f"{where}.{name}: expected finite numbers of at most {LARGEST:g}, got {values[:count].tolist()}"
        )
    return values


def check_padding(
    first: NDArray[np.float64], second: NDArray[np.float64], method: Method, where: str, count: int
) -> None:
    """ConfigurationError if what follows the robot's dimensions is more than the zeros that models are padded with."""
    length = min(len(first), len(second))
    first, second = first[:length], second[:length]
    moving = (second > 0.0) & (first != 0.0) if method == "mean_std" else second > first
    if moving.any():
        d = int(moving.argmax())
        names = FIELDS[method]
        raise ConfigurationError(
            f"{where}: expected {count} dimensions, as the robot file has, and zeros after them, got in dimension "
            f"{count + d} {names[0]} {first[d]}, {names[1]} {second[d]}; name all dimensions in the robot file"
        )


def check_order(first: NDArray[np.float64], second: NDArray[np.float64], method: Method, where: str) -> None:
    wrong = second < (0.0 if method == "mean_std" else first)
    if wrong.any():
        j = int(wrong.argmax())
        names = FIELDS[method]
        raise ConfigurationError(
            f"{where}: expected {'std >= 0' if method == 'mean_std' else ' <= '.join(names)}, got in dimension {j} "
            f"{names[0]} {first[j]}, {names[1]} {second[j]}"
        )
