"""How fast the runtime is on a CPU in float32, compared with the obvious alternatives, with all calls taking turns.

Compared, on the same weights and input:

- the prefix computed once for all steps, against once per step
- our prefill against that of `transformers`' PaliGemma
- whole chunks by onnxruntime from the bundle, against a plain loop of torch operations (the training classes)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

from ki_vla_ros.bench import Durations, choose_clock, every_tenth, time_alternating
from ki_vla_ros.bundle import load_bundle
from ki_vla_ros.engines.base import KVCache, step_times
from ki_vla_ros.engines.onnx_engine import OnnxEngine
from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.policy import Policy, longest_input
from ki_vla_ros.statistics import ratio_of_medians, spread
from training.export import as_batch
from training.model import VLA, Cache
from training.speed.peer import build_peer, peer_prefill
from training.weights import load_checkpoint

ROUNDS, SLOW_ROUNDS, WARM_UP = 100, 20, 3
AGREEMENT = 1e-3
"""Largest difference allowed between two ways of computing the same keys, values and normalised actions."""

Call = Callable[[], object]
Actions = NDArray[np.float32]


@dataclass(frozen=True)
class Ratio:
    """`slow` is expected to take at least `goal` times as long as `fast`."""

    what: str
    slow: str
    fast: str
    goal: float


RATIOS = (
    Ratio("cached prefix, torch", "torch chunk, prefix in every step", "torch chunk", 4.0),
    Ratio("cached prefix, onnxruntime", "onnxruntime chunk, prefix in every step", "onnxruntime chunk", 4.0),
    Ratio("prefill: ours in torch eager against transformers", "transformers prefill", "torch prefill", 1.0),
    Ratio("prefill: onnxruntime against transformers", "transformers prefill", "onnxruntime prefill", 1.0),
    Ratio("chunk: onnxruntime against plain torch", "torch chunk", "onnxruntime chunk", 2.0),
)


class Contest:
    """Every way of computing, on one model and one input; `check` compares their results."""

    def __init__(self, model: VLA, policy: Policy) -> None:
        self._model, self._policy = model, policy
        manifest = policy.bundle.manifest
        given = longest_input(manifest, manifest.graph.vocab_size)
        self._given, self._noise_HA = given, policy.noise(0)
        self._state_S = policy.widen_state(given.state_S)
        self._clean_H = np.zeros(len(self._noise_HA), dtype=np.bool_)
        self._inputs, self._state_RS = as_batch(given, model.config.state_dim)
        self._noise_RHA = torch.from_numpy(self._noise_HA)[None]
        self._peer = peer_prefill(build_peer(model), self._inputs[0][0], self._inputs[2])

    def calls(self) -> dict[str, Call]:
        return {
            "torch chunk": self.torch_chunk,
            "onnxruntime chunk": self.onnx_chunk,
            "torch prefill": self.torch_prefill,
            "onnxruntime prefill": self.onnx_prefill,
            "transformers prefill": self._peer,
        }

    def slow_calls(self) -> dict[str, Call]:
        return {
            "torch chunk": self.torch_chunk,
            "onnxruntime chunk": self.onnx_chunk,
            "torch chunk, prefix in every step": self.torch_uncached_chunk,
            "onnxruntime chunk, prefix in every step": self.onnx_uncached_chunk,
        }

    def check(self) -> dict[str, float]:
        """The largest differences; ConfigurationError if one is above AGREEMENT, so that they are not comparable."""
        ours, theirs = self.torch_prefill(), self._peer()
        chunk_RHA = self.torch_chunk()
        found = {
            "keys, transformers": float((ours.keys_NBKPD - theirs.keys_NBKPD).abs().max()),
            "values, transformers": float((ours.values_NBKPD - theirs.values_NBKPD).abs().max()),
            "chunk, prefix in every step": float((chunk_RHA - self.torch_uncached_chunk()).abs().max()),
            "chunk, onnxruntime": float(np.abs(chunk_RHA[0].numpy() - self.onnx_chunk()).max()),
            "chunk, onnxruntime, prefix in every step": float(
                np.abs(chunk_RHA[0].numpy() - self.onnx_uncached_chunk()).max()
            ),
        }
        wrong = {name: difference for name, difference in found.items() if not difference <= AGREEMENT}
        if wrong:
            raise ConfigurationError(
                f"speed: expected the same results within {AGREEMENT:g}, got {wrong}; is the bundle an export "
                "of this checkpoint?"
            )
        return found

    @torch.no_grad()
    def torch_prefill(self) -> Cache:
        return self._model.prefill(*self._inputs)

    @torch.no_grad()
    def torch_chunk(self) -> Tensor:
        cache = self._model.prefill(*self._inputs)
        return self._model.sample_actions(cache, self._noise_RHA, self._policy.flow_steps, self._state_RS)

    @torch.no_grad()
    def torch_uncached_chunk(self) -> Tensor:
        """The prefix again in every step; of its last layer only what the expert reads, as in ours."""
        x_t, steps = self._noise_RHA, self._policy.flow_steps
        for time in step_times(steps):
            cache = self._model.prefill(*self._inputs)
            time_RH = torch.full_like(x_t[..., 0], time)
            x_t = x_t - self._model.velocity(cache, x_t, time_RH, self._state_RS) / steps
        return x_t

    def onnx_prefill(self) -> KVCache:
        return self._policy.prefill(self._given)

    def onnx_chunk(self) -> Actions:
        return self._policy.denoise(self._policy.prefill(self._given), self._noise_HA, self._given.state_S)

    def onnx_uncached_chunk(self) -> Actions:
        x_t, steps, engine = self._noise_HA, self._policy.flow_steps, self._policy.engine
        for time in step_times(steps):
            cache = self._policy.prefill(self._given)
            v_t = engine.velocity(cache, self._state_S, x_t, time, self._clean_H)
            x_t = x_t - v_t / np.float32(steps)
        return x_t


def compare(
    checkpoint: Path,
    bundle: Path,
    threads: int,
    rounds: int,
    slow_rounds: int,
    say: Callable[[str], None],
    processor_time: bool = False,
) -> dict[str, Any]:
    """All figures, with durations in ms on the clock that `choose_clock` describes."""
    clock_ns = choose_clock(processor_time, threads)
    torch.set_num_threads(threads)
    model = load_checkpoint(checkpoint).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # out of the mapped file, whose addresses have no alignment
    loaded = load_bundle(bundle)
    engine = OnnxEngine(loaded, threads=threads)
    contest = Contest(model, Policy(loaded, engine))
    differences = contest.check()
    taken_ms = time_alternating(
        contest.calls(), rounds, WARM_UP, every_tenth(rounds, lambda line: say(f"quick: {line}")), clock_ns
    )
    slow_ms = time_alternating(
        contest.slow_calls(), slow_rounds, 1, every_tenth(slow_rounds, lambda line: say(f"slow: {line}")), clock_ns
    )
    engine.close()
    return {
        "model": loaded.manifest.name,
        "weights": sum(parameter.numel() for parameter in model.parameters()),
        "seed": loaded.manifest.provenance.seed,
        "cameras": len(loaded.manifest.cameras),
        "prefix": loaded.manifest.graph.prefix_length,
        "horizon": loaded.manifest.horizon,
        "steps": loaded.manifest.flow.steps,
        "threads": threads,
        "clock": "processor" if processor_time else "wall",
        "versions": {
            "torch": torch.__version__,
            "onnxruntime": onnxruntime.__version__,
            "transformers": transformers.__version__,
        },
        "rounds": {"quick": rounds, "slow": slow_rounds},
        "differences": differences,
        "ms": {name: spread(values) for name, values in (slow_ms | taken_ms).items()},
        "ratios": [judge(ratio, taken_ms, slow_ms) for ratio in RATIOS],
    }


def judge(
    ratio: Ratio, taken_ms: Mapping[str, Durations], slow_ms: Mapping[str, Durations]
) -> dict[str, float | str | bool]:
    """The ratio, with both sides from the same rounds: the quick ones, unless only the slow ones have both."""
    source = taken_ms if ratio.slow in taken_ms and ratio.fast in taken_ms else slow_ms
    found = ratio_of_medians(source[ratio.slow], source[ratio.fast])
    return {"what": ratio.what, "goal": ratio.goal, "reached": found["ratio"] >= ratio.goal, **found}


def table(figures: Mapping[str, Any]) -> str:
    """The figures as Markdown tables."""
    lines = [f"| ms ({figures['clock']} time) | p50 | p90 | p99 | max |", "|---|---|---|---|---|"]
    for name, row in figures["ms"].items():
        lines.append(f"| {name} | {' | '.join(f'{row[key]:.1f}' for key in ('p50', 'p90', 'p99', 'max'))} |")
    lines += ["", "| ratio of medians | found | 95 % interval | goal | |", "|---|---|---|---|---|"]
    for row in figures["ratios"]:
        lines.append(
            f"| {row['what']} | {row['ratio']:.2f} | {row['low']:.2f} to {row['high']:.2f} | {row['goal']:g} "
            f"| {'reached' if row['reached'] else 'missed'} |"
        )
    return "\n".join(lines)
