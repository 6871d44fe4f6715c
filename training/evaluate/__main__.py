"""A bundle, or a policy behind a server, in closed loop, without ROS and in simulated time.

python -m training.evaluate BUNDLE --environment aloha/transfer_cube --episodes 50 --out FILE.json
python -m training.evaluate --policy-server ws://127.0.0.1:8000 --environment aloha/transfer_cube
python -m training.evaluate models/demo --episodes 100

With --environment: success over held-out starts, each chunk executed without delay. Without: the demo's arm through the
robot's own loop, with its delay.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from ki_vla_ros.bundle import load_bundle
from ki_vla_ros.console import ExitCode, Progress, run_command
from ki_vla_ros.engines import open_engine
from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.policy import Policy
from ki_vla_ros.settings import Settings, settings_from_parameters
from ki_vla_ros.statistics import wilson_95
from training.evaluate.environment import Environment, at_period
from training.evaluate.environments import HELD_OUT, open_environment
from training.evaluate.rollouts import Act, act_as, check_robot, roll_out
from training.storage import write_whole

FILMED: Final = 3  # episodes of each environment


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, nargs="?", help="or --policy-server")
    parser.add_argument("--episodes", type=int, help="of each environment; default 50 in environments, else 100")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a node parameter, e.g. engine=torch"
    )
    parser.add_argument("--flow-steps", type=int, help="default: what the bundle says")
    parser.add_argument("--noise-seed", type=int, help="default 0")
    rolled = parser.add_argument_group("in environments")
    rolled.add_argument("--environment", nargs="+", metavar="ENV", help="a wrong name lists them")
    rolled.add_argument("--out", type=Path, metavar="FILE.json", help="default: standard output alone")
    rolled.add_argument("--execute", type=int, metavar="N", help="actions of a chunk; default: half of them")
    rolled.add_argument("--video", type=Path, metavar="FOLDER", help=f"films of the first {FILMED} episodes of each")
    rolled.add_argument("--seed", type=int, help=f"of the first episode; default {HELD_OUT}, the first held-out one")
    rolled.add_argument("--image-size", type=int, metavar="PIXELS", help="longer side; default: the environment's own")
    served = parser.add_argument_group("a policy behind a server, in environments (docs/serve.md)")
    served.add_argument("--policy-server", metavar="ws://HOST:PORT", help="in place of a bundle")
    served.add_argument(
        "--policy-server-keys",
        metavar="KEYS",
        help="what it calls the parts of an observation: robot (default), droid, libero, aloha or a file",
    )
    served.add_argument("--policy-server-token", type=Path, metavar="FILE", help="with the token that it asks for")
    looped = parser.add_argument_group("through the robot's own loop")
    looped.add_argument("--split", choices=("held_out", "train", "all"), help="default held_out")
    looped.add_argument("--first-scene", type=int, help="default: one that training does not draw")
    looped.add_argument(
        "--delay-s", type=float, help="from observation to the chunk's arrival at the arm; default 0.03"
    )
    return run_command("evaluate", partial(_evaluate, parser.parse_args(arguments)))


def _evaluate(options: argparse.Namespace) -> int:
    _check(options)
    if options.policy_server is not None:
        figures = _roll_out_served(options)
    else:
        bundle = load_bundle(options.bundle)
        # No ramp-in: every scene is a start with its clock set back, so the ramp would slow each episode's beginning.
        chosen = settings_from_parameters({"ramp_in_s": 0.0} | dict(pair.split("=", 1) for pair in options.set))
        chosen.validate_against(bundle.manifest)
        engine = open_engine(bundle, chosen)
        policy = Policy(bundle, engine, options.flow_steps, options.noise_seed or 0, chosen.guidance_jacobian)
        figures = _roll_out_bundle(policy, options) if options.environment else _loop(policy, options, chosen)
    text = json.dumps(figures, indent=1)
    if options.out is not None:
        write_whole(options.out, text + "\n")
    print(text)
    return ExitCode.FINE


def _check(options: argparse.Namespace) -> None:
    """ConfigurationError for options that do not go together."""
    if (options.bundle is None) == (options.policy_server is None):
        got = "neither" if options.bundle is None else "both"
        raise ConfigurationError(f"expected a bundle or --policy-server, got {got}")
    served = options.policy_server is not None
    if served and not options.environment:
        raise ConfigurationError("--policy-server: expected --environment with it, got none")
    misplaced = [
        (("split", "first_scene", "delay_s"), "without --environment", bool(options.environment)),
        (("out", "execute", "video", "seed", "image_size"), "with --environment", not options.environment),
        (("policy_server_keys", "policy_server_token"), "with --policy-server", not served),
        (("set", "flow_steps", "noise_seed"), "with a bundle", served),
    ]
    for names, where, misfits in misplaced:
        for name in names:
            if misfits and getattr(options, name) not in (None, []):
                raise ConfigurationError(f"--{name.replace('_', '-')}: expected it only {where}")
    if options.episodes is not None and options.episodes < 1:
        raise ConfigurationError(f"--episodes: expected at least 1, got {options.episodes}")


def _loop(policy: Policy, options: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """The simulated arm's figures."""
    from ki_vla_ros.sim import sample_scene
    from training.evaluate.closed_loop import FIRST_SCENE, evaluate

    first = FIRST_SCENE if options.first_scene is None else options.first_scene
    split: Any = options.split or "held_out"
    count = options.episodes or 100
    delay_s = 0.03 if options.delay_s is None else options.delay_s
    chosen = {
        "bundle": policy.bundle.manifest.name,
        "episodes": count,
        "split": split,
        "first_scene": first,
        "delay_s": delay_s,
        "set": options.set,
        "flow_steps": options.flow_steps,
        "noise_seed": policy.noise_seed,
    }
    scenes = [sample_scene(seed, split=split) for seed in range(first, first + count)]
    return chosen | evaluate(policy, scenes, delay_s, settings)


