"""A comparison as data: one YAML file, checked before anything is trained."""

from __future__ import annotations

from copy import deepcopy
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ki_vla_ros.robot import Frozen
from ki_vla_ros.yaml_file import read_yaml
from training.config import Positive, Rate
from training.evaluate import HELD_OUT

Name = Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
"""Of a comparison or an arm: it becomes a file's name."""
Figure = Literal["follow", "success"]


class Claim(Frozen):
    """What the paper reports of an arm: how it does beside another one."""

    than: Name = Field(default="ki", description="the arm that it is compared with")
    expected: Literal["worse", "same", "better"]
    figure: Figure = "success"
    split: str | None = Field(default=None, description="of closed_loop.splits; default: over all of them")
    says: str = Field(description="the paper's figures, in words")


class Arm(Frozen):
    """One recipe, over the same run as all others."""

    recipe: str | None = Field(default=None, description="as in a training configuration; default: the arm's name")
    seeds: Positive = Field(default=1, description="runs of it, with seeds 0, 1, ...")
    without: tuple[str, ...] = Field(
        default=(), description="dotted keys of `run` that do not go with this recipe, such as those of FAST"
    )
    paper: Claim | None = None


class Grid(Frozen):
    """How each arm's learning rate is chosen: short runs of one seed that no figure is of, one for each rate.

    The rate with the smallest error of chunks on held-out robot data wins (`measures.chunk_error`).
    """

    rates: Annotated[tuple[Rate, ...], Field(min_length=1)]
    steps: Positive
    seed: Annotated[int, Field(ge=0)] = Field(description="none of the arms' seeds")


class ClosedLoop(Frozen):
    """Episodes of each split; all arms, seeds and points have the same ones."""

    splits: Annotated[dict[str, str], Field(min_length=1)] = Field(description="environments by what they are called")
    episodes: Positive = Field(description="of each split after a run's last step")
    earlier: Positive = Field(description="of each split at the points before; the first of them")
    first_seed: int = HELD_OUT
    execute: Positive | None = Field(default=None, description="actions of a chunk before the next; default: half")
    image_size: Positive | None = Field(
        default=None,
        description="longer side of images, as in the demonstrations; default: the environment's",
    )

    @property
    def options(self) -> dict[str, Any]:
        """How environments are opened."""
        return {} if self.image_size is None else {"image_size": self.image_size}


class Knowledge(Frozen):
    """Questions that tell what the model still knows of vision and language."""

    questions: Path = Field(description="PaliGemma's jsonl, which nothing is trained on")
    kinds: Annotated[dict[Name, str], Field(min_length=1)] = Field(
        description="by name, how the prefixes of such questions begin; the first that fits counts"
    )
    samples: Positive = Field(default=200, description="of each kind")
    within: float = Field(
        default=0.1, gt=0, description="an answer with a place is right up to so far from it, as a share of the image"
    )
    gates: dict[Name, float] = Field(
        default_factory=dict, description="shares of right answers, by kind, that the common start must reach"
    )


class AblationConfig(Frozen):
    """A whole comparison."""

    name: Name
    out: Path = Field(description="folder of the runs, with their checkpoints")
    results: Path = Field(description="folder of what came out: a small JSON file for each run")
    start: Path = Field(description="training configuration of the model that all arms begin with")
    run: dict[str, Any] = Field(
        description="a training configuration without recipe, seed, out, start and stages; `stage` is of every stage"
    )
    steps: Positive = Field(description="of every run, over its stages")
    points: Annotated[tuple[Positive, ...], Field(min_length=1)] = Field(
        description="steps after which a run is measured: multiples of the first, up to `steps`"
    )
    grid: Grid
    closed_loop: ClosedLoop
    knowledge: Knowledge | None = None
    timed_rounds: Positive = Field(default=20, description="of the steps of all arms, taking turns")
    arms: Annotated[dict[Name, Arm], Field(min_length=1)]

    @model_validator(mode="after")
    def _check_points(self) -> AblationConfig:
        first, last = self.points[0], self.points[-1]
        if list(self.points) != sorted(set(self.points)) or last != self.steps or any(p % first for p in self.points):
            raise ValueError(
                f"points: expected rising multiples of the first, the last being steps ({self.steps}), got "
                f"{list(self.points)}"
            )
        if (most := max(arm.seeds for arm in self.arms.values())) > self.grid.seed:
            raise ValueError(
                f"grid.seed: expected none of the arms' seeds 0 to {most - 1}, got {self.grid.seed}: a learning rate "
                "must not be chosen on what it is judged by"
            )
        if self.closed_loop.earlier > self.closed_loop.episodes:
            raise ValueError(
                f"closed_loop.earlier: expected at most episodes ({self.closed_loop.episodes}), the first of which "
                f"they are, got {self.closed_loop.earlier}"
            )
        return self

    @model_validator(mode="after")
    def _check_names(self) -> AblationConfig:
        if given := sorted({"recipe", "seed", "out", "start", "stages", "name"} & self.run.keys()):
            raise ValueError(f"run: expected what all arms share, got {', '.join(given)}, which the arms decide")
        for name, arm in self.arms.items():
            try:
                self.run_of(arm)
            except KeyError as error:
                raise ValueError(f"arms.{name}.without: expected keys of run, got {error.args[0]}") from error
            if arm.paper is None:
                continue
            if arm.paper.than not in self.arms:
                raise ValueError(f"arms.{name}.paper.than: expected another arm, got {arm.paper.than!r}")
            if arm.paper.split is not None and arm.paper.split not in self.closed_loop.splits:
                raise ValueError(
                    f"arms.{name}.paper.split: expected one of {', '.join(self.closed_loop.splits)}, got "
                    f"{arm.paper.split!r}"
                )
        if self.knowledge is not None and (unmade := self.knowledge.gates.keys() - self.knowledge.kinds.keys()):
            raise ValueError(
                f"knowledge.gates: expected some of {', '.join(self.knowledge.kinds)}, got {', '.join(sorted(unmade))}"
            )
        return self

    def run_of(self, arm: Arm) -> dict[str, Any]:
        """`run` without what this arm leaves out; KeyError, with the whole key, if that is not there."""
        content = deepcopy(self.run)
        for key in arm.without:
            *path, last = key.split(".")
            try:
                del reduce(getitem, path, content)[last]
            except (KeyError, TypeError) as error:
                raise KeyError(key) from error
        return content


def load_ablation(path: Path) -> AblationConfig:
    """Read and check a comparison's YAML; ConfigurationError names file, key and fault."""
    return read_yaml(path, AblationConfig, "comparison", "config/ablation/")
