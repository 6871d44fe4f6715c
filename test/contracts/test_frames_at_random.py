"""Frames of LeRobot datasets read at random, against all of them read one after the other."""

from __future__ import annotations

import gc
import threading
import tracemalloc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.foreign_datasets import (
    ACTION,
    SHAPES,
    STATE,
    Camera,
    Column,
    Shape,
    build,
    change_info,
    picture,
    value,
    write_video,
)
from support.samples import make_robot

from ki_vla_ros.errors import ConfigurationError, InputError
from ki_vla_ros.policy import resize_with_pad
from ki_vla_ros.robot import Robot
from training.data.lerobot import Dataset, LeRobotSamples, read_robot_columns
from training.data.lerobot.pictures import Pictures, Wanted
from training.data.loader import Loader
from training.data.samples import RobotSample

SIZE = 24
ARRAY, POSE = "std_msgs/msg/Float64MultiArray", "geometry_msgs/msg/PoseStamped"


def robot_of(
    cameras: Mapping[str, str], state: Column, action: Column, fps: float, horizon: int = 4, **kind: Any
) -> Robot:
    """A robot with these cameras (by key) and columns, in the order that the dataset has; state in degrees."""

    def column(one: Column, i: int, **units: Any) -> dict[str, Any]:
        return {"column": one.key, "index": i, **units}

    joint = {"kind": "joint_position", "unit": "rad", "lower": -3.0, "upper": 3.0}
    actions: list[dict[str, Any]] = [
        {"name": f"a{i}", **joint, "max_velocity": 1.0, "output": "arm", "dataset": column(action, i)} | kind
        for i in range(action.width)
    ]
    for one in actions:  # what measures it is beside the point here
        one["source"] = {"joint": one["name"]}
    return Robot.model_validate(
        {
            "name": "some",
            "cameras": [{"name": name, "dataset": key} for name, key in cameras.items()],
            "state": [{"name": f"s{i}", **joint, "dataset": column(state, i, unit="deg")} for i in range(state.width)],
            "actions": actions,
            "outputs": [{"name": "arm", "topic": "arm/commands", "type": ARRAY}],
            "action_period_s": 1.0 / fps,
            "horizon": horizon,
        }
    )


def robot_for(shape: Shape, dataset: Dataset, **more: Any) -> Robot:
    columns = {column.key: column for column in shape.columns}
    state = columns[dataset.state_key] if dataset.state_key else next(iter(columns.values()))
    action = columns[str(dataset.action_key)]
    return robot_of({f"c{v}": key for v, key in enumerate(dataset.info.cameras)}, state, action, shape.fps, **more)


def read_in_order(dataset: Dataset, robot: Robot, horizon: int) -> list[RobotSample]:
    """The slow way: every file from its beginning, every image decoded."""
    samples = []
    for episode in dataset.episodes:
        columns = dataset.columns(episode)
        state_FS, action_FD = read_robot_columns(dataset, robot, columns)
        assert action_FD is not None
        tasks = dataset.task_of(columns)
        views = [list(dataset.images(episode, camera.key)) for camera in robot.cameras]
        for i in range(episode.length):
            after = [i + h for h in range(horizon)]
            samples.append(
                RobotSample(
                    images=tuple(resize_with_pad(view[i], SIZE) for view in views),
                    task=tasks[i],
                    state_S=state_FS[i],
                    chunk_HD=np.stack([action_FD[min(j, episode.length - 1)] for j in after]),
                    known_H=np.array([j < episode.length for j in after]),
                )
            )
    return samples


def check_same(got: RobotSample, expected: RobotSample) -> None:
    assert len(got.images) == len(expected.images) and got.task == expected.task
    for image, true in zip(got.images, expected.images, strict=True):
        assert image is not None and true is not None
        np.testing.assert_array_equal(image, true)
    for name in ("state_S", "chunk_HD", "known_H"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))


