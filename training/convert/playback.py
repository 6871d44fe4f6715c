"""From a dataset to a bag (mcap) as a robot would have recorded it: images, joint states, instructions, commands.

Images are PNG, so that the video's loss stays the only one. A dataset that we made from a bag names its topics and
stamps, so they are the same again. Other datasets name neither: they get the topics below, and stamps that count from
`START_NS`. A topic of markers tells the episodes apart.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.bags.writer import BagFile
from ki_vla_ros.errors import ConfigurationError, InputError
from ki_vla_ros.files import read_json
from ki_vla_ros.messages import TRAJECTORY, typestore
from ki_vla_ros.records import NS_PER_S
from ki_vla_ros.settings import resolve
from training.convert.episodes import MARKERS
from training.data.lerobot import ACTION, SOURCE, STAMP, STATE, Dataset, Episode

START_NS: Final = 1_700_000_000 * NS_PER_S
PAUSE_NS: Final = NS_PER_S  # between episodes whose stamps are not known
MARKER: Final = MARKERS[-1]
TYPES: Final = {
    "image": "sensor_msgs/msg/CompressedImage",
    "joints": "sensor_msgs/msg/JointState",
    "command": TRAJECTORY,
    "text": "std_msgs/msg/String",
}


@dataclass(frozen=True)
class Topics:
    """The topics of the bag; `cameras` by camera name."""

    cameras: Mapping[str, str]
    joint_states: str = "/joint_states"
    instruction: str = "/policy/instruction"
    command: str = "/arm_controller/joint_trajectory"

    @classmethod
    def of(cls, dataset: Dataset) -> Topics:
        """Those of the bags that the dataset was made from, if it names them."""
        path = dataset.folder / SOURCE
        try:
            given = read_json(path)["topics"] if path.exists() else {"cameras": {}}
            named = {camera: name_topic(camera) for camera in dataset.cameras} | given.pop("cameras")
            compressed = {camera: f"{topic.removesuffix('/compressed')}/compressed" for camera, topic in named.items()}
            topics = cls(compressed, **given)
            if len(set(compressed.values())) < len(compressed):
                raise ValueError(f"two cameras on one topic among {', '.join(compressed.values())}")
            for name in (*compressed.values(), topics.joint_states, topics.instruction, topics.command):
                resolve(name, "/convert")
            return topics
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            raise ConfigurationError(
                f"{path}: expected the topics of the bags, got something else ({error})"
            ) from error


def name_topic(camera: str) -> str:
    """The topic of a foreign dataset's camera, which may be called as no topic may."""
    word = re.sub(r"\W", "_", camera, flags=re.ASCII)
    return f"/camera/{'_' * word[:1].isdigit()}{word}/image_raw"


def write_bag(dataset: Dataset, out: Path) -> int:
    """Write the bag, return its number of messages; ConfigurationError if `out` exists or joints have no names.

    After any other error, which says so, the bag holds the messages until then and has no index.
    """
    joints = _names(dataset, STATE)
    if ACTION in dataset.info.features and _names(dataset, ACTION) != joints:
        raise ConfigurationError(
            f"dataset {dataset.folder}: expected {ACTION} to have the names of {STATE}, got "
            f"{', '.join(_names(dataset, ACTION))}: these actions are not joint positions that a controller takes"
        )
    topics, written = Topics.of(dataset), 0
    kinds = dict.fromkeys(topics.cameras.values(), TYPES["image"])
    kinds |= {topics.joint_states: TYPES["joints"], topics.command: TYPES["command"]}
    kinds |= dict.fromkeys((topics.instruction, MARKER.topic), TYPES["text"])
    schedule = _schedule(dataset)
    with BagFile(out) as bag:
        for name, kind in kinds.items():
            bag.add_topic(name, kind)
        try:
            for times in schedule:
                for topic, log_ns, message in _messages(dataset, times, topics, joints):
                    bag.write(topic, kinds[topic], log_ns, bytes(typestore().serialize_cdr(message, kinds[topic])))
                    written += 1
        except InputError as error:
            raise InputError(f"{error}; bag {out} has only the {written} messages before that, and no index") from error
    return written


@dataclass(frozen=True, slots=True)
class _Times:
    """When an episode's messages are logged: its mark, its first frame, its end; `stamp_ns`: of its first frame."""

    episode: Episode
    begin_ns: int
    first_ns: int
    end_ns: int
    stamp_ns: int


