"""A run's checkpoints: numbered folders, of which the newest counts and the last few are kept.

    checkpoint-000003/state.json           where the run stands, and what it must go on with
    checkpoint-000003/part-*.safetensors   weights, heads, the optimizer's state: a file per process (pieces.py)

A folder appears whole or not at all, also with several processes. Nothing here executes code from a file.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError
from torch import Tensor

from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.files import read_json
from ki_vla_ros.robot import Frozen
from training.storage import writing
from training.weights.pieces import PieceReader, save_pieces

STATE = "state.json"
NUMBERED = "checkpoint-{:06d}"
BEFORE = "resume.pt"  # in checkpoints of earlier versions, here or in the run's folder itself
Count = Annotated[int, Field(ge=0)]


class RunState(Frozen):
    """Where a run stands: the next step of a stage. `minutes` is the time that each stage has taken so far.

    `made_of` says what the run must go on with, by dotted name. `files` were saved together, with `identity` in each.
    """

    stage: Count = 0
    step: Count = 0
    minutes: dict[str, float] = Field(default_factory=dict)
    made_of: dict[str, Any] = Field(default_factory=dict)
    identity: str = ""
    files: tuple[str, ...] = ()


def save_run(out: Path, state: RunState, tensors: Mapping[str, Tensor], keep: int, first: bool = True) -> None:
    """Save a run's next checkpoint, then remove all but the last `keep`; every process must call this.

    `first`: this is the first process. ConfigurationError if the disk is full; the earlier ones are then still there.
    """
    earlier = numbered(out) if first else {}
    place = out / NUMBERED.format(max(earlier, default=0) + 1)

    def complete(folder: Path, identity: str, files: list[str]) -> None:
        whole = state.model_copy(update={"identity": identity, "files": tuple(files)})
        with writing(place / STATE):
            (folder / STATE).write_text(whole.model_dump_json(indent=2) + "\n")

    save_pieces(place, tensors, complete)
    for number in sorted(earlier)[: max(0, len(earlier) + 1 - keep)]:
        shutil.rmtree(earlier[number])


def newest_checkpoint(out: Path) -> Path | None:
    """The folder that a run resumes from, None if it has not saved any.

    ConfigurationError if an earlier version saved it: that one drew other samples for the same step.
    """
    found = numbered(out)
    newest = found[max(found)] if found else out
    if (newest / BEFORE).exists():
        raise ConfigurationError(
            f"{newest}: expected a checkpoint with {STATE}, got one with {BEFORE} of an earlier version, whose steps "
            "drew other samples; let that version finish the run, or begin again in another folder under out"
        )
    return newest if found else None


def numbered(out: Path) -> dict[int, Path]:
    """The checkpoints of a run by their number; ConfigurationError if one is no folder of this run's own."""
    found = ((re.fullmatch(r"checkpoint-([0-9]{1,12})", path.name), path) for path in out.glob("checkpoint-*"))
    checkpoints = {int(match[1]): path for match, path in found if match is not None}
    for path in checkpoints.values():
        if path.is_symlink() or not path.is_dir():
            got = f"a link to {os.readlink(path)}" if path.is_symlink() else "a file"
            raise ConfigurationError(
                f"{path}: expected a checkpoint's folder, got {got}; a run replaces its checkpoints: move it away, or "
                "copy what it points to into its place"
            )
    return checkpoints


def read_state(folder: Path) -> RunState:
    """Where the run stood at a checkpoint; ConfigurationError if its file is missing or damaged."""
    path = folder / STATE
    remedy = "delete this checkpoint, and the run goes on from the one before"
    if not path.is_file():
        raise ConfigurationError(f"checkpoint {folder}: expected {STATE} to resume from, found none; {remedy}")
    try:
        return RunState.model_validate(read_json(path))
    except (OSError, ValueError, ValidationError) as error:
        raise ConfigurationError(
            f"{path}: expected the state of a run, as training saves it, got something else ({error}); {remedy}"
        ) from error


def open_run(folder: Path) -> tuple[RunState, PieceReader]:
    """A checkpoint's state and tensors; ConfigurationError unless they were saved together."""
    state = read_state(folder)
    return state, PieceReader(folder, state.identity, state.files)


def check_same(folder: Path, expected: Mapping[str, Any], got: Mapping[str, Any]) -> None:
    """ConfigurationError that names the first thing in which a checkpoint is not of this configuration."""
    for name in {**expected, **got}:
        ours, theirs = (given.get(name, "none") for given in (expected, got))
        if isinstance(ours, float) and isinstance(theirs, float) and math.isclose(ours, theirs, rel_tol=1e-6):
            continue  # statistics of the same data may be rounded otherwise on another machine
        if ours != theirs:
            raise ConfigurationError(
                f"resume {folder}: {name}: expected {ours}, as this configuration says, got {theirs}; keep the "
                "model, the robot, the data and the hints that the run began with, or name another folder under out"
            )
