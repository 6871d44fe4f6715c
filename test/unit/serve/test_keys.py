"""What a client calls the parts of an observation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ki_vla_ros.errors import ConfigurationError, InputError
from ki_vla_ros.robot import Robot, find_robot, read_robot
from ki_vla_ros.serve.keys import LARGEST_SIDE, Keys, find_keys, named_keys, read_keys


def robot_of(name: str) -> Robot:
    return read_robot(find_robot(name))


def keys_of(name: str) -> tuple[Robot, Keys]:
    robot = robot_of(name)
    return robot, read_keys(find_keys(name), robot)


def picture(height: int = 6, width: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def droid(**changes: Any) -> dict[str, Any]:
    """What openpi's client of DROID sends."""
    message = {
        "observation/exterior_image_1_left": picture(seed=1),
        "observation/wrist_image_left": picture(seed=2),
        "observation/joint_position": np.linspace(-0.6, 0.6, 7),
        "observation/gripper_position": np.array([1.0]),
        "prompt": "pick up the fork",
    }
    return {key: value for key, value in (message | changes).items() if value is not None}


def test_openpis_client_of_droid() -> None:
    robot, keys = keys_of("droid")
    observation, instruction = keys.observation(droid(), robot)
    assert instruction == "pick up the fork"
    assert np.array_equal(observation.frames["exterior"].rgb_HWC, picture(seed=1))
    assert np.array_equal(observation.frames["wrist"].rgb_HWC, picture(seed=2))
    # DROID's 1 is closed; the robot's gripper is a knuckle in rad.
    np.testing.assert_allclose(observation.state_S, [*np.linspace(-0.6, 0.6, 7), 0.7929], rtol=0, atol=1e-12)
    actions_HD = keys.actions(np.array([[3.0, 0, 0, 0, 0, 0, -1.5, 0.7929]]), robot)
    np.testing.assert_allclose(actions_HD, [[1.0, 0, 0, 0, 0, 0, -0.5, 1.0]], rtol=0, atol=1e-12)


def test_openpis_client_of_libero() -> None:
    robot, keys = keys_of("libero")
    state = np.array([0.1, 0.2, 0.3, 3.0, 0.1, -0.1, 0.03, -0.02])
    message = {"observation/image": picture(seed=1), "observation/wrist_image": picture(seed=2), "prompt": "open it"}
    observation, _ = keys.observation({**message, "observation/state": state}, robot)
    assert np.array_equal(observation.frames["image2"].rgb_HWC, picture(seed=2))
    np.testing.assert_allclose(observation.state_S, [0.1, 0.2, 0.3, 3.0, 0.1, -0.1, 0.03, 0.02])
    actions_HD = keys.actions(np.array([[0.05, 0, 0, 0.25, 0, 0, 0.0]]), robot)
    np.testing.assert_allclose(actions_HD, [[1.0, 0, 0, 0.5, 0, 0, 1.0]], rtol=0, atol=1e-12)


def test_sglangs_benchmark_of_libero() -> None:
    robot = robot_of("libero")
    keys = read_keys(find_keys("sglang"), robot)
    sent = {"task": "pick up the object", "observation.state": np.arange(8, dtype=np.float32) / 100}
    sent |= {"num_inference_steps": 10, "enable_pi_prefix_cache": True, "enable_pi_cuda_graph": True}
    sent |= {"output_format": "numpy", "observation.images.image": picture(), "observation.images.image2": picture()}
    observation, instruction = keys.observation(sent, robot)
    assert instruction == "pick up the object" and list(observation.frames) == ["image", "image2"]
    np.testing.assert_allclose(observation.state_S, [*np.arange(7) / 100, -0.07], rtol=1e-6)


def test_openpis_client_of_aloha() -> None:
    """Maps in maps, channels first, no instruction, one camera of three, and one more than the robot has."""
    robot, keys = keys_of("aloha")
    images = {"cam_high": np.ascontiguousarray(picture().transpose(2, 0, 1)), "cam_low": np.zeros((3, 2, 2), np.uint8)}
    state = np.array([0.1] * 6 + [1.0] + [0.2] * 6 + [0.0])
    observation, instruction = keys.observation({"state": state, "images": images}, robot, "hand it over")
    assert instruction == "hand it over" and list(observation.frames) == ["top"]
    assert np.array_equal(observation.frames["top"].rgb_HWC, picture())
    np.testing.assert_allclose(observation.state_S, [*[0.1] * 6, 0.058, *[0.2] * 6, 0.01844])


def test_the_robot_files_own_names_and_units() -> None:
    robot = robot_of("droid")
    keys = named_keys(robot)
    state = {dimension.name: 0.01 * s for s, dimension in enumerate(robot.state)}
    message = {"images": {"exterior": picture(), "wrist": picture()}, "state": state, "prompt": "go"}
    observation, _ = keys.observation(message, robot)
    assert observation.state_S.tolist() == list(state.values())
    action_HD = np.ones((1, 8))
    assert keys.actions(action_HD, robot) is action_HD
    assert list(keys.expected(robot)) == ["images/exterior", "images/wrist", *(f"state/{n}" for n in state), "prompt"]


