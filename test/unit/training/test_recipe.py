"""Recipes laid over a run: each that comes with the package is a configuration, and what disagrees is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from support.recipes import SIZES

from ki_vla_ros.errors import ConfigurationError
from training.config import TrainingConfig, load_config
from training.recipe import lay_recipe, recipe_names

ROBOT, TALK = [{"lerobot": "robot"}], [{"paligemma": "talk.jsonl"}]

STAGE = {"steps": 100, "learning_rate": 1e-3, "sources": {"robot": 4, "talk": 2}, "noise_samples": 2}


def run_of(recipe: str, **changes: Any) -> dict[str, Any]:
    return {
        "name": "any",
        "robot": "demo_arm",
        "recipe": recipe,
        "out": "out",
        "sources": {"robot": ROBOT, "talk": TALK},
        "model": {key: value for key, value in SIZES.items() if key != "state"},
        "prompt": {"length": 40},
        "stage": STAGE,
    } | changes


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_is_a_run_with_what_the_run_says(recipe: str) -> None:
    config = TrainingConfig.model_validate(lay_recipe(run_of(recipe)))
    assert config.recipe == recipe and sum(stage.steps for stage in config.stages) == 100
    for stage in config.stages:
        assert stage.learning_rate == 1e-3
        drawn = {"robot": 4} | ({"talk": 2} if stage.losses.keys() & {"text", "tokens"} else {})
        assert stage.sources == drawn, "vision-language data only where words are learned"


BACKBONE = {"losses": {"flow": 1.0}, "train": ["backbone"], "insulate": False}


@pytest.mark.parametrize(
    ("stage", "model", "more", "fault"),
    [
        (
            {"insulate": True},
            {"actions": "backbone"},
            {},
            r"stage s: insulate: expected false for the loss flow .* got true",
        ),
        ({}, {"hybrid_mask": True}, {}, r"stage s: noise_samples: expected 1 with model.hybrid_mask, .*got 2"),
        (
            {"losses": {"flow": 1.0, "fast": 1.0}, "noise_samples": 1},
            {"hybrid_mask": True},
            {"sampler": "tokens"},
            r"sampler: expected flow with model.hybrid_mask, .* got tokens",
        ),
        ({"losses": {"flow": 1.0, "regression": 1.0}}, {}, {}, r"losses: expected flow or regression, .* got both"),
        ({"losses": {"regression": 1.0}}, {}, {}, r"noise_samples: expected 1 with the loss regression, .* got 2"),
        ({}, {}, {"sampler": "regression"}, r"sampler: expected flow, the loss that the run learns, got regression"),
        (
            {"losses": {"regression": 1.0}, "noise_samples": 1},
            {},
            {},
            r"sampler: expected regression, the loss that the run learns, got flow",
        ),
        ({}, {"expert": None}, {}, r"model.expert: expected its sizes, or a checkpoint to start from"),
        ({}, {"backbone": None}, {}, r"model.backbone: expected its sizes, or a checkpoint to start from"),
    ],
)
def test_what_does_not_go_together_is_refused(
    stage: dict[str, Any], model: dict[str, Any], more: dict[str, Any], fault: str
) -> None:
    given = run_of("joint", **more)
    sizes = {key: value for key, value in (given["model"] | model).items() if value is not None}
    common = given.pop("stage") | BACKBONE | {"sources": {"robot": 4}}
    del given["recipe"]
    whole = given | {"model": sizes, "stages": [{"name": "s"} | common | stage]}
    with pytest.raises(ValueError, match=fault):
        TrainingConfig.model_validate(whole)


def test_a_recipe_of_ones_own_and_its_faults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own, run = tmp_path / "own.yaml", tmp_path / "run.yaml"

    def load(recipe: str, **changes: Any) -> TrainingConfig:
        own.write_text(recipe)
        run.write_text(yaml.safe_dump(run_of(str(own), **changes)))
        return load_config(run)

    weights = "{name: a, losses: {flow: 2.0}, train: [expert]}"
    stages = (
        f"stages: [{weights}, {{name: b, share: 0.5, learning_rate: 1.0, losses: {{fast: 1.0}}, train: [backbone]}}]"
    )
    config = load(stages + "\nema: 0.9")
    assert (config.ema, [stage.steps for stage in config.stages]) == (0.9, [100, 50])
    assert [stage.learning_rate for stage in config.stages] == [1e-3, 1.0]
    assert [stage.warmup_steps for stage in config.stages] == [50, 25], "a share of it, too"
    assert capsys.readouterr().err == f"{run}: stage b: learning_rate 1.0, as the recipe {own} says, not 0.001\n"
    for recipe, changes, fault in (
        ("stages: []", {}, r"recipe .*own.yaml: expected a list of stages, got"),
        (f"stages: [{weights}]", {"stages": []}, r"stages: expected those of the recipe .*own.yaml, got others"),
        (f"stages: [{weights}]", {"stage": None}, r"stage: expected what each stage of the recipe .* has \(steps, "),
        (
            f"stages: [{weights}]\nmodel: {{state: token}}",
            {"model": SIZES | {"state": "both"}},
            r"model.state: expected token, as the recipe .*own.yaml says, got 'both'; leave it out",
        ),
        (f"stages: [{weights}]\nmodle: 1", {}, r"modle: .*; the recipe .*own.yaml is laid over it$"),
        (
            f"stages: [{weights}, {{name: b, share: half}}]",
            {},
            r"own.yaml: stage b: share: expected a part of the steps, above 0 and at most 1, got 'half'",
        ),
    ):
        with pytest.raises(ConfigurationError, match=fault):
            load(recipe, **changes)
    for changes, fault in (  # a line of this file, and none where the recipe has the fault
        (
            {"stage": STAGE | {"steps": "six"}},
            r"run\.yaml: line {line}: stages\.0\.steps: expected an integer, got 'six'",
        ),
        ({"stage": STAGE | {"sources": {"robot": "four"}}}, r"run\.yaml: line {line}: stages\.0\.sources\.robot: "),
    ):
        given = run_of(str(own), **changes)
        word = "steps:" if changes["stage"]["steps"] == "six" else "robot: four"
        line = next(n for n, text in enumerate(yaml.safe_dump(given).splitlines(), 1) if word in text)
        with pytest.raises(ConfigurationError, match=fault.replace("{line}", str(line))):
            load(f"stages: [{weights}]", **changes)
    with pytest.raises(ConfigurationError, match=r"run\.yaml: stages\.0\.losses\.flow: "):
        load("stages: [{name: a, losses: {flow: much}, train: [expert]}]")
    with pytest.raises(
        ConfigurationError, match=r"expected a file, or one of .*joint.*, got 'jont'; did you mean 'joint'"
    ):
        lay_recipe(run_of("jont"))
    with pytest.raises(ConfigurationError, match=r"nowhere\.yaml: expected a YAML file, got none"):
        lay_recipe(run_of("nowhere.yaml"))
