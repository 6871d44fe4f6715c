"""Demonstrations of the scripted experts of environments, as a LeRobot dataset.

python -m training.demonstrations aloha/transfer_cube --episodes 50 --out DATASET

Episode n of an environment starts with seed --seed + n; the episodes of one environment follow those of another. An
episode goes on for --linger after its success, so that a policy sees how it ends. Where the expert fails, the episode
is left out, counted and named. With --noise, what is executed differs from what the expert wanted, which is what is
recorded: a policy then sees the way back from mistakes (DART, arXiv 1703.09327). The dataset is the same whatever
--workers is, and is there as a whole or not at all.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.console import ExitCode, Progress, run_command
from ki_vla_ros.errors import ConfigurationError, SimulationError
from ki_vla_ros.records import to_ns
from ki_vla_ros.robot import ActionDimension, Robot
from training.convert import PAUSE_NS, START_NS, DatasetWriter, Frame
from training.data.lerobot import PLACE, RobotColumns
from training.evaluate import HELD_OUT, Environment, open_environment
from training.workers import share_out

NOISE_HOLD_S: Final = 0.2
"""How long noise pushes into one direction: an arm would filter out what changes with every action."""


@dataclass(frozen=True)
class Recipe:
    """What decides an episode beside its environment and its seed."""

    image_size: int | None = None
    cameras: tuple[str, ...] | None = None
    noise: float = 0.0
    noise_hold_s: float = NOISE_HOLD_S
    linger_s: float = 1.0

    @property
    def options(self) -> dict[str, Any]:
        given = {"image_size": self.image_size, "cameras": self.cameras}
        return {name: value for name, value in given.items() if value is not None}


@dataclass
class Recorded:
    """One episode: images [H, W, 3] by camera, states [S] and the expert's actions [D], one of each per period."""

    name: str
    seed: int
    robot: Robot
    task: str
    images: list[dict[str, NDArray[np.uint8]]] = field(default_factory=list)
    state_NS: list[NDArray[np.float64]] = field(default_factory=list)
    action_ND: list[NDArray[np.float64]] = field(default_factory=list)
    place_N2: list[tuple[float, float]] = field(default_factory=list)  # in the last image; nan: nobody says
    fault: str | None = "no success within the time limit"


def record_episode(environment: Environment, name: str, seed: int, recipe: Recipe) -> Recorded:
    """From the start of `seed` to `recipe.linger_s` after the success, or to the time limit."""
    environment.reset(seed)
    robot, period_s = environment.robot, environment.robot.action_period_s
    shown = last_camera(robot, recipe)
    episode = Recorded(name, seed, robot, environment.instruction)
    scale_D = recipe.noise * action_scale(robot)
    low_D, high_D = np.array([action.span for action in robot.actions]).T
    rng = np.random.default_rng([seed, 13])
    kept = np.exp(-period_s / recipe.noise_hold_s) if recipe.noise_hold_s else 0.0
    push_D = rng.standard_normal(len(robot.actions))
    remaining = round(environment.time_limit_s / period_s)
    while remaining > 0:
        images, state_S = environment.observe()
        try:
            action_D = environment.demonstrate()
        except SimulationError as error:
            episode.fault = str(error)
            break
        episode.images.append(dict(images))
        episode.state_NS.append(state_S)
        episode.action_ND.append(action_D)
        episode.place_N2.append(environment.place(shown) or (np.nan, np.nan))
        environment.step(np.clip(action_D + scale_D * push_D, low_D, high_D) if recipe.noise else action_D)
        push_D = kept * push_D + np.sqrt(1.0 - kept**2) * rng.standard_normal(len(robot.actions))
        remaining -= 1
        if episode.fault and environment.success:
            episode.fault = None
            remaining = min(remaining, round(recipe.linger_s / period_s))
    return episode


def last_camera(robot: Robot, recipe: Recipe) -> str:
    """Of those that are drawn, that whose image stands beside the prompt: hints are about it."""
    return [name for name in robot.camera_names if recipe.cameras is None or name in recipe.cameras][-1]