@pytest.mark.parametrize(
    "name", [name for name, shape in SHAPES.items() if shape.cameras and name not in ("files v3.0", "kinect v2.1")]
)
def test_frames_at_random_are_those_read_in_order(name: str, tmp_path: Path) -> None:
    """h264 with frames that refer to later ones, hevc, av1, mpeg4, png, jpeg, files; several episodes in a file."""
    lengths = {e: n + 9 for e, n in SHAPES[name].lengths.items()}
    shape = replace(SHAPES[name], lengths=lengths)
    dataset = Dataset(build(tmp_path / "dataset", shape))
    robot = robot_for(shape, dataset)
    expected = read_in_order(dataset, robot, robot.horizon)
    samples = LeRobotSamples(dataset, robot, image_size=SIZE, cache_bytes=10 * SIZE * SIZE * 3)
    assert len(samples) == len(expected) == sum(lengths.values())
    rng = np.random.default_rng(3)
    for _ in range(4):
        rows = rng.integers(0, len(samples), size=7).tolist()
        for row, got in zip(rows, samples.take(rows), strict=True):
            check_same(got, expected[row])
    assert sorted(samples.texts()) == sorted({sample.task for sample in expected})
    state_FS, chunk_FHD, known_FH = (np.concatenate(part) for part in zip(*samples.numbers(), strict=True))
    np.testing.assert_array_equal(state_FS, [sample.state_S for sample in expected])
    np.testing.assert_array_equal(chunk_FHD, [sample.chunk_HD for sample in expected])
    np.testing.assert_array_equal(known_FH, [sample.known_H for sample in expected])


JOINT = Column(STATE, ["s0", "s1"], 2)
COMMAND = Column(ACTION, ["a0", "a1"], 2)
TWO = Shape("v3.0", [JOINT, COMMAND], [Camera("wrist", "png", 24, 24)], fps=50, lengths={2: 12, 5: 31, 6: 9})


def open_two(folder: Path, shape: Shape = TWO, fps: float = 50, **more: Any) -> LeRobotSamples:
    """Samples of a dataset of two joints, whose robot acts `fps` times per second."""
    kind = {key: more.pop(key) for key in ("kind", "unit", "lower", "upper") if key in more}
    cameras = more.pop("cameras", {"wrist": "wrist"})
    robot = robot_of(cameras, JOINT, COMMAND, fps, **kind)
    dataset = Dataset(build(folder / "dataset", shape))
    return LeRobotSamples(dataset, more.pop("robot", robot), **{"image_size": SIZE} | more)


@pytest.mark.parametrize("stride", [1, 5])
@pytest.mark.parametrize("ends", ["mask", "hold", "drop"])
def test_a_chunk_has_the_action_at_each_periods_end(stride: int, ends: Any, tmp_path: Path) -> None:
    """Of a dataset at 50 frames per second for a robot at 10, every fifth; past the end the last one."""
    samples = open_two(tmp_path, fps=50 / stride, ends=ends)
    row = 0
    for episode, length in TWO.lengths.items():
        action_FD = value(TWO, ACTION, episode).astype(np.float64)
        for i in range(length):
            due = [i + (h + 1) * stride - 1 for h in range(4)]
            if ends == "drop" and due[-1] >= length:
                continue
            got = samples.take([row])[0]
            np.testing.assert_array_equal(got.chunk_HD, [action_FD[min(j, length - 1)] for j in due])
            assert got.known_H.tolist() == [j < length or ends == "hold" for j in due]
            np.testing.assert_allclose(got.state_S, np.deg2rad(value(TWO, STATE, episode)[i]))
            row += 1
    assert row == len(samples)


