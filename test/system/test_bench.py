"""The benchmarks as commands: one short real run of each, without judging any timing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

from ki_vla_ros.bench.model import PARTS, table
from ki_vla_ros.bundle.folder import load_bundle


def run_bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    """An environment without ROS, as on a machine that has none."""
    code = "import sys; sys.modules['rclpy'] = None; from ki_vla_ros.bench.__main__ import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.ros
def test_bench_node(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    command = [sys.executable, "-m", "ki_vla_ros.bench", "node", "--seconds", "3", "--hogs", "1", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert {"p50", "p90", "p99"} <= set(found["overhead_ms"]) and found["images_sent"] > 0
    assert set(found["stages_ms"]) >= {"preprocess", "prefill", "denoise", "safety", "publish"}
    assert found["chunks"] > 0 and found["cameras"] == 3


def test_a_bundle_that_is_not_there_is_named() -> None:
    command = [sys.executable, "-m", "ki_vla_ros.bench", "node", "--seconds", "1", "--bundle", "nothing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("bench: ") and "Traceback" not in done.stderr


def test_the_shipped_bundle_is_what_its_command_makes(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    command = [sys.executable, "-m", "training.export.tiny", str(tmp_path / "b")]
    subprocess.run([*command, "--tokenizer", "models/bench/tokenizer.json"], cwd=ROOT, check=True)
    made, shipped = load_bundle(tmp_path / "b").manifest, load_bundle(ROOT / "models" / "bench").manifest
    # The shipped folder is older than format 3; both are read as the same robot and model.
    assert made.model_copy(update={"format_version": shipped.format_version}) == shipped


def test_bench_model_needs_no_ros(tmp_path: Path) -> None:
    out = tmp_path / "model.json"
    done = run_bench("model", "--bundle", "demo", "--calls", "3", "--flow-steps", "4", "--json", str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found.keys() == {
        *(
            "bundle",
            "engine",
            "machine",
            "cameras",
            "prompt_tokens",
            "horizon",
            "flow_steps",
            "calls",
            "too_few_calls",
            "clock",
        ),
        *("graphs", "ms", "roofline"),
    }
    assert found["flow_steps"] == 4 and found["calls"] == 3 and found["too_few_calls"] is True
    assert set(found["ms"]) == set(found["roofline"]["ratio"]) == set(found["roofline"]["ms"]) == set(PARTS)
    assert all(row.keys() == {"p50", "p90", "p99", "max"} for row in found["ms"].values())
    assert found["graphs"].keys() == {"prefill", "step"}
    assert found["graphs"]["step"].keys() == {"parameters", "bytes", "bytes_read", "flops"}
    assert "fewer than 1000: too few for a p99" in done.stdout and "roofline" in done.stdout
    assert "too few" not in table(found | {"calls": 1000, "too_few_calls": False})
    assert "bound by" not in table(found | {"roofline": None})


def test_bench_compare_takes_turns(tmp_path: Path) -> None:
    out = tmp_path / "compare.json"
    done = run_bench("compare", "onnx", "onnx:flow_steps=3,bundle=bench", "--calls", "4", "--json", str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["set_ups"]["A"]["bundle"] == "demo" and found["set_ups"]["B"]["flow_steps"] == 3
    assert found["a_over_b"].keys() == {"ratio", "low", "high"} and found["ms"].keys() == {"A", "B"}
    assert "A takes" in done.stdout and "too few" in done.stdout