def action_scale(robot: Robot) -> NDArray[np.float64]:
    """What noise is a share of [D]: half of what an action can be.

    That is half the way between its limits, its highest velocity, or how far its pose may go in one period.
    """
    return np.array([_scale(robot, action) for action in robot.actions])


def _scale(robot: Robot, action: ActionDimension) -> float:
    if action.kind in ("joint_velocity", "twist"):
        assert action.max_velocity is not None
        return action.max_velocity
    if action.kind in ("pose", "pose_delta"):
        output = next(output for output in robot.outputs if output.name == action.output)
        linear = action.component in ("x", "y", "z")
        velocity = output.max_linear_velocity if linear else output.max_angular_velocity
        assert velocity is not None
        return velocity * robot.action_period_s
    low, high = action.span
    return (high - low) / 2.0 if np.isfinite(high - low) else np.pi  # a joint that turns without end


_opened: dict[tuple[str, Recipe], Environment] = {}


def _record(name: str, recipe: Recipe, seed: int) -> Recorded:
    """In a worker, which keeps the environment that it opened last."""
    if (name, recipe) not in _opened:
        _close()
        _opened[name, recipe] = open_environment(name, **recipe.options)
    return record_episode(_opened[name, recipe], name, seed, recipe)


def _close() -> None:
    for environment in _opened.values():
        environment.close()
    _opened.clear()


def record_episodes(names: Sequence[str], seeds: Sequence[int], recipe: Recipe, workers: int) -> Iterator[Recorded]:
    """All episodes of the first environment, then those of the next; in this order, whoever makes them."""
    jobs = ((name, recipe, seed) for name in names for seed in seeds)
    try:
        yield from share_out(_record, jobs, workers)
    finally:  # as the interpreter ends, GL can no longer be closed
        _close()


def check_environments(names: Sequence[str], recipe: Recipe) -> tuple[Robot, int, bool]:
    """Their robot, its frames per second, and whether any says where its object is.

    ConfigurationError if they have not the same robot.
    """
    robots: dict[str, Robot] = {}
    places = False
    for name in names:
        environment = open_environment(name, **recipe.options)
        environment.reset(0)
        robots[name] = environment.robot
        places |= environment.place(last_camera(environment.robot, recipe)) is not None
        environment.close()
    first = next(iter(robots))
    for name, robot in robots.items():
        if robot != robots[first]:
            raise ConfigurationError(
                f"environment {name}: expected the robot of {first}, {robots[first].name}, got {robot.name}; make "
                "a dataset of each, and train on both"
            )
    fps = 1.0 / robots[first].action_period_s
    if abs(fps - round(fps)) > 1e-6:
        raise ConfigurationError(
            f"robot {robots[first].name}: expected an action_period_s of a whole number of frames per second, got "
            f"{robots[first].action_period_s}"
        )
    return robots[first], round(fps), places


