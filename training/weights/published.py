"""What LeRobot and openpi write beside the weights of pi0 and pi0.5, against what they are imported as.

LeRobot: `config.json`, and `policy_preprocessor.json` and `policy_postprocessor.json` with the statistics in files that
they name. openpi: the
`config.json` of the conversion to PyTorch, and `assets/ID/norm_stats.json`. All are read if they are there. A wrong
horizon, joint order, normalisation or kind of action fits the weights just as well, and moves the arm elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ki_vla_ros.errors import ConfigurationError, describe_validation, short_repr
from ki_vla_ros.files import is_name
from ki_vla_ros.robot import Robot
from training.model import LONGEST_PERIOD, SHORTEST_PERIOD, VARIANTS, GemmaConfig, VLAConfig
from training.weights.foreign import Kind
from training.weights.statistics import FIELDS, LEROBOT, LEROBOT_EPSILON, Method, read_json, read_ranges

CONFIG, PREPROCESSOR, POSTPROCESSOR = "config.json", "policy_preprocessor.json", "policy_postprocessor.json"
STATE, ACTION = LEROBOT
EMPTY = "observation.images.empty_camera_"
MODES: dict[Method, str] = {method: method.upper() for method in FIELDS}
PARTS = {"paligemma_variant": "backbone", "action_expert_variant": "expert"}
LIBERO = "physical-intelligence/libero"  # the asset of a checkpoint that openpi trained without the state
LORA = "_lora"  # ends openpi's names of variants that it trains with LoRA
TOLERANCE = 1e-4  # of statistics, which LeRobot keeps in float32

Misfit = tuple[str, object, object]
"""What, as it is imported, as the file says."""


class Lenient(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Feature(Lenient):
    type: str
    shape: tuple[int, ...]


class Published(Lenient):
    """LeRobot's config.json, as far as it changes what the weights mean; openpi's has other names for two of these."""

    type: str
    chunk_size: int
    n_obs_steps: int = 1
    image_resolution: tuple[int, int] | None = None
    resize_imgs_with_padding: tuple[int, int] | None = None  # the same in older files
    min_period: float = SHORTEST_PERIOD
    max_period: float = LONGEST_PERIOD
    use_visual_memory: bool = False
    use_proprioceptive_memory: bool = False
    adapt_to_pi_aloha: bool = False
    use_delta_joint_actions_aloha: bool = False
    use_relative_actions: bool = False
    relative_exclude_joints: list[str] = Field(default_factory=list)
    action_feature_names: list[str] | None = None
    normalization_mapping: dict[str, str] = Field(default_factory=dict)
    input_features: dict[str, Feature] | None = None
    output_features: dict[str, Feature] | None = None


class Step(Lenient):
    """One step of LeRobot's pre- or postprocessor; `state_file` holds its tensors."""

    registry_name: str | None = None
    config: dict[str, Any] = Field(default_factory=dict)
    state_file: str | None = None


class Preprocessor(Lenient):
    steps: list[Step]


class Relative(Lenient):
    enabled: bool = False
    exclude_joints: list[str] = Field(default_factory=list)
    action_names: list[str] | None = None


class Renaming(Lenient):
    rename_map: dict[str, str] = Field(default_factory=dict)


class Normalizer(Lenient):
    norm_map: dict[str, str]
    eps: float = LEROBOT_EPSILON
    features: dict[str, Feature] = Field(default_factory=dict)


class Prompt(Lenient):
    include_state_in_prompt: bool = True


STEPS = {
    "rename_observations_processor",
    "to_batch_processor",
    "relative_actions_processor",
    "normalizer_processor",
    "pi05_prepare_state_tokenizer_processor_step",
    "pi0_new_line_processor",
    "tokenizer_processor",
    "device_processor",
}
STEPS_AFTER = {"unnormalizer_processor", "absolute_actions_processor", "device_processor"}


