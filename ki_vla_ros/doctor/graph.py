"""The doctor's look at a running system: nodes, topics, QoS, clock, controller. It publishes nothing."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import rclpy
from geometry_msgs.msg import PoseStamped
from rcl_interfaces.srv import GetParameters, ListParameters
from rclpy.duration import Infinite
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter, parameter_value_to_python
from rclpy.qos import QoSCompatibility, QoSProfile, qos_check_compatible
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import String

from ki_vla_ros.doctor.checks import check_inputs
from ki_vla_ros.doctor.findings import Findings
from ki_vla_ros.doctor.inputs import Expected, InputWatch, image_type
from ki_vla_ros.doctor.setup import Machine, Request, examine_setup, read_settings
from ki_vla_ros.errors import InputError
from ki_vla_ros.messages import COMPRESSED_IMAGE, IMAGE, JOINT_STATE, POSE, POSITIONS, BagMessage
from ki_vla_ros.robot import ACTIONS
from ki_vla_ros.ros import COMMAND_KINDS, endpoint_name, publishers
from ki_vla_ros.ros.process import cannot_start, check_domain
from ki_vla_ros.ros.qos import EVENT, LATCHED, SENSOR
from ki_vla_ros.ros.services import ask
from ki_vla_ros.settings import (
    CommandTopic,
    Session,
    Settings,
    command_topics,
    read_session,
    resolve,
    session_topic,
    settings_from_values,
)
from ki_vla_ros.share import PROFILE_VARIABLES

# How long discovery of the node, of everything else, and a service's answer may take, and when it is asked again.
FIRST_S, DISCOVERY_S, ANSWER_S, AGAIN_S = 5.0, 2.0, 3.0, 1.0
KINDS: Mapping[str, Any] = {
    IMAGE: Image,
    COMPRESSED_IMAGE: CompressedImage,
    JOINT_STATE: JointState,
    POSE: PoseStamped,
    **COMMAND_KINDS,
}
CONTROLLER_PARAMETERS = (
    "joints",
    "interpolation_method",
    "interpolate_from_desired_state",
    "allow_partial_joints_goal",
)
# EVENT as the node's publisher offers it: rclpy's zero durations mean "default", which rclpy's check does not know.
COMMAND_QOS = QoSProfile(depth=EVENT.depth, deadline=Infinite, lifespan=Infinite, liveliness_lease_duration=Infinite)
QOS_FIX = "give both sides compatible QoS: a reliable, volatile publisher suits every subscription of this package"


class Graph:
    """Questions that one can ask a running system."""

    def __init__(self, node: Node, spin_until: Callable[[Callable[[], bool], float], None]) -> None:
        self.node, self._spin_until = node, spin_until

    def wait_for(self, node: str) -> None:
        """Wait until the node is discovered, and then for everything else."""
        self._spin_until(lambda: node in self.nodes, FIRST_S)
        self.wait(DISCOVERY_S)

    def wait(self, seconds: float) -> None:
        self._spin_until(lambda: False, seconds)

    @property
    def nodes(self) -> list[str]:
        pairs = self.node.get_node_names_and_namespaces()
        return [f"{namespace.rstrip('/')}/{name}" for name, namespace in pairs if name != self.node.get_name()]

    def topics(self) -> dict[str, list[str]]:
        """Types by name, of the topics that someone publishes."""
        return {
            name: kinds for name, kinds in self.node.get_topic_names_and_types() if self.node.count_publishers(name)
        }

    def parameters(self, node: str, names: Sequence[str] | None = None) -> dict[str, Any] | None:
        """A node's parameters, all or those of `names` that are set; None if it does not answer."""
        listed = self._call(ListParameters, f"{node}/list_parameters", ListParameters.Request())
        if listed is None:
            return None
        # A node that is asked for a parameter it does not have may answer with none at all.
        known = [name for name in listed.result.names if names is None or name in names]
        found = self._call(GetParameters, f"{node}/get_parameters", GetParameters.Request(names=known))
        if found is None:
            return None
        values = zip(known, found.values, strict=True)
        return {name: value for name, v in values if (value := parameter_value_to_python(v)) is not None}

    def session(self, node: str) -> Session | None:
        """What the node says of itself (`~/session`, which late subscribers get too); None if nothing comes."""
        texts: list[str] = []
        topic = session_topic(node)
        subscription = self.node.create_subscription(String, topic, lambda m: texts.append(m.data), LATCHED)
        try:
            self._spin_until(lambda: bool(texts), ANSWER_S if self.node.count_publishers(topic) else 0.0)
            return read_session(texts[-1]) if texts else None
        except InputError:
            return None  # of another version
        finally:
            self.node.destroy_subscription(subscription)

    def _call(self, kind: Any, service: str, request: Any) -> Any:
        client: Any = self.node.create_client(kind, service)
        try:
            self._spin_until(client.service_is_ready, ANSWER_S)
            if not client.service_is_ready():
                return None
            return ask(client, request, ANSWER_S, self._spin_until, AGAIN_S)
        finally:
            self.node.destroy_client(client)


