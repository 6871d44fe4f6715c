"""The demo's ROS client: tells simulator and policy what to do, and notes what they publish.

A thread spins the node; its callbacks only note numbers and pass messages on to the recorder. The methods that request
something (`configure`, `reset`, ...) block the calling thread, and raise on a refusal or if no answer comes.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import SetParametersAtomically
from rclpy.client import Client
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.serialization import deserialize_message
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from ki_vla_ros.errors import ConfigurationError, KiVlaError
from ki_vla_ros.messages import DIAGNOSTICS as DIAGNOSTICS_TYPE
from ki_vla_ros.messages import IMAGE, JOINT_STATE, TEXT, TRAJECTORY
from ki_vla_ros.ros.qos import EVENT, EVERYTHING, LATCHED, SENSOR
from ki_vla_ros.ros.services import AGAIN_S, ask, change_state
from ki_vla_ros.settings import session_topic

POLICY: Final = "policy"
ARM: Final = "sim_arm"
SCENE_IMAGE: Final = "/camera/scene/image_raw"
WRIST_IMAGE: Final = "/camera/wrist/image_raw"
STATUS: Final = f"/{ARM}/status"
CHUNK: Final = f"/{POLICY}/chunk"
TICK: Final = f"/{POLICY}/tick"
INSTRUCTION: Final = f"/{POLICY}/instruction"
SESSION: Final = session_topic(f"/{POLICY}")
DIAGNOSTICS: Final = "/diagnostics"
TOPICS: Final[Mapping[str, tuple[type[Any], str]]] = {
    SCENE_IMAGE: (Image, IMAGE),
    WRIST_IMAGE: (Image, IMAGE),
    "/joint_states": (JointState, JOINT_STATE),
    "/arm_controller/joint_trajectory": (JointTrajectory, TRAJECTORY),
    CHUNK: (JointTrajectory, TRAJECTORY),
    TICK: (String, TEXT),
    STATUS: (String, TEXT),
    DIAGNOSTICS: (DiagnosticArray, DIAGNOSTICS_TYPE),
    INSTRUCTION: (String, TEXT),
    SESSION: (String, TEXT),
}
# Participants that miss each other's first announcement discover each other at the next one, 3 s later.
DISCOVERY_LIMIT_S: Final = 5.0
START_LIMIT_S: Final = 60.0
ANSWER_LIMIT_S: Final = 15.0
# The simulator gives a reset up itself after 10 s; before that, a second one would come on top.
RESET_AGAIN_S: Final = 12.0

RecordMessage = Callable[[str, int, bytes], None]


@dataclass(slots=True)
class Observed:
    """What was received while the policy was active: arrival times in s on a steady clock, and the ticks' fields."""

    chunk_times_s: list[float] = field(default_factory=list)
    image_times_s: dict[str, list[float]] = field(default_factory=lambda: {SCENE_IMAGE: [], WRIST_IMAGE: []})
    ticks: list[dict[str, Any]] = field(default_factory=list)


