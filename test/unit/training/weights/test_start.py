"""Where training begins: what is taken from a checkpoint, what it fixes, what is new, and what does not fit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.checkpoints import write_checkpoint
from support.downloads import SENTENCEPIECE, WIDTH, run_import, small, write_downloads

from ki_vla_ros.bundle.folder import TOKENIZER
from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.robot.robot import read_robot
from training.config import LoraSettings, ModelConfig, PromptConfig, StartConfig, TrainingConfig
from training.lora import add_lora, merge, save_adapter
from training.model import GemmaConfig
from training.optimizer import select_parameters
from training.recipe import find_recipe, lay_recipe
from training.tokens.prompt import fast_ids, fast_token
from training.weights.checkpoints import load_checkpoint
from training.weights.start import Start, adopt, check_statistics, open_start

PIECES = len(SENTENCEPIECE.pieces)


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each kind, as training.import_weights makes it, and the robot's file."""
    folder = tmp_path_factory.mktemp("downloads")
    files = write_downloads(folder)
    found = {"robot": files["--robot"]}
    for kind in WIDTH:
        given = files | {"--out": folder / f"{kind}_checkpoint"}
        if kind == "paligemma":
            given = {key: value for key, value in given.items() if key not in ("--stats", "--robot")}
        assert run_import(given, kind) == 0
        found[kind] = given["--out"]
    return found


def begin(checkpoint: Path, **changes: Any) -> Start:
    fields = StartConfig.model_fields.keys()
    start = StartConfig(checkpoint=checkpoint, **{key: changes.pop(key) for key in fields & changes.keys()})
    return open_start(start, **({"state_width": 5, "action_width": 6, "horizon": 13, "action_ids": 0} | changes))


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_a_policy_goes_on_with_its_sizes_prompt_and_padding_for_another_robot(
    imported: dict[str, Path], kind: str
) -> None:
    start = begin(imported[kind])
    before = load_checkpoint(imported[kind])
    pi0 = kind == "pi0"
    assert (start.config.action_dim, start.config.state_dim) == (WIDTH[kind], WIDTH[kind] if pi0 else None)
    assert start.config.conditioning == ("concat" if pi0 else "adarms")
    assert start.config.horizon == 13 and start.pad_to == WIDTH[kind]
    assert start.encoding == ("token" if pi0 else "text") and start.prompt.style == "openpi"
    assert start.prompt.template == ("{task}\n" if pi0 else "Task: {task}, State: {state};\nAction: ")
    assert all(torch.equal(tensor, start.weights[name]) for name, tensor in before.state_dict().items())
    assert start.model().config == start.config


def test_action_ids_end_the_vocabulary_and_old_rows_stay_bit_for_bit(imported: dict[str, Path]) -> None:
    start, again = (begin(imported["pi05"], action_ids=32) for _ in range(2))
    table = "backbone.embedding.weight"
    old, new = load_checkpoint(imported["pi05"]).state_dict()[table], start.weights[table]
    assert new.shape == (PIECES + 32, old.shape[1]) and torch.equal(new[:PIECES], old)
    rows = new[PIECES:]
    assert torch.equal(rows, again.weights[table][PIECES:])
    assert len(rows.unique(dim=0)) == 32
    assert float((rows - old.mean(0)).abs().max()) < float(old.std())
    assert [start.tokenizer.id_to_token(PIECES + i) for i in (0, 31)] == [fast_token(0), fast_token(31)]
    text = "Task: fold the towel, State: 127 128;\nAction: "
    before = begin(imported["pi05"]).tokenizer
    assert start.tokenizer.encode(text).ids == before.encode(text).ids
    assert start.config.vocab_size == start.tokenizer.get_vocab_size() == PIECES + 32


def test_from_paligemma_the_expert_is_new_and_drawn_from_the_seed(imported: dict[str, Path]) -> None:
    start = begin(imported["paligemma"])
    assert start.policy is None and start.encoding == "text" and "State: {state}" in start.prompt.template
    assert start.prompt.style == "openpi" and start.pad_to == WIDTH["paligemma"]
    before = load_checkpoint(imported["pi05"]).state_dict()
    wide = GemmaConfig(**{**vars(small("pi05").expert), "width": 48})
    model = ModelConfig(vision=small("pi05").vision, backbone=small("pi05").backbone, expert=wide, state="both")
    starts = [begin(imported["pi05"], parts=("vision", "backbone"), model=model, seed=seed) for seed in (0, 0, 1)]
    for name, tensor in starts[0].weights.items():
        taken = name.startswith(("vision", "projector", "backbone"))
        assert torch.equal(tensor, starts[1].weights[name])
        assert not taken or torch.equal(tensor, before[name]), name
    moved = "expert.layers.0.mlp.up.weight"
    assert starts[0].weights[moved].shape == (64, 48)
    assert not torch.equal(starts[0].weights[moved], starts[2].weights[moved])
    assert (starts[0].config.state_dim, starts[0].config.action_dim) == (5, 6) and starts[0].encoding == "both"


