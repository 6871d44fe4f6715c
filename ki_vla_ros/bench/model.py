"""`bench model`: how long a bundle's graphs take on an engine, and how close that is to what the device can do.

No ROS is needed. The input is noise of the bundle's sizes, all cameras present and the prompt full: the longest case.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ki_vla_ros.bench.roofline import Ceiling, Work, measure_ceiling
from ki_vla_ros.bench.timing import choose_clock, every_tenth, time_alternating
from ki_vla_ros.bundle import EXPERT, PREFILL, Bundle, GraphHeader, load_bundle, read_header
from ki_vla_ros.engines import open_engine
from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.policy import Policy, longest_input
from ki_vla_ros.settings import settings_from_parameters
from ki_vla_ros.share import find_bundle
from ki_vla_ros.statistics import spread

CALLS = 1000
"""Fewer give no meaningful 99th percentile."""
WARM_UP = 10
PARTS = ("prefill", "one step", "all steps", "chunk")


@runtime_checkable
class DeferringEngine(Protocol):
    """An engine whose prefill returns before it is done."""

    def synchronize(self) -> None:
        """Wait until the device has nothing left to do."""
        ...


@dataclass(frozen=True)
class EngineSetUp:
    """What is timed: a bundle, by name or path, on an engine."""

    bundle: str = "demo"
    engine: str = "onnx"
    provider: str = "cpu"
    threads: int = 1
    flow_steps: int = 0
    torch_mode: str = "auto"

    def open(self) -> Policy:
        """The policy, warmed up; the caller closes its engine."""
        chosen = {
            "engine": self.engine,
            "provider": self.provider,
            "threads": self.threads,
            "torch_mode": self.torch_mode,
        }
        settings = settings_from_parameters(chosen)
        bundle = load_bundle(find_bundle(self.bundle))
        settings.validate_against(bundle.manifest)
        policy = Policy(bundle, open_engine(bundle, settings), self.flow_steps or None)
        policy.warm_up()
        return policy


def bench_model(
    set_up: EngineSetUp,
    calls: int,
    roofline: bool = True,
    say: Callable[[str], None] = lambda line: None,
    processor_time: bool = False,
) -> dict[str, Any]:
    """Figures of one set-up; all durations in ms, on the clock that `choose_clock` describes."""
    if processor_time and set_up.provider != "cpu":
        raise ConfigurationError(f"--processor-time: expected provider cpu, got {set_up.provider}; leave it out")
    clock_ns = choose_clock(processor_time, set_up.threads)
    policy = set_up.open()
    manifest = policy.bundle.manifest
    graphs = graph_figures(policy.bundle)
    try:
        ceiling = None
        if roofline:  # first: if the device cannot be measured, this fails before the long part
            sizes = [graph["bytes_read"] for graph in graphs.values()]
            ceiling = measure_ceiling(set_up.provider, set_up.threads, manifest.graph.dtype, sizes)
        parts = time_parts(policy, calls, say, clock_ns)
        engine = policy.engine.description
    finally:
        policy.engine.close()
    return {
        "bundle": manifest.name,
        "engine": engine,
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}",
        "cameras": len(manifest.cameras),
        "prompt_tokens": manifest.prompt.length,
        "horizon": manifest.horizon,
        "flow_steps": policy.flow_steps,
        "clock": "processor" if processor_time else "wall",
        "calls": calls,
        "too_few_calls": calls < CALLS,
        "graphs": graphs,
        "ms": {name: spread(taken_ms) for name, taken_ms in parts.items()},
        "roofline": None if ceiling is None else roofline_figures(ceiling, graphs, policy.flow_steps, parts),
    }


def time_parts(
    policy: Policy, calls: int, say: Callable[[str], None], clock_ns: Callable[[], int] = time.perf_counter_ns
) -> dict[str, np.ndarray[Any, Any]]:
    """ms of each of PARTS, `calls` times; a chunk is a prefill and all its steps, without a pause between them."""
    model_input, noise_HA = (
        longest_input(policy.bundle.manifest, policy.bundle.manifest.graph.vocab_size),
        policy.noise(0),
    )
    state_S = policy.widen_state(model_input.state_S)
    clean_H = np.zeros(len(noise_HA), dtype=np.bool_)
    wait = policy.engine.synchronize if isinstance(policy.engine, DeferringEngine) else lambda: None
    cache = policy.prefill(model_input)

    def prefill() -> None:
        nonlocal cache
        cache = policy.prefill(model_input)
        wait()

    def one_step() -> None:
        policy.engine.velocity(cache, state_S, noise_HA, 1.0, clean_H)

    def all_steps() -> None:
        policy.denoise(cache, noise_HA, model_input.state_S)

    def chunk() -> None:
        nonlocal cache
        cache = policy.prefill(model_input)
        all_steps()

    timed = dict(zip(PARTS, (prefill, one_step, all_steps, chunk), strict=True))
    return time_alternating(timed, calls, WARM_UP, every_tenth(calls, say), clock_ns)


def graph_figures(bundle: Bundle) -> dict[str, dict[str, int]]:
    """Per graph: weights and their bytes in the file; the bytes that one run must move, and its operations.

    A run reads all weights except the token table, of which it reads the prompt's rows, and writes (prefill) or reads
    (step) the keys and values. Activations are left out: they may stay in a cache.
    """
    graph = bundle.manifest.graph
    kv = 2 * graph.layers * graph.kv_heads * graph.prefix_length * graph.head_dim
    kv_bytes = kv * {"float32": 4, "bfloat16": 2}[graph.dtype]
    found = {}
    for name, file, flops in (("prefill", PREFILL, graph.prefill_flops), ("step", EXPERT, graph.step_flops)):
        header = read_header(bundle.path / file)
        found[name] = {
            "parameters": sum(math.prod(shape) for shape in header.weights.values()),
            "bytes": sum(header.weight_bytes.values()),
            "bytes_read": weights_read(header, bundle.manifest.prompt.length) + kv_bytes,
            "flops": flops,
        }
    return found


def weights_read(header: GraphHeader, rows: int) -> int:
    """Bytes of weights that one run reads; of looked-up weights, `rows` rows, or all if there are fewer."""
    total = 0
    for name, size in header.weight_bytes.items():
        share = min(1.0, rows / header.weights[name][0]) if name in header.looked_up and header.weights[name] else 1.0
        total += round(size * share)
    return total


def roofline_figures(
    ceiling: Ceiling,
    graphs: Mapping[str, Mapping[str, int]],
    steps: int,
    parts: Mapping[str, np.ndarray[Any, Any]],
) -> dict[str, Any]:
    """The device's limits, the least ms of each part, what bounds each graph, and p50 as a multiple of the least."""
    work = {name: Work(graph["flops"], graph["bytes_read"]) for name, graph in graphs.items()}
    limit_ms = least_ms(ceiling, work["prefill"], work["step"], steps)
    return {
        "source": ceiling.source,
        "gflops_per_s": ceiling.flops_per_s / 1e9,
        "gb_per_s": {str(size): rate / 1e9 for size, rate in ceiling.bytes_per_s.items()},
        "bound": {name: ceiling.bound(graph) for name, graph in work.items()},
        "ms": limit_ms,
        "ratio": {name: float(np.median(parts[name])) / least for name, least in limit_ms.items()},
    }


