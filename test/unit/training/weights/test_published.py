"""What is published beside pi0's and pi0.5's weights, in LeRobot's and openpi's files, must agree with the import."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from support import ROOT
from support.golden import CONFIG

from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.robot.robot import Robot, read_robot
from training.weights.published import check_published, sizes_beside

EXAMPLE = yaml.safe_load((ROOT / "config" / "robots" / "imported_arm.yaml").read_text())
ROBOT = Robot.model_validate(EXAMPLE)
PI05 = dataclasses.replace(CONFIG, horizon=50, action_dim=32)
NAMES = [f"joint{n}.pos" for n in range(1, 7)] + ["gripper.pos"]
STATE_FILE = "policy_preprocessor_step_3_normalizer_processor.safetensors"
MODES = {"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "QUANTILES"}
FEATURES = {
    "observation.images.base": {"type": "VISUAL", "shape": [3, 480, 640]},
    "observation.images.left_wrist": {"type": "VISUAL", "shape": [3, 480, 640]},
    "observation.images.right_wrist": {"type": "VISUAL", "shape": [3, 480, 640]},
    "observation.images.empty_camera_0": {"type": "VISUAL", "shape": [3, 224, 224]},
    "observation.state": {"type": "STATE", "shape": [7]},
}
ACTIONS = {"action": {"type": "ACTION", "shape": [7]}}
RELATIVE = {"enabled": True, "exclude_joints": ["gripper"], "action_names": NAMES}


def lerobot() -> dict[str, Any]:
    """config.json as LeRobot writes it for pi0.5, without what only training reads."""
    return {
        "type": "pi05",
        "n_obs_steps": 1,
        "input_features": json.loads(json.dumps(FEATURES)),
        "output_features": json.loads(json.dumps(ACTIONS)),
        "device": "cuda",
        "paligemma_variant": "dummy",
        "dtype": "float32",
        "chunk_size": 50,
        "n_action_steps": 50,
        "max_state_dim": 32,
        "max_action_dim": 32,
        "num_inference_steps": 10,
        "min_period": 0.004,
        "max_period": 4.0,
        "use_relative_actions": True,
        "relative_exclude_joints": ["gripper"],
        "action_feature_names": list(NAMES),
        "rtc_config": None,
        "image_resolution": [PI05.vision.image_size] * 2,
        "empty_cameras": 1,
        "tokenizer_max_length": 200,
        "normalization_mapping": dict(MODES),
    }


def preprocessor() -> dict[str, Any]:
    """policy_preprocessor.json of the same policy."""
    prompt = "pi05_prepare_state_tokenizer_processor_step"
    normalizer = {"eps": 1e-8, "features": FEATURES | ACTIONS, "norm_map": dict(MODES)}
    steps = [
        {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
        {"registry_name": "to_batch_processor", "config": {}},
        {"registry_name": "relative_actions_processor", "config": dict(RELATIVE)},
        {"registry_name": "normalizer_processor", "config": normalizer, "state_file": STATE_FILE},
        {"registry_name": prompt, "config": {}},
        {"registry_name": "tokenizer_processor", "config": {"max_length": 200, "task_key": "task"}},
        {"registry_name": "device_processor", "config": {"device": "cuda", "float_dtype": None}},
    ]
    return {"name": "policy_preprocessor", "steps": steps}


def statistics(shift: float = 0.0, state: int = 7) -> dict[str, Any]:
    values = {"mean": 0.1 + shift, "std": 0.5, "q01": -1.0 + shift, "q99": 1.25 + shift}
    widths = {"observation.state": state, "action": 7}
    return {name: {key: [value] * width for key, value in values.items()} for name, width in widths.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "stats.json").write_text(json.dumps(statistics()))
    write(tmp_path, lerobot(), preprocessor())
    return tmp_path


def write(folder: Path, config: Any, steps: Any, shift: float = 0.0, state: int = 7) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "policy_preprocessor.json").write_text(json.dumps(steps))
    flat = {
        f"{name}.{key}": torch.tensor(v)
        for name, fields in statistics(shift, state).items()
        for key, v in fields.items()
    }
    save_file(flat, folder / STATE_FILE)


def check(folder: Path, robot: Robot = ROBOT, **changes: Any) -> None:
    given = {"source": folder, "kind": "pi05", "method": "quantiles", "config": PI05} | changes
    check_published(robot=robot, stats=folder / "stats.json", **given)


def test_files_that_agree_pass(folder: Path) -> None:
    check(folder)
    check(folder, source=folder / "model.safetensors")  # a file: what is beside it
    base = lerobot()
    for features in ("input_features", "output_features"):  # a base model is for no robot
        for feature in base[features].values():
            if feature["type"] != "VISUAL":
                feature["shape"] = [32]
    base["normalization_mapping"] = {}
    write(folder, base, preprocessor())
    check(folder)


def at(path: str, value: Any) -> Callable[[Any], None]:
    """Sets what stands at a path of keys and indices."""

    def change(content: Any) -> None:
        *way, last = [int(key) if key.isdigit() else key for key in path.split("/")]
        for key in way:
            content = content[key]
        content[last] = value

    return change


SWAPPED = {key: FEATURES[key] for key in sorted(FEATURES, key=lambda key: "wrist" not in key)}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (at("type", "smolvla"), "type: expected pi05, as imported, got smolvla"),
        (at("type", "pi0"), "type: expected pi05, as imported, got pi0"),
        (at("chunk_size", 30), "chunk_size: expected 50, as imported, got 30"),
        (at("paligemma_variant", "gemma_2b"), "paligemma_variant: expected dummy, as imported, got gemma_2b"),
        (at("paligemma_variant", 3), "paligemma_variant: expected dummy, as imported, got 3"),
        (at("action_expert_variant", "gemma_9b"), r"action_expert_variant: expected GemmaConfig\(width=32, .*gemma_9b"),
        (at("n_obs_steps", 2), "n_obs_steps: expected 1"),
        (at("min_period", 0.01), "min_period: expected 0.004"),
        (at("use_visual_memory", True), "use_visual_memory: expected False"),
        (at("use_proprioceptive_memory", True), "use_proprioceptive_memory: expected False"),
        (at("image_resolution", [256, 256]), "image_resolution: expected"),
        (at("normalization_mapping/STATE", "MEAN_STD"), "normalization_mapping.STATE: expected QUANTILES"),
        (at("normalization_mapping/ACTION", "MIN_MAX"), "normalization_mapping.ACTION: expected QUANTILES"),
        (at("normalization_mapping/VISUAL", "MEAN_STD"), "normalization_mapping.VISUAL: expected IDENTITY"),
        (at("normalization_mapping", {"ACTION": "QUANTILES"}), "normalization_mapping.STATE: .* got IDENTITY"),
        (at("normalization_mapping", None), "expected a file as LeRobot writes it: normalization_mapping"),
        (at("resize_imgs_with_padding", [448, 448]), "resize_imgs_with_padding: expected"),
        (at("use_delta_joint_actions_aloha", True), "use_delta_joint_actions_aloha: expected False"),
        (at("adapt_to_pi_aloha", True), "adapt_to_pi_aloha: expected False"),
        (at("use_relative_actions", False), "relative joints: expected joint1, .*joint6, as imported, got none"),
        (at("relative_exclude_joints", []), "relative joints: expected .*joint6, as imported, got .*joint6, gripper"),
        (at("action_feature_names", None), "relative joints: expected .*joint6, as imported, got .*joint6, gripper"),
        (at("action_feature_names", NAMES[:6]), "relative actions: action names: expected"),
        (at("action_feature_names", [NAMES[1], NAMES[0], *NAMES[2:]]), "order of the actions: expected"),
        (at("input_features/observation.state/shape", [8]), r"features.observation.state.shape: expected \[7\]"),
        (at("output_features/action/shape", [14]), r"features.action.shape: expected \[7\], as imported, got \[14\]"),
        (
            at("input_features", SWAPPED),
            "order of the cameras: expected .'observation.images.base', 'observation.images.left_wrist'",
        ),
        (
            at("input_features", {k: v for k, v in FEATURES.items() if "right" not in k}),
            r"features: cameras .* expected",
        ),
        (at("chunk_size", "many"), "config.json: expected a file as LeRobot writes it: chunk_size"),
    ],
)
def test_a_config_that_says_something_else_is_refused(folder: Path, change: Callable[[Any], None], fault: str) -> None:
    config = lerobot()
    change(config)
    write(folder, config, preprocessor())
    with pytest.raises(ConfigurationError, match=fault) as error:
        check(folder)
    assert "config.json" in str(error.value)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (at("steps/2/config/enabled", False), r"steps.2 \(relative_actions_processor\): relative joints: expected"),
        (at("steps/3/config/norm_map/ACTION", "IDENTITY"), "steps.3 .*norm_map.ACTION: expected QUANTILES"),
        (at("steps/4/config/include_state_in_prompt", False), "include_state_in_prompt: expected True"),
        (at("steps/5/registry_name", "my_step"), r"steps.5 \(my_step\): expected one of .*device_processor"),
        (at("steps", 3), "policy_preprocessor.json: expected a file as LeRobot writes it: steps"),
    ],
)
def test_a_preprocessor_that_does_something_else_is_refused(
    folder: Path, change: Callable[[Any], None], fault: str
) -> None:
    steps = preprocessor()
    change(steps)
    write(folder, lerobot(), steps)
    with pytest.raises(ConfigurationError, match=fault) as error:
        check(folder)
    assert "policy_preprocessor.json" in str(error.value)


def postprocessor(state_file: str = STATE_FILE) -> dict[str, Any]:
    unnormalizer = {"eps": 1e-8, "features": ACTIONS, "norm_map": dict(MODES)}
    return {
        "name": "policy_postprocessor",
        "steps": [
            {"registry_name": "unnormalizer_processor", "config": unnormalizer, "state_file": state_file},
            {"registry_name": "absolute_actions_processor", "config": {"enabled": True}},
            {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}},
        ],
    }


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (at("steps/0/config/norm_map/ACTION", "MEAN_STD"), r"steps\.0 .*norm_map\.ACTION: expected QUANTILES"),
        (at("steps/0/config/eps", 1e-3), r"steps\.0 .*eps: expected 1e-08, as imported, got 0\.001"),
        (at("steps/0/state_file", "other.safetensors"), r"other\.safetensors: expected the statistics of --stats"),
        (at("steps/0/state_file", "../" + "a" * 300), r"state_file: expected the name of a file beside it"),
        (at("steps/1/config/enabled", False), r"steps\.1 .*enabled: expected True, as imported, got False"),
        (at("steps/2/registry_name", "my_step"), r"steps\.2 \(my_step\): expected one of absolute_actions_processor"),
    ],
)
def test_a_postprocessor_that_does_not_undo_the_preprocessor_is_refused(
    folder: Path, change: Callable[[Any], None], fault: str
) -> None:
    steps = postprocessor()
    path = folder / "policy_postprocessor.json"
    path.write_text(json.dumps(steps))
    check(folder)
    flat = {f"{name}.{k}": torch.tensor(v) for name, fields in statistics(0.01).items() for k, v in fields.items()}
    save_file(flat, folder / "other.safetensors")
    change(steps)
    path.write_text(json.dumps(steps))
    with pytest.raises(ConfigurationError, match=fault) as error:
        check(folder)
    assert "policy_postprocessor.json" in str(error.value)


def test_other_statistics_than_the_weights_own_are_refused(folder: Path) -> None:
    write(folder, lerobot(), preprocessor(), shift=0.01)
    with pytest.raises(
        ConfigurationError, match=rf"state_file {STATE_FILE}: expected the statistics of --stats .*stats"
    ):
        check(folder)


LIBERO = read_robot(ROOT / "config" / "robots" / "libero.yaml")


def libero(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and policy_preprocessor.json of a fine-tune like lerobot/pi05_libero_finetuned."""
    images = {f"observation.images.{name}": {"type": "VISUAL", "shape": [3, 256, 256]} for name in ("image", "image2")}
    images["observation.images.empty_camera_0"] = {"type": "VISUAL", "shape": [3, 224, 224]}
    config = lerobot() | {
        "input_features": images | {"observation.state": {"type": "STATE", "shape": [8]}},
        "output_features": ACTIONS,
        "use_relative_actions": False,
        "action_feature_names": None,
        "chunk_size": 10,
    }
    steps = preprocessor()
    steps["steps"][2]["config"] = {"enabled": False, "exclude_joints": ["gripper"], "action_names": None}
    (folder / "stats.json").write_text(json.dumps(statistics(state=8)))
    return config, steps


