"""Configurations and data that a run must refuse before its first step: file and key, expected, got, and a remedy."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from support.arms import arm_run, entry, make_arms
from support.foreign_datasets import Camera, Column, Shape, build
from support.samples import make_robot
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from training.config import TrainingConfig
from training.data.lerobot import ACTION, STATE
from training.run import main
from training.sources import Sources
from training.storage import only_run
from training.tokens import fast_token

NAMES = ("lifter_0", "lifter_1", "lifter_2")


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_arms(tmp_path_factory.mktemp("arms"))
    write_robot(folder / "grabber.yaml", "grabber")
    write_robot(folder / "twin.yaml", "lifter", reach=25.0)
    write_robot(folder / "longer.yaml", "longer", horizon=6)
    (folder / "copy.yaml").write_text((folder / "lifter.yaml").read_text())
    return folder


def write_robot(path: Path, name: str, **more: Any) -> None:
    robot = make_robot(name, 3, **({"cameras": ("front",), "reach": 20.0} | more))
    path.write_text(yaml.safe_dump(robot.model_dump(mode="json", exclude_none=True)))


def add_data(folder: Path, change: Callable[[dict[str, Any]], Mapping[str, Any]] = lambda _: {}, **shape: Any) -> Path:
    """A dataset of the lifter; `change` gives other values for a row."""
    columns = [Column(key, NAMES, 3) for key in (STATE, ACTION)]
    fields: dict[str, Any] = {"lengths": dict.fromkeys(range(6), 7), "tasks": ("lift",)}
    build(folder, Shape("v3.0", columns, [Camera("observation.images.front", "png")], **(fields | shape)))
    for path in sorted((folder / "data").rglob("*.parquet")):
        table = pq.read_table(path)
        rows = [row | dict(change(row)) for row in table.to_pylist()]
        pq.write_table(pa.Table.from_pylist(rows, table.schema), path)
    return folder


def refusal(folder: Path, capsys: pytest.CaptureFixture[str], config: Mapping[str, Any]) -> str:
    """What the command says; it leaves nothing."""
    path, out = folder / "run.yaml", folder / "run"
    path.write_text(yaml.safe_dump(dict(config)))
    assert main([str(path)]) == 2
    assert not out.exists()
    said = capsys.readouterr().err
    assert "Traceback" not in said, said
    return " ".join(said.split())


def plain(arms: Path, folder: Path, *entries: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """The configuration as YAML has it."""
    fields = arm_run(arms, folder / "run", entry(arms, "lifter")).model_dump(mode="json", exclude_unset=True)
    return fields | {"sources": {"robot": [dict(e) for e in entries or [entry(arms, "lifter")]]}} | changes


NAIVE: dict[str, Any] = {"action_tokens": "naive", "fast_vocabulary": 512}
KEYS: dict[str, tuple[dict[str, Any], str]] = {
    "a key with a typo": ({"horizn": 4}, "horizn: .*did you mean 'horizon'"),
    "a size's key with a typo": ({"model.vision.patchsize": 8}, "model.vision.patchsize: .*did you mean 'patch_size'"),
    "an entry's key with a typo": ({"sources.robot.0.wieght": 1}, "sources.robot.0.wieght: .*did you mean 'weight'"),
    "a kind with a typo": ({"sources.robot.0": {"lerobt": "x"}}, "one of the keys lerobot, .* did you mean 'lerobot'"),
    "no data": ({"sources.robot": []}, "sources.robot: expected at least 1 item"),
    "a source that is nothing": ({"sources.robot": None}, "sources.robot: expected a list, got None"),
    "no stages": ({"stages": []}, "stages: expected at least 1 item"),
    "no losses": ({"stages.0.losses": {}}, "stages.0.losses: expected at least 1 item"),
    "no steps": ({"stages.0.steps": 0}, "stages.0.steps: expected > 0, got 0"),
    "an infinite loss": ({"stages.0.losses.flow": float("inf")}, "losses.flow: expected a finite number, got inf"),
    "a negative loss": ({"stages.0.losses.flow": -1.0}, "losses.flow: expected > 0, got -1"),
    "a negative weight": ({"sources.robot.0.weight": -1.0}, "sources.robot.0.weight: expected >= 0.000001, got -1"),
    "a huge weight": ({"sources.robot.0.weight": 1e308}, "sources.robot.0.weight: expected <= 1000000"),
    "a negative seed": ({"seed": -1}, "seed: expected >= 0, got -1"),
    "no scale": ({"fast_scale": 0.0}, "fast_scale: expected > 0, got 0"),
    "patches that do not fill": ({"model.vision.image_size": 97}, "image_size: expected a multiple of patch_size 12"),
    "no patches": ({"model.vision.patch_size": 0}, "vision.patch_size: expected 1 to .*, got 0"),
    "a narrow stem": ({"model.vision.width": 2}, "vision.width: expected at least a channel in each layer of the stem"),
    "no layers": ({"model.backbone.depth": 0}, "gemma.depth: expected 1 to .*, got 0"),
    "heads that cannot share": ({"model.backbone.kv_heads": 4}, "gemma.heads: expected a multiple of kv_heads 4"),
    "a width that is too small": ({"model.width": 2}, "model.width: expected at least the 3 dimensions"),
    "episodes backwards": ({"sources.robot.0.episodes": [4, 2]}, r"0.episodes: expected .* got \[4, 2\]"),
    "episodes from the end": ({"sources.robot.0.episodes": [-2, None]}, r"0.episodes: expected .* got \[-2, None\]"),
    "episodes that are not there": ({"sources.robot.0.episodes": [2, 9]}, r"its 6, got \[2, 9\]"),
    "a long horizon": ({"horizon": 50}, "'lifter': expected episodes with the 50 actions of a chunk, .* set a shorter"),
    "a long prefix": ({"max_prefix_delay": 4}, "max_prefix_delay: expected less than the horizon 4"),
    "another rate": ({"action_period_s": 0.15}, "expected 6.66667 frames per second.* or a whole multiple"),
    "a prompt that is too long": ({"prompt.length": 5}, "expected at most 5 tokens, got .* raise prompt.length"),
    "a prompt without task": ({"prompt.template": "go {state}"}, r"template: expected \{task\} exactly once"),
    "a prompt without state": ({"prompt.template": "{task}"}, r"template: expected \{state\} 1 times"),
    "a small vocabulary": ({"fast_vocabulary": 4}, "FAST: .* enlarge the vocabulary"),
    "a stride without naive tokens": ({"naive_stride": 2}, "naive_stride: expected it with action_tokens: naive"),
    "FAST's size for naive tokens": ({"action_tokens": "naive"}, "fast_vocabulary: expected it with .* fast alone"),
    "merged tokens without merges": (
        {"fast_merges": "none", "fast_merged": 4},
        "fast_merged: expected none with fast_merges: none, got 4",
    ),
    "merges of a published vocabulary": (
        {"fast_published": "any", "fast_merges": "bytes"},
        "fast_merges, .* neither with fast_published, .* got bytes, None",
    ),
    "bins for numbers without ends": (NAIVE | {"normalization": "mean_std"}, "naive: expected normalization quantile"),
    "a readout of naive tokens": (
        NAIVE | {"vocabulary": {"queries": 2}, "hints": {"probe_layer": 1, "readout_frequencies": 2}},
        "hints.readout_frequencies: expected 0 with action_tokens: naive",
    ),
    "a stride beyond the chunk": (NAIVE | {"naive_stride": 4}, "naive_stride: expected at most 3, with a horizon of 4"),
    "a postfix of another kind": ({"postfix": "openpi"}, "postfix: expected 'bare' or 'whole', got 'openpi'"),
    "one cross-entropy and two": ({"stages.0.losses.tokens": 1.0}, "losses: expected tokens, .* got tokens and fast"),
    "a loss without targets": ({"stages.0.losses.text": 1.0}, "losses text: expected a source with targets"),
    "a hint without labels": ({"hints": {"probe_layer": 1}, "stages.0.losses.pointing": 1.0}, "pointing: expected a"),
    "a head that is not there": ({"hints": {"probe_layer": 1, "probe_head": 2}}, "hints.probe_head: expected 0..1"),
    "a gate on nothing": ({"stages.0.gates": {"nosuch": 0.5}}, "nosuch"),
    "an unknown robot": ({"sources.robot.0.robot": "so102"}, "'so102': .* did you mean 'so101'"),
    "data that nobody has made": (
        {"sources.robot.0.lerobot": "/nosuch", "made_by": "make them"},
        "in /nosuch, found none; it is made by: make them",
    ),
    "a checkpoint that is not there": ({"start": {"checkpoint": "/nosuch"}}, "/nosuch: expected weights.safetensors"),
    "a camera that is not there": ({"augmentation": {"cameras": {"rear": {}}}}, "augmentation.cameras: .* got rear"),
}  # fmt: skip


@pytest.mark.parametrize("name", KEYS)
def test_a_wrong_key_is_named(name: str, arms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes, said = KEYS[name]
    config = plain(arms, tmp_path)
    for key, value in changes.items():
        *way, last = key.split(".")
        place: Any = config
        for step in way:
            place = place[int(step)] if isinstance(place, list) else place[step]
        place[int(last) if isinstance(place, list) else last] = value
    assert_said(said, refusal(tmp_path, capsys, config))


def assert_said(expected: str, said: str) -> None:
    with pytest.raises(ValueError, match=expected):
        raise ValueError(said)


def test_what_is_held_out_is_not_trained_on(arms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = plain(arms, tmp_path, held_out={"robot": [entry(arms, "lifter", episodes=[5, 6])]})
    assert_said("sources.robot: .* got episode 5 of .*lifter, which is held out", refusal(tmp_path, capsys, both))
    # Under another name, of whose data some are kept apart.
    sources = {"robot": [entry(arms, "lifter")], "more": [entry(arms, "lifter", episodes=[0, 4])]}
    apart = plain(arms, tmp_path, sources=sources, stages=[arms_stage(robot=2, more=2)])
    assert_said("sources.more: .* got episode 2 of .*lifter, which is held out", refusal(tmp_path, capsys, apart))
    other = plain(arms, tmp_path, held_out={"robot": [entry(arms, "reacher")]})
    assert_said("held_out: expected data of 'reacher' .* to train on", refusal(tmp_path, capsys, other))


def arms_stage(**sources: int) -> dict[str, Any]:
    losses = {"fast": 1.0, "flow": 1.0}
    return {"name": "s", "steps": 1, "learning_rate": 1e-3, "losses": losses, "train": ["expert"], "sources": sources}


def test_data_that_is_given_twice_or_never_drawn(
    arms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twice = plain(arms, tmp_path, entry(arms, "lifter", episodes=[0, 4]), entry(arms, "lifter", episodes=[3, 5]))
    assert_said("sources.robot: .* got episode 3 of .* twice; raise its weight", refusal(tmp_path, capsys, twice))
    seldom = plain(arms, tmp_path, entry(arms, "lifter"), entry(arms, "reacher", weight=1e-5))
    assert_said("reacher: weight: expected enough for a sample .* got 1e-05 of", refusal(tmp_path, capsys, seldom))


@pytest.fixture
def gemma(monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    """A small vocabulary in PaliGemma's form, with letters for words."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "\n", *map(chr, range(32, 127))]
    tokens += [*(f"<loc{i:04d}>" for i in range(1024)), *(f"<seg{i:03d}>" for i in range(128))]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, [], unk_token="<unk>"))
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer.add_special_tokens([token for token in tokens if len(token) > 1])
    monkeypatch.setattr("training.sources.make_vocabulary", lambda config, texts, ids, _: grow(tokenizer, ids))
    return tokenizer


