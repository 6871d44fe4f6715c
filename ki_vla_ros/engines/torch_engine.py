"""Both graphs on torch, with a backward pass through the expert; it needs a bundle exported with `--torch`.

For parity with the model, and for real-time chunking with the true Jacobian (policy.py). It runs the operations of the
.pt2 files one by one: no model code, nothing compiled. Legend: H horizon, A action dim, S width of the state token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ki_vla_ros.bundle import EXPERT, PREFILL, PROGRAMS, TIME, Bundle, graph_interface
from ki_vla_ros.engines.base import (
    KVCache,
    check_cache,
    check_finite,
    check_open,
    check_types,
    expert_inputs,
    prefill_inputs,
)
from ki_vla_ros.errors import EngineError
from ki_vla_ros.preprocess import ModelInput
from ki_vla_ros.pt2 import Constant, Device, Name, Operation, Program, read_program
from ki_vla_ros.time_table import TimeTable


class TorchEngine:
    """One bundle on one device, "cpu" or "cuda"; EngineError where this machine or the bundle lacks what it needs.

    `threads` holds for all of torch in this process: it has no setting per model.
    """

    def __init__(self, bundle: Bundle, device: str = "cpu", threads: int = 1) -> None:
        if device not in ("cpu", "cuda"):
            raise EngineError(f"torch device: expected 'cpu' or 'cuda', got {device!r}")
        if device == "cuda" and not torch.cuda.is_available():
            raise EngineError(
                f"torch device: expected cuda, got torch {torch.__version__} without a usable NVIDIA card; install the "
                "wheel torch for the CUDA version of the driver, or set provider to cpu"
            )
        missing = [name for name in PROGRAMS.values() if name not in bundle.manifest.files]
        if missing:
            raise EngineError(
                f"{bundle.path}: expected {missing[0]} for the torch engine, got a bundle without it; export it with "
                "python -m training.export --torch, or set engine to onnx"
            )
        torch.set_num_threads(threads)
        self.description = f"torch {torch.__version__}, {device}, {threads} thread{'s' if threads != 1 else ''}"
        self._device = torch.device(device)
        self._generation = 0
        self._types = {
            name: tensor
            for inputs, outputs in graph_interface(bundle.manifest).values()
            for name, tensor in (inputs | outputs).items()
        }
        self._times = TimeTable(bundle.path / TIME, bundle.manifest.graph.modulation)
        self._graphs = {name: _Graph(read_program(bundle.path / file), device) for name, file in PROGRAMS.items()}
        self.prefix: dict[str, Tensor] = {}
        """Keys, values and prefix mask of the newest prefill, on the device."""

    def prefill(self, model_input: ModelInput) -> KVCache:
        self._generation += 1
        with torch.no_grad():
            outputs = self._run(PREFILL, self._tensors(PREFILL, prefill_inputs(model_input)))
        self.prefix = dict(zip(("keys", "values", "prefix_mask"), outputs, strict=True))
        return KVCache(self, self._generation)

    def velocity(
        self,
        cache: KVCache,
        state_S: NDArray[np.float32] | None,
        x_t_HA: NDArray[np.float32],
        time: float,
        clean_H: NDArray[np.bool_],
    ) -> NDArray[np.float32]:
        check_cache(self, cache, self._generation)
        inputs = self._step_inputs(state_S, x_t_HA, time, clean_H)
        with torch.no_grad():
            velocity_HA, _ = self._run(EXPERT, inputs | self.prefix)
        return check_finite(velocity_HA.cpu().numpy())

    def pullback(
        self,
        cache: KVCache,
        state_S: NDArray[np.float32] | None,
        x_t_HA: NDArray[np.float32],
        time: float,
        clean_H: NDArray[np.bool_],
        vector_HA: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        check_cache(self, cache, self._generation)
        check_types(EXPERT, {"vector": self._types["x_t"]}, {"vector": vector_HA})
        inputs = self._step_inputs(state_S, x_t_HA, time, clean_H)
        with torch.enable_grad():
            x_t = inputs["x_t"].requires_grad_()
            velocity_HA, _ = self._run(EXPERT, inputs | self.prefix)
            (pulled_HA,) = torch.autograd.grad(velocity_HA, x_t, torch.tensor(vector_HA, device=self._device))
        return check_finite(pulled_HA.cpu().numpy(), "pullbacks")

    def _step_inputs(
        self,
        state_S: NDArray[np.float32] | None,
        x_t_HA: NDArray[np.float32],
        time: float,
        clean_H: NDArray[np.bool_],
    ) -> dict[str, Tensor]:
        inputs = expert_inputs(self._types, state_S, x_t_HA, self._times.row(time), clean_H)
        return self._tensors(EXPERT, inputs)

    def close(self) -> None:
        self._graphs.clear()
        self.prefix.clear()

    def _tensors(self, graph: str, inputs: Mapping[str, NDArray[np.generic]]) -> dict[str, Tensor]:
        check_open(self._graphs)
        check_types(graph, self._types, inputs)
        return {name: torch.tensor(array, device=self._device) for name, array in inputs.items()}

    def _run(self, graph: str, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        try:
            return self._graphs[graph](inputs)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:  # what torch's operators raise
            raise EngineError(f"{PROGRAMS[graph]}: torch failed while running it ({error})") from error


class _Graph:
    """A program with its weights on a device."""

    def __init__(self, program: Program, device: str) -> None:
        self._program, self._device = program, device
        self._weights = {name: _weight(program, name).to(device) for name in program.weights}
        self._steps = [(_resolve(operation), operation) for operation in program.operations]
        # A tensor is let go after its last reader: the prefill of a large model would keep all layers' at once.
        last = {name: k for k, operation in enumerate(program.operations) for name in operation.names()}
        kept = {*program.outputs, *program.inputs, *program.weights}
        self._done = [
            [name for name in operation.names() if last[name] == k and name not in kept]
            for k, operation in enumerate(program.operations)
        ]

    def __call__(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        tensors = {**self._weights, **inputs}
        for (function, operation), done in zip(self._steps, self._done, strict=True):
            arguments = [self._value(tensors, value) for value in operation.arguments]
            options = {name: self._value(tensors, value) for name, value in operation.options.items()}
            result = function(*arguments, **options)
            if isinstance(operation.outputs, Name):
                tensors[operation.outputs] = result
            else:
                tensors.update(zip(operation.outputs, result, strict=True))
            for name in done:
                tensors.pop(name, None)
        return [tensors[name] for name in self._program.outputs]

    def _value(self, tensors: Mapping[str, Tensor], value: Any) -> Any:
        match value:
            case Name():
                return tensors[value]
            case Constant():
                return getattr(torch, value)
            case Device():
                return self._device
            case list():
                return [self._value(tensors, part) for part in value]
        return value


def _weight(program: Program, name: str) -> Tensor:
    weight = torch.from_numpy(program.read_weight(name))
    return weight.view(torch.bfloat16) if program.weights[name].dtype == "bfloat16" else weight


def _resolve(operation: Operation) -> Any:
    name, overload = operation.operator.split(".")  # one of pt2.OPERATORS
    return getattr(getattr(torch.ops.aten, name), overload)
