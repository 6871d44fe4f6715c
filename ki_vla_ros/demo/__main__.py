"""The demo: a simulated arm does what it is told, over ROS, and the run is measured, recorded and filmed.

    python -m ki_vla_ros.demo [--episodes 20] [--instruction "touch the blue ball"] [--seed 0] [--no-video]

It starts the simulator and the policy as child processes, leads them through the episodes and stops them, whatever
happens. All results go to --out: summary.json, index.html, demo.mp4, bag/ (mcap, for Foxglove), log/.
"""

from __future__ import annotations

import argparse
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, get_args

import numpy as np

from ki_vla_ros.bags.writer import BagWriter
from ki_vla_ros.bundle import file_sha256, load_bundle
from ki_vla_ros.console import ExitCode, Progress, run_command
from ki_vla_ros.demo.driver import ARM, POLICY, TOPICS, Driver, Observed
from ki_vla_ros.demo.report import DemoRun, EpisodeResult, rate_hz, write_report
from ki_vla_ros.demo.video import import_av, make_video
from ki_vla_ros.errors import ConfigurationError, KiVlaError
from ki_vla_ros.ros.children import Child, ChildError, Children, prepare_environment
from ki_vla_ros.share import find_bundle, find_share
from ki_vla_ros.sim import TIME_LIMIT_S, TIMESTEP_S, Demonstrator, Split, Task, World, sample_scene
from ki_vla_ros.statistics import spread

SEEDS_PER_RUN: Final = 100_000
FIRST_CHUNK_LIMIT_S: Final = 5.0
# The judge ends every episode after TIME_LIMIT_S of simulated time; after this much real time the simulator must be
# stuck or far too slow.
EPISODE_LIMIT_S: Final = 10.0 * TIME_LIMIT_S
# A reset moves the arm at once; the policy must not begin with images from before it, and takes half a second to
# believe that the arm is elsewhere.
SETTLE_S: Final = 0.75
# The recording goes on for a moment after the verdict, so that the film shows it.
LINGER_S: Final = 1.0
VIDEO: Final = "demo.mp4"


@dataclass(frozen=True, slots=True)
class DemoOptions:
    episodes: int
    instruction: str
    seed: int
    split: Split
    bundle: Path
    out: Path
    params: Path
    video: bool

    @property
    def seeds(self) -> range:
        """Scene seeds of the episodes; runs with different --seed share none."""
        return range(self.seed * SEEDS_PER_RUN, self.seed * SEEDS_PER_RUN + self.episodes)


def parse_options(arguments: Sequence[str] | None) -> DemoOptions:
    """The options; KiVlaError for anything that would fail later, before any process is started."""
    parser = argparse.ArgumentParser(
        prog="python -m ki_vla_ros.demo", description="A simulated arm does what it is told, over ROS."
    )
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--instruction", default="", help="the same in every episode; default: drawn with each scene")
    parser.add_argument("--seed", type=int, default=0, help="0 to 2**32 - 1; no two seeds share a scene")
    parser.add_argument(
        "--split",
        choices=get_args(Split),
        help="combinations of colour and shape to ask for; default: those held out of training, all with --instruction",
    )
    parser.add_argument("--bundle", default="demo", help="folder of a model bundle, or the name of one in models/")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for the results")
    parser.add_argument("--params", type=Path, help="ROS parameter file for both nodes; default: config/demo.yaml")
    parser.add_argument("--no-video", dest="video", action="store_false")
    given = parser.parse_args(arguments)
    ranges = {"episodes": (1, SEEDS_PER_RUN), "seed": (0, 2**32 - 1)}
    for name, (low, high) in ranges.items():
        value = getattr(given, name)
        if not low <= value <= high:
            raise ConfigurationError(f"--{name} {value}: expected {low} to {high}")
    instruction = Task.parse(given.instruction).instruction if given.instruction else ""
    params = given.params or find_share("config/demo.yaml")
    if not params.is_file():
        raise ConfigurationError(f"--params {params}: no such file; leave it out for config/demo.yaml")
    options = DemoOptions(
        episodes=given.episodes,
        instruction=instruction,
        seed=given.seed,
        split=given.split or ("all" if instruction else "held_out"),
        bundle=find_bundle(given.bundle),
        out=given.out,
        params=params,
        video=given.video,
    )
    sample_scene(0, split=options.split, task=Task.parse(instruction) if instruction else None)
    if options.video:
        import_av()
    return options


