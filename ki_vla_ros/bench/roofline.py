"""The least time that a device needs for a graph: its operations at the device's peak, or its bytes at the bandwidth,
whichever takes longer (Williams, Waterman and Patterson 2009).

Peak and bandwidth are measured on this machine: the fastest of the matrix products that are installed, and reading an
array as large as what the graph reads, again and again, so that a graph that fits a cache is judged by that cache. On a
card without a library that could measure it, they are the maker's figures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.errors import EngineError

Clock = Callable[[], float]
Matrix = NDArray[np.float32]
SIDE = 2048  # of the square matrices whose product is timed on a CPU
REPEATS = 7  # the fastest counts: a peak is what the device can do, not what it did on average
SMALLEST_READ, LONG_READ = 1 << 16, 1 << 26
MEASURING_LIMIT_S = 300.0

PUBLISHED: dict[str, tuple[float, float, float, str]] = {
    # name as the driver gives it: TFLOP/s in bfloat16 and float32 (dense, float32 sums), GB/s, source
    "H200": (989.4, 66.9, 4800.0, "NVIDIA H200 data sheet"),
    "H100 80GB HBM3": (989.4, 66.9, 3350.0, "NVIDIA H100 data sheet, SXM"),
    "A100-SXM4-80GB": (312.0, 19.5, 2039.0, "NVIDIA A100 data sheet"),
    "L4": (121.0, 30.3, 300.0, "NVIDIA L4 data sheet, without sparsity"),
    "GeForce RTX 5090": (209.5, 104.8, 1792.0, "NVIDIA RTX Blackwell architecture paper"),
    "GeForce RTX 4090": (165.2, 82.6, 1008.0, "NVIDIA Ada architecture paper"),
    "GeForce RTX 3090": (71.0, 35.6, 936.0, "NVIDIA Ampere GA102 architecture paper"),
}


@dataclass(frozen=True)
class Work:
    """What one run of a graph cannot do without: operations, and bytes read or written (weights, keys and values)."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Ceiling:
    """What a device can do at most: FLOP/s, bytes/s by the size that is read, and how that is known."""

    flops_per_s: float
    bytes_per_s: Mapping[int, float]
    source: str

    def least_ms(self, work: Work) -> float:
        return max(self.times_ms(work).values())

    def bound(self, work: Work) -> str:
        """What decides: "compute" or "bytes"."""
        times_ms = self.times_ms(work)
        return max(times_ms, key=times_ms.__getitem__)

    def times_ms(self, work: Work) -> dict[str, float]:
        nearest = min(self.bytes_per_s, key=lambda size: abs(size - work.bytes))
        return {
            "compute": 1e3 * work.flops / self.flops_per_s,
            "bytes": 1e3 * work.bytes / self.bytes_per_s[nearest],
        }


def measure_ceiling(provider: str, threads: int, dtype: str, sizes: Sequence[int]) -> Ceiling:
    """Of this machine, for what an engine may use of it. EngineError where nothing is known about its card."""
    if provider == "cpu":
        return _measure_cpu(threads, sizes)
    try:
        import torch
    except ModuleNotFoundError:
        return _published(_card_name(), dtype)
    if not torch.cuda.is_available():
        return _published(_card_name(), dtype)
    return _measure_cuda(torch, dtype, sizes)


def _measure_cpu(threads: int, sizes: Sequence[int]) -> Ceiling:
    """In a process of its own: numpy's library reads its number of threads when it is loaded, and only then."""
    names = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
    environment = os.environ | {name: str(threads) for name in names}
    command = [
        sys.executable,
        "-m",
        "ki_vla_ros.bench.roofline",
        "--threads",
        str(threads),
        "--sizes",
        *map(str, sizes),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=MEASURING_LIMIT_S)
    if done.returncode != 0:
        raise EngineError(f"roofline: expected figures of this processor, got {done.stderr.strip()[-500:]!r}")
    found = json.loads(done.stdout)
    products = {name: value for name, value in found["flops_per_s"].items() if value is not None}
    fastest = max(products, key=products.__getitem__)
    return Ceiling(
        products[fastest],
        {int(size): value for size, value in found["bytes_per_s"].items()},
        f"measured: float32 product of {SIDE} x {SIDE} matrices by {fastest}, reading; {threads} thread(s)",
    )


