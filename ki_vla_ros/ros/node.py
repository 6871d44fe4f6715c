"""The policy as a ROS 2 lifecycle node: parameters, topics, transitions; no arithmetic.

The executor thread turns messages into records and serves parameters, services and transitions. While the node is
active, the policy loop (runtime/loop.py) runs in a second thread.
"""

from __future__ import annotations

import argparse
import gc
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.clock import Clock, ClockType  # type: ignore[attr-defined]  # on Humble there is no rclpy.clock_type
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from std_msgs.msg import Empty, String
from std_srvs.srv import Trigger

from ki_vla_ros.bundle import MANIFEST, Bundle, Manifest, file_sha256, load_bundle
from ki_vla_ros.console import ExitCode
from ki_vla_ros.engines import open_engine
from ki_vla_ros.engines.base import Engine
from ki_vla_ros.errors import ConfigurationError, InputError, InstructionError, KiVlaError, printable
from ki_vla_ros.policy import Policy, check_instruction
from ki_vla_ros.records import NS_PER_S
from ki_vla_ros.robot import ACTIONS, POSE_STAMPED, Output, find_robot, read_robot
from ki_vla_ros.ros.parameters import Parameters
from ki_vla_ros.ros.process import run_node
from ki_vla_ros.ros.qos import EVENT, LATCHED, OVERRIDABLE
from ki_vla_ros.ros.releases import make_executor
from ki_vla_ros.ros.topics import Inputs, NodeWire, diagnostics_message, publishers, subscribe
from ki_vla_ros.runtime import (
    WATCHDOG_NS,
    Diagnostics,
    Level,
    LoopThread,
    ObservationBuffer,
    PolicyLoop,
    ShadowComparison,
    axis_bounds,
    camera_sources,
    input_signals,
    own_limit_ns,
)
from ki_vla_ros.settings import (
    BundleIdentity,
    CommandTopic,
    Session,
    SessionTopics,
    Settings,
    session_topic,
    shadow_topics,
)
from ki_vla_ros.share import find_bundle

# How long the executor thread may keep the interpreter from the loop's thread (Python's default: 5 ms).
SWITCH_S = 0.0005
# If another node of the same name is discovered within this time after activation, that node was here first and this
# one gives way, because discovery takes time. If it is discovered later, it came later and has to give way itself.
DISCOVERY_S = 5.0


@dataclass(frozen=True)
class Loaded:
    """What `configure` creates and `cleanup` frees."""

    bundle: Bundle
    engine: Engine
    inputs: Inputs
    buffer: ObservationBuffer
    wire: NodeWire
    loop: PolicyLoop
    thread: LoopThread
    identity: BundleIdentity
    shadow: ShadowComparison | None


