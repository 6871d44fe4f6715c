"""One job of a comparison, from where it was stopped: a run is trained as `training.train` does it, then measured.

A run keeps a checkpoint for each of its points, and each point's figures are a file beside them as soon as they are
known. So a job that is killed at any moment goes on in training or in measuring, and its result is the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ki_vla_ros.bench import time_alternating
from ki_vla_ros.bundle import file_sha256
from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.files import read_json
from training.ablation import measures
from training.ablation.config import AblationConfig
from training.ablation.plan import (
    GRID,
    POLICY,
    START,
    TIMING,
    Job,
    made_of,
    start_config,
    start_made_of,
    training_config,
)
from training.policy import commit
from training.results import check_result, result_path, write_result
from training.run import Run
from training.storage import only_run, write_whole
from training.weights import RunState, open_run

POINTS, BEGUN = "points", "begun"
LARGEST_KEPT = 16 << 20  # bytes of weights that are kept with the results


def run_job(config: AblationConfig, job: Job, start: Mapping[str, Any] | None) -> None:
    """Run a job to its end, and write its result. `start` is the result of the common start, once there is one."""
    if job.kind == START:
        figures, origin = train_start(config), start_made_of(config)
    else:
        assert start is not None
        origin = made_of(config, job, start)
        if job.kind != TIMING:
            begin(training_config(config, job).out, origin)
        figures = {TIMING: time_steps, GRID: try_rate, "run": train_arm}[job.kind](config, job)
    threads = torch.get_num_threads()
    where = {
        "job": job.kind,
        "arm": job.arm,
        "seed": job.seed,
        "learning_rate": job.rate,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {threads} used, torch {torch.__version__}",
        "commit": commit(),
    }
    write_result(result_path(config.results, job.name), origin, where | figures)
    if job.kind in (GRID, "run"):
        tidy(training_config(config, job).out, keep=job.kind == "run")


def begin(out: Path, origin: Mapping[str, Any]) -> None:
    """Note what the run in this folder is of; ConfigurationError if it was begun as another.

    A training that goes on may have another learning rate; a run of a comparison may not.
    """
    path = result_path(out, BEGUN)
    if check_result(path, origin) is None:
        write_result(path, origin, {})


def check_start(config: AblationConfig, start: Mapping[str, Any]) -> None:
    """ConfigurationError unless the checkpoint of the common start is here and the one that `start` is the result of.

    On another machine it is taken from the results, if it was kept there. Trained again it would be another: no two
    kinds of processor round alike.
    """
    policy, kept = start_config(config).out / POLICY, config.results / START
    if kept.is_dir() and not policy.is_dir():
        shutil.copytree(kept, policy)
    found = fingerprint(policy) if policy.is_dir() else "none"
    if found != start["weights"]:
        raise ConfigurationError(
            f"{policy}: expected the common start of {result_path(config.results, START)}, weights {start['weights']}, "
            f"got {found}; bring it here: runs from two starts say nothing of recipes; or, to begin anew, remove what "
            f"is in {config.results} and {config.out}"
        )


def tidy(out: Path, keep: bool) -> None:
    """Remove the run's checkpoints but the last, or all of the run."""
    if not keep:
        shutil.rmtree(out)
        return
    for folder in sorted(out.glob("checkpoint-*"))[:-1]:
        shutil.rmtree(folder)


def train_start(config: AblationConfig) -> dict[str, Any]:
    """The model that all arms begin with, and what it knows. A small one is kept with the results."""
    run = Run(start_config(config))
    if run.data.robot_sources and not config.run.get("held_out"):  # often that of the arms, which come after minutes
        measures.check_held_out(run.data)
    run.run()
    policy = run.config.out / POLICY
    if sum(file.stat().st_size for file in policy.iterdir()) <= LARGEST_KEPT:
        shutil.copytree(policy, config.results / START, dirs_exist_ok=True)
    with run.trainer.averaged():
        knowledge = {} if config.knowledge is None else measures.ask(run, config.knowledge)
    return {
        "weights": fingerprint(run.config.out / POLICY),
        "data": run.fingerprint,
        "figures": measures.offline(last_figures(run)),
        "knowledge": knowledge,
        "minutes": spent(run),
    }


def fingerprint(policy: Path) -> str:
    """SHA-256 of the weights."""
    [file] = sorted(policy.glob("*.safetensors"))
    return hashlib.sha256(file.read_bytes()).hexdigest()


def try_rate(config: AblationConfig, job: Job) -> dict[str, Any]:
    """A short run of the grid; its `error` is None if it diverged."""
    run = Run(training_config(config, job))
    measures.check_held_out(run.data)
    with only_run(run.config.out):
        try:
            run.trainer.run()
        except FloatingPointError as error:
            return {"error": None, "diverged": str(error)[:200]}
        with run.trainer.averaged():
            return {"error": measures.chunk_error(run), "data": run.fingerprint}


