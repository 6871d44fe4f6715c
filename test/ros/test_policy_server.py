"""The node on a policy server: an arm that follows, and a wire between the two that is slow, stalls or is cut.

What a server may answer is tried in test/unit/serve/test_remote.py. KI_VLA_FAULT_TIMES=FILE collects the times to hold.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from support.between import Between
from support.bundles import TASK, demo_policy
from support.robots import PolicyProcess, Robot
from support.served import open_policy, serving
from support.waiting import until

from ki_vla_ros.bundle import load_bundle

NODE = {"autostart": True, "instruction": TASK, "limits__on_position": "clamp", "ramp_in_s": 0.0}
Start = Callable[..., PolicyProcess]


@pytest.fixture
def between(bundle_path: str) -> Iterator[Between]:
    with serving(open_policy(load_bundle(Path(bundle_path)))) as port:
        wire = Between(port)
        yield wire
        wire.close()


@pytest.fixture
def moving(robot: Robot, start: Start, bundle_path: str, between: Between) -> Iterator[PolicyProcess]:
    """A node that moves an arm; at the end every command is checked."""
    robot.follows = True
    policy = start(**NODE, bundle=bundle_path, policy_server=f"ws://127.0.0.1:{between.port}")
    until(lambda: moves(robot) and not rests(robot))
    yield policy
    assert robot.refused == []
    axes = demo_policy().axes
    lower, upper = np.array([axis.lower for axis in axes]), np.array([axis.upper for axis in axes])
    speed = np.array([axis.max_velocity for axis in axes])
    for command in robot.commands:
        position = np.array([point.positions for point in command.points])
        velocity = np.array([point.velocities for point in command.points])
        assert np.all(position >= lower - 1e-6) and np.all(position <= upper + 1e-6)
        assert np.all(np.abs(velocity) <= speed * (1 + 1e-6)) and not velocity[-1].any()


def moves(robot: Robot) -> bool:
    fresh = robot.times_s and time.monotonic() - robot.times_s[-1] < 0.3
    return bool(fresh and robot.ticks and robot.ticks[-1]["hold"] is None)


def rests(robot: Robot) -> bool:
    now_ns = robot.now_ns()
    speeds = [robot.controller.sample(now_ns + ms * 1_000_000)[1] for ms in (0, 60, 120, 250)]
    return not np.any(np.abs(speeds) > 1e-3)


@pytest.mark.parametrize(
    ("way", "cause"), [("gone", "policy server ws://"), ("stalls", "expected an answer within 0.5 s, got none")]
)
def test_a_server_that_is_lost_means_hold_and_the_node_goes_on_when_it_is_back(
    moving: PolicyProcess, robot: Robot, between: Between, way: str, cause: str
) -> None:
    began_s = time.monotonic()
    between.way = way
    if way == "gone":
        between.cut()
    until(lambda: rests(robot), "the arm to rest")
    if file := os.environ.get("KI_VLA_FAULT_TIMES"):
        with open(file, "a") as times:
            times.write(f"policy server {way}\t{time.monotonic() - began_s:.2f}\n")
    robot.wait_for_hold(cause)
    time.sleep(0.3)
    assert rests(robot)
    between.way = ""
    between.cut()  # what was held back
    until(lambda: moves(robot))


def test_delay_and_jitter_are_lived_with(moving: PolicyProcess, robot: Robot, between: Between) -> None:
    """50 to 100 ms each way: chunks are older, and are joined where they are due."""
    between.delay_s = (0.05, 0.1)
    count = len(robot.commands)
    until(lambda: len(robot.commands) > count + 5)
    until(lambda: {tick["hold"] for tick in robot.ticks[-4:]} == {None}, "four ticks without a hold")
    assert max(tick["stage_ms"].get("denoise", 0.0) for tick in robot.ticks[-4:]) > 50.0


def test_ctrl_c_ends_the_waiting_for_a_server(robot: Robot, start: Start, bundle_path: str) -> None:
    policy = start(**NODE, bundle=bundle_path, policy_server="ws://127.0.0.1:9", policy_server_wait_s=600.0)
    until(lambda: "waiting up to 600 s: policy server ws://127.0.0.1:9" in policy.output)
    assert policy.stop() == 0
    assert "no longer waited for: the node is to stop" in policy.output and not robot.ticks


def test_no_server_is_said_at_configure(robot: Robot, start: Start, bundle_path: str) -> None:
    policy = start(**NODE, bundle=bundle_path, policy_server="ws://127.0.0.1:9", policy_server_wait_s=1.0)
    assert policy.wait() == 2
    assert "cannot configure: policy server ws://127.0.0.1:9: expected a connection, got" in policy.output