def examine(request: Request, findings: Findings) -> list[str]:
    """What was looked at."""
    looked_at: list[str] = []
    with open_graph() as graph:
        graph.wait_for(request.node)
        running = _check_node(graph, request.node, findings)
        values = graph.parameters(request.node) if running else None
        if request.params is not None:
            settings = read_settings(request.params, findings, request.node)
            looked_at.append(f"parameters {request.params}")
        elif values is not None:
            settings = settings_from_values(values)
            looked_at.append(f"parameters of {request.node}")
        elif request.bundle:
            settings = Settings(bundle=request.bundle)
        else:
            findings.error("node", request.node, "its parameters cannot be read", "start it, or give --params")
            return looked_at
        if settings is None:
            return looked_at
        session = graph.session(request.node) if values is not None and request.params is None else None
        if session is not None and not session.parameters.items() <= (values or {}).items():
            session = None  # from before it was cleaned up and got other parameters
        bundle = examine_setup(settings, request, findings, looked_at)
        if bundle is not None:
            settings = settings.on_robot(bundle.manifest.robot)
        expected = Expected.of(bundle, settings, session, request.node)
        simulated = bool((values or {}).get("use_sim_time", False))
        _check_clock(graph, request.node, simulated, findings)
        cameras = {name: resolve(settings.camera(name).topic, request.node) for name in expected.optional_cameras}
        commands = command_topics(settings, expected.robot, request.node, session)
        if session is not None:  # names after remapping
            looked_at.append("topics as the node says")
            cameras |= {name: topic for name, topic in session.topics.cameras.items() if name in cameras}
        watch = InputWatch(expected, settings, cameras, commands)
        _check_endpoints(graph, watch, request.node, running, findings)
        for output in watch.outputs:
            _check_controller(graph, watch, output, findings)
        _check_period(graph, settings, findings)
        _listen(graph, watch, simulated, request.seconds)
        _check_joint_publishers(graph, watch, findings)
        check_inputs(watch, findings, graph.topics())
        looked_at.append(f"topics for {request.seconds:g} s")
    return looked_at


@contextmanager
def open_graph() -> Iterator[Graph]:
    check_domain()
    context = rclpy.Context()
    try:
        rclpy.init(args=[], context=context)
    except Exception as error:  # from C code; only its message is usable
        raise cannot_start(error) from error
    node = rclpy.create_node("doctor", context=context, enable_rosout=False, start_parameter_services=False)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)

    def spin_until(done: Callable[[], bool], seconds: float) -> None:
        end_s = time.monotonic() + seconds
        while not done() and (left_s := end_s - time.monotonic()) > 0:
            executor.spin_once(timeout_sec=min(left_s, 0.1))

    try:
        yield Graph(node, spin_until)
    finally:
        executor.shutdown()
        node.destroy_node()
        rclpy.try_shutdown(context=context)


def _check_node(graph: Graph, node: str, findings: Findings) -> bool:
    nodes = graph.nodes
    if node not in nodes:
        near = difflib.get_close_matches(node, nodes, n=1, cutoff=0.5)
        findings.error(
            "node",
            node,
            f"does not run in this ROS domain, where there are {', '.join(sorted(set(nodes))) or 'no nodes'}",
            f"use --node {near[0]}" if near else "start it, or set ROS_DOMAIN_ID as its terminal has it",
        )
    elif nodes.count(node) > 1:
        findings.error("node", node, f"runs {nodes.count(node)} times", "stop all but one, or give them namespaces")
    return node in nodes


