"""Work shared out over processes."""

from __future__ import annotations

import os
import subprocess

import pytest

from ki_vla_ros.errors import ConfigurationError
from training.workers import share_out


def test_results_come_in_the_jobs_order_or_as_soon_as_they_are_there() -> None:
    jobs = [(2, n) for n in range(8)]
    for workers in (1, 2):
        assert list(share_out(pow, jobs, workers)) == [2**n for n in range(8)]
    assert sorted(share_out(pow, jobs, 2, in_order=False)) == [2**n for n in range(8)]


def test_a_slow_job_holds_nobody_up_where_order_does_not_matter() -> None:
    jobs = [("sleep 3; echo 1",), ("echo 2",), ("echo 3",)]
    assert list(share_out(subprocess.getoutput, jobs, 2, in_order=False)) in (["2", "3", "1"], ["3", "2", "1"])


def test_a_process_that_is_killed_is_an_error_that_says_so() -> None:
    with pytest.raises(ConfigurationError, match="--workers 2: expected processes that work to the end, got one that"):
        list(share_out(os._exit, [(1,)] * 3, 2))
