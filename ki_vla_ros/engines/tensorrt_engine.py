"""Both graphs on TensorRT or TensorRT for RTX: two CUDA graphs per chunk, and one wait for the device at its end.

All buffers are allocated at the start, and their addresses never change. The prefill writes keys, values and prefix
mask where the expert reads them. Each Euler step reads x_t at one address and writes x_next at another, and the next
step swaps the two; its row of the time table is an address in a table on the device. So a chunk is two CUDA graphs:
copies in and prefill; then small copies in, N steps, and the actions out.

Legend: H horizon, A action dim, S width of the state token, M modulation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
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
    step_times,
)
from ki_vla_ros.engines.cuda import ALIGNMENT, CudaDevice, Device
from ki_vla_ros.engines.plans import PlanCache
from ki_vla_ros.engines.tensorrt_builder import Say, check_gpu, dtype_name, find_or_build, gpu_of, plan_key
from ki_vla_ros.engines.tensorrt_library import CudaEngine, Library, LibraryName, Log, load_library
from ki_vla_ros.errors import EngineError
from ki_vla_ros.records import ModelInput

_BYTES = {"float32": 4, "bfloat16": 2, "int64": 8, "bool": 1}
_PREFILL_INPUTS = ("images", "image_mask", "tokens", "token_mask")
_STEP_INPUTS = ("x_t", "clean", "state")  # new for every chunk


@dataclass(frozen=True, eq=False)
class LoadedPlans:
    """Both graphs' engines, ready for contexts; `kept` are objects that must outlive them."""

    engines: Mapping[str, CudaEngine]
    log: Log
    description: str
    kept: list[object] = field(default_factory=list)


def open_tensorrt(bundle: Bundle, library: LibraryName, cache: PlanCache, say: Say) -> TensorRTEngine:
    """The engine on this machine's GPU; builds what the cache lacks, and announces that through `say`."""
    loaded = load_library(library)
    device = CudaDevice()
    try:
        return TensorRTEngine(bundle, load_plans(bundle, loaded, device, cache, say), device)
    except BaseException:
        device.close()
        raise


def load_plans(bundle: Bundle, library: Library, device: Device, cache: PlanCache, say: Say) -> LoadedPlans:
    gpu = gpu_of(device, library)
    check_gpu(library, gpu)  # before minutes of hashing and parsing
    log = library.new_log()
    runtime = library.new_runtime(log)
    engines = {}
    for graph in (PREFILL, EXPERT):
        key = plan_key(bundle, graph, library, gpu)
        engine = runtime.deserialize_cuda_engine(find_or_build(bundle, key, library, cache, say))
        if engine is None:
            raise EngineError(
                f"{cache.path(key)}: expected an engine that {library} loads on {device.name} "
                f"({device.compute_capability}), got none: {log.take()}"
            )
        engines[graph] = engine
    return LoadedPlans(engines, log, f"{library} on {device.name} ({device.compute_capability})", [runtime])


