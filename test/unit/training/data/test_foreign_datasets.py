"""Datasets of foreign shapes: what is read is what was written."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.foreign_datasets import CODECS, SHAPES, Camera, Column, Shape, build, picture, task_of, value

from training.convert.playback import PAUSE_NS, START_NS, _schedule
from training.data.lerobot import Dataset

# Mean error of a colour, of 255; a frame's neighbour is 20 off.
LOSS = {"png": 0.0, "bytes": 0.0, "files": 0.0, "jpeg": 3.0} | dict.fromkeys(CODECS, 4.0) | {"mpeg4": 6.0}
CAMERAS = {
    "aloha v2.1": ("top",),
    "aloha v3.0": ("cam_high", "cam_left_wrist", "cam_right_wrist"),
    "libero v2.0": ("image", "wrist_image"),
    "libero v3.0": ("image", "wrist_image"),
    "droid v2.1": ("wrist_left", "exterior_1_left"),
    "so100 v2.1": ("laptop", "Camera 2"),
    "so101 v3.0": ("front", "wrist"),
    "pusht v3.0": ("image",),
    "xarm v2.0": ("image",),
    "hil v2.1": ("side", "wrist"),
    "holes v2.1": ("front",),
    "holes v3.0": ("front",),
    "kinect v2.1": ("kinect.color",),
    "twist v3.0": ("ids_cam",),
    "floats v2.1": ("main",),
    "files v3.0": ("wrist", "image.low"),
    "points v3.0": (),
}
ALOHA = tuple(
    f"{side}_{joint}"
    for side in ("left", "right")
    for joint in ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")
)
SO100 = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
NAMES = {
    "aloha v2.1": (ALOHA, ALOHA),
    "aloha v3.0": (ALOHA, ALOHA),
    "libero v2.0": (None, None),
    "libero v3.0": (
        ("x", "y", "z", "rx", "ry", "rz", "rw", "gripper"),
        ("x", "y", "z", "roll", "pitch", "yaw", "gripper"),
    ),
    "droid v2.1": (("x", "y", "z", "roll", "pitch", "yaw", "gripper"), None),
    "so100 v2.1": (tuple(f"main_{joint}" for joint in SO100),) * 2,
    "so101 v3.0": (tuple(f"{joint}.pos" for joint in SO100),) * 2,
    "pusht v3.0": (("motor_0", "motor_1"),) * 2,
    "xarm v2.0": (("motor_0", "motor_1", "motor_2", "motor_3"), ("motor_0", "motor_1", "motor_2")),
    "hil v2.1": (None, ("delta_x_ee", "delta_y_ee", "delta_z_ee", "gripper_delta")),
    "holes v2.1": (None, None),
    "holes v3.0": (None, None),
    "kinect v2.1": (("a", "b"), ("a", "b")),
    "twist v3.0": (
        ("J1.pos", "J2.pos", "J3.pos", "J4.pos", "J5.pos", "J6.pos", "gripper_joint.pos"),
        ("linear_x.vel", "linear_y.vel", "angular_z.vel", "gripper.pos", "gantry.height_mm"),
    ),
    "floats v2.1": (SO100, SO100),
    "files v3.0": (None, None),
    "points v3.0": (None, None),
}
IGNORED = {
    "droid v2.1": {f"language_instruction{i}": "no number, but string" for i in ("", "_2")},
    "pusht v3.0": {"task": "no number, but string"},
    "kinect v2.1": {
        "observation.images.kinect.transformed_depth": "depth, by its name",
        "observation.images.tof": "depth, by its is_depth_map",
        "observation.images.range": "one channel, as depth has",
        "observation.top_depth": "an array of 48 x 64 uint16",
    },
    "points v3.0": {"observation.pointcloud": "an array of 2048 x 3 float32"},
}


@pytest.fixture(scope="module", params=SHAPES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def dataset(name: str, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset(build(tmp_path_factory.mktemp("foreign") / "dataset", SHAPES[name]))


def test_numbers_and_tasks_are_those_that_were_written(name: str, dataset: Dataset) -> None:
    shape = SHAPES[name]
    fps = dataset.info.fps
    assert fps == shape.fps and isinstance(fps, int) == float(fps).is_integer()
    assert {episode.index: episode.length for episode in dataset.episodes} == shape.lengths
    for episode in reversed(dataset.episodes):
        columns = dataset.columns(episode)
        for column in shape.columns:
            true = value(shape, column.key, episode.index)
            assert columns[column.key].dtype == column.dtype
            np.testing.assert_array_equal(columns[column.key], true if column.width > 1 else true[:, 0])
        assert columns["frame_index"].tolist() == list(range(episode.length))
        tasks = [task_of(shape, episode.index, i) for i in range(episode.length)]
        assert dataset.task_of(columns) == tasks and set(episode.tasks) == set(tasks)


def test_images_are_those_that_were_written(name: str, dataset: Dataset) -> None:
    cameras = {camera.key: camera for camera in SHAPES[name].cameras}
    assert dataset.cameras == CAMERAS[name]
    for key, short in dataset.info.cameras.items():
        for called in (key, short):
            for episode in reversed(dataset.episodes):
                images = list(dataset.images(episode, called))
                assert len(images) == episode.length
                for i, rgb_HWC in enumerate(images):
                    assert loss(cameras[key], rgb_HWC, episode.index, i) <= LOSS[cameras[key].stored]


def loss(camera: Camera, rgb_HWC: np.ndarray, episode: int, i: int) -> float:
    true_HWC = picture(camera, episode, i)
    assert rgb_HWC.shape == true_HWC.shape and rgb_HWC.dtype == np.uint8
    return float(np.abs(rgb_HWC.astype(float) - true_HWC).mean(axis=(0, 1)).max())


def test_names_are_those_of_the_dataset_or_none(name: str, dataset: Dataset) -> None:
    assert (dataset.state_names, dataset.action_names) == NAMES[name]


def test_what_is_not_read_is_named(name: str, dataset: Dataset) -> None:
    assert dataset.ignored == IGNORED.get(name, {})


def test_two_cameras_of_one_name_go_by_their_keys(tmp_path: Path) -> None:
    cameras = [Camera("observation.image", "png"), Camera("observation.images.image", "png"), Camera("wrist", "png")]
    dataset = Dataset(build(tmp_path / "dataset", replace(SHAPES["xarm v2.0"], cameras=cameras)))
    assert dataset.cameras == ("observation.image", "observation.images.image", "wrist")
    first = dataset.episodes[0]
    for camera in cameras[:2]:
        np.testing.assert_array_equal(next(dataset.images(first, camera.key)), picture(camera, 0, 0))


def test_times_may_be_noted_as_they_were(tmp_path: Path) -> None:
    """Frames are taken for even all the same: none is missing where each is within a quarter of a frame."""
    folder = build(tmp_path / "dataset", SHAPES["xarm v2.0"])
    path = folder / "data/chunk-000/episode_000000.parquet"
    table = pq.ParquetFile(path).read()
    at = table.column_names.index("timestamp")
    pq.write_table(table.set_column(at, "timestamp", pa.array([0.004, 0.051, 0.14], pa.float32())), path)
    dataset = Dataset(folder)
    assert dataset.columns(dataset.episodes[0])["timestamp"].tolist() == pytest.approx([0.004, 0.051, 0.14])


def test_a_rate_that_is_no_whole_number_gives_a_bag_whole_stamps(tmp_path: Path) -> None:
    shape = replace(SHAPES["so100 v2.1"], fps=12.5, cameras=())
    first, second = _schedule(Dataset(build(tmp_path / "dataset", shape)))
    assert [type(time_ns) for time_ns in (second.begin_ns, second.first_ns, second.end_ns)] == [int] * 3
    assert first.stamp_ns == START_NS and second.stamp_ns == START_NS + 3 * 80_000_000 + PAUSE_NS
    assert (second.first_ns - second.begin_ns) % 80_000_000 == 0


def test_neighbours_differ_by_more_than_a_codec_loses() -> None:
    """Else a frame that is one late would pass."""
    camera = Camera("observation.images.front", "h264")
    assert loss(camera, picture(camera, 3, 1), 3, 0) > 2 * max(LOSS.values())


def test_making_videos_leaves_the_process_its_priority(tmp_path: Path) -> None:
    shape = Shape("v3.0", [Column("action", ["a"], 1)], [Camera("observation.images.top", "av1")], lengths={0: 3})
    build(tmp_path / "d", shape)
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
