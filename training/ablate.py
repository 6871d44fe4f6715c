"""The comparison of recipes: every run of a configuration, resumable at any moment, and the page of what came out.

    python -m training.ablate --config config/ablation/arm.yaml --jobs 2
    python -m training.ablate --report

Each finished run is a small JSON file in the configuration's folder of results. A run that is there is not run again;
one that was stopped, also by kill -9, goes on from its last checkpoint. `--report` writes a page of several
comparisons, and its plots, from these files alone: FOLDER.md of the folder above the configuration's results.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

from ki_vla_ros.console import ExitCode, run_command
from ki_vla_ros.errors import ConfigurationError
from training.ablation import (
    AblationConfig,
    Job,
    check_start,
    find_jobs,
    load_ablation,
    ready,
    run_job,
    training_config,
    try_out,
    write_bench,
    write_report,
)
from training.results import read_result, result_path

RESULTS: Final = Path("docs/results/ablation")
PR_SET_PDEATHSIG: Final = 1
LOOK_S: Final = 0.5  # between two looks at what runs


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.ablate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, help="a YAML file, such as config/ablation/arm.yaml")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, in processes of their own (1)")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="only these, with what they need; default: all")
    parser.add_argument("--plan", action="store_true", help="show what is done and what is to run, and run nothing")
    parser.add_argument(
        "--report",
        nargs="?",
        const="",
        metavar="FOLDER",
        help=f"write the page of all results in the folders in FOLDER: by default those of --config, else {RESULTS}",
    )
    parser.add_argument("--only", metavar="JOB", help=argparse.SUPPRESS)  # in a process of its own
    chosen = parser.parse_args(arguments)
    if chosen.config is None and chosen.report is None:
        parser.error("expected --config, --report or both, got neither")
    if chosen.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {chosen.jobs}")
    return run_command("ablate", partial(_ablate, chosen), "interrupted; the same command goes on")


def _ablate(chosen: argparse.Namespace) -> int:
    code, results = int(ExitCode.FINE), RESULTS
    if chosen.config is not None:
        config = load_ablation(chosen.config)
        if chosen.only is not None:
            return _run_one(config, chosen.only)
        jobs = find_jobs(config, chosen.arms)
        try:
            for arm in chosen.arms or config.arms:
                training_config(config, Job("run", arm))  # what is wrong with any of them is said now
            try_out(config.closed_loop, None if chosen.plan else config.knowledge)
        except ConfigurationError as error:
            raise ConfigurationError(f"comparison {chosen.config}: {error}") from error
        if chosen.plan:
            return _show(config, jobs)
        code, results = _run_all(config, chosen.config, jobs, chosen.jobs), config.results.parent
    if chosen.report is not None:
        for path in write_report(Path(chosen.report) if chosen.report else results):
            print(path)
    return code


def _show(config: AblationConfig, jobs: Sequence[Job]) -> int:
    done, now = ready(config, jobs)
    names = {job.name for job in done}
    for job in jobs:
        state = "done" if job.name in names else "next" if any(n.name == job.name for n in now) else "waits"
        print(f"{job.name:32} {state}")
    return ExitCode.FINE


def _run_all(config: AblationConfig, path: Path, jobs: Sequence[Job], side_by_side: int) -> int:
    """Run what is not there yet; a job that fails holds up only those that need it."""
    running: dict[str, subprocess.Popen[bytes]] = {}
    failed: list[str] = []
    ready(config, jobs)  # results of another configuration are refused before anything says that they are of this
    if start := read_result(result_path(config.results, "start")):
        check_start(config, start)
    write_bench(config, path)
    try:
        while True:
            done, now = ready(config, jobs)
            waiting = [job for job in now if job.name not in running and job.name not in failed]
            for job in waiting[: side_by_side - len(running)]:
                print(f"{job.name}: begins; {len(done)} of {len(jobs)} are done", flush=True)
                running[job.name] = _start(path, job)
            if not running:
                break
            while not (ended := [name for name, process in running.items() if process.poll() is not None]):
                time.sleep(LOOK_S)
            for name in ended:
                if code := running.pop(name).returncode:
                    failed.append(name)
                    print(f"{name}: failed ({code}); see above", file=sys.stderr, flush=True)
    except BaseException:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        raise
    if failed:
        raise ConfigurationError(
            f"expected all runs to come through, got {len(failed)} that failed: {', '.join(failed)}; what each of them "
            "said is above, and the same command tries them again"
        )
    print(f"all {len(jobs)} are done: {config.results}", flush=True)
    return ExitCode.FINE


def _start(path: Path, job: Job) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "training.ablate", "--config", str(path), "--only", job.name]
    return subprocess.Popen(command, preexec_fn=partial(_die_with, os.getpid()))


def _die_with(parent: int) -> None:
    """Before the job begins. A driver that is killed leaves nobody behind who writes where the next one does."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _run_one(config: AblationConfig, name: str) -> int:
    done, now = ready(config, find_jobs(config))
    if any(job.name == name for job in done):
        return ExitCode.FINE
    found = [job for job in now if job.name == name]
    if not found:
        raise ConfigurationError(f"--only: expected a job that can be run now, got {name!r}")
    run_job(config, found[0], read_result(result_path(config.results, "start")))
    return ExitCode.FINE


if __name__ == "__main__":
    sys.exit(main())