def check_published(
    source: Path,
    kind: Kind,
    config: VLAConfig,
    robot: Robot,
    stats: Path,
    method: Method,
    in_prompt: bool | None = None,
) -> None:
    """ConfigurationError names every file and field beside the weights at `source` that says something else.

    `in_prompt`: whether pi0.5 sees the state in its prompt; None: nobody said.
    """
    folder = source if source.is_dir() else source.parent
    faults = [
        f"  {path}: {what}: expected {expected}, as imported, got {got}"
        for path, misfits in (
            (folder / CONFIG, config_misfits(folder / CONFIG, kind, config, robot, method)),
            (folder / PREPROCESSOR, preprocessor_misfits(folder / PREPROCESSOR, robot, stats, method, in_prompt)),
            (folder / POSTPROCESSOR, postprocessor_misfits(folder / POSTPROCESSOR, robot, stats, method)),
            (folder / "assets", assets_misfits(folder / "assets", robot, stats, method, in_prompt)),
        )
        for what, expected, got in misfits
    ]
    if faults:
        raise ConfigurationError(
            f"{folder}: the weights were trained for something else than they are imported as\n"
            + "\n".join(faults)
            + "\ncorrect --robot, --stats, --normalization or --as; weights that need what this package does not run "
            "cannot be imported"
        )


class Sizes(TypedDict, total=False):
    backbone: GemmaConfig
    expert: GemmaConfig


def sizes_beside(source: Path) -> Sizes:
    """Those that config.json names, where it does; openpi and LeRobot name them alike."""
    path = (source if source.is_dir() else source.parent) / CONFIG
    content = read_json(path) if path.exists() else {}
    names = {part: content.get(key) for key, part in PARTS.items()}
    if lora := [name for name in names.values() if isinstance(name, str) and name.endswith(LORA)]:
        raise ConfigurationError(
            f"{path}: expected whole weights, got those of {lora[0]}: openpi's conversion leaves LoRA out; add it "
            "to the JAX arrays as docs/weights.md shows, and convert them again"
        )
    found = {part: VARIANTS[name] for part, name in names.items() if isinstance(name, str) and name in VARIANTS}
    return Sizes(**found)  # type: ignore[typeddict-item]


def size_misfits(content: Mapping[str, object], config: VLAConfig) -> Iterator[Misfit]:
    """The shapes of the weights do not say how many heads there are."""
    for key, part in PARTS.items():
        sizes = getattr(config, part)
        got = content.get(key)
        if got is not None and not (isinstance(got, str) and VARIANTS.get(got) == sizes):
            yield key, next((name for name, variant in VARIANTS.items() if variant == sizes), sizes), got


def config_misfits(path: Path, kind: Kind, config: VLAConfig, robot: Robot, method: Method) -> Iterator[Misfit]:
    if not path.exists():
        return
    content = read_json(path)
    yield from size_misfits(content, config)
    if "type" not in content:  # openpi's
        for key, expected in (("action_horizon", config.horizon), ("action_dim", config.action_dim)):
            if content.get(key, expected) != expected:
                yield key, expected, content[key]
        return
    if content["type"] != kind:
        yield "type", kind, content["type"]
        return
    theirs = validate(Published, content, path)
    side = config.vision.image_size
    needed: tuple[tuple[str, object], ...] = (
        ("chunk_size", config.horizon),
        ("n_obs_steps", 1),
        ("min_period", SHORTEST_PERIOD),
        ("max_period", LONGEST_PERIOD),
        ("use_visual_memory", False),
        ("use_proprioceptive_memory", False),
        ("adapt_to_pi_aloha", False),
        ("use_delta_joint_actions_aloha", False),
    )
    for key, wanted in needed:
        if getattr(theirs, key) != wanted:
            yield key, wanted, getattr(theirs, key)
    for key in ("image_resolution", "resize_imgs_with_padding"):
        if (size := getattr(theirs, key)) not in (None, (side, side)):
            yield key, [side, side], list(size)
    yield from mode_misfits("normalization_mapping", theirs.normalization_mapping, method)
    yield from relative_misfits(
        theirs.use_relative_actions, theirs.relative_exclude_joints, theirs.action_feature_names, robot
    )
    features = (theirs.input_features or {}) | (theirs.output_features or {})
    yield from feature_misfits(features, robot, config.action_dim, rename_map(path.parent / PREPROCESSOR))