def check_libero(folder: Path, **changes: Any) -> None:
    check(folder, LIBERO, **({"config": dataclasses.replace(PI05, horizon=10)} | changes))


def test_lerobots_libero(tmp_path: Path) -> None:
    config, steps = libero(tmp_path)
    write(tmp_path, config, steps, state=8)
    check_libero(tmp_path)
    with pytest.raises(
        ConfigurationError, match=r"steps\.4 .*expected no state in the prompt .*got a step that puts it"
    ):
        check_libero(tmp_path, in_prompt=False)
    config["input_features"]["observation.state"]["shape"] = [7]
    write(tmp_path, config, steps, state=8)
    with pytest.raises(ConfigurationError, match=r"observation\.state\.shape: expected \[8\], as imported, got \[7\]"):
        check_libero(tmp_path)


def test_cameras_by_the_datasets_names(tmp_path: Path) -> None:
    """The preprocessor may rename a dataset's keys to the policy's: their order is the policy's."""
    config, steps = libero(tmp_path)
    content = LIBERO.model_dump(mode="json", exclude_none=True)
    for camera, key in zip(content["cameras"], ("observation.images.wrist", "observation.images.scene"), strict=True):
        camera["dataset"] = key
    robot = Robot.model_validate(content)
    renamed = {
        "observation.images.scene": "observation.images.image",
        "observation.images.wrist": "observation.images.image2",
    }
    steps["steps"][0]["config"] = {"rename_map": renamed}
    write(tmp_path, config, steps, state=8)
    with pytest.raises(ConfigurationError, match="order of the cameras"):
        check(tmp_path, robot, config=dataclasses.replace(PI05, horizon=10))
    steps["steps"][0]["config"] = {"rename_map": dict(zip(renamed, reversed(renamed.values()), strict=True))}
    write(tmp_path, config, steps, state=8)
    check(tmp_path, robot, config=dataclasses.replace(PI05, horizon=10))