def _schedule(dataset: Dataset) -> list[_Times]:
    """The episodes in the order of their stamps; ConfigurationError if they overlap in time.

    A frame's messages are logged at evenly spaced times, whatever their stamps: so converting the bag at the dataset's
    rate gives the same frames, however the cameras' stamps lay relative to the ticks. A command is logged when it is
    due, because a controller rejects a trajectory that has ended before it arrives.
    """
    stamped = STAMP in dataset.info.features
    firsts_ns = [int(dataset.columns(episode)[STAMP][0]) if stamped else 0 for episode in dataset.episodes]
    schedule: list[_Times] = []
    end_ns, fps = 0, Fraction(dataset.info.fps)
    for _, episode in sorted(zip(firsts_ns, dataset.episodes, strict=True), key=lambda pair: pair[0]):
        stamp_N, grid_N = _stamps(dataset, episode, end_ns + PAUSE_NS), _grid(dataset, episode)
        due_N = stamp_N + NS_PER_S // fps
        if schedule and int(due_N[0]) < end_ns:
            raise ConfigurationError(
                f"dataset {dataset.folder}: expected episodes one after another, got episode {episode.index}, which "
                f"begins {(end_ns - int(due_N[0])) / NS_PER_S:.3f} s before the end of episode "
                f"{schedule[-1].episode.index}; convert the bags that they come from into separate datasets"
            )
        first_ns = max(int((stamp_N - grid_N).max()), end_ns)  # no frame is logged before it was taken
        # The mark comes before the first command, which may be due before its frame is logged. Ticks count from the
        # mark, so the first frame follows it by a whole number of them.
        begin_ns = max(min(first_ns, int(due_N[0])), end_ns)
        first_ns = begin_ns + -((begin_ns - first_ns) * fps // NS_PER_S) * NS_PER_S // fps
        # It is over when the last action is due, and the last tick was (ticks are up to 1 ns later than this grid).
        end_ns = max(int(due_N[-1]), first_ns + int(grid_N[-1]) + 2)
        schedule.append(_Times(episode, begin_ns, first_ns, end_ns, int(stamp_N[0])))
    return schedule


def _stamps(dataset: Dataset, episode: Episode, start_ns: int) -> NDArray[np.int64]:
    """The frames' stamps; where the dataset has none, they begin at `start_ns`, but not before START_NS."""
    columns = dataset.columns(episode)
    return columns[STAMP] if STAMP in columns else max(START_NS, start_ns) + _grid(dataset, episode)


def _grid(dataset: Dataset, episode: Episode) -> NDArray[np.int64]:
    return np.floor(np.arange(episode.length) * NS_PER_S / dataset.info.fps).astype(np.int64)


def _messages(
    dataset: Dataset, times: _Times, topics: Topics, joints: tuple[str, ...]
) -> Iterator[tuple[str, int, Any]]:
    """Topic, log time and message of an episode, in order."""
    episode = times.episode
    columns, period_ns = dataset.columns(episode), NS_PER_S // Fraction(dataset.info.fps)
    stamp_N = _stamps(dataset, episode, times.stamp_ns)
    due_N, commanded = stamp_N + period_ns, 0 if ACTION in columns else episode.length
    images = {camera: dataset.images(episode, camera) for camera in topics.cameras}
    tasks, task = dataset.task_of(columns), None
    marker = {MARKER.key: episode.index, "instruction": tasks[0], "begin_ns": times.stamp_ns}
    yield MARKER.topic, times.begin_ns, _text(json.dumps(marker))
    for i, log_ns in enumerate([*(times.first_ns + _grid(dataset, episode)).tolist(), times.end_ns]):
        while commanded < episode.length and due_N[commanded] <= log_ns:
            due_ns = int(due_N[commanded])
            yield topics.command, due_ns, _command(due_ns, joints, columns[ACTION][commanded])
            commanded += 1
        if i == episode.length:
            break
        stamp_ns = int(stamp_N[i])
        if tasks[i] != task:
            task = tasks[i]
            yield topics.instruction, log_ns, _text(task)
        yield topics.joint_states, log_ns, _joint_state(stamp_ns, joints, columns[STATE][i])
        for camera, topic in topics.cameras.items():
            yield topic, log_ns, _image(stamp_ns, camera, next(images[camera]))
    yield MARKER.topic, times.end_ns, _text(json.dumps({MARKER.key: None}))


def _names(dataset: Dataset, key: str) -> tuple[str, ...]:
    feature = dataset.info.features.get(key)
    names = feature.element_names if feature else ()
    if feature is None or len(names) != feature.shape[0]:
        raise ConfigurationError(
            f"dataset {dataset.folder}: expected a feature {key!r} with a name for each element, got "
            f"{list(names) if feature else 'no such feature'}"
        )
    return names


def _text(text: str) -> Any:
    return typestore().types[TYPES["text"]](data=text)


def _header(stamp_ns: int, frame_id: str = "") -> Any:
    sec, nanosec = divmod(stamp_ns, NS_PER_S)
    stamp = typestore().types["builtin_interfaces/msg/Time"](sec=sec, nanosec=nanosec)
    return typestore().types["std_msgs/msg/Header"](stamp=stamp, frame_id=frame_id)


def _joint_state(stamp_ns: int, joints: tuple[str, ...], position_J: NDArray[np.floating]) -> Any:
    nothing = np.zeros(0)
    return typestore().types[TYPES["joints"]](
        header=_header(stamp_ns),
        name=list(joints),
        position=position_J.astype(np.float64),
        velocity=nothing,
        effort=nothing,
    )


def _command(due_ns: int, joints: tuple[str, ...], position_J: NDArray[np.floating]) -> Any:
    """A single point, due at `due_ns` with no motion towards it: the time before is the previous frame's."""
    nothing = np.zeros(0)
    zero = typestore().types["builtin_interfaces/msg/Duration"](sec=0, nanosec=0)
    point = typestore().types["trajectory_msgs/msg/JointTrajectoryPoint"](
        positions=position_J.astype(np.float64),
        velocities=nothing,
        accelerations=nothing,
        effort=nothing,
        time_from_start=zero,
    )
    return typestore().types[TRAJECTORY](header=_header(due_ns), joint_names=list(joints), points=[point])


def _image(stamp_ns: int, camera: str, rgb_HWC: NDArray[np.uint8]) -> Any:
    _, png = cv2.imencode(".png", cv2.cvtColor(rgb_HWC, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 1])
    kind = typestore().types[TYPES["image"]]
    return kind(header=_header(stamp_ns, camera), format="rgb8; png compressed bgr8", data=png.ravel())
