"""A look at every sample of a data set before training: how much there is, and each that is broken, with its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Final

from ki_vla_ros.errors import ConfigurationError, InputError
from ki_vla_ros.robot import find_robot, read_robot
from training.config import LeRobotEntry, load_config
from training.data import Check, RobotSample
from training.data.language import (
    LanguageData,
    LlavaEntry,
    PaliGemmaEntry,
    ParquetEntry,
    Rows,
    is_conversation,
    open_language,
)
from training.data.lerobot import Dataset, LeRobotSamples
from training.tokens import plain_text

ANY_SIZE: Final = 64  # of images, where no model says one
LOOKED_AT: Final = 4  # rows that tell a file's format
AT_ONCE: Final = 32  # frames that are read together, as a video is read forwards
Tell = Callable[[str, float], object]  # what is done, and which share of it
Opened = Callable[[], LanguageData | LeRobotSamples]


def find_data(path: Path, robot: str | None) -> Iterator[tuple[str, Opened]]:
    """The data sets of a path, by name: that itself, or those of a training configuration, each as the run opens it."""
    if path.suffix not in (".yaml", ".yml"):
        yield str(path), partial(open_file, path, robot)
        return
    config = load_config(path)
    for source, entries in (*config.sources.items(), *config.held_out.items()):
        for entry in entries:
            if isinstance(entry, LeRobotEntry):
                opened: Opened = partial(
                    open_lerobot, entry, entry.robot or robot or config.robot, config.horizon, config.action_period_s
                )
            else:
                opened = partial(open_language, entry, ANY_SIZE, look=False)
            yield f"{path}: {source}", opened


def check(data: LanguageData | LeRobotSamples, tell: Tell) -> Check:
    """Every sample of it."""
    return check_language(data, tell) if isinstance(data, LanguageData) else check_lerobot(data, tell)


def check_language(data: LanguageData, tell: Tell) -> Check:
    """Every sample of a vision-language data set that was opened without a look."""
    check = Check(data.name, notes=list(data.notes))
    images = places = 0
    words: set[str] = set()
    for row in range(len(data)):
        tell(data.name, row / len(data))
        check.samples += 1
        try:
            sample = data.one(row)
        except InputError as error:
            check.broken.append(str(error))
            continue
        images += len(sample.images)
        places += sample.labels.place is not None
        words.update(plain_text(f"{sample.prefix} {sample.suffix}").split())
    check.counts = {"images": images, "places": places, "words": len(words)}
    return check


def check_lerobot(samples: LeRobotSamples, tell: Tell) -> Check:
    """Every frame of a robot's dataset, and its numbers against the limits of the robot file."""
    ranges, beyond = check_limits(samples)
    check = Check(samples.name, samples=len(samples), notes=ranges, broken=beyond)
    images = 0
    for first in range(0, len(samples), AT_ONCE):
        tell(samples.name, first / len(samples))
        rows = range(first, min(first + AT_ONCE, len(samples)))
        for sample in _whole(samples, rows, check):
            images += sum(image is not None for image in sample.images)
    tasks = list(samples.texts())
    words = {word for task in tasks for word in task.split()}
    check.counts = {
        "episodes": len(samples.episodes),
        "tasks": len(tasks),
        "images": images,
        "words": len(words),
    }
    return check


def _whole(samples: LeRobotSamples, rows: range, check: Check) -> Iterator[RobotSample]:
    """Those of the rows that can be read; the others are told one by one."""
    try:
        yield from samples.take(rows)
        return
    except InputError:
        pass
    for row in rows:
        try:
            yield from samples.take([row])
        except InputError as error:
            check.broken.append(str(error))


def check_limits(samples: LeRobotSamples) -> tuple[list[str], list[str]]:
    """The range of each number of state and actions, and those that leave the limits of the robot file."""
    reach = samples.ranges
    ranges = [reach.describe(n) for n in range(len(reach.dimensions))]
    broken = [
        f"{samples.name}: {ranges[n]}: {outside} of {reach.frames} frames are outside; correct the limits or the "
        f"dataset's unit in the robot file of {samples.robot.name}"
        for n, outside in enumerate(reach.outside_N)
        if outside
    ]
    return ranges, broken


def open_file(path: Path, robot: str | None) -> LanguageData | LeRobotSamples:
    """The data set of a path that no configuration describes; ConfigurationError if it is none."""
    if (path / "meta" / "info.json").exists():
        if robot is None:
            raise ConfigurationError("expected --robot with the robot file of a LeRobot dataset, got none")
        return open_lerobot(LeRobotEntry(lerobot=path), robot)
    if path.is_dir() or "*" in path.name or path.suffix == ".parquet":
        return open_language(ParquetEntry(parquet=path), ANY_SIZE, look=False)
    if path.suffix not in (".json", ".jsonl"):
        raise ConfigurationError(
            f"{path}: expected .json, .jsonl, .parquet, a LeRobot dataset or a training configuration, got another file"
        )
    if any(not isinstance(row, InputError) and is_conversation(row) for row in islice(Rows(path), LOOKED_AT)):
        return open_language(LlavaEntry(llava=path), ANY_SIZE, look=False)
    return open_language(PaliGemmaEntry(paligemma=path), ANY_SIZE, look=False)


def open_lerobot(
    entry: LeRobotEntry, robot: str, horizon: int | None = None, action_period_s: float | None = None
) -> LeRobotSamples:
    """All frames of its episodes; horizon and period are the robot file's, or as given."""
    read = read_robot(find_robot(robot))
    given = {"horizon": horizon, "action_period_s": action_period_s}
    return LeRobotSamples(
        Dataset(entry.lerobot),
        read.model_copy(update={key: value for key, value in given.items() if value is not None}),
        image_size=ANY_SIZE,
        ends=entry.ends,
        chunk=entry.chunk,
        episodes=slice(*entry.episodes) if entry.episodes else None,
    )