def least_ms(ceiling: Ceiling, prefill: Work, step: Work, steps: int) -> dict[str, float]:
    """The least ms of each of PARTS."""
    prefill_ms, step_ms = ceiling.least_ms(prefill), ceiling.least_ms(step)
    return dict(zip(PARTS, (prefill_ms, step_ms, steps * step_ms, prefill_ms + steps * step_ms), strict=True))


def table(figures: Mapping[str, Any]) -> str:
    roof = figures["roofline"]
    lines = [
        f"{figures['bundle']}: {figures['cameras']} cameras, {figures['prompt_tokens']} prompt tokens, horizon "
        f"{figures['horizon']}, {figures['flow_steps']} steps; {figures['engine']}",
        f"{figures['machine']}; {figures['calls']} calls of each after {WARM_UP} of warm-up, "
        f"{figures['clock']} time" + (f" (fewer than {CALLS}: too few for a p99)" if figures["too_few_calls"] else ""),
        f"{'ms':<10}{'p50':>9}{'p90':>9}{'p99':>9}{'max':>9}{'roofline':>10}{'ratio':>7}",
    ]
    for name, row in figures["ms"].items():
        limit = "" if roof is None else f"{roof['ms'][name]:>10.2f}{roof['ratio'][name]:>7.2f}"
        lines.append(f"{name:<10}{row['p50']:>9.2f}{row['p90']:>9.2f}{row['p99']:>9.2f}{row['max']:>9.2f}{limit}")
    for name, graph in figures["graphs"].items():
        bound = "" if roof is None else f", bound by {roof['bound'][name]}"
        lines.append(
            f"{name}: {graph['parameters'] / 1e6:.1f} M weights in {graph['bytes'] / 1e6:.1f} MB; a run needs "
            f"{graph['flops'] / 1e9:.2f} GFLOP and {graph['bytes_read'] / 1e6:.1f} MB{bound}"
        )
    if roof is not None:
        rates = " and ".join(f"{rate:.1f}" for rate in roof["gb_per_s"].values())
        lines.append(f"roofline: {roof['gflops_per_s']:.0f} GFLOP/s, {rates} GB/s ({roof['source']})")
    return "\n".join(lines)
