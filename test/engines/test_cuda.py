"""The real CUDA bindings, called as `CudaDevice` calls them, on a machine without a driver.

Each call reaches the real function, so names and arguments are checked; it answers that there is no driver, and that
answer is replaced by success and a made-up handle. What a GPU does with the calls is not tested here.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import cuda.bindings
import numpy as np
import pytest
from cuda.bindings import runtime

from ki_vla_ros.engines.cuda import CudaDevice
from ki_vla_ros.errors import EngineError

SUCCESS = runtime.cudaError_t.cudaSuccess
pytestmark = pytest.mark.skipif(
    runtime.cudaGetDeviceCount()[0] == SUCCESS, reason="there is a GPU, on which these made-up handles must not be used"
)


class Rehearsal(ModuleType):
    """`cuda.bindings.runtime` with its answers replaced; `calls` holds names and arguments."""

    def __init__(self) -> None:
        super().__init__("runtime")
        self.calls: list[tuple[Any, ...]] = []
        self.fails = ""
        self._host: list[Any] = []
        self._malloc = 0x1000
        self._results: dict[str, Callable[..., Any]] = {
            "cudaGetDeviceCount": lambda: 1,
            "cudaGetDeviceProperties": lambda _: SimpleNamespace(name=b"Orin"),
            "cudaDeviceGetAttribute": lambda attribute, _: 8 if "Major" in attribute.name else 7,
            "cudaStreamCreateWithFlags": lambda _: runtime.cudaStream_t(5),
            "cudaStreamEndCapture": lambda _: runtime.cudaGraph_t(6),
            "cudaGraphInstantiate": lambda *_: runtime.cudaGraphExec_t(7),
            "cudaMalloc": self._allocate,
            "cudaMallocHost": self._pin,
        }

    def __getattr__(self, name: str) -> Any:
        real = getattr(runtime, name)
        if name.startswith("cudaGetError") or not callable(real) or isinstance(real, type):
            return real

        def call(*arguments: Any) -> Any:
            answer = real(*arguments)
            assert answer[0] == runtime.cudaError_t.cudaErrorInsufficientDriver
            self.calls.append((name, *arguments))
            status = runtime.cudaError_t.cudaErrorIllegalAddress if name == self.fails else SUCCESS
            values = (self._results[name](*arguments),) if name in self._results else ()
            assert len(values) == len(answer) - 1, f"{name} gives {len(answer) - 1} values"
            return status, *values

        return call

    def _allocate(self, size: int) -> int:
        self._malloc += 0x1000
        return self._malloc

    def _pin(self, size: int) -> int:
        self._host.append(ctypes.create_string_buffer(b"\xff" * size, size))
        return ctypes.addressof(self._host[-1])

    def names(self) -> list[str]:
        return [name for name, *_ in self.calls]


@pytest.fixture
def rehearsal(monkeypatch: pytest.MonkeyPatch) -> Rehearsal:
    module = Rehearsal()
    monkeypatch.setattr(cuda.bindings, "runtime", module)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", module)
    return module


@pytest.fixture
def device(rehearsal: Rehearsal) -> CudaDevice:
    made = CudaDevice()
    rehearsal.calls.clear()
    return made


def test_the_device_describes_itself(rehearsal: Rehearsal) -> None:
    assert hasattr(runtime.cudaDeviceProp(), "name")
    device = CudaDevice()
    assert (device.name, device.compute_capability, device.stream) == ("Orin", "sm87", 5)
    assert ("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking) in rehearsal.calls


def test_pinned_arrays_use_the_locked_pages(device: CudaDevice, rehearsal: Rehearsal) -> None:
    for dtype, shape in (("float32", (2, 3)), ("bool", (5,)), ("int64", (4,))):
        array = device.pin(shape, dtype)
        assert array.dtype == dtype and array.shape == shape and not array.any()
        assert array.ctypes.data == ctypes.addressof(rehearsal._host[-1])
        array[...] = 1
        assert bytes(rehearsal._host[-1]) == array.tobytes()
    assert [arguments for _, *arguments in rehearsal.calls] == [[24], [5], [32]]


def test_copies_go_both_ways_on_the_stream(device: CudaDevice, rehearsal: Rehearsal) -> None:
    array, address = device.pin((4,), np.float32), device.allocate(16)
    rehearsal.calls.clear()
    device.copy_in(address, array)
    device.copy_out(array, address)
    host, kinds = array.ctypes.data, runtime.cudaMemcpyKind
    (_, *there), (_, *back) = rehearsal.calls
    assert rehearsal.names() == ["cudaMemcpyAsync"] * 2
    assert there[:4] == [address, host, 16, kinds.cudaMemcpyHostToDevice]
    assert back[:4] == [host, address, 16, kinds.cudaMemcpyDeviceToHost]
    assert int(there[4]) == int(back[4]) == device.stream


def test_a_recording_becomes_a_graph_that_can_be_launched(device: CudaDevice, rehearsal: Rehearsal) -> None:
    graph = device.record(lambda: rehearsal.calls.append(("work",)))
    device.launch(graph)
    device.free_graph(graph)
    assert rehearsal.names() == [
        "cudaStreamBeginCapture",
        "work",
        "cudaStreamEndCapture",
        "cudaGraphInstantiate",
        "cudaGraphDestroy",
        "cudaGraphUpload",
        "cudaGraphLaunch",
        "cudaGraphExecDestroy",
    ]
    assert rehearsal.calls[0][2] == runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    with pytest.raises(KeyError):
        device.launch(graph)


def test_a_recording_that_fails_ends(device: CudaDevice, rehearsal: Rehearsal) -> None:
    def refuse() -> None:
        raise EngineError("refused")

    with pytest.raises(EngineError, match="refused"):
        device.record(refuse)
    assert rehearsal.names() == ["cudaStreamBeginCapture", "cudaStreamEndCapture"]


def test_an_error_names_the_call_and_quotes_the_driver(device: CudaDevice, rehearsal: Rehearsal) -> None:
    rehearsal.fails = "cudaStreamSynchronize"
    with pytest.raises(
        EngineError,
        match=r"CUDA: cudaStreamSynchronize: expected success, got cudaErrorIllegalAddress \(an illegal memory",
    ):
        device.synchronize()


def test_everything_is_freed_once(device: CudaDevice, rehearsal: Rehearsal) -> None:
    kept, freed = device.allocate(16), device.allocate(32)
    device.free(freed)
    device.pin((4,), np.float32)
    device.record(lambda: None)
    rehearsal.calls.clear()
    rehearsal.fails = "cudaStreamSynchronize"  # a device that has failed: the rest is freed all the same
    device.close()
    device.close()
    assert rehearsal.names() == [
        "cudaStreamSynchronize",
        "cudaGraphExecDestroy",
        "cudaFree",
        "cudaFreeHost",
        "cudaStreamDestroy",
    ]
    assert rehearsal.calls[2][1] == kept


def test_without_a_gpu_the_error_quotes_the_driver() -> None:
    with pytest.raises(
        EngineError, match=r"expected an NVIDIA GPU and its driver, got cudaErrorInsufficientDriver \(CUDA"
    ):
        CudaDevice()


def test_a_driver_without_a_gpu_is_refused(rehearsal: Rehearsal) -> None:
    rehearsal._results["cudaGetDeviceCount"] = lambda: 0
    with pytest.raises(EngineError, match="expected an NVIDIA GPU and its driver, got 0 GPUs"):
        CudaDevice()


def test_missing_bindings_name_their_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cuda.bindings, "runtime")
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(EngineError, match="install the wheel cuda-bindings in the version of the driver's CUDA"):
        CudaDevice()