def run(options: DemoOptions) -> dict[str, Any]:
    """Runs the whole demo; returns the summary."""
    bundle = load_bundle(options.bundle)
    clear_results(options.out)
    shared = prepare_environment(options.out)
    episodes: list[EpisodeResult] = []
    observed: list[Observed] = []
    line = StatusLine(options.episodes)
    with line, Children(options.out / "log") as children, Driver(children.check) as driver:
        if shared:
            driver.check_alone()
        print(f"starting the simulated arm and the policy with bundle {bundle.manifest.name}", flush=True)
        arguments = ["--ros-args", "--params-file", str(options.params)]
        children.start(ARM, "ki_vla_ros.sim.arm_node", arguments)
        chosen = ["-p", f"bundle:={options.bundle.resolve()}", "-p", "autostart:=false", "-p", "instruction:=''"]
        policy = children.start(POLICY, "ki_vla_ros.ros.node", [*arguments, *chosen])
        driver.wait_until_up()
        with naming_the_cause(policy):
            driver.configure()
        with recording(driver, options.out / "bag"), naming_the_cause(policy):
            for seed in options.seeds:
                has_acted = any(before.chunk_times_s for before in observed)
                episode, seen = run_episode(driver, options, seed, line, has_acted)
                episodes.append(episode)
                observed.append(seen)
                line.finish(episode)
        overruns = driver.overruns
    print("comparing with the demonstrator" + (", making the film" if options.video else ""), flush=True)
    demonstrator_success = run_demonstrator(options)
    if options.video:
        make_video(options.out / "bag", options.out / VIDEO, options.episodes)
    sha256 = file_sha256(options.bundle / "manifest.json")
    name = bundle.manifest.name
    results = DemoRun(episodes, observed, demonstrator_success, options.seed, options.split, name, sha256, overruns)
    return write_report(options.out, results, VIDEO if options.video else None)


def run_episode(
    driver: Driver, options: DemoOptions, seed: int, line: StatusLine, has_acted: bool = False
) -> tuple[EpisodeResult, Observed]:
    """Runs one scene from reset to verdict; `has_acted`: the policy has made a chunk in an earlier episode."""
    scene = driver.reset(seed, options.split, options.instruction)
    instruction = scene["instruction"]
    driver.instruct(instruction)
    driver.sleep(SETTLE_S)
    driver.activate()
    began_s = time.monotonic()
    while not (status := driver.status)["done"]:
        driver.sleep(0.05)
        seen, waited_s = driver.observed, time.monotonic() - began_s
        # A policy that never made a chunk does not work at all; later, one that is held only fails this episode.
        if not (seen.chunk_times_s or has_acted) and waited_s > FIRST_CHUNK_LIMIT_S:
            reason = (seen.ticks[-1]["hold"] or "its ticks make no chunk") if seen.ticks else "it makes no ticks"
            raise KiVlaError(f"the policy published no chunk within {FIRST_CHUNK_LIMIT_S:g} s: {reason}")
        if waited_s > EPISODE_LIMIT_S:
            raise KiVlaError(f"the simulator gave no verdict within {EPISODE_LIMIT_S:g} s; is the machine overloaded?")
        line.update(instruction, seen)
    driver.sleep(LINGER_S)
    seen = driver.deactivate()
    told = {tick["instruction"] for tick in seen.ticks if tick["chunk_index"] is not None}
    if not told <= {instruction}:
        raise KiVlaError(f"the policy was told {instruction!r}, but acted on {sorted(told)}")
    reached = None if status["reached"] is None else status["objects"][status["reached"]]
    episode = EpisodeResult(
        seed=seed,
        instruction=instruction,
        objects=len(status["objects"]),
        reached=f"{reached['colour']} {reached['shape']}" if reached else None,
        followed=status["reached"] == status["target"],
        success=status["success"],
        time_s=status["time_s"],
    )
    return episode, seen


def run_demonstrator(options: DemoOptions) -> list[bool]:
    """Whether the demonstrator succeeds in each of the run's scenes, simulated without images as fast as possible."""
    world = World(render=False)
    task = Task.parse(options.instruction) if options.instruction else None
    outcomes = []
    for seed in options.seeds:
        scene = sample_scene(seed, split=options.split, task=task)
        world.reset(scene)
        demonstration = Demonstrator(world).plan(world.joint_position_J, None, scene)
        for command_J in demonstration.sample(np.arange(TIMESTEP_S, TIME_LIMIT_S + 2 * TIMESTEP_S, TIMESTEP_S)):
            world.step(command_J)
            if world.judge.done:
                break
        outcomes.append(world.judge.success)
    return outcomes


