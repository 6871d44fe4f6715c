"""Work shared out over processes of this machine, or of a Ray cluster."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from importlib import import_module
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from ki_vla_ros.errors import ConfigurationError

Result = TypeVar("Result")


def share_out(
    work: Callable[..., Result], jobs: Iterable[tuple[Any, ...]], workers: int, in_order: bool = True
) -> Iterator[Result]:
    """`work(*job)` of each job, by so many processes; one worker is this process itself.

    In the jobs' order, or each as soon as it is done: then no job is begun whose result would have to wait.
    Whoever breaks off, or meets an error, waits for no job that runs. ConfigurationError if a process is killed.
    """
    if workers == 1:
        for job in jobs:
            yield work(*job)
        return
    ours, theirs = Pipe()
    # spawn: a child that was forked would share its parent's GL.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_follow, initargs=(theirs,))
    # Those in order wait for a slow one before them; no more, because what comes out takes memory until it is taken.
    most = 2 * workers if in_order else workers - 1
    running: list[Future[Result]] = []
    finished = False
    try:
        for job in jobs:
            running.append(pool.submit(work, *job))
            if len(running) > most:
                yield _take(running, in_order)
        while running:
            yield _take(running, in_order)
        finished = True
    except BrokenProcessPool as error:
        raise ConfigurationError(
            f"--workers {workers}: expected processes that work to the end, got one that was killed, as happens "
            "where memory runs out; take fewer"
        ) from error
    finally:
        if not finished:
            ours.close()  # which ends all who still work
        pool.shutdown(wait=True, cancel_futures=True)
        ours.close()
        theirs.close()


def _take(running: list[Future[Result]], in_order: bool) -> Result:
    """The next result; an error only once all results that are there have been taken."""
    done = set(running[:1]) if in_order else wait(running, return_when=FIRST_COMPLETED).done
    first = min((future for future in running if future in done), key=_failed)
    running.remove(first)
    return first.result()


def _failed(future: Future[Result]) -> bool:
    return future.exception() is not None


def _follow(parent: Connection) -> None:
    """A worker ends when its parent does, even by kill -9, or no longer wants it, and leaves Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Connection) -> None:
    with suppress(EOFError, OSError):
        parent.recv()
    os._exit(1)


def share_out_on_ray(work: Callable[..., Result], jobs: Iterable[tuple[Any, ...]], address: str) -> Iterator[Result]:
    """As `share_out`, each as soon as it is done, on a Ray cluster: as many at a time as it has processors.

    All its machines must see the same files under the same paths. ConfigurationError without a cluster, and if a
    process of it is lost; what a job raises is raised here.
    """
    with ray_cluster(address) as ray:
        task, here = ray.remote(num_cpus=1, max_retries=0)(_work_in), Path.cwd()
        most, running = max(1, int(ray.cluster_resources().get("CPU", 1))), list[Any]()
        for job in jobs:
            running.append(task.remote(here, work, job))
            if len(running) >= most:
                yield _take_from_ray(ray, running, address)
        while running:
            yield _take_from_ray(ray, running, address)


def _take_from_ray(ray: Any, running: list[Any], address: str) -> Any:
    (done, *_), _ = ray.wait(running)
    running.remove(done)
    try:
        return ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        reason = " ".join(str(error).split())
        raise ConfigurationError(f"--ray {address}: expected it to do its work, got {reason:.200}; run again") from None


def _work_in(folder: Path, work: Callable[..., Result], job: tuple[Any, ...]) -> Result:
    """Ray's processes begin elsewhere; paths on the command line are relative to the caller's folder."""
    os.chdir(folder)
    return work(*job)


@contextmanager
def ray_cluster(address: str) -> Iterator[Any]:
    """The module ray, connected to a cluster; ConfigurationError if there is none."""
    try:
        ray: Any = import_module("ray")
    except ImportError:
        raise ConfigurationError(
            "--ray: expected the package ray, which is not installed; python3 -m pip install ray, or use --workers"
        ) from None
    try:
        ray.init(address=address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": ":".join(sys.path)}})
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigurationError(f"--ray {address}: expected a cluster, got {reason:.200}; try --workers") from None
    try:
        yield ray
    finally:
        ray.shutdown()