def test_a_finished_run_is_a_start_too_and_its_own_action_ids_are_kept(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "policy", "token")
    start = begin(folder, state_width=7, action_width=7, action_ids=16)
    assert start.pad_to is None and start.encoding == "token" and start.prompt.style == "words"
    assert start.config.vocab_size == load_checkpoint(folder).config.vocab_size
    more = begin(folder, state_width=7, action_width=7, action_ids=20)
    assert fast_ids(more.tokenizer)[19] == fast_ids(start.tokenizer)[0] + 19 == more.config.vocab_size - 1


def test_statistics_are_kept_for_the_same_dimensions_only(imported: dict[str, Path], tmp_path: Path) -> None:
    robot = read_robot(imported["robot"])
    kept = check_statistics(StartConfig(checkpoint=imported["pi05"]), robot)
    assert kept.state.low == pytest.approx([-1.0] * 7)
    content = yaml.safe_load(imported["robot"].read_text())
    content["state"][2]["name"] = "elbow"
    content["actions"][2]["state"] = "elbow"
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigurationError, match=r"policy\.json: robot\.state: dimension 2: expected elbow .*, got "):
        check_statistics(StartConfig(checkpoint=imported["pi05"]), read_robot(tmp_path / "other.yaml"))
    with pytest.raises(ConfigurationError, match=r"start\.statistics: expected a checkpoint with statistics to keep"):
        check_statistics(StartConfig(checkpoint=imported["paligemma"]), robot)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"action_width": 13}, r"config\.json: action_dim: expected at least the robot's 13, got 12"),
        ({"image_size": 96}, r"config\.json: vision\.image_size: expected 96, as the data has it, got 28"),
        ({"parts": ("vision",)}, None),
        (
            {"model": "deeper"},
            r"config\.json: backbone\.mlp: expected 8, as model says, got 128; state_dim: expected a state token, "
            "got None; leave model out",
        ),
    ],
)
def test_what_does_not_fit_is_named(imported: dict[str, Path], changes: dict[str, Any], fault: str | None) -> None:
    sizes = small("pi05")
    backbone = GemmaConfig(**{**vars(sizes.backbone), "mlp": 8})
    if "model" in changes:
        changes = {"model": ModelConfig(vision=sizes.vision, backbone=backbone, expert=sizes.expert, state="both")}
    if fault is None:
        assert begin(imported["pi05"], **changes).config.backbone == sizes.backbone
        return
    with pytest.raises(ConfigurationError, match=fault):
        begin(imported["pi05"], **changes)


def test_an_experts_way_of_taking_the_time_is_its_weights_and_a_new_ones_is_free(imported: dict[str, Path]) -> None:
    sizes = small("pi0")
    parts = {"vision": sizes.vision, "backbone": sizes.backbone, "expert": sizes.expert, "state": "token"}
    assert begin(imported["pi0"], model=ModelConfig(**parts)).config.conditioning == "concat", "where none is named"
    with pytest.raises(ConfigurationError, match=r"conditioning: expected adarms, as model says, got concat"):
        begin(imported["pi0"], model=ModelConfig(**parts, conditioning="adarms"))
    for way in ("adarms", "concat"):
        model = ModelConfig(**parts, conditioning=way)
        assert begin(imported["pi0"], parts=("vision", "backbone"), model=model).config.conditioning == way


