"""The demonstrator: kinematics against MuJoCo's; demonstrations that are smooth, clear of others, and solve tasks."""

from __future__ import annotations

import numpy as np
import pytest

from ki_vla_ros.errors import SimulationError
from ki_vla_ros.sim.demonstrator import Demonstration, Demonstrator, joints_to_tip, tip_to_joints
from ki_vla_ros.sim.task import Scene, SceneObject, Task, sample_scene
from ki_vla_ros.sim.world import HOME_J, TIMESTEP_S, World

HIGH_SCENE = Scene(
    0,
    (
        SceneObject("red", "pole", 0.38, 0.02, 0.0, 1.1),
        SceneObject("red", "disc", 0.47, -0.01, 0.0, 1.0),
        SceneObject("blue", "disc", 0.40, 0.20, 0.0, 1.0),
    ),
    Task("touch", "red", "disc"),
)


@pytest.fixture(scope="module")
def world() -> World:
    return World(render=False)


@pytest.fixture(scope="module")
def demonstrator(world: World) -> Demonstrator:
    return Demonstrator(world)


def follow(world: World, demonstration: Demonstration, *, until_s: float = 1.0) -> None:
    """Physics along the demonstration, and `until_s` beyond its end, or until the judge is done."""
    begin_s = world.time_s
    while not world.judge.done and world.time_s < begin_s + demonstration.duration_s + until_s:
        world.step(demonstration.position(world.time_s - begin_s + TIMESTEP_S))


def test_forward_kinematics_agree_with_mujoco(world: World) -> None:
    rng = np.random.default_rng(0)
    scene = sample_scene(0, split="all")
    for _ in range(50):
        joint_J = rng.uniform(world.lower_J, world.upper_J)
        world.reset(scene, joint_J)
        np.testing.assert_allclose(joints_to_tip(joint_J[None])[0], world.tip_position, atol=1e-9)


@pytest.mark.parametrize("x", [0.27, 0.40, 0.53])
@pytest.mark.parametrize("y", [-0.23, 0.0, 0.23])
@pytest.mark.parametrize("z", [0.0, 0.1, 0.22])
def test_inverse_kinematics_put_the_tip_there_upright(world: World, x: float, y: float, z: float) -> None:
    joint_J = tip_to_joints((x, y, z), 0.02)
    assert np.all(joint_J > world.lower_J) and np.all(joint_J < world.upper_J)
    assert joint_J[3] == 0.0 and joint_J[6] == 0.02
    world.reset(sample_scene(0, split="all"), joint_J)
    np.testing.assert_allclose(world.tip_position, (x, y, z), atol=1e-9)
    # Tool down, fingers along y, at any pan. Columns: towards the wrist camera, along the fingers' opening, out of it.
    tool_33 = world._data.site_xmat[world._tip_id].reshape(3, 3)
    np.testing.assert_allclose(tool_33, [[-1, 0, 0], [0, 1, 0], [0, 0, -1]], atol=1e-9)


def test_home_is_above_the_near_edge() -> None:
    np.testing.assert_allclose(tip_to_joints((0.30, 0.0, 0.25), 0.01), HOME_J, atol=1e-8)


@pytest.mark.parametrize("xyz", [(0.8, 0.0, 0.1), (0.05, 0.0, 0.3), (0.4, 0.0, 0.9)])
def test_out_of_reach_is_refused(xyz: tuple[float, float, float]) -> None:
    with pytest.raises(SimulationError, match="out of the arm's reach"):
        tip_to_joints(xyz)


@pytest.mark.parametrize("seed", range(12))
def test_demonstrator_solves_scenes(world: World, demonstrator: Demonstrator, seed: int) -> None:
    scene = sample_scene(seed, split="all")
    world.reset(scene)
    demonstration = demonstrator.plan(HOME_J, None, scene)
    assert 1.0 < demonstration.duration_s < 2.5
    follow(world, demonstration)
    assert world.judge.success
    gripper_m = 0.004 if scene.task.verb == "touch" else 0.02
    np.testing.assert_allclose(demonstration.position(demonstration.duration_s)[-1], gripper_m, atol=1e-9)


@pytest.mark.parametrize("start", [(0.30, 0.03, 0.02), (0.38, 0.09, 0.03), (0.38, -0.06, 0.01)])
def test_demonstrator_rises_from_a_low_start_beside_a_tall_object(
    world: World, demonstrator: Demonstrator, start: tuple[float, float, float]
) -> None:
    world.reset(HIGH_SCENE, tip_to_joints(start))
    follow(world, demonstrator.plan(world.joint_position_J, None, HIGH_SCENE))
    assert world.judge.success


def test_tip_passes_above_everything_until_it_is_over_the_target(demonstrator: Demonstrator) -> None:
    """The pole stands on the straight line from home to the disc."""
    demonstration = demonstrator.plan(HOME_J, None, HIGH_SCENE)
    tip_n3 = joints_to_tip(demonstration.sample(np.linspace(0.0, demonstration.duration_s, 400)))
    target = HIGH_SCENE.objects[1]
    far_n = np.hypot(tip_n3[:, 0] - target.x, tip_n3[:, 1] - target.y) > 0.025
    assert far_n.any()
    assert tip_n3[far_n, 2].min() >= HIGH_SCENE.objects[0].top_m + 0.055


