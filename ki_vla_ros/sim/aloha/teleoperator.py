"""Teleoperates the simulated ALOHA by the demonstrator: hands the cube over, once per episode, over ROS.

    python -m ki_vla_ros.sim.aloha.teleoperator --episodes 3 --seed 0
    python -m ki_vla_ros.sim.aloha.teleoperator --episodes 50 --seed 1000000 --policy

For each episode it has `sim_aloha` reset to a new place of the cube, plans the hand-over, and sends it to the four
controllers as a leader's positions come: fifty times a second, one point for each controller. With --policy it sends
nothing, but activates the node `policy` for each episode, to judge what that does: handed over is then whatever once
earns the highest reward, as gym-aloha and ACT count it, held for however long. It prints a line for each episode,
and the rate of success with its 95 % interval; it ends with 0 if all of them succeeded, with 1 if not, with 130 after
SIGINT or SIGTERM. With `use_sim_time` it goes by /clock.
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
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
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
from ki_vla_ros.ros.services import AGAIN_S, ask, change_state
from ki_vla_ros.sim.aloha.demonstrator import PERIOD_S, Demonstration, Demonstrator
from ki_vla_ros.sim.aloha.node import NODE_NAME as SIMULATION
from ki_vla_ros.sim.aloha.node import PARTS
from ki_vla_ros.sim.aloha.world import HIGHEST_REWARD, JOINTS, LARGEST_SEED, TIME_LIMIT_S, Scene
from ki_vla_ros.sim.simulation import RESET_LIMIT_S
from ki_vla_ros.statistics import wilson_95

NODE_NAME: Final = "aloha_teleoperator"
# A point is due later than the next one comes, so that a late one does not stop the arm on its way.
AHEAD_S: Final = 2.0 * PERIOD_S
# After a reset the cameras show the new scene for a moment before anything moves; the verdict may come after the end.
SETTLE_S: Final = 0.5
BELIEVED_S: Final = 1.0  # a policy's node takes half a second to believe that the arms are elsewhere
LINGER_S: Final = 0.5
ANSWER_LIMIT_S: Final = 30.0
POLICY: Final = "policy"
CONFIGURE_LIMIT_S: Final = 120.0  # engines may be built
# The simulation ends an episode after TIME_LIMIT_S of its time.
VERDICT_LIMIT_S: Final = 2.0 * TIME_LIMIT_S


class Teleoperator(Node):
    """Its methods spin the node themselves; KiVlaError if the simulation does not answer, or refuses."""

    def __init__(self, demonstrator: Demonstrator | None, stop: threading.Event) -> None:
        """Without a demonstrator, the node `policy` acts."""
        super().__init__(NODE_NAME)
        self._stop = stop
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self)
        self._demonstrator = demonstrator
        self._status: dict[str, Any] = {}
        self._index = [[JOINTS.index(joint) for joint in part.joints] for part in PARTS]
        # A policy must be alone on its topics.
        sent = PARTS if demonstrator is not None else ()
        self._commands = [self.create_publisher(JointTrajectory, part.command, EVENT) for part in sent]
        self._set_parameters: Client[Any, Any] = self.create_client(
            SetParametersAtomically, f"{SIMULATION}/set_parameters_atomically"
        )
        self._reset: Client[Any, Any] = self.create_client(Trigger, f"{SIMULATION}/reset")
        self._change_state: Client[Any, Any] = self.create_client(ChangeState, f"{POLICY}/change_state")
        self._get_state: Client[Any, Any] = self.create_client(GetState, f"{POLICY}/get_state")
        self.create_subscription(String, f"{SIMULATION}/status", self._on_status, LATCHED)

    def close(self) -> None:
        self._executor.shutdown()
        self.destroy_node()

    def wait_until_up(self) -> None:
        """Waits for the simulation's services and its four controllers, and has the policy load its bundle."""
        for client in (self._set_parameters, self._reset):
            self._wait(client.service_is_ready, f"service {client.srv_name}")
        if self._demonstrator is None:
            for client in (self._get_state, self._change_state):
                self._wait(client.service_is_ready, f"service {client.srv_name}")
            self._transition(Transition.TRANSITION_CONFIGURE, "configure; was it started with autostart:=false?")
        commands = [publisher.topic for publisher in self._commands]
        self._wait(
            lambda: all(self.count_subscribers(topic) for topic in commands), "controllers on all command topics"
        )

    def run_episode(self, seed: int) -> dict[str, Any]:
        """One episode; returns the simulation's last status. KeyboardInterrupt if it is stopped on its way."""
        value = ParameterValue(type=ParameterType.PARAMETER_INTEGER, integer_value=seed)
        request = SetParametersAtomically.Request(parameters=[Parameter(name="scene_seed", value=value)])
        result = self._call(self._set_parameters, request).result
        if not result.successful:
            raise KiVlaError(f"{SIMULATION} refused scene_seed {seed}: {result.reason}")
        # The simulation gives a reset up itself after a time; before that, a second one would come on top.
        answer = self._call(self._reset, Trigger.Request(), ANSWER_LIMIT_S, RESET_LIMIT_S + AGAIN_S)
        if not answer.success:
            raise KiVlaError(f"{SIMULATION} did not reset: {answer.message}")
        self._status = json.loads(answer.message)
        self._spin_until(self._now_ns() + to_ns(SETTLE_S if self._demonstrator is not None else BELIEVED_S))
        if self._demonstrator is None:
            self._watch_policy()
        else:
            (cube,) = self._status["objects"]
            self._hand_over(self._demonstrator.plan(Scene(seed, cube["x"], cube["y"])))
        return self._status

    def _hand_over(self, demonstration: Demonstration) -> None:
        due_ns = self._now_ns()
        for position_J in demonstration.position_NJ:
            self._spin_until(due_ns)
            if self._stop.is_set():
                raise KeyboardInterrupt
            self._send(position_J)
            # After a pause of this process the motion goes on later, not faster.
            due_ns = max(due_ns, self._now_ns() - to_ns(PERIOD_S)) + to_ns(PERIOD_S)
        self._spin_until(self._now_ns() + to_ns(LINGER_S))

    def _watch_policy(self) -> None:
        """Lets the policy act until the verdict."""
        self._transition(Transition.TRANSITION_ACTIVATE, "activate")
        end_ns = self._now_ns() + to_ns(VERDICT_LIMIT_S)
        while not (self._status["done"] or self._status["reward"] >= HIGHEST_REWARD):
            self._spin_until(self._now_ns() + to_ns(PERIOD_S))
            if self._stop.is_set():
                raise KeyboardInterrupt
            if self._now_ns() > end_ns:
                raise KiVlaError(f"{SIMULATION} gave no verdict within {VERDICT_LIMIT_S:g} s of its time")
        self._transition(Transition.TRANSITION_DEACTIVATE, "deactivate")

    def _transition(self, number: int, name: str) -> None:
        made = change_state(self._change_state, self._get_state, number, CONFIGURE_LIMIT_S, self._until)
        if not given(made, f"answer from {self._change_state.srv_name}", CONFIGURE_LIMIT_S):
            raise KiVlaError(f"the node {POLICY} could not {name}")

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

    def _call(
        self, client: Client[Any, Any], request: Any, limit_s: float = ANSWER_LIMIT_S, again_s: float = AGAIN_S
    ) -> Any:
        return given(ask(client, request, limit_s, self._until, again_s), f"answer from {client.srv_name}", limit_s)

    def _wait(self, condition: Callable[[], bool], what: str, limit_s: float = ANSWER_LIMIT_S) -> None:
        given(self._until(condition, limit_s) or None, what, limit_s)

    def _until(self, condition: Callable[[], bool], limit_s: float) -> bool:
        """Whether it came true in time."""
        deadline_s = time.monotonic() + limit_s
        while not (true := condition()) and time.monotonic() < deadline_s:
            if self._stop.is_set():
                raise KeyboardInterrupt
            self._executor.spin_once(timeout_sec=0.1)
        return true