def write_demonstrations(
    names: Sequence[str],
    seeds: Sequence[int],
    recipe: Recipe,
    out: Path,
    workers: int,
    keep_failures: bool = False,
) -> dict[str, dict[str, Any]]:
    """Write the dataset; by environment its `episodes` and `frames`, and `failed`: why, by seed."""
    robot, fps, places = check_environments(names, recipe)
    columns = RobotColumns(robot)
    found: dict[str, dict[str, Any]] = {name: {"episodes": 0, "frames": 0, "failed": {}} for name in names}
    drawn = [c for c in robot.cameras if c.name in (recipe.cameras or robot.camera_names)]
    source = {
        "demonstrations": {"seeds": [min(seeds), max(seeds)], **asdict(recipe), "environments": found},
        "units": columns.units,
        "robot": robot.model_dump(mode="json", exclude_defaults=True),
    }
    with (
        DatasetWriter(
            out,
            fps=fps,
            columns={**columns.names, **({PLACE: ["u", "v"]} if places else {})},
            cameras={camera.name: camera.key for camera in drawn},
            source=source,
            robot_type=robot.name,
            keep_begun=False,
        ) as writer,
        Progress() as progress,
    ):
        stamp_ns, total = START_NS, len(names) * len(seeds)
        for done, episode in enumerate(record_episodes(names, seeds, recipe, workers)):
            progress.show(f"{done + 1} of {total} episodes", (done + 1) / total)
            entry = found[episode.name]
            if episode.fault is not None:
                entry["failed"][str(episode.seed)] = episode.fault
                if not keep_failures:
                    continue
            rows = columns.rows(np.array(episode.state_NS), np.array(episode.action_ND))
            for n, images in enumerate(episode.images):
                values = {column: row_NE[n] for column, row_NE in rows.items()}
                if places:
                    values[PLACE] = np.array(episode.place_N2[n], dtype=np.float32)
                writer.add(Frame(stamp_ns, episode.task, values, images))
                stamp_ns += to_ns(robot.action_period_s)
            writer.end_episode()
            stamp_ns += PAUSE_NS
            entry["episodes"] += 1
            entry["frames"] += len(episode.images)
        if empty := [name for name, entry in found.items() if not entry["episodes"]]:
            raise SimulationError(
                f"environment {empty[0]}: expected an episode that its expert solves, got none in {len(seeds)} "
                f"(seed {seeds[0]}: {found[empty[0]]['failed'][str(seeds[0])]}); nothing was written"
            )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.demonstrations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("environments", nargs="+", metavar="ENV", help="of one robot; a wrong name lists them")
    parser.add_argument("--episodes", type=int, required=True, help="of each environment")
    parser.add_argument("--out", type=Path, required=True, help="folder of the dataset")
    parser.add_argument("--seed", type=int, default=0, help=f"of the first episode; below {HELD_OUT}")
    parser.add_argument(
        "--noise", type=float, default=0.0, metavar="SHARE", help="of half of what each action can be; 0.01, say"
    )
    parser.add_argument(
        "--noise-hold",
        type=float,
        default=NOISE_HOLD_S,
        metavar="S",
        help=f"how long it pushes into one direction (default {NOISE_HOLD_S}); 0: another with each action",
    )
    parser.add_argument("--linger", type=float, default=1.0, metavar="S", help="recorded after the success (default 1)")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="longer side; default: the environment's own")
    parser.add_argument("--camera", action="append", metavar="NAME", help="only these; default: all of the robot's")
    parser.add_argument("--keep-failures", action="store_true", help="episodes that the expert does not solve, too")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    return run_command(
        "demonstrations", partial(_run, parser.parse_args(arguments)), "interrupted; nothing was written"
    )


def _run(options: argparse.Namespace) -> int:
    for name, low, high in (
        ("episodes", 1, HELD_OUT),
        ("seed", 0, HELD_OUT - options.episodes),  # the others are for evaluation
        ("workers", 1, 256),
        ("noise", 0.0, 1.0),
        ("noise_hold", 0.0, 60.0),
        ("linger", 0.0, 60.0),
        ("image_size", 16, 1280),
    ):
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            raise ConfigurationError(f"--{name.replace('_', '-')}: expected {low} to {high}, got {value}")
    names = list(dict.fromkeys(options.environments))
    cameras = tuple(dict.fromkeys(options.camera)) if options.camera else None
    recipe = Recipe(options.image_size, cameras, options.noise, options.noise_hold, options.linger)
    seeds = range(options.seed, options.seed + options.episodes)
    began_s = time.monotonic()
    found = write_demonstrations(names, seeds, recipe, options.out, options.workers, options.keep_failures)
    for name, entry in found.items():
        print(f"{name}: {entry['episodes']} episodes, {entry['frames']} frames, {len(entry['failed'])} failed")
        for seed, fault in entry["failed"].items():
            print(f"  seed {seed}: {fault}")
    print(f"{options.out}: {time.monotonic() - began_s:.0f} s")
    return ExitCode.FOUND if any(entry["failed"] for entry in found.values()) else ExitCode.FINE


if __name__ == "__main__":
    # What other processes are to call must have a name that they can import, which `__main__` is not.
    from training import demonstrations as command

    sys.exit(command.main())