def test_chunks_in_a_column(tmp_path: Path) -> None:
    """Of frames that do not follow each other: each row has its whole chunk, in the dataset's order and units."""
    # The dataset's actions are in the other order, and in degrees.
    action = Column(ACTION, ["a1", "a0"], 2)
    whole_FHD = np.random.default_rng(0).normal(size=(7, 4, 2)).round(3).astype(np.float32)
    joint = {"kind": "joint_position", "unit": "rad", "lower": -9.0, "upper": 9.0, "max_velocity": 1.0, "output": "arm"}
    robot = robot_of({"wrist": "wrist"}, JOINT, action, 50)
    actions = [
        {"name": name, **joint, "source": {"joint": name}, "dataset": {"name": name, "unit": "deg"}}
        for name in ("a0", "a1")
    ]
    robot = Robot.model_validate({name: getattr(robot, name) for name in Robot.model_fields} | {"actions": actions})
    for shape in ([8], [4, 2]):
        folder = tmp_path / str(len(shape))
        chunks = {"chunk": {"dtype": "float32", "shape": shape, "names": None}}
        build(folder, replace(TWO, columns=[JOINT, action], lengths={0: 7}, others=chunks))
        path = folder / "data/chunk-000/file-000.parquet"
        table = pq.read_table(path)
        column = pa.array(whole_FHD.reshape(7, *shape).tolist())
        pq.write_table(table.append_column("chunk", column), path)
        samples = LeRobotSamples(Dataset(folder), robot, image_size=SIZE, chunk="chunk", ends="drop")
        assert len(samples) == 7
        for got, true_HD in zip(samples.take(range(7)), whole_FHD, strict=True):
            np.testing.assert_allclose(got.chunk_HD, np.deg2rad(true_HD[:, ::-1].astype(np.float64)), rtol=1e-12)
            assert got.known_H.all()
        (_, chunk_FHD, known_FH), *_ = samples.numbers()
        assert chunk_FHD.shape == (7, 4, 2) and known_FH.all()
        with pytest.raises(ConfigurationError, match=r"chunk: expected 5 x 2 numbers \(a chunk of actions\), got "):
            LeRobotSamples(Dataset(folder), robot, image_size=SIZE, chunk="chunk", horizon=5)
        with pytest.raises(ConfigurationError, match=r"expected a column chunks, got .*; did you mean 'chunk'"):
            LeRobotSamples(Dataset(folder), robot, image_size=SIZE, chunk="chunks")
        whole = whole_FHD.copy()
        whole[5, 2, 0] = np.nan
        column = pa.array(whole.reshape(7, *shape).tolist())
        pq.write_table(table.append_column("chunk", column), path)
        with pytest.raises(InputError, match=r"episode 0: expected finite numbers in action, got nan .* for frame 5"):
            LeRobotSamples(Dataset(folder), robot, image_size=SIZE, chunk="chunk")


PLACES, CELLS = [[0.25, 0.75], [np.nan, np.nan], [1.5, 0.0]], [[0] * 6, [1] * 6, [6, 5, 4, 3, 2, 1]]
OPTIONAL = {"name": "scene", "dataset": "scene", "optional": True}


def test_labels_of_extra_columns(tmp_path: Path) -> None:
    place, cells = Column("hint.place", ["u", "v"], 2), Column("hint.cells", None, 6, pa.list_(pa.int64()), "int64")
    shape = replace(TWO, columns=[JOINT, COMMAND, place, cells], lengths={0: 3})
    folder = build(tmp_path / "dataset", shape)
    path = folder / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)

    def write(name: str, values: list[list[float]]) -> Dataset:
        at = table.column_names.index(name)
        other = table.set_column(table.column_names.index("hint.place"), "hint.place", pa.array(PLACES))
        other = other.set_column(table.column_names.index("hint.cells"), "hint.cells", pa.array(CELLS))
        pq.write_table(other.set_column(at, name, pa.array(values)), path)
        return Dataset(folder)

    robot = robot_of({"wrist": "wrist", "scene": "scene"}, JOINT, COMMAND, 50)
    robot = Robot.model_validate(robot.model_dump() | {"cameras": [{"name": "wrist", "dataset": "wrist"}, OPTIONAL]})
    samples = LeRobotSamples(write("hint.place", PLACES), robot, image_size=SIZE)
    first, second, third = samples.take([0, 1, 2])
    assert first.labels.place == (0.25, 0.75) and second.labels.place is None and third.labels.place == (1.5, 0.0)
    assert third.labels.cells_VN is not None and third.labels.cells_VN.tolist() == [[6, 5, 4], [3, 2, 1]]
    assert first.images[1] is None and first.images[0] is not None
    with pytest.raises(
        InputError, match=r"episode 0: expected two numbers in hint\.place, .*, got \[0\.5, nan\] for .* 1"
    ):
        LeRobotSamples(write("hint.place", [[0.1, 0.2], [0.5, np.nan], [0.0, 0.0]]), robot, image_size=SIZE)
    with pytest.raises(InputError, match=r"episode 0: expected whole numbers from 0 on in hint\.cells, got -1 to 5 f"):
        LeRobotSamples(write("hint.cells", [[1] * 6, [0] * 6, [-1, 5, 0, 0, 0, 0]]), robot, image_size=SIZE)
    change_info(folder, features=Dataset(folder).info.model_dump()["features"] | {"hint.place": number(3)})
    with pytest.raises(ConfigurationError, match=r"hint\.place: expected 2 numbers \(u and v\), got shape \(3,\)"):
        LeRobotSamples(Dataset(folder), robot, image_size=SIZE)


