"""One robot of each kind under the real loop and a simulated controller: what the policy asks for is what happens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.kinds import ACTION_S, HORIZON, NS_PER_S, Case, WildPolicy, World, draw_robot

from ki_vla_ros.policy.preprocess import normalize
from ki_vla_ros.robot import rotations

Array = NDArray[np.float64]


class GoalPolicy(WildPolicy):
    """Asks for what `act` makes of the present measurement: actions [H, D] in the robot's units."""

    act: Callable[[World, Array], Array]

    def denoise(self, *_: Any) -> Any:
        manifest = self.bundle.manifest
        action_HD = self.act(self.world, self.space.state(self.world.signal_M))
        action_HD = np.broadcast_to(action_HD, (HORIZON, len(manifest.robot.actions)))
        origin_D = self._origin(self.space.state(self.world.signal_M))
        return normalize(action_HD - origin_D, manifest.action.low, manifest.action.high).astype(np.float32)


def run(
    part: str, act: Callable[[World, Array], Array], seconds: float = 3.0, accept: Any = lambda robot: True
) -> World:
    """Runs the first drawn robot of this part that `accept` takes, without faults."""
    for seed in range(2000):
        case = Case(seed)
        case.parts, case.robot = (part,), draw_robot(case.rng, (part,))
        if accept(case.robot):
            break
    case.faults, case.events, case.ms, case.inference_ms, case.fail = frozenset(), [], round(1e3 * seconds), 20, 0.0
    case.parameters |= {"executor": "asynchronous", "ramp_in_s": 0.0, "max_age_s": 1.0, "limits.max_chunk_age_s": 5.0}
    loose = {"limits.on_position": "clamp", "limits.on_speed": "clamp", "limits.max_jump_s": 10.0}
    case.parameters = {name: value for name, value in case.parameters.items() if name not in loose}
    case.parameters |= loose if part not in ("gripper", "binary", "hand") else {}
    world = World(case)
    policy = GoalPolicy(world)
    policy.act = act  # type: ignore[assignment]
    policy.space = world.policy.space
    world.policy = world.loop._policy = policy
    world.run()
    assert not world.logged
    return world


def is_relative(robot: Any) -> bool:
    return bool(robot.actions[0].relative)


@pytest.mark.parametrize("part", ["arm", "servo"])
@pytest.mark.parametrize("relative", [False, True])
def test_joints_come_to_where_they_are_asked(part: str, relative: bool) -> None:
    goal = np.array([0.4, -0.3])
    world = run(part, lambda *_: goal, accept=lambda robot: is_relative(robot) == relative)
    np.testing.assert_allclose(world.where_J, goal, atol=2e-3)


def test_a_joint_that_turns_without_end_goes_the_shortest_way() -> None:
    def turns(robot: Any) -> bool:
        return all(joint.continuous and joint.lower is None and not joint.relative for joint in robot.actions)

    # The goals are some turns away.
    world = run("servo", lambda world, _: np.add(world.begin_J, [0.3 - 2 * np.pi, -0.3 + 4 * np.pi]), accept=turns)
    np.testing.assert_allclose(world.where_J, np.add(world.begin_J, [0.3, -0.3]), atol=2e-3)


@pytest.mark.parametrize("part", ["gripper", "binary", "hand"])
@pytest.mark.parametrize("end", [0, 1])
def test_grippers_open_and_close(part: str, end: int) -> None:
    world = run(part, lambda world, _: np.array([world.robot.actions[0].ends[end]]))
    assert world.where_J[0] == pytest.approx(world.robot.actions[0].ends[end], abs=1e-6)


def test_velocities_are_what_was_asked_and_end_at_zero() -> None:
    asked = np.array([0.6, -0.4])
    world = run("free_velocity", lambda *_: asked)
    velocity_NJ = np.array([velocity_J for _, _, velocity_J, _ in world.streamed])
    assert np.mean(np.all(np.abs(velocity_NJ - asked) < 1e-6, axis=1)) > 0.8
    assert np.abs(velocity_NJ).max(axis=0) == pytest.approx(np.abs(asked)), "never faster than asked"
    assert not velocity_NJ[-1].any()


def test_velocities_stop_at_the_joints_limits() -> None:
    world = run("velocity", lambda *_: np.array([1.0, -1.0]), seconds=6.0)
    np.testing.assert_allclose(world.where_J, [1.0, -1.0], atol=0.03)


