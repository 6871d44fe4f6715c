"""Looks for the faults that cost people days, and says what to do about each.

    ros2 run ki_vla_ros doctor --params my_robot.yaml            the running robot, without commanding it
    ros2 run ki_vla_ros doctor --bag BAG --params my_robot.yaml  a recording; the same as python -m ki_vla_ros.doctor
    python -m ki_vla_ros.doctor --bag BAG --robot my_arm.yaml    a recording of a robot that has no bundle yet

Exit code 1 if it found errors, 2 if it could not look. Nothing is published and nothing is changed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ki_vla_ros.console import ExitCode, run_command
from ki_vla_ros.doctor import recording
from ki_vla_ros.doctor.findings import Findings, as_json, as_table, errors
from ki_vla_ros.doctor.setup import Machine, Request, check_machine, check_profile_is_set, check_shared_memory
from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.settings import NODE

LONGEST_S = 86400.0


def diagnose(request: Request, machine: Machine | None = None) -> tuple[Findings, list[str]]:
    """The findings, and what was looked at. ConfigurationError if it is not clear what to look at."""
    machine = machine or Machine.here()
    findings, looked_at = Findings(), [f"Python {machine.python[0]}.{machine.python[1]}, numpy {machine.numpy}"]
    check_machine(machine, findings)
    if request.bag is not None:
        return findings, looked_at + recording.examine(request.bag, request, findings)
    from ki_vla_ros.doctor import graph  # the only part that needs ROS

    machine = graph.with_node_environment(machine)
    check_profile_is_set(machine, findings)
    check_shared_memory(machine, findings)
    return findings, looked_at + graph.examine(request, findings)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ki_vla_ros.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bag", type=Path, help="a recording; without it, what runs in this ROS domain")
    parser.add_argument(
        "--params",
        type=Path,
        help="the node's parameter file; default: the parameters of the running node, or those in the bag",
    )
    parser.add_argument("--bundle", default="", help="folder or name; default: as the parameters say")
    parser.add_argument(
        "--robot",
        default="",
        help="with --bag: the robot's file, or the name of one in config/robots/; needs no bundle",
    )
    parser.add_argument("--node", default=NODE, help=f"the policy node's full name; default {NODE}")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long running topics are watched; default 5")
    parser.add_argument("--json", action="store_true", help="findings as JSON instead of a table")
    given = parser.parse_args(arguments)
    return run_command("doctor", partial(_examine, given))


def _examine(given: argparse.Namespace) -> int:
    if not given.node.startswith("/"):
        raise ConfigurationError(f"--node: expected a full name that begins with a slash, got {given.node!r}")
    if not 0.0 < given.seconds < LONGEST_S:
        raise ConfigurationError(f"--seconds: expected a time above 0 and below {LONGEST_S:g} s, got {given.seconds:g}")
    if given.params is not None and not given.params.is_file():
        raise ConfigurationError(f"--params: expected a parameter file, got {given.params}, which is not a file")
    if given.robot and given.bag is None:
        raise ConfigurationError(f"--robot: expected --bag beside it, got none; a running node has its own {'robot'!r}")
    request = Request(given.bag, given.params, given.bundle, given.node, given.seconds, given.robot)
    findings, looked_at = diagnose(request)
    print(json.dumps(as_json(findings, looked_at), indent=1) if given.json else as_table(findings, looked_at))
    return ExitCode.FOUND if errors(findings) else ExitCode.FINE


if __name__ == "__main__":
    sys.exit(main())
