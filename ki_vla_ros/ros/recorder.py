"""Records what a running policy reads and publishes, into an mcap bag that replay needs nothing else to read.

    ros2 run ki_vla_ros record [--out FOLDER] [--also TOPIC] [--writer auto|ros2bag|own] [--ros-args -r __ns:=/left]

Bundle, parameters, topic names and clock come from the policy's ~/session; the recorder waits until that is published.
Where `ros2 bag` and its mcap storage are installed, this process becomes `ros2 bag record`; otherwise it writes the bag
itself (bags/writer.py). Images are neither decoded nor changed. It ends on SIGINT and SIGTERM.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.serialization import deserialize_message
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import String

from ki_vla_ros.bags.writer import BagWriter
from ki_vla_ros.console import ExitCode
from ki_vla_ros.errors import ConfigurationError, InputError
from ki_vla_ros.messages import COMPRESSED_IMAGE, DIAGNOSTICS, IMAGE, JOINT_STATE, POSE, TEXT
from ki_vla_ros.ros.outputs import COMMAND_KINDS
from ki_vla_ros.ros.process import run_node
from ki_vla_ros.ros.qos import EVERY_IMAGE, EVERY_READING, EVERYTHING, LATCHED
from ki_vla_ros.ros.releases import make_executor
from ki_vla_ros.settings import Session, read_session, resolve, session_topic
from ki_vla_ros.share import expand

MESSAGES: Final[dict[str, Any]] = {
    IMAGE: Image,
    COMPRESSED_IMAGE: CompressedImage,
    TEXT: String,
    JOINT_STATE: JointState,
    POSE: PoseStamped,
    DIAGNOSTICS: DiagnosticArray,
    **COMMAND_KINDS,  # commands
}
# Recorded in addition to the topics that the session names.
EXTRA_TOPIC_TYPES: Final = {"/diagnostics": DIAGNOSTICS}
# Every other type is subscribed to with EVERYTHING.
QOS: Final = {IMAGE: EVERY_IMAGE, COMPRESSED_IMAGE: EVERY_IMAGE, JOINT_STATE: EVERY_READING, POSE: EVERY_READING}
# Lets the policy go first where processor time is short.
NICENESS: Final = 5


@dataclass(frozen=True, slots=True)
class RecordOptions:
    """`out` is None for a folder named after the policy and the time; `also` are topics of std_msgs/String."""

    out: Path | None
    policy: str
    writer: str
    simulated_clock: bool
    also: tuple[str, ...] = ()


class RecorderNode(Node):
    """Waits for the policy's session, then records every topic that it names with a BagWriter."""

    def __init__(self, options: RecordOptions) -> None:
        super().__init__("recorder")
        if options.simulated_clock:
            self._follow_simulated_clock()
        self.session: Session | None = None
        self.writer: BagWriter | None = None
        self._options = options
        self._topics: set[str] = set()
        self._fault: ConfigurationError | None = None
        self._unwritten: bytes | None = None  # a session that came before the simulated clock
        policy = self.resolve_topic_name(options.policy)
        # Two policies that are started together must not ask for the same folder.
        named = policy.strip("/").replace("/", "_") + time.strftime("_%Y_%m_%d-%H_%M_%S")
        self.out = Path(named) if options.out is None else options.out
        self._session_topic = session_topic(policy)
        self._also = [resolve(topic, self.get_fully_qualified_name()) for topic in options.also]
        self.create_subscription(String, self._session_topic, self._on_session, LATCHED, raw=True)
        self.get_logger().info(f"waiting for {self._session_topic}; is the policy configured?")

    def _follow_simulated_clock(self) -> None:
        self.set_parameters([Parameter("use_sim_time", value=True)])

    @property
    def simulated_clock(self) -> bool:
        return bool(self.get_parameter("use_sim_time").value)

    def check(self) -> None:
        """Raises the error that has ended the recording, if there is one; to be called every tenth of a second."""
        if self._unwritten is not None and self.get_clock().now().nanoseconds > 0:
            self._record_session(self._unwritten)
        if self._fault is not None:
            raise self._fault
        if self.writer is not None and self.writer.failure is not None:
            raise self.writer.failure

    def _on_session(self, serialised: bytes) -> None:
        try:
            self.session = read_session(deserialize_message(serialised, String).data)
            if self.session.simulated_clock and not self.simulated_clock:
                self._follow_simulated_clock()
            if self._options.writer == "own":
                self._record_session(serialised)
        except InputError as error:
            self._fault = ConfigurationError(str(error))
        except ConfigurationError as error:
            self._fault = error

    def types(self) -> dict[str, str]:
        """ROS type by topic of all that is recorded; there must be a session."""
        assert self.session is not None
        return {**dict.fromkeys(self._also, TEXT), **self.session.message_types, **EXTRA_TOPIC_TYPES}

    def _record_session(self, serialised: bytes) -> None:
        types, self._unwritten = self.types(), None
        if self.get_clock().now().nanoseconds == 0:  # a bag that begins at time 0 has a gap of years
            self._unwritten = serialised
            self.get_logger().info("waiting for /clock, because the policy uses simulated time")
            return
        if self.writer is None:
            self.writer = BagWriter(self.out, {}, self._warn)
            self.writer.add_topic(self._session_topic, TEXT)
            self._topics.add(self._session_topic)
            self.get_logger().info(f"recording into {self.out}: {', '.join(sorted(types))}")
        self._on_message(self._session_topic, serialised)
        assert self.session is not None
        commands = {command.topic for command in self.session.commands.values()}
        for topic, kind in types.items():  # a node that is configured again may name other topics
            if topic not in self._topics:
                self._topics.add(topic)
                self.writer.add_topic(topic, kind)
                on_message = partial(self._on_message, topic)
                # A pose may be a command, which must not be missed, as well as a reading.
                qos = EVERYTHING if topic in commands else QOS.get(kind, EVERYTHING)
                self.create_subscription(MESSAGES[kind], topic, on_message, qos, raw=True)

    def _warn(self, message: str) -> None:
        self.get_logger().error(message)

    def _on_message(self, topic: str, serialised: bytes) -> None:
        assert self.writer is not None
        self.writer.write(topic, int(self.get_clock().now().nanoseconds), serialised)

    def close(self) -> None:
        """Ends the recording; KiVlaError if it is incomplete."""
        if self.writer is not None:
            self.writer.close()
        elif self.session is None:
            self.get_logger().warning(f"nothing was recorded: no message came on {self._session_topic}")


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ki_vla_ros.record", description="Record what a running policy reads and publishes."
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder to create for the bag; default: the policy's full name and the time",
    )
    parser.add_argument("--policy", default="policy", help="name of the policy node in the recorder's namespace")
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="TOPIC",
        help="a topic of std_msgs/String to record too, such as one that says where an episode begins; repeatable",
    )
    parser.add_argument(
        "--writer",
        choices=("auto", "ros2bag", "own"),
        default="auto",
        help="ros2bag: `ros2 bag record`; own: this process; auto: ros2bag where it is installed with mcap",
    )
    parser.add_argument(
        "--use-sim-time",
        action="store_true",
        help="take the time from /clock; default: as the policy does",
    )
    return parser


