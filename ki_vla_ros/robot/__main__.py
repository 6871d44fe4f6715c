"""Robot files: proposes one from what is there, says where one does not fit, prints the schema for editors.

    python -m ki_vla_ros.robot new --from BAG --from ARM.urdf --out my_robot.yaml
    python -m ki_vla_ros.robot check my_robot.yaml --bag BAG --dataset DATASET --bundle BUNDLE --urdf ARM.urdf
    python -m ki_vla_ros.robot schema

Exit code 1 if `check` found something, 2 if it could not look. docs/your_robot.md goes through it step by step.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from ki_vla_ros.bundle import load_bundle
from ki_vla_ros.console import ExitCode, run_command
from ki_vla_ros.errors import ConfigurationError, printable, writing
from ki_vla_ros.files import read_text
from ki_vla_ros.robot.robot import Robot, find_robot
from ki_vla_ros.settings import NODE
from ki_vla_ros.share import expand, find_bundle
from ki_vla_ros.survey import (
    BagSurvey,
    DatasetSurvey,
    Misfit,
    Proposal,
    RobotFile,
    check_bag,
    check_bundle,
    check_dataset,
    check_urdf,
    read_description,
    survey_bag,
    survey_dataset,
)


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    return run_command("robot", partial({"new": _new, "check": _check, "schema": _schema}[given.command], given))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ki_vla_ros.robot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    new = commands.add_parser("new", help="propose a robot file from a bag, a dataset, a URDF, or several of them")
    new.add_argument(
        "--from", dest="sources", action="append", required=True, metavar="BAG|DATASET|URDF", help="may be repeated"
    )
    new.add_argument("--name", default="", help="the robot's name; default: as the dataset, the URDF or the bag says")
    new.add_argument("--out", type=Path, help="the file to write, which must not exist; default: standard output")
    check = commands.add_parser("check", help="say where a robot file does not fit")
    check.add_argument("file", help="a robot file, or the name of one in config/robots/")
    check.add_argument("--bag", type=Path)
    check.add_argument("--dataset", type=Path)
    check.add_argument("--bundle", help="folder or name")
    check.add_argument("--urdf", type=Path)
    check.add_argument("--node", default=NODE, help=f"the policy node, whose namespace topics are in; default {NODE}")
    commands.add_parser("schema", help="print the JSON schema of robot files")
    return parser.parse_args(arguments)


def _new(given: argparse.Namespace) -> int:
    bag: BagSurvey | None = None
    dataset: DatasetSurvey | None = None
    urdf = ""
    for text in given.sources:
        path = expand(text)
        kind = _kind_of(path)
        if {"bag": bag, "dataset": dataset, "URDF": urdf or None}[kind] is not None:
            raise ConfigurationError(f"--from {path}: expected one {kind}, got a second one")
        if kind == "bag":
            bag = survey_bag(path)
            for fault in bag.faults:
                print(printable(f"{path}: {fault}"), file=sys.stderr)
        elif kind == "dataset":
            dataset = survey_dataset(path)
        else:
            urdf = _read_urdf(path)
    if given.out is not None and expand(given.out).exists():
        raise ConfigurationError(f"--out {given.out}: expected a new file, got one that exists; remove it first")
    proposal = Proposal(given.name, bag, dataset, urdf)
    if given.out is None:
        print(proposal.text, end="")
    else:
        with writing(given.out):
            expand(given.out).write_text(proposal.text, encoding="utf-8")
    told = (
        f"{given.out or 'robot file'}: {proposal.to_check} {'guess' if proposal.to_check == 1 else 'guesses'} to check"
    )
    if proposal.only_seen:
        told += f"; {proposal.only_seen} with limits that are only what was seen"
    if proposal.fill_in:
        told += f"; {len(proposal.fill_in)} to fill in, until then it is refused:"
    print(printable("\n  ".join([told, *proposal.fill_in])), file=sys.stderr)
    return ExitCode.FINE


def _kind_of(path: Path) -> str:
    if not path.exists():
        raise ConfigurationError(f"--from {path}: expected a bag, a dataset or a URDF, got nothing at that path")
    if path.suffix in (".urdf", ".xml"):
        return "URDF"
    if path.suffix == ".xacro":
        raise ConfigurationError(f"--from {path}: expected a URDF, got xacro; expand it first: xacro {path} > arm.urdf")
    return "dataset" if (path / "meta" / "info.json").exists() else "bag"


def _read_urdf(path: Path) -> str:
    try:
        return read_description(path, read_text(path))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path}: expected a URDF, got one that cannot be read ({error})") from None


def _check(given: argparse.Namespace) -> int:
    file = RobotFile(find_robot(given.file))
    found = file.faults or list(_misfits(file, given))
    for misfit in sorted(found, key=lambda misfit: misfit.line):
        print(printable(f"{file.path}:{misfit.line}: {misfit}\n    -> {misfit.change}"))
    if not found:
        print(f"{file.path}: no faults found")
    return ExitCode.FOUND if found else ExitCode.FINE


def _misfits(file: RobotFile, given: argparse.Namespace) -> Iterator[Misfit]:
    urdf = _read_urdf(given.urdf) if given.urdf else ""
    if given.bag is not None:
        bag = survey_bag(given.bag)
        for fault in bag.faults:
            print(printable(f"{given.bag}: {fault}"), file=sys.stderr)
        yield from check_bag(file, bag, given.node)
        urdf = urdf or bag.robot_description
    if given.dataset is not None:
        yield from check_dataset(file, survey_dataset(expand(given.dataset)))
    if given.bundle is not None:
        yield from check_bundle(file, load_bundle(find_bundle(given.bundle)).manifest)
    if urdf:
        yield from check_urdf(file, urdf)


def schema() -> str:
    """The JSON schema of robot files, as config/robots/robot.schema.json has it."""
    return json.dumps(Robot.model_json_schema(), indent=1, ensure_ascii=False) + "\n"


def _schema(given: argparse.Namespace) -> int:
    print(schema(), end="")
    return ExitCode.FINE


if __name__ == "__main__":
    sys.exit(main())
