"""Robots that the trainer has never seen: their datasets train, alone and mixed, and end in bundles that drive them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from support.arms import arm_run, entry, make_arms
from support.downloads import run_import, write_downloads

from ki_vla_ros.bundle import load_bundle, load_tokenizer
from ki_vla_ros.engines.onnx_engine import OnnxEngine
from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.policy import Policy
from ki_vla_ros.replay.__main__ import main as replay_main
from training.config import TrainingConfig
from training.convert.__main__ import main as convert_main
from training.data.lerobot import SOURCE
from training.evaluate.rollouts import act_as
from training.export.__main__ import main as export_main
from training.export.bundle import check_policy
from training.run import Run
from training.sources import Sources
from training.weights import load_checkpoint, read_policy


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_arms(tmp_path_factory.mktemp("arms"))


def test_a_camera_that_no_data_has_is_not_the_policys(
    arms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    robot = yaml.safe_load((arms / "lifter.yaml").read_text())
    robot["cameras"].append({"name": "wrist", "optional": True})
    (tmp_path / "lifter.yaml").write_text(yaml.safe_dump(robot))
    own = {"robot": str(tmp_path / "lifter.yaml")}
    config = arm_run(arms, tmp_path / "run", entry(arms, "lifter") | own, **own)
    run = Run(config)
    assert run.describe().robot.camera_names == ("front",)
    assert run.data.robot.camera_names == ("front",)
    config.out.mkdir()
    run.try_out()
    assert "no data of lifter has images of wrist: its policy does without" in capsys.readouterr().out


@pytest.mark.parametrize("names", [("lifter",), ("lifter", "reacher")])
def test_a_dataset_of_another_robot_ends_in_its_bundle(arms: Path, tmp_path: Path, names: tuple[str, ...]) -> None:
    run = Run(arm_run(arms, tmp_path / "run", *(entry(arms, name) for name in names)))
    run.run()
    assert export_main(["--checkpoint", str(tmp_path / "run" / "policy"), "--out", str(tmp_path / "bundle")]) == 0
    manifest = load_bundle(tmp_path / "bundle").manifest
    assert manifest.robot == run.data.robot and manifest.robot.name == "lifter"
    assert manifest.axis_names == tuple(f"lifter_{j}" for j in range(3))
    assert manifest.pad_to == (None if len(names) == 1 else 5)
    assert {"flow_error", "flow_error.lifter_0", "fast_clamped"} <= manifest.provenance.figures.keys()
    # Its dataset as a bag, replayed with the bundle.
    own = ["--robot", str(arms / "lifter.yaml")]
    assert convert_main(["to-bag", str(arms / "lifter"), "--out", str(tmp_path / "bag"), *own]) == 0
    files = [str(tmp_path / name) for name in ("bag", "bundle", "replay")]
    assert replay_main([files[0], "--bundle", files[1], "--out", files[2]]) == 0
    # It has learned nothing, so what it wants may be refused; but it is asked, and answers.
    ticks = json.loads((tmp_path / "replay" / "metrics.json").read_text())["ticks"]
    assert ticks["count"] > 20 and ticks["chunks"] > ticks["count"] / 2
    # The statistics are those of its own data alone, whatever else it was trained with.
    alone = run if len(names) == 1 else Run(arm_run(arms, tmp_path / "other", entry(arms, "lifter")))
    assert run.data.embodiment.space == alone.data.embodiment.space
    # In closed loop during training, the model does what its bundle will do.
    bundle = load_bundle(tmp_path / "bundle")
    images, state_S = {"front": np.full((40, 50, 3), 90, np.uint8)}, np.array([0.1, 0.2, 0.3])
    ours = run.act()(images, state_S, "move the lifter", 7)
    theirs = act_as(Policy(bundle, OnnxEngine(bundle)))(images, state_S, "move the lifter", 7)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.fixture(scope="module")
def pi05(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pi0.5, imported from openpi's naming: 12 dimensions, images of 28 pixels."""
    files = write_downloads(tmp_path_factory.mktemp("downloads"))
    assert run_import(files, "pi05") == 0
    return files["--out"]


@pytest.mark.slow
@pytest.mark.parametrize("parts", [("vision", "backbone", "expert"), ("vision", "backbone")])
def test_pi05_goes_on_with_lora_on_another_robot(
    arms: Path, pi05: Path, tmp_path: Path, parts: tuple[str, ...]
) -> None:
    """Its prompt, sizes and padding; the adapter apart, and merged in a policy that can be exported."""
    entry = {"lerobot": str(arms / "reacher"), "robot": str(arms / "reacher.yaml")}
    stage = {"train": ["backbone", "expert", "backbone.embedding.weight"], "losses": {"fast": 1.0, "flow": 1.0}}
    config = arm_run(
        arms,
        tmp_path / "run",
        entry,
        robot=str(arms / "reacher.yaml"),
        start={"checkpoint": str(pi05), "parts": parts},
        lora={"parts": ["backbone"], "rank": 2},
        ema=0.5,
        stages=[{"name": "lora", "steps": 2, "learning_rate": 1e-3, "sources": {"robot": 2}, **stage}],
    )
    config = TrainingConfig.model_validate(
        {key: value for key, value in dict(config).items() if key not in ("model", "prompt")}
    )
    run = Run(config)
    assert (run.model.config.action_dim, run.model.config.vision.image_size) == (12, 28)
    run.run()
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    folder = tmp_path / "run" / "policy"
    policy = read_policy(folder / "policy.json")
    check_policy(policy, load_checkpoint(folder), load_tokenizer(folder / "tokenizer.json"))
    assert policy.pad_to == 12 and policy.prompt.style == "openpi" and policy.robot.name == "reacher"
    before, after = (load_checkpoint(folder).state_dict() for folder in (pi05, folder))
    assert torch.equal(before["backbone.norm.weight"], after["backbone.norm.weight"])
    assert not torch.equal(before["backbone.layers.0.mlp.up.weight"], after["backbone.layers.0.mlp.up.weight"])


def test_data_that_is_not_there_is_named_with_what_makes_it(arms: Path, tmp_path: Path) -> None:
    nobody = entry(arms, "lifter") | {"lerobot": str(arms / "nobody")}
    config = arm_run(arms, tmp_path / "run", nobody, made_by="make it")
    with pytest.raises(ConfigurationError, match=r"source robot: expected data in .*nobody, found none; .*: make it"):
        Sources(config)


def test_frames_that_do_not_follow_each_other_need_the_column_with_their_chunks(arms: Path, tmp_path: Path) -> None:
    folder = tmp_path / "apart"
    shutil.copytree(arms / "lifter", folder)
    (folder / SOURCE).write_text(json.dumps({"consecutive": False, "chunk": "action_chunk"}))
    config = arm_run(arms, tmp_path / "run", entry(arms, "lifter") | {"lerobot": str(folder)})
    with pytest.raises(ConfigurationError, match=r"do not follow each other .*; set chunk: action_chunk at the entry"):
        Sources(config)
