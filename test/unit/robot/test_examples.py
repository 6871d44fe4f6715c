"""Every robot file in config/robots/, against the names, limits and conventions of the real robot.

The facts are restated here, each with the file that has them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from support import ROOT

from ki_vla_ros.robot import (
    ARRAY,
    GRIPPER_COMMAND,
    POSE,
    TRAJECTORY,
    TWIST,
    CommandSpace,
    Robot,
    find_columns,
    read_robot,
)
from ki_vla_ros.survey import RobotFile, check_urdf

FILES = {path.stem: path for path in sorted((ROOT / "config/robots").glob("*.yaml"))}
Limits = tuple[float, float, float]  # lower, upper, velocity


@dataclass(frozen=True)
class Facts:
    """`joints` as their URDF has them; `topics` with types; `state` and `action`: names or widths of datasets."""

    source: str
    joints: dict[str, Limits] = field(default_factory=dict)
    topics: dict[str, str] = field(default_factory=dict)
    state: tuple[str, ...] | int = ()
    action: tuple[str, ...] | int = ()
    columns: dict[str, int] = field(default_factory=dict)
    fps: float = 0.0


SO101 = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
VIPER = {  # interbotix_ros_manipulators, interbotix_xsarm_descriptions/urdf/vx300s.urdf.xacro
    "waist": (-math.pi + 1e-5, math.pi - 1e-5, math.pi),
    "shoulder": (math.radians(-106), math.radians(72), math.pi),
    "elbow": (math.radians(-101), math.radians(92), math.pi),
    "forearm_roll": (-math.pi + 1e-5, math.pi - 1e-5, math.pi),
    "wrist_angle": (math.radians(-107), math.radians(128), math.pi),
    "wrist_rotate": (-math.pi + 1e-5, math.pi - 1e-5, math.pi),
}
ALOHA = tuple(f"{side}_{joint}" for side in ("left", "right") for joint in (*VIPER, "gripper"))
PANDA_SPEED = (2.175,) * 4 + (2.61,) * 3
PANDA = [
    (-2.8973, 2.8973), (-1.7628, 1.7628), (-2.8973, 2.8973), (-3.0718, -0.0698), (-2.8973, 2.8973),
    (-0.0175, 3.7525), (-2.8973, 2.8973),
]  # fmt: skip
FR3 = [
    (-2.7437, 2.7437, 2.62), (-1.7837, 1.7837, 2.62), (-2.9007, 2.9007, 2.62), (-3.0421, -0.1518, 2.62),
    (-2.8065, 2.8065, 5.26), (0.5445, 4.5169, 4.18), (-3.0159, 3.0159, 5.26),
]  # fmt: skip
TIAGO = [  # in degrees, as its xacro has them
    (0.0, 157.5, 2.7), (-90.0, 62.5, 3.66), (-202.5, 90.0, 4.58), (-22.5, 135.0, 4.58), (-120.0, 120.0, 1.95),
    (-81.0, 81.0, 1.76), (-120.0, 120.0, 1.76),
]  # fmt: skip
KNUCKLE = {"robotiq_85_left_knuckle_joint": (0.0, 0.8, 0.5)}  # robotiq_description/urdf/robotiq_2f_85_macro.urdf.xacro
FINGER = (0.0, 0.04, 0.2)  # franka_description/end_effectors/franka_hand
TURN = 2 * math.pi

FACTS = {
    "so101": Facts(
        "huggingface/lerobot: robots/so101_follower/so101_follower.py and sim/so101_new_calib.xml (ranges)",
        joints={
            "shoulder_pan": (-1.919862, 1.919862, 10.0),
            "shoulder_lift": (-1.745329, 1.745329, 10.0),
            "elbow_flex": (-1.69, 1.69, 10.0),
            "wrist_flex": (-1.658063, 1.658063, 10.0),
            "wrist_roll": (-2.743847, 2.841206, 10.0),
            "gripper": (-0.174533, 1.745329, 10.0),
        },
        state=tuple(f"{motor}.pos" for motor in SO101),
        action=tuple(f"{motor}.pos" for motor in SO101),
        fps=30,
    ),
    "ur5e_robotiq": Facts(
        "UniversalRobots: ur_description/config/ur5e/joint_limits.yaml, ur_robot_driver/config/ur_controllers.yaml; "
        "PickNikRobotics/ros2_robotiq_gripper: robotiq_description/config/robotiq_controllers.yaml",
        joints={
            **{
                f"{name}_joint": (-TURN, TURN, math.pi)
                for name in ("shoulder_pan", "shoulder_lift", "wrist_1", "wrist_2", "wrist_3")
            },
            "elbow_joint": (-math.pi, math.pi, math.pi),
            **KNUCKLE,
        },
        topics={
            "scaled_joint_trajectory_controller/joint_trajectory": TRAJECTORY,
            "robotiq_gripper_controller/gripper_cmd": GRIPPER_COMMAND,
        },
    ),
    "fr3": Facts(
        "frankaemika: franka_description/robots/fr3/joint_limits.yaml, franka_ros2/franka_gripper and "
        "franka_fr3_moveit_config/config/fr3_ros_controllers.yaml",
        joints={**{f"fr3_joint{i}": limits for i, limits in enumerate(FR3, 1)}, "fr3_finger_joint1": FINGER},
        topics={
            "fr3_arm_controller/joint_trajectory": TRAJECTORY,
            "franka_gripper/gripper_action": GRIPPER_COMMAND,
        },
    ),
    "tiago": Facts(
        "pal-robotics: tiago_description/urdf/arm (arm_eps 0.02), torso; pal_gripper_description (gripper_eps 0.001); "
        "tiago_controller_configuration and pal_gripper_controller_configuration/config",
        joints={
            **{
                f"arm_{i}_joint": (math.radians(low) + 0.02, math.radians(high) - 0.02, speed)
                for i, (low, high, speed) in enumerate(TIAGO, 1)
            },
            "torso_lift_joint": (0.0, 0.35, 0.07),
            "gripper_right_finger_joint": (0.001, 0.044, 0.1),
            "gripper_left_finger_joint": (0.001, 0.044, 0.1),
        },
        topics={
            "arm_controller/joint_trajectory": TRAJECTORY,
            "torso_controller/joint_trajectory": TRAJECTORY,
            "gripper_controller/joint_trajectory": TRAJECTORY,
            "mobile_base_controller/cmd_vel_unstamped": TWIST,
        },
    ),
    "aloha": Facts(
        "the model of gym-aloha; lerobot/aloha_sim_transfer_cube_human, meta/info.json (names)",
        joints={f"{side}_{joint}": limits for side in ("left", "right") for joint, limits in VIPER.items()}
        | dict.fromkeys(("left_gripper", "right_gripper"), (0.021, 0.057, math.inf)),
        state=ALOHA,
        action=ALOHA,
        fps=50,
    ),
    "droid": Facts(
        "Franka's documentation (limits of the Panda); openpi: examples/droid, policies/droid_policy.py",
        joints={f"panda_joint{i}": (*PANDA[i - 1], PANDA_SPEED[i - 1]) for i in range(1, 8)} | KNUCKLE,
        topics={
            "forward_velocity_controller/commands": ARRAY,
            "robotiq_gripper_controller/gripper_cmd": GRIPPER_COMMAND,
        },
        columns={"joint_position": 7, "gripper_position": 1, "actions": 8},
        fps=15,
    ),
    "libero": Facts(
        "openpi: examples/libero, policies/libero_policy.py; physical-intelligence/libero, meta/info.json (widths)",
        joints={"panda_finger_joint1": FINGER},
        topics={
            "cartesian_motion_controller/target_frame": POSE,
            "franka_gripper/gripper_action": GRIPPER_COMMAND,
        },
        state=8,
        action=7,
        fps=20,
    ),
    "metaworld": Facts(
        "lerobot/metaworld_mt50, meta/info.json (fps, names); metaworld/sawyer_xyz_env.py (action_scale, gripper)",
        state=4,
        action=("x", "y", "z", "gripper"),
        fps=80,
    ),
    # Ours: the simulated arm, which test_robot.py compares with its simulator, and an arm to be changed.
    "demo_arm": Facts("ki_vla_ros/sim", fps=20),
    "imported_arm": Facts("no robot's", fps=50),
}


def test_every_file_has_its_facts() -> None:
    assert set(FACTS) == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_names_topics_and_rates_are_the_robots(name: str) -> None:
    facts, robot = FACTS[name], read_robot(FILES[name])
    assert {output.topic: output.type for output in robot.outputs} == (
        facts.topics or {o.topic: o.type for o in robot.outputs}
    )
    if facts.joints:
        moved = {a.target for a in robot.actions if a.kind in ("joint_position", "joint_velocity", "gripper")}
        assert moved == set(facts.joints)
    if facts.fps:
        assert robot.action_period_s == pytest.approx(1 / facts.fps)


@pytest.mark.parametrize("name", FILES)
def test_limits_are_those_of_the_urdf(name: str) -> None:
    facts, file = FACTS[name], RobotFile(FILES[name])
    if not facts.joints:
        return
    urdf = "".join(
        f'<joint name="{joint}" type="revolute"><limit lower="{low}" upper="{high}" velocity="{speed}"/></joint>'
        for joint, (low, high, speed) in facts.joints.items()
    )
    assert [str(misfit) for misfit in check_urdf(file, f"<robot>{urdf}</robot>")] == []
    assert file.robot is not None
    for action in file.robot.actions:
        if action.kind == "joint_position":  # nor narrower than they need be
            low, high, _ = facts.joints[action.target]
            assert action.limits == pytest.approx((low, high), abs=1e-3), action.name


@pytest.mark.parametrize("name", FILES)
def test_datasets_of_the_robot_have_its_dimensions(name: str) -> None:
    facts, robot = FACTS[name], read_robot(FILES[name])
    features: dict[str, tuple[int, tuple[str, ...]]] = {key: (width, ()) for key, width in facts.columns.items()}
    for key, names, count in (
        ("observation.state", facts.state, len(robot.state)),
        ("action", facts.action, len(robot.actions)),
    ):
        named = names if isinstance(names, tuple) else ()
        features[key] = (len(named) or (names if isinstance(names, int) else 0) or count, named)
    for key, dimensions in (("observation.state", robot.state), ("action", robot.actions)):
        places = find_columns(dimensions, key, features)
        assert len(set(places)) == len(dimensions)
        assert all(features[column][0] > index for column, index in places)


@pytest.mark.parametrize("name", FILES)
def test_actions_become_a_path_and_come_back(name: str) -> None:
    """What a policy may say of this robot, as the runtime moves it."""
    robot = read_robot(FILES[name])
    space, rng = CommandSpace(robot), np.random.default_rng(0)
    signal_M = np.zeros(len(robot.signals))
    for m, signal in enumerate(robot.signals):
        bounded = math.isfinite(signal.lower) and math.isfinite(signal.upper)
        signal_M[m] = (signal.lower + signal.upper) / 2 if bounded else float(signal.part == "qw")
    assert space.state(signal_M).shape == (len(robot.state),)
    measured_J = space.measured(signal_M)
    assert np.isfinite(measured_J[[axis.measured for axis in robot.axes]]).all()
    action_HD = np.empty((robot.horizon, len(robot.actions)))
    for d, action in enumerate(robot.actions):
        low, high = _span(action)
        share_H = rng.uniform(0.1, 0.9, robot.horizon)
        if action.binary:  # only the ends come back as they were
            share_H = np.repeat(rng.integers(0, 2, 1), robot.horizon).astype(float)
        action_HD[:, d] = low + share_H * (high - low)
    position_HJ, velocity_HJ = space.path(action_HD, measured_J, None, robot.action_period_s)
    back_HD = space.actions(position_HJ, velocity_HJ, measured_J)
    np.testing.assert_allclose(back_HD, action_HD, atol=1e-6)


def _span(action: object) -> tuple[float, float]:
    kind, span, most = (getattr(action, what) for what in ("kind", "span", "max_velocity"))
    if kind in ("twist", "joint_velocity"):
        return -most, most
    return span if kind in ("joint_position", "gripper") else (-0.01, 0.01)


@pytest.mark.parametrize("name", FILES)
def test_a_datasets_numbers_come_back(name: str) -> None:
    robot = read_robot(FILES[name])
    for lines in (robot.state_lines, robot.action_lines):
        values = np.random.default_rng(0).uniform(-1.0, 1.0, (100, len(lines.scale_D))).astype(np.float32)
        np.testing.assert_array_equal(lines.to_foreign(lines.to_robot(values)).astype(np.float32), values)


def of(name: str) -> Robot:
    return read_robot(FILES[name])


def test_so101_minus_100_to_100_is_its_range() -> None:
    """lerobot/motors/motors_bus.py: RANGE_M100_100 and, for the gripper, RANGE_0_100; 0 is closed."""
    for lines in (of("so101").state_lines, of("so101").action_lines):
        low, high = np.array([-100.0, 0, 0, 0, 100, 0]), np.array([0.0] * 5 + [100])
        np.testing.assert_allclose(lines.to_robot(low), [-1.91986, 0, 0, 0, 2.84121, -0.17453])
        np.testing.assert_allclose(lines.to_robot(high)[5], 1.74533)


def test_a_robotiq_is_closed_at_0_8_rad_and_openpis_1() -> None:
    """gripper_closed_position 0.7929 of robotiq_2f_85.ros2_control.xacro; DROID: 1 is closed."""
    for name in ("ur5e_robotiq", "droid"):
        assert next(a.ends for a in of(name).actions if a.kind == "gripper") == (0.0, 0.7929)
    np.testing.assert_allclose(of("droid").state_lines.to_robot(np.array([0.0] * 7 + [1.0]))[7], 0.7929)


def test_a_franka_finger_is_half_of_the_opening() -> None:
    """franka_gripper: target_width = 2 * goal->command.position; the hand opens to 0.08 m."""
    robot = of("fr3")
    signal = next(s for s in robot.signals if s.part == "fr3_finger_joint1")
    assert signal.topic == "franka_gripper/joint_states" and robot.actions[7].ends == (0.04, 0.0)


def test_libero_closes_with_1() -> None:
    """robosuite: -1 opens, 1 closes; the second finger's joint is negative."""
    robot = of("libero")
    assert len(robot.state) == 8 and len(robot.actions) == 7
    np.testing.assert_allclose(robot.action_lines.to_robot(np.array([0.0] * 6 + [1.0]))[6], 0.0, atol=1e-12)
    np.testing.assert_allclose(robot.state_lines.to_robot(np.array([0.0] * 6 + [0.04, -0.04]))[6:], [0.04, 0.04])


