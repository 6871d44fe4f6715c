"""What every simulated robot shares as a ROS node: cameras and joint states out, trajectories in, in real time.

There are two threads. The main thread spins ROS; the simulation thread owns the world and its rendering context (which
works only in the thread that made it), follows the clock and publishes. They share the simulated controllers, under a
lock, and a one-place queue for resets. With `use_sim_time` the robot moves by /clock, which something else publishes.
With `publish_clock` it publishes /clock itself, for all others: on a machine that is too slow for real time, that clock
is slower, and nothing is lost.
Legend: H image height, W width, C channel, J joints.
"""

from __future__ import annotations

import argparse
import array
import dataclasses
import json
import math
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, Queue
from typing import Any, Final, Protocol

import numpy as np
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from numpy.typing import ArrayLike, NDArray
from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor, SetParametersResult
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from rosgraph_msgs.msg import Clock
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
from ki_vla_ros.sim.task import LARGEST_SEED
from ki_vla_ros.sim.world import TIMESTEP_S

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


class Judge(Protocol):
    @property
    def verdict(self) -> Any:
        """A dataclass that compares by value; its fields are published."""
        ...


class SimulatedWorld(Protocol):
    """Physics and cameras of one robot, made and used in one thread."""

    @property
    def judge(self) -> Judge: ...
    @property
    def time_s(self) -> float: ...
    @property
    def joint_position_J(self) -> NDArray[np.float64]: ...
    @property
    def joint_velocity_J(self) -> NDArray[np.float64]: ...
    def reset(self, scene: Any) -> None: ...
    def step(self, command_J: ArrayLike) -> None: ...
    def render(self, camera: str) -> NDArray[np.uint8]: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Part:
    """Joints that one controller moves and whose states come in one message; topics without a leading slash."""

    joints: tuple[str, ...]
    joint_states: str
    command: str


@dataclass(slots=True)
class Reset:
    """The scene to build next; the simulation thread fills `status`, then sets `finished`.

    `description` is what the status says about the scene.
    """

    scene: Any
    description: dict[str, Any]
    finished: threading.Event = field(default_factory=threading.Event)
    status: str = ""


def joint_message(
    stamp: Time, joints: Sequence[str], position_J: NDArray[np.float64], velocity_J: NDArray[np.float64]
) -> JointState:
    message = JointState()
    message.header.stamp = stamp
    message.name = list(joints)
    message.position = array.array("d", position_J)
    message.velocity = array.array("d", velocity_J)
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


