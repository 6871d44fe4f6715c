"""A bundle with bfloat16 weights: its programs and graphs against the float32 model, and what stays float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from support.bundles import demo_observation
from support.exported import NONE, A, Made, draw, export, skip_tracing

from ki_vla_ros.bundle.folder import EXPERT, PREFILL, PROGRAMS, TIME
from ki_vla_ros.bundle.pt2 import read_program
from ki_vla_ros.bundle.time_table import TimeTable
from ki_vla_ros.engines.base import prefill_inputs, step_times
from ki_vla_ros.engines.onnx_engine import OnnxEngine
from ki_vla_ros.engines.torch_engine import TorchEngine
from ki_vla_ros.errors import EngineError
from ki_vla_ros.policy.policy import Policy
from ki_vla_ros.policy.preprocess import make_model_input
from ki_vla_ros.records import ModelInput
from training.export.bundle import COSINE, ExportError, export_bundle
from training.export.parity import answer, lowest_cosine

STEPS = 10
Array = NDArray[np.float32]


@pytest.fixture(scope="module", params=["text", "token"])
def half(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return export(tmp_path_factory, request.param, "bfloat16")


def inputs(made: Made) -> list[ModelInput]:
    said = ("touch the red cube", "point at the blue ball")
    manifest, tokenizer = made.bundle.manifest, made.bundle.tokenizer
    return [make_model_input(manifest, tokenizer, demo_observation(seed=k), text) for k, text in enumerate(said)]


def cosine(ours: Array, theirs: Array) -> float:
    return float(np.vdot(ours, theirs) / (np.linalg.norm(ours) * np.linalg.norm(theirs)))


def test_its_actions_are_those_of_float32(half: Made) -> None:
    """What the flow adds to the noise is compared too, because the noise alone is nearly parallel to the chunk."""
    policy = Policy(half.bundle, TorchEngine(half.bundle), flow_steps=STEPS)
    for seed, given in enumerate(inputs(half)):
        noise = policy.noise(seed)
        got = policy.denoise(policy.prefill(given), noise, given.state_S)
        _, chunk = answer(half.model, given, noise, STEPS)
        expected = chunk.numpy()
        assert cosine(got, expected) >= COSINE and cosine(got - noise, expected - noise) >= COSINE
        assert np.abs(expected - noise).max() > 0.5 and 1e-5 < np.abs(got - expected).max() < 0.02


def test_keys_and_values_come_in_half_precision(half: Made) -> None:
    engine = TorchEngine(half.bundle)
    for given in inputs(half):
        engine.prefill(given)
        cache, _ = answer(half.model, given, draw(0), 1)
        for name, expected in (("keys", cache.keys_NBKPD), ("values", cache.values_NBKPD)):
            got = engine.prefix[name]
            assert got.dtype == torch.bfloat16
            assert cosine(got.float().numpy(), expected[:, 0].numpy()) >= COSINE


def test_all_steps_at_once_are_the_single_steps_bit_for_bit(half: Made) -> None:
    engine, x_t, state_S = TorchEngine(half.bundle), draw(0), half.given.state_S
    cache = engine.prefill(half.given)
    got = engine.integrate(cache, state_S, x_t, 5, NONE)
    for t in step_times(5):
        x_t = x_t - np.float32(0.2) * engine.velocity(cache, state_S, x_t, t, NONE)
    assert got.tobytes() == x_t.tobytes()


# --- what stays in float32


def test_norms_of_the_programs_read_float32(half: Made) -> None:
    """Their softmax is inside `scaled_dot_product_attention`, which computes it in float32."""
    counted: dict[str, int] = {}
    for name in PROGRAMS.values():
        program = torch.export.load(half.bundle.path / name)
        for node in program.graph.nodes:
            operator = str(node.target).removeprefix("aten.").partition(".")[0]
            if operator in ("layer_norm", "square", "mean", "rsqrt", "softmax", "_softmax", "sin", "cos"):
                counted[operator] = counted.get(operator, 0) + 1
                assert {value.meta["val"].dtype for value in node.all_input_nodes} == {torch.float32}, node
    assert counted == {"layer_norm": 3, "square": 8, "mean": 8, "rsqrt": 8, "sin": 2, "cos": 2}


def test_norms_and_softmax_of_the_graphs_read_float32(half: Made) -> None:
    counted: dict[str, int] = {}
    for name in (PREFILL, EXPERT):
        graph = onnx.shape_inference.infer_shapes(onnx.load(half.bundle.path / name)).graph
        types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input)}
        types |= {weight.name: weight.data_type for weight in graph.initializer}
        for node in graph.node:
            if node.op_type in ("LayerNormalization", "ReduceMean", "Pow", "Sqrt", "Reciprocal", "Softmax"):
                counted[node.op_type] = counted.get(node.op_type, 0) + 1
                assert types[node.input[0]] == onnx.TensorProto.FLOAT, node
    wanted = {"LayerNormalization": 3, "ReduceMean": 8, "Sqrt": 8, "Reciprocal": 8, "Pow": 8, "Softmax": 4}
    assert counted == wanted


def test_only_large_matrices_are_in_half_precision(half: Made) -> None:
    for name in PROGRAMS.values():
        weights = read_program(half.bundle.path / name).weights
        kept = {key for key, weight in weights.items() if weight.dtype == "float32"}
        assert all(weight.dtype in ("float32", "bfloat16") for weight in weights.values())
        halved = {*weights} - kept
        assert halved and not [key for key in halved if "norm" in key or "action" in key or "stem" in key]


# --- the ONNX graphs, on ONNX's own slow reference: onnxruntime's CPU provider has no kernels for them


def reference_chunk(made: Made, given: ModelInput, x_t: Any) -> Array:
    prefill, expert = (ReferenceEvaluator(str(made.bundle.path / name)) for name in (PREFILL, EXPERT))
    cache = dict(zip(("keys", "values", "prefix_mask"), prefill.run(None, prefill_inputs(given)), strict=True))
    times = TimeTable(made.bundle.path / TIME, made.bundle.manifest.graph.modulation)
    state = {} if given.state_S is None else {"state": given.state_S}
    for t in step_times(STEPS):
        step = {"modulation": times[t], "clean": NONE, "step": np.array([1.0 / STEPS], dtype=np.float32)}
        _, x_t = expert.run(None, {**cache, **state, **step, "x_t": x_t})
    return np.asarray(x_t)


def test_the_graphs_compute_what_the_programs_do(half: Made) -> None:
    engine = TorchEngine(half.bundle)
    given, noise = half.given, draw(3)
    got = reference_chunk(half, given, noise)
    ours = engine.integrate(engine.prefill(given), given.state_S, noise, STEPS, NONE)
    _, model = answer(half.model, given, noise, STEPS)
    assert got.dtype == np.float32 and got.shape == (len(noise), A)
    for expected in (ours, model.numpy()):
        assert cosine(got, expected) >= COSINE and cosine(got - noise, expected - noise) >= COSINE
        assert np.abs(got - expected).max() < 0.02


def test_onnxruntime_on_a_cpu_refuses_it(half: Made) -> None:
    with pytest.raises(EngineError, match=r"expected a float32 bundle for CPUExecutionProvider, got bfloat16"):
        OnnxEngine(half.bundle)


# --- the comparison at export


def test_the_export_compares_and_refuses(
    half: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_tracing(monkeypatch, half)
    checkpoint = half.checkpoint
    bundle = export_bundle(checkpoint, tmp_path / "bundle", with_torch=True, dtype="bfloat16")
    assert "cosine 1.000000 to torch in float32" in capsys.readouterr().out
    right = TorchEngine.integrate
    monkeypatch.setattr(TorchEngine, "integrate", lambda self, *given: right(self, *given) + draw(1) * np.float32(0.2))
    assert (
        0.9 < lowest_cosine(checkpoint, bundle, range(bundle.manifest.graph.vocab_size), TorchEngine, cases=1) < COSINE
    )
    monkeypatch.setattr("training.export.bundle.lowest_cosine", lambda *given: float("nan"))
    with pytest.raises(ExportError, match=r"expected a cosine of 0\.999 to float32 or more, got nan"):
        export_bundle(checkpoint, tmp_path / "bundle", with_torch=True, dtype="bfloat16")
    assert (tmp_path / "bundle" / "manifest.json").exists(), "the earlier bundle stays"
