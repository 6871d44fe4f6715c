"""A benchmark's protocol as data: which tasks, how often, from which seed on, for how long."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Field

from ki_vla_ros.errors import ConfigurationError, did_you_mean
from ki_vla_ros.robot import Frozen
from ki_vla_ros.share import expand, find_share
from ki_vla_ros.yaml_file import read_yaml
from training.evaluate.environments import HELD_OUT, single_tasks

Name = Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
Positive = Annotated[int, Field(gt=0)]
FOLDER: Final = "config/benchmarks"


class Protocol(Frozen):
    """What is run; a policy's own are its actions per chunk and the size of its images, where they are left out."""

    name: Name
    suite: str = Field(default="", description="what tables call it")
    tasks: Annotated[dict[Name, Annotated[tuple[str, ...], Field(min_length=1)]], Field(min_length=1)] = Field(
        description="environments by group; a set of tasks, such as metaworld/easy, stands for each of them; with "
        "several groups, the figure that counts is the mean of their rates"
    )
    trials: Positive = Field(default=50, description="episodes of each task")
    first_seed: Annotated[int, Field(ge=0)] = Field(default=HELD_OUT, description="of each task's first episode")
    steps: Positive | None = Field(
        default=None, description="actions of the environment after which an episode has failed; default: its own limit"
    )
    execute: Positive | None = Field(
        default=None, description="actions of a chunk before the next (replan horizon); default: half of a chunk"
    )
    image_size: Positive | None = Field(
        default=None, description="longer side of images, in pixels; default: the environment's"
    )

    @property
    def environments(self) -> list[str]:
        """All tasks, in their order."""
        return [task for names in self.tasks.values() for task in names]

    @property
    def seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.trials)

    @property
    def options(self) -> dict[str, Any]:
        """How environments are opened."""
        return {} if self.image_size is None else {"image_size": self.image_size}


def find_protocol(name: str) -> Path:
    """The file as given, or the one in config/benchmarks/ of this name; ConfigurationError if it has none."""
    path = expand(name)
    if path.name != name or path.suffix:
        return path
    folder = find_share(FOLDER)
    if not (known := folder / f"{name}.yaml").exists():
        names = sorted(file.stem for file in folder.glob("*.yaml"))
        raise ConfigurationError(
            f"--protocol: expected a file or one of {', '.join(names)}, got {name!r}{did_you_mean(name, names)}"
        )
    return known


def read_protocol(path: Path) -> Protocol:
    """ConfigurationError names file, key and fault."""
    given = read_yaml(path, Protocol, "protocol", f"{FOLDER}/")
    try:
        tasks = {
            group: tuple(task for name in names for task in single_tasks(name)) for group, names in given.tasks.items()
        }
    except ConfigurationError as error:
        raise ConfigurationError(f"protocol {path}: tasks: {error}") from error
    protocol = given.model_copy(update={"tasks": tasks})
    every = protocol.environments
    if twice := sorted({task for task in every if every.count(task) > 1}):
        raise ConfigurationError(f"protocol {path}: tasks: expected each once, got {', '.join(twice)} more than once")
    return protocol
