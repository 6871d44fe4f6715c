"""A bundle whose matrix products are int8: near the float32 model, by ONNX's own operators, on every processor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from support.exported import NOTES, Made, export, skip_tracing

from ki_vla_ros.bundle.folder import EXPERT, MODEL_CARD, PREFILL
from ki_vla_ros.engines.build import main
from ki_vla_ros.engines.onnx_engine import OnnxEngine
from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.policy.policy import Policy
from training.export.bundle import COSINE, ExportError, export_bundle
from training.export.parity import answer, cosine, random_input

STEPS = 10


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return export(tmp_path_factory, "text")


@pytest.fixture
def exported(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    skip_tracing(monkeypatch, made)
    bundle = export_bundle(made.checkpoint, tmp_path / "bundle", NOTES, dtype="int8")
    return Made(made.checkpoint, made.model, bundle, made.given)


def test_its_actions_are_near_those_of_float32(exported: Made) -> None:
    """What the flow adds to the noise is compared too, because the noise alone is nearly parallel to the chunk."""
    policy = Policy(exported.bundle, OnnxEngine(exported.bundle), flow_steps=STEPS)
    for case in range(3):
        given, noise = random_input(exported.bundle, case), policy.noise(case)
        got = policy.denoise(policy.prefill(given), noise, given.state_S)
        expected = answer(exported.model, given, noise, STEPS)[1].numpy()
        assert cosine(got, expected) >= COSINE and cosine(got - noise, expected - noise) >= COSINE
        assert 1e-5 < np.abs(got - expected).max() < 0.1, "not equal: then nothing was quantized"
    assert "Matrix products in int8" in (exported.bundle.path / MODEL_CARD).read_text()


def test_matrices_of_weights_are_multiplied_in_integers(made: Made, exported: Made) -> None:
    """All but the way into and out of the flow."""
    for name, exact in ((PREFILL, 0), (EXPERT, 2)):
        graphs = [onnx.load(bundle.path / name).graph for bundle in (made.bundle, exported.bundle)]
        weights = [{tensor.name: tensor for tensor in graph.initializer} for graph in graphs]
        matrices = [
            node for node in graphs[0].node if node.op_type in ("MatMul", "Gemm") and node.input[1] in weights[0]
        ]
        products = [node for node in graphs[1].node if node.op_type == "MatMulInteger"]
        assert len(products) == len(matrices) - exact > 5
        assert {node.domain for node in graphs[1].node} == {""}
        left = [n for n in graphs[1].node if n.op_type in ("MatMul", "Gemm") and n.input[1] in weights[1]]
        assert len(left) == exact
        for node in products:
            numbers = numpy_helper.to_array(weights[1][node.input[1]])
            # 255 * 64 + 255 * 64 fits into 16 bits, where processors without VNNI add pairs of products.
            assert numbers.dtype == np.int8 and 60 <= np.abs(numbers.astype(int)).max() <= 64


def test_what_does_not_belong_together_is_refused(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match=r"--dtype int8: expected a bundle without --torch"):
        export_bundle(made.checkpoint, tmp_path / "bundle", with_torch=True, dtype="int8")
    skip_tracing(monkeypatch, made)
    monkeypatch.setattr("training.export.bundle.lowest_cosine", lambda *given: 0.99)
    with pytest.raises(ExportError, match=r"expected a cosine of 0\.999 to float32 or more, got 0\.99"):
        export_bundle(made.checkpoint, tmp_path / "bundle", dtype="int8")
    assert not (tmp_path / "bundle").exists()


def test_tensorrt_refuses_it_and_says_what_it_is_for(
    exported: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx")
    command = ["--bundle", str(exported.bundle.path), "--library", "tensorrt_rtx", "--compute", "sm89"]
    assert main([*command, "--out", str(tmp_path / "engines")]) == 2
    assert "a bundle with --dtype int8 is for onnxruntime on a CPU: export with another" in capsys.readouterr().err