def test_what_a_velocity_really_did_counts() -> None:
    """The joint goes half as fast as it is told: its limit is still where it really is."""
    slow = World.fill

    def fill(world: World) -> None:
        if world.streamed:
            world.where_J = world.begin_J + 0.5 * world.streamed_way()
        slow(world)

    def act(world: World, _: Array) -> Array:
        return np.array([1.0, 1.0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(World, "fill", fill)
        patch.setattr(World, "streamed_way", streamed_way, raising=False)
        world = run("velocity", act, seconds=8.0)
    np.testing.assert_allclose(world.where_J, [1.0, 1.0], atol=0.05)


def streamed_way(world: World) -> Array:
    total = np.sum([velocity_J for _, _, velocity_J, _ in world.streamed], axis=0)
    return np.asarray(total * world.period_ns / NS_PER_S)


def test_a_base_drives_as_asked() -> None:
    asked = np.array([0.3, 0.0, -0.2])
    world = run("base", lambda *_: asked)
    velocity_NJ = np.array([velocity_J for _, _, velocity_J, _ in world.streamed])
    assert np.mean(np.all(np.abs(velocity_NJ - asked) < 1e-6, axis=1)) > 0.6 and not velocity_NJ[-1].any()


def placed(world: World) -> tuple[Array, Array]:
    """Where the tool is: its position, and its orientation as a matrix."""
    signal_M = world.signal_M.copy()
    return signal_M[:3], np.stack([rotations.rotate(signal_M[3:7], axis) for axis in np.eye(3)], axis=1)


def whole(robot: Any) -> bool:
    parts = [action.component for action in robot.actions]
    return parts[:3] == ["x", "y", "z"] and len(parts) > 3 and robot.signals[0].part == "x"


@pytest.mark.parametrize("form", ["rx", "qx", "r1"])
@pytest.mark.parametrize("angle", [0.4, 2.6])
def test_a_tool_comes_to_a_pose_also_far_round(form: str, angle: float) -> None:
    """Farther than rotations are counted in one go, it rests on the way and goes on."""
    place, goal_4 = np.array([0.5, 0.1, 0.3]), []

    def act(world: World, _state: Array) -> Array:
        if not goal_4:
            turn = rotations.from_vector(angle * np.array([0.6, 0.0, 0.8]))
            goal_4.append(rotations.multiply(world.begin_turn, turn))
        written = {"rx": rotations.to_vector, "qx": lambda q: q, "r1": rotations.to_6d}[form](goal_4[0])
        return np.concatenate([place, written])

    with pytest.MonkeyPatch.context() as patch:
        begin = World.__post_init__

        def remember(world: World) -> None:
            begin(world)
            world.begin_turn = world.signal_M[3:7].copy()  # type: ignore[attr-defined]

        patch.setattr(World, "__post_init__", remember)
        world = run("pose", act, seconds=10.0, accept=lambda r: whole(r) and r.actions[3].component == form)
    there, turned = placed(world)
    np.testing.assert_allclose(there, place, atol=2e-3)
    goal = np.stack([rotations.rotate(goal_4[0], axis) for axis in np.eye(3)], axis=1)
    np.testing.assert_allclose(turned, goal, atol=5e-3)


@pytest.mark.parametrize("angle", [1.0, 2.2, 3.1])
def test_a_tool_that_was_turned_by_hand_stays_where_it_was_put(angle: float) -> None:
    """Between deactivation and activation it may be turned farther than rotations are counted in one go."""
    world = run("pose", lambda world, state: state, 0.8, lambda r: whole(r) and len(r.state) == len(r.actions) == 7)
    moved_4 = rotations.multiply(world.signal_M[3:7], rotations.from_vector(angle * np.array([0.6, 0.0, 0.8])))
    world.streamed, world.signal_M[3:7] = [], moved_4
    for _ in range(60):
        world.fill()
        world.steady += 20_000_000
    world.fill()
    world.loop.begin()
    for _ in range(10):
        world.loop.step(world.settings, world.ros_ns(), 0)
        world.flow(world.steady + 100_000_000)
    assert len(world.streamed) > 20
    for _, position_J, _, reference_P4 in world.streamed:
        turned_4 = world.policy.space.quaternions(world.policy.space.poses[0], position_J, reference_P4)
        np.testing.assert_allclose(abs(float(turned_4 @ moved_4)), 1.0, atol=1e-6)


@pytest.mark.parametrize("frame", ["base", "tool"])
@pytest.mark.parametrize("counted_from", ["previous", "observation"])
def test_steps_lead_a_tool_along(frame: str, counted_from: str) -> None:
    """A step of 2 mm up per action, in the base's axes or in the tool's own, and a slow turn."""

    def fits(robot: Any) -> bool:
        output = robot.outputs[0]
        return whole(robot) and (output.delta_frame, output.delta_from) == (frame, counted_from)

    began: list[tuple[Array, Array]] = []

    def act(world: World, _: Array) -> Array:
        began.append(placed(world))
        steps = np.tile([0.0, 0.0, 0.002, 0.0, 0.0, 0.01], (HORIZON, 1))
        return steps if counted_from == "previous" else np.cumsum(steps, axis=0)

    world = run("delta", act, seconds=2.0, accept=fits)
    (place, turn), (there, turned) = began[0], placed(world)
    way = there - place
    up = turn[:, 2] if frame == "tool" else np.array([0.0, 0.0, 1.0])
    box = np.array(world.robot.outputs[0].workspace.z)
    if np.all((box[0] + 0.01 < np.array([place[2], there[2]])) & (np.array([place[2], there[2]]) < box[1] - 0.01)):
        assert way @ up == pytest.approx(np.linalg.norm(way), rel=0.02)
        assert 0.04 < np.linalg.norm(way) < 0.002 / ACTION_S * 2.2
    spun = turned @ turn.T if frame == "base" else turn.T @ turned
    assert np.arctan2(spun[1, 0], spun[0, 0]) > 0.1 and spun[2, 2] == pytest.approx(1.0, abs=1e-3)