def test_actions_by_the_datasets_names(folder: Path) -> None:
    content = ROBOT.model_dump(mode="json", exclude_none=True)
    for n, action in enumerate(content["actions"]):
        action["dataset"]["name"] = f"motor{n}.pos"
    robot, config = Robot.model_validate(content), lerobot()
    config["action_feature_names"] = [f"motor{n}.pos" for n in (0, 1, 2, 3, 5, 4)] + ["gripper.pos"]
    steps = preprocessor()
    steps["steps"][2]["config"]["action_names"] = config["action_feature_names"]
    write(folder, config, steps)
    check(folder, robot)  # other names: nothing is known
    config["action_feature_names"][-1] = "motor6.pos"
    config["relative_exclude_joints"] = steps["steps"][2]["config"]["exclude_joints"] = ["motor6"]
    write(folder, config, steps)
    with pytest.raises(ConfigurationError, match=r"order of the actions: expected .*motor4', 'motor5"):
        check(folder, robot)


def test_dimensions_in_the_datasets_order(tmp_path: Path) -> None:
    """LeRobot's models have the order of their dataset's columns."""
    config, steps = libero(tmp_path)
    write(tmp_path, config, steps, state=8)
    content = LIBERO.model_dump(mode="json", exclude_none=True)
    for first, second in ((6, 7), (7, 6)):
        content["state"][first]["dataset"]["index"] = second
    with pytest.raises(ConfigurationError, match=r"order of observation\.state .*got \[0, 1, 2, 3, 4, 5, 7, 6\]"):
        check(tmp_path, Robot.model_validate(content), config=dataclasses.replace(PI05, horizon=10))


