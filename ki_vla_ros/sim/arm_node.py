"""The simulated arm as a ROS node: cameras and joint states out, joint trajectories in, in real time.

There are two threads. The main thread spins ROS; the simulation thread owns the world and its rendering context (which
works only in the thread that made it), follows the clock and publishes. They share the simulated controller, under a
lock, and a one-place queue for resets. With `use_sim_time` the arm moves by /clock, which something else publishes.
Legend: H image height, W width, C channel, J joints.
"""

from __future__ import annotations

import argparse
import array
import json
import math
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, Queue
from typing import Any, Final

import numpy as np
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from numpy.typing import NDArray
from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor, SetParametersResult
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from ki_vla_ros.console import ExitCode
from ki_vla_ros.errors import ConfigurationError, InputError, KiVlaError, SimulationError
from ki_vla_ros.records import NS_PER_S, to_ns
from ki_vla_ros.ros.process import run_node
from ki_vla_ros.ros.qos import EVENT, LATCHED, SENSOR
from ki_vla_ros.runtime.paths import CommandedPath
from ki_vla_ros.sim.task import LARGEST_SEED, Scene, Task, sample_scene
from ki_vla_ros.sim.world import CAMERAS, HOME_J, JOINTS, TIMESTEP_S, Verdict, World

NODE_NAME: Final = "sim_arm"
# If physics lags behind the wall clock by more than this, the excess is dropped (and counted), not caught up in a rush.
MOST_CATCH_UP_S: Final = 0.1
RESET_LIMIT_S: Final = 10.0
# Simulated time may run at any speed, so the waiting simulation thread checks it this often.
SIMULATED_CLOCK_POLL_S: Final = 0.005
STEP_NS: Final = to_ns(TIMESTEP_S)
STEPS_PER_S: Final = round(1.0 / TIMESTEP_S)


class Pace:
    """How many physics steps are due by the clock; times in s."""

    def __init__(self, step_s: float, most_s: float) -> None:
        self.overruns = 0  # how often time was dropped
        self._step_s = step_s
        self._most = round(most_s / step_s)
        self._next_s = math.inf  # so that the first call of `due` restarts it

    def restart(self, now_s: float) -> None:
        self._next_s = now_s + self._step_s

    def due(self, now_s: float) -> int:
        """How many steps to make now; none at the first call, nor when the clock was set back."""
        if now_s < self._next_s - self._step_s:
            self.restart(now_s)
        steps = max(0, int((now_s - self._next_s) / self._step_s + 1.0))
        self._next_s += steps * self._step_s
        if steps > self._most:
            self.overruns += 1
        return min(steps, self._most)

    def wait_s(self, steps: int, now_s: float) -> float:
        """Time until `steps` steps will be due."""
        return max(0.0, self._next_s + (steps - 1) * self._step_s - now_s)


@dataclass(slots=True)
class Reset:
    """The scene to build next; the simulation thread fills `status`, then sets `finished`."""

    scene: Scene
    split: str
    finished: threading.Event = field(default_factory=threading.Event)
    status: str = ""


def joint_message(stamp: Time, world: World) -> JointState:
    message = JointState()
    message.header.stamp = stamp
    message.name = list(world.joints)
    message.position = array.array("d", world.joint_position_J)
    message.velocity = array.array("d", world.joint_velocity_J)
    return message


def image_message(camera: str, stamp: Time, rgb_HWC: NDArray[np.uint8]) -> Image:
    message = Image()
    message.header.stamp = stamp
    message.header.frame_id = f"{camera}_camera"
    message.height, message.width = int(rgb_HWC.shape[0]), int(rgb_HWC.shape[1])
    message.encoding = "rgb8"
    message.step = 3 * message.width
    # The setter takes an array.array as it is; it checks any other sequence byte by byte (50 ms instead of 0.03).
    message.data = array.array("B", rgb_HWC.tobytes())
    return message


