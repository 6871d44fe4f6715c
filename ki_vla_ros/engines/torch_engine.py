"""Both graphs on torch, with a backward pass through the expert; needs a bundle exported with `--torch`.

It is for parity with the model, for real-time chunking with the true Jacobian (policy/policy.py), and for speed on
NVIDIA cards without TensorRT: as CUDA graphs, compiled, or both. It runs the operations of the .pt2 files, and no model
code.

Legend: H horizon, A action dim, S width of the state token, M modulation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ki_vla_ros.bundle import EXPERT, PREFILL, PROGRAMS, TIME, Bundle, TimeTable, graph_interface, read_program
from ki_vla_ros.engines.base import (
    KVCache,
    check_cache,
    check_finite,
    check_open,
    check_types,
    expert_inputs,
    prefill_inputs,
    step_times,
)
from ki_vla_ros.engines.torch_program import Interpreter, ProgramCall, compile_program
from ki_vla_ros.engines.torch_stream import CudaStream, GraphCall, HostStream, TorchStream
from ki_vla_ros.errors import EngineError
from ki_vla_ros.records import ModelInput
from ki_vla_ros.settings import TorchModeName

VELOCITY, LOOP = "velocity", "loop"  # captured besides the prefill: one step, and all steps of a chunk
CACHE = ("keys", "values", "prefix_mask")


class TorchEngine:
    """One bundle on one device, "cpu" or "cuda"; EngineError where this machine or the bundle lacks what it needs.

    `mode`: see settings.torch_mode. `threads` applies to all of torch in this process, which has no setting per model.
    In tests `stream` stands in for the device's own.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: str = "cpu",
        threads: int = 1,
        mode: TorchModeName = "auto",
        stream: TorchStream | None = None,
    ) -> None:
        if device not in ("cpu", "cuda"):
            raise EngineError(f"torch device: expected 'cpu' or 'cuda', got {device!r}")
        if device == "cuda" and not torch.cuda.is_available():
            raise EngineError(
                f"torch device: expected cuda, got torch {torch.__version__} without a usable NVIDIA card; install the "
                "wheel torch for the CUDA version of the driver, or set provider to cpu"
            )
        if mode == "auto":
            mode = "eager" if device == "cpu" else "graph"
        self._captures, compiles = mode in ("graph", "compile_graph"), mode in ("compile", "compile_graph")
        if self._captures and device == "cpu" and stream is None:
            raise EngineError(
                f"torch_mode {mode}: expected provider cuda, since a CUDA graph runs only on an NVIDIA card, got cpu; "
                "set torch_mode to eager or compile, or provider to cuda"
            )
        missing = [name for name in PROGRAMS.values() if name not in bundle.manifest.files]
        if missing:
            raise EngineError(
                f"{bundle.path}: expected {missing[0]} for the torch engine, got a bundle without it; export it with "
                "python -m training.export --torch, or set engine to onnx"
            )
        torch.set_num_threads(threads)
        plural = "s" if threads != 1 else ""
        self.description = f"torch {torch.__version__}, {device}, {mode}, {threads} thread{plural}"
        self._generation = 0
        self._vocab_size = bundle.manifest.graph.vocab_size
        interface = graph_interface(bundle.manifest)
        self._types = {name: tensor for sides in interface.values() for side in sides for name, tensor in side.items()}
        self._times = TimeTable(bundle.path / TIME, bundle.manifest.graph.modulation)
        on = torch.device(device)
        programs = {name: Interpreter(read_program(bundle.path / file), on) for name, file in PROGRAMS.items()}
        self._differentiable: ProgramCall = programs[EXPERT]
        self._graphs = {name: compile_program(program) if compiles else program for name, program in programs.items()}
        self._device = on
        self._stream: TorchStream = stream or (HostStream() if device == "cpu" else CudaStream(on))
        self._inputs = {
            name: self._stream.allocate(name, tensor)
            for inputs, _ in interface.values()
            for name, tensor in inputs.items()
            if name not in CACHE
        }
        self._captured: dict[str, GraphCall] = {}
        self._steps = 0
        self._rows: list[Tensor] = []
        self.prefix: dict[str, Tensor] = {}
        """Keys, values and prefix mask of the newest prefill, on the device."""

    def prefill(self, model_input: ModelInput) -> KVCache:
        self._generation += 1
        with self._running(PREFILL):
            self._upload(PREFILL, prefill_inputs(model_input))
            outputs = self._repeat(PREFILL, lambda: self._graphs[PREFILL](self._inputs))
            self.prefix = dict(zip(CACHE, outputs, strict=True))
        return KVCache(self, self._generation)

    def velocity(
        self,
        cache: KVCache,
        state_W: NDArray[np.float32] | None,
        x_t_HA: NDArray[np.float32],
        time: float,
        clean_H: NDArray[np.bool_],
    ) -> NDArray[np.float32]:
        with self._running(EXPERT, cache):
            self._upload(EXPERT, expert_inputs(self._types, state_W, x_t_HA, self._times[time], clean_H))
            velocity_HA, _ = self._repeat(VELOCITY, lambda: self._graphs[EXPERT](self._inputs | self.prefix))
            return check_finite(self._stream.download(velocity_HA))

    def integrate(
        self,
        cache: KVCache,
        state_W: NDArray[np.float32] | None,
        x_t_HA: NDArray[np.float32],
        steps: int,
        clean_H: NDArray[np.bool_],
    ) -> NDArray[np.float32]:
        with self._running(EXPERT, cache):
            rows_NM = self._times.rows(step_times(steps))
            inputs = expert_inputs(self._types, state_W, x_t_HA, rows_NM[0], clean_H, 1.0 / steps)
            del inputs["modulation"]  # the rows are on the device already
            self._upload(EXPERT, inputs)
            if steps != self._steps:
                self._captured.pop(LOOP, None)
                # One tensor each: a row of a larger one may not have the alignment that compiled kernels want.
                self._rows = [torch.tensor(row_M, device=self._device) for row_M in rows_NM]
                self._steps = steps
            (x_0_HA,) = self._repeat(LOOP, self._take_all_steps)
            return check_finite(self._stream.download(x_0_HA), "actions")

    def pullback(
        self,
        cache: KVCache,
        state_W: NDArray[np.float32] | None,
        x_t_HA: NDArray[np.float32],
        time: float,
        clean_H: NDArray[np.bool_],
        vector_HA: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """Runs operation by operation in every mode: a captured or compiled forward pass has no backward pass."""
        with self._running(EXPERT, cache):
            check_types(EXPERT, {"vector": self._types["x_t"]}, {"vector": vector_HA})
            self._upload(EXPERT, expert_inputs(self._types, state_W, x_t_HA, self._times[time], clean_H))
            with torch.enable_grad():
                x_t = self._inputs["x_t"].clone().requires_grad_()
                velocity_HA, _ = self._differentiable(self._inputs | self.prefix | {"x_t": x_t})
                (pulled_HA,) = torch.autograd.grad(velocity_HA, x_t, torch.tensor(vector_HA, device=self._device))
            return check_finite(self._stream.download(pulled_HA), "pullbacks")

    def synchronize(self) -> None:
        """Wait for what was launched, for stopwatches: on a card `prefill` returns before it is done."""
        with self._running(PREFILL):
            self._stream.synchronize()

    def close(self) -> None:
        for held in (self._captured, self._graphs, self._inputs, self._rows, self.prefix):
            held.clear()

    def _take_all_steps(self) -> list[Tensor]:
        inputs = self._inputs | self.prefix
        for row_M in self._rows:
            _, inputs["x_t"] = self._graphs[EXPERT](inputs | {"modulation": row_M})
        return [inputs["x_t"]]

    def _repeat(self, name: str, work: GraphCall) -> list[Tensor]:
        if not self._captures:
            return work()
        if name not in self._captured:
            self._captured[name] = self._stream.capture(work)
        return self._captured[name]()

    def _upload(self, graph: str, inputs: Mapping[str, NDArray[np.generic]]) -> None:
        check_types(graph, self._types, inputs)
        # On a card, an index beyond the table would make every later CUDA call of the process fail.
        tokens = inputs.get("tokens", np.zeros(1))
        if tokens.min() < 0 or tokens.max() >= self._vocab_size:
            raise EngineError(
                f"{graph}: tokens: expected 0 to {self._vocab_size - 1}, got {tokens.min()} to {tokens.max()}"
            )
        for name, array in inputs.items():
            self._stream.upload(name, array)

    @contextmanager
    def _running(self, graph: str, cache: KVCache | None = None) -> Iterator[None]:
        check_open(self._graphs)
        if cache is not None:
            check_cache(self, cache, self._generation)
        try:
            with self._stream.active(), torch.no_grad():
                yield
        except (IndexError, RuntimeError, TypeError, ValueError) as error:  # what torch's operators raise
            raise EngineError(f"{PROGRAMS[graph]}: torch failed while running it ({error})") from error