def grow(tokenizer: Tokenizer, action_ids: int) -> Tokenizer:
    grown = Tokenizer.from_str(tokenizer.to_str())
    grown.add_special_tokens([fast_token(i) for i in range(action_ids)])
    return grown


def test_actions_and_places_do_not_share_their_ids(
    arms: Path, gemma: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((16, 16, 3), np.uint8))
    answers = {"words": "it is red", "places": "<loc0007><loc1023> cup"}
    for name, suffix in answers.items():
        line = {"image": "a.png", "prefix": "where", "suffix": suffix}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line) + "\n")

    def run(questions: str, **vocabulary: Any) -> dict[str, Any]:
        sources = {"robot": [entry(arms, "lifter")], "asked": [{"paligemma": str(tmp_path / f"{questions}.jsonl")}]}
        stage = arms_stage(robot=2, asked=1) | {"losses": {"text": 1.0, "fast": 1.0}}
        named = {"kind": "paligemma", "file": str(tmp_path / "any.model"), **vocabulary}
        prompt = {"length": 90}
        return plain(arms, tmp_path, sources=sources, stages=[stage], vocabulary=named, prompt=prompt, hints=None)

    def opened(config: dict[str, Any]) -> Sources:
        return Sources(TrainingConfig.model_validate(config))

    said = refusal(tmp_path, capsys, run("places", fast_ids="places"))
    assert_said("source asked, .*places.jsonl: the text .* has '<loc1023>', .* FAST token's: .*fast_ids: own", said)
    shared = opened(run("places", fast_ids="places", share_places=True))
    assert len(shared.warnings) == 1 and "'<loc1023>'" in shared.warnings[0]
    apart = opened(run("words", fast_ids="places"))
    assert not apart.warnings and apart.action_ids == 0 and apart.tokenizer.get_vocab_size() == gemma.get_vocab_size()
    batch = apart.training["robot"].draw(4, np.random.default_rng(0))
    chunks_HD = batch.action_BHA.double().numpy()
    for row, chunk_HD in enumerate(chunks_HD):
        ids = batch.postfix_BT[row][batch.fast_mask_BT[row]].tolist()
        expected = apart.embodiment.chunks.encode(chunk_HD) if batch.known_BH[row].all() else []
        assert ids == [gemma.get_vocab_size() - 1 - 128 - i for i in expected]
    own = opened(run("places", fast_ids="own"))
    assert own.action_ids == own.config.fast_vocabulary and not own.warnings
    gemma.add_special_tokens(["<fast_0>"])
    said = refusal(tmp_path, capsys, run("words", fast_ids="places"))
    assert_said("expected a vocabulary without FAST tokens of its own, got <fast_0>", said)