def preprocessor_misfits(
    path: Path, robot: Robot, stats: Path, method: Method, in_prompt: bool | None
) -> Iterator[Misfit]:
    if not path.exists():
        return
    for number, step in enumerate(validate(Preprocessor, read_json(path), path).steps):
        where = f"steps.{number} ({step.registry_name})"
        if step.registry_name not in STEPS:
            yield where, f"one of {', '.join(sorted(STEPS))}", "another step, which this package does not run"
        elif step.registry_name == "relative_actions_processor":
            relative = validate(Relative, step.config, path)
            yield from relative_misfits(relative.enabled, relative.exclude_joints, relative.action_names, robot, where)
        elif step.registry_name == "pi05_prepare_state_tokenizer_processor_step":
            if not validate(Prompt, step.config, path).include_state_in_prompt:
                yield f"{where}.include_state_in_prompt", True, False
            elif in_prompt is False:
                yield where, "no state in the prompt (--state none)", "a step that puts it there"
        elif step.registry_name == "normalizer_processor":
            yield from normalizer_misfits(path, step, where, robot, stats, method)


def postprocessor_misfits(path: Path, robot: Robot, stats: Path, method: Method) -> Iterator[Misfit]:
    """What LeRobot does with the model's actions must be the way back of what it does before the model."""
    if not path.exists():
        return
    for number, step in enumerate(validate(Preprocessor, read_json(path), path).steps):
        where = f"steps.{number} ({step.registry_name})"
        if step.registry_name not in STEPS_AFTER:
            yield where, f"one of {', '.join(sorted(STEPS_AFTER))}", "another step, which this package does not run"
        elif step.registry_name == "absolute_actions_processor":
            enabled, relative = validate(Relative, step.config, path).enabled, any(a.relative for a in robot.actions)
            if enabled != relative:
                yield f"{where}.enabled", relative, enabled
        elif step.registry_name == "unnormalizer_processor":
            yield from normalizer_misfits(path, step, where, robot, stats, method)


def normalizer_misfits(
    path: Path, step: Step, where: str, robot: Robot, stats: Path, method: Method
) -> Iterator[Misfit]:
    normalizer = validate(Normalizer, step.config, path)
    yield from mode_misfits(f"{where}.norm_map", normalizer.norm_map, method)
    if normalizer.eps != LEROBOT_EPSILON:
        yield f"{where}.eps", LEROBOT_EPSILON, normalizer.eps
    if step.state_file is None:
        return
    if not is_name(step.state_file):
        yield f"{where}.state_file", "the name of a file beside it", short_repr(step.state_file)
    elif (path.parent / step.state_file).is_file() and not agree(path.parent / step.state_file, stats, method, robot):
        yield f"{where}.state_file {step.state_file}", f"the statistics of --stats {stats}", "others"


def assets_misfits(folder: Path, robot: Robot, stats: Path, method: Method, in_prompt: bool | None) -> Iterator[Misfit]:
    """openpi keeps statistics by the name of the robot they are of; one of them must be those that were given."""
    found = sorted(folder.glob("**/norm_stats.json"))
    names = [str(path.parent.relative_to(folder)) for path in found]
    if found and not any(agree(path, stats, method, robot) for path in found):
        yield f"norm_stats.json of {', '.join(names)}", f"the statistics of --stats {stats}", "others"
    if in_prompt is None and (LIBERO in names or stats.absolute().parent.as_posix().endswith(f"/{LIBERO}")):
        yield f"statistics of {LIBERO}", "--state none or --state prompt (openpi's pi05_libero has none)", "neither"


