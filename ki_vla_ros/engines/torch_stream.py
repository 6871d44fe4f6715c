"""Where the torch engine's graphs run: their input buffers, upload, download, and capture.

Only `CudaStream` knows CUDA: work is queued in order on one stream; `download` and `synchronize` wait for it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ki_vla_ros.bundle import TensorType

GraphCall = Callable[[], list[Tensor]]
WARM_UP = 2  # runs before a capture: libraries allocate their workspaces in the first, and none may while capturing


class TorchStream(Protocol):
    def allocate(self, name: str, tensor: TensorType) -> Tensor:
        """A buffer for the input `name`, at an address that stays."""
        ...

    def active(self) -> AbstractContextManager[object]:
        """A context in which torch's calls run here."""
        ...

    def upload(self, name: str, array: NDArray[np.generic]) -> None:
        """Copy into the input `name`; the caller may change the array at once."""
        ...

    def download(self, tensor: Tensor) -> NDArray[np.float32]:
        """Wait for everything so far; the caller may keep the result."""
        ...

    def synchronize(self) -> None:
        """Wait for everything so far."""
        ...

    def capture(self, work: GraphCall) -> GraphCall:
        """A call that can be repeated without Python: it reads and writes the same addresses every time."""
        ...


class HostStream:
    """On the CPU, where calls return when they are done and there is nothing to capture."""

    def __init__(self) -> None:
        self._inputs: dict[str, Tensor] = {}

    def allocate(self, name: str, tensor: TensorType) -> Tensor:
        self._inputs[name] = _zeros(tensor)
        return self._inputs[name]

    def active(self) -> AbstractContextManager[object]:
        return nullcontext()

    def upload(self, name: str, array: NDArray[np.generic]) -> None:
        np.copyto(self._inputs[name].numpy(), array)

    def download(self, tensor: Tensor) -> NDArray[np.float32]:
        return np.array(tensor.numpy())

    def synchronize(self) -> None: ...

    def capture(self, work: GraphCall) -> GraphCall:
        return work


class CudaStream:
    """On the current NVIDIA card. Written against torch's documented API; it was not run: no card was at hand."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream()
        self._inputs: dict[str, tuple[Tensor, Tensor, torch.cuda.Event]] = {}
        self._output: Tensor | None = None

    def allocate(self, name: str, tensor: TensorType) -> Tensor:
        host = _zeros(tensor)
        self._inputs[name] = host.to(self._device), host.pin_memory(), torch.cuda.Event()
        return self._inputs[name][0]

    def active(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)

    def upload(self, name: str, array: NDArray[np.generic]) -> None:
        buffer, pinned, copied = self._inputs[name]
        copied.synchronize()  # of the call before: long done, unless two prefills come without a chunk between them
        np.copyto(pinned.numpy(), array)
        buffer.copy_(pinned, non_blocking=True)
        copied.record(self._stream)

    def download(self, tensor: Tensor) -> NDArray[np.float32]:
        if self._output is None or self._output.shape != tensor.shape:
            self._output = torch.empty(tensor.shape, dtype=tensor.dtype).pin_memory()
        self._output.copy_(tensor, non_blocking=True)
        self._stream.synchronize()
        return np.array(self._output.numpy())

    def synchronize(self) -> None:
        self._stream.synchronize()

    def capture(self, work: GraphCall) -> GraphCall:
        for _ in range(WARM_UP):
            work()
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads of the node may use the card meanwhile. No shared memory pool: one
        # graph must not overwrite what another leaves behind.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            outputs = work()

        def replay() -> list[Tensor]:
            graph.replay()
            return outputs

        return replay


def _zeros(tensor: TensorType) -> Tensor:
    return torch.from_numpy(np.zeros([int(size) for size in tensor.shape], dtype=tensor.dtype))