def test_sizes_go_by_name(tmp_path: Path) -> None:
    """openpi's conversion and LeRobot write the same names."""
    path = tmp_path / "config.json"
    assert sizes_beside(tmp_path) == {}
    for content, expected in (
        ({"type": "paligemma", "text_config": {}}, {}),
        ({"action_dim": 32, "paligemma_variant": "gemma_300m", "action_expert_variant": "gemma_300m"}, (1024, 1024)),
        ({"type": "pi05", "paligemma_variant": "gemma_2b", "action_expert_variant": "dummy"}, (2048, 64)),
        ({"paligemma_variant": "gemma_900b"}, {}),  # check_published names it
    ):
        path.write_text(json.dumps(content))
        sizes = sizes_beside(tmp_path / "model.safetensors")
        assert tuple(part.width for part in sizes.values()) == tuple(expected)
        if sizes:
            assert list(sizes) == ["backbone", "expert"]
    path.write_text(json.dumps({"paligemma_variant": "gemma_2b_lora", "action_expert_variant": "gemma_300m_lora"}))
    with pytest.raises(ConfigurationError, match=r"config\.json: expected whole weights, got those of gemma_2b_lora"):
        sizes_beside(tmp_path)


def test_every_mode_of_lerobots_has_its_name(folder: Path) -> None:
    for method, mode in (("min_max", "MIN_MAX"), ("quantile10", "QUANTILE10"), ("mean_std", "MEAN_STD")):
        config, steps = lerobot(), preprocessor()
        config["normalization_mapping"] = steps["steps"][3]["config"]["norm_map"] = MODES | {
            "STATE": mode,
            "ACTION": mode,
        }
        values = {"min": -2.0, "max": 2.0, "q10": -0.5, "q90": 0.5}
        stats = {name: fields | {key: [v] * 7 for key, v in values.items()} for name, fields in statistics().items()}
        (folder / "stats.json").write_text(json.dumps(stats))
        write(folder, config, steps)
        (folder / STATE_FILE).unlink()
        check(folder, method=method)
        with pytest.raises(ConfigurationError, match=f"STATE: expected QUANTILES, as imported, got {mode}"):
            check(folder)