def cpu_figures(threads: int, sizes: Sequence[int]) -> dict[str, Any]:
    """FLOP/s by library (None: not installed) and bytes/s by size, of this process's settings."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((SIDE, SIDE), dtype=np.float32) for _ in range(2))
    flops = 2.0 * SIDE**3
    # One thread's own time does not count what others do on the machine meanwhile; times of several would add up.
    clock_s = time.process_time if threads == 1 else time.perf_counter
    product_s = {"numpy": _fastest_s(lambda: a @ b, clock_s), "onnxruntime": _onnx_product_s(a, b, threads, clock_s)}
    with ThreadPoolExecutor(threads) as pool:
        bytes_per_s = {size: _read_rate(pool, threads, max(size, SMALLEST_READ), clock_s) for size in sizes}
    return {
        "flops_per_s": {name: None if s is None else flops / s for name, s in product_s.items()},
        "bytes_per_s": bytes_per_s,
    }


def _read_rate(pool: ThreadPoolExecutor, threads: int, size: int, clock_s: Clock) -> float:
    """Bytes per second of all threads together, each at its part of one array."""
    parts = np.array_split(np.ones(size // 8, dtype=np.int64), threads)
    # Small arrays are read many times per task, or handing out the tasks would be what is timed.
    times = max(1, LONG_READ // size)
    taken_s = _fastest_s(lambda: list(pool.map(_read, parts, [times] * threads)), clock_s)
    return sum(part.nbytes for part in parts) * times / taken_s


def _read(part: np.ndarray[Any, Any], times: int) -> None:
    for _ in range(times):
        np.bitwise_or.reduce(part)  # without the interpreter's lock, and faster than memory


def _fastest_s(call: Callable[[], object], clock_s: Clock) -> float:
    taken_s = []
    for _ in range(REPEATS + 1):
        began_s = clock_s()
        call()
        taken_s.append(clock_s() - began_s)
    return min(taken_s[1:])


def _onnx_product_s(a: Matrix, b: Matrix, threads: int, clock_s: Clock) -> float | None:
    try:
        import onnxruntime as ort
    except ModuleNotFoundError:
        return None
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = ort.InferenceSession(product_model(SIDE), options, providers=["CPUExecutionProvider"])
    return _fastest_s(lambda: session.run(None, {"a": a, "b": b}), clock_s)


def product_model(side: int) -> bytes:
    """An ONNX file with one matrix product c = a b in float32, written by hand: a robot has no `onnx` package."""
    shape = _part(2, _part(1, _number(1, side)) * 2)
    tensor_type = _part(2, _part(1, _number(1, 1) + shape))
    node = _part(1, b"a") + _part(1, b"b") + _part(2, b"c") + _part(4, b"MatMul")
    graph = _part(1, node) + _part(2, b"product")
    graph += b"".join(_part(11, _part(1, name) + tensor_type) for name in (b"a", b"b"))
    graph += _part(12, _part(1, b"c") + tensor_type)
    return _number(1, 8) + _part(7, graph) + _part(8, _number(2, 17))


def _varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _part(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _measure_cuda(torch: Any, dtype: str, sizes: Sequence[int]) -> Ceiling:
    side = 8192
    a, b = (torch.randn(side, side, dtype=getattr(torch, dtype), device="cuda") for _ in range(2))
    flops_per_s = 2.0 * side**3 / _fastest_cuda_s(torch, lambda: a @ b)
    bytes_per_s = {}
    for size in sizes:
        x = torch.ones(max(size, SMALLEST_READ) // 4, dtype=torch.int32, device="cuda")
        y = torch.empty_like(x)
        bytes_per_s[size] = 2 * x.numel() * 4 / _fastest_cuda_s(torch, partial(y.copy_, x))
    name = torch.cuda.get_device_name()
    return Ceiling(
        flops_per_s, bytes_per_s, f"measured on {name}: {dtype} product by torch {torch.__version__}, copying"
    )


def _fastest_cuda_s(torch: Any, call: Callable[[], object]) -> float:
    taken_ms = []
    for _ in range(REPEATS + 1):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        call()
        ended.record()
        ended.synchronize()
        taken_ms.append(began.elapsed_time(ended))
    return float(min(taken_ms[1:])) / 1e3


def _published(card: str, dtype: str) -> Ceiling:
    for name, (bfloat16, float32, gigabytes, source) in PUBLISHED.items():
        if card.removeprefix("NVIDIA ") == name:
            tera = bfloat16 if dtype == "bfloat16" else float32
            return Ceiling(tera * 1e12, {0: gigabytes * 1e9}, f"published: {source}")
    raise EngineError(
        f"roofline: expected torch with CUDA to measure {card!r}, or one of the cards {sorted(PUBLISHED)}; install the "
        "wheel torch, or leave the roofline out with --no-roofline"
    )


def _card_name() -> str:
    jetson = Path("/proc/device-tree/model")
    if jetson.is_file():
        return jetson.read_text().strip("\0\n ")
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError) as error:
        raise EngineError(f"roofline: expected an NVIDIA card that nvidia-smi names, got {error}") from error
    return names[0].strip() if names else "no card"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Figures of this processor as JSON; see cpu_figures.")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", required=True)
    chosen = parser.parse_args(arguments)
    print(json.dumps(cpu_figures(chosen.threads, chosen.sizes)))


if __name__ == "__main__":
    main()
