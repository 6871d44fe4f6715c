"""LeRobot datasets as others make them, small, with the true values: written with pyarrow, av and json alone.

The shapes are those of published datasets (their meta/info.json); each says which.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

DATA_V2 = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
VIDEO_V2 = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
DATA_V3 = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_V3 = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"

CODECS: Mapping[str, tuple[str, dict[str, str]]] = {
    "h264": ("libx264", {"crf": "12", "preset": "ultrafast"}),  # with frames that refer to later ones
    "hevc": ("libx265", {"crf": "12", "preset": "ultrafast", "x265-params": "log-level=none"}),
    "av1": ("libsvtav1", {"crf": "10", "preset": "12", "svtav1-params": "lp=1"}),
    "mpeg4": ("mpeg4", {"qscale": "1"}),
}


FLOATS = pa.list_(pa.float32())


@dataclass(frozen=True)
class Camera:
    """A camera: `stored` is a codec, or png, jpeg, bytes (a png), or files (png files whose names the table has)."""

    key: str
    stored: str
    height: int = 48
    width: int = 64
    feature: Mapping[str, Any] = field(default_factory=dict)  # what meta/info.json says otherwise
    pixels: str = "yuv420p"


@dataclass(frozen=True)
class Column:
    """A column of numbers; `kind` is how the table stores it."""

    key: str
    names: Any
    width: int
    kind: pa.DataType = FLOATS
    dtype: str = "float32"


@dataclass(frozen=True)
class Shape:
    """A dataset; `lengths` by index of the episode."""

    version: str
    columns: Sequence[Column]
    cameras: Sequence[Camera] = ()
    fps: float = 10
    lengths: Mapping[int, int] = field(default_factory=lambda: {0: 3, 1: 4})
    tasks: Sequence[str] = ("Pick up the cube.",)
    texts: Sequence[str] = ()  # columns of texts
    others: Mapping[str, Any] = field(default_factory=dict)  # features whose columns the tables lack
    info: Mapping[str, Any] = field(default_factory=dict)  # what meta/info.json says otherwise
    episodes_per_file: int = 2
    task_column: str = "task"
    drift_s: float = 0.0  # of the times that meta/episodes notes for a video

    @property
    def shared(self) -> bool:
        """Whether a file holds several episodes."""
        return self.version == "v3.0" and "data_path" not in self.info


def value(shape: Shape, key: str, episode: int) -> np.ndarray:
    """The true values [N, D] of a column."""
    column = next(column for column in shape.columns if column.key == key)
    n, d = np.mgrid[0 : shape.lengths[episode], 0 : column.width]
    seed = sum(key.encode()) % 7
    values = (n + 1) * 0.25 - d * 0.5 + episode % 5 + seed
    if column.dtype == "float64":
        values = values + 1e-12 * (d + 1)
    return values.astype(column.dtype)


def picture(camera: Camera, episode: int, i: int) -> np.ndarray:
    """Smooth, as a codec expects, and different in each frame and camera; the colours are far from each other."""
    y, x = np.mgrid[0 : camera.height, 0 : camera.width] / 64.0
    shift = 0.7 * (episode % 5) + 0.4 * i + sum(camera.key.encode()) % 5
    waves = [np.sin(3 * x + shift), np.cos(3 * y - shift), np.sin(2 * (x + y) + 2 * shift)]
    return (np.array([150, 120, 90]) + 60 * np.stack(waves, axis=-1)).astype(np.uint8)


def task_of(shape: Shape, episode: int, i: int) -> str:
    return shape.tasks[(episode + i // 2) % len(shape.tasks)]


def build(folder: Path, shape: Shape) -> Path:
    """Write the dataset."""
    (folder / "meta").mkdir(parents=True)
    info = make_info(shape)
    write_json(folder / "meta/info.json", info)
    groups = list(shape.lengths)
    step = shape.episodes_per_file if shape.shared else 1
    rows: list[dict[str, Any]] = []
    for number, start in enumerate(range(0, len(groups), step)):
        rows += write_file(folder, shape, info, groups[start : start + step], number)
    if shape.version == "v3.0":
        (folder / "meta/episodes/chunk-000").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / "meta/episodes/chunk-000/file-000.parquet")
        tasks = {"task_index": list(range(len(shape.tasks))), shape.task_column: list(shape.tasks)}
        pq.write_table(pa.table(tasks), folder / "meta/tasks.parquet")
    else:
        lines = [{name: row[name] for name in ("episode_index", "tasks", "length")} for row in rows]
        write_lines(folder / "meta/episodes.jsonl", lines)
        write_lines(
            folder / "meta/tasks.jsonl", [{"task_index": i, "task": task} for i, task in enumerate(shape.tasks)]
        )
        if shape.version == "v2.0":
            write_json(folder / "meta/stats.json", {})
        else:
            write_lines(
                folder / "meta/episodes_stats.jsonl", [{"episode_index": e, "stats": {}} for e in shape.lengths]
            )
    return folder


def make_info(shape: Shape) -> dict[str, Any]:
    number = {"shape": [1], "names": None}
    features: dict[str, Any] = {}
    for camera in shape.cameras:
        features[camera.key] = {
            "dtype": "video" if camera.stored in CODECS else "image",
            "shape": [camera.height, camera.width, 3],
            "names": ["height", "width", "channel"],
        } | dict(camera.feature)
    for column in shape.columns:
        features[column.key] = {"dtype": column.dtype, "shape": [column.width], "names": column.names}
    features |= {text: {"dtype": "string", **number} for text in shape.texts} | dict(shape.others)
    features |= {
        "timestamp": {"dtype": "float32", **number},
        "frame_index": {"dtype": "int64", **number},
        "episode_index": {"dtype": "int64", **number},
        "index": {"dtype": "int64", **number},
        "task_index": {"dtype": "int64", **number},
    }
    videos = any(camera.stored in CODECS for camera in shape.cameras)
    base = {
        "codebase_version": shape.version,
        "robot_type": "unknown",
        "total_episodes": len(shape.lengths),
        "total_frames": sum(shape.lengths.values()),
        "total_tasks": len(shape.tasks),
        "chunks_size": 1000,
        "fps": shape.fps,
        "splits": {"train": f"0:{len(shape.lengths)}"},
        "data_path": DATA_V3 if shape.version == "v3.0" else DATA_V2,
        "video_path": None if not videos else VIDEO_V3 if shape.version == "v3.0" else VIDEO_V2,
        "features": features,
    }
    if shape.version != "v3.0":
        base |= {"total_chunks": 1, "total_videos": len(shape.lengths) * len(shape.cameras) * videos}
    return base | dict(shape.info)


def write_file(
    folder: Path, shape: Shape, info: Mapping[str, Any], episodes: Sequence[int], number: int
) -> list[dict[str, Any]]:
    """Write the files of these episodes; their rows of meta/episodes."""
    place = {"chunk_index": 0, "file_index": number, "episode_chunk": episodes[0] // 1000, "episode_index": episodes[0]}
    path = folder / info["data_path"].format(**place)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(make_table(folder, shape, episodes), path, row_group_size=5)
    rows: dict[int, dict[str, Any]] = {}
    for episode in episodes:
        length = shape.lengths[episode]
        tasks = list(dict.fromkeys(task_of(shape, episode, i) for i in range(length)))
        rows[episode] = {"episode_index": episode, "tasks": tasks, "length": length}
        if shape.shared:
            rows[episode] |= {"data/chunk_index": 0, "data/file_index": number}
    for camera in (camera for camera in shape.cameras if camera.stored in CODECS):
        path = folder / info["video_path"].format(video_key=camera.key, **place)
        path.parent.mkdir(parents=True, exist_ok=True)
        images = [picture(camera, episode, i) for episode in episodes for i in range(shape.lengths[episode])]
        write_video(path, images, camera, shape.fps)
        done = 0
        for episode in episodes:
            prefix = f"videos/{camera.key}"
            if shape.shared:
                rows[episode] |= {
                    f"{prefix}/chunk_index": 0,
                    f"{prefix}/file_index": number,
                    f"{prefix}/from_timestamp": done / shape.fps + shape.drift_s,
                    f"{prefix}/to_timestamp": (done + shape.lengths[episode]) / shape.fps + shape.drift_s,
                }
            done += shape.lengths[episode]
    return list(rows.values())


def make_table(folder: Path, shape: Shape, episodes: Sequence[int]) -> pa.Table:
    frames = [(episode, i) for episode in episodes for i in range(shape.lengths[episode])]
    columns: dict[str, pa.Array] = {}
    for camera in (camera for camera in shape.cameras if camera.stored not in CODECS):
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()}) if camera.stored != "bytes" else pa.large_binary()
        columns[camera.key] = pa.array([store(folder, camera, episode, i) for episode, i in frames], kind)
    for column in shape.columns:
        values = np.concatenate([value(shape, column.key, episode) for episode in episodes])
        scalar = not (pa.types.is_list(column.kind) or pa.types.is_fixed_size_list(column.kind))
        columns[column.key] = pa.array((values[:, 0] if scalar else values).tolist(), column.kind)
    for text in shape.texts:
        columns[text] = pa.array(["some text"] * len(frames))
    time_N = np.array([i / shape.fps for _, i in frames], dtype=np.float32)
    tasks = list(shape.tasks)
    return pa.table(
        columns
        | {
            "timestamp": pa.array(time_N),
            "frame_index": pa.array([i for _, i in frames], pa.int64()),
            "episode_index": pa.array([episode for episode, _ in frames], pa.int64()),
            "index": pa.array(range(len(frames)), pa.int64()),
            "task_index": pa.array([tasks.index(task_of(shape, episode, i)) for episode, i in frames], pa.int64()),
        }
    )


def store(folder: Path, camera: Camera, episode: int, i: int) -> dict[str, Any] | bytes:
    bgr_HWC = cv2.cvtColor(picture(camera, episode, i), cv2.COLOR_RGB2BGR)
    name = f"frame_{i:06d}.png"
    if camera.stored == "jpeg":
        return {"bytes": cv2.imencode(".jpg", bgr_HWC, [cv2.IMWRITE_JPEG_QUALITY, 98])[1].tobytes(), "path": None}
    content = cv2.imencode(".png", bgr_HWC)[1].tobytes()
    if camera.stored == "bytes":
        return content
    if camera.stored == "png":
        return {"bytes": content, "path": name}
    path = f"images/{camera.key}/episode_{episode:06d}/{name}"
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_bytes(content)
    return {"bytes": None, "path": path}


def write_video(path: Path, images: Sequence[np.ndarray], camera: Camera, fps: float) -> None:
    codec, options = CODECS[camera.stored]
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = camera.height, camera.width, camera.pixels
        for i, rgb_HWC in enumerate(images):
            frame = av.VideoFrame.from_ndarray(rgb_HWC, format="rgb24")
            frame.pts, frame.time_base = i, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    if os.sched_getscheduler(0) != os.SCHED_OTHER:
        # SVT-AV1 as root makes the thread that opens it a real-time one, which starves everything else from then on.
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=4))


def write_lines(path: Path, rows: Sequence[object]) -> None:
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))


def change_info(folder: Path, **changes: Any) -> None:
    path = folder / "meta/info.json"
    write_json(path, json.loads(path.read_text()) | changes)


ARM = ["waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper"]
ALOHA = [f"{side}_{joint}" for side in ("left", "right") for joint in ARM]
SO100 = ["shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper"]
STATE, ACTION = "observation.state", "action"
DOUBLE = pa.list_(pa.float64())
VIDEO_INFO = {
    "video.fps": 10.0,
    "video.codec": "av1",
    "video.pix_fmt": "yuv420p",
    "video.is_depth_map": False,
    "has_audio": False,
}


def numbers(key: str, kind: pa.DataType, dtype: str) -> Column:
    return Column(key, None, 1, kind, dtype)


SHAPES: Mapping[str, Shape] = {
    # lerobot/aloha_sim_transfer_cube_human
    "aloha v2.1": Shape(
        "v2.1",
        [
            Column(STATE, {"motors": ALOHA}, 14),
            Column("observation.effort", {"motors": ALOHA}, 14),
            Column(ACTION, {"motors": ALOHA}, 14),
            numbers("next.done", pa.bool_(), "bool"),
        ],
        [Camera("observation.images.top", "av1", feature={"video_info": VIDEO_INFO})],
        fps=50,
    ),
    # quincyu/robotwin_grab_roller: names in a list of lists, images in tables, channels first
    "aloha v3.0": Shape(
        "v3.0",
        [
            Column(STATE, [ALOHA], 14, pa.list_(pa.float32(), 14)),
            Column(ACTION, [ALOHA], 14, pa.list_(pa.float32(), 14)),
        ],
        [
            Camera(
                f"observation.images.cam_{name}",
                "png",
                feature={"shape": [3, 48, 64], "names": ["channels", "height", "width"]},
            )
            for name in ("high", "left_wrist", "right_wrist")
        ],
        fps=50,
        lengths={0: 3, 1: 4, 2: 7},
        tasks=("grab the roller", "lift it"),
    ),
    # physical-intelligence/libero: openpi's keys, images in tables, one name for a vector
    "libero v2.0": Shape(
        "v2.0",
        [Column("state", ["state"], 8), Column("actions", ["actions"], 7)],
        [Camera("image", "png", 32, 32), Camera("wrist_image", "png", 32, 32)],
        fps=10.0,
        tasks=("put the bowl on the plate", "open the drawer", "turn on the stove"),
    ),
    # HuggingFaceVLA/libero
    "libero v3.0": Shape(
        "v3.0",
        [
            Column(STATE, {"motors": ["x", "y", "z", "rx", "ry", "rz", "rw", "gripper"]}, 8),
            Column(ACTION, {"motors": ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]}, 7),
        ],
        [Camera("observation.images.image", "jpeg", 32, 32), Camera("observation.images.wrist_image", "png", 32, 32)],
        lengths={0: 12, 1: 2, 2: 9},
        episodes_per_file=3,
    ),
    # lerobot/droid_100 and droid_1.0.1: doubles, texts, columns whose name begins another's
    "droid v2.1": Shape(
        "v2.1",
        [
            Column(STATE, {"axes": ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]}, 7, DOUBLE, "float64"),
            Column("observation.state.joint_position", None, 7, DOUBLE, "float64"),
            numbers("observation.state.gripper_position", pa.list_(pa.float64(), 1), "float64"),
            Column(ACTION, None, 7, DOUBLE, "float64"),
            numbers("is_first", pa.bool_(), "bool"),
            numbers("discount", pa.float32(), "float32"),
        ],
        [Camera("observation.images.wrist_left", "h264"), Camera("observation.images.exterior_1_left", "av1")],
        fps=15,
        texts=("language_instruction", "language_instruction_2"),
        tasks=("Put the marker\u2028in the mug", ""),
    ),
    # the first SO-100 datasets
    "so100 v2.1": Shape(
        "v2.1",
        [Column(key, [f"main_{joint}" for joint in SO100], 6) for key in (ACTION, STATE)],
        [Camera("observation.images.laptop", "h264"), Camera("observation.images.Camera 2", "av1")],
        fps=30,
    ),
    # today's SO-101 datasets
    "so101 v3.0": Shape(
        "v3.0",
        [Column(key, [f"{joint}.pos" for joint in SO100], 6, pa.list_(pa.float32(), 6)) for key in (ACTION, STATE)],
        [Camera("observation.images.front", "hevc"), Camera("observation.images.wrist", "av1")],
        fps=30,
        lengths={0: 4, 1: 3, 2: 5},
        info={"data_files_size_in_mb": 100, "video_files_size_in_mb": 500},
    ),
    # lerobot/pusht, brought to v3.0: the image has a key of its own, tasks have an index without a name
    "pusht v3.0": Shape(
        "v3.0",
        [
            Column(STATE, {"motors": ["motor_0", "motor_1"]}, 2),
            Column(ACTION, {"motors": ["motor_0", "motor_1"]}, 2),
            numbers("next.reward", pa.float32(), "float32"),
            numbers("next.success", pa.bool_(), "bool"),
        ],
        [Camera("observation.image", "h264", feature={"video_info": VIDEO_INFO})],
        texts=("task",),
        task_column="__index_level_0__",
        info={"data_files_size_in_mb": 0.02802, "splits": {"train": "0:1000000"}},
    ),
    # lerobot/xarm_lift_medium_image
    "xarm v2.0": Shape(
        "v2.0",
        [
            Column(STATE, {"motors": [f"motor_{i}" for i in range(4)]}, 4),
            Column(ACTION, {"motors": [f"motor_{i}" for i in range(3)]}, 3),
        ],
        [Camera("observation.image", "png", 28, 28)],
        fps=15,
    ),
    # HIL-SERL: names by their index; a number that is stored as a list of one
    "hil v2.1": Shape(
        "v2.1",
        [
            Column(STATE, None, 6),
            Column(ACTION, {"delta_y_ee": 1, "delta_x_ee": 0, "delta_z_ee": 2, "gripper_delta": 3}, 4),
            numbers("next.reward", pa.list_(pa.float32()), "float32"),
            numbers("complementary_info.discrete_penalty", pa.list_(pa.int64()), "int64"),
        ],
        [Camera("observation.images.side", "jpeg"), Camera("observation.images.wrist", "bytes")],
    ),
    # episodes were deleted, and the rest kept their numbers
    "holes v2.1": Shape(
        "v2.1",
        [Column(STATE, None, 6), Column(ACTION, None, 6)],
        [Camera("observation.images.front", "h264")],
        lengths={3: 2, 7: 4, 1001: 3, 2000: 2},
        tasks=("a", "b"),
    ),
    # the same in v3.0, where several are in one file, and the noted times drift by a fifth of a frame
    "holes v3.0": Shape(
        "v3.0",
        [Column(STATE, None, 6), Column(ACTION, None, 6)],
        [Camera("observation.images.front", "h264")],
        lengths={3: 2, 7: 4, 1001: 3, 2000: 2},
        drift_s=0.02,
    ),
    # Kovavavvava/eval_mug_table and IntelligentDecisionLab/merge_datasets_with_depth: depth in three ways
    "kinect v2.1": Shape(
        "v2.1",
        [Column(STATE, ["a", "b"], 2), Column(ACTION, ["a", "b"], 2)],
        [
            Camera("observation.images.kinect.color", "h264", feature={"info": "Color image"}),
            Camera(
                "observation.images.kinect.transformed_depth",
                "h264",
                feature={"shape": [48, 64, 1], "info": "Transformed depth image aligned to color"},
            ),
            Camera("observation.images.tof", "h264", feature={"info": {"video.is_depth_map": True}}),
            Camera("observation.images.range", "png", feature={"shape": [1, 48, 64]}),
        ],
        others={"observation.top_depth": {"dtype": "uint16", "shape": [48, 64], "names": ["height", "width"]}},
    ),
    # vale54321/mitsubishi-run2: actions unlike the state; Odog16/block_sorting_single: base and lift
    "twist v3.0": Shape(
        "v3.0",
        [
            Column(STATE, [f"J{i}.pos" for i in range(1, 7)] + ["gripper_joint.pos"], 7),
            Column(ACTION, ["linear_x.vel", "linear_y.vel", "angular_z.vel", "gripper.pos", "gantry.height_mm"], 5),
        ],
        [Camera("observation.images.ids_cam", "hevc", 47, 61, pixels="yuv444p")],
        fps=3,
    ),
    # ywu67/record-test: all numbers are floats, no "v"; pranavsaroha/so100-synth: mp4v, 24 frames per second
    "floats v2.1": Shape(
        "v2.1",
        [Column(STATE, SO100, 6), Column(ACTION, SO100, 6)],
        [
            Camera(
                "observation.images.main",
                "mpeg4",
                feature={"shape": [48.0, 64.0, 3.0], "info": {"video.codec": "mp4v"}},
            )
        ],
        fps=24.0,
        info={"codebase_version": "2.1", "total_tasks": 0.0, "chunks_size": None},
    ),
    # lukhuang/droid_1 and gozdebaydogmus/sweep-single-revised-v3: v3.0 with a file per episode, as in v2.1
    "files v3.0": Shape(
        "v3.0",
        [Column("observation.state.joints", ["j1", "j2", "j3"], 3), Column(ACTION, None, 4)],
        [Camera("observation.images.wrist", "h264"), Camera("observation.image.low", "files")],
        fps=12.5,
        info={"data_path": DATA_V2, "video_path": VIDEO_V2},
    ),
    # SPeramanu/oct_dataset_converted: no cameras, a name for the vector, a cloud of points
    "points v3.0": Shape(
        "v3.0",
        [Column(STATE, ["D_state"], 18), Column(ACTION, ["D_act"], 11)],
        others={"observation.pointcloud": {"dtype": "float32", "shape": [2048, 3], "names": ["N_points", "XYZ"]}},
    ),
}
