"""From downloaded files to a bundle: the robot's chunk is the model's, with prompt and padding as in openpi."""

from __future__ import annotations

import dataclasses
import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from support.bundles import demo_policy
from support.downloads import JOINTS, SENTENCEPIECE, WIDTH, run_import, small, write_downloads

from ki_vla_ros.bundle.folder import BundleError, load_bundle
from ki_vla_ros.bundle.manifest import PolicySpec
from ki_vla_ros.engines.onnx_engine import OnnxEngine
from ki_vla_ros.policy.policy import Policy
from ki_vla_ros.policy.preprocess import make_model_input, render_prompt
from ki_vla_ros.records import CameraFrame, Observation
from training import import_weights
from training.export import tiny as tiny_bundle
from training.export.bundle import export_bundle
from training.model.sizes import paligemma_3b
from training.policy import PROMPTS
from training.tokens.paligemma import read_tokenizer
from training.tokens.prompt import prompt_tokenizer
from training.weights.checkpoints import load_checkpoint, read_config


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return write_downloads(tmp_path)


def observe() -> Observation:
    rng = np.random.default_rng(0)
    frames = {
        name: CameraFrame(name, 0, rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)) for name in ("base", "left_wrist")
    }
    return Observation(0, frames, np.array([0.1, -0.4, 0.3, -1.5, 0.2, 1.0, 0.04]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_from_download_to_robot(files: dict[str, Path], tmp_path: Path, kind: str) -> None:
    assert run_import(files, kind) == 0
    export_bundle(files["--out"], tmp_path / "bundle")
    bundle = load_bundle(tmp_path / "bundle")
    observation = observe()
    given = make_model_input(bundle.manifest, bundle.tokenizer, observation, "Pick up the red_cube")
    normal = 2 * (observation.state_S + 1) / (2.25 + 1e-6) - 1
    bins = " ".join(str(int(i)) for i in np.digitize(normal, np.linspace(-1, 1, 257)[:-1]) - 1)
    expected = {"pi0": "Pick up the red cube\n", "pi05": f"Task: Pick up the red cube, State: {bins};\nAction: "}[kind]
    assert bundle.tokenizer.decode(given.tokens_L[given.token_mask_L].tolist()) == "<bos>" + expected
    assert len(given.tokens_L) == {"pi0": 48, "pi05": 200}[kind]
    assert given.image_mask_V.tolist() == [True, True, False]
    if kind == "pi0":
        assert given.state_S is not None
        assert given.state_S == pytest.approx((observation.state_S - 0.1) / (0.5 + 1e-6), rel=1e-6)
    model = load_checkpoint(files["--out"]).eval()
    policy = Policy(bundle, OnnxEngine(bundle))
    arrays = (given.images_VCHW, given.image_mask_V, given.tokens_L, given.token_mask_L)
    with torch.no_grad():
        cache = model.prefill(*(torch.from_numpy(array)[None] for array in arrays))
        state = (
            None if given.state_S is None else F.pad(torch.from_numpy(given.state_S), (0, WIDTH[kind] - JOINTS))[None]
        )
        whole = model.sample_actions(cache, torch.from_numpy(policy.noise(0))[None], 10, state)[0].double().numpy()
    chunk = whole[:, :JOINTS]
    action = chunk * 0.5 + 0.1 if kind == "pi0" else (chunk + 1) / 2 * 2.25 - 1
    relative = np.array([joint.relative for joint in bundle.manifest.axes])
    got = policy.infer(observation, "Pick up the red_cube", 0)
    assert got.position_HJ == pytest.approx(action + relative * observation.state_S, abs=1e-3)


def test_weights_keep_their_type_on_disk(files: dict[str, Path]) -> None:
    assert run_import(files, "pi05") == 0
    assert {p.dtype for p in load_checkpoint(files["--out"], dtype=None).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load_checkpoint(files["--out"]).parameters()} == {torch.float32}
    assert read_config(files["--out"]) == small("pi05")


def test_a_lora_is_merged_on_the_way(files: dict[str, Path], tmp_path: Path) -> None:
    """What is published beside the adapter counts, as the adapter is what was trained for the robot."""
    module = "paligemma_with_expert.gemma_expert.model.layers.0.self_attn.q_proj"
    a, b = torch.randn(2, 32), torch.randn(128, 2)
    lora = tmp_path / "lora"
    lora.mkdir()
    save_file(
        {f"base_model.model.model.{module}.lora_{name}.weight": part for name, part in (("A", a), ("B", b))},
        lora / "adapter_model.safetensors",
    )
    (lora / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    config = {"type": "pi05", "chunk_size": 50, "use_peft": True}
    (tmp_path / "pi05" / "config.json").write_text(json.dumps(config))  # the base's, of another robot
    (lora / "config.json").write_text(json.dumps(config | {"chunk_size": 10, "use_relative_actions": True}))
    assert run_import(files, "pi05", "--lora", str(lora)) == 2
    relative = {"relative_exclude_joints": ["gripper"], "action_feature_names": [*"abcdef", "gripper"]}
    (lora / "config.json").write_text(json.dumps(config | {"chunk_size": 10, "use_relative_actions": True} | relative))
    assert run_import(files, "pi05", "--lora", str(lora)) == 0
    got = load_checkpoint(files["--out"]).state_dict()["expert.layers.0.attention.q.weight"]
    before = load_file(tmp_path / "pi05" / "model.safetensors")[f"{module}.weight"].float()
    assert torch.equal(got, (before + 2 * (b @ a)).bfloat16().float())


def test_the_sizes_are_the_published_ones(tmp_path: Path) -> None:
    """Without --config: those that config.json beside the weights names, else those of 3 B."""
    chosen = Namespace(source=tmp_path, config=None, kind="pi05", action_ids=3)
    assert import_weights.choose_config(chosen) == paligemma_3b("pi05", 3)
    (tmp_path / "config.json").write_text(json.dumps({"paligemma_variant": "gemma_300m"}))
    config = import_weights.choose_config(chosen)
    assert (config.backbone.width, config.expert.width, config.vocab_size) == (1024, 1024, 257_152 + 3)
    (tmp_path / "mine.json").write_text(json.dumps(dataclasses.asdict(small("pi05"))))
    chosen.config = tmp_path / "mine.json"
    assert import_weights.choose_config(chosen) == small("pi05", action_ids=3)


def test_droid_and_libero_as_openpi_publishes_them(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """The conversion's folder: config.json and the statistics under the name of the robot; pi05_libero has no state."""
    folder = files["--out"].parent / "pi05"
    for robot, asset, horizon in (("droid", "droid", 15), ("libero", "physical-intelligence/libero", 10)):
        (folder / "config.json").write_text(json.dumps({"action_dim": WIDTH["pi05"], "action_horizon": horizon}))
        stats = folder / "assets" / asset / "norm_stats.json"
        stats.parent.mkdir(parents=True)
        values = {"mean": 0.0, "std": 0.5, "q01": -0.9, "q99": 0.9}
        widths = {"state": 8, "actions": 8 if robot == "droid" else 7}
        content = {what: {key: [value] * count for key, value in values.items()} for what, count in widths.items()}
        stats.write_text(json.dumps({"norm_stats": content}))
        chosen = files | {"--robot": Path(robot), "--stats": stats, "--out": files["--out"].parent / f"out_{robot}"}
        if robot == "libero":
            assert run_import(chosen, "pi05") == 2
            assert "physical-intelligence/libero: expected --state none" in capsys.readouterr().err
            (folder / "assets").rename(folder.parent / "assets")  # in openpi's own folder, not beside the weights
            chosen["--stats"] = folder.parent / "assets" / asset / "norm_stats.json"
            assert run_import(chosen, "pi05") == 2
            assert "physical-intelligence/libero: expected --state none" in capsys.readouterr().err
        assert run_import(chosen, "pi05", *(("--state", "none") if robot == "libero" else ())) == 0
        policy = PolicySpec.model_validate_json((chosen["--out"] / "policy.json").read_text())
        assert policy.state.encoding == ("none" if robot == "libero" else "text")
        assert (len(policy.state.low), len(policy.action.low)) == tuple(widths.values())
        shutil.rmtree(folder / "assets", ignore_errors=True)
    assert policy.action.high[:6] == pytest.approx([0.045] * 3 + [0.45] * 3, abs=1e-5)
    assert run_import(files, "pi0", "--state", "none") == 2
    assert "--state: expected it with --as pi05 only" in capsys.readouterr().err


def test_room_for_the_longest_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each digit is a token, so a bundle must have room for the state that takes the most of them."""
    (tmp_path / "paligemma.model").write_bytes(SENTENCEPIECE.SerializeToString())
    robot = prompt_tokenizer(read_tokenizer(tmp_path / "paligemma.model", vocabulary=len(SENTENCEPIECE.pieces)))
    monkeypatch.setattr(tiny_bundle, "prompt_tokenizer", lambda _: robot)
    template = PROMPTS["pi05"].template
    prompts = [render_prompt(template, "a", [i] * JOINTS, "openpi") for i in range(-1, 256)]
    longest = max(len(robot.encode(prompt).ids) for prompt in prompts)

    def policy(length: int) -> PolicySpec:
        return demo_policy(prompt={"template": template, "length": length, "style": "openpi"})

    tiny_bundle.write_tiny_bundle(tmp_path / "enough", policy(longest + 1))
    with pytest.raises(BundleError, match="room for an instruction"):
        tiny_bundle.write_tiny_bundle(tmp_path / "short", policy(longest - 1))


def test_paligemma_is_only_for_training(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_import(files, "paligemma") == 2
    assert "untrained" in capsys.readouterr().err
    del files["--stats"], files["--robot"]
    assert run_import(files, "paligemma", "--action-ids", "16") == 0
    assert sorted(file.name for file in files["--out"].iterdir()) == [
        "config.json",
        "tokenizer.json",
        "weights.safetensors",
    ]
    model = load_checkpoint(files["--out"])
    assert model.backbone.embedding.weight.shape[0] == len(SENTENCEPIECE.pieces) + 16


def edit(path: Path, **changes: Any) -> None:
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))


def test_faults_are_named(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(message: str, kind: str = "pi05", *more: str) -> None:
        assert run_import(files, kind, *more) == 2
        assert message in capsys.readouterr().err
        assert not files["--out"].exists()

    original = files["--robot"].read_text()
    actions = yaml.safe_load(original)["actions"]
    edit(files["--robot"], actions=[action | {"name": f"{arm}_{action['name']}"} for arm in "ab" for action in actions])
    refused("robot: expected at most 12 dimensions, got 14")
    edit(files["--robot"], speed=3)
    refused("got 3 for speed: no such key")
    files["--robot"].write_text("a: [")
    refused("expected YAML, got something else")
    files["--robot"].write_text(original)
    edit(files["--robot"], cameras=[{"name": "base"}, {"name": "base"}])
    refused("cameras: 'base': expected distinct names")
    files["--robot"].write_text(original)
    refused("expected the weights of pi0, got those of pi05", "pi0", "--from", str(tmp_path / "pi05"))
    (tmp_path / "pi05" / "config.json").write_text(json.dumps({"type": "pi05", "chunk_size": 50}))
    refused("config.json: chunk_size: expected 10, as imported, got 50")
    (tmp_path / "pi05" / "config.json").unlink()
    refused("expected the tokens 0..", "pi05", "--tokenizer", str(short_tokenizer(tmp_path)))
    (tmp_path / "norm_stats.json").write_text(json.dumps({"norm_stats": {"state": {"mean": [0.0] * 7}}}))
    refused("norm_stats.json: state: expected q01, got only ['mean']")
    del files["--stats"]
    refused("--stats and --robot: expected both with --as pi05, got ['robot']")


@pytest.mark.parametrize("kind", ["pi0", "paligemma"])
def test_missing_weights_are_reported_first(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    files["--stats"].unlink()
    assert run_import(files, kind, "--from", str(tmp_path / "nope")) == 2
    assert f"{tmp_path}/nope: expected the weights" in capsys.readouterr().err


def short_tokenizer(folder: Path) -> Path:
    model = ModelProto.FromString(SENTENCEPIECE.SerializeToString())
    del model.pieces[-1]
    path = folder / "short.model"
    path.write_bytes(model.SerializeToString())
    return path


def test_an_earlier_checkpoint_is_not_overwritten(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_import(files, "pi05") == 0
    assert run_import(files, "pi05") == 2
    assert "expected an empty place" in capsys.readouterr().err


def test_the_normalization_can_be_chosen(files: dict[str, Path]) -> None:
    assert run_import(files, "pi05", "--normalization", "mean_std") == 0
    policy = json.loads((files["--out"] / "policy.json").read_text())
    assert policy["state"]["low"][0] == pytest.approx(0.1 - 0.5 - 1e-6, abs=1e-9)