def _check_clock(graph: Graph, node: str, simulated: bool, findings: Findings) -> None:
    publishers = graph.node.count_publishers("/clock")
    if simulated and not publishers:
        findings.error(
            "clock",
            node,
            "has use_sim_time: true, but nobody publishes /clock",
            "set use_sim_time: false, or start the simulator or `ros2 bag play --clock`",
        )
    elif publishers and not simulated:
        findings.warning(
            "clock",
            node,
            "/clock is published, but the node uses the wall clock",
            "set use_sim_time: true for all nodes",
        )


def _check_endpoints(graph: Graph, watch: InputWatch, node: str, running: bool, findings: Findings) -> None:
    inputs = [(topic, SENSOR) for topic in watch.inputs] + [(f"{node}/instruction", EVENT)]
    for topic, ours in inputs:
        for end in graph.node.get_publishers_info_by_topic(topic):
            _check_qos(topic, end, end.qos_profile, ours, f"{node} does not hear it", findings)
    for output in watch.outputs.values():
        if output.type in ACTIONS:
            _check_server(graph, output, findings)
        else:
            _check_command(graph, watch, output, node, running, findings)


def _check_server(graph: Graph, output: CommandTopic, findings: Findings) -> None:
    if f"{output.topic}/_action/send_goal" not in dict(graph.node.get_service_names_and_types()):
        findings.error(
            "command",
            output.topic,
            f"no server of {output.type} here",
            "start the controller, or correct the output's topic in the robot file",
        )


def _check_command(
    graph: Graph, watch: InputWatch, output: CommandTopic, node: str, running: bool, findings: Findings
) -> None:
    command, expected = output.topic, output.type
    listeners = graph.node.get_subscriptions_info_by_topic(command)
    for end in listeners:
        _check_qos(command, end, COMMAND_QOS, end.qos_profile, "commands do not reach it", findings)
    if not any(end.topic_type == expected for end in listeners):
        others = sorted({end.topic_type for end in listeners})
        likely = [
            name for name, kinds in graph.node.get_topic_names_and_types() if expected in kinds and name != command
        ]
        findings.error(
            "command",
            command,
            f"nobody subscribes to {expected} here" + (f", only {', '.join(others)}" if others else ""),
            "start the controller, or correct "
            + ("command_topic" if len(watch.outputs) == 1 else "the output's topic in the robot file")
            + (" or publish_mode" if others else "")
            + (f" (there is {', '.join(t for t in likely if not t.startswith(node))})" if likely else ""),
        )
    masters = publishers(graph.node, command)
    others = [name for name in masters if name != node]
    if others and (running or len(masters) > 1) and not watch.settings.shadow:  # a shadow is there to watch another
        findings.error(
            "command",
            command,
            f"is {'also ' if running else ''}published by {', '.join(others)}: two masters",
            "stop all but one, or let the others publish elsewhere",
        )


def _check_joint_publishers(graph: Graph, watch: InputWatch, findings: Findings) -> None:
    """Several publishers of joint states are an error, unless they were heard to publish other joints each."""
    for topic in watch.states:
        if len(names := publishers(graph.node, topic)) < 2:
            continue
        found = f"is published {len(names)} times, by {', '.join(names)}"
        if watch.other_joints[topic]:
            findings.warning(
                "joint states",
                topic,
                f"{found}; at least one publishes other joints than the arm's",
                "make sure that only one publishes the arm's",
            )
        elif len(names) > watch.kinds(topic):
            findings.error(
                "joint states",
                topic,
                f"{found}: the arm would be in several places at once",
                "stop all but one (often a joint_state_publisher), or let the others publish elsewhere",
            )


def _check_qos(topic: str, end: Any, offered: QoSProfile, asked: QoSProfile, effect: str, findings: Findings) -> None:
    fits, reason = qos_check_compatible(offered, asked)
    if fits == QoSCompatibility.ERROR:
        findings.error("qos", topic, f"{endpoint_name(end)}: {effect}: {reason.strip().rstrip(';')}", QOS_FIX)


