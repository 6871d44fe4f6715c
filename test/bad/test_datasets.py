"""LeRobot datasets that are damaged, incomplete or contradict themselves: each fault is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.foreign_datasets import ACTION, SHAPES, STATE, Camera, Column, build, change_info, picture, write_video
from support.lerobot_runs import run

from ki_vla_ros.errors import ConfigurationError, InputError
from training.data.lerobot import Dataset

# Small ones with everything that can be damaged; those of several files are read from the front.
V21 = replace(SHAPES["holes v2.1"], lengths={3: 2, 7: 4})
V30 = SHAPES["holes v3.0"]
TABLES = replace(SHAPES["xarm v2.0"], lengths={0: 3})
DATA = "data/chunk-000/episode_000003.parquet"
VIDEO = "videos/chunk-000/observation.images.front/episode_000007.mp4"
IMAGES = "data/chunk-000/episode_000000.parquet"
FILE = "data/chunk-000/file-000.parquet"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
Damage = Callable[[Path], object]


def read(folder: Path) -> None:
    dataset = Dataset(folder)
    for episode in dataset.episodes:
        dataset.task_of(dataset.columns(episode))
        for camera in dataset.cameras:
            for _ in dataset.images(episode, camera):
                pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    shapes = {"v2.1": V21, "v3.0": V30, "tables": TABLES}
    return cache(lambda name: build(tmp_path_factory.mktemp("whole") / "dataset", shapes[name]))


def drop(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def cut(name: str, share: float) -> Damage:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return damage


def put(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def say(**changes: Any) -> Damage:
    return lambda folder: change_info(folder, **changes)


def change_feature(key: str, **changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        features = json.loads((folder / "meta/info.json").read_text())["features"]
        change_info(folder, features=features | {key: features[key] | changes})

    return damage


def column(name: str, key: str, make: Callable[[list[Any]], pa.Array]) -> Damage:
    """Replace a column of a table."""

    def damage(folder: Path) -> None:
        table = pq.ParquetFile(folder / name).read()
        at = table.column_names.index(key)
        pq.write_table(table.set_column(at, key, make(table[key].to_pylist())), folder / name)

    return damage


def swap_lines(name: str, old: str, new: str) -> Damage:
    def damage(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return damage


def swap_bytes(name: str, old: bytes, new: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes().replace(old, new))


def note(from_s: float | None) -> Damage:
    """Another time of the first episode in its video."""
    key = "videos/observation.images.front/from_timestamp"
    return column(EPISODES, key, lambda values: pa.array([from_s, *values[1:]], pa.float64()))


def forget(folder: Path) -> None:
    pq.write_table(pq.ParquetFile(folder / EPISODES).read().drop_columns("data/file_index"), folder / EPISODES)


def files(*contents: bytes | None, path: str | None = None) -> Callable[[list[Any]], pa.Array]:
    """A column of images with these in place of the first ones."""

    def make(values: list[Any]) -> pa.Array:
        rows = [{"bytes": content, "path": path} for content in contents] + values[len(contents) :]
        return pa.array(rows, pa.struct({"bytes": pa.binary(), "path": pa.string()}))

    return make


def png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image)[1].tobytes()


def set_first(value: Any) -> Callable[[list[Any]], pa.Array]:
    return lambda values: pa.array([[value, *values[0][1:]], *values[1:]], pa.list_(pa.float32()))


def record(count: int, **how: Any) -> Damage:
    camera = Camera("observation.images.front", "h264")
    return lambda folder: write_video(folder / VIDEO, [picture(camera, 7, i) for i in range(count)], camera, **how)


def record_depth(folder: Path) -> None:
    with av.open(str(folder / VIDEO), "w") as container:
        stream: Any = container.add_stream("ffv1", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "gray16le"
        for i in range(4):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64), 1000 + i, np.uint16), format="gray16le")
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


# What is damaged, how, and what is said.
FAULTS: list[tuple[str, Damage, str]] = [
    ("v2.1", drop("meta/episodes.jsonl"), r"expected .*meta/episodes\.jsonl, found none; is the copy whole"),
    ("v2.1", drop("meta/tasks.jsonl"), r"expected .*meta/tasks\.jsonl, found none; is the copy whole"),
    ("v3.0", drop("meta/tasks.parquet"), r"expected .*meta/tasks\.parquet, found none; is the copy whole"),
    ("v3.0", drop("meta/episodes/chunk-000/file-000.parquet"), r"expected episodes in meta/episodes/chunk-\*/file"),
    ("v2.1", drop(DATA), r"expected .*episode_000003\.parquet, found none; is the copy whole"),
    ("v3.0", drop("data/chunk-000/file-001.parquet"), r"expected .*data/chunk-000/file-001\.parquet, found none"),
    ("v2.1", drop(VIDEO), r"video .*episode_000007\.mp4: the episodes name it, but there is no such file"),
    (
        "v3.0",
        drop("videos/observation.images.front/chunk-000/file-001.mp4"),
        r"video .*file-001\.mp4: the episodes name it, but there is no such file",
    ),
    (
        "v2.1",
        cut("meta/episodes.jsonl", 0.8),
        r"episodes\.jsonl: line 2: expected one JSON object, got '{\"episode_ind",
    ),
    (
        "v2.1",
        cut("meta/episodes.jsonl", 0.48),
        r"expected 2 episodes of 6 frames as .*, got 1 of 2 in meta/episodes\.j",
    ),
    ("v2.1", cut("meta/tasks.jsonl", 0.8), r"tasks\.jsonl: line 2: expected one JSON object"),
    ("v2.1", put("meta/tasks.jsonl", b'["a"]\n'), r"tasks\.jsonl: line 1: expected one JSON object.*it is none"),
    ("v2.1", put("meta/tasks.jsonl", b"\xff\xfe"), r"tasks\.jsonl: expected a text with one JSON object per line"),
    ("v2.1", put("meta/tasks.jsonl", b'{"task": "a"}\n'), r"tasks\.jsonl: row 1: task_index: Field required"),
    (
        "v2.1",
        put("meta/tasks.jsonl", b'{"task_index": 0, "task": "a"}\n'),
        r"expected a task_index of meta/ \(0\), got 1",
    ),
    (
        "v2.1",
        put("meta/tasks.jsonl", b'{"task_index": 0, "task": "a"}\n{"task_index": 0, "task": "b"}\n'),
        r"tasks\.jsonl: expected one text for task 0, got 'a' and 'b'",
    ),
    ("v2.1", cut(DATA, 0.7), r"episode_000003\.parquet: not a whole parquet file"),
    ("v2.1", put(DATA, b""), r"episode_000003\.parquet: not a whole parquet file"),
    ("v2.1", put(DATA, POINTER), r"episode_000003\.parquet: .* got git-lfs's pointer to it; run 'git lfs pull'"),
    ("v2.1", put(VIDEO, POINTER), r"episode_000007\.mp4: .* got git-lfs's pointer to it; run 'git lfs pull'"),
    ("v2.1", put("meta/info.json", POINTER), r"info\.json: .* got git-lfs's pointer to it; run 'git lfs pull'"),
    ("v2.1", cut(VIDEO, 0.7), r"video .*episode_000007\.mp4: "),
    (
        "v2.1",
        record(3, fps=10),
        r"episode_000007\.mp4: expected 4 frames at 10 per second from 0 s on, .* none at 0\.3 s",
    ),
    ("v2.1", record(4, fps=15), r"episode_000007\.mp4: expected 4 frames at 10 per second .* none at 0\.1 s"),
    ("v2.1", record_depth, r"episode_000007\.mp4: expected colour, got gray16le, as depth has"),
    ("v2.1", swap_bytes(VIDEO, b"avc1", b"zzzz"), r"episode_000007\.mp4: expected a codec that this FFmpeg decodes"),
    ("v3.0", note(np.nan), r"expected videos/observation\.images\.front/from_timestamp of episode 3 in .*, got nan"),
    ("v3.0", note(-1.0), r"expected videos/observation\.images\.front/from_timestamp of episode 3 in .*, got -1\.0"),
    ("v3.0", note(None), r"expected videos/observation\.images\.front/from_timestamp of episode 3 in .*, got None"),
    ("v3.0", note(9.0), r"file-000\.mp4: expected 2 frames at 10 per second from 9 s on, but there is none at 9 s"),
    ("v3.0", forget, r"expected data/file_index of episode 3 in meta/episodes, got None"),
    ("v2.1", cut("meta/info.json", 0.5), r"info\.json: expected the description of a dataset as JSON, got none"),
    ("v2.1", say(total_episodes=3), r"expected 3 episodes of 6 frames as meta/info\.json says, got 2 of 6"),
    ("v3.0", say(total_frames=12), r"expected 4 episodes of 12 frames as meta/info\.json says, got 4 of 11"),
    ("v2.1", say(codebase_version="v1.6"), r"codebase_version: .*got 'v1\.6'; LeRobot's own tools bring older"),
    ("v2.1", say(codebase_version="v4.0"), r"codebase_version: .*'v2\.0', 'v2\.1' or 'v3\.0', got 'v4\.0'"),
    ("v2.1", say(codebase_version=None), r"codebase_version: .*got None"),
    ("v2.1", say(codebase_version="v3.0"), r"expected .*meta/tasks\.parquet, found none"),
    ("v2.1", say(fps="fast"), r"info\.json: fps.*got 'fast'"),
    ("v2.1", say(fps=-10), r"info\.json: fps.*got -10"),
    ("v2.1", say(features=None), r"info\.json: features: .*got None"),
    (
        "v2.1",
        say(features={STATE: {"dtype": "float32"}}),
        r"info\.json: features\.observation\.state\.shape: Field req",
    ),
    ("v2.1", say(data_path="data/{other}.parquet"), r"expected a path with episode_chunk, episode_index in braces"),
    ("v2.1", say(data_path="../{episode_index}.parquet"), r"expected paths inside it in meta/info\.json, got \.\./3"),
    ("v2.1", say(data_path="/data/{episode_index}.parquet"), r"expected paths inside it in meta/info\.json, got /data"),
    ("v2.1", say(video_path=None), r"expected a video_path for observation\.images\.front in meta/info\.json"),
    (
        "v2.1",
        swap_lines("meta/episodes.jsonl", '"length": 4', '"length": 0'),
        r"episodes\.jsonl: row 2: length: .*greater than 0, got 0",
    ),
    (
        "v2.1",
        swap_lines("meta/episodes.jsonl", '"episode_index": 7', '"episode_index": 3'),
        r"episodes\.jsonl: expected one row per episode, got two of episode 3",
    ),
    (
        "v2.1",
        lambda folder: (
            swap_lines("meta/episodes.jsonl", '"length": 2', '"length": 3')(folder),
            swap_lines("meta/episodes.jsonl", '"length": 4', '"length": 3')(folder),
        ),
        r"episode_000003\.parquet: expected 3 rows of episode 3 on end, got 2$",
    ),
    (
        "v2.1",
        column(DATA, "episode_index", lambda values: pa.array([0] * len(values))),
        r"episode_000003\.parquet: expected 2 rows of episode 3 on end, got 0 and 2 of others",
    ),
    (
        "v3.0",
        column(FILE, "episode_index", lambda values: pa.array([3, 7, 3, 7, 7, 7])),
        r"file-000\.parquet: expected 2 rows of episode 3 on end, got 2 and 4 of others",
    ),
    (
        "v3.0",
        column(FILE, "timestamp", lambda values: pa.array([0.0, 0.13, *values[2:]], pa.float32())),
        r"episode 3: expected a timestamp every 1 / 10 s, got 0\.13 s for frame 1, not 0\.1 s",
    ),
    (
        "v2.1",
        lambda folder: pq.write_table(pq.ParquetFile(folder / DATA).read().drop_columns(ACTION), folder / DATA),
        r"episode_000003\.parquet: expected one column 'action', as meta/info\.json says, got observation\.state, time",
    ),
    ("v2.1", change_feature(STATE, shape=[8]), r"column 'observation\.state': expected 8 numbers in each row, got 6"),
    (
        "v2.1",
        column(DATA, STATE, lambda values: pa.array([values[0][:5], [*values[1], 0.0]], pa.list_(pa.float32()))),
        r"column 'observation\.state': expected 6 numbers in each row, got 5, 7",
    ),
    ("v2.1", column(DATA, STATE, set_first(None)), r"column 'observation\.state': expected numbers, got none in 1 pl"),
    (
        "v2.1",
        column(DATA, STATE, set_first(np.nan)),
        r"expected finite numbers in observation\.state, got \[nan, .*frame 0",
    ),
    ("v2.1", column(DATA, ACTION, set_first(np.inf)), r"expected finite numbers in action, got \[inf, .*for frame 0"),
    (
        "v2.1",
        column(DATA, ACTION, lambda values: pa.array([["a"] * 6] * len(values))),
        r"column 'action': expected numbers, got string",
    ),
    (
        "tables",
        column(IMAGES, "observation.image", files(png(np.zeros((28, 28), np.uint16)))),
        r"frame 0: observation\.image: expected a colour image, got a png of 16 bits, as depth has",
    ),
    (
        "tables",
        column(IMAGES, "observation.image", files(png(np.zeros((28, 28, 3), np.uint8))[:-20])),
        r"frame 0: observation\.image: expected a whole png image",
    ),
    (
        "tables",
        column(IMAGES, "observation.image", files(b"\x49\x49\x2a\x00" + bytes(100))),
        r"frame 0: observation\.image: expected a jpeg or png image",
    ),
    (
        "tables",
        column(IMAGES, "observation.image", files(None)),
        r"frame 0: observation\.image: expected the bytes of an image, got none",
    ),
    (
        "tables",
        column(IMAGES, "observation.image", files(None, path="/home/someone/frame_000000.png")),
        r"observation\.image: expected an image in the table or in the .*folder, got only the path '/home/someone/fra",
    ),
    (
        "tables",
        column(IMAGES, "observation.image", files(None, path="images/frame_000000.png")),
        r"expected an image in the table or in the .*got only the path 'images/fra.*ask whoever made the dataset",
    ),
    (
        "tables",
        column(IMAGES, "observation.image", lambda values: pa.array([[1, 2]] * len(values))),
        r"frame 0: observation\.image: expected the bytes of an image, got others",
    ),
]


@pytest.mark.parametrize(("name", "damage", "message"), FAULTS, ids=[message[:60] for _, _, message in FAULTS])
def test_a_fault_is_named(
    whole: Callable[[str], Path], tmp_path: Path, name: str, damage: Damage, message: str
) -> None:
    folder = tmp_path / "dataset"
    shutil.copytree(whole(name), folder)
    damage(folder)
    with pytest.raises((ConfigurationError, InputError), match=message):
        read(folder)


def test_what_is_damaged_was_whole(whole: Callable[[str], Path]) -> None:
    for name in ("v2.1", "v3.0", "tables"):
        read(whole(name))


def test_a_place_without_a_dataset_says_what_to_do(
    whole: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("lerobot/pusht", "datasets/lerobot/pusht", "https://huggingface.co/datasets/lerobot/pusht"):
        with pytest.raises(ConfigurationError, match=r"--repo-type dataset lerobot/pusht --local-dir FOLDER"):
            Dataset(Path(name))
    with pytest.raises(ConfigurationError, match=r"found no such folder$"):
        Dataset(tmp_path / "pusht")
    with pytest.raises(ConfigurationError, match=r"the folders dataset in it have one: name one of them"):
        Dataset(whole("v2.1").parent)
    with pytest.raises(ConfigurationError, match="found a file; name the dataset's folder"):
        Dataset(whole("v2.1") / "meta/info.json")


def test_a_command_ends_with_one_line(
    whole: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("to-bag", "lerobot/pusht", "--out", tmp_path / "bag") == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("convert: dataset lerobot/pusht: expected") and "\n" not in said


def test_a_camera_of_depth_is_refused_by_name(tmp_path: Path) -> None:
    dataset = Dataset(build(tmp_path / "dataset", SHAPES["kinect v2.1"]))
    for camera in ("observation.images.tof", "observation.images.range", "observation.images.kinect.transformed_depth"):
        with pytest.raises(ConfigurationError, match=rf"colour images of camera '{camera}', got .*depth"):
            dataset.images(dataset.episodes[0], camera)
    with pytest.raises(ConfigurationError, match=r"colour images of camera 'top', got those of kinect\.color"):
        dataset.images(dataset.episodes[0], "top")


def test_a_dataset_of_links_is_read(whole: Callable[[str], Path], tmp_path: Path) -> None:
    """The cache of the Hugging Face Hub has the files elsewhere, under their hash."""
    for number, path in enumerate(sorted(path for path in whole("v2.1").rglob("*") if path.is_file())):
        link = tmp_path / "snapshot" / path.relative_to(whole("v2.1"))
        link.parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "blobs").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "blobs" / str(number))
        link.symlink_to(tmp_path / "blobs" / str(number))
    read(tmp_path / "snapshot")


def test_a_vector_of_one_is_a_number_however_it_is_stored(tmp_path: Path) -> None:
    kinds = {"scalar": pa.float32(), "list": pa.list_(pa.float32()), "fixed": pa.list_(pa.float32(), 1)}
    columns = [Column(key, None, 1, kind) for key, kind in kinds.items()]
    dataset = Dataset(build(tmp_path / "dataset", replace(V30, columns=columns, cameras=())))
    read_back = dataset.columns(dataset.episodes[0])
    assert [read_back[key].shape for key in kinds] == [(2,)] * 3
