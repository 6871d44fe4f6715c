"""TensorRT (`tensorrt`) and TensorRT for RTX (`tensorrt_rtx`): finding a version that is new enough, and its calls.

Both modules have one API, without type stubs. The protocols below are the part of it that this package calls;
test_tensorrt_library.py checks them against the installed module, name by name and argument by argument.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ki_vla_ros.errors import EngineError

LibraryName = Literal["tensorrt", "tensorrt_rtx"]
# Both have strongly typed networks with bfloat16 and int64 inputs: what JetPack 6 brings, and the RTX release whose
# builds time nothing.
OLDEST: dict[LibraryName, tuple[int, int]] = {"tensorrt": (10, 3), "tensorrt_rtx": (1, 2)}
_INSTALL: dict[LibraryName, str] = {
    "tensorrt": "on a Jetson install JetPack's package python3-libnvinfer (JetPack 6 or newer), elsewhere the wheel "
    "tensorrt for the CUDA version of the driver",
    "tensorrt_rtx": "install the wheel tensorrt-rtx-cu13",
}


class Named(Protocol):
    """A value of one of the library's enumerations."""

    @property
    def name(self) -> str: ...


class Tensor(Protocol):
    """ITensor: an input or output of a parsed network."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> Named: ...
    @property
    def shape(self) -> Sequence[int]: ...


class ExecutionContext(Protocol):
    """IExecutionContext."""

    def set_tensor_address(self, name: str, memory: int) -> bool: ...
    def execute_async_v3(self, stream_handle: int) -> bool: ...


class CudaEngine(Protocol):
    """ICudaEngine."""

    @property
    def num_io_tensors(self) -> int: ...
    def get_tensor_name(self, index: int) -> str: ...
    def get_tensor_mode(self, name: str) -> Named: ...
    def get_tensor_dtype(self, name: str) -> Named: ...
    def get_tensor_shape(self, name: str) -> Sequence[int]: ...
    def get_tensor_location(self, name: str) -> Named: ...
    def create_execution_context(self) -> ExecutionContext | None: ...


class Runtime(Protocol):
    def deserialize_cuda_engine(self, serialized_engine: memoryview) -> CudaEngine | None: ...


class HostMemory(Protocol):
    """IHostMemory; it also has Python's buffer protocol."""

    @property
    def nbytes(self) -> int: ...


class TimingCache(Protocol):
    def serialize(self) -> HostMemory: ...


class BuilderConfig(Protocol):
    """IBuilderConfig; compute capabilities are in TensorRT for RTX alone."""

    progress_monitor: object
    num_compute_capabilities: int

    def set_compute_capability(self, compute_capability: Any, index: int) -> bool: ...
    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None: ...
    def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache: ...
    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool: ...


class Network(Protocol):
    """INetworkDefinition."""

    @property
    def num_inputs(self) -> int: ...
    @property
    def num_outputs(self) -> int: ...
    def get_input(self, index: int) -> Tensor: ...
    def get_output(self, index: int) -> Tensor: ...


class Builder(Protocol):
    def create_network(self, flags: int) -> Network: ...
    def create_builder_config(self) -> BuilderConfig: ...
    def build_serialized_network(self, network: Network, config: BuilderConfig) -> HostMemory | None: ...


class ParserError(Protocol):
    def desc(self) -> str: ...
    def node(self) -> int: ...
    def node_name(self) -> str: ...
    def node_operator(self) -> str: ...


class Parser(Protocol):
    """OnnxParser."""

    @property
    def num_errors(self) -> int: ...
    def parse_from_file(self, model: str) -> bool: ...
    def get_error(self, index: int) -> ParserError: ...


class Log(Protocol):
    """What the library has said since `take` was last called; its errors hold the cause of a refusal."""

    def take(self) -> str: ...


@dataclass(frozen=True, eq=False)
class Library:
    """One of the two modules, imported and new enough."""

    name: LibraryName
    module: Any

    @property
    def version(self) -> str:
        return str(self.module.__version__)

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    def new_log(self) -> Log:
        """A log, which must outlive whatever is made with it."""
        base, severity = self.module.ILogger, self.module.ILogger.Severity

        class Collected(base):  # type: ignore[misc,valid-type]
            def __init__(self) -> None:
                base.__init__(self)
                self._errors: list[str] = []

            def log(self, level: Any, message: str) -> None:
                if level in (severity.ERROR, severity.INTERNAL_ERROR):
                    self._errors.append(message.strip())

            def take(self) -> str:
                taken, self._errors = self._errors, []
                return "; ".join(taken) or "it gave no reason"

        collected: Log = Collected()
        return collected

    def new_builder(self, log: Log) -> Builder:
        builder: Builder = self.module.Builder(log)
        return builder

    def new_network(self, builder: Builder) -> Network:
        """A strongly typed network: the graph says the precision. 10.x needs a flag for that, 11.x has nothing else."""
        flag = getattr(self.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        return builder.create_network(0 if flag is None else 1 << int(flag))

    def new_parser(self, network: Network, log: Log) -> Parser:
        parser: Parser = self.module.OnnxParser(network, log)
        return parser

    def new_runtime(self, log: Log) -> Runtime:
        runtime: Runtime = self.module.Runtime(log)
        return runtime

    def compute_capabilities(self) -> dict[str, object]:
        """What it can build for without such a GPU, by names such as sm89; empty for `tensorrt`."""
        members = getattr(getattr(self.module, "ComputeCapability", None), "__members__", {})
        return {name.lower(): value for name, value in members.items() if re.fullmatch(r"SM\d+", name)}


def load_library(name: LibraryName) -> Library:
    """Import the library; EngineError if its module is missing, broken or too old."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise EngineError(f"{name}: expected the Python module {error.name}, got none; {_INSTALL[name]}") from error
    except (ImportError, OSError, RuntimeError) as error:  # a wheel without its shared libraries
        raise EngineError(f"{name}: expected a module that loads, got {error}; {_INSTALL[name]}") from error
    version = str(getattr(module, "__version__", "none"))
    oldest = OLDEST[name]
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < oldest:
        raise EngineError(
            f"{name}: expected version {oldest[0]}.{oldest[1]} or newer, got {version} ({module.__file__}); "
            f"{_INSTALL[name]}"
        )
    return Library(name, module)
