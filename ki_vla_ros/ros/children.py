"""The demo's child processes: they get their own ROS environment, are started and watched, and leave nothing behind."""

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
from ki_vla_ros.share import PROFILE_VARIABLES, find_share

# How long the processes get to end after SIGINT, and again after SIGTERM.
STOP_LIMIT_S: Final = 8.0
LOG_TAIL_LINES: Final = 12
PR_SET_PDEATHSIG: Final = 1
# Fast DDS gives each process the first number whose port is free; on one machine ROS 2 looks at these.
PARTICIPANTS: Final = 32
# People choose low numbers by hand; from 102 on, a domain's ports lie in Linux's range of ephemeral ports.
DOMAINS: Final = range(61, 102)


class ChildError(KiVlaError):
    """A child process ended too early or did not become ready; the message names its log and shows the log's end."""


@dataclass(slots=True)
class Child:
    """One child process and the file that takes its output."""

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
        """Runs `python -m module arguments` in a new session, so that Ctrl-C reaches only the demo."""
        log = self._log_folder / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=begin_child,
            )
        child = Child(name, process, log)
        self._children.append(child)
        return child

    def check(self) -> None:
        """Raises ChildError if any of them has ended."""
        for child in self._children:
            child.check()

    def stop(self) -> None:
        """Sends SIGINT to all, then SIGTERM and SIGKILL to those that are left, and waits for them."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            running = [child.process for child in self._children if child.process.poll() is None]
            for process in running:
                with suppress(ProcessLookupError):
                    process.send_signal(number)
            deadline_s = time.monotonic() + STOP_LIMIT_S
            for process in running:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline_s - time.monotonic()))


def begin_child() -> None:
    """Runs in the child before exec: has the kernel kill it if its parent dies without a chance to stop it.

    It also restores SIGINT, by which it is stopped: a shell's background job ignores that signal, and its
    children inherit this.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def prepare_environment(out: Path) -> bool:
    """Sets the environment variables this process and its children need before ROS starts, where the user has not.

    Returns whether other processes may take part in the chosen domain. ConfigurationError for an impossible domain.
    """
    domain = os.environ.get("ROS_DOMAIN_ID") or str(free_domain())
    if not domain.isdecimal() or int(domain) > LARGEST_DOMAIN:
        raise ConfigurationError(
            f"ROS_DOMAIN_ID: expected 0 to {LARGEST_DOMAIN}, got {domain!r}; unset it and the demo finds a free one"
        )
    os.environ["ROS_DOMAIN_ID"] = domain
    ros_logs = (out / "log" / "ros").resolve()
    ros_logs.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("ROS_LOG_DIR", str(ros_logs))
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    if os.environ.get("ROS_DISTRO") == "humble":  # it does not know that variable; later releases warn of this one
        os.environ.setdefault("ROS_LOCALHOST_ONLY", "1")
    # Fast DDS's default shared memory is smaller than one image, so most images would be lost.
    if not any(os.environ.get(name) for name in PROFILE_VARIABLES):
        variable = PROFILE_VARIABLES[os.environ.get("ROS_DISTRO") == "humble"]
        os.environ[variable] = str(find_share("config/fastdds.xml"))
    # Three processes on few cores: threads that wait for each other cost more time than they save.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return not is_free(int(domain)) or os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] != "LOCALHOST"


def free_domain() -> int:
    """A ROS domain that no process on this machine uses; ConfigurationError if there is none."""
    domains = list(DOMAINS)
    random.shuffle(domains)
    for domain in domains:
        if is_free(domain):
            return domain
    raise ConfigurationError(
        f"no free ROS domain: expected one of {DOMAINS[0]} to {DOMAINS[-1]} without a process in it, got none; stop "
        "some ROS processes, or choose a domain with ROS_DOMAIN_ID"
    )


def is_free(domain: int) -> bool:
    """Whether no process is in the domain: the discovery port of each participant is free.

    Of all, since the first one to come may be the first to go. DDSI-RTPS 9.6.1: 7400 + 250 * domain + 10 + 2 * number.
    """
    for number in range(PARTICIPANTS):
        port = 7400 + 250 * domain + 10 + 2 * number
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind(("", port))
            except OSError:
                return False
    return True