def test_what_a_configuration_leaves_out_of_its_prompt_is_the_checkpoints(imported: dict[str, Path]) -> None:
    def adopted(prompt: dict[str, Any] | None, **start: Any) -> PromptConfig:
        stage = {"name": "s", "steps": 1, "learning_rate": 1e-3, "losses": {"flow": 1.0}, "train": ["expert"]}
        content = {
            "name": "run",
            "robot": str(imported["robot"]),
            "out": "out",
            "start": {"checkpoint": imported["pi05"], **start},
            "sources": {"robot": [{"lerobot": "data"}]},
            "stages": [stage | {"sources": {"robot": 1}}],
        } | ({} if prompt is None else {"prompt": prompt})
        config = adopt(TrainingConfig.model_validate(content))
        assert adopt(config).prompt == config.prompt
        return config.prompt

    template = "Task: {task}, State: {state};\nAction: "
    assert adopted(None).style == "openpi"
    for more in ({}, {"style": "openpi"}, {"template": template}, {"template": None}):
        kept = adopted({"length": 30, **more})
        assert (kept.length, kept.style, kept.template) == (30, "openpi", template)
    for key, value in {"style": "words", "template": "{task} {state}"}.items():
        with pytest.raises(
            ConfigurationError, match=rf"policy\.json: prompt\.{key}: expected {re.escape(repr(value))}"
        ):
            adopted({"length": 30, key: value})
    own = adopted({"length": 30, "template": "{task} {state}"}, parts=["vision", "backbone"])
    assert (own.template, own.style) == ("{task} {state}", "openpi")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["ki", "pi0", "oft", "hybrid_mask", "state_token"])
def test_any_recipe_begins_with_paligemma_whose_sizes_it_need_not_say(imported: dict[str, Path], recipe: str) -> None:
    def begun(checkpoint: Path, **start: Any) -> Start:
        stage = {"steps": 9, "learning_rate": 1e-3, "sources": {"robot": 1, "talk": 1}}
        content = {
            "name": "run",
            "robot": str(imported["robot"]),
            "recipe": recipe,
            "out": "out",
            "start": {"checkpoint": checkpoint, **start},
            "sources": {"robot": [{"lerobot": "data"}], "talk": [{"paligemma": "talk.jsonl"}]},
            "prompt": {"length": 30},
            "stage": stage,
        }
        config = adopt(TrainingConfig.model_validate(lay_recipe(content)))
        assert config.start is not None
        return begin(checkpoint, parts=config.start.parts, model=config.model)

    found = begun(imported["paligemma"], parts=["vision", "backbone"]).config
    said = yaml.safe_load(find_recipe(recipe).read_text()).get("model", {})
    assert found.backbone == small("paligemma").backbone
    assert (found.actions, found.hybrid_mask) == (said.get("actions", "expert"), said.get("hybrid_mask", False))
    assert found.conditioning == said.get("conditioning", "adarms")
    assert (found.state_dim is not None) == (said.get("state") == "token")
    assert (found.expert == found.backbone) == (found.actions == "backbone")
    if said.keys() <= {"hybrid_mask"}:
        assert begun(imported["pi05"]).config.expert == small("pi05").expert
    elif "actions" in said:
        with pytest.raises(ConfigurationError, match="actions: expected backbone, as model says, got expert"):
            begun(imported["pi05"])


def test_files_that_are_missing_or_belong_elsewhere_are_named(imported: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nothing: expected weights\.safetensors and config\.json"):
        begin(tmp_path / "nothing")
    folder = write_checkpoint(tmp_path / "policy", "text")
    other = (imported["pi05"] / TOKENIZER).read_bytes()
    (folder / TOKENIZER).write_bytes(other)
    with pytest.raises(ConfigurationError, match=rf"tokenizer\.json: tokens: expected \d+, .* got {PIECES}"):
        begin(folder)
    (folder / TOKENIZER).unlink()
    with pytest.raises(ConfigurationError, match=r"tokenizer\.json: expected the vocabulary .* folder policy"):
        begin(folder)


@pytest.mark.parametrize("kind", ["pi05", "own"])
def test_an_adapter_saved_apart_comes_back_to_the_merged_weights(
    imported: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """Under openpi's names, which training.import_weights takes as well, or under ours."""
    folder = imported["pi05"] if kind == "pi05" else write_checkpoint(tmp_path / "policy", "text")
    settings = LoraSettings(parts=("backbone", "expert"), rank=3, alpha=6)
    start = begin(folder, action_width=7)
    model = start.model()
    add_lora(model, settings, 0)
    trained = select_parameters(model, None, ("backbone", "expert", "backbone.norm.weight"))
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    merged = merge(model.state_dict(), settings)
    save_adapter(tmp_path / "adapter", model.state_dict(), trained, settings, start.config)
    back = begin(folder, action_width=7, adapter=tmp_path / "adapter").weights
    for name, tensor in merged.items():
        torch.testing.assert_close(back[name], tensor, atol=1e-6, rtol=1e-6, msg=name)
    assert not torch.equal(back["backbone.layers.0.mlp.up.weight"], start.weights["backbone.layers.0.mlp.up.weight"])
    if kind == "pi05":
        files = write_downloads(tmp_path / "again") | {"--out": tmp_path / "again" / "out"}
        assert run_import(files, "pi05", "--lora", str(tmp_path / "adapter")) == 0
