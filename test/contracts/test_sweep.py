"""Settings tried side by side give what each gives alone, however they are spread over processes."""

from __future__ import annotations

import functools
import json
import multiprocessing
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from support.bundles import demo_observation
from support.sample_bags import recording, write_bag

from ki_vla_ros.bags.bag import open_bag
from ki_vla_ros.bundle.folder import load_bundle
from ki_vla_ros.engines.onnx_engine import OnnxEngine
from ki_vla_ros.policy.preprocess import make_model_input
from ki_vla_ros.replay.__main__ import main
from ki_vla_ros.replay.latency import parse_latency
from ki_vla_ros.replay.loop import Replay
from ki_vla_ros.replay.setup import ReplayOptions, set_up
from ki_vla_ros.replay.sweep.figures import Outcome
from ki_vla_ros.replay.sweep.grid import Candidate, make_grid
from ki_vla_ros.replay.sweep.run import RECOMMENDED, SweepInputs, try_settings
from ki_vla_ros.replay.sweep.shared_engine import SharedEngine
from ki_vla_ros.settings.names import settings_from_parameters
from ki_vla_ros.settings.parameter_file import load_settings


@pytest.fixture(scope="module")
def bag_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bag(tmp_path_factory.mktemp("sweep") / "bag", recording(seconds=4.0))


@pytest.fixture(scope="module")
def prepared(bag_path: Path, bundle_path: str) -> tuple[SweepInputs, Sequence[Candidate]]:
    with open_bag(bag_path) as bag:
        plan = set_up(bag, bundle_path)
    base = settings_from_parameters({"ramp_in_s": 0.0})
    latency = functools.partial(parse_latency, "0.015")
    inputs = SweepInputs(bag_path, Path(bundle_path), plan.topics, latency, 2.0)
    texts = ("executor=asynchronous,rtc,synchronous", "execution_horizon=2,4", "inference_delay=1")
    return inputs, make_grid(texts, base, plan.bundle.manifest).candidates


def told(outcome: Outcome) -> tuple[object, ...]:
    """Everything, bit by bit."""
    squares = [(segment, total_J.tobytes(), count) for segment, (total_J, count) in outcome.squares.items()]
    jumps = [(segment, total_J.tobytes(), count) for segment, (total_J, count) in outcome.jumps.items()]
    counts = (outcome.ticks, outcome.chunks, outcome.held, outcome.refused, outcome.restarts, outcome.missed)
    return (*counts, tuple(squares), tuple(jumps), outcome.jerk_rms, outcome.age_s, outcome.acted)


def test_side_by_side_as_alone(prepared: tuple[SweepInputs, Sequence[Candidate]]) -> None:
    inputs, candidates = prepared
    together = try_settings(inputs, candidates, processes=1)
    alone = [try_settings(inputs, [candidate], processes=1)[0] for candidate in candidates]
    assert [told(outcome) for outcome in together] == [told(outcome) for outcome in alone]
    assert len({told(outcome) for outcome in together}) == len(candidates)  # and they do differ
    assert all(outcome.acted > 10 for outcome in together)


def test_processes_do_not_matter(prepared: tuple[SweepInputs, Sequence[Candidate]]) -> None:
    inputs, candidates = prepared
    one, two = try_settings(inputs, candidates, processes=1), try_settings(inputs, candidates, processes=2)
    assert [told(outcome) for outcome in one] == [told(outcome) for outcome in two]


