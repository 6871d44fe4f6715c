"""The roofline's arithmetic, and one real measurement of this processor whose value is not judged."""

from __future__ import annotations

import sys

import pytest

from ki_vla_ros.bench import roofline
from ki_vla_ros.bench.roofline import Ceiling, Work, measure_ceiling
from ki_vla_ros.errors import EngineError

CEILING = Ceiling(1e12, {1_000_000: 100e9, 1_000_000_000: 10e9}, "made up")


def test_the_longer_time_decides() -> None:
    compute = Work(flops=5e9, bytes=10e6)
    assert CEILING.times_ms(compute) == pytest.approx({"compute": 5.0, "bytes": 0.1})
    assert CEILING.least_ms(compute) == pytest.approx(5.0) and CEILING.bound(compute) == "compute"
    memory = Work(flops=5e9, bytes=900e6)
    assert CEILING.least_ms(memory) == pytest.approx(90.0) and CEILING.bound(memory) == "bytes"


def test_a_small_graph_is_judged_by_the_bandwidth_of_its_size() -> None:
    assert CEILING.times_ms(Work(0.0, 2e6))["bytes"] == pytest.approx(0.02)
    assert CEILING.times_ms(Work(0.0, 600e6))["bytes"] == pytest.approx(60.0)


@pytest.mark.slow
def test_this_processor_is_measured() -> None:
    found = measure_ceiling("cpu", 1, "float32", [1_000, 2_000_000])
    assert found.flops_per_s > 1e6 and all(rate > 1e6 for rate in found.bytes_per_s.values())
    assert list(found.bytes_per_s) == [1_000, 2_000_000]
    assert "1 thread" in found.source and found.source.startswith("measured")


def test_threads_are_set_before_the_library_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A separate process measures, with the number of threads in its environment."""
    seen = {}

    def run(command: list[str], env: dict[str, str], **_: object) -> object:
        seen.update(env)
        raise EngineError(" ".join(command))

    monkeypatch.setattr(roofline.subprocess, "run", run)
    with pytest.raises(EngineError, match=r"cpu_rates\(3, \[5\]\)"):
        measure_ceiling("cpu", 3, "float32", [5])
    assert seen["OPENBLAS_NUM_THREADS"] == seen["OMP_NUM_THREADS"] == "3"


def test_a_card_without_torch_is_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(EngineError, match=r"expected torch, .*--no-roofline"):
        measure_ceiling("cuda", 1, "bfloat16", [5])
