"""The roofline: the least time that a device needs for a graph (Williams, Waterman and Patterson 2009).

That is its operations at the device's peak or its bytes at the device's bandwidth, whichever takes longer. Both are
measured on this machine. Peak: the product of two large matrices, on a processor by numpy's BLAS in float32, on a GPU
by torch in the bundle's dtype. Bandwidth: reading an array as large as what the graph reads, again and again, so that a
graph that fits into a cache is judged by that cache.

numpy's product stands in for onnxruntime's, which would need a graph. One thread, processor time, products in turns,
the fastest of 15 (2048 x 2048) and of 199 (512 x 512), AMD EPYC, 2026-11-26: numpy 100.0 and 101.8 GFLOP/s, onnxruntime
83.2 and 100.0. So the peak is what onnxruntime reaches at its best size.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.errors import EngineError

SIDE = 2048  # of the square matrices whose product is timed on a CPU
REPEATS = 7  # the fastest counts: a peak is what the device can do, not what it did on average
SMALLEST_READ, LONG_READ = 1 << 16, 1 << 26
MEASURING_LIMIT_S = 300.0
REMEDY = "install torch with CUDA, or leave the roofline out with --no-roofline"
# Whichever BLAS numpy was built with reads one of these.
BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "BLIS_NUM_THREADS")


@dataclass(frozen=True)
class Work:
    """What one run of a graph must do at least: operations, and bytes read or written (weights, keys and values)."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Ceiling:
    """What a device can do at most: FLOP/s, bytes/s by the size that is read, and where the figures come from."""

    flops_per_s: float
    bytes_per_s: Mapping[int, float]
    source: str

    def least_ms(self, work: Work) -> float:
        return max(self.times_ms(work).values())

    def bound(self, work: Work) -> str:
        """What limits the work: "compute" or "bytes"."""
        times_ms = self.times_ms(work)
        return max(times_ms, key=times_ms.__getitem__)

    def times_ms(self, work: Work) -> dict[str, float]:
        nearest = min(self.bytes_per_s, key=lambda size: abs(size - work.bytes))
        return {
            "compute": 1e3 * work.flops / self.flops_per_s,
            "bytes": 1e3 * work.bytes / self.bytes_per_s[nearest],
        }


def measure_ceiling(provider: str, threads: int, dtype: str, sizes: Sequence[int]) -> Ceiling:
    """The ceiling of the part of this machine that an engine may use; EngineError on a card without torch."""
    if provider == "cpu":
        return _measure_cpu(threads, sizes)
    try:
        from ki_vla_ros.engines.torch_card import measure_card

        return Ceiling(*measure_card(dtype, sizes))
    except ModuleNotFoundError as error:
        raise EngineError(f"roofline: expected torch, to measure the card; {error}; {REMEDY}") from error
    except EngineError as error:
        raise EngineError(f"roofline: {error}; {REMEDY}") from error


def _measure_cpu(threads: int, sizes: Sequence[int]) -> Ceiling:
    """Measured in another process: numpy's BLAS reads its number of threads only when it is loaded."""
    call = f"cpu_rates({threads}, {[*sizes]})"
    code = f"import json; from ki_vla_ros.bench.roofline import cpu_rates; print(json.dumps({call}))"
    environment = os.environ | dict.fromkeys(BLAS_THREADS, str(threads))
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=MEASURING_LIMIT_S)
    if done.returncode != 0:
        raise EngineError(f"roofline: expected figures of this processor, got {done.stderr.strip()[-500:]!r}")
    flops_per_s, *bytes_per_s = json.loads(done.stdout)
    source = f"measured: numpy's float32 product of {SIDE} x {SIDE} matrices, reading; {threads} thread(s)"
    return Ceiling(flops_per_s, dict(zip(sizes, bytes_per_s, strict=True)), source)


def cpu_rates(threads: int, sizes: Sequence[int]) -> list[float]:
    """FLOP/s, then bytes/s for each size, with the threads that this process's BLAS has."""
    # Processor time leaves out what others do on the machine meanwhile, but the times of several threads add up.
    clock_s = time.process_time if threads == 1 else time.perf_counter
    a, b = np.random.default_rng(0).standard_normal((2, SIDE, SIDE), dtype=np.float32)
    rates = [2.0 * SIDE**3 / _fastest_s(lambda: a @ b, clock_s)]
    with ThreadPoolExecutor(threads) as pool:
        for size in sizes:
            whole = np.ones(max(size, SMALLEST_READ) // 8, dtype=np.int64)
            # Small arrays are read many times per task: otherwise handing out the tasks would be what is timed.
            times = max(1, LONG_READ // whole.nbytes)
            read = partial(_read_all, pool, np.array_split(whole, threads), times)
            rates.append(whole.nbytes * times / _fastest_s(read, clock_s))
    return rates


def _read_all(pool: ThreadPoolExecutor, parts: Sequence[NDArray[np.int64]], times: int) -> None:
    for _ in pool.map(_read, parts, [times] * len(parts)):
        pass


def _read(part: NDArray[np.int64], times: int) -> None:
    for _ in range(times):
        np.bitwise_or.reduce(part)  # releases the interpreter's lock, and is faster than memory


def _fastest_s(call: Callable[[], object], clock_s: Callable[[], float]) -> float:
    taken_s = []
    for _ in range(REPEATS + 1):
        began_s = clock_s()
        call()
        taken_s.append(clock_s() - began_s)
    return min(taken_s[1:])
