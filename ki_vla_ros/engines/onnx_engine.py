"""Both graphs on onnxruntime, with every input and output bound once to buffers on the device that runs them.

The prefill writes keys, values and prefix mask into the very buffers that the expert reads, so the ten steps of a chunk
copy nothing but the small x_t, time and velocity. Legend: H horizon, A action dim, J joints.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ki_vla_ros.bundle import EXPERT, PREFILL, Bundle, graph_interface
from ki_vla_ros.engines.base import KVCache
from ki_vla_ros.errors import EngineError
from ki_vla_ros.onnx_header import TensorType
from ki_vla_ros.preprocess import ModelInput

_DEVICE_OF = {"CPUExecutionProvider": "cpu", "CUDAExecutionProvider": "cuda"}
_WHEEL_OF = {"CPUExecutionProvider": "onnxruntime", "CUDAExecutionProvider": "onnxruntime-gpu"}


class OnnxEngine:
    """One bundle on one onnxruntime execution provider; EngineError where this machine does not have it."""

    def __init__(self, bundle: Bundle, provider: str = "CPUExecutionProvider", threads: int = 1) -> None:
        if provider not in _DEVICE_OF:
            raise EngineError(f"onnxruntime provider: expected one of {sorted(_DEVICE_OF)}, got {provider!r}")
        available = ort.get_available_providers()
        if provider not in available:
            raise EngineError(
                f"onnxruntime provider: expected {provider}, got onnxruntime {ort.__version__} with only {available}; "
                f"install the wheel {_WHEEL_OF[provider]} in its place"
            )
        self.description = f"onnxruntime {ort.__version__}, {provider}, {threads} thread{'s' if threads != 1 else ''}"
        self._provider = provider
        self._generation = 0
        self._closed = False
        interface = graph_interface(bundle.manifest)
        (prefill_in, cache), (expert_in, expert_out) = interface[PREFILL], interface[EXPERT]
        self._buffers = {name: self._allocate(t) for name, t in {**prefill_in, **expert_in, **expert_out}.items()}
        self._shapes = {name: t.shape for name, t in {**prefill_in, **expert_in, **expert_out}.items()}
        self._prefill = self._open(bundle, PREFILL, threads)
        self._expert = self._open(bundle, EXPERT, threads)
        self._prefill_binding = self._bind(self._prefill, prefill_in, cache)
        self._expert_binding = self._bind(self._expert, expert_in, expert_out)

    def prefill(self, model_input: ModelInput) -> KVCache:
        self._require_open()
        self._generation += 1
        inputs = {
            "images": model_input.images_VCHW,
            "image_mask": model_input.image_mask_V,
            "tokens": model_input.tokens_L,
            "token_mask": model_input.token_mask_L,
        }
        self._run(PREFILL, self._prefill, self._prefill_binding, inputs)
        return KVCache(id(self), self._generation)

    def velocity(
        self,
        cache: KVCache,
        state_J: NDArray[np.float32] | None,
        x_t_HA: NDArray[np.float32],
        time_H: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        self._require_open()
        if cache != KVCache(id(self), self._generation):
            raise EngineError(
                f"KV cache: expected that of the newest prefill ({self._generation}), got one of prefill "
                f"{cache.generation}; run prefill and its steps without another prefill between them"
            )
        inputs: dict[str, NDArray[np.generic]] = {"x_t": x_t_HA, "time": time_H}
        if (state_J is not None) != ("state" in self._buffers):
            wanted = (
                "a state (the bundle feeds it as a token)"
                if state_J is None
                else "no state (the bundle has it in the prompt)"
            )
            raise EngineError(f"{EXPERT}: expected {wanted}, got {'none' if state_J is None else 'one'}")
        if state_J is not None:
            inputs["state"] = state_J
        self._run(EXPERT, self._expert, self._expert_binding, inputs)
        velocity_HA: NDArray[np.float32] = self._buffers["velocity"].numpy()
        if not np.all(np.isfinite(velocity_HA)):
            raise EngineError(
                f"{EXPERT}: expected finite velocities, got NaN or infinity; is an input or the bundle damaged?"
            )
        return velocity_HA

    def close(self) -> None:
        self._closed = True
        for name in ("_prefill_binding", "_expert_binding", "_prefill", "_expert", "_buffers"):
            self.__dict__.pop(name, None)

    def _require_open(self) -> None:
        if self._closed:
            raise EngineError("engine: expected an open one, got one that was closed; configure again")

    def _allocate(self, tensor: TensorType) -> ort.OrtValue:
        return ort.OrtValue.ortvalue_from_shape_and_type(
            list(tensor.shape), np.dtype(tensor.dtype), _DEVICE_OF[self._provider], 0
        )

    def _open(self, bundle: Bundle, name: str, threads: int) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # A spinning worker would burn the core that a simulator or the robot's drivers need between two chunks.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        try:
            session = ort.InferenceSession(str(bundle.path / name), options, providers=[self._provider])
        except Exception as error:  # onnxruntime's errors share no base but this
            raise EngineError(f"{bundle.path / name}: {self._provider} cannot load it ({error})") from error
        got = session.get_providers()
        if got[0] != self._provider:
            raise EngineError(
                f"{bundle.path / name}: expected {self._provider} to run it, got {got}; are its libraries installed?"
            )
        return session

    def _bind(
        self, session: ort.InferenceSession, inputs: Mapping[str, TensorType], outputs: Mapping[str, TensorType]
    ) -> ort.IOBinding:
        binding = session.io_binding()
        for name in inputs:
            binding.bind_ortvalue_input(name, self._buffers[name])
        for name in outputs:
            binding.bind_ortvalue_output(name, self._buffers[name])
        return binding

    def _run(
        self,
        graph: str,
        session: ort.InferenceSession,
        binding: ort.IOBinding,
        inputs: Mapping[str, NDArray[np.generic]],
    ) -> None:
        for name, array in inputs.items():
            buffer = self._buffers[name]
            if array.shape != tuple(self._shapes[name]) or array.dtype != buffer.numpy().dtype:
                raise EngineError(f"{graph}: {name}: expected {self._shapes[name]}, got {array.dtype} {array.shape}")
            buffer.update_inplace(np.ascontiguousarray(array))
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's errors share no base but this
            raise EngineError(f"{graph}: onnxruntime failed while running it ({error})") from error