def _check_controller(graph: Graph, watch: InputWatch, name: str, findings: Findings) -> None:
    """Checks the parameters of a controller of joints, if the output's topic or action belongs to one that answers."""
    output, ours = watch.outputs[name], _joints(watch.expected, name)
    controller, streamed = output.topic.rpartition("/")[0], output.type == POSITIONS
    values = graph.parameters(controller, CONTROLLER_PARAMETERS) if controller in graph.nodes else None
    if not values or not isinstance(values.get("joints"), list) or not ours:
        return
    theirs = values["joints"]
    if missing := [name for name in ours if name not in theirs]:
        findings.error("controller", controller, f"does not move {', '.join(missing)}", "add them to its joints")
    extra = [name for name in theirs if name not in ours]
    if extra and not values.get("allow_partial_joints_goal"):
        findings.error(
            "controller",
            controller,
            f"expects {', '.join(extra)} too, which the bundle does not move, and refuses every command",
            "set its allow_partial_joints_goal: true, or take those joints out of it",
        )
    if streamed and theirs != ours and not missing:
        findings.error(
            "joint order",
            controller,
            f"takes positions as {', '.join(theirs)}, the bundle sends {', '.join(ours)}",
            "put the controller's joints into the bundle's order: with stream there are no names",
        )
    if values.get("interpolation_method") == "none":
        findings.error(
            "controller", controller, "interpolation_method is none: it jumps from point to point", "set it to splines"
        )
    if not streamed and values.get("interpolate_from_desired_state") is False:
        findings.warning(
            "controller",
            controller,
            "interpolate_from_desired_state is false: each new command begins at the measured position, with its lag",
            "set it to true",
        )


def _joints(expected: Expected, name: str) -> list[str]:
    """The joints that an output moves; none where it moves something else, or without a bundle."""
    robot = expected.robot
    output = None if robot is None else next((output for output in robot.outputs if output.name == name), None)
    if robot is None or output is None:
        return []
    return [axis.name for axis in robot.axes[robot.axes_of(output)] if axis.joint]


def _check_period(graph: Graph, settings: Settings, findings: Findings) -> None:
    """A point of a command must not come more often than controllers look at it."""
    manager = (
        graph.parameters("/controller_manager", ("update_rate",)) if "/controller_manager" in graph.nodes else None
    )
    rate_hz = (manager or {}).get("update_rate")
    if isinstance(rate_hz, int) and rate_hz * settings.command_period_s < 1.0 - 1e-9:
        findings.warning(
            "period",
            "/controller_manager",
            f"updates {rate_hz} times per second, a command has a point every {settings.command_period_s:g} s",
            f"raise update_rate, or command_period_s to {1.0 / rate_hz:g}",
        )


def _listen(graph: Graph, watch: InputWatch, simulated: bool, seconds: float) -> None:
    node = graph.node
    if simulated:
        node.set_parameters([Parameter("use_sim_time", Parameter.Type.BOOL, True)])
    published = graph.topics()
    expected = {
        topic: image_type(watch.settings, name) for name, topic in zip(watch.cameras, watch.topics, strict=False)
    }
    commands = {output.topic: output.type for output in watch.outputs.values() if output.type not in ACTIONS}
    expected |= {**watch.expected.topics, **commands}

    def take(topic: str, kind: str, data: bytes) -> None:
        watch.add(BagMessage(topic, kind, int(node.get_clock().now().nanoseconds), data))

    for topic, own in expected.items():
        for kind in published.get(topic, [own]):
            if kind in KINDS:
                take_it = partial(take, topic, kind)
                node.create_subscription(KINDS[kind], topic, take_it, SENSOR, raw=True)
    graph.wait(seconds)


def is_policy_node(arguments: Sequence[bytes]) -> bool:
    """Whether a process with these arguments is the node: from lib/ki_vla_ros, as a module, or as `ki-vla node`."""
    if any(argument == b"ki_vla_ros.ros.node" or argument.endswith(b"/policy_node") for argument in arguments):
        return True
    return any(a.rpartition(b"/")[2] in (b"ki-vla", b"ki_vla_ros") and b == b"node" for a, b in pairwise(arguments))


def with_node_environment(machine: Machine) -> Machine:
    """Takes a Fast DDS profile from a policy node on this machine if this shell sets none: launch files set it."""
    if any(machine.environment.get(variable) for variable in PROFILE_VARIABLES):
        return machine
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            arguments = (process / "cmdline").read_bytes().split(b"\0")
            if not is_policy_node(arguments):
                continue
            entries = (process / "environ").read_bytes().decode(errors="replace").split("\0")
            environment = dict(entry.split("=", 1) for entry in entries if "=" in entry)
            if environment.get("ROS_DOMAIN_ID", "0") != machine.environment.get("ROS_DOMAIN_ID", "0"):
                continue
            own = {name: environment[name] for name in PROFILE_VARIABLES if name in environment}
            if own:
                return replace(machine, environment={**machine.environment, **own})
    return machine
