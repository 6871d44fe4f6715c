"""The film made from the demo's bag."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from ki_vla_ros.bags.writer import BagWriter, typestore
from ki_vla_ros.demo.driver import CHUNK, INSTRUCTION, SCENE_IMAGE, STATUS, TOPICS, WRIST_IMAGE
from ki_vla_ros.demo.video import HEADER, SIDE, Film, frames, make_video
from ki_vla_ros.sim.demonstrator import tip_to_joints
from ki_vla_ros.sim.task import sample_scene
from ki_vla_ros.sim.world import JOINTS, World

NS = 1_000_000_000


def ros_message(kind: str, **fields: Any) -> bytes:
    return bytes(typestore().serialize_cdr(typestore().types[kind](**fields), kind))


def header(stamp_ns: int) -> Any:
    stamp = typestore().types["builtin_interfaces/msg/Time"](sec=stamp_ns // NS, nanosec=stamp_ns % NS)
    return typestore().types["std_msgs/msg/Header"](stamp=stamp, frame_id="camera")


def image(colour: tuple[int, int, int], stamp_ns: int) -> bytes:
    data = np.tile(np.array(colour, dtype=np.uint8), 32 * 32)
    fields = {"height": 32, "width": 32, "encoding": "rgb8", "is_bigendian": 0, "step": 96, "data": data}
    return ros_message("sensor_msgs/msg/Image", header=header(stamp_ns), **fields)


def text(content: str) -> bytes:
    return ros_message("std_msgs/msg/String", data=content)


def chunk(tips: list[tuple[float, float, float]], stamp_ns: int) -> bytes:
    duration, kind = typestore().types["builtin_interfaces/msg/Duration"], "trajectory_msgs/msg/JointTrajectoryPoint"
    none = np.zeros(0)
    points = [
        typestore().types[kind](
            positions=tip_to_joints(tip)[::-1].copy(),
            velocities=none,
            accelerations=none,
            effort=none,
            time_from_start=duration(sec=0, nanosec=50_000_000 * (k + 1)),
        )
        for k, tip in enumerate(tips)
    ]
    names = list(reversed(JOINTS))  # the film goes by names
    return ros_message("trajectory_msgs/msg/JointTrajectory", header=header(stamp_ns), joint_names=names, points=points)


def status(**fields: Any) -> bytes:
    objects = [{"colour": "red", "shape": "cube", "x": 0.0, "y": 0.0}]
    return text(json.dumps({"done": False, "success": False, "reached": None, "objects": objects, **fields}))


def record(folder: Path, *messages: tuple[str, int, bytes]) -> Path:
    writer = BagWriter(folder / "bag", {topic: kind for topic, (_, kind) in TOPICS.items()})
    for message in messages:
        writer.write(*message)
    writer.close()
    return folder / "bag"


@pytest.fixture(scope="module")
def projector() -> World:
    world = World(render_size=SIDE, render=False)
    world.reset(sample_scene(0, split="all"))
    return world


def episode_messages(start_ns: int = 0) -> list[tuple[str, int, bytes]]:
    """Messages: status, instruction, and pairs of images 50 ms apart; the second pair comes with a chunk."""
    pairs = []
    for k in range(3):
        stamp_ns = start_ns + k * 50_000_000
        pairs.append((SCENE_IMAGE, stamp_ns + 1, image((0, 0, 255), stamp_ns)))
        pairs.append((WRIST_IMAGE, stamp_ns + 2, image((255, 0, 0), stamp_ns)))
    predicted = chunk([(0.35, 0.0, 0.1), (0.4, 0.0, 0.1), (0.45, 0.0, 0.1)], start_ns)
    return [
        (STATUS, start_ns, status()),
        (INSTRUCTION, start_ns, text("touch the red cube")),
        *pairs[:2],
        (CHUNK, start_ns + 5, predicted),
        *pairs[2:4],
        (STATUS, start_ns + 60_000_000, status(done=True, success=True, reached=0)),
        *pairs[4:],
    ]


def near_tip(picture: np.ndarray, projector: World, tip: tuple[float, float, float]) -> np.ndarray:
    u, v = projector.project("scene", tip)
    return picture[HEADER + round(v), round(u)].astype(int)


def test_frames_show_both_cameras_the_chunk_ahead_and_the_verdict(tmp_path: Path, projector: World) -> None:
    bag = record(tmp_path, *episode_messages())
    before, during, after = (frame.picture for frame in frames(bag, Film(1, projector)))
    assert before.shape == (HEADER + SIDE, 2 * SIDE, 3)
    blue, red = (255, 0, 0), (0, 0, 255)  # blue first
    assert before[HEADER + 100, 100] == pytest.approx(np.array(blue), abs=8)
    assert before[HEADER + 100, SIDE + 100] == pytest.approx(np.array(red), abs=8)
    for tip, due in (((0.35, 0.0, 0.1), True), ((0.45, 0.0, 0.1), True)):
        assert near_tip(before, projector, tip) == pytest.approx(np.array(blue), abs=8)
        assert (near_tip(during, projector, tip)[2] > 200) == due  # orange
    assert near_tip(after, projector, (0.35, 0.0, 0.1)) == pytest.approx(np.array(blue), abs=8)  # has passed by now
    assert near_tip(after, projector, (0.45, 0.0, 0.1))[2] > 200
    corner = (slice(0, HEADER), slice(2 * SIDE - 60, 2 * SIDE))
    assert during[corner].max() < 60
    assert after[corner][..., 1].max() > 150  # a green mark


def test_images_of_different_instants_or_outside_episodes_make_no_frame(tmp_path: Path, projector: World) -> None:
    early = [(SCENE_IMAGE, 1, image((0, 0, 0), 0)), (WRIST_IMAGE, 2, image((0, 0, 0), 0))]
    bag = record(
        tmp_path,
        *early,
        (INSTRUCTION, 3, text("touch the red cube")),
        (SCENE_IMAGE, 4, image((0, 0, 0), 100)),
        (WRIST_IMAGE, 5, image((0, 0, 0), 200)),
    )
    assert list(frames(bag, Film(1, projector))) == []


@pytest.mark.parametrize(("reached", "wide"), [(0, 250), (None, 120)])
def test_a_failure_says_what_was_reached_instead(
    tmp_path: Path, projector: World, reached: int | None, wide: int
) -> None:
    messages = episode_messages()
    bag = record(tmp_path, *messages[:2], (STATUS, 1, status(done=True, reached=reached)), *messages[2:4])
    (frame,) = frames(bag, Film(1, projector))
    inked = np.flatnonzero(frame.picture[:HEADER, SIDE:, 2].max(axis=0) > 150)
    assert np.ptp(inked) == pytest.approx(wide, rel=0.3)


def test_the_film_runs_in_real_time_and_skips_pauses(tmp_path: Path) -> None:
    bag = record(tmp_path, *episode_messages(), *episode_messages(60 * NS))
    assert make_video(bag, tmp_path / "demo.mp4", 2) == 6
    with av.open(str(tmp_path / "demo.mp4")) as film:
        (stream,) = film.streams.video
        assert (stream.codec_context.name, stream.width, stream.height) == ("h264", 2 * SIDE, HEADER + SIDE)
        times_s = [float(frame.pts * frame.time_base) for frame in film.decode(stream)]
    assert np.diff(times_s) == pytest.approx([0.05, 0.05, 0.5, 0.05, 0.05], abs=2e-3)
