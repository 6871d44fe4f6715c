"""ONNX graph -> plan: parse, check against the manifest, build with progress, keep in the cache."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

from ki_vla_ros.bundle import Bundle, TensorType, graph_interface, read_header
from ki_vla_ros.console import Progress
from ki_vla_ros.engines.cuda import Device
from ki_vla_ros.engines.plans import PlanCache, PlanKey, PlanRecord, graph_sha256
from ki_vla_ros.engines.tensorrt_library import Builder, BuilderConfig, Library, Log, Named, Network, Tensor
from ki_vla_ros.errors import ConfigurationError, EngineError

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "BOOL": "bool",
    "INT32": "int32",
    "INT64": "int64",
}
# Largest resident size of builds by tensorrt_rtx 1.7.1 for sm89 without that GPU: 1.00 GB for 0.27 GB of bfloat16
# weights, 3.36 GB for 1.07 GB, 11.3 GB for 3.75 GB. `tensorrt` was not measured.
_BYTES_PER_WEIGHT_BYTE, _BYTES_ALONE = 3.0, 300_000_000

Say = Callable[[str], object]


@dataclass(frozen=True)
class BuildOptions:
    """`workspace_mb`: most scratch memory on the GPU that a kernel may ask for; None: all that is there."""

    workspace_mb: int | None = None
    check_memory: bool = True


def plan_key(bundle: Bundle, graph: str, library: Library, gpu: str) -> PlanKey:
    return PlanKey(
        graph=graph,
        graph_sha256=graph_sha256(bundle, graph),
        library=library.name,
        version=library.version,
        gpu=gpu,
    )


def gpu_of(device: Device, library: Library) -> str:
    """The GPU as plans are keyed by it.

    TensorRT chooses kernels by timing them, so its plans are for one product; those of TensorRT for RTX are for all
    GPUs of a compute capability.
    """
    if library.name == "tensorrt_rtx":
        return device.compute_capability
    return f"{device.compute_capability} {device.name}"


def dtype_name(dtype: Named) -> str:
    """The manifest's name for an element type of the library."""
    return _DTYPES.get(dtype.name, dtype.name)


def find_or_build(
    bundle: Bundle, key: PlanKey, library: Library, cache: PlanCache, say: Say, options: BuildOptions | None = None
) -> memoryview:
    """The plan for `key`, built if the cache has none; `say` announces a build and its end.

    EngineError for what cannot be built here, ConfigurationError for a cache that cannot be written.
    """
    if (plan := cache.read(key)) is not None:
        return plan
    with cache.locked():
        if (plan := cache.read(key)) is not None:  # another process has built it in the meantime
            return plan
        damaged = "a damaged engine" if cache.path(key).exists() else "no engine"
        others = cache.others(key)
        say(
            f"{key.graph}: {damaged} for {key.target} in {cache.folder}"
            f"{' (only for ' + ', '.join(others) + ')' if others else ''}; building it, which can take minutes"
        )
        start = time.monotonic()
        plan = build_plan(bundle, key, library, cache, options or BuildOptions(), say)
        seconds = time.monotonic() - start
        record = PlanRecord(
            **key.model_dump(),
            plan_sha256=sha256(plan).hexdigest(),
            size=len(plan),
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            build_s=round(seconds, 1),
        )
        path = cache.write(record, plan)
        say(f"{key.graph}: {len(plan) / 1e6:.1f} MB in {seconds:.1f} s -> {path}")
        return plan


def build_plan(
    bundle: Bundle, key: PlanKey, library: Library, cache: PlanCache, options: BuildOptions, say: Say
) -> memoryview:
    path = bundle.path / key.graph
    if options.check_memory:
        check_memory(path)
    log = library.new_log()
    builder = library.new_builder(log)
    network = parse(library, builder, log, path)
    check_network(path, library, network, *graph_interface(bundle.manifest)[key.graph])
    config = _configure(library, builder, log, key, options)
    timing = _attach_timings(library, config, cache, key)
    with Progress(say=say) as progress:
        monitor = _new_monitor(library, key.graph, progress)
        config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
    if monitor.interrupted:
        raise KeyboardInterrupt
    if plan is None:
        raise EngineError(f"{path}: {library} cannot build it for {key.gpu}: {log.take()}")
    if timing is not None:
        cache.write_timing(*timing())
    return memoryview(cast(Any, plan)).cast("B")


def parse(library: Library, builder: Builder, log: Log, path: Path) -> Network:
    """Parse by path, so that weight files beside it are found; EngineError lists every fault that the parser found."""
    network = library.new_network(builder)
    parser = library.new_parser(network, log)
    parsed = parser.parse_from_file(str(path))
    faults = [parser.get_error(i) for i in range(parser.num_errors)]
    if not parsed or faults:
        told = [f"node {e.node()} {e.node_operator()} {e.node_name()!r}: {e.desc()}" for e in faults] or [log.take()]
        int8 = any(e.node_operator() == "DynamicQuantizeLinear" for e in faults)
        remedy = " (a bundle with --dtype int8 is for onnxruntime on a CPU: export with another)" if int8 else ""
        raise EngineError(
            f"{path}: expected operators that {library} knows, got {len(told)} fault{'s' if len(told) > 1 else ''}"
            f"{remedy}:\n  " + "\n  ".join(told)
        )
    return network