def number(width: int) -> dict[str, Any]:
    return {"dtype": "float32", "shape": [width], "names": None}


@pytest.mark.parametrize(
    "given, says",
    [
        (
            {"fps": 20},
            r"expected 20 frames per second, as the robot's actions are 0\.05 s apart, or a whole multiple of it, got "
            r"50; set action_period_s of the robot file to 0\.02",
        ),
        ({"fps": 100}, r"expected 100 frames per second, .* got 50"),
        (
            {"fps": 10, "kind": "joint_velocity", "unit": "rad/s", "lower": None, "upper": None},
            r"expected 10 frames per second, .*, got 50: 'a0' is a joint_velocity, of which none may be left out",
        ),
        ({"fps": 10, "chunk": "chunk"}, r"expected 10 frames per second, .* where chunk has whole chunks, got 50"),
        ({"ends": "cut"}, r"ends: expected one of mask, hold, drop, got 'cut'"),
        ({"ends": "drop", "horizon": 32}, r"no episode has the 32 frames of a chunk \(ends: drop\); take ends: mask"),
        ({"episodes": [5, 4]}, r"episodes: expected numbers of episodes \(2 to 6\), got 4"),
        ({"episodes": [5, 5]}, r"episodes: expected each once, got one twice"),
        ({"episodes": slice(3, 5)}, r"episodes: expected at least one of 3, got none"),
        (
            {"cameras": {"wrist": "wrist", "top": "observation.images.top"}},
            r"expected colour images of camera 'observation\.images\.top', got those of wrist; name its key in the "
            r"robot file, as `dataset` of camera 'top', or write `optional: true`",
        ),
        ({"shape": replace(TWO, columns=[JOINT])}, r"'a0': dataset\.column: expected one of observation\.state"),
    ],
)
def test_what_does_not_fit_is_refused_on_opening(given: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=says):
        open_two(tmp_path, **given)


def test_what_is_not_read_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    range_m = {"dtype": "uint16", "shape": [4, 6], "names": None}
    open_two(tmp_path, replace(TWO, others={"observation.range": range_m}))
    assert "observation.range is left out: an array of 4 x 6 uint16" in capsys.readouterr().err


def test_held_out_episodes_are_kept_apart(tmp_path: Path) -> None:
    samples = open_two(tmp_path)
    rest, held = (
        LeRobotSamples(samples.dataset, samples.robot, image_size=SIZE, episodes=chosen)
        for chosen in (slice(None, -1), [6])
    )
    assert (len(rest), len(held)) == (12 + 31, 9)
    for got, row in ((rest.take([14])[0], 14), (held.take([4])[0], 12 + 31 + 4)):
        check_same(got, samples.take([row])[0])


def test_workers_share_what_was_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = open_two(tmp_path, replace(TWO, cameras=[Camera("wrist", "h264")]))
    rows = list(range(len(samples)))
    expected = samples.take(rows)
    again = LeRobotSamples(samples.dataset, samples.robot, image_size=SIZE)
    batches = list(Loader(lambda step: again.take(rows[step::4]), 2).iterate(range(4)))
    for step, batch in enumerate(batches):
        for got, row in zip(batch, rows[step::4], strict=True):
            check_same(got, expected[row])
    monkeypatch.setattr(Pictures, "read", lambda self, wanted: pytest.fail("decoded again") if wanted else iter(()))
    for got, true in zip(again.take(rows), expected, strict=True):
        check_same(got, true)


@pytest.mark.parametrize("fault", ["cut", "gone", "late"])
def test_a_broken_video_is_named(fault: str, tmp_path: Path) -> None:
    shape = replace(TWO, cameras=[Camera("wrist", "h264")], fps=10)
    folder = build(tmp_path / "dataset", shape)
    samples = LeRobotSamples(Dataset(folder), robot_of({"c": "wrist"}, JOINT, COMMAND, 10), image_size=SIZE)
    path = folder / "videos/wrist/chunk-000/file-000.mp4"  # of the first two episodes
    if fault == "cut":
        path.write_bytes(path.read_bytes()[:-2000])
    elif fault == "gone":
        path.unlink()
    else:
        write_video(path, [picture(shape.cameras[0], 0, i) for i in range(30)], shape.cameras[0], 10)
    for _ in range(2):  # a file that failed is opened again
        with pytest.raises(InputError, match=r"episode 5, frame 20: video .*file-000\.mp4: "):
            samples.take([0, 12 + 20] if fault == "late" else [12 + 20])
    samples.take([12 + 31 + 4])


