"""The torch engine against onnxruntime and the model itself, its backward pass, and what it refuses."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.bundles import HORIZON, demo_observation, write_test_bundle
from support.exported import NONE, A, Made, draw, skip_tracing

from ki_vla_ros.bundle.folder import PREFILL, Bundle
from ki_vla_ros.engines.base import DifferentiableEngine, KVCache
from ki_vla_ros.engines.choice import open_engine
from ki_vla_ros.engines.onnx_engine import OnnxEngine
from ki_vla_ros.engines.torch_engine import TorchEngine
from ki_vla_ros.errors import EngineError
from ki_vla_ros.policy.policy import Policy
from ki_vla_ros.policy.preprocess import make_model_input
from ki_vla_ros.settings.names import settings_from_parameters
from training.export.bundle import TOLERANCE, ExportError, export_bundle
from training.export.parity import parity_error
from training.model.vla import VLA


@pytest.fixture
def engine(made: Made) -> TorchEngine:
    return TorchEngine(made.bundle)


# --- the same numbers


def test_it_computes_what_onnxruntime_and_the_model_compute(made: Made, engine: TorchEngine) -> None:
    policies = [Policy(made.bundle, engine), Policy(made.bundle, OnnxEngine(made.bundle))]
    for index, instruction in enumerate(("touch the red cube", "point at the blue ball", "touch the red cube")):
        given = make_model_input(made.bundle.manifest, made.bundle.tokenizer, demo_observation(seed=index), instruction)
        ours, theirs = (p.denoise(p.prefill(given), p.noise(index), given.state_S) for p in policies)
        assert ours.dtype == np.float32 and np.abs(ours).max() > 0.1
        assert ours == pytest.approx(theirs, abs=1e-4)
    # The same operations in the same order: on the machine of this test the difference was 0.
    assert parity_error(made.model, made.bundle, cases=2, engine=TorchEngine(made.bundle)) <= 1e-6


def test_parity_sees_a_small_difference(made: Made) -> None:
    changed = VLA(made.model.config).eval().requires_grad_(False)
    changed.load_state_dict(made.model.state_dict())
    changed.get_parameter("expert.layers.0.norm1.dense.weight").mul_(1.1)
    assert parity_error(changed, made.bundle, cases=1, engine=TorchEngine(made.bundle)) > TOLERANCE


def test_an_export_of_other_numbers_is_refused(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_tracing(monkeypatch, made)
    right, wrong = TorchEngine.integrate, np.float32(1.001)
    monkeypatch.setattr(TorchEngine, "integrate", lambda self, *arguments: right(self, *arguments) * wrong)
    with pytest.raises(ExportError, match=r"parity: expected the graphs within 0\.0001 of torch, got 0\.00"):
        export_bundle(made.checkpoint, tmp_path / "bundle", with_torch=True)
    assert not (tmp_path / "bundle").exists()


def test_each_action_has_its_own_time(made: Made, engine: TorchEngine) -> None:
    """A clean prefix: time 0 only in the first rows."""
    onnx = OnnxEngine(made.bundle)
    clean_H = np.arange(HORIZON) < 3
    ours, theirs = (
        e.velocity(e.prefill(made.given), made.given.state_S, draw(0), 0.6, clean_H) for e in (engine, onnx)
    )
    assert ours == pytest.approx(theirs, abs=1e-4)
    plain = engine.velocity(KVCache(engine, 1), made.given.state_S, draw(0), 0.6, NONE)
    assert np.abs(ours - plain).max() > 1e-3


# --- the backward pass


@pytest.mark.parametrize("t", [1.0, 0.5, 0.1])
def test_the_pullback_agrees_with_finite_differences(made: Made, engine: TorchEngine, t: float) -> None:
    """vector . dv/dx in each of the H * A directions; float32 leaves about 1e-7 / step of the quotient."""
    cache, state_S = engine.prefill(made.given), made.given.state_S
    x_t, vector, step = draw(1), draw(2), np.float32(1e-2)
    expected = np.zeros(HORIZON * A)
    for k in range(HORIZON * A):
        nudge = np.zeros(HORIZON * A, dtype=np.float32)
        nudge[k] = step
        ahead, behind = (
            engine.velocity(cache, state_S, x_t + sign * nudge.reshape(HORIZON, A), t, NONE) for sign in (1, -1)
        )
        expected[k] = np.sum((ahead.astype(np.float64) - behind) * vector) / (2.0 * float(step))
    got = engine.pullback(cache, state_S, x_t, t, NONE, vector)
    assert got.shape == (HORIZON, A) and got.dtype == np.float32 and np.abs(got).max() > 0.3
    assert got.ravel() == pytest.approx(expected, abs=2e-3 * np.abs(expected).max())


def test_the_pullback_is_linear_and_leaves_no_trace(made: Made, engine: TorchEngine) -> None:
    cache, state_S = engine.prefill(made.given), made.given.state_S
    assert isinstance(engine, DifferentiableEngine) and not isinstance(OnnxEngine(made.bundle), DifferentiableEngine)
    x_t, before = draw(1), engine.velocity(cache, state_S, draw(1), 0.5, NONE)
    first, second = (engine.pullback(cache, state_S, x_t, 0.5, NONE, draw(seed)) for seed in (3, 4))
    both = engine.pullback(cache, state_S, x_t, 0.5, NONE, draw(3) - 2 * draw(4))
    assert both == pytest.approx(first - 2 * second, abs=1e-4)
    assert np.array_equal(engine.velocity(cache, state_S, draw(1), 0.5, NONE), before)
    assert not any(tensor.requires_grad for tensor in engine.prefix.values())


# --- refusals


def test_a_stale_or_foreign_cache_is_refused(made: Made, engine: TorchEngine) -> None:
    old, newest = engine.prefill(made.given), engine.prefill(made.given)
    for call in (engine.velocity, lambda *arguments: engine.pullback(*arguments, draw(0))):
        with pytest.raises(EngineError, match=r"newest prefill \(2\), got one of prefill 1"):
            call(old, made.given.state_S, draw(0), 1.0, NONE)
        with pytest.raises(EngineError, match="of another engine"):
            call(dataclasses.replace(newest, engine=object()), made.given.state_S, draw(0), 1.0, NONE)


def test_wrong_shapes_and_types_are_refused(made: Made, engine: TorchEngine) -> None:
    given, state_S = made.given, made.given.state_S
    with pytest.raises(EngineError, match=r"tokens: expected int64 \[32\], got int64 \[31\]"):
        engine.prefill(dataclasses.replace(given, tokens_L=given.tokens_L[:-1]))
    cache = engine.prefill(given)
    with pytest.raises(EngineError, match=r"x_t: expected float32 \[16, 7\], got float32 \[15, 7\]"):
        engine.velocity(cache, state_S, draw(0)[:-1], 1.0, NONE)
    with pytest.raises(EngineError, match=r"clean: expected bool \[16\], got float64 \[16\]"):
        engine.velocity(cache, state_S, draw(0), 1.0, np.ones(HORIZON))  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=r"vector: expected float32 \[16, 7\], got float32 \[7\]"):
        engine.pullback(cache, state_S, draw(0), 1.0, NONE, draw(0)[0])


def test_an_unexpected_and_a_missing_state_are_refused(made: Made, engine: TorchEngine) -> None:
    state_S = None if made.given.state_S is not None else np.zeros(A, np.float32)
    message = "expected a state token, got none" if state_S is None else "the prompt has it as text, got one"
    cache = engine.prefill(made.given)
    with pytest.raises(EngineError, match=message):
        engine.velocity(cache, state_S, draw(0), 1.0, NONE)
    with pytest.raises(EngineError, match=message):
        engine.pullback(cache, state_S, draw(0), 1.0, NONE, draw(1))


def test_results_that_are_not_finite_are_refused(made: Made, engine: TorchEngine) -> None:
    state_S, broken = made.given.state_S, draw(0)
    broken[2, 3] = np.nan
    cache = engine.prefill(made.given)
    with pytest.raises(EngineError, match="expected finite velocities"):
        engine.velocity(cache, state_S, broken, 1.0, NONE)
    with pytest.raises(EngineError, match="expected finite pullbacks"):
        engine.pullback(cache, state_S, draw(0), 1.0, NONE, broken)


@pytest.mark.parametrize("token", [-1, 10_000])
def test_a_token_beyond_the_table_never_reaches_the_device(made: Made, engine: TorchEngine, token: int) -> None:
    rows = made.bundle.manifest.graph.vocab_size
    with pytest.raises(EngineError, match=rf"tokens: expected 0 to {rows - 1}, got {token} to {token}"):
        engine.prefill(dataclasses.replace(made.given, tokens_L=np.full(32, token)))


def test_torchs_errors_become_engine_errors(made: Made, engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = engine.prefill(made.given)

    def fail(inputs: object) -> list[torch.Tensor]:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setitem(engine._graphs, PREFILL, fail)
    with pytest.raises(EngineError, match=r"prefill\.pt2: torch failed while running it \(no memory\)"):
        engine.prefill(made.given)
    with pytest.raises(EngineError, match="newest prefill"):
        engine.velocity(cache, made.given.state_S, draw(0), 1.0, NONE)


def test_a_closed_engine_is_refused(made: Made, engine: TorchEngine) -> None:
    cache = engine.prefill(made.given)
    engine.close()
    engine.close()
    for call in (
        lambda: engine.velocity(cache, made.given.state_S, draw(0), 1.0, NONE),
        lambda: engine.prefill(made.given),
    ):
        with pytest.raises(EngineError, match="expected an open one, got one that was closed"):
            call()


def test_an_absent_device_is_refused(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match="expected 'cpu' or 'cuda', got 'mps'"):
        TorchEngine(made.bundle, device="mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match=r"expected cuda, got torch .* install the wheel torch .* provider to cpu"):
        TorchEngine(made.bundle, device="cuda")


def test_the_caller_may_keep_velocities_and_inputs_are_unchanged(made: Made, engine: TorchEngine) -> None:
    cache, x_t = engine.prefill(made.given), draw(0)
    first = engine.velocity(cache, made.given.state_S, x_t, 1.0, NONE)
    before = first.copy()
    engine.velocity(cache, made.given.state_S, draw(1), 1.0, NONE)
    engine.pullback(cache, made.given.state_S, x_t, 1.0, NONE, draw(2))
    assert np.array_equal(first, before) and np.array_equal(x_t, draw(0))


# --- choosing it


def chosen(**parameters: object) -> Callable[[Bundle], object]:
    settings = settings_from_parameters(parameters)
    return lambda bundle: open_engine(bundle, settings)


def test_the_settings_choose_the_engine(made: Made, tmp_path: Path) -> None:
    assert isinstance(chosen(engine="torch")(made.bundle), TorchEngine)
    assert isinstance(chosen()(made.bundle), OnnxEngine)
    with pytest.raises(EngineError, match=r"torch_mode graph: expected provider cuda"):
        chosen(engine="torch", torch_mode="graph")(made.bundle)
    with pytest.raises(EngineError, match=r"expected prefill\.pt2 for the torch engine.*training\.export --torch"):
        chosen(engine="torch")(write_test_bundle(tmp_path / "plain"))


def test_a_missing_library_names_its_wheel(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ki_vla_ros.engines.torch_engine")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(EngineError, match="expected the Python module torch, got none; install the wheel torch"):
        chosen(engine="torch")(made.bundle)
    monkeypatch.delitem(sys.modules, "ki_vla_ros.engines.onnx_engine")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineError, match="install the wheel onnxruntime"):
        chosen()(made.bundle)
