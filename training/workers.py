"""Work shared out over processes of this machine."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

from ki_vla_ros.errors import ConfigurationError

Result = TypeVar("Result")


def share_out(
    work: Callable[..., Result], jobs: Iterable[tuple[Any, ...]], workers: int, in_order: bool = True
) -> Iterator[Result]:
    """`work(*job)` of each job, by so many processes; one worker is this process itself.

    In the jobs' order, or each as soon as it is done. ConfigurationError if a process is killed.
    """
    if workers == 1:
        for job in jobs:
            yield work(*job)
        return
    # spawn: a child that was forked would share its parent's GL.
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_follow_parent) as pool:
        running: list[Future[Result]] = []
        try:
            for job in jobs:
                running.append(pool.submit(work, *job))
                if len(running) > 2 * workers:  # no more, because what comes out takes memory until it is taken
                    yield _take(running, in_order)
            while running:
                yield _take(running, in_order)
        except BrokenProcessPool as error:
            raise ConfigurationError(
                f"--workers {workers}: expected processes that work to the end, got one that was killed, as happens "
                "where memory runs out; take fewer"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _take(running: list[Future[Result]], in_order: bool) -> Result:
    done = set(running[:1]) if in_order else wait(running, return_when=FIRST_COMPLETED).done
    first = next(future for future in running if future in done)
    running.remove(first)
    return first.result()


def _follow_parent() -> None:
    """A worker ends when its parent does, even by kill -9, and leaves Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