def test_metaworld_closes_with_1_and_steps_a_centimetre() -> None:
    """sawyer_xyz_env.py: action_scale is 1/100, the state's gripper the fingers' distance / 0.1, and -1 opens."""
    robot = of("metaworld")
    assert [camera.key for camera in robot.cameras] == ["observation.image"]
    np.testing.assert_allclose(
        robot.action_lines.to_robot(np.array([1.0, -1.0, 0.5, 1.0])), [0.01, -0.01, 0.005, 0.026]
    )
    np.testing.assert_allclose(robot.action_lines.to_robot(np.array([0.0, 0.0, 0.0, -1.0]))[3], 0.1)
    np.testing.assert_allclose(robot.state_lines.to_robot(np.array([0.1, 0.6, 0.2, 1.0])), [0.1, 0.6, 0.2, 0.1])


def test_aloha_grippers_are_0_to_1_in_datasets() -> None:
    """gym_aloha/constants.py: the left finger of a closed and an open gripper."""
    robot = of("aloha")
    low, high = (robot.state_lines.to_robot(np.full(14, value))[[6, 13]] for value in (0.0, 1.0))
    np.testing.assert_allclose(low, 0.01844, atol=1e-5)
    np.testing.assert_allclose(high, 0.05800, atol=1e-5)


def test_tiagos_base_turns_and_goes_forwards_only_as_its_controller_lets_it() -> None:
    """mobile_base_controller.yaml: 1.0 m/s forwards, 0.2 backwards, 2.09 rad/s; a differential drive has no vy."""
    base = [(a.component, a.max_velocity, a.max_acceleration) for a in of("tiago").actions if a.kind == "twist"]
    assert base == [("vx", 0.2, 1.0), ("wz", 2.09, 2.09)]
