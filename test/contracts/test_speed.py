"""The contestants compute the same, and ratios are of the right pairs; how fast they are is not judged here."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import DEEP

from ki_vla_ros.engines import check_engine
from ki_vla_ros.errors import ConfigurationError, EngineError
from ki_vla_ros.settings import settings_from_parameters
from training.export.bundle import export_bundle
from training.export.parity import cosine
from training.export.random_weights import policy_spec, write_checkpoint
from training.speed import gpu, gpu_ways
from training.speed.__main__ import main
from training.speed.cpu import RATIOS, Ratio, compare, judge
from training.speed.gpu_ways import arranged, build_model, make_inputs, plain
from training.speed.peer import build_peer, peer_prefill
from training.weights.checkpoints import load_checkpoint

# As wide as what computes something meaningful, and no deeper than an export needs to be.
CONFIG = replace(DEEP, **{part: replace(getattr(DEEP, part), depth=2) for part in ("vision", "backbone", "expert")})
POLICY = policy_spec(CONFIG, "small", 2, 24, 0)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and its bundle."""
    folder = tmp_path_factory.mktemp("speed")
    write_checkpoint(folder / "checkpoint", CONFIG, POLICY)
    export_bundle(folder / "checkpoint", folder / "bundle")
    return folder / "checkpoint", folder / "bundle"


