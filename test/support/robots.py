"""A robot for tests: the other side of the policy node's topics and services, and the node as a process."""

from __future__ import annotations

import array
import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.msg import Parameter as ParameterMessage
from rcl_interfaces.srv import SetParametersAtomically
from rclpy.executors import SingleThreadedExecutor
from rclpy.parameter import Parameter
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from ki_vla_ros.errors import InputError
from ki_vla_ros.ros.children import begin_child
from ki_vla_ros.ros.qos import LATCHED, SENSOR
from ki_vla_ros.runtime.paths import CommandedPath
from support import ROOT
from support.bundles import CAMERAS, JOINTS, demo_observation
from support.waiting import PATIENCE_S, until


class Robot:
    """Cameras (20 Hz), joint states (100 Hz), and clients of everything that the node offers.

    With `follows` the arm does what it is told, as under joint_trajectory_controller; otherwise it stays. `clock` is
    published as simulated time while it is set; stamps are then taken from it.
    """

    def __init__(self, domain: int, namespace: str = "") -> None:
        self.context = rclpy.Context()
        rclpy.init(context=self.context, domain_id=domain)
        self.node = rclpy.create_node("robot", context=self.context, namespace=namespace or "/")
        self.commands: list[JointTrajectory] = []
        self.chunks: list[JointTrajectory] = []
        self.ticks: list[dict[str, Any]] = []
        self.diagnostics: list[DiagnosticArray] = []
        subscribe = self.node.create_subscription
        self.times_s: list[float] = []  # when each command arrived
        subscribe(JointTrajectory, "arm_controller/joint_trajectory", self._on_command, 100)
        subscribe(JointTrajectory, "policy/chunk", self.chunks.append, 100)
        subscribe(String, "policy/tick", lambda message: self.ticks.append(json.loads(message.data)), 100)
        subscribe(DiagnosticArray, "/diagnostics", self.diagnostics.append, 100)
        self.sessions: list[str] = []
        subscribe(String, "policy/session", lambda message: self.sessions.append(message.data), LATCHED)
        self.instruct = self.node.create_publisher(String, "policy/instruction", 10)
        self.image = {name: self.node.create_publisher(Image, f"camera/{name}/image_raw", SENSOR) for name in CAMERAS}
        self.joints = self.node.create_publisher(JointState, "joint_states", 10)
        self.position = demo_observation().state_S.tolist()
        self.encoding = "rgb8"
        self.joint_names = list(JOINTS)
        self.imaging = self.stating = True
        self.follows = False
        self.image_delay_ns = 0
        self.frozen: Any = None  # a stamp that all images repeat
        self.clock_ns: int | None = None
        self._clock = self.node.create_publisher(Clock, "/clock", 10)
        self.controller = CommandedPath(JOINTS, np.array(demo_observation().state_S))
        self.refused: list[str] = []
        self._pixels = array.array("B", demo_observation(image_size=96).frames["scene"].rgb_HWC.tobytes())
        self._count = itertools.count()
        self.node.create_timer(0.01, self._publish)
        self._executor = SingleThreadedExecutor(context=self.context)
        self._executor.add_node(self.node)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._spin)
        self._thread.start()

    def _spin(self) -> None:
        while not self._closing.is_set():
            self._executor.spin_once(timeout_sec=0.1)

    def close(self) -> None:
        self._closing.set()
        self._thread.join()  # before anything is destroyed: the executor would trip over it
        self._executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)

    def tell(self) -> str:
        """What it has seen, for a test that fails."""
        last = f"{time.monotonic() - self.times_s[-1]:.1f} s ago" if self.times_s else "never"
        here = self.node.get_node_names_and_namespaces()
        return (
            f"domain {self.context.get_domain_id()}, nodes {here}; {len(self.commands)} commands, the last {last}; "
            f"{len(self.chunks)} chunks, {len(self.diagnostics)} diagnostics, {len(self.ticks)} ticks, the last "
            f"{self.ticks[-1:]}; joints at {np.round(self.position, 3).tolist()}; refused {self.refused[-3:]}"
        )

    def do(self, work: Callable[[], object]) -> None:
        """Runs `work` in the spinning thread, so that nothing it is about to wait for is destroyed under it."""
        done = threading.Event()
        self._executor.create_task(lambda: (work(), done.set()))
        assert done.wait(PATIENCE_S)

    def _on_command(self, message: JointTrajectory) -> None:
        self.times_s.append(time.monotonic())
        self.commands.append(message)
        try:
            self.controller.take(message, self.now_ns())
        except InputError as refusal:
            self.refused.append(str(refusal))

    def now_ns(self) -> int:
        return int(self.node.get_clock().now().nanoseconds) if self.clock_ns is None else self.clock_ns

    def _publish(self) -> None:
        if self.clock_ns is not None:
            self.clock_ns += 10_000_000
            self._clock.publish(Clock(clock=stamp_of(self.clock_ns)))
        now_ns = self.now_ns()
        if self.follows:
            self.position = self.controller.sample(now_ns)[0].tolist()
        if self.stating:
            message = JointState(name=self.joint_names, position=self.position[: len(self.joint_names)])
            message.header.stamp = stamp_of(now_ns)
            self.joints.publish(message)
        if next(self._count) % 5 == 0 and self.imaging:
            for publisher in self.image.values():
                image = Image(height=96, width=96, step=288, encoding=self.encoding, data=self._pixels)
                image.header.stamp = self.frozen or stamp_of(now_ns - self.image_delay_ns)
                publisher.publish(image)

    def call(self, service: str, kind: Any, request: Any) -> Any:
        client = self.node.create_client(kind, service)
        try:
            assert client.wait_for_service(PATIENCE_S), f"{service} is not there"
            answered = threading.Event()
            future = client.call_async(request)
            future.add_done_callback(lambda _: answered.set())
            assert answered.wait(PATIENCE_S), f"{service} does not answer"
            return future.result()
        finally:
            self.node.destroy_client(client)

    def change(self, label: str) -> bool:
        request = ChangeState.Request()
        request.transition.label = label
        return bool(self.call("policy/change_state", ChangeState, request).success)

    @property
    def state(self) -> str:
        return str(self.call("policy/get_state", GetState, GetState.Request()).current_state.label)

    def set(self, **values: object) -> str:
        """Sets parameters atomically; the reason of a refusal, or ""."""
        parameters = [
            Parameter(name.replace("__", "."), value=value).to_parameter_msg() for name, value in values.items()
        ]
        assert all(isinstance(p, ParameterMessage) for p in parameters)
        request = SetParametersAtomically.Request(parameters=parameters)
        result = self.call("policy/set_parameters_atomically", SetParametersAtomically, request).result
        assert result.successful == (not result.reason)
        return str(result.reason)

    def trigger(self, service: str) -> tuple[bool, str]:
        answer = self.call(f"policy/{service}", Trigger, Trigger.Request())
        return bool(answer.success), str(answer.message)

    @property
    def hold(self) -> str:
        """Why the arm is held; "" if it is not, or nothing is known yet."""
        return str(self.ticks[-1]["hold"] or "") if self.ticks else ""

    def wait_for_hold(self, cause: str) -> None:
        until(lambda: cause in self.hold, lambda: f"hold {cause!r}, the last one was {self.hold!r}")

    def diagnosed(self, key: str) -> str:
        values = {v.key: v.value for v in self.diagnostics[-1].status[0].values} if self.diagnostics else {}
        return str(values.get(key, ""))

    def say(self, text: str) -> None:
        until(lambda: self.instruct.get_subscription_count() > 0)
        self.instruct.publish(String(data=text))