def test_a_run_does_not_write_into_its_data(arms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inside = plain(arms, tmp_path, out=str(arms / "lifter" / "run"))
    assert_said("out: expected a folder apart from the data", refusal(tmp_path, capsys, inside))
    assert not (arms / "lifter" / "run").exists()


def test_a_second_run_in_the_same_folder_is_refused(
    arms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At once: before it looks at its data, which are not there."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(plain(arms, tmp_path, {"lerobot": str(tmp_path / "nowhere")})))
    with only_run(tmp_path / "run"):
        (tmp_path / "run" / "figures.jsonl").write_text("of the first")
        assert main([str(path)]) == 2
        said = capsys.readouterr().err
        assert (
            f"expected to be the only run that writes there, got another one that does (process {os.getpid()}" in said
        )
        assert (tmp_path / "run" / "figures.jsonl").read_text() == "of the first" and len(said.splitlines()) == 1
    assert_said("nowhere", (main([str(path)]), capsys.readouterr().err)[1])


ROBOTS = {
    "a robot without data": ({"robot": "reacher"}, ["lifter"], "robot: expected data of 'reacher' .*reacher.yaml"),
    "names of another robot": ({"robot": "grabber"},
        [("lifter", "grabber")], "'grabber_0': dataset.name: .* 'lifter_0'"),
    "cameras of another robot": ({"robot": "reacher"}, [("lifter", "reacher")], "camera 'observation.images.left'"),
    "two robots of one name": ({}, ["lifter", ("perm", "twin")], "'lifter': .* got .*lifter.yaml and another in .*tw"),
    "two horizons": ({}, ["lifter", ("perm", "longer")], "horizon: .* got 6 of longer .* and 4 of lifter; set horizon"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROBOTS)
def test_robots_that_do_not_go_together(
    name: str, arms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, entries, said = ROBOTS[name]
    if not (arms / "perm").exists():
        add_data(arms / "perm")
    pairs = [(e, e) if isinstance(e, str) else e for e in entries]
    data = [{"lerobot": str(arms / d), "robot": str(arms / f"{r}.yaml")} for d, r in pairs]
    paths = {key: str(arms / f"{value}.yaml") for key, value in changes.items()}
    assert_said(said, refusal(tmp_path, capsys, plain(arms, tmp_path, *data, **paths)))


def test_one_robot_file_under_several_paths_is_one_robot(arms: Path, tmp_path: Path) -> None:
    other = {"lerobot": str(add_data(tmp_path / "data")), "robot": str(arms / "copy.yaml")}
    again = f"{arms}/../{arms.name}/lifter.yaml"
    data = Sources(arm_run(arms, tmp_path / "run", entry(arms, "lifter"), other, robot=again))
    assert list(data.embodiments) == ["lifter"] and data.embodiment.robot == data.robot


def scaled(by: float, *keys: str) -> Callable[[dict[str, Any]], Mapping[str, Any]]:
    return lambda row: {key: [by * x for x in row[key]] for key in keys}


def one_wild(row: dict[str, Any]) -> Mapping[str, Any]:
    return {STATE: [1e5, 0.0, 0.0]} if (row["episode_index"], row["frame_index"]) == (1, 2) else {}


DATA: dict[str, tuple[dict[str, Any], str]] = {
    "no number": ({"change": lambda row: {ACTION: [0.0, float("nan"), 0.0]}}, "expected finite numbers in action"),
    "degrees": ({"change": scaled(57.3, STATE, ACTION)}, "state lifter_0: .* are far outside, .*are these degrees"),
    "actions in other units": ({"change": scaled(1e4, ACTION)}, "action lifter_0: .* 35 of 35 frames are far"),
    "one wild number": ({"change": one_wild}, "state lifter_0: .*1 of .* first in frame 2 of episode 1; correct"),
    "slower": ({"fps": 5}, "expected 10 frames per second.* or a whole multiple of it, got 5"),
    "between": ({"fps": 25, "lengths": {0: 30}}, "or a whole multiple of it, got 25; set action_period_s"),
    "a task without words": ({"tasks": ("...",)}, r"task '...': .* expected some words.* meta/tasks"),
    "frames alone": ({"lengths": dict.fromkeys(range(6), 1)}, "expected episodes with the 4 actions of a chunk"),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_data_that_cannot_be_this_robots(
    name: str, arms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape, said = DATA[name]
    data = {"lerobot": str(add_data(tmp_path / "data", **shape)), "robot": str(arms / "lifter.yaml")}
    assert_said(said, refusal(tmp_path, capsys, plain(arms, tmp_path, data)))


def test_where_the_run_goes(arms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    config = plain(arms, tmp_path, out=str(tmp_path / "file"))
    assert_said("out: expected a folder, got the file", refusal(tmp_path, capsys, config))
    assert (tmp_path / "file").read_text() == "mine"


def test_no_robot_at_all(arms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "asked.jsonl").write_text(json.dumps({"image": "a.png", "prefix": "what", "suffix": "a cup"}) + "\n")
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((8, 8, 3), np.uint8))
    sources = {"asked": [{"paligemma": str(tmp_path / "asked.jsonl")}]}
    config = plain(arms, tmp_path, sources=sources, stages=[arms_stage(asked=2) | {"losses": {"text": 1.0}}])
    assert_said("expected a LeRobot dataset of the robot, got vision-language data", refusal(tmp_path, capsys, config))


def test_a_disk_without_room(
    arms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = plain(arms, tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    assert main([str(path)]) == 2
    assert_said(r"GB on the disk for checkpoints and policy, got 0\.0 GB that are free", capsys.readouterr().err)
