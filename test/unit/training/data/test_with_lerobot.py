"""Our datasets in LeRobot's own library, and its own in ours; skipped where it is not installed (docs/data.md)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from support.foreign_datasets import Camera, picture

from ki_vla_ros.records import NS_PER_S
from training.convert.episodes import Frame
from training.convert.writer import DatasetWriter
from training.data.lerobot import Dataset

theirs: Any = pytest.importorskip("lerobot.datasets.lerobot_dataset", reason="lerobot is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # its own

FPS = 10
STATE_NAMES, ACTION_NAMES = ["shoulder", "elbow"], ["shoulder.vel", "elbow.vel", "gripper.pos"]
CAMERAS = (Camera("scene", "h264"), Camera("wrist", "h264", 37, 53))  # even and odd
LENGTHS = (7, 5)


def state(episode: int, i: int) -> np.ndarray:
    return np.array([episode + 0.25 * i, -0.5 * i])


def action(episode: int, i: int) -> np.ndarray:
    return np.array([0.125 * i, episode, 1.0 - i])


def task(episode: int, i: int) -> str:
    return "lift" if episode == 0 and i < 3 else "lower"


def images(episode: int, i: int) -> dict[str, np.ndarray]:
    return {camera.key: picture(camera, episode, i) for camera in CAMERAS}


def check_frames(folder: Path, dataset: Dataset, loss: float) -> None:
    """Both libraries read the same, and it is the truth."""
    loaded = theirs.LeRobotDataset(
        "local/robot",
        root=folder,
        video_backend="pyav",
        delta_timestamps={"action": [0.0, 1 / FPS]},
    )
    assert (loaded.num_episodes, loaded.num_frames, loaded.fps) == (len(LENGTHS), sum(LENGTHS), FPS)
    row = 0
    for episode in dataset.episodes:
        columns = dataset.columns(episode)
        ours = {name: list(dataset.images(episode, name)) for name in dataset.cameras}
        tasks = dataset.task_of(columns)
        for i in range(episode.length):
            item = loaded[row]
            row += 1
            np.testing.assert_array_equal(item["observation.state"].numpy(), state(episode.index, i))
            np.testing.assert_array_equal(columns["observation.state"][i], state(episode.index, i))
            following = min(i + 1, episode.length - 1)
            wanted = np.stack([action(episode.index, i), action(episode.index, following)])
            np.testing.assert_array_equal(item["action"].numpy(), wanted)
            np.testing.assert_array_equal(columns["action"][i], wanted[0])
            assert item["task"] == tasks[i] == task(episode.index, i)
            assert item["action_is_pad"].tolist() == [False, i == episode.length - 1]
            assert float(item["timestamp"]) == pytest.approx(columns["timestamp"][i]) == pytest.approx(i / FPS)
            for name, true_HWC in images(episode.index, i).items():
                their_HWC = item[f"observation.images.{name}"].numpy().transpose(1, 2, 0) * 255
                assert their_HWC.shape == true_HWC.shape == ours[name][i].shape
                assert np.abs(their_HWC - true_HWC).mean() < loss
                assert np.abs(their_HWC - ours[name][i]).mean() < 2.0


@pytest.mark.parametrize("video", ["h264", "jpeg"])
def test_lerobot_reads_ours(tmp_path: Path, video: Any) -> None:
    with DatasetWriter(
        tmp_path / "robot",
        fps=FPS,
        columns={"observation.state": STATE_NAMES, "action": ACTION_NAMES},
        cameras={camera.key: f"observation.images.{camera.key}" for camera in CAMERAS},
        source={},
        video=video,
    ) as out:
        for episode, length in enumerate(LENGTHS):
            for i in range(length):
                seen = images(episode, i)
                files = {name: simplejpeg.encode_jpeg(rgb_HWC, 98, "RGB", "420") for name, rgb_HWC in seen.items()}
                values = {"observation.state": state(episode, i), "action": action(episode, i)}
                out.add(Frame(i * NS_PER_S // FPS, task(episode, i), values, seen, files))
            out.end_episode()
    check_frames(tmp_path / "robot", Dataset(tmp_path / "robot"), 4.0)
    meta = theirs.LeRobotDatasetMetadata("local/robot", root=tmp_path / "robot")
    assert meta.names["observation.state"] == STATE_NAMES and meta.names["action"] == ACTION_NAMES
    every = np.array([action(e, i) for e, length in enumerate(LENGTHS) for i in range(length)], np.float32)
    np.testing.assert_allclose(meta.stats["action"]["mean"], every.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(meta.stats["action"]["q99"], np.quantile(every, 0.99, axis=0), atol=1e-6)
    assert meta.stats["observation.images.wrist"]["mean"].shape == (3, 1, 1)


@pytest.mark.parametrize("kind", ["video", "image"])
def test_ours_reads_lerobots(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its default codec takes no odd sizes: the other camera's images are cut."""
    if kind == "video":
        monkeypatch.setitem(globals(), "CAMERAS", (CAMERAS[0], Camera("wrist", "av1", 64, 80)))
    features: dict[str, Any] = {
        "observation.state": {"dtype": "float32", "shape": (2,), "names": STATE_NAMES},
        "action": {"dtype": "float32", "shape": (3,), "names": ACTION_NAMES},
        "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
        "next.done": {"dtype": "bool", "shape": (1,), "names": None},
    }
    for camera in CAMERAS:
        shape = (camera.height, camera.width, 3)
        names = ["height", "width", "channels"]
        features[f"observation.images.{camera.key}"] = {"dtype": kind, "shape": shape, "names": names}
    made = theirs.LeRobotDataset.create(
        "local/robot", FPS, features, root=tmp_path / "robot", use_videos=kind == "video"
    )
    for episode, length in enumerate(LENGTHS):
        for i in range(length):
            made.add_frame(
                {
                    "observation.state": state(episode, i).astype(np.float32),
                    "action": action(episode, i).astype(np.float32),
                    "next.reward": np.array([0.5 * i], np.float32),
                    "next.done": np.array([i == length - 1]),
                    "task": task(episode, i),
                }
                | {f"observation.images.{name}": image for name, image in images(episode, i).items()}
            )
        made.save_episode()
    made.finalize()
    dataset = Dataset(tmp_path / "robot")
    assert (dataset.state_names, dataset.action_names) == (tuple(STATE_NAMES), tuple(ACTION_NAMES))
    check_frames(tmp_path / "robot", dataset, 8.0 if kind == "video" else 1.0)
    columns = dataset.columns(dataset.episodes[1])
    assert columns["next.reward"].tolist() == [0.5 * i for i in range(LENGTHS[1])]
    assert columns["next.done"].tolist() == [False] * (LENGTHS[1] - 1) + [True]