@pytest.mark.slow
def test_everything_compared_computes_the_same(
    exported: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "speed.json"
    command = ["--checkpoint", str(exported[0]), "--bundle", str(exported[1]), "--rounds", "2", "--slow-rounds", "2"]
    threads = torch.get_num_threads()
    try:
        assert main([*command, "--json", str(out)]) == 0
    finally:
        torch.set_num_threads(threads)
    found = json.loads(out.read_text())
    assert all(difference < 1e-4 for difference in found["differences"].values()) and len(found["differences"]) == 5
    assert [row["what"] for row in found["ratios"]] == [ratio.what for ratio in RATIOS]
    assert {name for ratio in RATIOS for name in (ratio.slow, ratio.fast)} == set(found["ms"])
    said = capsys.readouterr().out
    assert "| ratio of medians | found | 95 % interval | goal | |" in said and RATIOS[0].what in said


def test_a_bundle_with_other_weights_is_refused(exported: tuple[Path, Path], tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "other", CONFIG, POLICY, seed=1)
    with pytest.raises(ConfigurationError, match="is the bundle an export of this checkpoint"):
        compare(tmp_path / "other", exported[1], torch.get_num_threads(), 1, 1, lambda line: None)


def test_processor_time_needs_a_single_thread(exported: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--checkpoint", str(exported[0]), "--bundle", str(exported[1]), "--rounds", "1", "--slow-rounds", "1"]
    assert main([*command, "--processor-time", "--threads", "2"]) == 2
    assert "--processor-time: expected one thread, got 2" in capsys.readouterr().err
    threads = torch.get_num_threads()
    try:
        assert main([*command, "--processor-time"]) == 0
    finally:
        torch.set_num_threads(threads)
    assert "| ms (processor time) |" in capsys.readouterr().out


def test_the_peer_has_our_weights(exported: tuple[Path, Path]) -> None:
    model = load_checkpoint(exported[0]).eval().requires_grad_(False)
    images_BVCSS, mask, tokens_BL, token_mask = make_inputs(POLICY, CONFIG, 3).prefix
    tokens_BL = tokens_BL % 200
    ours = model.prefill(images_BVCSS, mask, tokens_BL, token_mask)
    theirs = peer_prefill(build_peer(model), images_BVCSS[0], tokens_BL)()
    torch.testing.assert_close(theirs.keys_NBKPD, ours.keys_NBKPD, atol=1e-4, rtol=0)
    torch.testing.assert_close(theirs.values_NBKPD, ours.values_NBKPD, atol=1e-4, rtol=0)
    with pytest.raises(ConfigurationError, match="which marks an image, got it"):
        peer_prefill(build_peer(model), images_BVCSS[0], torch.full_like(tokens_BL, CONFIG.vocab_size - 1))


def test_a_ratio_compares_calls_from_the_same_rounds() -> None:
    quick = {"a": np.full(5, 10.0), "b": np.full(5, 5.0)}
    slow = {"a": np.full(3, 12.0), "c": np.full(3, 60.0)}
    assert judge(Ratio("x", "a", "b", 1.5), quick, slow) == {
        "what": "x", "goal": 1.5, "reached": True, "ratio": 2.0, "low": 2.0, "high": 2.0
    }  # fmt: skip
    found = judge(Ratio("y", "c", "a", 5.5), quick, slow)
    assert found["ratio"] == 5.0 and found["reached"] is False


@torch.no_grad()
def test_what_runs_on_a_card_agrees_on_a_cpu() -> None:
    inputs = make_inputs(POLICY, CONFIG, 0)
    exact = build_model(CONFIG, 0, torch.float32)
    reference_RHA = plain(exact, inputs).chunk()
    torch.testing.assert_close(arranged(exact, inputs).chunk(), reference_RHA, atol=1e-4, rtol=0)
    half = build_model(CONFIG, 0, torch.bfloat16)
    assert half.backbone.layers[0].mlp.up.weight.dtype == torch.bfloat16
    for way in (plain(half, inputs), arranged(half, inputs)):
        assert 0.99 < cosine(way.chunk().float().numpy(), reference_RHA.numpy()) < 1.0


@pytest.fixture
def stand_in(exported: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The comparison on a CPU, with a bundle that was exported before."""
    monkeypatch.setitem(gpu.SIZES, "100m", lambda: CONFIG)
    monkeypatch.setitem(gpu.PROMPT_LENGTH, "100m", 24)
    monkeypatch.setattr(gpu_ways, "draw_weights", lambda *_: load_checkpoint(exported[0]).state_dict())
    shutil.copytree(exported[1], tmp_path / "2")
    return ["--device", "cpu", "--size", "100m", "--views", "2", "1", "--rounds", "1", "--bundles", str(tmp_path)]


@pytest.mark.slow
def test_the_card_comparison_runs_as_far_as_it_can_without_one(
    stand_in: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "export_bundle", no_export)  # of one view, which is none that was exported before
    out = tmp_path / "gpu.json"
    assert gpu.main([*stand_in, "--calls", "3", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [views["views"] for views in found["views"]] == [2, 1]
    rows, fewer = (views["rows"] for views in found["views"])
    ran = {name: row for name, row in rows.items() if "failed" not in row}
    assert ran.keys() == {"arranged graphs, eager", "onnxruntime", "eager"}
    assert ran["onnxruntime"]["cosine"] > 0.999999 and all(row["cosine"] > 0.99 for row in ran.values())
    assert ran["onnxruntime"]["calls"] == 3, "the fastest that is right is timed more often"
    assert all(row["calls"] == 1 for row in ran.values() if row["cosine"] < gpu.GOALS["cosine"])
    assert all(row["ms"]["chunk"]["p99_minus_min"] >= 0 for row in ran.values())
    assert {"TensorRT", "TensorRT for RTX", "torch engine"} == rows.keys() - ran.keys()
    assert fewer["onnxruntime"] == {"failed": "ConfigurationError: no export"}
    roof = found["views"][0]["roofline_ms"]
    assert roof["chunk"] > roof["all steps"] > 0
    assert found["versions"]["torch"] == str(torch.__version__) and found["driver"] == ""
    said = capsys.readouterr().out
    assert said.count("| views | way |") == 1 and "| 1 | onnxruntime | not measured: " in said
    assert found["goals"] is None and "goal" not in said, "they are the full size's, on a card"


def no_export(*given: object, **named: object) -> None:
    raise ConfigurationError("no export")


def test_what_a_bundle_lacks_is_found_once() -> None:
    asked: list[int] = []

    def make() -> Path:
        asked.append(1)
        raise ConfigurationError("no export")

    maker = gpu.BundleMaker(make)
    for _ in range(3):
        with pytest.raises(ConfigurationError, match="no export"):
            maker()
    assert asked == [1]


def test_no_bundle_is_made_for_an_engine_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    asked = gpu.BundleMaker(lambda: pytest.fail("it was made"))
    with pytest.raises(EngineError, match="onnxruntime provider: expected CUDAExecutionProvider"):
        gpu._on_bundle(asked, {"engine": "onnx", "provider": "cuda"}, None)  # type: ignore[arg-type]


def test_a_library_that_does_not_build_for_a_card_is_not_asked_to() -> None:
    pytest.importorskip("tensorrt_rtx")
    settings = settings_from_parameters({"engine": "tensorrt_rtx", "provider": "cuda"})
    check_engine(settings, "sm89")
    with pytest.raises(ConfigurationError, match=r"expected one that tensorrt_rtx .* builds for \(.*\), got 'sm90'"):
        check_engine(settings, "sm90")


def report_of(tmp_path: Path) -> tuple[gpu.Report, dict[str, Any]]:
    report = gpu.Report({"goals": gpu.GOALS}, tmp_path / "gpu.json", time.monotonic(), 100.0)
    report.views.append({"views": 3, "rows": {"first": {}, "second": {}}})
    return report, report.views[0]


def test_whatever_one_way_does_wrong_the_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "WARM_UP", 1)
    report, found = report_of(tmp_path)
    actions = np.ones((2, 3), np.float32)

    def fall() -> gpu.Runner:
        raise OSError("no space left | on device\n" + 300 * "x")

    gpu.run_task(report, gpu.Task(found, "first", fall, actions), 3)
    works = gpu.Runner(lambda: actions, lambda: None)
    gpu.run_task(report, gpu.Task(found, "second", lambda: works, actions), 3, 4)
    assert found["rows"]["second"]["calls"] == 4
    kept = json.loads((tmp_path / "gpu.json").read_text())["views"][0]["rows"]["first"]["failed"]
    assert kept.startswith("OSError: no space left | on") and len(kept) > 300
    report.finish()
    said = capsys.readouterr().out.splitlines()
    assert any(line.startswith("| 3 | first | not measured: OSError: no space left / on device x") for line in said)
    assert any(line.startswith("chunk_ms: ") and line.endswith("(second)") for line in said)
    assert " - | - | - |" in next(line for line in said if "| second |" in line), "of four calls there is no p99"


def test_a_wrong_chunk_is_never_the_fastest(tmp_path: Path) -> None:
    report, found = report_of(tmp_path)
    slow = {**ROW, "ms": {"chunk": {**TAILS, "p50": 3.0}, "all steps": TAILS}}
    for wrong in (0.5, float("nan")):
        found["rows"] = {"first": {**ROW, "cosine": wrong}, "second": slow}
        assert gpu.fastest(found["rows"]) == "second"
        assert next(gpu.judged(report.views)) == "cosine below 0.999, so no goal is theirs: first"


def test_after_a_fault_of_the_device_nobody_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, found = report_of(tmp_path)
    monkeypatch.setattr(gpu, "answers", lambda: False)

    def fall() -> gpu.Runner:
        raise RuntimeError("an illegal memory access was encountered")

    gpu.run_task(report, gpu.Task(found, "first", fall, np.ones(1)), 3)
    gpu.run_task(report, gpu.Task(found, "second", lambda: pytest.fail("asked"), np.ones(1)), 3)
    assert found["rows"]["second"] == {"failed": "the device failed before: 3 views, first"}


@pytest.mark.slow
def test_without_time_it_keeps_what_it_has(
    stand_in: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(gpu, "LEAST_S", 3600.0)
    assert gpu.main([*stand_in, "--json", str(out)]) == 2, "nothing was measured"
    rows = json.loads(out.read_text())["views"][0]["rows"]
    assert all(row == {"failed": "no time was left"} for row in rows.values())
    said = capsys.readouterr()
    assert "| 2 | eager | not measured: no time was left |" in said.out
    assert "expected a way that runs here, got none" in said.err


def test_when_time_is_over_it_ends_within_a_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A compiler that never returns: the timer prints what is there, and ends the process."""
    ended: list[int] = []
    monkeypatch.setattr(gpu.os, "_exit", ended.append)
    monkeypatch.setattr(gpu, "_fill", lambda report, *_: hang(report, ended))
    out = tmp_path / "gpu.json"
    gpu.main(["--device", "cpu", "--within-s", "0.05", "--json", str(out)])
    assert ended == [0]
    rows = json.loads(out.read_text())["views"][0]["rows"]
    assert rows == {"first": ROW, "second": {"failed": "no time was left"}}
    said = capsys.readouterr()
    assert "| 3 | first | 1.00 | 2.00 | 2.000 | 1.50 | 0.70 | 1.00000 | 9000 |" in said.out
    assert "stopped after 0.05 s, in: 3 views, second, since 0 s" in said.err


def test_what_ends_the_time_ends_the_process_whatever_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(gpu.os, "_exit", ended.append)
    report, _ = report_of(tmp_path)
    report.path = tmp_path / "nowhere" / "gpu.json"
    with pytest.raises(FileNotFoundError):
        gpu._stop(report)
    assert ended == [2]


TAILS = {"p50": 1.0, "p99": 2.0, "p99_over_p50": 2.0, "p99_minus_min": 1.5}
ROW = {"ms": {"chunk": TAILS, "all steps": {**TAILS, "p50": 0.7}}, "cosine": 1.0, "calls": 9000}


def hang(report: gpu.Report, ended: list[int]) -> None:
    report.views.append({"views": 3, "rows": {"first": ROW, "second": {}}})
    report.begin("3 views, second")
    until_s = time.monotonic() + 20.0
    while not ended and time.monotonic() < until_s:
        time.sleep(0.01)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert "--device cuda: expected an NVIDIA card" in capsys.readouterr().err
