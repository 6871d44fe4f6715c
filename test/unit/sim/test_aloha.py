"""The simulated ALOHA: its model, its judge, and the demonstrator that hands the cube over."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
from support.aloha import needs_aloha

from ki_vla_ros.errors import SimulationError
from ki_vla_ros.sim.aloha.demonstrator import PERIOD_S, ArmKinematics, Demonstrator, Waypoint
from ki_vla_ros.sim.aloha.insertion import (
    PEG_X_M,
    SOCKET_X_M,
    Y_M,
    Inserter,
    InsertionScene,
    InsertionWorld,
    Mating,
    sample_insertion,
)
from ki_vla_ros.sim.aloha.world import (
    ARM_JOINTS,
    CAMERAS,
    CLOSED_M,
    HOLD_S,
    HOME_ARM,
    HOME_J,
    JOINTS,
    OPEN_M,
    TIME_LIMIT_S,
    X_RANGE_M,
    Y_RANGE_M,
    AlohaWorld,
    Judge,
    Scene,
    Touching,
    Verdict,
    load_model,
    model_joint,
    sample_scene,
)
from ki_vla_ros.sim.world import TIMESTEP_S

CORNERS = [Scene(0, x, y) for x in X_RANGE_M for y in Y_RANGE_M]
# Of the arms' joints, by their maker: pi rad/s. Our demonstrator leaves some of that to whoever imitates it.
FASTEST = 2.7


@pytest.fixture(scope="module")
def blind() -> AlohaWorld:
    """A world without images."""
    return AlohaWorld(render=False)


@pytest.fixture(scope="module")
def demonstrator() -> Demonstrator:
    return Demonstrator()


@pytest.fixture(scope="module")
def seeing() -> Iterator[AlohaWorld]:
    world = AlohaWorld(width=64, height=48)
    yield world
    world.close()


# --- scenes and judge


def test_a_scene_is_where_gym_aloha_draws_it() -> None:
    """`gym_aloha.utils.sample_box_pose(0)` begins with these numbers."""
    scene = sample_scene(0)
    assert (scene.x, scene.y) == pytest.approx((0.10976270078546496, 0.5430378732744838), abs=1e-15)
    for seed in range(50):
        scene = sample_scene(seed)
        assert X_RANGE_M[0] <= scene.x <= X_RANGE_M[1] and Y_RANGE_M[0] <= scene.y <= Y_RANGE_M[1]


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_numpy_does_not_take_is_refused(seed: int) -> None:
    with pytest.raises(SimulationError, match=rf"scene_seed: expected 0 to 4294967295, got {seed}"):
        sample_scene(seed)


RIGHT, LEFT, TABLE = Touching(right=True), Touching(left=True), Touching(table=True)


@pytest.mark.parametrize(
    ("touching", "reward"),
    [
        (TABLE, 0),
        (Touching(), 0),
        (Touching(right=True, table=True), 1),
        (RIGHT, 2),
        (Touching(left=True, table=True), 3),
        (LEFT, 4),
        (Touching(left=True, right=True), 4),
    ],
)
def test_rewards_are_those_of_gym_aloha(touching: Touching, reward: int) -> None:
    judge = Judge()
    judge.observe(0.0, touching)
    assert judge.verdict == Verdict(reward=reward)


def test_the_left_gripper_must_hold_the_cube_alone_and_for_a_while() -> None:
    judge = Judge()
    for time_s, touching in ((0.0, RIGHT), (1.0, Touching(left=True, right=True)), (2.0, Touching(True, True))):
        judge.observe(time_s, touching)
    assert judge.verdict == Verdict(reward=4)
    judge.observe(3.0, LEFT)
    judge.observe(3.0 + 0.9 * HOLD_S, LEFT)
    judge.observe(3.0 + HOLD_S, Touching())  # lost
    judge.observe(4.0, LEFT)
    assert not judge.verdict.success
    judge.observe(4.0 + 1.01 * HOLD_S, LEFT)
    assert judge.verdict == Verdict(reward=4, success=True, done=True)
    judge.observe(TIME_LIMIT_S, TABLE)
    assert judge.verdict.success, "a verdict stays"


def test_an_episode_ends_without_success_when_its_time_is_up() -> None:
    judge = Judge()
    judge.observe(TIME_LIMIT_S, RIGHT)
    assert judge.verdict == Verdict(reward=2, success=False, done=True)


# --- the model


@pytest.mark.parametrize("spec", [None, ModuleSpec("gym_aloha", None, is_package=True)])
def test_a_missing_model_names_the_package_and_the_command(
    monkeypatch: pytest.MonkeyPatch, spec: ModuleSpec | None, tmp_path: Path
) -> None:
    if spec is not None:
        spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    fault = "not installed" if spec is None else "found it without assets/bimanual"
    with pytest.raises(SimulationError, match=rf"gym-aloha.*{fault}.*pip install --no-deps gym-aloha") as caught:
        AlohaWorld(render=False)
    assert "http" not in str(caught.value)


@needs_aloha
def test_reset_puts_everything_in_place(blind: AlohaWorld) -> None:
    blind.reset(Scene(0, 0.1, 0.45))
    assert blind.joints == JOINTS and len(JOINTS) == 14
    assert blind.time_s == 0.0
    np.testing.assert_allclose(blind.joint_position_J, HOME_J)
    np.testing.assert_array_equal(blind.joint_velocity_J, np.zeros(14))
    np.testing.assert_allclose(blind.cube_position, (0.1, 0.45, 0.02))
    assert np.all(blind.lower_J < HOME_J) and np.all(blind.upper_J > HOME_J)
    gripper = JOINTS.index("right_gripper")
    assert (blind.lower_J[gripper], blind.upper_J[gripper]) == (CLOSED_M, OPEN_M)


@needs_aloha
def test_each_joint_follows_its_own_command(blind: AlohaWorld) -> None:
    """A tenth of the way from home to the upper limit: each alone, and both fingers of a gripper together."""
    for index, joint in enumerate(JOINTS):
        blind.reset(Scene(0, 0.1, 0.5))
        goal_J = HOME_J.copy()
        goal_J[index] += 0.1 * (blind.upper_J[index] - HOME_J[index])
        for _ in range(round(0.5 / TIMESTEP_S)):
            blind.step(goal_J)
        moved_J = blind.joint_position_J - HOME_J
        assert np.argmax(np.abs(moved_J) / (blind.upper_J - blind.lower_J)) == index, joint
        if joint.endswith("gripper"):
            side = joint.partition("_")[0]
            assert blind._data.joint(f"vx300s_{side}/right_finger").qpos[0] == pytest.approx(
                -blind.joint_position_J[index], abs=5e-4
            )


@needs_aloha
@pytest.mark.parametrize("command", [[0.0] * 13, [np.nan] * 14])
def test_an_impossible_command_is_refused(blind: AlohaWorld, command: list[float]) -> None:
    blind.reset(Scene(0, 0.1, 0.5))
    with pytest.raises(SimulationError, match="joint positions: expected finite numbers for left_waist, "):
        blind.step(command)


@needs_aloha
def test_images_are_of_the_wanted_size_and_differ(seeing: AlohaWorld) -> None:
    seeing.reset(Scene(0, 0.1, 0.5))
    pictures = [seeing.render(camera) for camera in CAMERAS]
    assert {picture.shape for picture in pictures} == {(48, 64, 3)}
    assert all(picture.std() > 10.0 for picture in pictures)
    assert not np.array_equal(pictures[1], pictures[2])
    top = pictures[0].astype(int)
    assert ((top[..., 0] > 120) & (top[..., 1] < 60)).any(), "the red cube is in sight"


@needs_aloha
def test_a_world_without_a_scene_or_images_says_so() -> None:
    world = AlohaWorld(render=False)
    with pytest.raises(SimulationError, match="no scene yet"):
        world.step(HOME_J)
    with pytest.raises(SimulationError, match="no images"):
        world.render("top")
    with pytest.raises(SimulationError, match=r"height: expected 1..2048 pixels, got 0"):
        AlohaWorld(height=0)


# --- the demonstrator


@needs_aloha
@pytest.mark.parametrize("side", ["left", "right"])
def test_inverse_kinematics_finds_back(side: str) -> None:
    arm = ArmKinematics(load_model(1, 1), side)
    rng = np.random.default_rng(3)
    for _ in range(20):
        position_A = np.array(HOME_ARM) + rng.uniform(-0.3, 0.3, len(ARM_JOINTS))
        position_A[ARM_JOINTS.index("forearm_roll")] = 0.0
        tip, axes = arm.pose(position_A)
        waypoint = Waypoint(0.0, tip, float(np.arcsin(-axes[2, 0])), float(np.arctan2(axes[2, 1], axes[2, 2])), 0.0)
        np.testing.assert_allclose(arm.reach(waypoint, HOME_ARM), position_A, atol=1e-4)


@needs_aloha
def test_a_place_out_of_reach_is_refused(demonstrator: Demonstrator) -> None:
    with pytest.raises(SimulationError, match=r"right arm: tip \[.*\] with the fingers pitched by .* is out of reach"):
        demonstrator.plan(Scene(0, -0.5, 0.5))


def hand_over(world: AlohaWorld, demonstrator: Demonstrator, scene: Scene) -> Verdict:
    demonstration = demonstrator.plan(scene)
    world.reset(scene)
    while world.time_s < 4.0:
        world.step(demonstration.sample(world.time_s + TIMESTEP_S))
    assert world.judge.verdict == Verdict(reward=2), "the right arm has it, and the left one has not touched it"
    while world.time_s < demonstration.duration_s:
        world.step(demonstration.sample(world.time_s + TIMESTEP_S))
    return world.judge.verdict


@needs_aloha
@pytest.mark.parametrize("scene", [*CORNERS, *map(sample_scene, range(3))], ids=str)
def test_the_cube_is_handed_over_wherever_it_lies(blind: AlohaWorld, demonstrator: Demonstrator, scene: Scene) -> None:
    assert hand_over(blind, demonstrator, scene) == Verdict(reward=4, success=True, done=True)
    assert blind.cube_position == pytest.approx((-0.13, 0.5, 0.25), abs=0.03), "the left arm took it along"
    opening = blind.joint_position_J[JOINTS.index("left_gripper")]
    assert opening == pytest.approx(0.040, abs=0.002), "told to close, its fingers are held apart by the cube"


@needs_aloha
def test_a_demonstration_stays_within_the_limits(blind: AlohaWorld, demonstrator: Demonstrator) -> None:
    for scene in CORNERS:
        path_NJ = np.vstack([HOME_J, demonstrator.plan(scene).position_NJ])
        assert np.all(path_NJ >= blind.lower_J) and np.all(path_NJ <= blind.upper_J)
        speed_J = np.abs(np.diff(path_NJ, axis=0)).max(axis=0) / PERIOD_S
        grippers = [JOINTS.index(f"{side}_gripper") for side in ("left", "right")]
        assert speed_J[grippers].max() < 0.2
        assert speed_J.max() < FASTEST


@needs_aloha
def test_a_demonstration_begins_at_home_and_is_sampled_on_straight_lines(demonstrator: Demonstrator) -> None:
    demonstration = demonstrator.plan(CORNERS[0])
    first, second = demonstration.position_NJ[:2]
    np.testing.assert_allclose(demonstration.sample(0.0), HOME_J)
    np.testing.assert_allclose(demonstration.sample(1.5 * PERIOD_S), (first + second) / 2.0)
    np.testing.assert_allclose(demonstration.sample(100.0), demonstration.position_NJ[-1])
    assert model_joint("left_gripper") == "vx300s_left/left_finger"


# --- peg and socket


def test_peg_and_socket_lie_where_gym_aloha_draws_them() -> None:
    """The numbers of `gym_aloha.utils.sample_insertion_pose(0)`."""
    scene = sample_insertion(0)
    assert scene.peg == pytest.approx((0.1548813503927325, 0.5430378732744838), abs=1e-15)
    assert scene.socket == pytest.approx((-0.1455116817003103, 0.4847309598677809), abs=1e-15)
    with pytest.raises(SimulationError, match=r"scene_seed: expected 0 to 4294967295, got -1"):
        sample_insertion(-1)


@pytest.mark.parametrize(
    ("mating", "reward", "done"),
    [
        (Mating(), 0, False),
        (Mating(peg_held=True), 0, False),
        (Mating(peg_held=True, socket_held=True, on_table=True), 1, False),
        (Mating(peg_held=True, socket_held=True), 2, False),
        (Mating(each_other=True, on_table=True), 0, False),
        (Mating(each_other=True), 3, False),
        (Mating(each_other=True, pin=True), 4, True),
        (Mating(each_other=True, pin=True, on_table=True), 4, False),
    ],
)
def test_rewards_of_an_insertion_are_those_of_gym_aloha(mating: Mating, reward: int, done: bool) -> None:
    assert (mating.reward, mating.done) == (reward, done)


@needs_aloha
def test_the_peg_goes_into_the_socket_from_the_corners() -> None:
    world, planner = InsertionWorld(render=False), Inserter()
    for scene in (
        InsertionScene(0, (PEG_X_M[0], Y_M[0]), (SOCKET_X_M[0], Y_M[1])),
        InsertionScene(0, (PEG_X_M[1], Y_M[1]), (SOCKET_X_M[1], Y_M[0])),
    ):
        world.reset(scene)
        seen = []
        plan = planner.plan(scene)
        for position_J in plan.position_NJ:
            for _ in range(round(PERIOD_S / TIMESTEP_S)):
                world.step(position_J)
            seen.append(world.judge.verdict.reward)
        assert world.judge.verdict.success and {0, 1, 2, 4} <= set(seen), seen
        assert 5.0 < seen.index(4) * PERIOD_S < 7.0
        turning = [joint for joint, name in enumerate(JOINTS) if "gripper" not in name]
        assert np.abs(np.diff(plan.position_NJ[:, turning], axis=0)).max() < FASTEST * PERIOD_S
