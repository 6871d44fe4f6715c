"""`bench node`: its arithmetic, on made-up ticks."""

from __future__ import annotations

from typing import Any

import pytest

from ki_vla_ros.bench.node import WARM_UP_S, summarize, table
from ki_vla_ros.errors import KiVlaError
from training.export.tiny import bench_policy

MS = 1_000_000
START = 1_000_000 * MS


def tick(n: int, missed: int = 0, **changes: Any) -> dict[str, Any]:
    """A tick that begins 3 ms after the newest image and takes 5 + 1 ms, 4 of them the model's."""
    begun_ns = START + n * 100 * MS
    stages = {"observation": 0.5, "prefill": 3.0, "denoise": 1.0, "publish": 1.5}
    return {
        "stamp_ns": begun_ns,
        "chunk_index": n,
        "hold": None,
        "observation_ns": begun_ns - 10 * MS,
        "newest_image_ns": begun_ns - 3 * MS,
        "command_ns": begun_ns + 6 * MS,
        "stage_ms": {**stages, "total": sum(stages.values())},
        "deadline_misses": missed,
        **changes,
    }


def figures(ticks: list[dict[str, Any]], received: int = 100) -> dict[str, Any]:
    status = {f"{name} messages": str(received) for name in ("front", "left", "right")}
    return summarize(ticks, status, 303, bench_policy(), {n + 1.0: 200.0 + 0.1 * n for n in range(60)})


def test_the_model_is_not_overhead() -> None:
    found = figures([tick(n) for n in range(200)])
    assert found["overhead_ms"] == pytest.approx(dict.fromkeys(("p50", "p90", "p99", "max"), 5.0))
    assert found["observation_to_command_ms"]["p50"] == pytest.approx(16.0)
    assert found["stages_ms"]["prefill"]["share"] == pytest.approx(0.5)
    assert (found["images_sent"], found["images_lost"]) == (303, 3)
    assert found["ticks"] == 200 - round(WARM_UP_S * 10)
    assert found["resident_mib"]["at_s"] == 30.0 and found["resident_mib"]["growth"] == pytest.approx(3.0)
    assert "prefill" in table(found) and "303 sent, 3 lost" in table(found)


def test_a_hold_is_no_chunk_and_a_tick_without_prefill_is_one() -> None:
    ticks = [tick(n) for n in range(100)]
    ticks[70] = tick(70, chunk_index=None, observation_ns=None, newest_image_ns=None, command_ns=None, hold="camera: x")
    ticks[80]["stage_ms"] = {"denoise": 1.0, "total": 1.0}
    found = figures(ticks)
    assert found["chunks"] == found["ticks"] - 1 and found["holds"] == ["camera"]
    with pytest.raises(KiVlaError, match="expected chunks, got holds: camera: x"):
        figures([ticks[70] | {"stamp_ns": START + n * 100 * MS} for n in range(100)])


def test_missed_deadlines_are_noticed_or_not() -> None:
    ticks = [tick(n, missed=2 * (n > 90)) for n in range(200) if n not in (90, 91)]
    found = figures(ticks)
    assert (found["deadlines_missed"], found["deadlines_missed_unnoticed"]) == (2, 0)
    assert found["deadlines_missed_share"] == pytest.approx(2 / 149)
    found = figures([t for t in ticks if t["stamp_ns"] != START + 15_000 * MS])
    assert found["deadlines_missed_unnoticed"] == 1
