"""The few CUDA calls that an engine needs, behind one interface: memory, one stream and graphs.

`Device` is what engines see; `CudaDevice` is the real one. Nothing here computes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ki_vla_ros.errors import EngineError

ALIGNMENT = 256  # bytes; cudaMalloc's alignment, which TensorRT requires of every address


class Device(Protocol):
    """One GPU with one stream. Addresses are plain integers; all copies and launches are asynchronous."""

    @property
    def name(self) -> str:
        """The GPU's product name."""
        ...

    @property
    def compute_capability(self) -> str:
        """Such as sm89."""
        ...

    @property
    def stream(self) -> int:
        """Handle of the stream on which everything runs; not the default stream, which cannot be captured."""
        ...

    def allocate(self, size: int) -> int:
        """Address of `size` bytes on the device, aligned to ALIGNMENT, freed by `free` or `close`."""
        ...

    def free(self, address: int) -> None: ...

    def pin(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """A zeroed array in page-locked host memory, which the device copies without waiting; valid until `close`."""
        ...

    def copy_in(self, address: int, pinned: NDArray[Any]) -> None:
        """Host to device. The array must stay as it is until the stream has passed this point."""
        ...

    def copy_out(self, pinned: NDArray[Any], address: int) -> None:
        """Device to host; to be read after `synchronize`."""
        ...

    def record(self, work: Callable[[], None]) -> int:
        """What `work` puts on the stream, recorded instead of run, as a graph that can be launched.

        `work` must neither allocate nor synchronise, and must have run once before, outside of a recording.
        """
        ...

    def launch(self, graph: int) -> None: ...

    def free_graph(self, graph: int) -> None: ...

    def synchronize(self) -> None:
        """Wait until the stream is idle; EngineError with the cause where something on it failed."""
        ...

    def close(self) -> None:
        """Wait, then free everything that was taken from this device."""
        ...


class CudaDevice:
    """Device 0 of this process (CUDA_VISIBLE_DEVICES chooses which); EngineError where there is none."""

    def __init__(self) -> None:
        try:
            from cuda.bindings import runtime
        except ModuleNotFoundError as error:
            raise EngineError(
                "CUDA: expected the Python module cuda.bindings, got none; install the wheel cuda-bindings in the "
                "version of the driver's CUDA (12.x on JetPack 6, 13.x on JetPack 7)"
            ) from error
        self._cuda = runtime
        self._addresses: set[int] = set()
        self._pinned: list[int] = []
        self._graphs: dict[int, Any] = {}
        status, count = runtime.cudaGetDeviceCount()
        if status != runtime.cudaError_t.cudaSuccess or count == 0:
            raise EngineError(
                f"CUDA: expected an NVIDIA GPU and its driver, got "
                f"{self._describe(status) if status else '0 GPUs'}; is "
                "the driver installed, and the GPU passed into the container?"
            )
        self._call("cudaSetDevice", 0)
        self.name = self._value("cudaGetDeviceProperties", 0).name.decode()
        attributes = runtime.cudaDeviceAttr
        major = self._value("cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMajor, 0)
        minor = self._value("cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMinor, 0)
        self.compute_capability = f"sm{major}{minor}"
        self._stream = self._value("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking)
        self.stream = int(self._stream)

    def allocate(self, size: int) -> int:
        address = int(self._value("cudaMalloc", size))
        self._addresses.add(address)
        return address

    def free(self, address: int) -> None:
        self._addresses.remove(address)
        self._call("cudaFree", address)

    def pin(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        address = int(self._value("cudaMallocHost", max(size, 1)))
        self._pinned.append(address)
        memory = (ctypes.c_ubyte * size).from_address(address)
        array: NDArray[Any] = np.ctypeslib.as_array(memory).view(dtype).reshape(shape)
        array.fill(0)
        return array

    def copy_in(self, address: int, pinned: NDArray[Any]) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, pinned.ctypes.data, pinned.nbytes, kind, self._stream)

    def copy_out(self, pinned: NDArray[Any], address: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", pinned.ctypes.data, address, pinned.nbytes, kind, self._stream)

    def record(self, work: Callable[[], None]) -> int:
        # Thread-local: other threads of a node may use CUDA meanwhile, and their calls must not break the capture.
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._stream, mode)
        try:
            work()
        except BaseException:
            self._cuda.cudaStreamEndCapture(self._stream)  # otherwise the stream would go on recording
            raise
        recorded = self._value("cudaStreamEndCapture", self._stream)
        graph = self._value("cudaGraphInstantiate", recorded, 0)
        self._call("cudaGraphDestroy", recorded)
        self._call("cudaGraphUpload", graph, self._stream)
        self._graphs[int(graph)] = graph
        return int(graph)

    def launch(self, graph: int) -> None:
        self._call("cudaGraphLaunch", self._graphs[graph], self._stream)

    def free_graph(self, graph: int) -> None:
        self._call("cudaGraphExecDestroy", self._graphs.pop(graph))

    def synchronize(self) -> None:
        self._call("cudaStreamSynchronize", self._stream)

    def close(self) -> None:
        """After an error on the device its memory is lost to this process: what cannot be freed is left."""
        cuda, stream = self._cuda, self._stream
        if stream is None:
            return
        self._stream = None
        cuda.cudaStreamSynchronize(stream)
        for graph in self._graphs.values():
            cuda.cudaGraphExecDestroy(graph)
        for address in self._addresses:
            cuda.cudaFree(address)
        for address in self._pinned:
            cuda.cudaFreeHost(address)
        cuda.cudaStreamDestroy(stream)
        self._graphs.clear()
        self._addresses.clear()
        self._pinned.clear()

    def _value(self, function: str, *arguments: object) -> Any:
        status, *values = getattr(self._cuda, function)(*arguments)
        if status != self._cuda.cudaError_t.cudaSuccess:
            raise EngineError(f"CUDA: {function}: expected success, got {self._describe(status)}")
        return values[0] if values else None

    def _call(self, function: str, *arguments: object) -> None:
        self._value(function, *arguments)

    def _describe(self, status: Any) -> str:
        _, text = self._cuda.cudaGetErrorString(status)
        return f"{status.name} ({text.decode()})"
