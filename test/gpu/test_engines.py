"""Every engine on a real card against onnxruntime or torch on the processor; what is missing is skipped by name.

The engines' sequences of calls are tested without a card on doubles (test/engines). What a double cannot show is here:
that CUDA and TensorRT behave as the doubles do, and that the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support import ROOT
from support.bundles import demo_observation
from support.exported import export

from ki_vla_ros.bundle.folder import Bundle, load_bundle
from ki_vla_ros.engines.base import Engine
from ki_vla_ros.engines.cuda import CudaDevice
from ki_vla_ros.engines.onnx_engine import CUDA, OnnxEngine
from ki_vla_ros.engines.plans import PlanCache
from ki_vla_ros.engines.tensorrt_engine import open_tensorrt
from ki_vla_ros.engines.tensorrt_library import load_library
from ki_vla_ros.errors import EngineError
from ki_vla_ros.policy.policy import Policy
from ki_vla_ros.policy.preprocess import make_model_input

# Of actions between -1 and 1. Cards multiply float32 matrices with 10 bits of mantissa where the library lets them.
TOLERANCE = 0.01
INSTRUCTIONS = ("touch the red cube", "point at the blue ball", "touch the red cube")


@pytest.fixture
def device() -> Iterator[CudaDevice]:
    try:
        device = CudaDevice()
    except EngineError as missing:
        pytest.skip(str(missing))
    yield device
    device.close()


@pytest.fixture(scope="module")
def demo() -> Bundle:
    return load_bundle(ROOT / "models" / "demo")


def chunks(bundle: Bundle, engine: Engine) -> NDArray[np.float32]:
    """[3, H, A] normalised actions from three observations; the engine is closed."""
    policy, found = Policy(bundle, engine), []
    for seed, instruction in enumerate(INSTRUCTIONS):
        given = make_model_input(bundle.manifest, bundle.tokenizer, demo_observation(seed=seed), instruction)
        found.append(policy.denoise(policy.prefill(given), policy.noise(seed), given.state_S))
    engine.close()
    return np.array(found)


def assert_same(got: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    assert np.abs(expected[0] - expected[1]).max() > 10 * TOLERANCE, "other inputs, other actions"
    np.testing.assert_allclose(got, expected, atol=TOLERANCE)


# --- CUDA itself


def test_what_is_copied_in_comes_out_again(device: CudaDevice) -> None:
    assert device.name and device.compute_capability.startswith("sm") and device.stream
    sent, got = device.pin((3, 100), np.float32), device.pin((3, 100), np.float32)
    sent[:] = np.random.default_rng(0).standard_normal(sent.shape)
    address = device.allocate(sent.nbytes)
    device.copy_in(address, sent)
    device.copy_out(got, address)
    device.synchronize()
    np.testing.assert_array_equal(got, sent)
    device.free(address)


def test_a_recorded_graph_runs_when_it_is_launched(device: CudaDevice) -> None:
    sent, got = device.pin((100,), np.float32), device.pin((100,), np.float32)
    address = device.allocate(sent.nbytes)

    def work() -> None:
        device.copy_in(address, sent)
        device.copy_out(got, address)

    work()
    device.synchronize()
    graph = device.record(work)
    sent[:] = 1.0
    device.synchronize()
    assert not got.any(), "recording runs nothing"
    for value in (2.0, 3.0):
        sent[:] = value
        device.launch(graph)
        device.synchronize()
        assert (got == value).all()
    device.free_graph(graph)


# --- the engines


def test_onnxruntime_on_the_card_computes_what_it_does_on_the_processor(demo: Bundle) -> None:
    import onnxruntime

    if CUDA not in onnxruntime.get_available_providers():
        pytest.skip(f"onnxruntime {onnxruntime.__version__} without {CUDA}: the wheel onnxruntime-gpu brings it")
    assert_same(chunks(demo, OnnxEngine(demo, CUDA)), chunks(demo, OnnxEngine(demo)))


@pytest.mark.parametrize("mode", ["eager", "compile", "graph", "compile_graph"])
def test_torch_on_the_card_computes_what_it_does_on_the_processor(
    tmp_path_factory: pytest.TempPathFactory, mode: Any
) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} without a usable NVIDIA card")
    from ki_vla_ros.engines.torch_engine import TorchEngine

    bundle = export(tmp_path_factory, "text").bundle
    assert_same(chunks(bundle, TorchEngine(bundle, "cuda", mode=mode)), chunks(bundle, TorchEngine(bundle)))


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx"])
def test_tensorrt_computes_what_onnxruntime_does(device: CudaDevice, demo: Bundle, tmp_path: Path, name: Any) -> None:
    try:
        load_library(name)
    except EngineError as missing:
        pytest.skip(str(missing))
    said: list[str] = []
    expected = chunks(demo, OnnxEngine(demo))
    for built in (2, 0):  # the second time both plans come from the cache
        said.clear()
        assert_same(chunks(demo, open_tensorrt(demo, name, PlanCache(tmp_path), said.append)), expected)
        assert sum("building it" in line for line in said) == built
