"""The TensorRT engine on a double of its GPU (support/tensorrt_double.py says what that proves and what it does not).

What CUDA and TensorRT do with the same calls is tested in test/gpu.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx
from cuda.bindings import runtime as cuda
from numpy.typing import NDArray
from support.bundles import demo_observation, demo_policy, state_token_policy, write_test_bundle
from support.tensorrt_double import FakeDevice, FakeEngine, Work, fake_plans

from ki_vla_ros.bundle.folder import EXPERT, PREFILL, Bundle, load_bundle
from ki_vla_ros.bundle.onnx_header import TensorType
from ki_vla_ros.engines import tensorrt_engine
from ki_vla_ros.engines.base import IntegratingEngine, step_times
from ki_vla_ros.engines.choice import open_engine
from ki_vla_ros.engines.onnx_engine import OnnxEngine
from ki_vla_ros.engines.plans import PlanCache
from ki_vla_ros.engines.tensorrt_engine import TensorRTEngine, load_plans
from ki_vla_ros.engines.tensorrt_library import Library
from ki_vla_ros.errors import ConfigurationError, EngineError
from ki_vla_ros.policy.policy import Policy
from ki_vla_ros.policy.preprocess import make_model_input
from ki_vla_ros.records import ModelInput
from ki_vla_ros.settings.names import settings_from_parameters
from ki_vla_ros.share import find_bundle

Array = NDArray[np.float32]
no_gpu = pytest.mark.skipif(
    cuda.cudaGetDeviceCount()[0] == cuda.cudaError_t.cudaSuccess, reason="there is a GPU: this is about its absence"
)


@dataclasses.dataclass
class Rig:
    """An engine on the double, the same bundle on onnxruntime, and one input."""

    bundle: Bundle
    device: FakeDevice
    engine: TensorRTEngine
    reference: OnnxEngine
    given: ModelInput
    state_S: Array | None

    def noise(self, seed: int) -> Array:
        shape = (self.bundle.manifest.horizon, self.bundle.manifest.graph.action_dim)
        return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)

    def clean(self, rows: int = 0) -> NDArray[np.bool_]:
        return np.arange(self.bundle.manifest.horizon) < rows

    def integrate(self, seed: int = 0, steps: int = 10, rows: int = 0, engine: Any = None) -> Array:
        """A chunk of the engine under test, after a prefill."""
        cache = self.engine.prefill(self.given)
        return self.engine.integrate(cache, self.state_S, self.noise(seed), steps, self.clean(rows))

    def expected(self, seed: int = 0, steps: int = 10, rows: int = 0) -> Array:
        """The same chunk, step by step on onnxruntime."""
        cache, x_t, clean = self.reference.prefill(self.given), self.noise(seed), self.clean(rows)
        for time in step_times(steps):
            v_t = self.reference.velocity(cache, self.state_S, x_t, time, clean)
            x_t = np.where(clean[:, None], x_t, x_t - v_t / np.float32(steps))
        return x_t

    def graph(self, use: str) -> list[Work]:
        return self.device.graphs[self.engine._graphs[use]]

    def launches(self, use: str) -> list[Work]:
        return [work for work in self.graph(use) if work.what == "execute"]


@pytest.fixture(scope="module", params=["demo", "text", "token"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    if request.param == "demo":
        return load_bundle(find_bundle("demo"))
    policy = demo_policy() if request.param == "text" else state_token_policy()
    return write_test_bundle(tmp_path_factory.mktemp("bundle") / request.param, policy)


@pytest.fixture
def rig(bundle: Bundle) -> Iterator[Rig]:
    device = FakeDevice()
    engine = TensorRTEngine(bundle, fake_plans(bundle, device), device)
    given = make_model_input(bundle.manifest, bundle.tokenizer, demo_observation(), "touch the red cube")
    device.events.clear()
    state_S = given.state_S
    if state_S is not None:
        state_S = np.pad(state_S, (0, (bundle.manifest.graph.state_dim or 0) - len(state_S)))
    yield Rig(bundle, device, engine, OnnxEngine(bundle), given, state_S)
    engine.close()


# --- the same numbers


@pytest.mark.parametrize("steps", [1, 2, 5, 10])
def test_chunks_are_those_of_onnxruntime(rig: Rig, steps: int) -> None:
    for seed in range(2):
        got = rig.integrate(seed, steps)
        assert got.dtype == np.float32 and got == pytest.approx(rig.expected(seed, steps), abs=1e-5)
        assert np.abs(got - rig.noise(seed)).max() > 0.1


def test_clean_actions_stay_and_steer_the_others(rig: Rig) -> None:
    got = rig.integrate(3, rows=4)
    assert np.array_equal(got[:4], rig.noise(3)[:4])
    assert got == pytest.approx(rig.expected(3, rows=4), abs=1e-5)
    if rig.bundle.manifest.name == "demo":  # in the others no action attends to another
        assert np.abs(got - rig.integrate(3))[4:].max() > 1e-3


def test_single_steps_are_those_of_onnxruntime(rig: Rig) -> None:
    cache, expected = rig.engine.prefill(rig.given), rig.reference.prefill(rig.given)
    for time, rows in ((1.0, 0), (0.35, 0), (0.1, 4)):
        arguments = (rig.state_S, rig.noise(5), time, rig.clean(rows))
        wanted = rig.reference.velocity(expected, *arguments)
        assert rig.engine.velocity(cache, *arguments) == pytest.approx(wanted, abs=5e-6)


def test_a_policy_runs_on_it(rig: Rig) -> None:
    assert isinstance(rig.engine, IntegratingEngine)
    chunks = [
        Policy(rig.bundle, engine).infer(demo_observation(), "touch the red cube", 4)
        for engine in (rig.engine, rig.reference)
    ]
    assert chunks[0].position_HJ == pytest.approx(chunks[1].position_HJ, abs=1e-5)


def test_one_prefill_serves_several_chunks(rig: Rig) -> None:
    cache = rig.engine.prefill(rig.given)
    for seed in (1, 2):
        got = rig.engine.integrate(cache, rig.state_S, rig.noise(seed), 10, rig.clean())
        assert got == pytest.approx(rig.expected(seed), abs=1e-5)


# --- what a tick does, and does not


def test_a_tick_is_two_launches_and_one_wait(rig: Rig) -> None:
    for _ in range(3):
        rig.device.events.clear()
        rig.integrate()
        assert rig.device.events == ["launch", "launch", "synchronize"]


def test_a_guided_step_is_one_launch_and_one_wait(rig: Rig) -> None:
    cache = rig.engine.prefill(rig.given)
    rig.device.events.clear()
    rig.engine.velocity(cache, rig.state_S, rig.noise(0), 0.5, rig.clean())
    assert rig.device.events == ["launch", "synchronize"]


def test_keys_and_values_are_read_where_they_were_written(rig: Rig) -> None:
    (prefill,) = rig.launches("prefill")
    for step in (*rig.launches("chunk"), *rig.launches("step")):
        for name in ("keys", "values", "prefix_mask"):
            assert step.addresses[name] == prefill.addresses[name]


def test_steps_hand_their_actions_on_without_a_copy(rig: Rig) -> None:
    steps = rig.launches("chunk")
    assert len(steps) == rig.bundle.manifest.flow.steps
    for before, after in itertools.pairwise(steps):
        assert after.addresses["x_t"] == before.addresses["x_next"] != before.addresses["x_t"]
        assert 0 < after.addresses["modulation"] - before.addresses["modulation"] < 1 << 20
    # Copies stand before the first step and after the last.
    order = [work.what for work in rig.graph("chunk")]
    inputs = 2 + (rig.state_S is not None)
    assert order == ["copy in"] * inputs + ["execute"] * len(steps) + ["copy out"]


def test_addresses_stay_from_tick_to_tick(rig: Rig) -> None:
    before = {use: [work.addresses for work in rig.launches(use)] for use in ("prefill", "step", "chunk")}
    graphs = dict(rig.engine._graphs)
    for seed in range(3):
        rig.integrate(seed)
    assert rig.engine._graphs == graphs
    assert before == {use: [work.addresses for work in rig.launches(use)] for use in before}


def test_each_graph_has_a_context_of_its_own(rig: Rig) -> None:
    contexts = [{id(work.context) for work in rig.launches(use)} for use in ("prefill", "chunk", "step")]
    assert [len(of_graph) for of_graph in contexts] == [1, 1, 1]
    assert len(set.union(*contexts)) == 3


def test_images_wait_until_those_before_them_are_copied(rig: Rig) -> None:
    """Two prefills without a chunk between them, as after a refused observation."""
    other = dataclasses.replace(rig.given, images_VCHW=np.full_like(rig.given.images_VCHW, 0.5))
    rig.engine.prefill(other)
    got = rig.integrate()
    assert got == pytest.approx(rig.expected(), abs=1e-5)
    rig.engine.prefill(other)
    rig.engine.synchronize()
    rig.device.events.clear()
    rig.engine.prefill(rig.given)
    assert rig.device.events == ["launch"]


def test_another_number_of_steps_is_captured_once(rig: Rig) -> None:
    held = {(3, len(rig.device.allocations))}
    for steps in (10, 4, 25, 4, 25):
        assert rig.integrate(2, steps) == pytest.approx(rig.expected(2, steps), abs=1e-5)
        rig.device.events.clear()
        rig.integrate(1, steps)
        assert rig.device.events == ["launch", "launch", "synchronize"]
        assert len(rig.launches("chunk")) == steps
        held.add((len(rig.device.graphs), len(rig.device.allocations)))
    assert len(held) == 1, "graphs or tables of other numbers of steps are left"


def test_the_caller_may_keep_results_and_inputs_are_only_read(rig: Rig) -> None:
    x_t = rig.noise(0)
    cache = rig.engine.prefill(rig.given)
    velocity = rig.engine.velocity(cache, rig.state_S, x_t, 1.0, rig.clean())
    chunk = rig.engine.integrate(cache, rig.state_S, x_t, 10, rig.clean())
    before = velocity.copy(), chunk.copy()
    rig.engine.velocity(cache, rig.state_S, rig.noise(1), 0.2, rig.clean())
    rig.engine.integrate(cache, rig.state_S, rig.noise(1), 10, rig.clean())
    assert np.array_equal(velocity, before[0]) and np.array_equal(chunk, before[1])
    assert np.array_equal(x_t, rig.noise(0))


# --- refusals


def test_a_fault_of_the_device_surfaces_with_its_cause_and_stays(rig: Rig) -> None:
    cache = rig.engine.prefill(rig.given)
    rig.device.fault = "cudaErrorIllegalAddress (an illegal memory access was encountered)"
    log: Any = rig.engine._plans.log
    log.said = "kernel 12 failed"
    with pytest.raises(EngineError, match=r"prefill or 10 expert steps: failed .*IllegalAddress.*: kernel 12 failed"):
        rig.engine.integrate(cache, rig.state_S, rig.noise(0), 10, rig.clean())
    rig.device.fault = ""
    for call in (lambda: rig.engine.prefill(rig.given), lambda: rig.integrate()):
        with pytest.raises(EngineError, match=r"expected a device that works, got one that failed .*IllegalAddress"):
            call()
    rig.engine.close()
    assert rig.device.closed


def test_results_that_are_not_finite_are_refused(rig: Rig) -> None:
    cache, broken = rig.engine.prefill(rig.given), rig.noise(0)
    broken[2, 3] = np.nan
    with pytest.raises(EngineError, match="expected finite actions"):
        rig.engine.integrate(cache, rig.state_S, broken, 10, rig.clean())
    with pytest.raises(EngineError, match="expected finite velocities"):
        rig.engine.velocity(cache, rig.state_S, broken, 0.5, rig.clean())


def test_wrong_inputs_are_refused_before_anything_is_launched(rig: Rig) -> None:
    cache = rig.engine.prefill(rig.given)
    rig.device.events.clear()
    x_t, clean = rig.noise(0), rig.clean()
    with pytest.raises(EngineError, match="tokens: expected int64"):
        rig.engine.prefill(dataclasses.replace(rig.given, tokens_L=rig.given.tokens_L[:-1]))
    for call in (
        lambda *given: rig.engine.integrate(cache, given[0], given[1], 10, given[2]),
        lambda *given: rig.engine.velocity(cache, given[0], given[1], 0.5, given[2]),
    ):
        with pytest.raises(EngineError, match="x_t: expected float32"):
            call(rig.state_S, x_t[:-1], clean)
        with pytest.raises(EngineError, match="clean: expected bool"):
            call(rig.state_S, x_t, clean.astype(np.float32))
        with pytest.raises(EngineError, match="state: expected"):
            call(None if rig.state_S is not None else np.zeros(7, np.float32), x_t, clean)
    with pytest.raises(EngineError, match="steps: expected at least 1, got 0"):
        rig.engine.integrate(cache, rig.state_S, x_t, 0, clean)
    assert rig.device.events == []
    rig.integrate()


def test_a_stale_cache_is_refused(rig: Rig) -> None:
    old = rig.engine.prefill(rig.given)
    rig.engine.prefill(rig.given)
    with pytest.raises(EngineError, match=r"newest prefill \(2\), got one of prefill 1"):
        rig.engine.integrate(old, rig.state_S, rig.noise(0), 10, rig.clean())
    with pytest.raises(EngineError, match=r"newest prefill \(2\), got one of prefill 1"):
        rig.engine.velocity(old, rig.state_S, rig.noise(0), 0.5, rig.clean())


def test_a_closed_engine_is_refused(rig: Rig) -> None:
    cache = rig.engine.prefill(rig.given)
    rig.engine.close()
    rig.engine.close()
    assert rig.device.closed
    for call in (
        lambda: rig.engine.prefill(rig.given),
        lambda: rig.engine.integrate(cache, rig.state_S, rig.noise(0), 10, rig.clean()),
        lambda: rig.engine.velocity(cache, rig.state_S, rig.noise(0), 0.5, rig.clean()),
        lambda: rig.engine.synchronize(),
    ):
        with pytest.raises(EngineError, match="expected an open one, got one that was closed"):
            call()


def opened(bundle: Bundle, change: Callable[[dict[str, FakeEngine]], None]) -> None:
    device = FakeDevice()
    plans = fake_plans(bundle, device)
    change(plans.engines)  # type: ignore[arg-type]
    TensorRTEngine(bundle, plans, device)


def test_an_engine_of_another_bundle_is_refused(bundle: Bundle) -> None:
    def other_type(engines: dict[str, FakeEngine]) -> None:
        engines[PREFILL].inputs["tokens"] = TensorType("float32", engines[PREFILL].inputs["tokens"].shape)

    def other_shape(engines: dict[str, FakeEngine]) -> None:
        engines[EXPERT].outputs["velocity"] = TensorType("float32", (3, 7))

    def without_mask(engines: dict[str, FakeEngine]) -> None:
        del engines[PREFILL].outputs["prefix_mask"]

    def on_the_host(engines: dict[str, FakeEngine]) -> None:
        engines[EXPERT].locations["step"] = "HOST"

    for change, message in (
        (other_type, r"prefill\.onnx: tokens: expected input int64 .* got input float32 .*delete it from the engine"),
        (other_shape, r"expert\.onnx: velocity: expected output float32 .* got output float32 \[3, 7\]"),
        (without_mask, r"prefill\.onnx: prefix_mask: expected output bool .* got none"),
        (on_the_host, r"expert\.onnx: step: expected input float32 \[1\] on the device, got .* on the host"),
    ):
        with pytest.raises(EngineError, match=message):
            opened(bundle, change)


def test_too_little_memory_for_a_context_is_reported(bundle: Bundle) -> None:
    def no_memory(engines: dict[str, FakeEngine]) -> None:
        engines[EXPERT].out_of_memory = True

    with pytest.raises(EngineError, match=r"expert\.onnx: expected a context to run it, got none"):
        opened(bundle, no_memory)


def test_a_refused_launch_names_its_graph(rig: Rig) -> None:
    log: Any = rig.engine._plans.log
    log.said = "no kernel image"
    context: Any = rig.engine._contexts["chunk"]._context
    context.refuses = True
    cache = rig.engine.prefill(rig.given)
    with pytest.raises(EngineError, match=r"expert\.onnx: expected it to be enqueued, got a refusal: no kernel image"):
        rig.engine.integrate(cache, rig.state_S, rig.noise(0), 3, rig.clean())
    context.refuses = False
    del context
    assert rig.integrate(0, 3) == pytest.approx(rig.expected(0, 3), abs=1e-5)


# --- choosing it, without a GPU


@no_gpu
def test_without_a_gpu_the_choice_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    settings = settings_from_parameters({"engine": "tensorrt_rtx", "provider": "cuda", "engine_cache": str(tmp_path)})
    settings.validate_against(bundle.manifest)
    with pytest.raises(
        EngineError, match=r"CUDA: expected an NVIDIA GPU and its driver, got cudaError\w+ \(.*\); is the"
    ):
        open_engine(bundle, settings)


def test_the_engine_runs_only_on_nvidia_cards(bundle: Bundle) -> None:
    refused = [(name, "cpu", "cuda") for name in ("tensorrt", "tensorrt_rtx")]
    for name, provider, wanted in [*refused, *((name, "tensorrt", "cpu or cuda") for name in ("torch", "tensorrt"))]:
        with pytest.raises(ConfigurationError, match=rf"expected {wanted} for engine {name},.* got {provider}"):
            settings_from_parameters({"engine": name, "provider": provider}).validate_against(bundle.manifest)


@no_gpu
def test_a_plan_that_the_library_cannot_load_is_reported_with_its_reason(bundle: Bundle, tmp_path: Path) -> None:
    """As far as the real library goes without a GPU: build, keep, make a runtime, and refuse to deserialise."""
    said: list[str] = []
    library = Library("tensorrt_rtx", tensorrt_rtx)
    with pytest.raises(
        EngineError, match=r"prefill.*sm89\.plan: expected an engine that tensorrt_rtx .* loads on double .*: .*driver"
    ):
        load_plans(bundle, library, FakeDevice(), PlanCache(tmp_path), said.append)
    assert "building it" in said[0]


def test_a_device_is_closed_when_the_engine_cannot_be_made(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice()

    def fail(*_: object) -> None:
        raise EngineError("no plan")

    monkeypatch.setattr(tensorrt_engine, "CudaDevice", lambda: device)
    monkeypatch.setattr(tensorrt_engine, "load_plans", fail)
    with pytest.raises(EngineError, match="no plan"):
        tensorrt_engine.open_tensorrt(bundle, "tensorrt_rtx", None, print)  # type: ignore[arg-type]
    assert device.closed
