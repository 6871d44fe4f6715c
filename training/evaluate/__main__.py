"""Closed-loop figures of a bundle in the simulator, without ROS and in simulated time.

python -m training.evaluate models/demo --episodes 100
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ki_vla_ros.bundle import load_bundle
from ki_vla_ros.console import ExitCode, run_command
from ki_vla_ros.engines import open_engine
from ki_vla_ros.policy import Policy
from ki_vla_ros.settings import settings_from_parameters
from ki_vla_ros.sim import sample_scene
from training.evaluate.closed_loop import FIRST_SCENE, evaluate


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--split", choices=("held_out", "train", "all"), default="held_out")
    parser.add_argument("--first-scene", type=int, default=FIRST_SCENE)
    parser.add_argument(
        "--delay-s", type=float, default=0.03, help="from observation to the chunk's arrival at the arm"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a node parameter, e.g. executor=rtc"
    )
    parser.add_argument("--flow-steps", type=int, help="default: what the bundle says")
    parser.add_argument("--noise-seed", type=int, default=0)
    return run_command("evaluate", partial(_evaluate, parser.parse_args(arguments)))


def _evaluate(options: argparse.Namespace) -> int:
    bundle = load_bundle(options.bundle)
    # No ramp-in: every scene is a start with its clock set back, so the ramp would slow each episode's beginning.
    chosen = settings_from_parameters({"ramp_in_s": 0.0} | dict(pair.split("=", 1) for pair in options.set))
    chosen.validate_against(bundle.manifest)
    engine = open_engine(bundle, chosen)
    policy = Policy(bundle, engine, options.flow_steps, options.noise_seed, chosen.guidance_jacobian)
    first = options.first_scene
    scenes = [sample_scene(seed, split=options.split) for seed in range(first, first + options.episodes)]
    settings = {"bundle": bundle.manifest.name, **{k: v for k, v in vars(options).items() if k != "bundle"}}
    print(json.dumps(settings | evaluate(policy, scenes, options.delay_s, chosen), indent=1))
    return ExitCode.FINE


if __name__ == "__main__":
    sys.exit(main())