def test_a_broken_image_in_a_table_is_named(tmp_path: Path) -> None:
    samples = open_two(tmp_path)
    path = tmp_path / "dataset/data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    images = table["wrist"].to_pylist()
    images[12 + 20] = {"bytes": images[12 + 20]["bytes"][:-40], "path": None}
    at = table.column_names.index("wrist")
    pq.write_table(table.set_column(at, "wrist", pa.array(images, table["wrist"].type)), path, row_group_size=7)
    samples.take([12 + 19])
    with pytest.raises(InputError, match=r"file-000\.parquet: episode 5, frame 20: wrist: expected a whole"):
        samples.take([12 + 20])
    path.unlink()
    samples = LeRobotSamples(samples.dataset, samples.robot, image_size=SIZE, episodes=[6])
    with pytest.raises(InputError, match=r"episode 5, frame 0: .*file-000\.parquet, found none"):
        list(samples._pictures.read([Wanted(samples.dataset.episodes[1], 0, 12, "wrist")]))


def test_workers_read_the_videos_that_the_trainer_has_read(tmp_path: Path) -> None:
    """A worker that is forked must not have to close the trainer's decoders, whose threads it does not have."""
    camera = Camera("observation.images.top", "h264", 160, 160)
    shape = Shape("v3.0", [Column(key, None, 2) for key in (STATE, ACTION)], [camera], lengths={0: 30})
    robot = make_robot("any", 2, action_period_s=0.1, horizon=4)
    samples = LeRobotSamples(Dataset(build(tmp_path / "videos", shape)), robot, image_size=32, cache_bytes=0)
    expected = [samples.take([row])[0].images[0] for row in (3, 20, 7)]
    loader = Loader(lambda step: samples.take([(3, 20, 7)[step]])[0].images[0], workers=1)
    made: list[Any] = []
    reader = threading.Thread(target=lambda: made.extend(loader.iterate(range(3))), daemon=True)
    reader.start()
    reader.join(timeout=60.0)
    assert len(made) == 3 and all(np.array_equal(*pair) for pair in zip(made, expected, strict=True))


def test_a_places_label_follows_the_padding_of_its_image(tmp_path: Path) -> None:
    """An image of 48 x 64 begins at an eighth of its square, and ends at seven eighths."""
    place = Column("hint.place", ["u", "v"], 2)
    columns = [Column(STATE, None, 2), Column(ACTION, None, 2), place]
    folder = build(tmp_path / "wide", Shape("v3.0", columns, [Camera("observation.images.top", "png")], lengths={0: 3}))
    path = folder / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    at = table.column_names.index("hint.place")
    pq.write_table(table.set_column(at, "hint.place", pa.array([[0.5, 0.0], [0.25, 0.5], [1.0, 2.0]])), path)
    robot = make_robot("any", 2, action_period_s=0.1, horizon=2)
    samples = LeRobotSamples(Dataset(folder), robot, image_size=32).take([0, 1, 2])
    assert [sample.labels.place for sample in samples] == [(0.5, 0.125), (0.25, 0.5), (1.0, 1.625)]


@pytest.mark.slow
def test_memory_grows_by_no_more_than_an_index(tmp_path: Path) -> None:
    """What the trainer's code holds after 300 episodes more: 4 kB each at most, less than their numbers alone take."""
    held = []
    for count in (20, 320):
        shape = replace(TWO, lengths=dict.fromkeys(range(count), 40), cameras=[Camera("wrist", "png", 8, 8)])
        folder = build(tmp_path / str(count), replace(shape, columns=[JOINT, replace(COMMAND, width=200, names=None)]))
        wide = robot_of({"wrist": "wrist"}, JOINT, Column(ACTION, None, 200), 50)
        tracemalloc.start()
        samples = LeRobotSamples(Dataset(folder), wide, image_size=8, cache_bytes=0)
        samples.take(list(range(0, len(samples), 400)))
        for _ in samples.numbers():
            pass
        samples._pictures.close()
        gc.collect()
        ours = tracemalloc.Filter(True, "*/training/*")  # not the interpreter's own table of names, say
        held.append(sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([ours]).traces))
        tracemalloc.stop()
    assert held[1] - held[0] < 300 * 4000 < 300 * 40 * 200 * 8