class Driver:
    """A context manager: joins ROS on entering the `with` block and leaves it on exit."""

    def __init__(self, check_children: Callable[[], None]) -> None:
        """`check_children` raises when a child process has ended; every wait calls it."""
        self._check_children = check_children
        self._record: RecordMessage | None = None
        self._lock = threading.Lock()
        self._observed = Observed()
        self._status: dict[str, Any] = {}
        self._overruns = 0
        self._stop = threading.Event()

    def __enter__(self) -> Driver:
        # Ctrl-C must raise KeyboardInterrupt in the main thread and leave ROS alive for an orderly end.
        rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
        self._node = Node("demo")
        self._instruct = self._node.create_publisher(String, INSTRUCTION, EVENT)
        self._change_state: Client[Any, Any] = self._node.create_client(ChangeState, f"/{POLICY}/change_state")
        self._get_state: Client[Any, Any] = self._node.create_client(GetState, f"/{POLICY}/get_state")
        self._set_parameters: Client[Any, Any] = self._node.create_client(
            SetParametersAtomically, f"/{ARM}/set_parameters_atomically"
        )
        self._reset: Client[Any, Any] = self._node.create_client(Trigger, f"/{ARM}/reset")
        for topic, (kind, _) in TOPICS.items():
            # A lost image does not matter; no chunk or tick may be lost.
            qos = SENSOR if kind is Image else LATCHED if topic in (STATUS, SESSION) else EVERYTHING
            self._node.create_subscription(kind, topic, partial(self._on_message, topic), qos, raw=True)
        self._thread = threading.Thread(target=self._spin, name="ros")
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._node.destroy_node()
        rclpy.try_shutdown()

    def _spin(self) -> None:
        executor = SingleThreadedExecutor()
        executor.add_node(self._node)
        while not self._stop.is_set():
            executor.spin_once(timeout_sec=0.1)

    # --- requests

    def check_alone(self) -> None:
        """ConfigurationError if an arm or a policy already runs in this ROS domain; to be called before any starts."""
        end_s = time.monotonic() + DISCOVERY_LIMIT_S
        while time.monotonic() < end_s:
            for name in self._node.get_node_names():
                if name in (POLICY, ARM):
                    domain = self._node.context.get_domain_id()
                    raise ConfigurationError(
                        f"ROS domain {domain} is in use: a node '{name}' already runs in it, and two policies would "
                        "command one arm; stop it, choose another ROS_DOMAIN_ID, or unset that for a free one"
                    )
            time.sleep(0.1)

    def wait_until_up(self) -> None:
        """Waits for both children's services and for the policy's subscription to instructions."""
        for client in (self._reset, self._set_parameters, self._get_state, self._change_state):
            self._wait(client.service_is_ready, f"service {client.srv_name}", START_LIMIT_S)
        self._wait(lambda: self._instruct.get_subscription_count() > 0, f"subscriber to {INSTRUCTION}", START_LIMIT_S)

    def record(self, record: RecordMessage | None) -> None:
        """Passes each message to `record` from now on; None: to nobody."""
        self._record = record

    def configure(self) -> None:
        """Has the policy load its bundle."""
        self._transition(Transition.TRANSITION_CONFIGURE, "configure", START_LIMIT_S)

    def activate(self) -> None:
        with self._lock:
            self._observed = Observed()
        self._transition(Transition.TRANSITION_ACTIVATE, "activate", ANSWER_LIMIT_S)

    def deactivate(self) -> Observed:
        """Deactivates the policy; returns what was received since `activate`."""
        self._transition(Transition.TRANSITION_DEACTIVATE, "deactivate", ANSWER_LIMIT_S)
        return self.observed

    def reset(self, seed: int, split: str, task: str) -> dict[str, Any]:
        """Has the simulator build a scene; returns its status. With `task` "" the task is drawn with the scene."""
        values = {
            "scene_seed": ParameterValue(type=ParameterType.PARAMETER_INTEGER, integer_value=seed),
            "split": ParameterValue(type=ParameterType.PARAMETER_STRING, string_value=split),
            "task": ParameterValue(type=ParameterType.PARAMETER_STRING, string_value=task),
        }
        request = SetParametersAtomically.Request()
        request.parameters = [Parameter(name=name, value=value) for name, value in values.items()]
        result = self._call(self._set_parameters, request, ANSWER_LIMIT_S).result
        if not result.successful:
            raise KiVlaError(f"{ARM} refused the scene's parameters: {result.reason}")
        answer = self._call(self._reset, Trigger.Request(), 2.0 * RESET_AGAIN_S, RESET_AGAIN_S)
        if not answer.success:
            raise KiVlaError(f"{ARM} did not reset: {answer.message}")
        status: dict[str, Any] = json.loads(answer.message)
        with self._lock:
            self._status = status
        return status

    def instruct(self, text: str) -> None:
        self._instruct.publish(String(data=text))

    def sleep(self, duration_s: float) -> None:
        """Waits; raises if a child ends meanwhile."""
        deadline_s = time.monotonic() + duration_s
        while (left_s := deadline_s - time.monotonic()) > 0.0:
            self._check_children()
            time.sleep(min(left_s, 0.1))

    # --- what was received

    @property
    def status(self) -> dict[str, Any]:
        """The simulator's newest status."""
        with self._lock:
            return self._status

    @property
    def overruns(self) -> int:
        """How often the simulator has dropped time to keep up with the wall clock, since it started."""
        return self._overruns

    @property
    def observed(self) -> Observed:
        """A copy of what was received since `activate`."""
        with self._lock:
            now = self._observed
            images = {topic: list(times) for topic, times in now.image_times_s.items()}
            return Observed(list(now.chunk_times_s), images, list(now.ticks))

    def _on_message(self, topic: str, serialised: bytes) -> None:
        now_s = time.monotonic()
        if (record := self._record) is not None:
            record(topic, self._node.get_clock().now().nanoseconds, serialised)
        with self._lock:
            if topic == CHUNK:
                self._observed.chunk_times_s.append(now_s)
            elif topic in self._observed.image_times_s:
                self._observed.image_times_s[topic].append(now_s)
            elif topic == TICK:
                self._observed.ticks.append(json.loads(deserialize_message(serialised, String).data))
            elif topic == STATUS:
                status = json.loads(deserialize_message(serialised, String).data)
                if status["reset_id"] >= self._status.get("reset_id", 0):
                    self._status = status
            elif topic == DIAGNOSTICS:
                self._note_overruns(deserialize_message(serialised, DiagnosticArray))

    def _note_overruns(self, message: DiagnosticArray) -> None:
        for status in message.status:
            if status.name.startswith(ARM):
                self._overruns = int({entry.key: entry.value for entry in status.values}["overruns"])

    def _transition(self, number: int, name: str, limit_s: float) -> None:
        made = change_state(self._change_state, self._get_state, number, limit_s, self._until)
        if not given(made, f"answer from {self._change_state.srv_name}", limit_s):
            raise KiVlaError(f"the policy could not {name}")

    def _call(self, client: Any, request: Any, limit_s: float, again_s: float = AGAIN_S) -> Any:
        return given(ask(client, request, limit_s, self._until, again_s), f"answer from {client.srv_name}", limit_s)

    def _wait(self, condition: Callable[[], bool], what: str, limit_s: float) -> None:
        given(self._until(condition, limit_s) or None, what, limit_s)

    def _until(self, condition: Callable[[], bool], limit_s: float) -> bool:
        """Whether it came true in time."""
        deadline_s = time.monotonic() + limit_s
        while not (true := condition()) and time.monotonic() < deadline_s:
            self._check_children()
            time.sleep(0.005)
        return true


def given(what: Any, name: str, limit_s: float) -> Any:
    """What was waited for; KiVlaError if it is None."""
    if what is None:
        raise KiVlaError(f"no {name} within {limit_s:g} s; is the machine overloaded?")
    return what
