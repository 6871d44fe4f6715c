"""From a dataset to a bag (mcap) as a robot would have recorded it: images, states, instructions, commands.

Images are PNG, so that the video's loss stays the only one. A dataset that we made from a bag names its robot, topics
and stamps, so they are the same again. Others need a robot file, and get stamps that count from `START_NS`. A topic of
markers tells the episodes apart.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.bags.writer import BagFile
from ki_vla_ros.errors import ConfigurationError, InputError, did_you_mean
from ki_vla_ros.files import read_json
from ki_vla_ros.messages import COMPRESSED_IMAGE as IMAGE_TYPE
from ki_vla_ros.messages import TEXT, typestore
from ki_vla_ros.records import NS_PER_S
from ki_vla_ros.robot import CameraSpec, Robot
from ki_vla_ros.settings import NODE, Settings, resolve
from training.convert.episodes import DATASET_MARKER
from training.convert.messages import Message, RobotMessages, header
from training.convert.sources import change_cameras, find_sources, plain_robot, rename_topics
from training.data.lerobot import ACTION, SOURCE, STAMP, STATE, Dataset, Episode, read_robot_columns

START_NS: Final = 1_700_000_000 * NS_PER_S
PAUSE_NS: Final = NS_PER_S  # between episodes whose stamps are not known


@dataclass(frozen=True)
class Recorded:
    """The robot whose numbers a dataset has, with the full names of its topics, and the cameras that both have.

    `unsaid`: cameras that only one of them has, with the reason.
    """

    robot: Robot
    instruction: str
    unsaid: Mapping[str, str]

    @classmethod
    def of(cls, dataset: Dataset, robot: Robot | None = None) -> Recorded:
        """`robot`, or the one that the dataset was made for.

        ConfigurationError without either: numbers without a unit must not become radians.
        """
        path = dataset.folder / SOURCE
        try:
            made: Any = read_json(path) if path.exists() else {}
            instruction = made.get("topics", {}).get("instruction", f"{NODE}/instruction")
            if robot is not None:
                found = find_sources(Settings(), robot, node=NODE).robot
            elif "robot" in made:
                found = Robot.model_validate(made["robot"])
            elif made:
                found = _plain_robot(dataset, made["topics"])
            else:
                raise ConfigurationError(
                    f"dataset {dataset.folder}: expected --robot FILE, which says what its numbers are (rad, degrees, "
                    "percent?) and which topics they belong to, got neither that nor a dataset of from-bag; "
                    "config/robots/ has examples"
                )
            cameras, unsaid = _share_cameras(dataset, found)
            topics = [camera.topic or "" for camera in cameras]
            for name in (instruction, *topics, *(s.topic for s in found.signals), *(o.topic for o in found.outputs)):
                resolve(name, NODE)
            if len(set(topics)) < len(topics):
                raise ValueError(f"two cameras on one topic among {', '.join(topics)}")
            return cls(change_cameras(found, cameras), instruction, unsaid)
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            raise ConfigurationError(
                f"{path}: expected the robot and the topics of the bags, got something else ({error})"
            ) from error


def _plain_robot(dataset: Dataset, topics: Any) -> Robot:
    """The robot of a dataset that says topics and no units: its numbers are those of its topics."""
    joints = _names(dataset, STATE)
    if ACTION in dataset.info.features and _names(dataset, ACTION) != joints:
        raise ConfigurationError(
            f"dataset {dataset.folder}: expected {ACTION} to have the names of {STATE}, got "
            f"{', '.join(_names(dataset, ACTION))}: these actions are not joint positions that a controller takes; "
            "name the robot with --robot"
        )
    cameras = [
        CameraSpec(name=name, topic=topics["cameras"][name], dataset=key) for key, name in dataset.info.cameras.items()
    ]
    robot = plain_robot(cameras, joints)
    read = dict.fromkeys({signal.topic for signal in robot.signals}, topics.get("joint_states", "/joint_states"))
    command = topics.get("command", "/arm_controller/joint_trajectory")
    return rename_topics(robot, sources=read, outputs={robot.outputs[0].name: command})


def _share_cameras(dataset: Dataset, robot: Robot) -> tuple[list[CameraSpec], dict[str, str]]:
    """The robot's cameras whose images are in the dataset, with the topic of compressed images; and why others are not.

    ConfigurationError if the dataset lacks a camera that the policy needs.
    """
    shared, unsaid, keys = [], {}, dataset.info.cameras
    for camera in robot.cameras:
        if camera.key in keys:
            topic = f"{(camera.topic or '').removesuffix('/compressed')}/compressed"
            shared.append(camera.model_copy(update={"topic": topic}))
        elif camera.optional:
            unsaid[f"camera {camera.name}"] = f"the dataset has no images {camera.key}"
        else:
            raise ConfigurationError(
                f"dataset {dataset.folder}: robot {robot.name}: cameras: {camera.name!r}: dataset: expected one of "
                f"{', '.join(keys) or 'no camera'}, got {camera.key}{did_you_mean(camera.key, keys)}"
            )
    known = [camera.key for camera in robot.cameras]
    return shared, unsaid | {key: "the robot file has no camera of this key" for key in keys if key not in known}


def write_bag(dataset: Dataset, out: Path, robot: Robot | None = None) -> tuple[int, dict[str, str]]:
    """Write the bag; its number of messages, and what is not in it, with the reason.

    ConfigurationError if `out` exists, or the dataset does not fit the robot. After any other error, which says so, the
    bag holds the messages until then and has no index.
    """
    recorded, written = Recorded.of(dataset, robot), 0
    messages = RobotMessages(recorded.robot)
    kinds = messages.types
    kinds |= {camera.topic or "": IMAGE_TYPE for camera in recorded.robot.cameras}
    kinds |= dict.fromkeys((recorded.instruction, DATASET_MARKER.topic), TEXT)
    schedule = _schedule(dataset)
    if schedule:  # so that a dataset that does not fit leaves no bag
        _rows(dataset, schedule[0], messages)
    with BagFile(out) as bag:
        for name, kind in kinds.items():
            bag.add_topic(name, kind)
        try:
            for times in schedule:
                for log_ns, message in _messages(dataset, times, recorded, messages):
                    kind = message.type
                    bag.write(message.topic, kind, log_ns, bytes(typestore().serialize_cdr(message.content, kind)))
                    written += 1
        except InputError as error:
            raise InputError(f"{error}; bag {out} has only the {written} messages before that, and no index") from error
    return written, {**dataset.ignored, **recorded.unsaid, **messages.unsaid}


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
        due_N = stamp_N + _period_ns(dataset)
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


def _period_ns(dataset: Dataset) -> int:
    """Rounded as from-bag rounds it: 1 ns less, and an episode would be over before its last action is due."""
    return round(NS_PER_S / dataset.info.fps)


def _grid(dataset: Dataset, episode: Episode) -> NDArray[np.int64]:
    return np.floor(np.arange(episode.length) * NS_PER_S / dataset.info.fps).astype(np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """An episode in the robot's units; no actions (None) where the dataset has none."""

    columns: Mapping[str, NDArray[Any]]
    signal_NM: NDArray[np.float64]
    action_ND: NDArray[np.float64] | None
    target_NJ: NDArray[np.float64] | None


