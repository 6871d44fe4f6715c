"""A bundle in closed loop, without ROS and in simulated time.

python -m training.evaluate BUNDLE --environment aloha/transfer_cube --episodes 50 --out FILE.json
python -m training.evaluate BUNDLE --protocol metaworld_mt50 --workers 4 --out FILE.json --video FOLDER
python -m training.evaluate --policy-server ws://127.0.0.1:8000 --environment aloha/transfer_cube
python -m training.evaluate --expert --protocol metaworld_mt50
python -m training.evaluate models/demo --episodes 100

With --environment or --protocol (a file, or one of config/benchmarks/): success over held-out starts, each chunk
executed without delay. FILE.json has each episode as soon as it is over, and the same command goes on from there.
Without: the demo's arm through the robot's own loop, with its delay.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from ki_vla_ros.bundle import load_bundle
from ki_vla_ros.console import ExitCode, run_command
from ki_vla_ros.errors import ConfigurationError, describe_validation
from ki_vla_ros.policy import Policy
from ki_vla_ros.settings import Settings, read_changes
from training.evaluate.drivers import OWN, Chosen, open_policy, read_settings
from training.evaluate.environments import HELD_OUT
from training.evaluate.protocol import Protocol, find_protocol, read_protocol
from training.evaluate.trials import Films, run_protocol

FILMED: Final = 3  # episodes of each environment
MOST_DELAY_S: Final = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, nargs="?", help="or --policy-server, or --expert")
    parser.add_argument(
        "--episodes",
        type=int,
        metavar="N",
        help="of each environment; default 50 in environments, else 100; with "
        "--protocol: the first N of its trials, the others later",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a node parameter, e.g. engine=torch"
    )
    parser.add_argument("--flow-steps", type=int, help="as --set flow_steps=N; default: what the bundle says")
    parser.add_argument("--noise-seed", type=int, help="as --set noise_seed=N; default 0")
    rolled = parser.add_argument_group("in environments")
    rolled.add_argument("--environment", nargs="+", metavar="ENV", help="a wrong name lists them")
    rolled.add_argument("--protocol", metavar="NAME", help="a benchmark in place of --environment")
    rolled.add_argument("--out", type=Path, metavar="FILE.json", help="goes on from what is there; default: none")
    rolled.add_argument("--workers", type=int, help="processes; the figures are the same (default 1)")
    rolled.add_argument("--ray", metavar="ADDRESS", help="a Ray cluster in place of --workers (auto: of this machine)")
    rolled.add_argument("--execute", type=int, metavar="N", help="actions of a chunk; default: half of them")
    rolled.add_argument("--video", type=Path, metavar="FOLDER", help="films of episodes, failures first")
    rolled.add_argument("--videos", type=int, metavar="N", help=f"so many of each environment (default {FILMED})")
    rolled.add_argument("--seed", type=int, help=f"of the first episode; default {HELD_OUT}, the first held-out one")
    rolled.add_argument("--image-size", type=int, metavar="PIXELS", help="longer side; default: the environment's own")
    rolled.add_argument(
        "--expert", action="store_true", default=None, help="the environment's own in place of a policy: a bound"
    )
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
    return run_command(
        "evaluate",
        partial(_evaluate, parser.parse_args(arguments)),
        "interrupted; with --out the episodes that are over are kept, and the same command goes on",
    )


def _evaluate(options: argparse.Namespace) -> int:
    _check(options)
    chosen = Chosen(
        options.bundle,
        tuple(_parameters(options)),
        options.policy_server,
        options.policy_server_keys or "robot",
        options.policy_server_token,
    )
    if options.environment or options.protocol:
        films = None
        if options.video is not None:
            films = Films(options.video, options.videos or FILMED)
        now = options.episodes if options.protocol else None
        figures = run_protocol(_protocol(options), chosen, options.out, options.workers or 1, films, now, options.ray)
    else:
        bundle = load_bundle(options.bundle)
        figures = _loop(open_policy(chosen, bundle), options, read_settings(chosen, bundle))
    print(json.dumps(figures, indent=1))
    return ExitCode.FINE


def _parameters(options: argparse.Namespace) -> list[str]:
    """Of --set, and of the options that are short for it. ConfigurationError for one that is given in both ways."""
    changed = read_changes(options.set)
    if twice := [name for name in OWN if name in changed and getattr(options, name) is not None]:
        raise ConfigurationError(f"{_spell(twice[0])}: expected it once, got --set {twice[0]}={changed[twice[0]]}, too")
    short = [f"{name}={getattr(options, name)}" for name in OWN if getattr(options, name) is not None]
    return [*options.set, *short]


def _check(options: argparse.Namespace) -> None:
    """ConfigurationError for options that do not go together."""
    given = [name for name in ("bundle", "policy_server", "expert") if getattr(options, name) is not None]
    if len(given) != 1:
        got = " and ".join(given) if given else "none of them"
        raise ConfigurationError(f"expected one of a bundle, --policy-server and --expert, got {got}")
    if options.environment and options.protocol:
        raise ConfigurationError("expected --environment or --protocol, got both")
    rolled = bool(options.environment or options.protocol)
    if not rolled and options.bundle is None:
        raise ConfigurationError(f"{_spell(given[0])}: expected --environment or --protocol with it, got neither")
    in_environments = ("out", "execute", "video", "videos", "seed", "image_size", "workers", "ray")
    misplaced = [
        (("split", "first_scene", "delay_s"), "without --environment and --protocol", rolled),
        (in_environments, "with --environment or --protocol", not rolled),
        (("ray",), "without --workers", options.workers is not None),
        (("seed",), "without --protocol, which has its own", bool(options.protocol)),
        (("videos",), "with --video", options.video is None),
        (("execute",), "with a policy", bool(options.expert)),
        (("policy_server_keys", "policy_server_token"), "with --policy-server", options.policy_server is None),
        (("set", "flow_steps", "noise_seed"), "with a bundle", options.bundle is None),
    ]
    for names, where, misfits in misplaced:
        for name in names:
            if misfits and getattr(options, name) not in (None, []):
                raise ConfigurationError(f"{_spell(name)}: expected it only {where}")
    counts = ("episodes", "execute", "videos", "workers", "image_size")
    for name, least in (*dict.fromkeys(counts, 1).items(), ("seed", 0), ("first_scene", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigurationError(f"{_spell(name)}: expected at least {least}, got {value}")
    if options.delay_s is not None and not 0.0 <= options.delay_s <= MOST_DELAY_S:
        raise ConfigurationError(f"--delay-s: expected 0 to {MOST_DELAY_S:g}, got {options.delay_s}")
    if options.out is not None and not options.out.absolute().parent.is_dir():
        raise ConfigurationError(f"--out {options.out}: expected a folder at {options.out.absolute().parent}, got none")


def _spell(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _protocol(options: argparse.Namespace) -> Protocol:
    """That of the file, or one of the options, which also say what is a policy's own."""
    own = {name: getattr(options, name) for name in ("execute", "image_size") if getattr(options, name) is not None}
    if options.protocol:
        return read_protocol(find_protocol(options.protocol)).model_copy(update=own)
    own |= {"trials": options.episodes or 50}
    own |= {} if options.seed is None else {"first_seed": options.seed}
    try:
        return Protocol(name="environments", tasks={"all": tuple(dict.fromkeys(options.environment))}, **own)
    except ValidationError as error:
        raise ConfigurationError(describe_validation(error, Protocol)) from error


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
        "set": _parameters(options),
        "flow_steps": policy.flow_steps,
        "noise_seed": policy.noise_seed,
    }
    scenes = [sample_scene(seed, split=split) for seed in range(first, first + count)]
    return chosen | evaluate(policy, scenes, delay_s, settings)


if __name__ == "__main__":
    sys.exit(main())
