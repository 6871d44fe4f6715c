"""A ROS node as a process: it ends on SIGINT and SIGTERM, and says in one message why it could not start.

Every node's `main` is one call of `run_node`, so that all behave alike under `ros2 launch` and in the demo.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from types import FrameType

import rclpy
from rclpy.exceptions import ParameterException
from rclpy.signals import SignalHandlerOptions

from ki_vla_ros.errors import ConfigurationError, KiVlaError

# A larger ROS domain's ports would be no port numbers (DDSI-RTPS 9.6.1).
LARGEST_DOMAIN = 232


def run_node(name: str, run: Callable[[threading.Event], int], arguments: Sequence[str] | None = None) -> int:
    """Exit code of `run`, which gets an event that a signal sets; 1 after one message on standard error if it raises.

    `arguments` are those for ROS, by default the process's own.
    """
    stop = threading.Event()

    def request_stop(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    # rclpy's own handlers would shut the context down at once, and then no last command could be published any more.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, request_stop)
    try:
        _init_ros(arguments)
        return run(stop)
    except (KiVlaError, ParameterException) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except Exception:
        print(f"{name}: {traceback.format_exc()}", file=sys.stderr)
        return 1
    finally:
        rclpy.try_shutdown()
        # Ctrl-C under `ros2 launch` arrives twice; the second one must not kill a process that is about to return 0.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


def check_domain() -> None:
    """ConfigurationError for a domain that cannot be."""
    domain = os.environ.get("ROS_DOMAIN_ID") or "0"
    if not domain.isdecimal() or int(domain) > LARGEST_DOMAIN:  # Fast DDS would end the process without naming it
        raise ConfigurationError(f"ROS_DOMAIN_ID: expected 0 to {LARGEST_DOMAIN}, got {domain!r}")


def _init_ros(arguments: Sequence[str] | None) -> None:
    check_domain()
    try:
        rclpy.init(args=None if arguments is None else list(arguments), signal_handler_options=SignalHandlerOptions.NO)
    except Exception as error:  # from C; its message is all there is
        raise ConfigurationError(
            f"ROS 2 cannot start: {error}; check the arguments after --ros-args and that ROS_LOG_DIR can be written to"
        ) from error