def _rows(dataset: Dataset, times: _Times, messages: RobotMessages) -> _Rows:
    columns = dataset.columns(times.episode)
    try:
        state_NS, action_ND = read_robot_columns(dataset, messages.robot, columns)
        signal_NM = messages.signals(state_NS)
        if action_ND is None:
            return _Rows(columns, signal_NM, None, None)
        target_NJ = messages.targets(action_ND, signal_NM, 1.0 / float(dataset.info.fps))
    except InputError as error:
        raise InputError(f"dataset {dataset.folder}: episode {times.episode.index}: {error}") from error
    return _Rows(columns, signal_NM, action_ND, target_NJ)


def _messages(
    dataset: Dataset, times: _Times, recorded: Recorded, messages: RobotMessages
) -> Iterator[tuple[int, Message]]:
    """Log time and message of an episode, in order."""
    episode, rows = times.episode, _rows(dataset, times, messages)
    stamp_N = _stamps(dataset, episode, times.stamp_ns)
    due_N, commanded = stamp_N + _period_ns(dataset), 0
    images = {camera.name: dataset.images(episode, camera.key) for camera in recorded.robot.cameras}
    tasks, task = dataset.task_of(rows.columns), None
    marker = {DATASET_MARKER.key: episode.index, "instruction": tasks[0], "begin_ns": times.stamp_ns}
    yield times.begin_ns, _text(DATASET_MARKER.topic, json.dumps(marker))
    for i, log_ns in enumerate([*(times.first_ns + _grid(dataset, episode)).tolist(), times.end_ns]):
        while rows.action_ND is not None and commanded < episode.length and due_N[commanded] <= log_ns:
            assert rows.target_NJ is not None
            due_ns = int(due_N[commanded])
            for message in messages.commands(rows.action_ND[commanded], rows.target_NJ[commanded], due_ns):
                yield due_ns, message
            commanded += 1
        if i == episode.length:
            break
        stamp_ns = int(stamp_N[i])
        if tasks[i] != task:
            task = tasks[i]
            yield log_ns, _text(recorded.instruction, task)
        for message in messages.states(rows.signal_NM[i], stamp_ns):
            yield log_ns, message
        for camera in recorded.robot.cameras:
            yield log_ns, _image(camera.topic or "", stamp_ns, camera.name, next(images[camera.name]))
    yield times.end_ns, _text(DATASET_MARKER.topic, json.dumps({DATASET_MARKER.key: None}))


def _names(dataset: Dataset, key: str) -> tuple[str, ...]:
    feature = dataset.info.features.get(key)
    names = feature.element_names if feature else ()
    if feature is None or len(names) != feature.shape[0]:
        raise ConfigurationError(
            f"dataset {dataset.folder}: expected a feature {key!r} with a name for each element, got "
            f"{list(names) if feature else 'no such feature'}"
        )
    return names


def _text(topic: str, text: str) -> Message:
    return Message(topic, TEXT, typestore().types[TEXT](data=text))


def _image(topic: str, stamp_ns: int, camera: str, rgb_HWC: NDArray[np.uint8]) -> Message:
    _, png = cv2.imencode(".png", cv2.cvtColor(rgb_HWC, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 1])
    kind = typestore().types[IMAGE_TYPE]
    content = kind(header=header(stamp_ns, camera), format="rgb8; png compressed bgr8", data=png.ravel())
    return Message(topic, IMAGE_TYPE, content)