def agree(path: Path, stats: Path, method: Method, robot: Robot) -> bool:
    """Whether two files have the same statistics of the robot's dimensions, as far as float32 can say."""
    ours, theirs = (read_ranges(file, method, len(robot.state), len(robot.actions)) for file in (stats, path))
    return all(
        np.allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE * np.ptp(one))
        for one, other in zip(map(np.array, ours), map(np.array, theirs), strict=True)
    )


def mode_misfits(where: str, mapping: Mapping[str, str], method: Method) -> Iterator[Misfit]:
    """LeRobot leaves as it is what the mapping does not name; an empty one, of a base model, says nothing."""
    for kind, expected in (("STATE", MODES[method]), ("ACTION", MODES[method]), ("VISUAL", "IDENTITY")):
        if mapping and (got := mapping.get(kind, "IDENTITY")) != expected:
            yield f"{where}.{kind}", expected, got


def relative_misfits(
    enabled: bool, exclude: Sequence[str], names: Sequence[str] | None, robot: Robot, where: str = "relative actions"
) -> Iterator[Misfit]:
    """LeRobot keeps absolute what has an excluded name in its own; without names, everything becomes relative."""
    joints = [(action.dataset.name or action.name).removesuffix(".pos") for action in robot.actions]
    if names is not None:
        bare = [name.removesuffix(".pos") for name in names]
        if len(bare) != len(joints):
            yield f"{where}: action names", joints, names
            return
        if set(bare) == set(joints) and bare != joints:
            yield f"{where}: order of the actions", joints, names
    kept = (
        []
        if names is None
        else [n for n, name in enumerate(names) if any(e and e.lower() in name.lower() for e in exclude)]
    )
    theirs = [enabled and j not in kept for j in range(len(joints))]
    ours = [joint.relative for joint in robot.actions]
    if ours != theirs:

        def say(flags: Sequence[bool]) -> str:
            return ", ".join(joint for joint, flag in zip(joints, flags, strict=True) if flag) or "none"

        yield f"{where}: relative joints", say(ours), say(theirs)


def feature_misfits(
    features: Mapping[str, Feature], robot: Robot, padded: int, renamed: Mapping[str, str]
) -> Iterator[Misfit]:
    """A base model's features are as wide as the model: they say nothing about a robot."""
    ours = ([dimension.dataset for dimension in robot.state], [dimension.dataset for dimension in robot.actions])
    for key, columns in zip(LEROBOT, ours, strict=True):
        count = len(columns)
        if key in features and features[key].shape not in ((count,), (padded,)):
            yield f"features.{key}.shape", [count], list(features[key].shape)
        places = [column.index for column in columns if column.column in (None, key)]
        if any(place not in (None, d) for d, place in enumerate(places)):
            yield f"order of {key} (the robot file's, by dataset.index)", list(range(count)), places
    seen = [key for key, feature in features.items() if feature.type == "VISUAL" and not key.startswith(EMPTY)]
    cameras = [renamed.get(camera.key, camera.key) for camera in robot.cameras]
    if seen and len(seen) != len(cameras):
        yield "features: cameras (one that may be absent is `optional` in the robot file)", cameras, seen
    elif set(seen) == set(cameras) and seen != cameras:
        yield "features: order of the cameras", cameras, seen


def rename_map(path: Path) -> Mapping[str, str]:
    """What the preprocessor calls a dataset's keys."""
    steps = validate(Preprocessor, read_json(path), path).steps if path.exists() else ()
    names = [step.config for step in steps if step.registry_name == "rename_observations_processor"]
    return validate(Renaming, names[0], path).rename_map if names else {}


def validate(model: type[Any], content: object, path: Path) -> Any:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise ConfigurationError(
            f"{path}: expected a file as LeRobot writes it: {describe_validation(error)}; download it again"
        ) from error
