"""Which runs a comparison has, what each of them is as a training configuration, and which can be run now.

First the common start; then for each arm its grid of learning rates, and the arm with seed 0; then all with seed 1, and
so on. So a comparison that is ended early has a bit of everything. Last the steps of all arms take turns.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import ValidationError

from ki_vla_ros.errors import ConfigurationError, describe_validation, did_you_mean
from ki_vla_ros.robot import find_robot, read_robot
from training.ablation.config import AblationConfig
from training.config import LeRobotEntry, TrainingConfig, load_config
from training.recipe import lay_recipe
from training.results import check_result, result_path
from training.train import flatten

POLICY: Final = "policy"  # in a finished run's folder
NOT_OF_A_RESULT: Final = {"name", "out", "keep", "threads", "workers", "cache_gb", "made_by"}
"""Of a training configuration, what changes no figure."""
START, TIMING, GRID = "start", "timing", "grid"


@dataclass(frozen=True)
class Job:
    """One thing to run. `rate` is its learning rate, None where the grid has yet to choose it."""

    kind: Literal["start", "grid", "run", "timing"]
    arm: str = ""
    seed: int = 0
    rate: float | None = None

    @property
    def name(self) -> str:
        """Of its result, beside those of the others."""
        if self.kind in (START, TIMING):
            return self.kind
        return f"{GRID}/{self.arm}-{self.rate:g}" if self.kind == GRID else f"{self.arm}-{self.seed}"


def find_jobs(config: AblationConfig, arms: Collection[str] | None = None) -> list[Job]:
    """All that is to run, in its order; with `arms` only what these need. ConfigurationError for one there is not."""
    if unknown := sorted(set(arms or ()) - config.arms.keys()):
        raise ConfigurationError(
            f"--arms: expected some of {', '.join(config.arms)}, got {', '.join(unknown)}"
            f"{did_you_mean(unknown[0], config.arms)}"
        )
    chosen = {name: arm for name, arm in config.arms.items() if arms is None or name in arms}
    jobs = [Job("start")]
    for seed in range(max(arm.seeds for arm in chosen.values())):
        for name, arm in chosen.items():
            if seed == 0 and len(config.grid.rates) > 1:
                jobs += [Job("grid", name, config.grid.seed, rate) for rate in config.grid.rates]
            if seed < arm.seeds:
                jobs.append(Job("run", name, seed))
    return jobs if arms is not None else [*jobs, Job("timing")]


def ready(config: AblationConfig, jobs: Sequence[Job]) -> tuple[list[Job], list[Job]]:
    """The jobs that are done, and of the others those that can be run now, with their learning rates.

    ConfigurationError for a result of another configuration, and for a start that misses its gates.
    """
    start = check_result(result_path(config.results, START), start_made_of(config))
    done, now = list[Job](), list[Job]()
    if start is None:
        return done, [job for job in jobs if job.kind == START]
    check_gates(config, start)
    done.append(Job("start"))
    for job in jobs:
        if job.kind in ("run", GRID):
            rate = job.rate or choose_rate(config, job.arm, start)
            if rate is None:
                continue
            job = Job(job.kind, job.arm, job.seed, rate)
        elif job.kind == START:
            continue
        found = check_result(result_path(config.results, job.name), made_of(config, job, start))
        (now if found is None else done).append(job)
    return done, now


def check_gates(config: AblationConfig, start: Mapping[str, Any]) -> None:
    """ConfigurationError if the common start knows too little: what grows on it would say nothing of recipes."""
    if config.knowledge is None:
        return
    missed = [
        f"{kind} at least {least:g}, got {start['knowledge'][kind]['right']:.3g}"
        for kind, least in config.knowledge.gates.items()
        if start["knowledge"][kind]["right"] < least
    ]
    if missed:
        raise ConfigurationError(
            f"{config.start}: the common start: expected {'; '.join(missed)}; give it another stage, and "
            f"remove {result_path(config.results, START)}: it goes on from its last checkpoint"
        )


def choose_rate(config: AblationConfig, arm: str, start: Mapping[str, Any]) -> float | None:
    """The rate of the grid with the smallest error; None while one of them has not been run. Ties: the smaller rate."""
    if len(config.grid.rates) == 1:
        return config.grid.rates[0]
    errors = {}
    for rate in config.grid.rates:
        job = Job("grid", arm, config.grid.seed, rate)
        found = check_result(result_path(config.results, job.name), made_of(config, job, start))
        if found is None:
            return None
        errors[rate] = math.inf if found["error"] is None else found["error"]  # None: it diverged
    if min(errors.values()) == math.inf:
        raise ConfigurationError(
            f"arm {arm}: expected a learning rate of the grid with which it learns, got none of "
            f"{', '.join(f'{rate:g}' for rate in errors)}; add smaller ones to grid.rates"
        )
    return min(sorted(errors), key=lambda rate: errors[rate])


def start_config(config: AblationConfig) -> TrainingConfig:
    try:
        return _load(config.start)
    except ConfigurationError as error:
        raise ConfigurationError(f"start: {error}") from error


@cache
def _load(path: Path) -> TrainingConfig:
    return load_config(path)


def training_config(config: AblationConfig, job: Job) -> TrainingConfig:
    """The run as `training.train` would have it. A job without a rate has the grid's first.

    In each stage the learning rate falls along the trainer's cosine, unless `run.stage` says otherwise.
    """
    rate = job.rate or config.grid.rates[0]
    steps = config.grid.steps if job.kind == GRID else config.steps
    arm = config.arms[job.arm]
    content = config.run_of(arm)
    content |= {
        "name": f"{config.name}_{job.arm}",
        "recipe": arm.recipe or job.arm,
        "seed": job.seed,
        "out": config.out / job.name,
        "keep": steps // min(config.points[0], steps) + 8,
        "start": {"checkpoint": start_config(config).out / POLICY, "parts": ["vision", "backbone"]},
    }
    content["stage"] = dict(content.get("stage") or {}) | {
        "steps": steps,
        "learning_rate": rate,
        "checkpoint_every": config.points[0],
    }
    try:
        return TrainingConfig.model_validate(lay_recipe(content))
    except ValidationError as error:
        raise ConfigurationError(f"arm {job.arm}: {describe_validation(error, TrainingConfig)}") from error
    except ConfigurationError as error:
        raise ConfigurationError(f"arm {job.arm}: {error}") from error


def start_made_of(config: AblationConfig) -> dict[str, Any]:
    run = start_config(config).model_dump(exclude=NOT_OF_A_RESULT, exclude_defaults=True)
    return flatten({"run": run, "knowledge": measured(config)["knowledge"]})


def made_of(config: AblationConfig, job: Job, start: Mapping[str, Any]) -> dict[str, Any]:
    """All that decides a job's figures, by dotted name; `start` is the result of the common start.

    Without what is as by default: a setting that a later version adds changes nothing.
    """
    origin = {"weights": start["weights"], "data": start["data"]}
    if job.kind == TIMING:
        runs = {arm: training_config(config, Job("run", arm)) for arm in config.arms}
        shown = {arm: run.model_dump(exclude=NOT_OF_A_RESULT, exclude_defaults=True) for arm, run in runs.items()}
        for run in shown.values():
            for stage in run["stages"]:
                stage.pop("learning_rate")  # a step takes as long with any
        return flatten({"start": origin, "rounds": config.timed_rounds, "runs": shown})
    training = training_config(config, job)
    run = training.model_dump(exclude=NOT_OF_A_RESULT, exclude_defaults=True)
    return flatten(
        {"start": origin, "run": run, "robot": _robots(_names(training))}
        | ({} if job.kind == GRID else measured(config))
    )


def _names(training: TrainingConfig) -> tuple[str, ...]:
    """Of the policy's robot, and of those whose data it learns from."""
    entries = [entry for kind in training.sources.values() for entry in kind]
    return tuple(
        dict.fromkeys([training.robot, *(e.robot for e in entries if isinstance(e, LeRobotEntry) and e.robot)])
    )


@cache
def _robots(names: tuple[str, ...]) -> str:
    """SHA-256 of what the robots' files say: a path alone would not tell that one was changed."""
    said = [read_robot(find_robot(name)).model_dump_json(exclude_defaults=True) for name in names]
    return hashlib.sha256("".join(said).encode()).hexdigest()


def measured(config: AblationConfig) -> dict[str, Any]:
    knowledge = config.knowledge
    return {
        "points": config.points,
        "closed_loop": config.closed_loop.model_dump(exclude_none=True),
        "knowledge": {} if knowledge is None else knowledge.model_dump(exclude={"gates"}),
    }
