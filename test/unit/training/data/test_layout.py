"""A dataset on disk, field by field, as in the format's description and in LeRobot's own v3.0 files."""

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ki_vla_ros.errors import ConfigurationError, InputError
from training.convert import writer
from training.convert.episodes import Frame
from training.convert.statistics import PixelCounts, describe_values
from training.convert.writer import DatasetWriter
from training.data.lerobot import video
from training.data.lerobot.dataset import Dataset

FPS = 5
JOINTS = ["shoulder", "elbow"]
COLUMNS = {"observation.state": JOINTS, "action": JOINTS}
KEYS = {name: f"observation.images.{name}" for name in ("scene", "wrist")}
FIGURES = {"min", "max", "mean", "std", "count", "q01", "q10", "q50", "q90", "q99"}
SCENE, WRIST = "observation.images.scene", "observation.images.wrist"
TASKS = [["lift", "lift", "lower"], ["lower"] * 4]


def picture(episode: int, i: int, camera: str) -> np.ndarray:
    """Smooth, as a codec expects, and different in each frame and camera."""
    y, x = np.mgrid[0:48, 0:64] / 64.0
    shift = 0.3 * episode + 0.1 * i + (camera == "wrist")
    waves = [np.sin(3 * x + shift), np.cos(4 * y - shift), np.sin(2 * (x + y) + 2 * shift)]
    return (127.5 + 120 * np.stack(waves, axis=-1)).astype(np.uint8)


def frame(episode: int, i: int) -> Frame:
    state_S = np.array([episode + 0.1 * i, -0.3 * i])
    images = {camera: picture(episode, i, camera) for camera in ("scene", "wrist")}
    columns = {"observation.state": state_S, "action": state_S + 0.01}
    return Frame(1_790_000_000_000_000_000 + i, TASKS[episode][i], columns, images)


def write(folder: Path, **how: Any) -> Path:
    with DatasetWriter(folder, fps=FPS, columns=COLUMNS, cameras=KEYS, source={}, **how) as out:
        for episode, tasks in enumerate(TASKS):
            for i in range(len(tasks)):
                out.add(frame(episode, i))
            out.end_episode()
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("dataset") / "robot", robot_type="two_joints")


def test_files_are_those_of_the_format(folder: Path) -> None:
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "meta/info.json",
        "meta/stats.json",
        "meta/tasks.parquet",
        "meta/episodes/chunk-000/file-000.parquet",
        "meta/ki_vla_ros.json",
        "data/chunk-000/file-000.parquet",
        f"videos/{SCENE}/chunk-000/file-000.mp4",
        f"videos/{WRIST}/chunk-000/file-000.mp4",
    }


