"""The benchmark of the node: a short run for real, and its arithmetic on made-up ticks. No timing is judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import ROOT

from ki_vla_ros.bench.node import WARM_UP_S, summarize, table
from ki_vla_ros.bundle.folder import load_bundle
from ki_vla_ros.errors import KiVlaError
from training.export.tiny import bench_policy

MS = 1_000_000
START = 1_000_000 * MS


def tick(n: int, missed: int = 0, **changes: Any) -> dict[str, Any]:
    """One that begins 3 ms after the newest image and takes 5 + 1 ms, 4 of them the model's."""
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


def test_holds_and_dual_rate_ticks_are_no_chunks_with_a_prefill() -> None:
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


def test_a_short_run(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    command = [sys.executable, "-m", "ki_vla_ros.bench", "node", "--seconds", "3", "--hogs", "1", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert {"p50", "p90", "p99"} <= set(found["overhead_ms"]) and found["images_sent"] > 3 * 30 * 3
    assert set(found["stages_ms"]) >= {"preprocess", "prefill", "denoise", "safety", "publish"}
    assert found["chunks"] > 10 and found["cameras"] == 3


def test_what_cannot_run_says_why() -> None:
    command = [sys.executable, "-m", "ki_vla_ros.bench", "node", "--seconds", "1", "--bundle", "nothing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith("bench: ") and "Traceback" not in done.stderr


def test_the_shipped_bundle_is_what_its_command_makes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "training.export.tiny", str(tmp_path / "b")], cwd=ROOT, check=True)
    made, shipped = load_bundle(tmp_path / "b").manifest, load_bundle(ROOT / "models" / "bench").manifest
    assert made == shipped
