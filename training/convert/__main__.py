"""From bags to a LeRobot dataset (v3.0), and back.

    python -m training.convert from-bag BAG... --robot FILE --actions commands --out DATASET [--params P.yaml]
    python -m training.convert to-bag DATASET --out BAG [--robot FILE]

docs/data.md explains topics, episodes and actions.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final, get_args

from ki_vla_ros.bags import Bag, find_session, open_bag
from ki_vla_ros.bundle import MANIFEST
from ki_vla_ros.console import ExitCode, Progress, run_command
from ki_vla_ros.errors import ConfigurationError, InputError
from ki_vla_ros.files import read_file
from ki_vla_ros.robot import JOINT_STATE, find_robot, read_robot
from ki_vla_ros.settings import NODE, Settings, load_settings
from ki_vla_ros.share import find_bundle
from training.convert.actions import Actions
from training.convert.clock import ClockChoice
from training.convert.episodes import Conversion, Cut, Marker, convert
from training.convert.integrity import as_table
from training.convert.many import Failure, run, writing_folder
from training.convert.parts import (
    DATASET,
    Part,
    find_begun,
    find_part,
    list_files,
    open_parts,
    part_folder,
    remove_parts,
    write_part,
)
from training.convert.playback import write_bag
from training.convert.sources import (
    Sources,
    change_cameras,
    choose_cameras,
    choose_topics,
    find_sources,
    plain_robot,
    read_manifest,
    rename_topics,
)
from training.convert.union import unite
from training.convert.writer import DatasetWriter
from training.data.lerobot import Dataset, RobotColumns, Video

PERIOD_WITHIN: Final = 0.02  # of an action's period: a robot file may round it


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, or as `run_command` says."""
    arguments = parse(argv)
    left = "the bag has what was written so far, and no index"
    if arguments.command == "from-bag":
        left = "what was converted so far, if anything, is a valid dataset; the same command goes on with the rest"
    return run_command("convert", partial(_convert, arguments), f"stopped; {left}")


def _convert(arguments: argparse.Namespace) -> int:
    if arguments.command == "to-bag":
        dataset = Dataset(arguments.dataset)
        robot = read_robot(find_robot(arguments.robot)) if arguments.robot else None
        written, unsaid = write_bag(dataset, arguments.out, robot)
        print(f"{arguments.out}: {written} messages")
        for what, reason in unsaid.items():
            print(f"  not in it: {what}, {reason}")
        return ExitCode.FINE
    return convert_bags(arguments)


def convert_bags(arguments: argparse.Namespace) -> int:
    """Convert all bags into one dataset, and print what became of each; bags that were converted before stay so."""
    bags, options = [Path(bag) for bag in arguments.bags], name_options(arguments)
    with open_parts(arguments.out) as parts:
        found, jobs = {}, {}
        for bag in dict.fromkeys(bags):
            before = find_part(parts, bag, options)
            if isinstance(before, Part):
                found[bag] = before
                print(f"{bag}: converted before")
                continue
            jobs[bag] = part_folder(parts, bag)
            if before is not None:
                print(f"{bag}: converted again: {before}")
        failures: dict[Path, Failure] = {}
        outcomes = run(jobs, partial(convert_bag, arguments, options), arguments.workers, arguments.ray)
        try:
            with Progress() as progress:
                for done, (bag, failure) in enumerate(outcomes):
                    progress.show(f"{done + 1} of {len(jobs)} bags", (done + 1) / len(jobs))
                    if failure is not None:
                        failures[bag] = failure
        finally:  # also after Ctrl-C
            for bag, folder in jobs.items():
                failure = failures.get(bag)
                part = None if failure else find_part(parts, bag, options)
                if not isinstance(part, Part) and (failure is None or failure.kept):
                    part = find_begun(writing_folder(folder), options)
                if isinstance(part, Part):
                    found[bag] = part
            in_order = [found[bag] for bag in bags if bag in found]
            for part in in_order:
                print(f"{part.bag}: {describe(part.conversion)}")
                for fault in part.faults:
                    print(f"  {part.bag}: {fault}")
            info, reports, refused = (
                unite(in_order, arguments.out) if any(part.dataset for part in in_order) else (None, [], {})
            )
            if reports:
                print(as_table(reports))
        reasons = [name_bag(bag, failures[bag].reason) for bag in dict.fromkeys(bags) if bag in failures]
        reasons += refused.values()
        if info is None and not reasons:
            remove_parts(parts)
            raise InputError(
                f"dataset {arguments.out}: expected at least one frame, got none; nothing was written; what was left "
                "out, and why, is said above"
            )
        for reason in reasons:
            print(f"convert: {reason}", file=sys.stderr)
        if info is not None:
            print(f"{arguments.out}: {info.fps:g} frames per second, {info.total_episodes} episodes")
        if len(in_order) == len(bags) and not reasons:
            remove_parts(parts)
            return ExitCode.FINE
        if info is not None and len(bags) > 1:
            print(f"  without {len(reasons)} of {len(bags)} bags; the same command tries them again", file=sys.stderr)
        full = any(failure.kept for failure in failures.values())
        return ExitCode.FAILED if info is None or full else ExitCode.FOUND
    return ExitCode.FINE