class Simulation(Node):
    """Simulates from `start` to `stop`; ConfigurationError or InstructionError for impossible parameters."""

    def __init__(
        self,
        name: str,
        robot: str,
        cameras: Sequence[str],
        parts: Sequence[Part],
        joints: Sequence[str],
        home_J: NDArray[np.float64],
    ) -> None:
        """`parts` have each of `joints`, the world's, once; `home_J` is where the controllers hold them at first."""
        super().__init__(name)
        self._robot = robot
        self._failure: Exception | None = None
        inherited = set(self._parameters)
        self.declare_scene()
        self.declare_number("camera_rate_hz", 20.0, "images per second and camera", 1.0, 60.0)
        self.declare_number("joint_rate_hz", 100.0, "joint states per second", 10.0, 500.0)
        clock = "publish /clock, which is in real time where the machine can keep up, and else slower"
        self.declare_parameter("publish_clock", False, ParameterDescriptor(description=clock, read_only=True))
        self._check_overrides([known for known in self._parameters if known not in inherited])
        self._resets: Queue[Reset] = Queue(maxsize=1)
        self._resets.put(Reset(*self.wanted_scene()))
        self._reset_count = 0
        self._description: dict[str, Any] = {}
        self._shown: Any = None
        self._lock = threading.Lock()
        self._parts = tuple(parts)
        self._index = [np.array([joints.index(joint) for joint in part.joints]) for part in parts]
        self._command_J = home_J.copy()
        self._controllers = [
            CommandedPath(part.joints, home_J[index]) for part, index in zip(self._parts, self._index, strict=True)
        ]
        self._refused = 0
        self._stop = threading.Event()
        self._simulated_clock = bool(self.get_parameter("use_sim_time").value)
        self._own_clock, self._own_ns = None, self.get_clock().now().nanoseconds
        if self.get_parameter("publish_clock").value:
            if self._simulated_clock:
                raise ConfigurationError("publish_clock: expected false with use_sim_time: someone else has the clock")
            self._own_clock = self.create_publisher(Clock, "/clock", EVENT)
        self._image_publishers = {
            camera: self.create_publisher(Image, f"camera/{camera}/image_raw", SENSOR) for camera in cameras
        }
        topics = {part.joint_states for part in self._parts}
        self._joint_publishers = {topic: self.create_publisher(JointState, topic, EVENT) for topic in topics}
        self._status_publisher = self.create_publisher(String, "~/status", LATCHED)
        self._diagnostics_publisher = self.create_publisher(DiagnosticArray, "/diagnostics", EVENT)
        for part, controller in zip(self._parts, self._controllers, strict=True):
            take = self._taker(controller)
            self.create_subscription(JointTrajectory, part.command, take, EVENT)
        self.create_service(Trigger, "~/reset", self._on_reset)
        self.add_on_set_parameters_callback(self._on_parameters)
        self._thread = threading.Thread(target=self._simulate, name="simulation")

    @abstractmethod
    def declare_scene(self) -> None:
        """Declares the robot's own parameters."""

    @abstractmethod
    def wanted_scene(self) -> tuple[Any, dict[str, Any]]:
        """The scene that the parameters ask for, and what the status says about it; KiVlaError if there is none."""

    @abstractmethod
    def make_world(self) -> SimulatedWorld:
        """Called in the simulation thread."""

    def check_parameter(self, name: str, value: Any) -> None:
        """KiVlaError for a value of the robot's own parameters that is impossible whatever the others are."""

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

    def declare_seed(self, largest: int = LARGEST_SEED) -> None:
        self.declare_whole("scene_seed", 0, "seed of the scene; used at the next reset", 0, largest, read_only=False)

    def declare_whole(
        self, name: str, value: int, description: str, low: int, high: int, *, read_only: bool = True
    ) -> None:
        bounds = [IntegerRange(from_value=low, to_value=high, step=1)]
        descriptor = ParameterDescriptor(description=description, integer_range=bounds, read_only=read_only)
        self.declare_parameter(name, value, descriptor)

    def declare_number(self, name: str, value: float, description: str, low: float, high: float) -> None:
        bounds = [FloatingPointRange(from_value=low, to_value=high, step=0.0)]
        descriptor = ParameterDescriptor(description=description, floating_point_range=bounds, read_only=True)
        self.declare_parameter(name, value, descriptor)

    def _check_overrides(self, own: Sequence[str]) -> None:
        """ConfigurationError for a parameter that nobody declares, perhaps misspelt; rclpy would ignore it."""
        for name in sorted(self._parameter_overrides):
            if not self.has_parameter(name):
                raise ConfigurationError(f"parameter {name!r} does not exist; expected one of {', '.join(own)}")

    def _on_parameters(self, parameters: list[Parameter[Any]]) -> SetParametersResult:
        for parameter in parameters:
            try:
                if parameter.name == "use_sim_time" and parameter.value != self._simulated_clock:
                    raise ConfigurationError("parameter 'use_sim_time': changes only at start")
                self.check_parameter(parameter.name, parameter.value)
            except KiVlaError as error:
                return SetParametersResult(successful=False, reason=str(error))
        return SetParametersResult(successful=True)

    def _on_reset(self, _request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        try:
            reset = Reset(*self.wanted_scene())
            self._resets.put(reset, timeout=RESET_LIMIT_S)
            if not reset.finished.wait(RESET_LIMIT_S):
                raise SimulationError(f"no reset within {RESET_LIMIT_S:g} s; is this machine overloaded?")
        except KiVlaError as error:
            response.success, response.message = False, str(error)
        else:
            response.success, response.message = True, reset.status
        return response

    def _taker(self, controller: CommandedPath) -> Callable[[JointTrajectory], None]:
        def take(message: JointTrajectory) -> None:
            try:
                with self._lock:
                    controller.take(message, self._now_ns())
            except InputError as error:
                self._refused += 1
                self.get_logger().error(str(error), throttle_duration_sec=1.0)

        return take

    def _simulate(self) -> None:
        """Runs in the simulation thread."""
        try:
            world = self.make_world()
            try:
                self._run(world)
            finally:
                world.close()
        except Exception as error:  # stop() raises it in the main thread
            self._failure = error

    def _run(self, world: SimulatedWorld) -> None:
        joint_period, camera_period = self._period("joint_rate_hz"), self._period("camera_rate_hz")
        pace = Pace(TIMESTEP_S, MOST_CATCH_UP_S)
        steps = before_ns = 0
        if self._simulated_clock:
            self.get_logger().info("use_sim_time: the arm moves by /clock")
        while not self._stop.is_set():
            with suppress(Empty):
                self._begin(world, self._resets.get_nowait())
            now_s, now_ns = self._now_s(), self._now_ns()
            due = pace.due(now_s) if now_ns else 0  # 0: before the first message on /clock
            if now_ns < before_ns:
                self._hold(world)  # its trajectory is of a time that has not come yet
            before_ns = now_ns
            for behind in reversed(range(due)):
                step_ns = now_ns - behind * STEP_NS
                if self._own_clock is not None:
                    step_ns = self._own_ns = self._own_ns + STEP_NS
                with self._lock:
                    for index, controller in zip(self._index, self._controllers, strict=True):
                        self._command_J[index] = controller.sample(step_ns)[0]
                world.step(self._command_J)
                steps += 1
                stamp = Time(sec=step_ns // NS_PER_S, nanosec=step_ns % NS_PER_S)
                # Counted in steps, not by the clock: after a slow image the rates and the messages' stamps stay right.
                if steps % joint_period == 0:
                    if self._own_clock is not None:
                        self._own_clock.publish(Clock(clock=stamp))
                    self._publish_joints(world, stamp)
                if steps % camera_period == 0:
                    for camera, publisher in self._image_publishers.items():
                        publisher.publish(image_message(camera, stamp, world.render(camera)))
                if steps % STEPS_PER_S == 0:
                    self._diagnostics_publisher.publish(self._diagnostics(stamp, pace))
            if world.judge.verdict != self._shown:
                self._publish_status(world)
            wait_s = pace.wait_s(joint_period - steps % joint_period, self._now_s())
            self._stop.wait(min(wait_s, SIMULATED_CLOCK_POLL_S) if self._simulated_clock else wait_s)

    def _now_ns(self) -> int:
        """The time of stamps: that of this node's ROS clock, or the one that it publishes."""
        return self._own_ns if self._own_clock is not None else int(self.get_clock().now().nanoseconds)

    def _now_s(self) -> float:
        """The time by which the arm moves. Without /clock it is a steady one, so nobody's correction makes it jump."""
        return self.get_clock().now().nanoseconds / NS_PER_S if self._simulated_clock else time.monotonic()

    def _period(self, rate: str) -> int:
        """Physics steps between two messages."""
        rate_hz = float(self.get_parameter(rate).value)
        return max(1, round(1.0 / (rate_hz * TIMESTEP_S)))

    def _hold(self, world: SimulatedWorld) -> None:
        position_J = world.joint_position_J
        with self._lock:
            for index, controller in zip(self._index, self._controllers, strict=True):
                controller.hold(position_J[index])

    def _begin(self, world: SimulatedWorld, reset: Reset) -> None:
        world.reset(reset.scene)
        self._hold(world)
        self._reset_count += 1
        self._description = reset.description
        reset.status = self._publish_status(world)
        reset.finished.set()

    def _publish_joints(self, world: SimulatedWorld, stamp: Time) -> None:
        position_J, velocity_J = world.joint_position_J, world.joint_velocity_J
        for part, index in zip(self._parts, self._index, strict=True):
            message = joint_message(stamp, part.joints, position_J[index], velocity_J[index])
            self._joint_publishers[part.joint_states].publish(message)

    def _publish_status(self, world: SimulatedWorld) -> str:
        """Publishes and returns the JSON of `~/status`; places in m, `time_s` since the reset."""
        verdict = world.judge.verdict
        status = {
            "reset_id": self._reset_count,
            **self._description,
            **dataclasses.asdict(verdict),
            "time_s": round(world.time_s, 3),
        }
        text = json.dumps(status)
        self._status_publisher.publish(String(data=text))
        self._shown = verdict
        return text

    def _diagnostics(self, stamp: Time, pace: Pace) -> DiagnosticArray:
        values = {"overruns": pace.overruns, "refused_trajectories": self._refused, "resets": self._reset_count}
        status = DiagnosticStatus(name=f"{self.get_name()}: simulation", hardware_id=self._robot)
        status.level = DiagnosticStatus.OK
        status.message = "in real time" if pace.overruns == 0 else "has been slower than real time"
        status.values = [KeyValue(key=key, value=str(value)) for key, value in values.items()]
        message = DiagnosticArray(status=[status])
        message.header.stamp = stamp
        return message


def run_simulation(
    make: Callable[[], Simulation], name: str, description: str, arguments: Sequence[str] | None = None
) -> int:
    """A simulation's `main`: returns 0 after SIGINT or SIGTERM, 2 with one message if something failed."""

    def run(_given: argparse.Namespace, stop: threading.Event) -> int:
        node = make()
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        node.start()
        while node.alive and not stop.is_set():
            executor.spin_once(timeout_sec=0.1)
        node.stop()
        node.destroy_node()
        return ExitCode.FINE

    return run_node(argparse.ArgumentParser(prog=name, description=description), run, arguments)
