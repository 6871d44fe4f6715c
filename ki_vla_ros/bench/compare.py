"""`bench compare`: whole chunks of two set-ups in turns, in one process, so that both see the same machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from ki_vla_ros.bench.model import CALLS, WARM_UP, EngineSetUp
from ki_vla_ros.bench.timing import every_tenth, time_alternating
from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.policy import Policy, longest_input
from ki_vla_ros.statistics import ratio_of_medians, spread


def parse_set_up(text: str, defaults: EngineSetUp) -> EngineSetUp:
    """`onnx`, `onnx:threads=2,provider=cuda`, `torch:bundle=/a/folder,flow_steps=5`; the rest as in `defaults`."""
    engine, _, rest = text.partition(":")
    known = {field.name for field in fields(EngineSetUp)} - {"engine"}
    chosen: dict[str, Any] = dict(vars(defaults)) | {"engine": engine}
    for pair in filter(None, rest.split(",")):
        name, equals, value = pair.partition("=")
        if name not in known or not equals:
            raise ConfigurationError(
                f"set-up {text!r}: expected name=value with a name of {sorted(known)}, got {pair!r}"
            )
        if not isinstance(chosen[name], int):
            chosen[name] = value
        elif value.isdecimal():
            chosen[name] = int(value)
        else:
            raise ConfigurationError(f"set-up {text!r}: {name}: expected a whole number, got {value!r}")
    return EngineSetUp(**chosen)


def bench_compare(
    first: EngineSetUp, second: EngineSetUp, calls: int, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """ms per chunk of both, and the first's median over the second's: above 1 the second is faster."""
    set_ups = {"A": first, "B": second}
    policies: dict[str, Policy] = {}
    try:
        for name, set_up in set_ups.items():
            policies[name] = set_up.open()
        chunks = {name: whole_chunk(policy) for name, policy in policies.items()}
        taken_ms = time_alternating(chunks, calls, WARM_UP, every_tenth(calls, say))
        described = {name: policy.engine.description for name, policy in policies.items()}
    finally:
        for policy in policies.values():
            policy.engine.close()
    return {
        "set_ups": {name: dict(vars(set_up)) | {"description": described[name]} for name, set_up in set_ups.items()},
        "calls": calls,
        "too_few_calls": calls < CALLS,
        "ms": {name: spread(values) for name, values in taken_ms.items()},
        "a_over_b": ratio_of_medians(taken_ms["A"], taken_ms["B"]),
    }


def whole_chunk(policy: Policy) -> Callable[[], object]:
    """Prefill and all steps on the longest input."""
    manifest = policy.bundle.manifest
    model_input, noise_HA = longest_input(manifest, manifest.graph.vocab_size), policy.noise(0)
    return lambda: policy.denoise(policy.prefill(model_input), noise_HA, model_input.state_S)


def table(figures: dict[str, Any]) -> str:
    lines = [f"{'ms':<4}{'p50':>9}{'p90':>9}{'p99':>9}{'max':>9}"]
    for name, row in figures["ms"].items():
        set_up = figures["set_ups"][name]
        lines.append(
            f"{name:<4}{row['p50']:>9.2f}{row['p90']:>9.2f}{row['p99']:>9.2f}{row['max']:>9.2f}"
            f"  {set_up['bundle']} on {set_up['description']}"
        )
    ratio = figures["a_over_b"]
    few = f" (fewer than {CALLS}: too few for a p99)" if figures["too_few_calls"] else ""
    lines.append(
        f"A takes {ratio['ratio']:.3f} times as long as B (95 % interval {ratio['low']:.3f} to {ratio['high']:.3f}; "
        f"medians of {figures['calls']} chunks each, in turns{few})"
    )
    return "\n".join(lines)