class StatusLine(Progress):
    """Shows the present episode's figures and the score; without a terminal, only one line per finished episode."""

    def __init__(self, episodes: int) -> None:
        super().__init__(sys.stdout, line_every_s=math.inf)
        self._episodes = episodes
        self._finished: list[EpisodeResult] = []
        self._figures = ""

    def update(self, instruction: str, seen: Observed) -> None:
        ticks_ms = [tick["stage_ms"]["total"] for tick in seen.ticks if tick["chunk_index"] is not None]
        if ticks_ms:
            tick = spread(ticks_ms)
            self._figures = (
                f"{rate_hz([seen.chunk_times_s]):4.1f} Hz, tick {tick['p50']:.0f}/{tick['p99']:.0f} ms p50/p99"
            )
        number = len(self._finished) + 1
        self.show(f"{self._place(number)} {instruction:<26} {self._figures} | {self._score()}")

    def finish(self, episode: EpisodeResult) -> None:
        self._finished.append(episode)
        outcome = "success" if episode.success else f"reached {episode.reached}" if episode.reached else "time is up"
        place = self._place(len(self._finished))
        self.keep(f"{place} {episode.instruction:<26} {self._figures} | {self._score()} | {outcome}")

    def _place(self, number: int) -> str:
        return f"[{number:>{len(str(self._episodes))}}/{self._episodes}]"

    def _score(self) -> str:
        return f"success {sum(episode.success for episode in self._finished)}/{len(self._finished)}"


@contextmanager
def recording(driver: Driver, bag: Path) -> Iterator[None]:
    writer = BagWriter(bag, {topic: kind for topic, (_, kind) in TOPICS.items()}, print)
    driver.record(writer.write)
    try:
        yield
    finally:
        driver.record(None)
        writer.close()


@contextmanager
def naming_the_cause(policy: Child) -> Iterator[None]:
    """Adds the last error in the policy's log to a KiVlaError; a ChildError already has it."""
    try:
        yield
    except ChildError:
        raise
    except KiVlaError as error:
        cause = policy.last_error()
        raise KiVlaError(f"{error}; {policy.log} says: {cause}" if cause else str(error)) from error


def clear_results(out: Path) -> None:
    """Removes an earlier run's results from `out`; raises ConfigurationError rather than remove anything else."""
    bag = out / "bag"
    foreign = [path for path in bag.glob("*") if path.name != "metadata.yaml" and path.suffix != ".mcap"]
    if foreign:
        raise ConfigurationError(
            f"--out {out}: expected only an earlier demo's files in bag/, got {foreign[0]}; choose another folder"
        )
    if bag.exists():
        shutil.rmtree(bag)
    for name in ("summary.json", "index.html", VIDEO):
        (out / name).unlink(missing_ok=True)


def describe(summary: dict[str, Any], out: Path) -> str:
    """The run in three lines."""
    tick = summary["tick_ms"]
    return (
        f"followed {summary['follow_rate']:.0%} (chance {summary['chance_follow_rate']:.0%}), "
        f"success {summary['success_rate']:.0%} (demonstrator {summary['demonstrator_success_rate']:.0%})\n"
        f"{summary['chunk_rate_hz']:.2f} chunks/s, tick p50 {tick['p50']:.1f} ms, p99 {tick['p99']:.1f} ms, "
        f"{summary['deadline_misses']} deadlines missed, cameras {summary['camera_rate_hz']:.1f} Hz\n"
        f"see {out / 'index.html'}; play {out / 'bag'} in Foxglove"
    )


def interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 after all episodes, whatever their outcome; otherwise as `run_command` says."""
    signal.signal(signal.SIGTERM, interrupt)
    return run_command("demo", partial(_demonstrate, arguments), "interrupted; all processes were stopped")


def _demonstrate(arguments: Sequence[str] | None) -> int:
    options = parse_options(arguments)
    print(describe(run(options), options.out))
    return ExitCode.FINE


if __name__ == "__main__":
    sys.exit(main())
