"""What a LeRobot dataset says of a robot: meta/info.json and its figures, in any version. No table is opened."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ki_vla_ros.errors import ConfigurationError, short_repr
from ki_vla_ros.files import parse_json, read_json, read_text
from ki_vla_ros.robot import flatten_names

INFO, STATS, EPISODES_STATS = "meta/info.json", "meta/stats.json", "meta/episodes_stats.jsonl"
LARGEST_STATS = 1 << 28


@dataclass(frozen=True)
class Numbers:
    """A column: names (none: not given), and what its elements were; empty: the dataset does not say."""

    key: str
    width: int
    names: tuple[str, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    mean: tuple[float, ...] = ()


@dataclass(frozen=True)
class DatasetSurvey:
    """`images`: height and width by key; (0, 0): not said."""

    path: Path
    robot_type: str
    fps: float
    columns: Mapping[str, Numbers]
    images: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def state_key(self) -> str:
        """The column of the state, as the trainer finds it: also under the name that openpi's converters give it."""
        return "state" if "observation.state" not in self.columns and "state" in self.columns else "observation.state"

    @property
    def action_key(self) -> str:
        return "actions" if "action" not in self.columns and "actions" in self.columns else "action"


def survey_dataset(path: Path) -> DatasetSurvey:
    """ConfigurationError if there is no dataset, or one whose description cannot be read."""
    file = path / INFO
    try:
        info = read_json(file)
    except FileNotFoundError:
        raise ConfigurationError(f"dataset {path}: expected a LeRobot dataset with {INFO}, got none") from None
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{file}: expected the description of a dataset as JSON, got none ({error})") from None
    features = info.get("features") if isinstance(info, dict) else None
    fps = info.get("fps") if isinstance(info, dict) else None
    if not isinstance(features, dict) or not isinstance(fps, (int, float)) or not 0 < fps < 1e4:
        raise ConfigurationError(f"{file}: expected features and fps, got {short_repr(info)}; is the copy whole?")
    stats = _read_stats(path)
    columns, images = {}, {}
    for key, feature in features.items():
        if not isinstance(feature, dict):
            continue
        shape = feature.get("shape")
        shape = [n for n in shape if isinstance(n, int)] if isinstance(shape, list) else []
        if feature.get("dtype") in ("image", "video"):
            channels_first = len(shape) == 3 and shape[0] in (1, 3)
            size = shape[1:] if channels_first else shape[:2]
            images[key] = (size[0], size[1]) if len(size) == 2 else (0, 0)
        elif re.match("float|u?int|bool", str(feature.get("dtype"))) and len(shape) < 2:
            columns[key] = _numbers(key, shape[0] if shape else 1, feature.get("names"), stats.get(key))
    return DatasetSurvey(path, str(info.get("robot_type") or ""), float(fps), columns, images)


def _numbers(key: str, width: int, names: Any, stats: Any) -> Numbers:
    flat = tuple(flatten_names(names))
    found = {what: _floats(stats.get(what) if isinstance(stats, dict) else None, width) for what in _FIGURES}
    return Numbers(key, width, flat if len(flat) == width else (), found["min"], found["max"], found["mean"])


_FIGURES = ("min", "max", "mean")


def _floats(values: Any, width: int) -> tuple[float, ...]:
    values = values if isinstance(values, list) else [values]
    if len(values) != width or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
        return ()
    return tuple(float(v) for v in values)


def _read_stats(path: Path) -> dict[str, Any]:
    """Figures by feature: those of the whole dataset, or of its episodes together; empty where there are none."""
    try:
        if (path / STATS).is_file():
            stats = read_json(path / STATS)
            return stats if isinstance(stats, dict) else {}
        lines = read_text(path / EPISODES_STATS, LARGEST_STATS).splitlines()
        return _together([parse_json(line) for line in lines if line.strip()])
    except (OSError, ValueError):
        return {}


def _together(episodes: Sequence[Any]) -> dict[str, Any]:
    stats = [e["stats"] for e in episodes if isinstance(e, dict) and isinstance(e.get("stats"), dict)]
    merged: dict[str, Any] = {}
    for key in stats[0] if stats else ():
        parts = [s[key] for s in stats if isinstance(s.get(key), dict)]
        columns = {what: [p.get(what) for p in parts] for what in _FIGURES}
        if all(isinstance(row, list) and _floats(row, len(row)) for rows in columns.values() for row in rows):
            merged[key] = {
                "min": [min(c) for c in zip(*columns["min"], strict=False)],
                "max": [max(c) for c in zip(*columns["max"], strict=False)],
                "mean": [sum(c) / len(c) for c in zip(*columns["mean"], strict=False)],
            }
    return merged