def test_info(folder: Path) -> None:
    video_feature = {
        "dtype": "video",
        "shape": [48, 64, 3],
        "names": ["height", "width", "channels"],
        "info": {
            "video.height": 48,
            "video.width": 64,
            "video.codec": "h264",
            "video.pix_fmt": "yuv420p",
            "video.fps": FPS,
            "video.channels": 3,
            "has_audio": False,
            "video.g": 2,
            "video.crf": 18,
            "is_depth_map": False,
        },
    }
    number = {"shape": [1], "names": None}
    assert json.loads((folder / "meta/info.json").read_text()) == {
        "codebase_version": "v3.0",
        "robot_type": "two_joints",
        "total_episodes": 2,
        "total_frames": 7,
        "total_tasks": 2,
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": FPS,
        "splits": {"train": "0:2"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "features": {
            "observation.state": {"dtype": "float32", "shape": [2], "names": JOINTS},
            "action": {"dtype": "float32", "shape": [2], "names": JOINTS},
            SCENE: video_feature,
            WRIST: video_feature,
            "stamp_ns": {"dtype": "int64", **number},
            "timestamp": {"dtype": "float32", **number},
            "frame_index": {"dtype": "int64", **number},
            "episode_index": {"dtype": "int64", **number},
            "index": {"dtype": "int64", **number},
            "task_index": {"dtype": "int64", **number},
        },
    }


def test_rows(folder: Path) -> None:
    table = pq.ParquetFile(folder / "data/chunk-000/file-000.parquet").read()
    vector = pa.list_(pa.float32(), 2)
    assert {field.name: field.type for field in table.schema} == {
        "observation.state": vector,
        "action": vector,
        "stamp_ns": pa.int64(),
        "timestamp": pa.float32(),
        "frame_index": pa.int64(),
        "episode_index": pa.int64(),
        "index": pa.int64(),
        "task_index": pa.int64(),
    }
    rows = table.to_pydict()
    assert rows["frame_index"] == [0, 1, 2, 0, 1, 2, 3] and rows["episode_index"] == [0, 0, 0, 1, 1, 1, 1]
    assert rows["index"] == list(range(7)) and rows["task_index"] == [0, 0, 1, 1, 1, 1, 1]
    assert np.array_equal(rows["timestamp"], np.array(rows["frame_index"], dtype=np.float32) / np.float32(FPS))
    assert rows["stamp_ns"][3:5] == [1_790_000_000_000_000_000, 1_790_000_000_000_000_001]
    assert rows["action"][6] == pytest.approx([1.31, -0.89])


def test_tasks_have_an_index_that_pandas_finds(folder: Path) -> None:
    table = pq.ParquetFile(folder / "meta/tasks.parquet").read()
    assert table.to_pydict() == {"task_index": [0, 1], "task": ["lift", "lower"]}
    assert json.loads(table.schema.metadata[b"pandas"])["index_columns"] == ["task"]


def test_episodes(folder: Path) -> None:
    first, second = pq.ParquetFile(folder / "meta/episodes/chunk-000/file-000.parquet").read().to_pylist()
    features = json.loads((folder / "meta/info.json").read_text())["features"]
    figures = {f"stats/{feature}/{name}" for feature in features for name in FIGURES}
    video_keys = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
    assert set(first) - figures == {
        "episode_index",
        "tasks",
        "length",
        "data/chunk_index",
        "data/file_index",
        "dataset_from_index",
        "dataset_to_index",
        "meta/episodes/chunk_index",
        "meta/episodes/file_index",
        *(f"videos/{key}/{name}" for key in (SCENE, WRIST) for name in video_keys),
    }
    assert figures <= set(first)
    assert [(row["tasks"], row["length"]) for row in (first, second)] == [(["lift", "lower"], 3), (["lower"], 4)]
    assert (first["dataset_from_index"], first["dataset_to_index"]) == (0, 3)
    assert (second["dataset_from_index"], second["dataset_to_index"]) == (3, 7)
    times = [[row[f"videos/{SCENE}/{name}_timestamp"] for name in ("from", "to")] for row in (first, second)]
    assert times == [[0.0, 3 / FPS], [3 / FPS, 7 / FPS]]
    assert second["stats/observation.state/max"] == pytest.approx([1.3, 0.0])
    assert np.shape(second[f"stats/{WRIST}/q50"]) == (3, 1, 1) and second[f"stats/{WRIST}/count"] == [4]


def test_figures_of_the_whole_dataset_are_those_of_its_rows_and_pixels(folder: Path) -> None:
    stats = json.loads((folder / "meta/stats.json").read_text())
    assert set(stats) == set(json.loads((folder / "meta/info.json").read_text())["features"])
    assert all(set(entry) == FIGURES for entry in stats.values())
    pixels = np.stack([picture(e, i, "wrist") for e, tasks in enumerate(TASKS) for i in range(len(tasks))]) / 255.0
    flat = pixels.reshape(-1, 3)
    for name, value in {"min": flat.min(0), "max": flat.max(0), "mean": flat.mean(0), "std": flat.std(0)}.items():
        np.testing.assert_allclose(np.array(stats[WRIST][name]), value.reshape(3, 1, 1), atol=1e-12)
    for name, share in {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}.items():
        np.testing.assert_allclose(np.array(stats[WRIST][name])[:, 0, 0], np.quantile(flat, share, axis=0), atol=1e-12)
    rows = pq.ParquetFile(folder / "data/chunk-000/file-000.parquet").read().to_pydict()
    assert stats["action"] == describe_values(np.array(rows["action"], dtype=np.float32))
    assert stats["action"]["q90"] == pytest.approx(np.quantile(rows["action"], 0.9, axis=0))
    assert stats["index"]["count"] == [7] and stats["index"]["mean"] == [3.0]


def test_quantile_between_two_pixels_is_between_their_values() -> None:
    counts = PixelCounts()
    counts.add(np.array([[[0, 10, 7], [255, 20, 7]]], dtype=np.uint8))
    assert np.array(counts.describe()["q50"]).ravel() * 255 == pytest.approx([127.5, 15.0, 7.0])


def test_video_frames_are_at_their_times_and_near_the_pictures(folder: Path) -> None:
    with av.open(str(folder / f"videos/{SCENE}/chunk-000/file-000.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec.canonical_name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", FPS)
        times = [float(frame.pts * stream.time_base) for frame in container.decode(stream)]
    assert times == pytest.approx([i / FPS for i in range(7)], abs=1e-9)
    dataset = Dataset(folder)
    for episode in dataset.episodes:
        for camera in dataset.cameras:
            for i, rgb_HWC in enumerate(dataset.images(episode, camera)):
                error = rgb_HWC.astype(float) - picture(episode.index, i, camera)
                assert 10 * np.log10(255**2 / np.mean(error**2)) > 38.0


def test_full_files_and_folders_are_followed_by_new_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A MiB is shrunk to ten bytes, so that each episode fills its files; a folder holds two files.

    The encoder looks dozens of frames ahead, so a video's size is known late: these episodes are longer than that.
    """
    whole = DatasetWriter(
        tmp_path / "sizes", fps=FPS, columns=COLUMNS, cameras={"scene": KEYS["scene"]}, source={}
    ).info
    monkeypatch.setattr(writer, "MIB", 10)
    monkeypatch.setattr(video, "MIB", 10)
    monkeypatch.setitem(globals(), "TASKS", [["lift"] * 80] * 3)
    write(tmp_path / "full", info=whole.model_copy(update={"chunks_size": 2}))
    dataset = Dataset(tmp_path / "full")
    places = ["chunk-000/file-000", "chunk-000/file-001", "chunk-001/file-000"]
    for kind, suffix in (("data", "parquet"), ("meta/episodes", "parquet"), (f"videos/{WRIST}", "mp4")):
        found = sorted(str(path.relative_to(tmp_path / "full" / kind)) for path in (dataset.folder / kind).rglob("f*"))
        assert found == [f"{place}.{suffix}" for place in places], kind
    for episode in dataset.episodes:
        assert episode.row[f"videos/{WRIST}/from_timestamp"] == 0.0
        states = [frame(episode.index, i).columns["observation.state"] for i in range(80)]
        np.testing.assert_array_equal(dataset.columns(episode)["observation.state"], np.array(states, np.float32))
        for i, rgb_HWC in enumerate(dataset.images(episode, "wrist")):
            assert np.abs(rgb_HWC.astype(int) - picture(episode.index, i, "wrist")).mean() < 3


def test_what_was_written_before_an_exception_is_a_valid_dataset(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        DatasetWriter(tmp_path / "part", fps=FPS, columns=COLUMNS, cameras=KEYS, source={}) as out,
    ):
        out.add(frame(0, 0))
        out.add(frame(0, 1))
        raise KeyboardInterrupt
    dataset = Dataset(tmp_path / "part")
    assert [len(list(dataset.images(episode, "wrist"))) for episode in dataset.episodes] == [2]


def only(rgb_HWC: np.ndarray) -> Frame:
    return Frame(0, "lift", dict.fromkeys(COLUMNS, np.zeros(2)), {"scene": rgb_HWC})


def new(folder: Path, **how: Any) -> DatasetWriter:
    given = {"columns": COLUMNS, "cameras": {"scene": KEYS["scene"]}} | how
    return DatasetWriter(folder, fps=FPS, source={}, **given)


def test_a_writer_refuses_what_does_not_fit(tmp_path: Path) -> None:
    with new(tmp_path / "new") as out:
        with pytest.raises(InputError, match=r"expected cameras \['scene'\] .*, got cameras \['scene', 'wrist'\]"):
            out.add(frame(0, 0))
        with pytest.raises(InputError, match="expected a colour image, height x width x 3 uint8, got 48 x 64 uint16"):
            out.add(only(np.zeros((48, 64), np.uint16)))
        out.add(only(np.zeros((48, 64, 3), np.uint8)))
        with pytest.raises(InputError, match="expected 64 x 48 pixels as before, got 32 x 32"):
            out.add(only(np.zeros((32, 32, 3), np.uint8)))
    with pytest.raises(ConfigurationError, match="exists already"):
        new(tmp_path / "new")
    with (
        pytest.raises(InputError, match=r"expected .*'observation.state': 2, 'action': 3.*, got .*'action': 2"),
        new(tmp_path / "other", columns={**COLUMNS, "action": ["x", "y", "z"]}) as out,
    ):
        out.add(only(np.zeros((48, 64, 3), np.uint8)))
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_nothing_is_left_of_a_dataset_without_a_frame(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match="expected at least one frame, got none; nothing was written"),
        new(tmp_path / "a"),
    ):
        pass
    with pytest.raises(KeyboardInterrupt), new(tmp_path / "b"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_dataset_is_absent_until_it_is_whole(tmp_path: Path) -> None:
    with new(tmp_path / "robot") as out:
        out.add(only(np.zeros((48, 64, 3), np.uint8)))
        assert not (tmp_path / "robot").exists()
        with (
            pytest.raises(ConfigurationError, match="another process that is writing it now"),
            new(tmp_path / "robot"),
        ):
            pass
    assert len(Dataset(tmp_path / "robot").episodes) == 1
    with pytest.raises(ConfigurationError, match="exists already"), new(tmp_path / "late") as out:
        out.add(only(np.zeros((48, 64, 3), np.uint8)))
        (tmp_path / "late").mkdir()
        (tmp_path / "late/notes.txt").write_text("of someone else")
    assert [path.name for path in (tmp_path / "late").iterdir()] == ["notes.txt"]


def test_state_and_action_have_names_and_widths_of_their_own(tmp_path: Path) -> None:
    with new(tmp_path / "robot", columns=COLUMNS | {"action": ["x.vel", "y.vel", "gripper.pos"]}) as out:
        columns = {"observation.state": np.array([1.0, 2.0]), "action": np.array([3.0, 4.0, 5.0])}
        out.add(Frame(0, "lift", columns, {"scene": picture(0, 0, "scene")}))
    dataset = Dataset(tmp_path / "robot")
    columns = dataset.columns(dataset.episodes[0])
    assert dataset.state_names == ("shoulder", "elbow") and columns["observation.state"].tolist() == [[1.0, 2.0]]
    assert dataset.action_names == ("x.vel", "y.vel", "gripper.pos")
    assert columns["action"].tolist() == [[3.0, 4.0, 5.0]]


def test_a_vector_of_one_number(tmp_path: Path) -> None:
    with new(tmp_path / "robot", columns=COLUMNS | {"action": ["gripper"]}) as out:
        for i in range(3):
            columns = {"observation.state": np.array([1.0, 2.0]), "action": np.array([0.5 * i])}
            out.add(Frame(i, "lift", columns, {"scene": picture(0, i, "scene")}))
    dataset = Dataset(tmp_path / "robot")
    assert dataset.action_names == ("gripper",)
    assert dataset.columns(dataset.episodes[0])["action"].tolist() == [0.0, 0.5, 1.0]
    assert json.loads((tmp_path / "robot/meta/stats.json").read_text())["action"]["max"] == [1.0]


@pytest.mark.parametrize(("height", "width"), [(47, 64), (48, 63), (37, 53)])
def test_an_image_of_odd_size_comes_back_whole(tmp_path: Path, height: int, width: int) -> None:
    rgb_HWC = np.ascontiguousarray(picture(0, 0, "scene")[:height, :width])
    with new(tmp_path / "robot") as out:
        out.add(only(rgb_HWC))
    dataset = Dataset(tmp_path / "robot")
    feature = json.loads((tmp_path / "robot/meta/info.json").read_text())["features"][SCENE]
    assert feature["shape"] == [height, width, 3] and feature["info"]["video.pix_fmt"] == "yuv444p"
    (back_HWC,) = dataset.images(dataset.episodes[0], "scene")
    assert back_HWC.shape == rgb_HWC.shape and np.abs(back_HWC.astype(int) - rgb_HWC).max() < 12


def change_info(folder: Path, **changes: Any) -> None:
    path = folder / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebase_version": "v1.6"}, r"codebase_version.*got 'v1.6'; LeRobot's own tools bring older"),
        ({"total_frames": 8}, "expected 2 episodes of 8 frames as meta/info.json says, got 2 of 7"),
        ({"fps": 0}, r"fps: .*greater than 0\.001, got 0"),
        ({"codebase_version": None}, "codebase_version: .*, got None"),
        ({"data_path": "../{chunk_index}/{file_index}"}, "expected paths inside it in meta/info.json, got ../0/0"),
        ({"fps": 6}, "expected a timestamp every 1 / 6 s"),
    ],
)
def test_a_dataset_that_contradicts_its_metadata_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    change_info(write(tmp_path / "robot"), **changes)
    with pytest.raises((ConfigurationError, InputError), match=message):
        for episode in (dataset := Dataset(tmp_path / "robot")).episodes:
            dataset.columns(episode)


def test_parts_that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"expected a LeRobot dataset with meta/info.json, found none"):
        Dataset(tmp_path)
    folder = write(tmp_path / "robot")
    (folder / f"videos/{WRIST}/chunk-000/file-000.mp4").unlink()
    dataset = Dataset(folder)
    with pytest.raises(InputError, match="there is no such file"):
        next(dataset.images(dataset.episodes[0], "wrist"))
    with pytest.raises(ConfigurationError, match="camera 'top', got those of scene, wrist"):
        next(dataset.images(dataset.episodes[0], "top"))
    path = folder / f"videos/{SCENE}/chunk-000/file-000.mp4"
    longer = dataset.episodes[1].__class__(1, 5, ("lower",), dataset.episodes[1].row)
    with pytest.raises(
        InputError, match=r"expected 5 frames at 5 per second from 0.6 s on, but there is none at 1.4 s"
    ):
        list(dataset.images(longer, "scene"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"video .*file-000.mp4"):
        next(dataset.images(dataset.episodes[0], "scene"))
    (folder / "data/chunk-000/file-000.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigurationError, match="not a whole parquet file"):
        dataset.columns(dataset.episodes[0])
