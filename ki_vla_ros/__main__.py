"""The command `ki-vla`: all commands of the package, each by its name.

    ki-vla replay BAG --out DIR           what pip installs
    python -m ki_vla_ros replay BAG       the same, also in a checkout
    ros2 run ki_vla_ros replay BAG        the same in a ROS workspace, from lib/ki_vla_ros (see scripts/ros)

A command's module is imported when it is asked for, so that the list does not need ROS.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Final

from ki_vla_ros.console import ExitCode, check_pydantic
from ki_vla_ros.errors import KiVlaError

# Name, module whose `main` takes the arguments, purpose.
COMMANDS: Final = (
    ("demo", "ki_vla_ros.demo.__main__", "a simulated arm does what it is told, over ROS"),
    ("node", "ki_vla_ros.ros.node", "the policy as a ROS 2 lifecycle node"),
    ("sim-arm", "ki_vla_ros.sim.arm_node", "the simulated arm as a ROS 2 node"),
    ("sim-aloha", "ki_vla_ros.sim.aloha.node", "the simulated ALOHA as a ROS 2 node"),
    ("aloha-teleoperator", "ki_vla_ros.sim.aloha.teleoperator", "hand a cube over with the simulated ALOHA"),
    ("record", "ki_vla_ros.ros.recorder", "record what a running policy reads and publishes"),
    ("replay", "ki_vla_ros.replay.__main__", "run a policy over a recording, without ROS"),
    ("serve", "ki_vla_ros.serve.__main__", "a policy for other programs, in openpi's websocket protocol"),
    ("robot", "ki_vla_ros.robot.__main__", "propose a robot file, say where one does not fit"),
    ("doctor", "ki_vla_ros.doctor.__main__", "find faults in a running or recorded robot's setup"),
    ("bench", "ki_vla_ros.bench.__main__", "measure node, model and engines on this machine"),
    ("build-engines", "ki_vla_ros.engines.build", "build the TensorRT engines of a bundle"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] in (["-h"], ["--help"]):
        print(_usage())
        return ExitCode.FINE
    modules = {name: module for name, module, _ in COMMANDS}
    if not given or given[0] not in modules:
        got = f"got {given[0]!r}" if given else "got none"
        print(f"{_usage()}\n\nki-vla: expected a command, {got}; choose one of the above", file=sys.stderr)
        return ExitCode.FAILED
    name, *rest = given
    check_pydantic()
    try:
        command = import_module(modules[name])
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package == __package__:
            raise
        print(
            f"ki-vla {name}: needs the Python package {package!r}, which is not installed; ROS packages come with a "
            "sourced ROS installation or requirements/ros.txt, the others from pip",
            file=sys.stderr,
        )
        return ExitCode.FAILED
    except KiVlaError as error:  # the simulated arm without mujoco
        print(f"ki-vla {name}: {error}", file=sys.stderr)
        return ExitCode.FAILED
    code: int = command.main(rest)
    return code


def _usage() -> str:
    lines = [f"  {name:<20}{purpose}" for name, _, purpose in COMMANDS]
    return "\n".join(["usage: ki-vla COMMAND ...; ki-vla COMMAND --help for its options", "", *lines])


if __name__ == "__main__":
    sys.exit(main())