def _roll_out_bundle(policy: Policy, options: argparse.Namespace) -> dict[str, Any]:
    manifest, act = policy.bundle.manifest, act_as(policy)
    if options.execute is not None and not 1 <= options.execute <= manifest.horizon:
        raise ConfigurationError(f"--execute: expected 1 to {manifest.horizon}, the horizon, got {options.execute}")

    def meet(environment: Environment, name: str) -> tuple[Act, Environment]:
        slowed = at_period(environment, manifest.robot.action_period_s)
        check_robot(manifest.robot, slowed, name)
        return act, slowed

    chosen = {
        "bundle": manifest.name,
        "execute": options.execute or max(1, manifest.horizon // 2),
        "flow_steps": policy.flow_steps,
        "noise_seed": policy.noise_seed,
    }
    return chosen | _roll_out(meet, options)


def _roll_out_served(options: argparse.Namespace) -> dict[str, Any]:
    from training.evaluate.served import meet, reached  # websockets and msgpack need not be there without it

    if options.execute is not None and options.execute < 1:
        raise ConfigurationError(f"--execute: expected at least 1, got {options.execute}")
    keys = options.policy_server_keys or "robot"
    with reached(options.policy_server, options.policy_server_token) as server:
        said = server.metadata().get("policy")
        chosen = {
            "policy_server": options.policy_server,
            "policy": said if isinstance(said, str) else None,
            "keys": keys,
            "execute": options.execute,
        }
        return chosen | _roll_out(partial(meet, server, keys), options)


def _roll_out(
    meet: Callable[[Environment, str], tuple[Act, Environment]], options: argparse.Namespace
) -> dict[str, Any]:
    """Figures of each environment, and over all of them. `meet`: what acts in one, which it may have slowed."""
    if options.out is not None and not options.out.absolute().parent.is_dir():
        raise ConfigurationError(f"--out {options.out}: expected a folder at {options.out.absolute().parent}, got none")
    first, count = HELD_OUT if options.seed is None else options.seed, options.episodes or 50
    seeds = range(first, first + count)
    chosen = {} if options.image_size is None else {"image_size": options.image_size}
    found: dict[str, dict[str, Any]] = {}
    began_s = time.monotonic()
    with Progress() as progress:
        for name in dict.fromkeys(options.environment):
            environment = open_environment(name, **chosen)
            try:
                act, environment = meet(environment, name)
                films = {}
                if options.video is not None:
                    films = {seed: options.video / f"{name.replace('/', '_')}_{seed}.mp4" for seed in seeds[:FILMED]}
                show = partial(_show, progress, name, count)
                found[name] = roll_out(act, environment, seeds, options.execute, films, show)
            finally:
                environment.close()
    successes, episodes = (sum(figures[key] for figures in found.values()) for key in ("successes", "episodes"))
    return {
        "seeds": [seeds[0], seeds[-1]],
        "image_size": options.image_size,
        "environments": found,
        "success_rate": successes / episodes,
        "success_95": wilson_95(successes, episodes),
        "wall_s": round(time.monotonic() - began_s, 1),
    }


def _show(progress: Progress, name: str, count: int, done: int) -> None:
    progress.show(f"{name}: {done} of {count} episodes", done / count)


if __name__ == "__main__":
    sys.exit(main())