def convert_bag(arguments: argparse.Namespace, options: Mapping[str, str], path: Path, folder: Path) -> None:
    """Convert a bag into its part, `folder`; after an error that has what was converted until then."""
    with open_bag(path) as bag:
        files, done, pixels, whole = list_files(path), Conversion(), {}, False
        try:
            sources = choose_sources(arguments, bag)
            columns = RobotColumns(sources.robot)
            with (
                suppress(_NoFrame),
                DatasetWriter(
                    folder / DATASET,
                    fps=arguments.fps,
                    columns=columns.names,
                    cameras={camera.name: camera.key for camera in sources.robot.cameras},
                    source={"bags": [path.name], "actions": arguments.actions, **describe_source(sources)},
                    robot_type=arguments.robot_type or (None if sources.plain else sources.robot.name),
                    video=arguments.video,
                    name=arguments.out,
                ) as writer,
            ):
                pixels = writer.tables.pixels
                convert(
                    bag,
                    sources,
                    writer,
                    fps=arguments.fps,
                    actions=arguments.actions,
                    cut=arguments.episodes,
                    marker=Marker(*arguments.marker) if arguments.marker else None,
                    task=arguments.task,
                    least_frames=arguments.least_frames,
                    clock=arguments.clock,
                    done=done,
                )
                if not done.frames:
                    raise _NoFrame
            whole = True
        except ConfigurationError:
            for fault in bag.faults:  # what the bag seems to lack may be what cannot be read
                print(f"  {path}: {fault}")
            raise
        finally:
            faults = [str(fault) for fault in bag.faults]
            with suppress(*() if whole else (OSError,)):  # as on a full disk, after a better error
                write_part(Part(folder, str(path), files, options, whole, done, faults, pixels))


def describe_source(sources: Sources) -> dict[str, Any]:
    """What meta/ki_vla_ros.json says, for to-bag and for readers: topics, units, limits, and the robot file.

    Of a robot of which only the joints' names are known there are no units: its numbers are those of its topics.
    """
    robot = sources.robot
    joints = [signal.topic for signal in robot.signals if signal.type == JOINT_STATE]
    topics = {"cameras": sources.cameras, "instruction": sources.instruction_topic}
    topics |= {"joint_states": joints[0]} if len(set(joints)) == 1 else {}
    topics |= {"command": robot.outputs[0].topic} if len(robot.outputs) == 1 else {}
    known = {"units": RobotColumns(robot).units, "robot": robot.model_dump(mode="json", exclude_defaults=True)}
    return {
        "topics": topics,
        **({} if sources.plain else known),
        "sync_slop_s": sources.slop_ns / 1e9,
        "max_age_s": sources.max_age_ns / 1e9,
    }


def name_bag(bag: Path, reason: str) -> str:
    return reason if str(bag) in reason or reason.startswith("dataset ") else f"bag {bag}: {reason}"


class _NoFrame(Exception):
    """The bag has no frame for the dataset."""


def name_options(arguments: argparse.Namespace) -> dict[str, str]:
    """What a part depends on beside its bag: the options, and what is in the files that they name."""
    others = ("command", "bags", "out", "workers", "ray")
    options = {f"--{name.replace('_', '-')}": value for name, value in vars(arguments).items() if name not in others}
    files = {name: value for name, value in options.items() if isinstance(value, Path)}
    if arguments.bundle:
        files["--bundle"] = find_bundle(arguments.bundle) / MANIFEST
    if arguments.robot:
        read_robot(files.setdefault("--robot", find_robot(arguments.robot)))
    digests = {name: hashlib.sha256(read_file(path)).hexdigest()[:8] for name, path in files.items()}
    return {name: f"{value} {digests.get(name, '')}".strip() for name, value in options.items()}


def describe(done: Conversion) -> str:
    lines = [f"{done.frames} frames in {done.episodes} episodes"]
    if done.repeated:
        lines[0] += f", {done.repeated} with the same images as the frame before (is --fps above the cameras' rate?)"
    lines += done.said
    for cause, count in done.left_out.most_common():
        example = done.first_reason.get(cause)
        lines.append(f"left out: {count} x {cause}" + (f" (the first: {example})" if example else ""))
    if not done.frames:
        lines.append(
            "no frame of it is written; where no episode begins, take --episodes bag (all of it is one), or name what "
            "begins one with --marker TOPIC KEY"
        )
    return "\n  ".join(lines)


