"""pi0.5 of DROID and LIBERO: an imported policy computes what openpi's transforms and the robots' own controllers do.

The reference is written down here from the facts in docs/weights.md, number by number, in the dataset's units. It
shares nothing with the package.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support import ROOT
from support.golden import CONFIG
from support.sentencepieces import train
from tokenizers import Tokenizer

from ki_vla_ros.bundle.manifest import PolicySpec
from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.policy.policy import Policy
from ki_vla_ros.policy.preprocess import make_model_input
from ki_vla_ros.records import CameraFrame, Observation
from ki_vla_ros.robot.commands import CommandSpace
from ki_vla_ros.robot.robot import Robot, read_robot
from training.export.card import model_card
from training.import_weights import describe_import
from training.model.sizes import paligemma_3b
from training.model.vla import VLA
from training.tokens.paligemma import read_tokenizer
from training.tokens.prompt import prompt_tokenizer
from training.weights.statistics import Method, read_ranges, to_robot

Array = NDArray[np.float64]
Statistics = dict[str, dict[str, list[float]]]
DROID, LIBERO = (read_robot(ROOT / "config" / "robots" / f"{name}.yaml") for name in ("droid", "libero"))
HAND = "franka_robot_state_broadcaster/current_pose"
SENTENCEPIECE = train()
TASK = "pick up the red_cube"
WIDTH = 32
KNUCKLE = 0.7929  # rad, of a closed Robotiq 2F-85


# --- what openpi computes, in the dataset's units


def normalized(value: float, stats: Mapping[str, list[float]], d: int) -> float:
    return (value - stats["q01"][d]) / (stats["q99"][d] - stats["q01"][d] + 1e-6) * 2.0 - 1.0


def unnormalized(value: float, stats: Mapping[str, list[float]], d: int) -> float:
    return (value + 1.0) / 2.0 * (stats["q99"][d] - stats["q01"][d] + 1e-6) + stats["q01"][d]


def state_text(state: Sequence[float], stats: Mapping[str, list[float]]) -> str:
    """256 bins from -1 to 1; below is -1, above 255."""
    words = []
    for d, value in enumerate(state):
        edges = [-1.0 + 2.0 * n / 256 for n in range(256)]
        words.append(str(sum(normalized(value, stats, d) >= edge for edge in edges) - 1))
    return " ".join(words)


def openpi_actions(model_HW: NDArray[np.float32], stats: Mapping[str, list[float]], count: int) -> list[list[float]]:
    """The model's 32 numbers per action -> the robot's; what was padded in training is cut off."""
    return [[unnormalized(float(row[d]), stats, d) for d in range(count)] for row in model_HW]


def axis_angle(quaternion: Sequence[float]) -> list[float]:
    """LIBERO's: of (x, y, z, w) as MuJoCo has it, so beyond half a turn where w is negative."""
    x, y, z, w = quaternion
    sine = math.sqrt(1.0 - w * w)
    return [0.0, 0.0, 0.0] if sine < 1e-9 else [part * 2.0 * math.acos(w) / sine for part in (x, y, z)]


def rotation_matrix(vector: Sequence[float]) -> Array:
    """Rodrigues."""
    angle = math.sqrt(sum(v * v for v in vector))
    if angle == 0.0:
        return np.eye(3)
    x, y, z = (v / angle for v in vector)
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    return np.eye(3) + math.sin(angle) * cross + (1.0 - math.cos(angle)) * cross @ cross


def matrix_of(quaternion: Sequence[float]) -> Array:
    return rotation_matrix(axis_angle(quaternion))


# --- the package's side


def draw_statistics(rng: np.random.Generator, state: Array, actions: Array) -> Statistics:
    """Ranges around the given values, padded to the model's width as openpi's files may be."""
    found: Statistics = {}
    for name, middle in (("state", state), ("actions", actions)):
        reach = rng.uniform(0.2, 0.6, len(middle))
        padding = [0.0] * (WIDTH - len(middle))
        found[name] = {
            "q01": [*(middle - reach).tolist(), *padding],
            "q99": [*(middle + rng.uniform(0.2, 0.6, len(middle))).tolist(), *padding],
            "mean": [*middle.tolist(), *padding],
            "std": [*(reach / 2).tolist(), *padding],
        }
    return found