def ns_of(time_: Any) -> int:
    return int(time_.sec) * 1_000_000_000 + int(time_.nanosec)


def stamp_of(time_ns: int) -> Time:
    return Time(sec=time_ns // 1_000_000_000, nanosec=time_ns % 1_000_000_000)


class PolicyProcess:
    """`python -m ki_vla_ros.ros.node` with parameters; its output goes to a file."""

    def __init__(
        self,
        environment: dict[str, str],
        folder: Path,
        *arguments: str,
        program: tuple[str, ...] = ("-m", "ki_vla_ros.ros.node"),
        output: Path | None = None,
        **parameters: object,
    ) -> None:
        self._log = folder / f"policy-{len(list(folder.glob('policy-*')))}.log"
        # YAML, so that a string stays a string.
        given = [
            part
            for name, value in parameters.items()
            for part in ("-p", f"{name.replace('__', '.')}:={json.dumps(value)}")
        ]
        command = [sys.executable, *program, "--ros-args", *given, *arguments]
        with (output or self._log).open("w") as log:
            environment = {**environment, "PYTHONPATH": str(ROOT)}
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, preexec_fn=begin_child
            )

    @property
    def output(self) -> str:
        """What it has said; "" where its output goes elsewhere."""
        return self._log.read_text() if self._log.exists() else ""

    def wait(self) -> int:
        return self.process.wait(PATIENCE_S)

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        self.process.send_signal(number)
        return self.wait()


def is_hold(command: JointTrajectory) -> bool:
    """A motion that only brakes, which takes 0.15 s from full speed; what is left of a chunk takes longer."""
    last = command.points[-1]
    return ns_of(last.time_from_start) < 300_000_000 and not any(last.velocities)
