"""A recipe laid over a run: which losses teach which parts, what is insulated, and how the model says its actions.

A run's YAML file says what there is to learn from, how large the model is and for how long; `recipe: ki` says how, by a
file in config/training/recipes/ or one of one's own:

    recipe: ki
    stage: {steps: 20000, learning_rate: 5.0e-4, sources: {robot: 32, questions: 8}}

Each stage of the recipe is `stage`, and what the recipe adds to it or says otherwise, which is told: `share` is its
part of the steps, warm-up included (1 by default), and of `sources` it draws those that have what its losses learn
from. Whatever else a recipe says (the state's way into the model, the sampler) the run must not say otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from ki_vla_ros.errors import ConfigurationError, did_you_mean, short_repr
from ki_vla_ros.files import read_text
from ki_vla_ros.share import expand, find_share
from ki_vla_ros.yaml_file import LARGEST_YAML, parse_yaml

RECIPES: Final = "config/training/recipes"
WARMUP_STEPS: Final = 50
"""Of a whole run's stage, unless it says otherwise."""
TEACHES: Final[Mapping[bool, frozenset[str]]] = {  # by whether a source is of a robot
    True: frozenset({"fast", "tokens", "flow", "regression", "readout", "pointing", "grounding", "cells"}),
    False: frozenset({"text", "tokens", "pointing", "grounding", "cells"}),
}


def recipe_names() -> list[str]:
    return sorted(file.stem for file in find_share(RECIPES).glob("*.yaml"))


def find_recipe(recipe: str) -> Path:
    """The file as given, or the one in config/training/recipes/ of this name; ConfigurationError if it has none."""
    path = expand(recipe)
    if path.name != recipe or path.suffix:
        return path
    if recipe not in (names := recipe_names()):
        raise ConfigurationError(
            f"recipe: expected a file, or one of {', '.join(names)}, got {recipe!r}{did_you_mean(recipe, names)}"
        )
    return find_share(RECIPES) / f"{recipe}.yaml"


def lay_recipe(given: Any, tell: Callable[[str], object] = lambda line: None) -> Any:
    """A run's content as YAML gives it, with what its recipe says in it; without `recipe` as it is.

    `tell` gets a line for each key of `stage` in whose place the recipe has its own.
    """
    if not isinstance(given, Mapping) or given.get("recipe") is None:
        return given
    path = find_recipe(str(given["recipe"]))
    try:
        recipe = parse_yaml(read_text(path, LARGEST_YAML))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"recipe {path}: expected a YAML file, got none ({error})") from error
    if not isinstance(recipe, Mapping) or not isinstance(stages := recipe.get("stages"), list) or not stages:
        raise ConfigurationError(f"recipe {path}: expected a list of stages, got {short_repr(recipe)}")
    if "stages" in given:
        raise ConfigurationError(
            f"stages: expected those of the recipe {path}, got others; leave them or the recipe out, and say under "
            "stage what each stage has"
        )
    stage = given.get("stage")
    if not isinstance(stage, Mapping):
        raise ConfigurationError(
            f"stage: expected what each stage of the recipe {path} has (steps, learning_rate, sources), got "
            f"{short_repr(stage)}"
        )
    rest = {key: value for key, value in recipe.items() if key != "stages"}
    run = {key: value for key, value in given.items() if key != "stage"}
    sources = given.get("sources")
    return _agreed(run, rest, path) | {
        "stages": [_stage(stage, own, sources if isinstance(sources, Mapping) else {}, path, tell) for own in stages]
    }


def _agreed(run: Mapping[str, Any], recipe: Mapping[str, Any], path: Path, place: str = "") -> dict[str, Any]:
    """Both together; ConfigurationError where they disagree."""
    found = dict(run)
    for key, value in recipe.items():
        said, name = run.get(key), f"{place}{key}"
        if isinstance(said, Mapping) and isinstance(value, Mapping):
            found[key] = _agreed(said, value, path, f"{name}.")
        elif said is not None and said != value:
            raise ConfigurationError(
                f"{name}: expected {value}, as the recipe {path} says, got {short_repr(said)}; leave it out"
            )
        else:
            found[key] = value
    return found


def _stage(
    common: Mapping[str, Any], own: Any, sources: Mapping[str, Any], path: Path, tell: Callable[[str], object]
) -> Any:
    """A stage of the recipe with what all stages have."""
    if not isinstance(own, Mapping):
        return own
    stage = dict(common) | dict(own)
    for key in common.keys() & own.keys():
        if isinstance(common[key], Mapping) and isinstance(own[key], Mapping):
            stage[key] = {**common[key], **own[key]}
        elif common[key] != own[key]:
            tell(
                f"stage {own.get('name')}: {key} {short_repr(own[key])}, as the recipe {path} says, not "
                f"{short_repr(common[key])}"
            )
    share = stage.pop("share", 1.0)
    if not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise ConfigurationError(
            f"recipe {path}: stage {own.get('name')}: share: expected a part of the steps, above 0 and at most 1, got "
            f"{short_repr(share)}"
        )
    if isinstance(stage.get("steps"), int):
        stage["steps"] = max(1, round(share * stage["steps"]))
    warmup = stage.get("warmup_steps", WARMUP_STEPS)
    if share < 1 and isinstance(warmup, int):
        stage["warmup_steps"] = round(share * warmup)
    if isinstance(losses := stage.get("losses"), Mapping) and isinstance(drawn := stage.get("sources"), Mapping):
        stage["sources"] = {
            name: count
            for name, count in drawn.items()
            if name not in sources or TEACHES[_is_robot(sources[name])] & losses.keys()
        }
    return stage


def _is_robot(entries: Any) -> bool:
    """Whether a source is LeRobot datasets; all of its entries are of one kind."""
    first = entries[0] if isinstance(entries, list) and entries else None
    return isinstance(first, Mapping) and "lerobot" in first
