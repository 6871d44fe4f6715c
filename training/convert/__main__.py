"""From bags to a LeRobot dataset (v3.0), and back.

    python -m training.convert from-bag BAG... --actions commands --out DATASET [--bundle B] [--params P.yaml]
    python -m training.convert to-bag DATASET --out BAG

docs/data.md explains topics, episodes and actions.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

from ki_vla_ros.bags import Bag, find_session, open_bag
from ki_vla_ros.console import ExitCode, run_command
from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.settings import NODE, Settings, load_settings
from training.convert.episodes import Actions, Conversion, Cut, Marker, convert
from training.convert.playback import write_bag
from training.convert.sources import (
    Sources,
    from_session,
    from_settings,
    read_manifest,
)
from training.convert.writer import DatasetWriter
from training.data.lerobot import Dataset, Video


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, or as `run_command` says."""
    arguments = parse(argv)
    left = "the bag has what was written so far, and no index"
    if arguments.command == "from-bag":
        left = "the frames written so far, if any, are a valid dataset"
    return run_command("convert", partial(_convert, arguments), f"stopped; {left}")


def _convert(arguments: argparse.Namespace) -> int:
    if arguments.command == "to-bag":
        dataset = Dataset(arguments.dataset)
        print(f"{arguments.out}: {write_bag(dataset, arguments.out)} messages")
        for key, reason in dataset.ignored.items():
            print(f"  not in it: {key}, {reason}")
    else:
        convert_bags(arguments)
    return ExitCode.FINE


def convert_bags(arguments: argparse.Namespace) -> None:
    """Convert all bags into one dataset, and print what became of each."""
    with open_bag(arguments.bags[0]) as bag:
        first = choose_sources(arguments, bag)
    cut = {"cut": arguments.episodes, "actions": arguments.actions, "fps": arguments.fps, "task": arguments.task}
    source = {
        "bags": [str(Path(bag).name) for bag in arguments.bags],
        "topics": {
            "cameras": dict(first.cameras),
            "joint_states": first.joint_topic,
            "instruction": first.instruction_topic,
            "command": first.command_topic,
        },
        "actions": arguments.actions,
        "sync_slop_s": first.slop_ns / 1e9,
        "max_age_s": first.max_age_ns / 1e9,
    }
    marker = Marker(*arguments.marker) if arguments.marker else None
    with DatasetWriter(
        arguments.out,
        fps=arguments.fps,
        state_names=first.joints,
        action_names=first.joints,
        cameras=list(first.cameras),
        source=source,
        robot_type=arguments.robot_type,
        video=arguments.video,
    ) as writer:
        for path in arguments.bags:
            with open_bag(path) as bag:
                try:
                    sources = choose_sources(arguments, bag)
                    if (sources.joints, list(sources.cameras)) != (first.joints, list(first.cameras)):
                        raise ConfigurationError(
                            f"bag {path}: expected the joints and cameras of {arguments.bags[0]}, got "
                            f"{', '.join((*sources.joints, *sources.cameras))}; convert it into a separate dataset"
                        )
                    done = convert(bag, sources, writer, marker=marker, least_frames=arguments.least_frames, **cut)
                    print(f"{path}: {describe(done)}")
                finally:
                    for fault in bag.faults:
                        print(f"  {path}: {fault}")
    print(f"{arguments.out}: {writer.info.fps} frames per second, {len(writer.episodes)} episodes")


def describe(done: Conversion) -> str:
    lines = [f"{done.frames} frames in {done.episodes} episodes"]
    if done.repeated:
        lines[0] += f", {done.repeated} with the same images as the frame before (is --fps above the cameras' rate?)"
    for cause, count in done.left_out.most_common():
        example = done.first_reason.get(cause)
        lines.append(f"left out: {count} x {cause}" + (f" (the first: {example})" if example else ""))
    return "\n  ".join(lines)


