"""How fast the runtime is beside the obvious ways of doing the same, in one run: tables for docs/results/.

    python -m training.export.random_weights --size 100m --out out/random/100m --bundle out/random/100m-bundle
    python -m training.compare_speed --checkpoint out/random/100m --bundle out/random/100m-bundle --threads 2

On a CPU, in float32, all calls of a comparison in turns. Compared, on the same weights and input:

- the prefix computed once for all steps, against once in every step
- our prefill against that of `transformers`' PaliGemma
- whole chunks by onnxruntime from the bundle, against a plain loop of torch operations (the training classes)

With `--gpu` instead: the model of full size on an NVIDIA card, see training.speed.gpu.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

from ki_vla_ros.bench.model import longest_input, state_token
from ki_vla_ros.bench.timing import Durations, choose_clock, time_alternating
from ki_vla_ros.bundle.folder import load_bundle
from ki_vla_ros.engines.base import KVCache
from ki_vla_ros.engines.onnx_engine import OnnxEngine
from ki_vla_ros.errors import ConfigurationError, KiVlaError
from ki_vla_ros.policy.policy import Policy
from ki_vla_ros.statistics import ratio_of_medians, spread
from training.model.vla import VLA, Cache
from training.speed.peer import build_peer, peer_prefill
from training.weights.checkpoints import load_checkpoint

ROUNDS, SLOW_ROUNDS, WARM_UP = 100, 20, 3
AGREEMENT = 1e-3
"""Largest difference between two ways of computing the same, in keys, values and normalised actions."""

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
    """Every way of computing, on one model and one input; `checked` has compared their results."""

    def __init__(self, model: VLA, policy: Policy) -> None:
        self._model, self._policy = model, policy
        given = longest_input(policy.bundle.manifest)
        arrays = (given.images_VCHW, given.image_mask_V, given.tokens_L, given.token_mask_L)
        self._given, self._noise_HA = given, policy.noise(0)
        self._state_S = state_token(policy.bundle.manifest, given)
        self._clean_H = np.zeros(len(self._noise_HA), dtype=np.bool_)
        self._inputs = tuple(torch.from_numpy(array)[None] for array in arrays)
        self._noise_RHA = torch.from_numpy(self._noise_HA)[None]
        self._state_RS = None if self._state_S is None else torch.from_numpy(self._state_S)[None]
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
        """Largest differences; ConfigurationError where one is above AGREEMENT: then they are not doing the same."""
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
                f"compare_speed: expected the same results within {AGREEMENT:g}, got {wrong}; is the bundle an export "
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
        """The prefix anew in every step; of its last layer only what the expert reads, as in ours."""
        x_t, steps = self._noise_RHA, self._policy.flow_steps
        for step in range(steps):
            cache = self._model.prefill(*self._inputs)
            time_RH = torch.full_like(x_t[..., 0], 1.0 - step / steps)
            x_t = x_t - self._model.velocity(cache, x_t, time_RH, self._state_RS) / steps
        return x_t

    def onnx_prefill(self) -> KVCache:
        return self._policy.prefill(self._given)

    def onnx_chunk(self) -> Actions:
        return self._policy.denoise(self._policy.prefill(self._given), self._noise_HA, self._given.state_J)

    def onnx_uncached_chunk(self) -> Actions:
        x_t, steps, engine = self._noise_HA, self._policy.flow_steps, self._policy.engine
        for step in range(steps):
            cache, t = self._policy.prefill(self._given), 1.0 - step / steps
            v_t = engine.velocity(cache, self._state_S, x_t, t, self._clean_H)
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
    """All figures; durations in ms, on the clock that `choose_clock` describes."""
    clock_ns = choose_clock(processor_time, threads)
    torch.set_num_threads(threads)
    model = load_checkpoint(checkpoint).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # out of the mapped file, whose addresses have no alignment
    loaded = load_bundle(bundle)
    engine = OnnxEngine(loaded, threads=threads)
    contest = Contest(model, Policy(loaded, engine))
    differences = contest.check()
    taken_ms = time_alternating(contest.calls(), rounds, WARM_UP, _every_tenth(rounds, "quick", say), clock_ns)
    slow_ms = time_alternating(contest.slow_calls(), slow_rounds, 1, _every_tenth(slow_rounds, "slow", say), clock_ns)
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
    """Both sides of the same rounds: the quick ones, unless only the slow ones have both."""
    source = taken_ms if ratio.slow in taken_ms and ratio.fast in taken_ms else slow_ms
    found = ratio_of_medians(source[ratio.slow], source[ratio.fast])
    return {"what": ratio.what, "goal": ratio.goal, "reached": found["ratio"] >= ratio.goal, **found}


def _every_tenth(rounds: int, which: str, say: Callable[[str], None]) -> Callable[[int], None]:
    return lambda n: say(f"{which}: {n} of {rounds}") if n % max(1, rounds // 10) == 0 else None


def table(figures: Mapping[str, Any]) -> str:
    """Markdown."""
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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="the model of full size on a card; other options: --gpu -h")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, required=True, help="the checkpoint's export")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default {ROUNDS}")
    parser.add_argument("--slow-rounds", type=int, default=SLOW_ROUNDS, help="with the prefix in every step")
    parser.add_argument("--processor-time", action="store_true", help="for a busy machine; with one thread only")
    parser.add_argument("--json", type=Path, help="write the figures there")
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--gpu" in given:
        from training.speed import gpu as compare_speed_gpu

        return compare_speed_gpu.main([argument for argument in given if argument != "--gpu"])
    chosen = parser.parse_args(given)
    try:
        figures = compare(
            chosen.checkpoint,
            chosen.bundle,
            chosen.threads,
            chosen.rounds,
            chosen.slow_rounds,
            lambda line: print(line, file=sys.stderr, flush=True),
            chosen.processor_time,
        )
    except KiVlaError as error:
        print(f"compare_speed: {error}", file=sys.stderr)
        return 1
    print(table(figures))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