def check_network(
    path: Path, library: Library, network: Network, inputs: dict[str, TensorType], outputs: dict[str, TensorType]
) -> None:
    """EngineError if the library's view of inputs and outputs differs from the manifest's."""
    for side, expected, got in (
        ("input", inputs, [network.get_input(i) for i in range(network.num_inputs)]),
        ("output", outputs, [network.get_output(i) for i in range(network.num_outputs)]),
    ):
        check_tensors(str(path), str(library), side, expected, got)


def check_tensors(
    where: str, library: str, side: str, expected: dict[str, TensorType], tensors: Iterable[Tensor]
) -> None:
    got = {tensor.name: TensorType(dtype_name(tensor.dtype), tuple(tensor.shape)) for tensor in tensors}
    for name in sorted(expected.keys() | got.keys()):
        if expected.get(name) != got.get(name):
            raise EngineError(
                f"{where}: {side} {name!r}: expected {expected.get(name, 'none')}, got {got.get(name, 'none')} from "
                f"{library}; export the bundle again, and build again"
            )


def check_memory(path: Path) -> None:
    """EngineError where a build of this graph would need more memory than this machine has free."""
    weights = path.stat().st_size + sum((path.parent / n).stat().st_size for n in read_header(path).external_files)
    needed = round(_BYTES_PER_WEIGHT_BYTE * weights) + _BYTES_ALONE
    available = _available_memory()
    if needed > available:
        raise EngineError(
            f"{path}: expected about {needed / 1e9:.1f} GB of free memory for a build with {weights / 1e9:.1f} GB of "
            f"weights, got {available / 1e9:.1f} GB (MemAvailable); close other programs, add swap, build it elsewhere "
            "with tensorrt_rtx and --compute, or try anyway with --no-memory-check"
        )


def _available_memory(meminfo: Path = Path("/proc/meminfo")) -> int:
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise EngineError(f"{meminfo}: expected a line MemAvailable, got none; build with --no-memory-check")


def check_gpu(library: Library, gpu: str) -> None:
    """ConfigurationError for a GPU that the library cannot build for; `tensorrt` builds for the one that is here."""
    known = library.compute_capabilities()
    if known and gpu not in known:
        raise ConfigurationError(
            f"compute capability: expected one that {library} builds for ({', '.join(known)}), got {gpu!r}; for "
            "another GPU build with tensorrt on the machine that has it"
        )


def _configure(library: Library, builder: Builder, log: Log, key: PlanKey, options: BuildOptions) -> BuilderConfig:
    config = builder.create_builder_config()
    known = library.compute_capabilities()
    if known:
        check_gpu(library, key.gpu)
        config.num_compute_capabilities = 1
        if not config.set_compute_capability(known[key.gpu], 0):
            raise EngineError(f"{library}: expected it to accept compute capability {key.gpu}, got: {log.take()}")
    if options.workspace_mb is not None:
        config.set_memory_pool_limit(library.module.MemoryPoolType.WORKSPACE, options.workspace_mb << 20)
    return config


def _attach_timings(
    library: Library, config: BuilderConfig, cache: PlanCache, key: PlanKey
) -> Callable[[], tuple[Path, memoryview]] | None:
    """Give the build the kernel timings of earlier ones; the result yields the updated timings and where to save them.

    None for TensorRT for RTX, which measures nothing while it builds.
    """
    if library.name == "tensorrt_rtx":
        return None
    path = cache.timing_path(key.library, key.version, key.gpu)
    earlier = b""
    with suppress(FileNotFoundError):
        earlier = path.read_bytes()
    timings = config.create_timing_cache(earlier)
    if not config.set_timing_cache(timings, False):  # damaged, or of another driver: measured anew
        timings = config.create_timing_cache(b"")
        config.set_timing_cache(timings, False)
    return lambda: (path, memoryview(cast(Any, timings.serialize())).cast("B"))


class BuildPhases:
    """How far a build is, computed from its nested phases; called from the library's threads."""

    def __init__(self, name: str, progress: Progress) -> None:
        self.interrupted = False
        self._name, self._progress = name, progress
        self._phases: list[list[Any]] = []  # name, steps, steps done; outermost first
        self._lock = threading.Lock()

    def start(self, name: str, steps: int) -> None:
        with self._lock:
            self._phases.append([name, max(steps, 1), 0])

    def step(self, name: str, step: int) -> bool:
        """False ends the build: Ctrl-C arrives here, since the builder holds the main thread."""
        try:
            with self._lock:
                for phase in self._phases:
                    if phase[0] == name:
                        phase[2] = step + 1
                self._show()
        except KeyboardInterrupt:
            self.interrupted = True
        return not self.interrupted

    def finish(self, name: str) -> None:
        with self._lock:
            self._phases = [phase for phase in self._phases if phase[0] != name]

    def _show(self) -> None:
        done, width = 0.0, 1.0  # each phase fills one step of the phase around it
        for _, steps, completed in self._phases:
            done += width * min(completed, steps) / steps
            width /= steps
        self._progress.show(f"{self._name}: {int(100 * done)} % built, {self._phases[-1][0]:.40}", done)


def _new_monitor(library: Library, graph: str, progress: Progress) -> Any:
    """`BuildPhases` that the library accepts for its IProgressMonitor."""
    base = library.module.IProgressMonitor

    class Monitor(base, BuildPhases):  # type: ignore[misc,valid-type]
        def __init__(self) -> None:
            base.__init__(self)
            BuildPhases.__init__(self, graph, progress)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.start(phase_name, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return self.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            self.finish(phase_name)

    return Monitor()
