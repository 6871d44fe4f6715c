"""Make the demo's data with the simulator: a LeRobot dataset, another to validate on, and questions about scenes.

python -m training.data.simulated out/data/demo

The same command again makes nothing anew; with other settings, all of it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ki_vla_ros.console import ExitCode, run_command
from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.robot import find_robot, read_robot
from ki_vla_ros.share import expand
from training.data.simulated.folder import HELD_OUT_OF, Settings, make_folder
from training.data.simulated.generate import RENDER_SIZE, Sizes, check_robot


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.data.simulated",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, help="a folder; data from other settings in it are replaced")
    for name, default, what in (
        ("--robot-episodes", 6000, "demonstrations in robot/"),
        ("--frames", 10, "frames around each demonstration"),
        ("--scenes", 16000, "random scenes"),
        ("--questions", 4, "questions about each scene"),
        ("--validation", 60, "demonstrations on held-out combinations in validation/"),
        ("--image-size", 96, "side of all images, in pixels"),
        ("--grid", 8, "image cells along one side: the model's image_size / patch_size"),
        ("--horizon", None, "actions of a chunk; without it, as the robot file says"),
        ("--workers", 2, "processes"),
    ):
        parser.add_argument(name, type=_positive, default=default, help=f"{what} ({default})" if default else what)
    parser.add_argument("--seed", type=int, default=0, help="another one makes other data (0)")
    parser.add_argument(
        "--split",
        choices=HELD_OUT_OF,
        default="train",
        help="what is commanded in robot/; known: nothing there is of the novel colour, which scenes show (train)",
    )
    parser.add_argument("--robot", default="demo_arm", help="robot file of the simulated arm (demo_arm)")
    return run_command("simulated", partial(_make, parser.parse_args(arguments)))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {value}")
    return value


def _make(options: argparse.Namespace) -> int:
    robot = read_robot(find_robot(options.robot))
    check_robot(robot)
    if options.image_size > RENDER_SIZE:
        raise ConfigurationError(
            f"--image-size: expected at most {RENDER_SIZE}, as the cameras have, got {options.image_size}"
        )
    if RENDER_SIZE % options.grid:
        raise ConfigurationError(f"--grid: expected a divisor of {RENDER_SIZE}, got {options.grid}")
    sizes = Sizes(options.image_size, options.grid, options.horizon or robot.horizon, robot.action_period_s)
    settings = Settings(
        options.robot_episodes,
        options.frames,
        options.scenes,
        options.questions,
        options.validation,
        options.seed,
        robot.name,
        sizes,
        options.split,
    )
    print(json.dumps(make_folder(expand(options.out), settings, robot, options.workers), indent=1))
    return ExitCode.FINE


if __name__ == "__main__":
    sys.exit(main())
