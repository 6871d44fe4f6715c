"""Two arms that exist nowhere, with robot files and datasets: different joints, cameras and tasks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from support.foreign_datasets import Camera, Column, Shape, build
from support.recipes import SIZES
from support.samples import make_robot
from training.config import TrainingConfig
from training.data.lerobot import ACTION, STATE

ARMS: Mapping[str, Any] = {
    "lifter": {"joints": 3, "cameras": ("front",), "relative": True},
    "reacher": {"joints": 5, "cameras": ("left", "right"), "relative": False},
}


def make_arms(folder: Path) -> Path:
    """A robot file and a dataset for each arm, in the folder."""
    for name, fields in ARMS.items():
        cameras, relative = fields["cameras"], fields["relative"]
        robot = make_robot(name, fields["joints"], cameras=cameras, relative=relative, reach=20.0)
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(robot.model_dump(mode="json", exclude_none=True)))
        names = [dimension.name for dimension in robot.state]
        columns = [Column(key, names, len(names)) for key in (STATE, ACTION)]
        views = [Camera(f"observation.images.{camera}", "png") for camera in cameras]
        shape = Shape("v3.0", columns, views, lengths=dict.fromkeys(range(6), 7), tasks=(f"move the {name}",))
        build(folder / name, shape)
    return folder


def entry(arms: Path, name: str, **more: Any) -> dict[str, Any]:
    """The arm's data, as a source has it."""
    return {"lerobot": str(arms / name), "robot": str(arms / f"{name}.yaml"), **more}


def arm_stage(**changes: Any) -> dict[str, Any]:
    return {
        "name": "joint",
        "steps": 2,
        "learning_rate": 1e-3,
        "losses": {"fast": 1.0, "flow": 1.0},
        "train": ["vision", "backbone", "expert"],
        "sources": {"robot": 4},
    } | changes


def arm_run(arms: Path, out: Path, *entries: Mapping[str, Any], **changes: Any) -> TrainingConfig:
    """A run for the lifter on these data; what is None is left out."""
    fields: dict[str, Any] = {
        "name": "any",
        "robot": str(arms / "lifter.yaml"),
        "out": str(out),
        "sources": {"robot": [dict(entry) for entry in entries]},
        "model": SIZES | {"state": "text"},
        "prompt": {"length": 40},
        "fast_vocabulary": 256,
        "stages": [arm_stage()],
    }
    given = {key: value for key, value in (fields | changes).items() if value is not None}
    return TrainingConfig.model_validate(given)