IMAGE, STATE = "observation/wrist_image_left", "observation/joint_position"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({IMAGE: None}, f"'{IMAGE}': expected an image, got none; the message has "),
        ({STATE: None}, f"'{STATE}': expected 7 numbers, got none"),
        ({"prompt": None}, "'prompt': expected an instruction, got none"),
        ({"prompt": ""}, "'prompt': expected an instruction, got none"),
        ({"prompt": b"go"}, "'prompt': expected a text, got bytes b'go'"),
        ({"promt": "go"}, "; did you mean 'prompt'?"),
        ({IMAGE: picture().astype(np.float32)}, "uint8 [height, width, 3], got float32 [6, 8, 3]"),
        ({IMAGE: picture().transpose(2, 0, 1)}, "uint8 [height, width, 3], got uint8 [3, 6, 8]"),
        ({IMAGE: picture()[..., 0]}, "got uint8 [6, 8]"),
        ({IMAGE: picture()[:0]}, "got uint8 [0, 8, 3]"),
        ({IMAGE: "picture"}, "got str 'picture'"),
        ({IMAGE: np.zeros((1, LARGEST_SIDE + 1, 3), np.uint8)}, f"at most {LARGEST_SIDE} x {LARGEST_SIDE} pixels"),
        ({STATE: np.zeros(8)}, "expected 7 numbers, got float64 [8]"),
        ({STATE: np.zeros((7, 1))}, "expected 7 numbers, got float64 [7, 1]"),
        ({STATE: np.zeros(7, np.bool_)}, "expected 7 numbers, got bool [7]"),
        ({STATE: 1.0}, "expected 7 numbers, got float 1.0"),
        ({STATE: [0.0] * 6 + ["0"]}, "expected 7 numbers, got list"),
        ({STATE: [0.0] * 6 + [True]}, "expected 7 numbers, got list"),
        ({STATE: np.full(7, np.nan)}, "expected numbers within 1e+09, got [nan"),
        ({STATE: [0.0] * 6 + [np.inf]}, "expected numbers within 1e+09, got"),
        ({STATE: np.full(7, -1e300)}, "expected numbers within 1e+09, got [-1e+300"),
        ({"observation": {"joint_position": np.zeros(7)}}, "expected once, got it as a map in a map"),
        ({"a": {"b": {"c": {"d": {"e": 1}}}}}, "levels, got more"),
        ({1: 2}, "expected keys that are texts, got 1"),
        ({b"prompt": "go"}, "expected keys that are texts, got b'prompt'"),
    ],
)
def test_a_wrong_part_is_named(changes: dict[Any, Any], said: str) -> None:
    robot, keys = keys_of("droid")
    message = {key: value for key, value in {**droid(), **changes}.items() if value is not None}
    with pytest.raises(InputError, match=re.escape(said)):
        keys.observation(message, robot)


@pytest.mark.parametrize("message", [None, [], 1, "go", np.zeros(3)])
def test_what_is_no_map_is_refused(message: Any) -> None:
    robot, keys = keys_of("droid")
    with pytest.raises(InputError, match="observation: expected a map of keys and values, got"):
        keys.observation(message, robot)


def test_numbers_may_come_as_lists_and_other_types() -> None:
    robot, keys = keys_of("droid")
    plain, _ = keys.observation(droid(**{STATE: [0, 1, 0.5, 0, 0, 0, 0]}), robot)
    array, _ = keys.observation(droid(**{STATE: np.array([0, 1, 0.5, 0, 0, 0, 0], np.float32)}), robot)
    assert np.array_equal(plain.state_S, array.state_S)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cameras: {wrist: w}\nstate: {s: 8}", "expected a key for 'exterior', which is not optional, got none"),
        ("cameras: {wrist: w, exterior: e, rist: r}\nstate: {s: 8}", "got 'rist'; did you mean 'wrist'?"),
        ("cameras: {wrist: w, exterior: e}\nstate: {s: 7}", "expected 8 numbers, those of robot 'droid', got 7"),
        ("cameras: {wrist: w, exterior: w}\nstate: {s: 8}", "expected each key once, got w more than once"),
        ("cameras: {wrist: w, exterior: e}\nstate: {s: 8}\nunit: robot", "no such key"),
        ("cameras: {wrist: s/w, exterior: e}\nstate: {s: 8}", "expected s to be a value, got it as the map of s/w"),
        (
            "cameras: {wrist: w, exterior: running/e}\nstate: {s: 8}",
            "expected no key running/e: running is",
        ),
    ],
)
def test_a_file_of_keys_that_does_not_fit_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=re.escape(said)) as raised:
        read_keys(path, robot_of("droid"))
    assert str(path) in str(raised.value)


def test_an_unknown_name_of_keys_is_told_with_those_that_there_are() -> None:
    with pytest.raises(
        ConfigurationError, match="one of robot, aloha, droid, libero, sglang, got 'drod'; did you mean 'droid'"
    ):
        find_keys("drod")