def imported(folder: Path, robot: Robot, stats: Statistics, kind: str = "pi05", **options: Any) -> PolicySpec:
    path = folder / "norm_stats.json"
    path.write_text(json.dumps({"norm_stats": stats}))
    method: Method = "mean_std" if kind == "pi0" else "quantiles"
    return describe_import(kind, paligemma_3b("pi05"), robot, path, method, 10, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "paligemma.model"
    path.write_bytes(SENTENCEPIECE.SerializeToString())
    return prompt_tokenizer(read_tokenizer(path, vocabulary=len(SENTENCEPIECE.pieces)))


def observe(robot: Robot, readings: Mapping[str, float], **images: NDArray[np.uint8]) -> Observation:
    """What the topics say, by joint, or by topic and component of a pose."""
    signal_M = np.array([s.scale * readings[s.part] + s.offset for s in robot.signals])
    black = np.zeros((8, 8, 3), dtype=np.uint8)
    frames = {name: CameraFrame(name, 0, images.get(name, black)) for name in robot.camera_names}
    return Observation(0, frames, CommandSpace(robot).state(signal_M), signal_M=signal_M)


def prompt(spec: PolicySpec, tokenizer: Tokenizer, observation: Observation) -> str:
    given = make_model_input(spec, tokenizer, observation, TASK)
    return str(tokenizer.decode(given.tokens_L[given.token_mask_L].tolist()))


def policy_of(spec: PolicySpec) -> Policy:
    return Policy(SimpleNamespace(manifest=spec), SimpleNamespace(description="none"))  # type: ignore[arg-type]


def joints(robot_values: Sequence[float]) -> dict[str, float]:
    names = [f"panda_joint{n}" for n in range(1, 8)]
    return dict(zip([*names, "robotiq_85_left_knuckle_joint"], robot_values, strict=True))


def droid_statistics(rng: np.random.Generator) -> Statistics:
    return draw_statistics(rng, np.array([0.0, 0.3, 0.0, -2.2, 0.0, 2.4, 0.1, 0.45]), np.array([0.0] * 7 + [0.5]))


# --- DROID


def test_droids_state_is_openpis_prompt(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Joints in rad; the gripper's 0..1 is the knuckle's angle. Values outside the range are cut as there."""
    rng = np.random.default_rng(0)
    stats = droid_statistics(rng)
    spec = imported(tmp_path, DROID, stats)
    assert (spec.prompt.length, spec.horizon, spec.action_width) == (200, 15, WIDTH)
    assert spec.action_period_s == pytest.approx(1 / 15)
    for _ in range(20):
        state = [*rng.normal([0.0, 0.3, 0.0, -2.2, 0.0, 2.4, 0.1], 0.6).tolist(), float(rng.uniform(-0.2, 1.2))]
        observation = observe(DROID, joints([*state[:7], KNUCKLE * state[7]]))
        expected = f"Task: pick up the red cube, State: {state_text(state, stats['state'])};\nAction: "
        assert prompt(spec, tokenizer, observation) == "<bos>" + expected


def test_droids_actions_are_velocities_in_rad_per_s(tmp_path: Path) -> None:
    """DROID adds 0.2 rad times the action to the measured joint in each of 15 steps per second."""
    rng = np.random.default_rng(1)
    stats = droid_statistics(rng)
    policy = policy_of(imported(tmp_path, DROID, stats))
    model_HW = rng.normal(0.0, 0.7, (15, WIDTH)).astype(np.float32)
    model_HW[:, 7] = rng.choice([-0.9, 0.9], 15)
    start = [0.1, 0.2, -0.1, -2.0, 0.3, 2.2, 0.0]
    observation = observe(DROID, joints([*start, 0.0]))
    chunk = policy.decode(model_HW, observation)
    actions = openpi_actions(model_HW, stats["actions"], 8)
    assert len(chunk.velocity_HJ) == 15
    for k, action in enumerate(actions):
        expected = [value * 0.2 / (1 / 15) for value in action[:7]]
        assert chunk.velocity_HJ[k, :7] == pytest.approx(expected, abs=1e-5)
        closed = 1.0 if action[7] > 0.5 else 0.0  # as openpi's client
        assert chunk.position_HJ[k, 7] == pytest.approx(KNUCKLE * closed)
    assert chunk.position_HJ[0, :7] == pytest.approx(
        np.array(start) + np.array([value * 0.2 for value in actions[0][:7]]), abs=1e-5
    )
    back = policy.encode(chunk.position_HJ, chunk.velocity_HJ, observation)
    assert back[:, :7] == pytest.approx(model_HW[:, :7], abs=1e-4)


def test_a_droid_policy_of_joint_positions(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """openpi's pi05_droid_jointpos: make_bool_mask(7, -1), differences from the state but for the gripper."""
    content = DROID.model_dump(mode="json", exclude_none=True)
    for action, state in zip(content["actions"][:7], content["state"], strict=False):
        action |= {"name": state["name"], "kind": "joint_position", "unit": "rad", "relative": True}
        action |= {"lower": state["lower"], "upper": state["upper"], "dataset": {"column": "actions", "index": 0}}
        action["dataset"]["index"] = content["state"].index(state)
    content["actions"][7]["binary"] = False
    content["outputs"][0]["type"] = "trajectory_msgs/msg/JointTrajectory"
    robot = Robot.model_validate(content)
    rng = np.random.default_rng(2)
    stats = droid_statistics(rng)
    policy = policy_of(imported(tmp_path, robot, stats))
    start = [0.1, 0.2, -0.1, -2.0, 0.3, 2.2, 0.0]
    model_HW = rng.normal(0.0, 0.7, (15, WIDTH)).astype(np.float32)
    chunk = policy.decode(model_HW, observe(robot, joints([*start, 0.3])))
    for k, action in enumerate(openpi_actions(model_HW, stats["actions"], 8)):
        expected = [value + start[j] for j, value in enumerate(action[:7])] + [KNUCKLE * action[7]]
        assert chunk.position_HJ[k] == pytest.approx(expected, abs=1e-5)


def test_pi0s_state_token(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """pi0_droid: mean and standard deviation, a token instead of text."""
    stats = droid_statistics(np.random.default_rng(3))
    spec = imported(tmp_path, DROID, stats, kind="pi0")
    state = [0.1, 0.2, -0.1, -2.0, 0.3, 2.2, 0.0, 0.75]
    given = make_model_input(spec, tokenizer, observe(DROID, joints([*state[:7], KNUCKLE * state[7]])), TASK)
    expected = [(v - stats["state"]["mean"][d]) / (stats["state"]["std"][d] + 1e-6) for d, v in enumerate(state)]
    assert given.state_S == pytest.approx(expected, rel=1e-5)
    assert tokenizer.decode(given.tokens_L[given.token_mask_L].tolist()) == "<bos>pick up the red cube\n"


def test_images_in_the_models_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """openpi's slots: base, left wrist; the third is left out."""
    shades = {"exterior": 200, "wrist": 50}
    images = {name: np.full((180, 320, 3), shade, dtype=np.uint8) for name, shade in shades.items()}
    spec = imported(tmp_path, DROID, droid_statistics(np.random.default_rng(4)))
    given = make_model_input(spec, tokenizer, observe(DROID, joints([0.0] * 8), **images), TASK)
    middle = [float(image_CHW[0, 112, 112]) for image_CHW in given.images_VCHW]
    assert middle == pytest.approx([200 / 255 * 2 - 1, 50 / 255 * 2 - 1], abs=1e-6)
    assert given.image_mask_V.tolist() == [True, True]
    assert given.images_VCHW[0, 0, 0, 0] == -1.0  # 320 x 180 is padded above and below


# --- LIBERO


def libero_statistics(rng: np.random.Generator) -> Statistics:
    """The hand points down: half a turn about x, a little more or less. The second finger counts downwards."""
    state = np.array([-0.05, 0.03, 0.8, 2.97, -0.2, -0.1, 0.03, -0.03])
    stats = draw_statistics(rng, state, np.array([0.0] * 6 + [0.0]))
    for end, finger in (("q01", 0.002), ("q99", 0.04)):
        stats["state"][end][6] = finger
    for end, finger in (("q01", -0.04), ("q99", -0.002)):
        stats["state"][end][7] = finger
    return stats


def hand(position: Sequence[float], quaternion: Sequence[float], fingers: Sequence[float]) -> dict[str, float]:
    parts = dict(zip(("x", "y", "z", "qx", "qy", "qz", "qw"), (*position, *quaternion), strict=True))
    return parts | dict(zip(("panda_finger_joint1", "panda_finger_joint2"), fingers, strict=True))


def draw_hand(rng: np.random.Generator) -> tuple[list[float], list[float], list[float]]:
    """Position, MuJoCo's quaternion (its w may be negative), and the fingers as ROS has them, both positive."""
    axis = rng.normal([1.0, 0.0, 0.0], 0.1)
    axis /= np.linalg.norm(axis)
    angle = rng.uniform(2.4, 3.9)
    quaternion = [*(math.sin(angle / 2) * axis).tolist(), math.cos(angle / 2)]
    return rng.normal([0.0, 0.0, 0.8], 0.2).tolist(), quaternion, rng.uniform(0.0, 0.04, 2).tolist()


def test_liberos_state_is_openpis_prompt(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """With the state, as LeRobot's fine-tune has it: also where the hand is turned beyond half a turn."""
    rng = np.random.default_rng(5)
    stats = libero_statistics(rng)
    spec = imported(tmp_path, LIBERO, stats)
    beyond = 0
    for _ in range(40):
        position, quaternion, fingers = draw_hand(rng)
        beyond += quaternion[3] < 0
        state = [*position, *axis_angle(quaternion), fingers[0], -fingers[1]]
        sign = rng.choice([-1.0, 1.0])  # a driver may send the quaternion or its negative: one rotation
        observation = observe(LIBERO, hand(position, [sign * q for q in quaternion], fingers))
        expected = f"Task: pick up the red cube, State: {state_text(state, stats['state'])};\nAction: "
        assert prompt(spec, tokenizer, observation) == "<bos>" + expected
    assert 10 < beyond < 30


def test_pi05_libero_does_not_see_the_state(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """openpi's discrete_state_input=False: pi0's prompt at pi0.5's length."""
    spec = imported(tmp_path, LIBERO, libero_statistics(np.random.default_rng(6)), in_prompt=False)
    observation = observe(LIBERO, hand([0.0, 0.0, 0.8], [1.0, 0.0, 0.0, 0.0], [0.04, 0.04]))
    given = make_model_input(spec, tokenizer, observation, TASK)
    assert tokenizer.decode(given.tokens_L[given.token_mask_L].tolist()) == "<bos>pick up the red cube\n"
    assert given.state_S is None
    assert (spec.prompt.length, spec.state.in_prompt, spec.state.as_token) == (200, False, False)
    assert "finger1, finger2; the policy does not see it." in model_card(spec, tokenizer, "", "float32")


@pytest.mark.parametrize(("said", "row"), [("ki (knowledge insulation)", True), ("kind of our own", False)])
def test_the_model_card_names_its_recipes_row(tmp_path: Path, tokenizer: Tokenizer, said: str, row: bool) -> None:
    spec = imported(tmp_path, DROID, droid_statistics(np.random.default_rng(0)))
    of_recipe = spec.model_copy(update={"provenance": spec.provenance.model_copy(update={"recipe": said})})
    card = model_card(of_recipe, tokenizer, "", "float32")
    assert ("from one start: `ki` in docs/results/ablation.md" in card) == row


def test_the_model_card_says_what_actions_are(tmp_path: Path, tokenizer: Tokenizer) -> None:
    cards = [
        model_card(imported(tmp_path, robot, stats), tokenizer, "", "float32")
        for robot, stats in (
            (DROID, droid_statistics(np.random.default_rng(0))),
            (LIBERO, libero_statistics(np.random.default_rng(0))),
        )
    ]
    assert "| velocity1 | joint_velocity | rad/s |  |  | 2.175 | absolute |" in cards[0]
    assert "| gripper | gripper | rad | 0 | 0.7929 | 0.5 | absolute |" in cards[0]
    assert "| drx | pose_delta | rad |  |  |  | absolute |" in cards[1]


def test_liberos_actions_are_steps_of_the_hand(tmp_path: Path) -> None:
    """robosuite's OSC_POSE: 0.05 m and 0.5 rad per unit along the world's axes, each from where the last one led."""
    rng = np.random.default_rng(7)
    stats = libero_statistics(rng)
    spec = imported(tmp_path, LIBERO, stats)
    policy = policy_of(spec)
    model_HW = rng.normal(0.0, 0.5, (10, WIDTH)).astype(np.float32)
    model_HW[:, 6] = rng.choice([-0.9, 0.9], 10)
    position, quaternion, fingers = [0.0, 0.1, 0.8], [0.98, 0.1, 0.1, 0.14], [0.04, 0.04]
    quaternion = [q / math.sqrt(sum(v * v for v in quaternion)) for q in quaternion]
    observation = observe(LIBERO, hand(position, quaternion, fingers))
    chunk = policy.decode(model_HW, observation)
    pose = policy.space.poses[0]
    place, turned = np.array(position), matrix_of(quaternion)
    for k, action in enumerate(openpi_actions(model_HW, stats["actions"], 7)):
        place = place + 0.05 * np.array(action[:3])
        turned = rotation_matrix([0.5 * value for value in action[3:6]]) @ turned
        assert chunk.position_HJ[k, :3] == pytest.approx(place, abs=1e-5)
        got = policy.space.quaternions(pose, chunk.position_HJ[k : k + 1], policy.space.reference_P4)[0]
        assert matrix_of([q * (1.0 if got[3] >= 0 else -1.0) for q in got]) == pytest.approx(turned, abs=1e-5)
        open_ = action[6] < 0.0  # robosuite goes by the sign
        assert chunk.position_HJ[k, 6] == pytest.approx(0.04 if open_ else 0.0)
    back = policy.encode(chunk.position_HJ, chunk.velocity_HJ, observation)
    assert back[:, :6] == pytest.approx(model_HW[:, :6], abs=1e-4)


def test_actions_that_are_poses_go_back_as_training_wrote_them(tmp_path: Path) -> None:
    """Absolute poses of a hand that points down: what guides the next chunk must not jump to the other end."""
    content = LIBERO.model_dump(mode="json", exclude_none=True)
    for action in content["actions"][:6]:
        action |= {"kind": "pose", "dataset": {}}
    robot = Robot.model_validate(content)
    rng = np.random.default_rng(10)
    stats = draw_statistics(rng, np.zeros(8), np.array([0.0, 0.0, 0.8, 3.2, -0.1, 0.1, 0.0]))
    policy = policy_of(imported(tmp_path, robot, stats))
    model_HW = rng.normal(0.0, 0.5, (10, WIDTH)).astype(np.float32)
    observation = observe(robot, hand([0.0, 0.0, 0.8], [1.0, 0.0, 0.0, 0.0], [0.04, 0.04]))
    policy.space.count_from(policy.space.measured(observation.signals))
    chunk = policy.decode(model_HW, observation)
    assert any(np.linalg.norm(action[3:6]) > math.pi for action in openpi_actions(model_HW, stats["actions"], 7))
    back = policy.encode(chunk.position_HJ, chunk.velocity_HJ, observation)
    assert back[:, :6] == pytest.approx(model_HW[:, :6], abs=1e-4)


# --- units, and what has none


def test_a_difference_has_the_units_factor_but_no_offset(tmp_path: Path) -> None:
    """A dataset in degrees that counts the other way round, with another zero: the numbers are openpi's."""
    content: dict[str, Any] = {
        "name": "arm",
        "cameras": [{"name": "scene"}],
        "state": [{"name": "a", "kind": "joint_position", "unit": "rad"}],
        "actions": [{"name": "a", "kind": "joint_position", "unit": "rad", "lower": -3, "upper": 3, "max_velocity": 1}],
        "outputs": [{"name": "arm", "topic": "arm_controller/joint_trajectory"}],
        "action_period_s": 0.1,
        "horizon": 10,
    }
    for dimension in (content["state"][0], content["actions"][0]):
        dimension["dataset"] = {"unit": "deg", "sign": -1, "offset": 0.5}
    content["actions"][0] |= {"relative": True, "output": "arm"}
    robot = Robot.model_validate(content)
    stats: Statistics = {
        "state": {"q01": [-40.0], "q99": [70.0]},
        "actions": {"q01": [-8.0], "q99": [5.0]},
    }
    spec = imported(tmp_path, robot, stats)
    assert spec.state.low[0] > spec.state.high[0]  # the mapping's sign
    degrees = 30.0  # of the dataset
    rad = -degrees * math.pi / 180 + 0.5
    observation = Observation(0, {}, np.array([rad]))
    model_HW = np.linspace(-1, 1, 10, dtype=np.float32)[:, None] * np.ones((1, WIDTH), dtype=np.float32)
    chunk = policy_of(spec).decode(model_HW, observation)
    for k, action in enumerate(openpi_actions(model_HW, stats["actions"], 1)):
        assert chunk.position_HJ[k, 0] == pytest.approx(-(degrees + action[0]) * math.pi / 180 + 0.5, abs=1e-6)
    content["state"][0]["dataset"] = {"unit": "deg"}
    with pytest.raises(
        ConfigurationError, match=r"actions: 'a': expected the same joint and dataset mapping at place 0"
    ):
        imported(tmp_path, Robot.model_validate(content), stats)
    content["state"].insert(0, {"name": "b", "kind": "joint_position", "unit": "rad"})
    with pytest.raises(ConfigurationError, match=r"at place 0 of the state, .* got b"):
        imported(tmp_path, Robot.model_validate(content), stats | {"state": {"q01": [0, 0], "q99": [1, 1]}})


def test_a_wheel_has_no_limits(tmp_path: Path) -> None:
    content = DROID.model_dump(mode="json", exclude_none=True)
    content["state"][6] |= {"lower": -math.inf, "upper": math.inf, "continuous": True}
    robot = Robot.model_validate(content)
    spec = imported(tmp_path, robot, droid_statistics(np.random.default_rng(8)))
    again = PolicySpec.model_validate_json(spec.model_dump_json())
    assert again == spec
    assert math.isinf(again.axes[6].upper)


def test_widths_of_their_own(tmp_path: Path) -> None:
    stats = libero_statistics(np.random.default_rng(9))
    path = tmp_path / "norm_stats.json"
    path.write_text(json.dumps({"norm_stats": stats}))
    ranges = read_ranges(path, "quantiles", 8, 7)
    assert (len(ranges.state.low), len(ranges.action.low)) == (8, 7)
    assert to_robot(ranges, LIBERO).state.low[7] == pytest.approx(0.04)
    stats["actions"] = {name: values[:6] for name, values in stats["actions"].items()}
    path.write_text(json.dumps({"norm_stats": stats}))
    with pytest.raises(ConfigurationError, match=r"actions\.q01: expected at least 7 numbers"):
        read_ranges(path, "quantiles", 8, 7)


def test_a_masked_slot_may_be_left_out() -> None:
    """openpi masks the slot of a camera that it does not have: the model computes the same without it."""
    torch.manual_seed(0)
    model = VLA(CONFIG).eval()
    images = torch.rand(1, 3, 3, 28, 28) * 2 - 1
    images[:, 2] = -1.0
    tokens, token_mask = torch.arange(12)[None] * 7, torch.arange(12)[None] < 9
    noise = torch.randn(1, CONFIG.horizon, CONFIG.action_dim)
    chunks = []
    with torch.no_grad():
        for cameras, mask in ((3, [True, True, False]), (2, [True, True])):
            cache = model.prefill(images[:, :cameras], torch.tensor([mask]), tokens, token_mask)
            chunks.append(model.sample_actions(cache, noise, 10))
    torch.testing.assert_close(chunks[1], chunks[0], atol=1e-5, rtol=0)
