"""Many bags at once: one process for each, as many as asked for, here or on a Ray cluster.

What a bag becomes is in its part (parts.py), so a process returns nothing but why it failed, and one that is killed
costs its own bag.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

import cv2

from ki_vla_ros.errors import KiVlaError
from training.convert.parts import clear_part, finish_part
from training.convert.writer import DiskFull
from training.workers import ray_cluster

Work = Callable[[Path, Path], None]
"""Converts a bag into a folder that is not there yet; pickled by name."""
Jobs = Mapping[Path, Path]
"""By bag, the folder of its part."""


@dataclass(frozen=True)
class Failure:
    """Why a bag was not converted; `kept`: what was converted of it until then may be used (a full disk)."""

    reason: str
    kept: bool = False


Outcome = tuple[Path, Failure | None]


def writing_folder(part: Path) -> Path:
    return part.with_name(f"{part.name}.part")


def attempt(work: Work, bag: Path, part: Path) -> Failure | None:
    """Make the part of a bag; why it failed, if it did. Only our own faults are raised."""
    writing = writing_folder(part)
    clear_part(writing)
    try:
        work(bag, writing)
        finish_part(writing, part)
    except DiskFull as error:
        return Failure(str(error), kept=True)
    except (KiVlaError, OSError) as error:
        clear_part(writing)
        return Failure(str(error))
    return None


def run(jobs: Jobs, work: Work, workers: int, cluster: str | None) -> Iterator[Outcome]:
    """Make all parts, on a Ray cluster if its address is given; each bag and what went wrong, as they are done."""
    if cluster is not None:
        yield from _run_on_ray(jobs, work, cluster)
    elif workers > 1 and len(jobs) > 1:
        yield from _run_in_processes(jobs, work, min(workers, len(jobs)))
    else:
        for bag, part in jobs.items():
            yield bag, attempt(work, bag, part)


def _run_in_processes(jobs: Jobs, work: Work, workers: int) -> Iterator[Outcome]:
    left = dict(jobs)
    # Not forked: the libraries' threads would be missing in the children.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _begin_worker) as pool:
        waiting: dict[Future[Any], Path] = {pool.submit(attempt, work, bag, part): bag for bag, part in jobs.items()}
        try:
            while waiting:
                done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    bag = waiting.pop(future)
                    with suppress(BrokenProcessPool):
                        yield bag, future.result()
                        del left[bag]
        finally:  # Ctrl-C, or our own fault: what is whole stays
            for process in list((pool._processes or {}).values()):
                if waiting:
                    process.terminate()
            pool.shutdown(cancel_futures=True)
    # A process that was killed takes all others of its pool with it. Alone, each bag shows whether it was its own.
    for bag, part in left.items():
        if len(jobs) > 1:
            yield from _run_in_processes({bag: part}, work, 1)
        else:
            yield (
                bag,
                Failure(
                    f"bag {bag}: expected to convert it, got a process that was killed; is the memory full? Use fewer "
                    "--workers"
                ),
            )


def _begin_worker() -> None:
    """One core each, and Ctrl-C is the parent's business; a worker whose parent has gone ends, too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    """A parent that was killed leaves its part to the next one, which would meet this process in it."""
    connection.wait([sentinel])
    os._exit(1)


def _attempt_in(folder: Path, work: Work, bag: Path, part: Path) -> Failure | None:
    """Ray's processes begin elsewhere; paths on the command line are relative to the caller's folder."""
    os.chdir(folder)
    return attempt(work, bag, part)


def _run_on_ray(jobs: Jobs, work: Work, address: str) -> Iterator[Outcome]:
    """All machines must see bags and dataset under the same paths."""
    with ray_cluster(address) as ray:
        task = ray.remote(num_cpus=1, max_retries=0)(_attempt_in)
        here = Path.cwd()
        waiting = {task.remote(here, work, bag, part): bag for bag, part in jobs.items()}
        while waiting:
            (done, *_), _ = ray.wait(list(waiting))
            bag = waiting.pop(done)
            try:
                yield bag, ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayError as error:
                reason = " ".join(str(error).split())
                yield bag, Failure(f"bag {bag}: expected Ray to convert it, got {reason:.200}; run the command again")
