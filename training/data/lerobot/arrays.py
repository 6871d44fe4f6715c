"""From a dataset to the arrays that `RobotFrames` draws from, in memory.

Legend: F frames, V cameras, S image size, H horizon, D dimensions of the state, A of the action.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ki_vla_ros.bundle import file_sha256
from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.policy import resize_with_pad
from ki_vla_ros.robot import Robot
from training.data.batch import Arrays, ChunkTiming
from training.data.lerobot.dataset import Dataset
from training.data.lerobot.layout import ACTIONS, STATES
from training.data.lerobot.robot_columns import read_robot_columns

Ends = Literal["drop", "hold"]


def load_dataset(
    dataset: Dataset,
    *,
    cameras: Sequence[str],
    image_size: int,
    horizon: int,
    period_s: float,
    ends: Ends = "drop",
    robot: Robot | None = None,
) -> Arrays:
    """All frames of a dataset; ConfigurationError if it lacks what is asked for.

    `images` [F, V, S, S, 3] uint8 in the order of `cameras`, `state` [F, D] and `chunk` [F, H, A] float32, `task` [F],
    `episode` [F]. `chunk[i]` holds the actions of frame i and of those after it. Near an episode's end there are fewer
    than `horizon`: such frames are left out ("drop"), or the last action is repeated ("hold": right if the arm stays).
    With `robot`, state and actions are those of its file, in its order and units; else the dataset's own.
    """
    if abs(dataset.info.fps * period_s - 1.0) > 1e-6:
        raise ConfigurationError(
            f"dataset {dataset.folder}: expected {1.0 / period_s:g} frames per second, as actions are {period_s:g} s "
            f"apart, got {dataset.info.fps}; convert the bags with --fps {round(1.0 / period_s)}"
        )
    state_key, action_key = dataset.state_key, dataset.action_key
    if robot is None and (state_key is None or action_key is None):
        wanted = STATES if state_key is None else ACTIONS
        raise ConfigurationError(
            f"dataset {dataset.folder}: expected a column {' or '.join(wanted)}, got {', '.join(dataset.info.features)}"
        )
    for key, reason in dataset.ignored.items():
        tqdm.write(f"dataset {dataset.folder}: {key} is left out: {reason}", file=sys.stderr)
    parts: list[Arrays] = []
    for episode in tqdm(dataset.episodes, desc="load", unit="episode", mininterval=5):
        columns = dataset.columns(episode)
        if robot is not None:
            state_FD, action_FA = read_robot_columns(dataset, robot, columns)
        else:
            assert state_key is not None and action_key is not None
            state_FD, action_FA = (columns[key].reshape(episode.length, -1) for key in (state_key, action_key))
        if action_FA is None:
            raise ConfigurationError(f"dataset {dataset.folder}: expected a column {' or '.join(ACTIONS)}, got none")
        chunk_FHA = make_chunks(action_FA, horizon, ends)
        if not len(chunk_FHA):
            continue
        frames = len(chunk_FHA)
        images = np.empty((frames, len(cameras), image_size, image_size, 3), dtype=np.uint8)
        for view, camera in enumerate(cameras):
            for i, rgb_HWC in zip(range(frames), dataset.images(episode, camera), strict=False):
                images[i, view] = resize_with_pad(rgb_HWC, image_size)
        parts.append(
            {
                "images": images,
                "state": state_FD[:frames].astype(np.float32),
                "chunk": chunk_FHA.astype(np.float32),
                "task": np.array(dataset.task_of(columns)[:frames]),
                "episode": np.full(frames, episode.index, dtype=np.int64),
            }
        )
    if not parts:
        raise ConfigurationError(
            f"dataset {dataset.folder}: no episode has the {horizon} frames of a chunk; take ends='hold', or record "
            "longer ones"
        )
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def load_recorded(
    folder: Path, robot: Robot, timing: ChunkTiming, meta: dict[str, Any]
) -> tuple[Arrays, dict[str, Any]]:
    """Arrays of the dataset in the robot's units, and `meta` with a fingerprint that covers it as well.

    An episode of the demo ends with the arm at its goal, so chunks that reach past the end stay there.
    """
    arrays = load_dataset(
        Dataset(folder),
        cameras=[camera.key for camera in robot.cameras],
        image_size=timing.image_size,
        horizon=timing.horizon,
        period_s=timing.period_s,
        ends="hold",
        robot=robot,
    )
    digest = hashlib.sha256(meta["fingerprint"].encode())
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)} {file_sha256(path)}".encode())
    return arrays, meta | {"fingerprint": digest.hexdigest()}


def make_chunks(action_FA: NDArray[np.floating], horizon: int, ends: Ends) -> NDArray[np.floating]:
    """[F, H, A]: each frame's action and those after it; with "drop", F is smaller by `horizon` - 1."""
    last = len(action_FA) - 1
    frames = len(action_FA) if ends == "hold" else max(0, len(action_FA) - horizon + 1)
    chunk_FHA: NDArray[np.floating] = action_FA[np.minimum(np.arange(frames)[:, None] + np.arange(horizon), last)]
    return chunk_FHA
