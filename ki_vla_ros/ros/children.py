"""The demo's child processes: a ROS environment of their own, start, watch, and a stop that leaves nothing behind."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ki_vla_ros.errors import ConfigurationError, KiVlaError
from ki_vla_ros.ros.process import LARGEST_DOMAIN
from ki_vla_ros.share import find_share

# Each gets this long to end after SIGINT, and again after SIGTERM.
STOP_LIMIT_S: Final = 8.0
LOG_TAIL_LINES: Final = 12
PR_SET_PDEATHSIG: Final = 1
# People choose low numbers by hand; from 102 on, a domain's ports lie where Linux takes its ephemeral ports from.
DOMAINS: Final = range(61, 102)


class ChildError(KiVlaError):
    """A child process ended when it should not have, or did not become ready; names its log and shows the end of it."""


@dataclass(slots=True)
class Child:
    """One running process and the file that takes its output."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def check(self) -> None:
        """Raises ChildError if the process has ended."""
        code = self.process.poll()
        if code is not None:
            raise ChildError(f"{self.name} ended with exit code {code}; {self.log} says:\n{self.log_tail()}")

    def last_error(self) -> str:
        """The newest error or warning in its log, or ""."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        troubles = [line for line in lines if line.startswith(("[ERROR]", "[WARN]"))]
        return troubles[-1].partition("]: ")[2] if troubles else ""

    def log_tail(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return "\n".join(f"    {line}" for line in lines[-LOG_TAIL_LINES:]) or "    (nothing)"


class Children:
    """Started processes; leaving the `with` block stops them all, whatever happened inside."""

    def __init__(self, log_folder: Path) -> None:
        self._log_folder = log_folder
        self._children: list[Child] = []

    def __enter__(self) -> Children:
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()

    def start(self, name: str, module: str, arguments: Sequence[str]) -> Child:
        """Runs `python -m module arguments` in a session of its own, so that Ctrl-C reaches only the demo."""
        log = self._log_folder / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_begin_child,
            )
        child = Child(name, process, log)
        self._children.append(child)
        return child

    def check(self) -> None:
        """Raises ChildError if any of them has ended."""
        for child in self._children:
            child.check()

    def stop(self) -> None:
        """SIGINT to all, then SIGTERM, then SIGKILL to those that are left."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            running = [child.process for child in self._children if child.process.poll() is None]
            for process in running:
                with suppress(ProcessLookupError):
                    process.send_signal(number)
            deadline_s = time.monotonic() + STOP_LIMIT_S
            for process in running:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline_s - time.monotonic()))


def _begin_child() -> None:
    """In the child, before exec: the kernel kills it when the demo dies without a chance to stop it.

    A shell's background job ignores SIGINT and hands that down; the children are stopped by it.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def prepare_environment(out: Path) -> bool:
    """Sets, where the user has not, what this process and its children need before ROS is initialised.

    Returns whether others may take part in the chosen domain.
    """
    domain = os.environ.get("ROS_DOMAIN_ID") or str(free_domain())
    if not domain.isdecimal() or int(domain) > LARGEST_DOMAIN:
        raise ConfigurationError(
            f"ROS_DOMAIN_ID: expected 0 to {LARGEST_DOMAIN}, got {domain!r}; unset it, and the demo finds a free one"
        )
    os.environ["ROS_DOMAIN_ID"] = domain
    ros_logs = (out / "log" / "ros").resolve()
    ros_logs.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("ROS_LOG_DIR", str(ros_logs))
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    # Fast DDS's default shared memory is smaller than one image and loses most of them.
    os.environ.setdefault("FASTDDS_DEFAULT_PROFILES_FILE", str(find_share("config/fastdds.xml")))
    # Three processes on few cores: threads that wait for each other cost more than they bring.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return not is_free(int(domain)) or os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] != "LOCALHOST"


def free_domain() -> int:
    """A ROS domain in which no process of this machine takes part."""
    domains = list(DOMAINS)
    random.shuffle(domains)
    for domain in domains:
        if is_free(domain):
            return domain
    raise ConfigurationError(
        f"no free ROS domain: expected one of {DOMAINS[0]} to {DOMAINS[-1]} without a process in it; stop some, "
        "or choose one with ROS_DOMAIN_ID"
    )


def is_free(domain: int) -> bool:
    """Whether a first participant could take its port (DDSI-RTPS 9.6.1: 7400 + 250 * domain + 10)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(("", 7400 + 250 * domain + 10))
        except OSError:
            return False
    return True