def test_demonstration_ends_on_the_target_and_stays(demonstrator: Demonstrator) -> None:
    for verb, height_m in (("touch", -0.01), ("point at", 0.06)):
        scene = Scene(0, HIGH_SCENE.objects, Task(verb, "blue", "disc"))
        demonstration = demonstrator.plan(HOME_J, None, scene)
        end_J = demonstration.position(demonstration.duration_s)
        target = scene.objects[2]
        np.testing.assert_allclose(
            joints_to_tip(end_J[None])[0], (target.x, target.y, target.top_m + height_m), atol=1e-6
        )
        np.testing.assert_array_equal(demonstration.position(demonstration.duration_s + 3.0), end_J)


def test_displaced_target_is_followed(demonstrator: Demonstrator) -> None:
    centres = np.array([(item.x, item.y, item.top_m / 2) for item in HIGH_SCENE.objects])
    centres[1, :2] = (0.50, -0.15)
    demonstration = demonstrator.plan(HOME_J, None, HIGH_SCENE, object_positions=centres)
    np.testing.assert_allclose(joints_to_tip(demonstration.position(9.0)[None])[0, :2], (0.50, -0.15), atol=1e-9)
    with pytest.raises(SimulationError, match=r"object_positions: expected shape \(3, 3\), got \(2, 3\)"):
        demonstrator.plan(HOME_J, None, HIGH_SCENE, object_positions=centres[:2])


@pytest.mark.parametrize("seed", range(5))
def test_demonstration_continues_any_motion(demonstrator: Demonstrator, seed: int) -> None:
    """Position, velocity and acceleration at the start are those given, with a tilted tool and every joint moving."""
    rng = np.random.default_rng(seed)
    joint_J = HOME_J + rng.normal(size=7) * np.array([0.2, 0.1, 0.1, 0.1, 0.2, 0.3, 0.002])
    velocity_J = rng.normal(size=7) * np.array([0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.005])
    acceleration_J = rng.normal(size=7) * np.array([1, 1, 1, 1, 1, 1, 0.01])
    demonstration = demonstrator.plan(
        joint_J, velocity_J, sample_scene(seed, split="all"), joint_acceleration_J=acceleration_J
    )
    np.testing.assert_allclose(demonstration.position(0.0), joint_J, atol=1e-6)
    np.testing.assert_allclose(demonstration.velocity(0.0), velocity_J, atol=1e-4)
    np.testing.assert_allclose(demonstration.acceleration(0.0), acceleration_J, atol=1e-2)
    np.testing.assert_allclose(demonstration.velocity(demonstration.duration_s + 0.1), 0.0, atol=1e-9)


@pytest.mark.parametrize("via", [None, (0.34, 0.16, 0.24)])
def test_demonstration_is_smooth(demonstrator: Demonstrator, via: tuple[float, float, float] | None) -> None:
    """Speeds and accelerations stay those of a calm arm, also where segments join."""
    for seed in range(10):
        demonstration = demonstrator.plan(HOME_J, None, sample_scene(seed, split="all"), via_tip_xyz=via)
        position_nJ = demonstration.sample(np.arange(0.0, demonstration.duration_s + 0.1, 0.002))
        velocity_nJ = np.diff(position_nJ, axis=0) / 0.002
        assert np.abs(velocity_nJ).max() < 2.0
        assert np.abs(np.diff(velocity_nJ, axis=0) / 0.002).max() < 20.0


def test_via_point_is_passed_at_speed(demonstrator: Demonstrator) -> None:
    via = np.array([0.34, 0.16, 0.24])
    demonstration = demonstrator.plan(HOME_J, None, HIGH_SCENE, via_tip_xyz=via)
    times = np.linspace(0.0, demonstration.duration_s, 2000)
    tip_n3 = joints_to_tip(demonstration.sample(times))
    closest = int(np.argmin(np.linalg.norm(tip_n3 - via, axis=1)))
    assert np.linalg.norm(tip_n3[closest] - via) < 1e-3
    speed_n = np.linalg.norm(np.gradient(tip_n3, times, axis=0), axis=1)
    assert speed_n[closest] > 0.03


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_planning_again_on_the_way_changes_nothing(demonstrator: Demonstrator, share: float) -> None:
    for seed in range(10):
        scene = sample_scene(seed, split="all")
        first = demonstrator.plan(HOME_J, None, scene)
        now_s = share * first.duration_s
        again = demonstrator.plan(
            first.position(now_s), first.velocity(now_s), scene, joint_acceleration_J=first.acceleration(now_s)
        )
        assert now_s + again.duration_s == pytest.approx(first.duration_s, abs=1e-3)
        times = np.linspace(0.0, 1.0, 20)
        gap_n3 = joints_to_tip(first.sample(now_s + times)) - joints_to_tip(again.sample(times))
        assert np.abs(gap_n3).max() < 4e-3


def test_path_out_of_reach_is_refused_when_planning(demonstrator: Demonstrator) -> None:
    with pytest.raises(SimulationError, match="out of the arm's reach"):
        demonstrator.plan(HOME_J, None, HIGH_SCENE, via_tip_xyz=(0.9, 0.0, 0.2))
