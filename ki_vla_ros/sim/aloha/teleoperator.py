"""Teleoperates the simulated ALOHA by the demonstrator: hands the cube over, once per episode, over ROS.

    python -m ki_vla_ros.sim.aloha.teleoperator --episodes 3 --seed 0

For each episode it has `sim_aloha` reset to a new place of the cube, plans the hand-over, and sends it to the four
controllers as a leader's positions come: fifty times a second, one point for each controller. It prints a line for each
episode, and ends with 0 if all of them succeeded, with 1 if not, with 130 after SIGINT or SIGTERM. With `use_sim_time`
it goes by /clock.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import SetParametersAtomically
from rclpy.client import Client
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from std_msgs.msg import String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from ki_vla_ros.console import ExitCode
from ki_vla_ros.errors import ConfigurationError, KiVlaError
from ki_vla_ros.records import NS_PER_S, to_ns
from ki_vla_ros.ros.process import run_node
from ki_vla_ros.ros.qos import EVENT, LATCHED
from ki_vla_ros.sim.aloha.demonstrator import PERIOD_S, Demonstrator
from ki_vla_ros.sim.aloha.node import NODE_NAME as SIMULATION
from ki_vla_ros.sim.aloha.node import PARTS
from ki_vla_ros.sim.aloha.world import JOINTS, LARGEST_SEED, Scene

NODE_NAME: Final = "aloha_teleoperator"
# A point is due later than the next one comes, so that a late one does not stop the arm on its way.
AHEAD_S: Final = 2.0 * PERIOD_S
# After a reset the cameras show the new scene for a moment before anything moves; the verdict may come after the end.
SETTLE_S: Final = 0.5
LINGER_S: Final = 0.5
ANSWER_LIMIT_S: Final = 30.0


class Teleoperator(Node):
    """Its methods spin the node themselves; KiVlaError if the simulation does not answer, or refuses."""

    def __init__(self, demonstrator: Demonstrator, stop: threading.Event) -> None:
        super().__init__(NODE_NAME)
        self._stop = stop
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self)
        self._demonstrator = demonstrator
        self._status: dict[str, Any] = {}
        self._index = [[JOINTS.index(joint) for joint in part.joints] for part in PARTS]
        self._commands = [self.create_publisher(JointTrajectory, part.command, EVENT) for part in PARTS]
        self._set_parameters: Client[Any, Any] = self.create_client(
            SetParametersAtomically, f"{SIMULATION}/set_parameters_atomically"
        )
        self._reset: Client[Any, Any] = self.create_client(Trigger, f"{SIMULATION}/reset")
        self.create_subscription(String, f"{SIMULATION}/status", self._on_status, LATCHED)

    def close(self) -> None:
        self._executor.shutdown()
        self.destroy_node()

    def wait_until_up(self) -> None:
        """Waits for the simulation's services and its four controllers."""
        for client in (self._set_parameters, self._reset):
            self._wait(client.service_is_ready, f"service {client.srv_name}")
        commands = [publisher.topic for publisher in self._commands]
        self._wait(
            lambda: all(self.count_subscribers(topic) for topic in commands), "controllers on all command topics"
        )

    def run_episode(self, seed: int) -> dict[str, Any]:
        """One hand-over; returns the simulation's last status. KeyboardInterrupt if it is stopped on its way."""
        value = ParameterValue(type=ParameterType.PARAMETER_INTEGER, integer_value=seed)
        request = SetParametersAtomically.Request(parameters=[Parameter(name="scene_seed", value=value)])
        result = self._call(self._set_parameters, request).result
        if not result.successful:
            raise KiVlaError(f"{SIMULATION} refused scene_seed {seed}: {result.reason}")
        answer = self._call(self._reset, Trigger.Request())
        if not answer.success:
            raise KiVlaError(f"{SIMULATION} did not reset: {answer.message}")
        self._status = json.loads(answer.message)
        (cube,) = self._status["objects"]
        demonstration = self._demonstrator.plan(Scene(seed, cube["x"], cube["y"]))
        self._spin_until(self._now_ns() + to_ns(SETTLE_S))
        due_ns = self._now_ns()
        for position_J in demonstration.position_NJ:
            self._spin_until(due_ns)
            if self._stop.is_set():
                raise KeyboardInterrupt
            self._send(position_J)
            # After a pause of this process the motion goes on later, not faster.
            due_ns = max(due_ns, self._now_ns() - to_ns(PERIOD_S)) + to_ns(PERIOD_S)
        self._spin_until(self._now_ns() + to_ns(LINGER_S))
        return self._status

    def _send(self, position_J: NDArray[np.float64]) -> None:
        for part, index, publisher in zip(PARTS, self._index, self._commands, strict=True):
            point = JointTrajectoryPoint(positions=position_J[index].tolist())
            point.time_from_start.nanosec = to_ns(AHEAD_S) % NS_PER_S
            publisher.publish(JointTrajectory(joint_names=list(part.joints), points=[point]))

    def _on_status(self, message: String) -> None:
        status = json.loads(message.data)
        if status["reset_id"] >= self._status.get("reset_id", 0):
            self._status = status

    def _now_ns(self) -> int:
        return int(self.get_clock().now().nanoseconds)

    def _spin_until(self, end_ns: int) -> None:
        """By the node's clock; KiVlaError if it stands still."""
        before_ns, moved_s = self._now_ns(), time.monotonic()
        while (now_ns := self._now_ns()) < end_ns and not self._stop.is_set():
            if now_ns != before_ns:
                before_ns, moved_s = now_ns, time.monotonic()
            elif time.monotonic() - moved_s > ANSWER_LIMIT_S:
                raise KiVlaError(f"/clock stands still for {ANSWER_LIMIT_S:g} s; does {SIMULATION} still run?")
            self._executor.spin_once(timeout_sec=min((end_ns - now_ns) / NS_PER_S, 0.1))

    def _call(self, client: Client[Any, Any], request: Any) -> Any:
        future = client.call_async(request)
        self._wait(future.done, f"answer from {client.srv_name}")
        return future.result()

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline_s = time.monotonic() + ANSWER_LIMIT_S
        while not condition():
            if self._stop.is_set():
                raise KeyboardInterrupt
            if time.monotonic() > deadline_s:
                raise KiVlaError(f"no {what} within {ANSWER_LIMIT_S:g} s; does {SIMULATION} run in this ROS domain?")
            self._executor.spin_once(timeout_sec=0.1)


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=NODE_NAME, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--episodes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="scene_seed of the first episode; the others follow")
    return parser


def _run(given: argparse.Namespace, stop: threading.Event) -> int:
    if not 1 <= given.episodes <= 100_000:
        raise ConfigurationError(f"--episodes: expected 1 to 100000, got {given.episodes}")
    if not 0 <= given.seed <= LARGEST_SEED - given.episodes:
        raise ConfigurationError(f"--seed: expected 0 to {LARGEST_SEED - given.episodes}, got {given.seed}")
    node = Teleoperator(Demonstrator(), stop)
    successes = 0
    try:
        node.wait_until_up()
        for seed in range(given.seed, given.seed + given.episodes):
            status = node.run_episode(seed)
            successes += status["success"]
            outcome = "handed over" if status["success"] else f"failed with reward {status['reward']}"
            print(f"episode {status['reset_id']}, scene_seed {seed}: {outcome} at {status['time_s']:.2f} s", flush=True)
    finally:
        node.close()
    return ExitCode.FINE if successes == given.episodes else ExitCode.FOUND


def main(arguments: Sequence[str] | None = None) -> int:
    """The executable `aloha_teleoperator`: exit codes as above, 2 with one message if it could not run."""
    return run_node(argument_parser(), _run, arguments)


if __name__ == "__main__":
    sys.exit(main())