@pytest.mark.parametrize("processes", [1, 2])
def test_what_the_report_raises_ends_all_processes(
    prepared: tuple[SweepInputs, Sequence[Candidate]], processes: int
) -> None:
    def interrupted(share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        try_settings(*prepared, processes=processes, on_progress=interrupted)
    assert not multiprocessing.active_children()


def test_longer_horizons_infer_less_and_act_on_older_images(
    prepared: tuple[SweepInputs, Sequence[Candidate]],
) -> None:
    inputs, candidates = prepared
    by_horizon = {
        candidate.settings.execution_horizon_s: outcome
        for candidate, outcome in zip(candidates, try_settings(inputs, candidates, processes=1), strict=True)
        if candidate.settings.executor == "asynchronous"
    }
    often, seldom = by_horizon[0.1], by_horizon[0.2]
    assert often.ticks == seldom.ticks
    assert seldom.chunks == pytest.approx(often.chunks / 2, abs=1)
    assert seldom.age_s / seldom.acted > often.age_s / often.acted + 0.03


@pytest.mark.parametrize("noise_by_tick", [True, False])
def test_chunks_of_a_tick_start_from_the_same_noise(
    prepared: tuple[SweepInputs, Sequence[Candidate]], noise_by_tick: bool
) -> None:
    """Whatever was skipped before; as the node counts, they would not."""
    inputs, bundle = prepared[0], load_bundle(prepared[0].bundle)
    found = []
    for horizon_s in (0.1, 0.2):
        settings = settings_from_parameters({"ramp_in_s": 0.0, "execution_horizon_s": horizon_s})
        options = ReplayOptions(probe_every_s=0.0, latency=inputs.latency(), noise_by_tick=noise_by_tick)
        with open_bag(inputs.bag) as bag:
            replay = Replay(bag, bundle, OnnxEngine(bundle), settings, inputs.topics, options)
            ticks = list(replay.ticks())
        found.append({tick.number: tick.prediction.position_HJ for tick in ticks if tick.prediction is not None})
    common = sorted(found[0].keys() & found[1].keys())[2:]
    assert len(common) > 10
    same = [np.array_equal(found[0][number], found[1][number]) for number in common]
    assert all(same) if noise_by_tick else not any(same)


def test_shared_engine_computes_each_input_once(bundle_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = load_bundle(bundle_path)
    engine = OnnxEngine(bundle)
    prefill, computed = engine.prefill, []
    monkeypatch.setattr(engine, "prefill", lambda given: computed.append(given) or prefill(given))
    shared, manifest = SharedEngine(engine), bundle.manifest
    inputs = [
        make_model_input(manifest, bundle.tokenizer, demo_observation(seed=seed), "touch the red cube")
        for seed in (0, 0, 1, 0)
    ]
    generator = np.random.default_rng(0)
    x_t_HA = generator.standard_normal((manifest.horizon, manifest.graph.action_dim), dtype=np.float32)
    clean_H = np.zeros(manifest.horizon, dtype=np.bool_)
    found, expected = [], []
    for model_input in inputs:
        cache = shared.prefill(model_input)
        found.append(shared.velocity(cache, model_input.state_S, x_t_HA, 1.0, clean_H).copy())
        shared.velocity(cache, model_input.state_S, x_t_HA, 1.0, clean_H)[:] = 7.0  # a caller's own to write to
    assert len(computed) == 3, "the second input is the first once more"
    for model_input in inputs:
        expected.append(engine.velocity(engine.prefill(model_input), model_input.state_S, x_t_HA, 1.0, clean_H))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
def test_command_writes_report_and_recommendation(
    bag_path: Path, bundle_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = []
    for name in ("first", "second"):
        out = tmp_path / name
        arguments = [str(bag_path), "--bundle", bundle_path, "--out", str(out), "--latency", "0.015", "--no-mcap"]
        assert main([*arguments, "--sweep", "executor=asynchronous,temporal_ensemble", "execution_horizon=2,6"]) == 0
        written.append([(out / file).read_bytes() for file in ("sweep.json", "recommended.yaml")])
        assert load_settings(out / "recommended.yaml").rate_hz == 10.0
        page = (out / "report.html").read_text()
        assert "Sweep" in page and "temporal_ensemble" in page and "data:image/jpeg" in page
    assert written[0] == written[1]
    found, metrics = (json.loads((out / file).read_text()) for file in ("sweep.json", "metrics.json"))
    # The given settings make a chunk at every tick, so both runs draw the same noise.
    assert found["settings"][0]["jerk"] == metrics["seam"]["jerk_rms"] > 0.0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].startswith("realtime_factor")  # the replay's summary comes first
    assert lines[-2].startswith("sweep: 2 settings and the given ones; ") and lines[-1] == f"see {out / RECOMMENDED}"
    assert (
        lines[-2].partition("; ")[2].startswith(("keep the given settings: With", "take executor ", "take execution_h"))
    )
