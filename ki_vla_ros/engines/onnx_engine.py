"""Both graphs on onnxruntime, with every input and output bound once to buffers on the device that runs them.

The prefill writes keys, values and prefix mask into the very buffers that the expert reads, so the ten steps of a chunk
copy nothing but the small x_t, modulation and velocity. Legend: H horizon, A action dim, S width of the state token.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ki_vla_ros.bundle import EXPERT, PREFILL, TIME, Bundle, TensorType, TimeTable, graph_interface
from ki_vla_ros.engines.base import (
    KVCache,
    check_cache,
    check_finite,
    check_open,
    check_types,
    expert_inputs,
    prefill_inputs,
)
from ki_vla_ros.engines.plans import PlanCache
from ki_vla_ros.errors import EngineError
from ki_vla_ros.records import ModelInput

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
PROVIDERS = {"cpu": CPU, "cuda": CUDA, "tensorrt": TENSORRT}
"""Execution providers by the values of the setting `provider`."""
_DEVICE_OF = {CPU: "cpu", CUDA: "cuda", TENSORRT: "cuda"}
_WHEEL_OF = {CPU: "onnxruntime", CUDA: "onnxruntime-gpu", TENSORRT: "onnxruntime-gpu (and TensorRT's libraries)"}
_BFLOAT16 = 16  # ONNX's number for the element type; numpy has none


def check_provider(provider: str) -> None:
    """EngineError if the onnxruntime that is installed has not got this execution provider."""
    if provider not in _DEVICE_OF:
        raise EngineError(f"onnxruntime provider: expected one of {sorted(_DEVICE_OF)}, got {provider!r}")
    available = ort.get_available_providers()
    if provider not in available:
        raise EngineError(
            f"onnxruntime provider: expected {provider}, got onnxruntime {ort.__version__} with only {available}; "
            f"install the wheel {_WHEEL_OF[provider]} in its place"
        )


class OnnxEngine:
    """One bundle on one onnxruntime execution provider; EngineError where this machine does not have it."""

    def __init__(self, bundle: Bundle, provider: str = CPU, threads: int = 1, engine_cache: Path | None = None) -> None:
        check_provider(provider)
        if provider == CPU and bundle.manifest.graph.dtype != "float32":
            raise EngineError(
                f"{bundle.path}: expected a float32 bundle for {CPU}, got {bundle.manifest.graph.dtype}, which it has "
                "no kernels for; export with --dtype float32, or choose another provider or engine"
            )
        self.description = f"onnxruntime {ort.__version__}, {provider}, {threads} thread{'s' if threads != 1 else ''}"
        self._provider = provider
        self._options: dict[str, str] = {}
        if provider == TENSORRT and engine_cache is not None:
            # Building takes minutes; onnxruntime keys its cache by graph, version and card.
            PlanCache(engine_cache)  # made, and nobody else's
            self._options = {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(engine_cache)}
            self._options |= {"trt_timing_cache_enable": "1", "trt_timing_cache_path": str(engine_cache)}
        if provider != CPU and hasattr(ort, "preload_dlls"):  # since 1.21
            # CUDA's libraries that came as wheels are found by nobody else. What it prints is no output of a command.
            with redirect_stdout(sys.stderr):
                ort.preload_dlls()
        self._generation = 0
        interface = graph_interface(bundle.manifest)
        self._types = {name: tensor for sides in interface.values() for side in sides for name, tensor in side.items()}
        self._buffers = {name: self._allocate(tensor) for name, tensor in self._types.items()}
        self._graphs = {name: self._open(bundle.path / name, *interface[name], threads) for name in interface}
        self._times = TimeTable(bundle.path / TIME, bundle.manifest.graph.modulation)

    def prefill(self, model_input: ModelInput) -> KVCache:
        self._generation += 1
        self._run(PREFILL, prefill_inputs(model_input))
        return KVCache(self, self._generation)

    def velocity(
        self,
        cache: KVCache,
        state_W: NDArray[np.float32] | None,
        x_t_HA: NDArray[np.float32],
        time: float,
        clean_H: NDArray[np.bool_],
    ) -> NDArray[np.float32]:
        check_cache(self, cache, self._generation)
        self._run(EXPERT, expert_inputs(self._types, state_W, x_t_HA, self._times[time], clean_H))
        return check_finite(self._buffers["velocity"].numpy().copy())  # numpy() only views it on a CPU

    def close(self) -> None:
        self._graphs.clear()
        self._buffers.clear()

    def _allocate(self, tensor: TensorType) -> ort.OrtValue:
        device = _DEVICE_OF[self._provider]
        element = _BFLOAT16 if tensor.dtype == "bfloat16" else np.dtype(tensor.dtype)
        return ort.OrtValue.ortvalue_from_shape_and_type(list(tensor.shape), element, device, 0)

    def _open(
        self, path: Path, inputs: Mapping[str, TensorType], outputs: Mapping[str, TensorType], threads: int
    ) -> tuple[ort.InferenceSession, ort.IOBinding]:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # A spinning worker would burn the core that a simulator or the robot's drivers need between two chunks.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        try:
            session = ort.InferenceSession(str(path), options, providers=[(self._provider, self._options)])
        except Exception as error:  # onnxruntime's errors share no base but this
            raise EngineError(f"{path}: {self._provider} cannot load it ({error})") from error
        got = session.get_providers()
        if got[0] != self._provider:
            raise EngineError(f"{path}: expected {self._provider} to run it, got {got}; are its libraries installed?")
        binding = session.io_binding()
        for name in inputs:
            binding.bind_ortvalue_input(name, self._buffers[name])
        for name in outputs:
            binding.bind_ortvalue_output(name, self._buffers[name])
        return session, binding

    def _run(self, graph: str, inputs: Mapping[str, NDArray[np.generic]]) -> None:
        check_open(self._graphs)
        check_types(graph, self._types, inputs)
        for name, array in inputs.items():
            self._buffers[name].update_inplace(np.ascontiguousarray(array))
        session, binding = self._graphs[graph]
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's errors share no base but this
            raise EngineError(f"{graph}: onnxruntime failed while running it ({error})") from error
