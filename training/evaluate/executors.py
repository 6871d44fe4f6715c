"""How each chunk executor does on the simulated arm when inference is slow: docs/results/executors.md.

python -m training.evaluate.executors models/demo --episodes 20
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import get_args

from ki_vla_ros.bundle import load_bundle
from ki_vla_ros.console import ExitCode, run_command
from ki_vla_ros.engines.onnx_engine import OnnxEngine
from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.policy import Policy
from ki_vla_ros.settings import ExecutorName, settings_from_parameters
from ki_vla_ros.sim import sample_scene
from training.evaluate.closed_loop import FIRST_SCENE, evaluate

DELAYS_MS = (0, 50, 100, 200, 300)


def compare(policy: Policy, episodes: int, delays_ms: Sequence[int]) -> Iterator[str]:
    """Lines of a Markdown table, one per executor and delay, as soon as each is known."""
    names = ("executor", "delay, ms", "follow", "success", "s per episode", "holds", "jerk rms", "seam, rad", "rad/s")
    yield f"| {' | '.join(names)} |"
    yield "|---" * len(names) + "|"
    scenes = [sample_scene(seed, split="held_out") for seed in range(FIRST_SCENE, FIRST_SCENE + episodes)]
    for executor in get_args(ExecutorName):
        for delay_ms in delays_ms:
            values = {"executor": executor, "ramp_in_s": 0.0, "limits.max_chunk_age_s": 1.0}
            settings = settings_from_parameters(values)
            try:
                settings.validate_against(policy.bundle.manifest)
            except ConfigurationError as error:
                yield f"| {executor} | {delay_ms} | {error} | | | | | | |"
                continue
            found = evaluate(policy, scenes, delay_ms / 1e3, settings)
            yield (
                f"| {executor} | {delay_ms} | {found['follow_rate']:.0%} | {found['success_rate']:.0%} | "
                f"{found['mean_seconds']:.2f} | {found['holds']} | {found['jerk_rms']:.0f} | "
                f"{found['seam_step']:.1e} | {found['seam_speed_step']:.1e} |"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate.executors",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--delays-ms", type=int, nargs="+", default=list(DELAYS_MS))
    return run_command("executors", partial(_print_comparison, parser.parse_args(arguments)))


def _print_comparison(options: argparse.Namespace) -> int:
    bundle = load_bundle(options.bundle)
    for line in compare(Policy(bundle, OnnxEngine(bundle)), options.episodes, options.delays_ms):
        print(line, flush=True)
    return ExitCode.FINE


if __name__ == "__main__":
    sys.exit(main())