def train_arm(config: AblationConfig, job: Job) -> dict[str, Any]:
    """A run with all figures of its points; without the policy folder, as not every recipe's can be exported."""
    run = Run(training_config(config, job))
    measures.check_held_out(run.data)
    with only_run(run.config.out):
        try:
            run.trainer.run()
        except FloatingPointError as error:
            raise ConfigurationError(
                f"{job.name}: expected a run that learns, got one that diverged with the grid's rate {job.rate:g} "
                f"({error}); make the grid longer or its rates smaller, for all arms"
            ) from error
        places, points = checkpoints(run), []
        for wanted in config.points:
            points.append(at_point(config, run, places, wanted))
        with run.trainer.averaged():  # of the last point
            return {
                "data": run.fingerprint,
                "questions": None if config.knowledge is None else file_sha256(config.knowledge.questions),
                "recipe": describe(run),
                "weights": sum(parameter.numel() for parameter in run.model.parameters()),
                "points": points,
                "offline": measures.offline(last_figures(run)),
                "tokens_per_chunk": measures.token_counts(run),
                "latency_ms": measures.latency_ms(run),
                "by_tokens": measures.drive_by_tokens(run, config.closed_loop),
                "minutes": spent(run),
            }


def describe(run: Run) -> dict[str, Any]:
    """What the recipe made of the run, for the report: which losses there are, and how chunks are read."""
    return {
        "stages": [
            {
                "steps": stage.steps,
                "losses": dict(stage.losses),
                "action_tokens": stage.learns_action_tokens,
                "insulate": stage.insulate,
            }
            for stage in run.config.stages
        ],
        "sampler": run.config.sampler,
        "state": run.config.model.state,
    }


def checkpoints(run: Run) -> dict[int, Path]:
    """The checkpoints that there are, by how many steps the run had taken, over all stages."""
    found = {}
    for folder in sorted(run.config.out.glob("checkpoint-*")):
        found[run.trainer.count_steps(open_run(folder)[0])] = folder
    return found


def at_point(config: AblationConfig, run: Run, places: Mapping[int, Path], wanted: int) -> dict[str, Any]:
    """The figures of one point, measured unless they were before: of the last checkpoint until then."""
    path = run.config.out / POINTS / f"{wanted:06d}.json"
    if path.exists():
        found: dict[str, Any] = read_json(path)
        return found
    taken = max(step for step in places if step <= wanted)
    state, saved = open_run(places[taken])
    saved.load(run.trainer.tensors())
    last = wanted == config.points[-1]
    with run.trainer.averaged():
        figures = {
            "step": taken,
            "minutes": sum(state.minutes.values()),
            "error": measures.chunk_error(run),
            "episodes": measures.drive(
                run, config.closed_loop, config.closed_loop.episodes if last else config.closed_loop.earlier
            ),
            "knowledge": {} if config.knowledge is None else measures.ask(run, config.knowledge),
            "gradients": measures.gradients(run),
        }
    path.parent.mkdir(exist_ok=True)
    write_whole(path, json.dumps(figures))
    return figures


def last_figures(run: Run) -> dict[str, float]:
    last = run.config.stages[-1]
    return run.trainer.figure_record.values(last.name, last.steps)


def spent(run: Run) -> float:
    """Minutes of training by the wall clock; of a machine that others use too, they say little."""
    [*_, newest] = checkpoints(run).values()
    state: RunState = open_run(newest)[0]
    return sum(state.minutes.values())


def time_steps(config: AblationConfig, job: Job) -> dict[str, Any]:
    """Processor seconds of a step's gradients, of all arms in one process, taking turns."""
    calls: dict[str, Callable[[], object]] = {}
    shares: dict[str, tuple[str, float]] = {}
    for arm in config.arms:
        run = Run(training_config(config, Job("run", arm)))
        for index, stage in enumerate(run.config.stages):
            name = f"{arm}/{stage.name}"
            calls[name] = step_of(run, index)
            shares[name] = arm, stage.steps / sum(s.steps for s in run.config.stages)
    taken_ms = time_alternating(calls, config.timed_rounds, 2, lambda _: None, time.process_time_ns)
    seconds = dict.fromkeys(config.arms, 0.0)
    for name, (arm, share) in shares.items():
        seconds[arm] += share * float(np.median(taken_ms[name])) / 1e3
    return {"seconds_per_step": seconds, "rounds": config.timed_rounds}


def step_of(run: Run, index: int) -> Callable[[], object]:
    trainer, stage = run.trainer, run.config.stages[index]
    batches = trainer.draw(index, stage, 0)

    def step() -> None:
        trainer.choose(stage)
        run.model.zero_grad(set_to_none=True)
        trainer.accumulate_gradients(stage, batches, np.random.default_rng(0))

    return step