def choose_sources(arguments: argparse.Namespace, bag: Bag) -> Sources:
    """Sources from --params, else the bag's own ~/session, else the defaults; single options override these."""
    node = arguments.node or NODE
    session = None if arguments.params else find_session(bag, arguments.node)
    warn = partial(print, file=sys.stderr)
    settings = load_settings(arguments.params, node, warn) if arguments.params else Settings()
    name = arguments.bundle or (session.settings if session else settings).bundle
    manifest = read_manifest(name) if name else None
    cameras = dict(pair.split("=", 1) for pair in arguments.camera)
    if session is not None and manifest is not None:
        sources = from_session(session, manifest)
    elif manifest is not None:
        names = [camera.name for camera in manifest.cameras]
        sources = from_settings(settings, names, manifest.axis_names, node=node, manifest=manifest)
    elif cameras and arguments.joints:
        sources = from_settings(settings, list(cameras), arguments.joints, node=node)
    else:
        raise ConfigurationError(
            f"bag {bag.path}: expected cameras and joints, got neither, as it has no ~/session; give --bundle, "
            "--params of a node that has one, or --camera NAME=TOPIC and --joints NAME..."
        )
    if arguments.joints:
        sources = replace(sources, joints=tuple(arguments.joints), specs=None)
    given = {
        "cameras": cameras or None,
        "joint_topic": arguments.joint_states,
        "instruction_topic": arguments.instruction,
        "command_topic": arguments.command_topic,
    }
    return replace(sources, **{key: value for key, value in given.items() if value})


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training.convert", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    back = commands.add_parser("to-bag", help="a dataset -> a bag")
    back.add_argument("dataset", type=Path)
    back.add_argument("--out", type=Path, required=True, help="folder of the bag")
    made = commands.add_parser("from-bag", help="bags -> a dataset")
    made.add_argument("bags", nargs="+", metavar="BAG")
    made.add_argument("--out", type=Path, required=True, help="folder of the dataset")
    made.add_argument(
        "--fps", type=int, default=10, help="frames per second; 1 / action period to train on (default 10)"
    )
    made.add_argument(
        "--actions",
        choices=get_args(Actions),
        required=True,
        help="a frame's action: the position commanded for one period later, or where the arm was by then",
    )
    made.add_argument("--bundle", help="its cameras and joints are used; default: what the parameters or the bag say")
    made.add_argument("--params", type=Path, help="the node's parameter file; default: the bag's own ~/session")
    made.add_argument("--node", help=f"the node's full name; default: that of the bag's own ~/session, else {NODE}")
    made.add_argument("--camera", action="append", default=[], metavar="NAME=TOPIC", help="instead of the bundle's")
    made.add_argument("--joints", nargs="+", help="instead of the bundle's, in the dataset's order")
    made.add_argument("--joint-states", metavar="TOPIC")
    made.add_argument("--instruction", metavar="TOPIC")
    made.add_argument("--command", dest="command_topic", metavar="TOPIC")
    made.add_argument(
        "--episodes",
        choices=get_args(Cut),
        default="auto",
        help="where one begins: at markers, at instructions, or with the bag; auto: the first of these that it has",
    )
    made.add_argument("--marker", nargs=2, metavar=("TOPIC", "KEY"), help="a new value of KEY begins an episode")
    made.add_argument("--task", help="the instruction, where the bag has none")
    made.add_argument("--least-frames", type=int, default=2, help="shorter pieces are left out (default 2)")
    made.add_argument(
        "--video",
        choices=get_args(Video),
        default="h264",
        help="encode the images (default), or keep the JPEGs as they were recorded: nothing is lost, and it is faster",
    )
    made.add_argument("--robot-type", help="robot_type in meta/info.json")
    arguments = parser.parse_args(argv)
    for pair in getattr(arguments, "camera", ()):
        if "=" not in pair:
            parser.error(f"--camera: expected NAME=TOPIC, got {pair!r}")
    if arguments.command == "from-bag" and arguments.fps < 1:
        parser.error(f"--fps: expected at least 1, got {arguments.fps}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
