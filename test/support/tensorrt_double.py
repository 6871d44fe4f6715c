"""A CPU double of the GPU behind `TensorRTEngine`, for machines without one.

It does not prove that CUDA and TensorRT behave like this. It holds the engine to the rules in their documentation:

- work on a stream runs later: here as late as possible, when the host waits;
- memory is read only after something has written it, outputs and inputs of one launch do not overlap, and addresses are
  multiples of 256;
- pinned host memory must not change while a copy from it is under way;
- a recording neither waits nor allocates, a context runs once before it is recorded, and is of one live graph only.

Execution contexts run the bundle's ONNX graphs on onnxruntime with the bytes at the addresses that they were given.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import DTypeLike, NDArray

from ki_vla_ros.bundle.folder import EXPERT, PREFILL, Bundle, graph_interface
from ki_vla_ros.bundle.onnx_header import TensorType
from ki_vla_ros.engines.cuda import ALIGNMENT
from ki_vla_ros.engines.tensorrt_engine import LoadedPlans
from ki_vla_ros.errors import EngineError

_CODES = {"float32": "FLOAT", "bool": "BOOL", "int64": "INT64", "bfloat16": "BF16"}


@dataclass(eq=False)
class Work:
    """One entry of a stream. `addresses` by tensor name, for launches of a context."""

    what: str
    run: Callable[[], None]
    pinned: NDArray[Any] | None = None
    addresses: Mapping[str, int] = field(default_factory=dict)
    context: FakeContext | None = field(default=None, repr=False)


@dataclass(eq=False)
class Allocation:
    memory: NDArray[np.uint8]
    written: NDArray[np.bool_]


class FakeDevice:
    """`ki_vla_ros.engines.cuda.Device`; `events` records the order of its use."""

    name = "double of a GPU"
    compute_capability = "sm89"
    stream = 7

    def __init__(self) -> None:
        self.events: list[str] = []
        self.allocations: dict[int, Allocation] = {}
        self.graphs: dict[int, list[Work]] = {}
        self.fault = ""
        self.closed = False
        self.contexts: list[weakref.ref[FakeContext]] = []
        self._pinned: list[NDArray[Any]] = []
        self._queue: list[tuple[Work, bytes]] = []
        self._recording: list[Work] | None = None
        self._next_address, self._next_graph = 0x10000, 1

    # --- what the engine calls

    def allocate(self, size: int) -> int:
        assert self._recording is None, "an allocation would end the recording"
        assert size > 0
        self.events.append("allocate")
        address = self._next_address
        self._next_address += (size // ALIGNMENT + 2) * ALIGNMENT
        self.allocations[address] = Allocation(np.zeros(size, np.uint8), np.zeros(size, np.bool_))
        return address

    def free(self, address: int) -> None:
        assert not self._queue, "memory freed that queued work may use"
        for graph in self.graphs.values():
            assert all(address not in work.addresses.values() for work in graph), "memory freed that a graph uses"
        del self.allocations[address]

    def pin(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        self.events.append("pin")
        self._pinned.append(np.zeros(shape, dtype))
        return self._pinned[-1]

    def copy_in(self, address: int, pinned: NDArray[Any]) -> None:
        self._check_pinned(pinned)
        self._put(Work("copy in", lambda: self.write(address, pinned.tobytes()), pinned=pinned))

    def copy_out(self, pinned: NDArray[Any], address: int) -> None:
        self._check_pinned(pinned)

        def run() -> None:
            pinned[...] = np.frombuffer(self.read(address, pinned.nbytes), pinned.dtype).reshape(pinned.shape)

        self._put(Work("copy out", run))

    def record(self, work: Callable[[], None]) -> int:
        self.events.append("record")
        assert self._recording is None
        self._recording = []
        try:
            work()
            recorded = self._recording
        finally:
            self._recording = None
        graph, self._next_graph = self._next_graph, self._next_graph + 1
        self.graphs[graph] = recorded
        for entry in recorded:
            if entry.context is not None:
                entry.context.graph = graph
        return graph

    def launch(self, graph: int) -> None:
        assert self._recording is None
        self.events.append("launch")
        for work in self.graphs[graph]:
            self._put(work)

    def free_graph(self, graph: int) -> None:
        assert not self._queue, "a graph freed that may be running"
        del self.graphs[graph]

    def synchronize(self) -> None:
        assert self._recording is None, "a wait would end the recording"
        self.events.append("synchronize")
        queue, self._queue = self._queue, []
        for work, before in queue:
            if self.fault:
                raise EngineError(f"CUDA: cudaStreamSynchronize: expected success, got {self.fault}")
            if work.pinned is not None:
                assert work.pinned.tobytes() == before, "pinned memory written over while its copy is under way"
            work.run()

    def close(self) -> None:
        assert not self.closed
        self.closed = True
        self.allocations.clear()
        self.graphs.clear()
        self._queue.clear()
        assert not any(context() for context in self.contexts), "a context outlives its device"

    # --- what contexts and tests call

    def _put(self, work: Work) -> None:
        if self._recording is not None:
            self._recording.append(work)
        else:
            self._queue.append((work, b"" if work.pinned is None else work.pinned.tobytes()))

    def put_execution(self, context: FakeContext, addresses: Mapping[str, int], run: Callable[[], None]) -> None:
        if self._recording is not None:
            assert context.has_run, "a context recorded that has not run before"
        else:
            context.has_run = True
        assert context.graph not in self.graphs, "a context used beside the graph that it was captured in"
        self._put(Work("execute", run, addresses=addresses, context=context))

    def locate(self, address: int, size: int) -> tuple[Allocation, slice]:
        for start, allocation in self.allocations.items():
            if start <= address and address + size <= start + len(allocation.memory):
                return allocation, slice(address - start, address - start + size)
        raise AssertionError(f"{size} bytes at {address:#x} are not allocated")

    def write(self, address: int, content: bytes) -> None:
        allocation, where = self.locate(address, len(content))
        allocation.memory[where] = np.frombuffer(content, np.uint8)
        allocation.written[where] = True

    def read(self, address: int, size: int) -> bytes:
        allocation, where = self.locate(address, size)
        assert allocation.written[where].all(), f"read at {address:#x} of what nothing has written"
        return allocation.memory[where].tobytes()

    def _check_pinned(self, array: NDArray[Any]) -> None:
        assert any(array is pinned for pinned in self._pinned), "a copy of memory that is not pinned would wait"


class FakeEngine:
    """`tensorrt_library.CudaEngine` over an ONNX file that onnxruntime can run."""

    def __init__(
        self, device: FakeDevice, path: Path, inputs: Mapping[str, TensorType], outputs: Mapping[str, TensorType]
    ) -> None:
        self.device = device
        self.inputs, self.outputs = dict(inputs), dict(outputs)
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.locations: dict[str, str] = {}
        self.out_of_memory = False

    @property
    def _tensors(self) -> dict[str, TensorType]:
        return self.inputs | self.outputs

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return SimpleNamespace(name="INPUT" if name in self.inputs else "OUTPUT")

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=_CODES[self._tensors[name].dtype])

    def get_tensor_shape(self, name: str) -> Sequence[int]:
        return [int(n) for n in self._tensors[name].shape]

    def get_tensor_location(self, name: str) -> Any:
        return SimpleNamespace(name=self.locations.get(name, "DEVICE"))

    def create_execution_context(self) -> FakeContext | None:
        if self.out_of_memory:
            return None
        context = FakeContext(self)
        self.device.contexts.append(weakref.ref(context))
        return context


class FakeContext:
    """`tensorrt_library.ExecutionContext`."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.addresses: dict[str, int] = {}
        self.has_run = False
        self.graph = 0
        self.refuses = False

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self.engine._tensors:
            return False
        assert memory % ALIGNMENT == 0, f"{name}: {memory:#x} is not aligned to {ALIGNMENT}"
        self.engine.device.locate(memory, self._size(name))
        self.addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        device = self.engine.device
        assert stream_handle == device.stream
        assert self.addresses.keys() == self.engine._tensors.keys(), "not every tensor has an address"
        if self.refuses:
            return False
        addresses = dict(self.addresses)  # like TensorRT: later changes do not reach what is enqueued
        spans = {name: (at, at + self._size(name)) for name, at in addresses.items()}
        for output in self.engine.outputs:
            for other, (start, end) in spans.items():
                if other != output:
                    assert end <= spans[output][0] or spans[output][1] <= start, f"{output} overlaps {other}"

        def run() -> None:
            feed = {}
            for name, tensor in self.engine.inputs.items():
                content = device.read(addresses[name], self._size(name))
                feed[name] = np.frombuffer(content, tensor.dtype).reshape([int(n) for n in tensor.shape])
            names = list(self.engine.outputs)
            for name, value in zip(names, self.engine.session.run(names, feed), strict=True):
                device.write(addresses[name], np.ascontiguousarray(value).tobytes())

        device.put_execution(self, addresses, run)
        return True

    def _size(self, name: str) -> int:
        tensor = self.engine._tensors[name]
        return int(np.dtype(tensor.dtype).itemsize * np.prod([int(n) for n in tensor.shape]))


class FakeLog:
    def __init__(self) -> None:
        self.said = ""

    def take(self) -> str:
        taken, self.said = self.said, ""
        return taken or "it gave no reason"


def fake_plans(bundle: Bundle, device: FakeDevice) -> LoadedPlans:
    interface = graph_interface(bundle.manifest)
    engines = {graph: FakeEngine(device, bundle.path / graph, *interface[graph]) for graph in (PREFILL, EXPERT)}
    return LoadedPlans(engines, FakeLog(), "double of TensorRT")