def test_all_faults_are_named_at_once(folder: Path) -> None:
    config = lerobot() | {"chunk_size": 10}
    write(folder, config, preprocessor())
    with pytest.raises(ConfigurationError) as error:
        check(folder, method="mean_std")
    assert str(error.value).count("expected") == 5  # the horizon, and twice STATE and ACTION


def test_openpis_files(tmp_path: Path) -> None:
    (tmp_path / "stats.json").write_text(json.dumps(statistics()))
    (tmp_path / "config.json").write_text(json.dumps({"action_dim": 32, "action_horizon": 50, "precision": "bfloat16"}))
    own = {"state": statistics()["observation.state"], "actions": statistics()["action"]}
    place = tmp_path / "assets" / "physical-intelligence" / "my_arm" / "norm_stats.json"
    place.parent.mkdir(parents=True)
    place.write_text(json.dumps({"norm_stats": own}))
    check(tmp_path)
    with pytest.raises(ConfigurationError, match="action_horizon: expected 20, as imported, got 50"):
        check(tmp_path, config=dataclasses.replace(PI05, horizon=20))
    (tmp_path / "stats.json").write_text(json.dumps(statistics(0.1)))
    with pytest.raises(ConfigurationError, match=r"assets: .*physical-intelligence/my_arm: expected the statistics"):
        check(tmp_path)
