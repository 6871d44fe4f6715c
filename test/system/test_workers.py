"""Work shared out over processes."""

from __future__ import annotations

import os
import subprocess
import time
from concurrent.futures import Future
from pathlib import Path

import pytest

from ki_vla_ros.errors import ConfigurationError
from training.workers import _take, share_out, share_out_on_ray


def test_results_come_in_the_jobs_order_or_as_soon_as_they_are_there() -> None:
    jobs = [(2, n) for n in range(8)]
    for workers in (1, 2):
        assert list(share_out(pow, jobs, workers)) == [2**n for n in range(8)]
    assert sorted(share_out(pow, jobs, 2, in_order=False)) == [2**n for n in range(8)]


def test_a_slow_job_holds_nobody_up_where_order_does_not_matter() -> None:
    jobs = [("sleep 3; echo 1",), ("echo 2",), ("echo 3",)]
    assert list(share_out(subprocess.getoutput, jobs, 2, in_order=False)) in (["2", "3", "1"], ["3", "2", "1"])


def test_who_breaks_off_waits_for_nobody_and_nothing_that_is_done_is_lost(tmp_path: Path) -> None:
    jobs = [(f"touch {tmp_path}/{n}; sleep {0 if n == 0 else 20}; echo {n}",) for n in range(5)]
    begun = time.monotonic()
    results = share_out(subprocess.getoutput, jobs, 2, in_order=False)
    assert next(results) == "0"
    while not (tmp_path / "1").exists():
        time.sleep(0.01)
    time.sleep(0.3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"], "none is begun whose result would wait"
    results.close()  # type: ignore[attr-defined]
    assert time.monotonic() - begun < 15


def test_an_error_comes_after_the_results_that_are_there(tmp_path: Path) -> None:
    done = [Future[int](), Future[int](), Future[int]()]
    done[0].set_exception(ValueError("first"))
    done[2].set_result(3)
    assert _take(done, in_order=False) == 3
    with pytest.raises(ValueError, match="first"):
        _take(done, in_order=False)
    assert len(done) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # its own
def test_a_ray_cluster_does_the_same_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # or it puts a token into the home folder
    assert sorted(share_out_on_ray(pow, [(2, n) for n in range(4)], "local")) == [1, 2, 4, 8]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").touch()
    assert list(share_out_on_ray(os.path.exists, [("here",)], "local")) == [True]
    with pytest.raises(ValueError, match="invalid literal for int"):
        list(share_out_on_ray(int, [("two",)], "local"))
    with pytest.raises(ConfigurationError, match="--ray local: expected it to do its work, got "):
        list(share_out_on_ray(os._exit, [(1,)], "local"))


def test_a_process_that_is_killed_is_an_error_that_says_so() -> None:
    with pytest.raises(ConfigurationError, match="--workers 2: expected processes that work to the end, got one that"):
        list(share_out(os._exit, [(1,)] * 3, 2))