class ArmNode(Node):
    """Simulates from `start` to `stop`; ConfigurationError or InstructionError for impossible parameters."""

    def __init__(self) -> None:
        super().__init__(NODE_NAME)
        self._failure: Exception | None = None
        self._declare()
        self._check_overrides()
        self._resets: Queue[Reset] = Queue(maxsize=1)
        self._resets.put(self._wanted_reset())
        self._reset_count = 0
        self._split = ""
        self._shown = Verdict()
        self._lock = threading.Lock()
        self._controller = CommandedPath(JOINTS, HOME_J)
        self._refused = 0
        self._stop = threading.Event()
        self._simulated_clock = bool(self.get_parameter("use_sim_time").value)
        self._image_publishers = {
            camera: self.create_publisher(Image, f"camera/{camera}/image_raw", SENSOR) for camera in CAMERAS
        }
        self._joint_publisher = self.create_publisher(JointState, "joint_states", EVENT)
        self._status_publisher = self.create_publisher(String, "~/status", LATCHED)
        self._diagnostics_publisher = self.create_publisher(DiagnosticArray, "/diagnostics", EVENT)
        self.create_subscription(JointTrajectory, "arm_controller/joint_trajectory", self._on_command, EVENT)
        self.create_service(Trigger, "~/reset", self._on_reset)
        self.add_on_set_parameters_callback(self._on_parameters)
        self._thread = threading.Thread(target=self._simulate, name="simulation")

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the simulation thread is running."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Ends the simulation thread and waits for it; raises the error that ended it before, if there was one."""
        self._stop.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _declare(self) -> None:
        def text(description: str) -> ParameterDescriptor:
            return ParameterDescriptor(description=description)

        def whole(description: str, low: int, high: int, *, read_only: bool) -> ParameterDescriptor:
            bounds = [IntegerRange(from_value=low, to_value=high, step=1)]
            return ParameterDescriptor(description=description, integer_range=bounds, read_only=read_only)

        def rate(description: str, low: float, high: float) -> ParameterDescriptor:
            bounds = [FloatingPointRange(from_value=low, to_value=high, step=0.0)]
            return ParameterDescriptor(description=description, floating_point_range=bounds, read_only=True)

        seed = whole("seed of the scene; used at the next reset", 0, LARGEST_SEED, read_only=False)
        self.declare_parameter("scene_seed", 0, seed)
        self.declare_parameter(
            "split", "all", text("combinations to choose from (train, held_out, all); used at the next reset")
        )
        self.declare_parameter(
            "task", "", text("instruction to build the scene for, drawn if empty; used at the next reset")
        )
        self.declare_parameter("image_size", 288, whole("side of the images in pixels", 32, 640, read_only=True))
        self.declare_parameter("camera_rate_hz", 20.0, rate("images per second and camera", 1.0, 60.0))
        self.declare_parameter("joint_rate_hz", 100.0, rate("joint states per second", 10.0, 500.0))

    def _check_overrides(self) -> None:
        """ConfigurationError for a parameter that nobody declares, perhaps misspelt; rclpy would ignore it."""
        for name in sorted(self._parameter_overrides):
            if not self.has_parameter(name):
                known = "scene_seed, split, task, image_size, camera_rate_hz, joint_rate_hz"
                raise ConfigurationError(f"parameter {name!r} does not exist; expected one of {known}")

    def _on_parameters(self, parameters: list[Parameter[Any]]) -> SetParametersResult:
        for parameter in parameters:
            try:
                if parameter.name == "use_sim_time" and parameter.value != self._simulated_clock:
                    raise ConfigurationError("parameter 'use_sim_time': changes only at start")
                if parameter.name == "split":
                    sample_scene(0, split=parameter.value)
                elif parameter.name == "task" and parameter.value:
                    Task.parse(parameter.value)
            except KiVlaError as error:
                return SetParametersResult(successful=False, reason=str(error))
        return SetParametersResult(successful=True)

    def _wanted_reset(self) -> Reset:
        seed, split, task = (self.get_parameter(name).value for name in ("scene_seed", "split", "task"))
        return Reset(sample_scene(seed, split=split, task=Task.parse(task) if task else None), split)

    def _on_reset(self, _request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        try:
            reset = self._wanted_reset()
            self._resets.put(reset, timeout=RESET_LIMIT_S)
            if not reset.finished.wait(RESET_LIMIT_S):
                raise SimulationError(f"no reset within {RESET_LIMIT_S:g} s; is this machine overloaded?")
        except KiVlaError as error:
            response.success, response.message = False, str(error)
        else:
            response.success, response.message = True, reset.status
        return response

    def _on_command(self, message: JointTrajectory) -> None:
        try:
            with self._lock:
                self._controller.take(message, self.get_clock().now().nanoseconds)
        except InputError as error:
            self._refused += 1
            self.get_logger().error(str(error), throttle_duration_sec=1.0)

    def _simulate(self) -> None:
        """Runs in the simulation thread."""
        try:
            world = World(render_size=self.get_parameter("image_size").value)
            try:
                self._run(world)
            finally:
                world.close()
        except Exception as error:  # stop() raises it in the main thread
            self._failure = error

    def _run(self, world: World) -> None:
        joint_period, camera_period = self._period("joint_rate_hz"), self._period("camera_rate_hz")
        pace = Pace(TIMESTEP_S, MOST_CATCH_UP_S)
        steps = before_ns = 0
        if self._simulated_clock:
            self.get_logger().info("use_sim_time: the arm moves by /clock")
        while not self._stop.is_set():
            with suppress(Empty):
                self._begin(world, self._resets.get_nowait())
            now_s, now_ns = self._now_s(), self.get_clock().now().nanoseconds
            due = pace.due(now_s) if now_ns else 0  # 0: before the first message on /clock
            if now_ns < before_ns:
                with self._lock:  # its trajectory is of a time that has not come yet
                    self._controller.hold(world.joint_position_J)
            before_ns = now_ns
            for behind in reversed(range(due)):
                step_ns = now_ns - behind * STEP_NS
                with self._lock:
                    command_J, _ = self._controller.sample(step_ns)
                world.step(command_J)
                steps += 1
                stamp = Time(sec=step_ns // NS_PER_S, nanosec=step_ns % NS_PER_S)
                # Counted in steps, not by the clock: after a slow image the rates and the messages' stamps stay right.
                if steps % joint_period == 0:
                    self._joint_publisher.publish(joint_message(stamp, world))
                if steps % camera_period == 0:
                    for camera, publisher in self._image_publishers.items():
                        publisher.publish(image_message(camera, stamp, world.render(camera)))
                if steps % STEPS_PER_S == 0:
                    self._diagnostics_publisher.publish(self._diagnostics(stamp, pace))
            if world.judge.verdict != self._shown:
                self._publish_status(world)
            wait_s = pace.wait_s(joint_period - steps % joint_period, self._now_s())
            self._stop.wait(min(wait_s, SIMULATED_CLOCK_POLL_S) if self._simulated_clock else wait_s)

    def _now_s(self) -> float:
        """The time by which the arm moves. Without /clock it is a steady one, so nobody's correction makes it jump."""
        return self.get_clock().now().nanoseconds / NS_PER_S if self._simulated_clock else time.monotonic()

    def _period(self, rate: str) -> int:
        """Physics steps between two messages."""
        rate_hz = float(self.get_parameter(rate).value)
        return max(1, round(1.0 / (rate_hz * TIMESTEP_S)))

    def _begin(self, world: World, reset: Reset) -> None:
        world.reset(reset.scene)
        with self._lock:
            self._controller.hold(world.joint_position_J)
        self._reset_count += 1
        self._split = reset.split
        reset.status = self._publish_status(world)
        reset.finished.set()

    def _publish_status(self, world: World) -> str:
        """Publishes and returns the JSON of `~/status`; places in m, `time_s` since the reset."""
        scene, verdict = world.scene, world.judge.verdict
        objects = [
            {"colour": o.colour, "shape": o.shape, "x": round(o.x, 4), "y": round(o.y, 4)} for o in scene.objects
        ]
        status = {
            "reset_id": self._reset_count,
            "scene_seed": scene.seed,
            "split": self._split,
            "instruction": scene.task.instruction,
            "objects": objects,
            "target": scene.target,
            "reached": verdict.reached,
            "success": verdict.success,
            "done": verdict.done,
            "time_s": round(world.time_s, 3),
        }
        text = json.dumps(status)
        self._status_publisher.publish(String(data=text))
        self._shown = verdict
        return text

    def _diagnostics(self, stamp: Time, pace: Pace) -> DiagnosticArray:
        values = {"overruns": pace.overruns, "refused_trajectories": self._refused, "resets": self._reset_count}
        status = DiagnosticStatus(name=f"{NODE_NAME}: simulation", hardware_id="simulated arm")
        status.level = DiagnosticStatus.OK
        status.message = "in real time" if pace.overruns == 0 else "has been slower than real time"
        status.values = [KeyValue(key=key, value=str(value)) for key, value in values.items()]
        message = DiagnosticArray(status=[status])
        message.header.stamp = stamp
        return message


def _run(_given: argparse.Namespace, stop: threading.Event) -> int:
    node = ArmNode()
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    node.start()
    while node.alive and not stop.is_set():
        executor.spin_once(timeout_sec=0.1)
    node.stop()
    node.destroy_node()
    return ExitCode.FINE


def main(arguments: Sequence[str] | None = None) -> int:
    """The executable `sim_arm`: returns 0 after SIGINT or SIGTERM, 2 with one message if something failed."""
    description = "The simulated arm: cameras and joint states out, joint trajectories in, in real time."
    return run_node(argparse.ArgumentParser(prog=NODE_NAME, description=description), _run, arguments)


if __name__ == "__main__":
    sys.exit(main())