class TensorRTEngine:
    """One bundle on one device; the engine owns plans and device, and closes the device.

    `integrate` captures its CUDA graph again when the number of steps changes: that call takes longer.
    """

    def __init__(self, bundle: Bundle, plans: LoadedPlans, device: Device) -> None:
        self.description = plans.description
        self._device, self._plans = device, plans
        self._generation = 0
        self._prefill_pending = False
        self._failure = ""
        self._times = TimeTable(bundle.path / TIME, bundle.manifest.graph.modulation)
        interface = graph_interface(bundle.manifest)
        self._types = {name: tensor for sides in interface.values() for side in sides for name, tensor in side.items()}
        for graph, sides in interface.items():
            check_plan(graph, plans, *sides)
        self._at = {name: device.allocate(_size(tensor)) for name, tensor in self._types.items()}
        host_side = {*interface[PREFILL][0], *interface[EXPERT][0], "x_next", "velocity"} - set(interface[PREFILL][1])
        self._host = {
            name: device.pin(_shape(self._types[name]), self._types[name].dtype) for name in sorted(host_side)
        }
        self._row_stride = -(-_size(self._types["modulation"]) // ALIGNMENT) * ALIGNMENT  # rounded up
        self._table, self._table_rows, self._steps = 0, 0, 0
        # A context per CUDA graph: TensorRT allows a captured context no other use.
        self._contexts = {
            use: _Context(graph, plans, [*interface[graph][0], *interface[graph][1]])
            for use, graph in (("prefill", PREFILL), ("chunk", EXPERT), ("step", EXPERT))
        }
        self._graphs: dict[str, int] = {}
        # The order matters: keys and values are written by the prefill, `step` by `_prepare`.
        self._capture("prefill", self._enqueue_prefill)
        self._prepare(bundle.manifest.flow.steps)
        self._capture("step", self._enqueue_step)

    def prefill(self, model_input: ModelInput) -> KVCache:
        """Returns when the work is launched; a fault in it surfaces in the call that waits for the chunk."""
        self._check_usable()
        inputs = prefill_inputs(model_input)
        check_types(PREFILL, self._types, inputs)
        if self._prefill_pending:  # the device may still be copying what would be overwritten
            self._wait("prefill")
        self._generation += 1
        self._stage(inputs)
        self._prefill_pending = True
        self._device.launch(self._graphs["prefill"])
        return KVCache(self, self._generation)

    def velocity(
        self,
        cache: KVCache,
        state_W: NDArray[np.float32] | None,
        x_t_HA: NDArray[np.float32],
        time: float,
        clean_H: NDArray[np.bool_],
    ) -> NDArray[np.float32]:
        self._check_usable()
        check_cache(self, cache, self._generation)
        inputs = expert_inputs(self._types, state_W, x_t_HA, self._times[time], clean_H)
        check_types(EXPERT, self._types, inputs)
        self._stage({name: inputs[name] for name in (*_STEP_INPUTS, "modulation") if name in inputs})
        self._device.launch(self._graphs["step"])
        self._wait("prefill or expert step")
        return check_finite(self._host["velocity"].copy())

    def integrate(
        self,
        cache: KVCache,
        state_W: NDArray[np.float32] | None,
        x_t_HA: NDArray[np.float32],
        steps: int,
        clean_H: NDArray[np.bool_],
    ) -> NDArray[np.float32]:
        self._check_usable()
        check_cache(self, cache, self._generation)
        inputs = expert_inputs(self._types, state_W, x_t_HA, self._times[1.0], clean_H)
        check_types(EXPERT, self._types, inputs)
        if steps != self._steps:
            self._prepare(steps)
        self._stage({name: inputs[name] for name in _STEP_INPUTS if name in inputs})
        self._device.launch(self._graphs["chunk"])
        self._wait(f"prefill or {steps} expert steps")
        return check_finite(self._host["x_next"].copy(), "actions")

    def synchronize(self) -> None:
        """Wait for what was launched, for stopwatches: `prefill` returns before it is done."""
        self._check_usable()
        self._wait("prefill")

    def close(self) -> None:
        if not self._graphs:
            return
        self._graphs.clear()
        self._host.clear()
        with suppress(EngineError):  # from a device that has failed already
            self._device.synchronize()
        # Contexts before their engines, engines before the runtime, all before the device.
        self._contexts.clear()
        self._plans = LoadedPlans({}, self._plans.log, self.description)
        self._device.close()

    # What is captured. Nothing here may wait, allocate, or depend on values: it runs once, and is replayed.

    def _enqueue_prefill(self) -> None:
        for name in _PREFILL_INPUTS:
            self._device.copy_in(self._at[name], self._host[name])
        self._contexts["prefill"].enqueue(self._at, self._device.stream)

    def _enqueue_step(self) -> None:
        self._copy_step_inputs()
        self._device.copy_in(self._at["modulation"], self._host["modulation"])
        self._contexts["step"].enqueue(self._at, self._device.stream)
        self._device.copy_out(self._host["velocity"], self._at["velocity"])

    def _enqueue_chunk(self) -> None:
        self._copy_step_inputs()
        read, written = self._at["x_t"], self._at["x_next"]
        for k in range(self._steps):
            row = self._table + k * self._row_stride
            self._contexts["chunk"].enqueue(
                {**self._at, "modulation": row, "x_t": read, "x_next": written}, self._device.stream
            )
            read, written = written, read
        self._device.copy_out(self._host["x_next"], read)

    def _copy_step_inputs(self) -> None:
        for name in _STEP_INPUTS:
            if name in self._at:
                self._device.copy_in(self._at[name], self._host[name])

    def _prepare(self, steps: int) -> None:
        """Table of times and CUDA graph for `steps` steps."""
        if steps < 1:
            raise EngineError(f"steps: expected at least 1, got {steps}")
        self._wait("prefill")
        self._steps = 0  # until all of this has succeeded
        if (old := self._graphs.pop("chunk", None)) is not None:
            self._device.free_graph(old)
        if steps > self._table_rows:
            if self._table_rows:
                self._device.free(self._table)
            self._table_rows = 0
            self._table = self._device.allocate(steps * self._row_stride)
            self._table_rows = steps
        for k, row_M in enumerate(self._times.rows(step_times(steps))):
            np.copyto(self._host["modulation"], row_M)
            self._device.copy_in(self._table + k * self._row_stride, self._host["modulation"])
            self._wait("copy of the time table")  # before the next row overwrites the pinned array
        self._host["step"][0] = 1.0 / steps
        self._device.copy_in(self._at["step"], self._host["step"])
        self._steps = steps
        try:
            self._capture("chunk", self._enqueue_chunk)
        except BaseException:
            self._steps = 0
            raise

    def _capture(self, use: str, enqueue: Callable[[], None]) -> None:
        """Run once, so that kernels are loaded and memory is taken; then record the same."""
        enqueue()
        self._wait(f"first run of {use}")
        self._graphs[use] = self._device.record(enqueue)

    def _stage(self, inputs: Mapping[str, NDArray[Any]]) -> None:
        for name, array in inputs.items():
            np.copyto(self._host[name], array)

    def _wait(self, running: str) -> None:
        try:
            self._device.synchronize()
        except EngineError as error:
            # After a fault every CUDA call of this process fails, often with another message: keep the first.
            self._failure = f"{running}: failed on the device ({error}); {self.description}: {self._plans.log.take()}"
            raise EngineError(self._failure) from error
        finally:
            self._prefill_pending = False

    def _check_usable(self) -> None:
        check_open(self._graphs)
        if self._failure:
            raise EngineError(f"engine: expected a device that works, got one that failed before: {self._failure}")


class _Context:
    """An execution context, and the addresses bound to it."""

    def __init__(self, graph: str, plans: LoadedPlans, names: Sequence[str]) -> None:
        context = plans.engines[graph].create_execution_context()
        if context is None:
            raise EngineError(
                f"{graph}: expected a context to run it, got none: {plans.log.take()}; is the device's memory enough?"
            )
        self._graph, self._log, self._context = graph, plans.log, context
        self._bound = dict.fromkeys(names, 0)

    def enqueue(self, addresses: Mapping[str, int], stream: int) -> None:
        for name, bound in self._bound.items():
            if addresses[name] != bound:
                if not self._context.set_tensor_address(name, addresses[name]):
                    raise EngineError(f"{self._graph}: {name}: its address was refused: {self._log.take()}")
                self._bound[name] = addresses[name]
        if not self._context.execute_async_v3(stream):
            raise EngineError(f"{self._graph}: expected it to be enqueued, got a refusal: {self._log.take()}")


def check_plan(
    graph: str, plans: LoadedPlans, inputs: Mapping[str, TensorType], outputs: Mapping[str, TensorType]
) -> None:
    """EngineError if what the engine reports about itself is not what the manifest says."""
    engine = plans.engines[graph]
    got: dict[str, tuple[str, TensorType, str]] = {}
    for name in (engine.get_tensor_name(i) for i in range(engine.num_io_tensors)):
        tensor = TensorType(dtype_name(engine.get_tensor_dtype(name)), tuple(engine.get_tensor_shape(name)))
        got[name] = (engine.get_tensor_mode(name).name, tensor, engine.get_tensor_location(name).name)
    expected = {name: ("INPUT", tensor, "DEVICE") for name, tensor in inputs.items()}
    expected |= {name: ("OUTPUT", tensor, "DEVICE") for name, tensor in outputs.items()}
    for name in sorted(expected.keys() | got.keys()):
        if expected.get(name) != got.get(name):
            raise EngineError(
                f"{graph}: {name}: expected {_tell(expected.get(name))}, got {_tell(got.get(name))} in the engine of "
                f"{plans.description}; delete it from the engine cache and build again"
            )


def _tell(tensor: tuple[str, TensorType, str] | None) -> str:
    return "none" if tensor is None else f"{tensor[0].lower()} {tensor[1]} on the {tensor[2].lower()}"


def _size(tensor: TensorType) -> int:
    return _BYTES[tensor.dtype] * math.prod(_shape(tensor))


def _shape(tensor: TensorType) -> tuple[int, ...]:
    return tuple(int(n) for n in tensor.shape)  # no dimension of a bundle's graphs is free