def given(what: Any, name: str, limit_s: float) -> Any:
    """What was waited for; KiVlaError if it is None."""
    if what is None:
        raise KiVlaError(f"no {name} within {limit_s:g} s; does {SIMULATION} run in this ROS domain?")
    return what


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=NODE_NAME, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--episodes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="scene_seed of the first episode; the others follow")
    parser.add_argument("--policy", action="store_true", help="let the node `policy`, not yet configured, do it")
    return parser


def _run(given: argparse.Namespace, stop: threading.Event) -> int:
    if not 1 <= given.episodes <= 100_000:
        raise ConfigurationError(f"--episodes: expected 1 to 100000, got {given.episodes}")
    if not 0 <= given.seed <= LARGEST_SEED - given.episodes:
        raise ConfigurationError(f"--seed: expected 0 to {LARGEST_SEED - given.episodes}, got {given.seed}")
    node = Teleoperator(None if given.policy else Demonstrator(), stop)
    successes = 0
    try:
        node.wait_until_up()
        for seed in range(given.seed, given.seed + given.episodes):
            status = node.run_episode(seed)
            handed_over = status["reward"] >= HIGHEST_REWARD if given.policy else status["success"]
            successes += handed_over
            outcome = "handed over" if handed_over else f"failed with reward {status['reward']}"
            print(f"episode {status['reset_id']}, scene_seed {seed}: {outcome} at {status['time_s']:.2f} s", flush=True)
        low, high = wilson_95(successes, given.episodes)
        print(f"success {successes} of {given.episodes}, 95 % interval {low:.0%} to {high:.0%}", flush=True)
    finally:
        node.close()
    return ExitCode.FINE if successes == given.episodes else ExitCode.FOUND


def main(arguments: Sequence[str] | None = None) -> int:
    """The executable `aloha_teleoperator`: exit codes as above, 2 with one message if it could not run."""
    return run_node(argument_parser(), _run, arguments)


if __name__ == "__main__":
    sys.exit(main())