def check_options(given: argparse.Namespace) -> RecordOptions:
    """The options to record with; ConfigurationError if the folder exists or `ros2 bag` is wanted but missing."""
    if given.out is not None and expand(given.out).exists():
        raise ConfigurationError(f"recording: {given.out} exists already; remove it or choose another --out")
    missing = missing_for_ros2_bag()
    if given.writer == "ros2bag" and missing:
        raise ConfigurationError(f"--writer ros2bag: {missing} is not installed; install it, or use --writer own")
    writer = ("own" if missing else "ros2bag") if given.writer == "auto" else given.writer
    return RecordOptions(given.out, given.policy, writer, given.use_sim_time, tuple(given.also))


def missing_for_ros2_bag() -> str:
    """The missing package that `ros2 bag record --storage mcap` needs, or ""."""
    if os.environ.get("ROS_DISTRO") == "humble":
        return "ros2bag of Jazzy or later (Humble's has no --topics)"
    if shutil.which("ros2") is None or importlib.util.find_spec("ros2bag") is None:
        return "ros2bag"
    try:
        from ament_index_python.packages import get_package_prefix

        get_package_prefix("rosbag2_storage_mcap")
    except (ImportError, LookupError, OSError):  # the package is not in the index, or there is no index
        return "rosbag2_storage_mcap"
    return ""


def ros2_bag_command(out: Path, topics: Sequence[str], simulated_clock: bool) -> list[str]:
    """The command line for Jazzy and later; it compresses chunks, as our own writer does."""
    command = ["ros2", "bag", "record", "--storage", "mcap", "--storage-preset-profile", "zstd_fast"]
    command += ["--output", str(out), "--disable-keyboard-controls"]
    command += ["--use-sim-time"] if simulated_clock else []
    return [*command, "--topics", *topics]


def main(arguments: Sequence[str] | None = None) -> int:
    """The executable `record`: returns 0 after SIGINT or SIGTERM, 2 with one message if it could not record."""
    return run_node(argument_parser(), _run, arguments)


def _run(given: argparse.Namespace, stop: threading.Event) -> int:
    """Records until `stop`, or becomes the process that records."""
    options = check_options(given)
    os.nice(NICENESS)
    node = RecorderNode(options)
    command: list[str] = []
    try:
        executor = make_executor()
        executor.add_node(node)
        while rclpy.ok() and not stop.is_set() and not command:
            executor.spin_once(timeout_sec=0.1)
            node.check()
            if node.session is not None and options.writer == "ros2bag":
                topics = sorted(node.types())
                command = ros2_bag_command(node.out, topics, node.simulated_clock)
                node.get_logger().info(f"ros2 bag record takes over: {', '.join(topics)}")
    finally:
        try:
            node.close()
        finally:
            node.destroy_node()
    if command:
        rclpy.try_shutdown()
        # A signal that is ignored stays ignored after exec: Ctrl-C would not reach `ros2 bag`.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        if not stop.is_set():  # until here a signal ended this process; from here on it ends the next
            os.execvp(command[0], command)  # exec, not a child: signals reach `ros2 bag` directly
    return ExitCode.FINE
