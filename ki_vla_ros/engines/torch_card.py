"""What torch can say of an NVIDIA card: whether it is there, and its measured peak."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from ki_vla_ros.errors import EngineError

SIDE, REPEATS, SMALLEST_READ = 8192, 7, 1 << 16


def check_card() -> None:
    """EngineError if torch has no card that it can use."""
    if not torch.cuda.is_available():
        raise EngineError(f"expected an NVIDIA card that torch can use, got torch {torch.__version__} without one")


def measure_card(dtype: str, sizes: Sequence[int]) -> tuple[float, dict[int, float], str]:
    """FLOP/s of a matrix product in `dtype`, bytes/s of copying by size, and how they were measured."""
    check_card()
    a, b = (torch.randn(SIDE, SIDE, dtype=getattr(torch, dtype), device="cuda") for _ in range(2))
    flops_per_s = 2.0 * SIDE**3 / _fastest_s(lambda: a @ b)
    bytes_per_s = {}
    for size in sizes:
        x = torch.ones(max(size, SMALLEST_READ) // 4, dtype=torch.int32, device="cuda")
        y = torch.empty_like(x)
        bytes_per_s[size] = 2 * x.numel() * 4 / _fastest_s(partial(y.copy_, x))
    source = f"measured on {torch.cuda.get_device_name()}: {dtype} product by torch {torch.__version__}, copying"
    return flops_per_s, bytes_per_s, source


def _fastest_s(call: Callable[[], object]) -> float:
    taken_ms = []
    for _ in range(REPEATS + 1):  # the first one warms up
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        call()
        ended.record()
        ended.synchronize()
        taken_ms.append(began.elapsed_time(ended))
    return float(min(taken_ms[1:])) / 1e3