class PolicyNode(LifecycleNode):
    """The node `policy`; ConfigurationError if a parameter is unknown, of the wrong type or out of range."""

    def __init__(self, arguments: Sequence[str] = (), stop: threading.Event | None = None) -> None:
        """`arguments`: the process's, for its parameter files; `stop`: set when the process is to end."""
        super().__init__("policy")
        self._ending = stop or threading.Event()
        self._loaded: Loaded | None = None
        # A stop that nobody has released, while no loop is there to keep it: it outlives cleanup and errors.
        self._stopped: str | None = None
        self.parameters = Parameters(self, self._publish_session, arguments)
        self._resources = ExitStack()
        self._diagnostics = Diagnostics()
        self._diagnostics_publisher = self.create_publisher(
            DiagnosticArray, "/diagnostics", copy(EVENT), qos_overriding_options=OVERRIDABLE
        )
        self._session_publisher = self.create_publisher(
            String, session_topic("~"), copy(LATCHED), qos_overriding_options=OVERRIDABLE
        )
        self._listen(String, "~/instruction", self._on_instruction)
        self._listen(Empty, "~/stop", self._on_stop)
        self.create_service(Trigger, "~/stop", self._serve_stop)
        self.create_service(Trigger, "~/reset", self._serve_reset)
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(WATCHDOG_NS / NS_PER_S, self._watch, clock=steady)
        self.create_timer(1.0, self._report, clock=steady)
        self._activated_s = 0.0
        self._others: set[str] = set()  # what `_find_others` found a second ago

    # --- messages

    def _listen(self, kind: Any, topic: str, callback: Callable[[Any], None]) -> None:
        subscribe(self, self._diagnostics, kind, self.resolve_topic_name(topic), callback, EVENT)

    def _on_instruction(self, message: String) -> None:
        try:
            if self._loaded is None:
                raise InstructionError("instruction: no bundle is loaded yet; configure the node first")
            check_instruction(self._loaded.bundle, message.data)
        except InputError as refusal:
            self._diagnostics.record_refusal("instruction: refused")
            in_force = self._loaded.loop.instruction if self._loaded else ""
            self.get_logger().error(f"instruction refused, {in_force or 'none'!r} stays in force: {refusal}")
        else:
            self._loaded.loop.instruction = message.data
            self.get_logger().info(f"instruction: {printable(message.data)}")

    def _on_stop(self, _message: Empty) -> None:
        self._latch("by the topic ~/stop")

    def _serve_stop(self, _request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self._latch("by the service ~/stop")
        response.success, response.message = True, "stopped until ~/reset"
        return response

    def _latch(self, reason: str) -> None:
        if self._loaded is not None:
            self._loaded.loop.latch(reason)
        else:  # nothing moves, but whoever stops it does not want the next activation to move it either
            self._stopped = reason
            self.get_logger().warning(f"stopped: {reason}")

    def _serve_reset(self, _request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        if self._loaded is not None:
            response.success = self._loaded.loop.reset()
        else:
            response.success, self._stopped = self._stopped is not None, None
        response.message = "released" if response.success else "no stop was in force"
        self.get_logger().info(f"reset: {response.message}")
        return response

    def _watch(self) -> None:
        if self._loaded is not None:
            self._loaded.loop.watch(self._loaded.wire.take_interruption)

    def _report(self) -> None:
        """Once a second: checks for a second node of this name and publishes diagnostics."""
        lifecycle = self._state_machine.current_state[1]
        if lifecycle == "active" and time.monotonic() - self._activated_s < DISCOVERY_S:
            try:
                self._check_alone()
            except ConfigurationError as error:
                self.get_logger().error(f"cannot stay active: {error}")
                self.trigger_deactivate()
        engine = self._loaded.engine.description if self._loaded else ""
        now_ns = int(self.get_clock().now().nanoseconds)
        inputs = self._loaded.buffer.status(now_ns) if self._loaded else {}
        faults = {**self._find_others(lifecycle), **self._describe_stop(lifecycle)}
        report = self._diagnostics.report(lifecycle, engine, time.monotonic(), inputs, faults)
        if self._loaded is not None:
            shadow = self._loaded.shadow.values(now_ns) if self._loaded.shadow is not None else {}
            outputs = {f"output {name}": topic for name, topic in self._loaded.wire.topics.items()}
            report = replace(report, values={**report.values, **outputs, **shadow})
        name, hardware = self.get_fully_qualified_name(), self._loaded.bundle.manifest.name if self._loaded else ""
        self._diagnostics_publisher.publish(diagnostics_message(name, hardware, report, now_ns))

    def _describe_stop(self, lifecycle: str) -> Mapping[str, Level]:
        """A stop that waits for ~/reset while the node is not active; an active node's ticks name it."""
        stopped = self._stopped if self._loaded is None else self._loaded.loop.latched
        return (
            {}
            if stopped is None or lifecycle == "active"
            else {f"stopped: {stopped}; call ~/reset to release it": Level.WARNING}
        )

    def _find_others(self, lifecycle: str) -> Mapping[str, Level]:
        """Who commands the arm beside this node while it does, and who publishes the same joint states if several do.

        A new finding is logged once.
        """
        if self._loaded is None:
            return {}
        settings, faults = self.parameters.settings, {}
        for topic, kinds in self._loaded.buffer.kinds.items():
            # Publishers of other joints than another's, such as a gripper's or a base's, are no fault.
            if len(names := publishers(self, topic)) > max(kinds, 1):
                fault = f"{topic}: {len(names)} publishers of joint states: {', '.join(names)}; stop all but one"
                faults[fault] = Level.WARNING
        commands = {} if settings.shadow or settings.dry_run or lifecycle != "active" else self._command_topics()
        for topic in commands:
            names = publishers(self, topic)
            if (own := self.get_fully_qualified_name()) in names:
                names.remove(own)
            if names:
                faults[f"{topic}: also commanded by {', '.join(names)}; stop it, or let it publish elsewhere"] = (
                    Level.ERROR
                )
        for fault in faults.keys() - self._others:
            log = self.get_logger()
            log.error(fault) if faults[fault] is Level.ERROR else log.warning(fault)
        self._others = set(faults)
        return faults

    def _command_topics(self) -> dict[str, Output]:
        """The full names of the topics, not actions, by which the robot is told what to do, and their outputs."""
        assert self._loaded is not None
        robot = self._loaded.bundle.manifest.robot
        chosen = self.parameters.settings.command_topics(robot)
        return {
            self.resolve_topic_name(chosen[output.name]): output
            for output in robot.outputs
            if output.type not in ACTIONS
        }

    # --- lifecycle

    def start(self) -> bool:
        """Configures and activates the node without a lifecycle client; returns whether both succeeded."""
        steps = (self.trigger_configure, self.trigger_activate)
        return all(not self._ending.is_set() and step() == TransitionCallbackReturn.SUCCESS for step in steps)

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self._transition("configure", self._configure, partial(super().on_configure, state))

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        # Publishers before the loop: its first message must not be lost.
        steps = (self._check_alone, self._check_outputs, partial(super().on_activate, state), self._start_loop)
        return self._transition("activate", *steps)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self._transition("deactivate", self._halt, partial(super().on_deactivate, state))

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self._transition("clean up", self.close, partial(super().on_cleanup, state))

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self._transition("shut down", self.close, partial(super().on_shutdown, state))

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self._transition("recover from the error", self.close, partial(super().on_error, state))

    def _transition(self, name: str, *steps: Callable[[], object]) -> TransitionCallbackReturn:
        """Runs the steps and logs what they raise, because rclpy swallows it.

        A ConfigurationError leaves the lifecycle state as it was.
        """
        try:
            for step in steps:
                step()
        except ConfigurationError as error:
            self.get_logger().error(f"cannot {name}: {error}")
            return TransitionCallbackReturn.FAILURE
        except Exception as error:
            cause = str(error) if isinstance(error, KiVlaError) else traceback.format_exc()
            self.get_logger().error(f"cannot {name}: {cause}")
            return TransitionCallbackReturn.ERROR
        return TransitionCallbackReturn.SUCCESS

    def _configure(self) -> None:
        bundle = load_bundle(find_bundle(self.parameters.settings.bundle))
        if robot := self.parameters.settings.robot:
            bundle = bundle.described_by(read_robot(find_robot(robot)))
        settings = self.parameters.load(bundle.manifest).on_robot(bundle.manifest.robot)
        with ExitStack() as resources:
            resources.callback(self.parameters.unload)
            bundle = bundle.on_robot(settings.robot_description)
            manifest = bundle.manifest
            if settings.instruction:
                check_instruction(bundle, settings.instruction)
            policy = self._open_policy(bundle, settings, resources)
            policy.warm_up()
            shadow = ShadowComparison(policy.space, settings.shadow_reference) if settings.shadow else None
            bounds = axis_bounds(manifest.axes, settings.limits, settings.robot_description)
            wire = NodeWire(
                self, manifest.robot, settings, bounds.acceleration_J, shadow, self._diagnostics.record_refusal
            )
            resources.callback(wire.close)
            sources = camera_sources(manifest, settings, self.resolve_topic_name)
            signals = input_signals(manifest, self._signal_topics(settings, manifest))
            buffer = ObservationBuffer(sources, signals, own_limit_ns(settings.joint_max_age_s), policy.space.state)
            loop = PolicyLoop(policy, buffer, wire, self._diagnostics, lambda: self.parameters.settings)
            loop.instruction = settings.instruction
            if self._stopped is not None:
                loop.latch(self._stopped)
            identity = BundleIdentity(name=manifest.name, manifest_sha256=file_sha256(bundle.path / MANIFEST))
            inputs = Inputs(self, manifest, settings, sources, signals, buffer, wire, self._diagnostics, shadow)
            resources.callback(inputs.close)
            loaded = Loaded(bundle, policy.engine, inputs, buffer, wire, loop, LoopThread(loop), identity, shadow)
            self._resources = resources.pop_all()
        self._loaded = loaded
        self._publish_session()
        # Model and libraries live as long as the node; the collector need not scan them during a tick.
        gc.collect()
        gc.freeze()
        gc.callbacks.append(self._diagnostics.collector)
        self._resources.callback(gc.callbacks.remove, self._diagnostics.collector)
        self.get_logger().info(f"bundle {manifest.name} on {loaded.engine.description}")
        topics = ", ".join(f"{source.name} from {source.topic}" for source in sources)
        from_topics = ", ".join(dict.fromkeys(signal.topic for signal in signals))
        commands = settings.command_topics(manifest.robot)
        to_topics = ", ".join((shadow_topics(manifest.robot) if settings.shadow else commands).values())
        self.get_logger().info(f"{topics}; joints from {from_topics}; commands to {to_topics}")
        self.get_logger().info(f"limits: {loop.describe_limits()}")
        self.parameters.warn_of_unused_overrides()

    def _open_policy(self, bundle: Bundle, settings: Settings, resources: ExitStack) -> Policy:
        if not settings.policy_server:
            engine = open_engine(bundle, settings, self.get_logger().info)
            resources.callback(engine.close)
            return Policy(bundle, engine, guidance_jacobian=settings.guidance_jacobian)
        try:
            from ki_vla_ros.serve import open_remote  # websockets and msgpack need not be there without it
        except ModuleNotFoundError as error:
            raise ConfigurationError(
                f"parameter 'policy_server': expected the Python module {error.name}, got none; python3 -m pip install "
                "websockets msgpack"
            ) from error
        remote = open_remote(bundle, settings, self._ending.is_set, self.get_logger().info)
        resources.callback(remote.engine.close)
        return remote

    def _publish_session(self) -> None:
        """Publishes what replay needs to know; does nothing while no bundle is loaded."""
        if self._loaded is None:
            return
        manifest, full_name = self._loaded.bundle.manifest, self.resolve_topic_name
        robot = manifest.robot
        settings = self.parameters.settings.on_robot(robot)
        cameras = {camera.name: settings.camera(camera.name) for camera in manifest.cameras}
        signals = self._signal_topics(settings, manifest)
        poses = {name: signals.pop(name) for name in {s.topic for s in robot.signals if s.type == POSE_STAMPED}}
        shadows, chosen = shadow_topics(robot), settings.command_topics(robot)
        commands = {
            output.name: CommandTopic(
                topic=full_name(chosen[output.name]),
                type=output.wire_type(settings.publish_mode),
                shadow=full_name(shadows[output.name]) if settings.shadow else None,
            )
            for output in robot.outputs
        }
        first = next(iter(commands.values()))
        topics = SessionTopics(
            cameras={name: full_name(camera.topic) for name, camera in cameras.items()},
            transports={name: camera.transport or "raw" for name, camera in cameras.items()},
            joint_states=next(iter(signals.values()), ""),
            states=signals,
            poses=poses,
            instruction=full_name("~/instruction"),
            command=first.topic,
            commands=commands,
            chunk=full_name("~/chunk"),
            tick=full_name("~/tick"),
            shadow=first.shadow,
        )
        node, values = self.get_fully_qualified_name(), self.parameters.values
        simulated, identity = self._loaded.wire.simulated_clock(), self._loaded.identity
        session = Session(node=node, simulated_clock=simulated, bundle=identity, parameters=values, topics=topics)
        self._session_publisher.publish(String(data=session.text()))

    def _signal_topics(self, settings: Settings, manifest: Manifest) -> dict[str, str]:
        """The full names of the topics that the robot's signals come from, by their names in its file."""
        chosen = settings.signal_topics(manifest.robot)
        return {name: self.resolve_topic_name(topic) for name, topic in chosen.items()}

    def _check_alone(self) -> None:
        this = (self.get_name(), self.get_namespace())
        if self.get_node_names_and_namespaces().count(this) > 1:
            raise ConfigurationError(
                f"node {self.get_fully_qualified_name()}: another node of this name runs in the same ROS domain; "
                "stop it, or choose another namespace or ROS_DOMAIN_ID"
            )

    def _check_outputs(self) -> None:
        """ConfigurationError if a controller's action does not answer; reminds of what velocities need."""
        assert self._loaded is not None  # the state machine lets only a configured node get here
        settings = self.parameters.settings
        if settings.shadow or settings.dry_run:
            return
        self._loaded.wire.check_ready()
        axes = self._loaded.bundle.manifest.axes
        for topic, output in self._command_topics().items():
            if axes[self._loaded.bundle.manifest.robot.axes_of(output).start].kind == "velocity":
                self.get_logger().warning(
                    f"{topic} takes velocities: if this process dies, the last one goes on unless the controller stops "
                    "by itself when nothing comes; make sure that it does (docs/runtime.md, Several outputs)"
                )

    def _start_loop(self) -> None:
        assert self._loaded is not None  # the state machine lets only a configured node get here
        self._publish_session()
        self._loaded.thread.start()
        self._activated_s = time.monotonic()

    def _halt(self) -> None:
        if self._loaded is not None:
            self._loaded.thread.stop()
            self._loaded.wire.wait_until_received()

    def close(self) -> None:
        """Holds the arm if it moves, then frees everything."""
        self._halt()
        if self._loaded is not None:
            self._stopped = self._loaded.loop.latched
        self._loaded = None
        self._resources.close()
        gc.unfreeze()


def main(arguments: Sequence[str] | None = None) -> int:
    """The executable `policy_node`: returns 0 after SIGINT or SIGTERM, 2 with one message if it could not start."""
    sys.setswitchinterval(SWITCH_S)
    description = "The policy as a lifecycle node; its settings are ROS parameters, see config/demo.yaml."
    parser = argparse.ArgumentParser(prog="policy_node", description=description)
    parser.add_argument(
        "--no-autostart",
        dest="autostart",
        action="store_false",
        help="wait for a lifecycle client, whatever the parameter autostart says; launch files need this, because "
        "another section of a parameter file may override what they set",
    )
    given = list(sys.argv[1:] if arguments is None else arguments)
    return run_node(parser, lambda chosen, stop: _run(given, chosen.autostart, stop), given)


def _run(arguments: Sequence[str], may_start: bool, stop: threading.Event) -> int:
    node = PolicyNode(arguments, stop)
    try:
        if not (may_start and node.parameters.settings.autostart):
            node.get_logger().info(
                "unconfigured: waiting for a lifecycle client (with autostart: true the node needs none)"
            )
        elif not node.start():
            return ExitCode.FINE if stop.is_set() else ExitCode.FAILED
        executor = make_executor()
        executor.add_node(node)
        # The events executor's spin() never fires a callback in rclpy 9.1; short waits also let Python see signals.
        while rclpy.ok() and not stop.is_set():
            executor.spin_once(timeout_sec=0.1)
        return ExitCode.FINE
    finally:
        node.close()
        node.destroy_node()


if __name__ == "__main__":
    sys.exit(main())