def choose_sources(arguments: argparse.Namespace, bag: Bag) -> Sources:
    """The robot of --robot, else of --bundle, --params or the bag's own ~/session, else one of --camera and --joints.

    Settings come from --params, else the bag's own ~/session, else the defaults; single options override these.
    """
    session = None if arguments.params else find_session(bag, arguments.node)
    node = session.node if session else arguments.node or NODE
    warn = partial(print, file=sys.stderr)
    settings = session.settings if session else Settings()
    if arguments.params:
        settings = load_settings(arguments.params, node, warn)
    cameras = dict(pair.split("=", 1) for pair in arguments.camera)
    robot = None
    if arguments.robot:
        robot = read_robot(find_robot(arguments.robot))
    elif name := arguments.bundle or settings.bundle:
        robot = read_manifest(name).robot
    if robot is None and not (cameras and arguments.joints):
        raise ConfigurationError(
            f"bag {bag.path}: expected cameras and joints, got neither, as it has no ~/session; give --robot FILE "
            "(config/robots/ has examples), --bundle, --params of a node that has one, or --camera NAME=TOPIC and "
            "--joints NAME..."
        )
    specs = choose_cameras(() if robot is None else robot.cameras, cameras)
    plain = robot is None or bool(arguments.joints)
    robot = plain_robot(specs, arguments.joints) if robot is None or arguments.joints else change_cameras(robot, specs)
    sources = find_sources(settings, robot, node=node, session=session, plain=plain)
    if cameras:
        sources = replace(sources, robot=rename_topics(sources.robot, cameras=cameras))
    if arguments.robot and not plain and abs(robot.action_period_s * arguments.fps - 1.0) > PERIOD_WITHIN:
        nearest = max(round(1.0 / robot.action_period_s), 1)
        other = "" if nearest == arguments.fps else f"give --fps {nearest}, or "
        warn(
            f"bag {bag.path}: --fps {arguments.fps} makes a frame every {1.0 / arguments.fps:.4g} s, but robot "
            f"{robot.name} has action_period_s {robot.action_period_s:.4g}; {other}set action_period_s to "
            f"{1.0 / arguments.fps:.4g}"
        )
    return choose_topics(sources, arguments.joint_states, arguments.command_topic, arguments.instruction, node)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training.convert", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    back = commands.add_parser("to-bag", help="a dataset -> a bag")
    back.add_argument("dataset", type=Path)
    back.add_argument("--out", type=Path, required=True, help="folder of the bag")
    back.add_argument(
        "--robot",
        metavar="FILE",
        help="robot file, or a name in config/robots/: whose numbers these are, and its topics; datasets of from-bag "
        "have their own",
    )
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
        help="a frame's action: what was commanded for one period later, or what the robot did by then",
    )
    made.add_argument(
        "--robot",
        metavar="FILE",
        help="robot file, or a name in config/robots/: cameras, state, actions, topics and the dataset's columns and "
        "units; no bundle is needed",
    )
    made.add_argument("--bundle", help="its robot is taken; default: the one that the parameters or the bag name")
    made.add_argument("--params", type=Path, help="the node's parameter file; default: the bag's own ~/session")
    made.add_argument("--node", help=f"the node's full name; default: that of the bag's own ~/session, else {NODE}")
    made.add_argument("--camera", action="append", default=[], metavar="NAME=TOPIC", help="instead of the robot's")
    made.add_argument("--joints", nargs="+", help="instead of the robot's, in the dataset's order; of unknown units")
    made.add_argument(
        "--joint-states",
        action="append",
        default=[],
        metavar="[NAME=]TOPIC",
        help="another topic of joint states; NAME is what the robot file calls it, where there are several",
    )
    made.add_argument("--instruction", metavar="TOPIC")
    made.add_argument(
        "--command",
        dest="command_topic",
        action="append",
        default=[],
        metavar="[OUTPUT=]TOPIC",
        help="another topic of commands; OUTPUT where the robot file has several",
    )
    made.add_argument(
        "--clock",
        choices=get_args(ClockChoice),
        default="auto",
        help="which time counts: the stamps, moved to the log's clock if they are of another; the time of arrival; "
        "auto: the stamps, but the time of arrival for topics whose stamps are zero or of a clock of their own",
    )
    made.add_argument(
        "--episodes",
        choices=get_args(Cut),
        default="auto",
        help="where one begins: at markers, at instructions, or with the bag; auto: the first of these of which it has "
        "messages",
    )
    made.add_argument("--marker", nargs=2, metavar=("TOPIC", "KEY"), help="a new value of KEY begins an episode")
    made.add_argument("--task", help="the instruction, where no message of the bag gives one")
    made.add_argument("--least-frames", type=int, default=2, help="shorter pieces are left out (default 2)")
    made.add_argument(
        "--video",
        choices=get_args(Video),
        default="h264",
        help="encode the images (default), or keep the JPEGs as they were recorded: nothing is lost, and it is faster",
    )
    made.add_argument(
        "--workers", type=int, default=1, help="bags that are converted at the same time, one core each (default 1)"
    )
    made.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="convert the bags on this Ray cluster ('auto': this machine's)",
    )
    made.add_argument("--robot-type", help="robot_type in meta/info.json")
    arguments = parser.parse_args(argv)
    for pair in getattr(arguments, "camera", ()):
        if "=" not in pair:
            parser.error(f"--camera: expected NAME=TOPIC, got {pair!r}")
    for name in ("fps", "workers"):
        if arguments.command == "from-bag" and (got := getattr(arguments, name)) < 1:
            parser.error(f"--{name}: expected at least 1, got {got}")
    return arguments


if __name__ == "__main__":
    # What other processes are to call must have a name that they can import, which `__main__` is not.
    from training.convert import __main__ as command

    sys.exit(command.main())
