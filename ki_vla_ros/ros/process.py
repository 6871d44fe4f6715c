"""A ROS node as a process: it ends on SIGINT and SIGTERM, and says in one message why it could not start.

Every node's `main` is one call of `run_node`, so all of them behave the same under `ros2 launch` and in the demo.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType

import rclpy
from rclpy.exceptions import ParameterException
from rclpy.signals import SignalHandlerOptions
from rclpy.utilities import remove_ros_args

from ki_vla_ros.console import run_command
from ki_vla_ros.errors import ConfigurationError

# The ports of a larger ROS domain would exceed 65535 (DDSI-RTPS 9.6.1).
LARGEST_DOMAIN = 232
ROS_ARGUMENTS = (
    "Arguments for ROS come after --ros-args: --params-file FILE, -p NAME:=VALUE, -r __ns:=/left and the like."
)


def run_node(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace, threading.Event], int],
    arguments: Sequence[str] | None = None,
) -> int:
    """Calls `run` with the parsed arguments and an event that SIGINT and SIGTERM set; returns its exit code.

    `arguments`, by default the process's own, may hold ROS arguments after `--ros-args`. The parser gets the others,
    and exits with 2 for one that it does not know. If `run` raises, one message goes to standard error and the exit
    code is FAILED.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser.epilog = ROS_ARGUMENTS
    stop = threading.Event()

    def request_stop(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    def work() -> int:
        try:
            chosen = parser.parse_args(_without_ros_arguments(given))
            _init_ros(given)
            return run(chosen, stop)
        except ParameterException as error:
            raise ConfigurationError(str(error)) from error
        finally:
            rclpy.try_shutdown()
            # Under `ros2 launch` Ctrl-C arrives twice; the second must not kill a process that is about to return 0.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)

    # rclpy's own handlers would shut the context down at once, and no last command could be published.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, request_stop)
    return run_command(parser.prog, work)


def check_domain() -> None:
    """ConfigurationError if ROS_DOMAIN_ID is no possible domain."""
    domain = os.environ.get("ROS_DOMAIN_ID") or "0"
    if not domain.isdecimal() or int(domain) > LARGEST_DOMAIN:  # Fast DDS would end the process without naming it
        raise ConfigurationError(f"ROS_DOMAIN_ID: expected 0 to {LARGEST_DOMAIN}, got {domain!r}")


def _without_ros_arguments(arguments: Sequence[str]) -> list[str]:
    try:
        return list(remove_ros_args(["", *arguments])[1:])  # it expects the program's name first
    except Exception as error:  # raised by C code, as below
        raise cannot_start(error) from error


def _init_ros(arguments: Sequence[str]) -> None:
    check_domain()
    try:
        rclpy.init(args=list(arguments), signal_handler_options=SignalHandlerOptions.NO)
    except Exception as error:  # raised by C code, with no type to tell it by
        raise cannot_start(error) from error


def cannot_start(error: Exception) -> ConfigurationError:
    return ConfigurationError(
        f"ROS 2 cannot start: {error}; check the arguments after --ros-args and that ROS_LOG_DIR can be written to"
    )
