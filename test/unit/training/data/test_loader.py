"""Batches made ahead by other processes: the same as without, in order, and nothing is left of them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.waiting import until

from ki_vla_ros.errors import ConfigurationError, InputError
from training.data.cache import ImageCache
from training.data.loader import Loader


def make(step: int) -> dict[str, Any]:
    rng = np.random.default_rng(step)
    return {
        "images": torch.from_numpy(rng.random((2, 3, 40, 40), dtype=np.float32)),
        "half": torch.full((3,), step, dtype=torch.bfloat16),
        "turned": torch.arange(6).reshape(2, 3).T,
        "texts": [f"step {step}"],
        "process": os.getpid(),
    }


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_are_the_same_whoever_makes_them_from_any_step_on(workers: int) -> None:
    steps = range(5, 12)
    batches = list(Loader(make, workers).iterate(steps))
    assert len(batches) == len(steps)
    for step, got in zip(steps, batches, strict=True):
        expected = make(step)
        assert (got["process"] == os.getpid()) == (workers == 0)
        for name in ("images", "half", "turned"):
            assert got[name].dtype == expected[name].dtype and torch.equal(got[name], expected[name])
            got[name].add_(1)  # its own memory
        assert got["texts"] == expected["texts"]
    assert len({batch["process"] for batch in batches}) == max(1, workers)
    assert_none_left(batch["process"] for batch in batches)


def assert_none_left(processes: Any) -> None:
    for process in {*processes} - {os.getpid()}:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_a_worker_is_no_more_than_a_batch_ahead(tmp_path: Path) -> None:
    def note(step: int) -> Any:
        (tmp_path / str(step)).touch()
        return np.zeros(1 << 22, dtype=np.uint8)  # more than a pipe holds

    batches = Loader(note, 2).iterate(range(20))
    next(batches)
    until(lambda: len(list(tmp_path.iterdir())) >= 3)
    time.sleep(0.2)
    assert len(list(tmp_path.iterdir())) == 3
    batches.close()


class OddError(Exception):
    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")


@pytest.mark.parametrize(
    "error, kind, says",
    [
        (InputError("video a.mp4: broken"), InputError, r"^video a\.mp4: broken$"),
        (OddError(1, 2), RuntimeError, r"(?s)Traceback.*in fail.*OddError: 1 and 2"),  # pickles, but not back
    ],
)
def test_what_goes_wrong_in_a_worker_is_raised_at_its_step(error: Exception, kind: Any, says: str) -> None:
    def fail(step: int) -> int:
        if step == 7:
            raise error
        return os.getpid()

    batches = Loader(fail, 2).iterate(range(4, 12))
    processes = [next(batches) for _ in range(3)]
    with pytest.raises(kind, match=says):
        next(batches)
    assert_none_left(processes)


def test_a_worker_that_is_killed_is_an_error() -> None:
    def die(step: int) -> int:
        if step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return step

    with pytest.raises(ConfigurationError, match=r"batch of step 3, .* has ended \(exit code -9; .*; take fewer work"):
        list(Loader(die, 2).iterate(range(8)))


def test_workers_end_with_an_iterator_that_is_given_up() -> None:
    batches = Loader(make, 2).iterate(range(100))
    processes = [next(batches)["process"] for _ in range(2)]
    batches.close()
    assert_none_left(processes)
    open_before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        list(Loader(make, 2).iterate(range(4)))
    assert len(os.listdir("/proc/self/fd")) <= open_before  # a fork closes what other tests left open


def test_an_image_that_a_worker_decoded_is_there_for_all() -> None:
    cache = ImageCache(5, 8, most_bytes=3 * 8 * 8 * 3 + 100)

    def fill(step: int) -> bool:
        cache.put(step, np.full((8, 8, 3), step + 1, dtype=np.uint8))
        return True

    assert all(Loader(fill, 2).iterate(range(5)))
    found = [cache.get(number) for number in range(5)]
    assert [None if image is None else int(image[7, 7, 2]) for image in found] == [1, 2, 3, None, None]
    assert found[0] is not None and not found[0].flags.writeable
    assert ImageCache(5, 8, most_bytes=0).get(0) is None
