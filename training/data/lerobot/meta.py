"""What a dataset's meta/ says of its tasks and episodes, in each version of the format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ki_vla_ros.errors import ConfigurationError, short_repr
from training.data.lerobot.layout import (
    EPISODE_LINES,
    EPISODES,
    TASK_LINES,
    TASKS,
    VERSION,
    Count,
    Info,
    Positive,
)
from training.data.lerobot.tables import read_lines, read_parquet


@dataclass(frozen=True)
class Episode:
    """One episode; `row` is its row of meta/episodes (v3.0), by column, or its line of meta/episodes.jsonl."""

    index: int
    length: int
    tasks: tuple[str, ...]
    row: Mapping[str, Any]


class _EpisodeRow(BaseModel):
    episode_index: Count
    length: Positive
    tasks: list[str] | None = None


class _TaskRow(BaseModel):
    task_index: Count
    task: str


def read_tasks(folder: Path, info: Info) -> dict[int, str]:
    """Task by task_index; ConfigurationError names the file and what is wrong with it."""
    path = folder / (TASKS if info.codebase_version == VERSION else TASK_LINES)
    if info.codebase_version == VERSION:
        table = read_parquet(path)
        # Older writers gave the index no name.
        name = next((n for n in ("task", "__index_level_0__") if n in table.column_names), None)
        if name is None or "task_index" not in table.column_names:
            raise ConfigurationError(f"{path}: expected columns task and task_index")
        numbers, texts = table["task_index"].to_pylist(), table[name].to_pylist()
        rows = [{"task_index": number, "task": text} for number, text in zip(numbers, texts, strict=True)]
    else:
        rows = read_lines(path)
    tasks: dict[int, str] = {}
    for task in _checked(path, rows, _TaskRow):
        if tasks.setdefault(task.task_index, task.task) != task.task:
            raise ConfigurationError(
                f"{path}: expected one text for task {task.task_index}, got {short_repr(tasks[task.task_index])} and "
                f"{short_repr(task.task)}"
            )
    return tasks


def read_episodes(folder: Path, info: Info) -> list[Episode]:
    """The episodes in the order of their index, which may begin anywhere and have holes; errors as in `read_tasks`."""
    episodes: dict[int, Episode] = {}
    for path, rows in _episode_rows(folder, info):
        for row, checked in zip(rows, _checked(path, rows, _EpisodeRow), strict=True):
            index = checked.episode_index
            if index in episodes:
                raise ConfigurationError(f"{path}: expected one row per episode, got two of episode {index}")
            episodes[index] = Episode(index, checked.length, tuple(checked.tasks or ()), row)
    frames = sum(episode.length for episode in episodes.values())
    if (frames, len(episodes)) != (info.total_frames, info.total_episodes):
        where = "meta/episodes" if info.codebase_version == VERSION else EPISODE_LINES
        raise ConfigurationError(
            f"dataset {folder}: expected {info.total_episodes} episodes of {info.total_frames} frames as "
            f"meta/info.json says, got {len(episodes)} of {frames} in {where}; is the copy whole?"
        )
    return [episodes[index] for index in sorted(episodes)]


def _episode_rows(folder: Path, info: Info) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    if info.codebase_version != VERSION:
        yield folder / EPISODE_LINES, read_lines(folder / EPISODE_LINES)
        return
    pattern = EPISODES.format(chunk_index=0, file_index=0).replace("000", "*")
    paths = sorted(folder.glob(pattern))
    if not paths:
        raise ConfigurationError(f"dataset {folder}: expected episodes in {pattern}, found none; is the copy whole?")
    for path in paths:
        yield path, read_parquet(path).to_pylist()


Row = TypeVar("Row", bound=BaseModel)


def _checked(path: Path, rows: Sequence[dict[str, Any]], kind: type[Row]) -> list[Row]:
    checked = []
    for number, row in enumerate(rows, 1):
        try:
            checked.append(kind.model_validate(row))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ConfigurationError(
                f"{path}: row {number}: {where}: {first['msg']}, got {short_repr(first['input'])}"
            ) from error
    return checked
