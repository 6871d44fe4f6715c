"""What a bag shows of a robot: joints, commands, poses, images, and the URDF if it was recorded.

One pass over the topics with numbers; of the images only the first of each topic, and their number.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ki_vla_ros.bags import Bag, open_bag
from ki_vla_ros.errors import InputError
from ki_vla_ros.messages import COMPRESSED_IMAGE, IMAGE, TEXT, BagMessage, camera_frame, decode, is_depth, read_image
from ki_vla_ros.records import NS_PER_S, time_to_ns
from ki_vla_ros.robot import (
    ARRAY,
    GRIPPER_COMMAND,
    JOINT_STATE,
    POSE,
    TRAJECTORY,
    TWIST,
    TWIST_STAMPED,
)
from ki_vla_ros.survey.tracks import LONGEST_HOLD_NS, Track, held, period_s

NUMBERS = (JOINT_STATE, TRAJECTORY, ARRAY, TWIST, TWIST_STAMPED, POSE)
IMAGES = (IMAGE, COMPRESSED_IMAGE)
# Messages per topic whose content is read; of others only the time.
MOST_READ = 20_000
# An image of each topic is among the first this many messages, or is not looked for.
MOST_IMAGES = 3_000
FEEDBACK = "/_action/feedback"


@dataclass
class Topic:
    """One topic. `tracks`: by joint, index, or component; of JointStates `velocity` has the other field."""

    name: str
    type: str
    times: array[int] = field(default_factory=lambda: array("q"))
    tracks: dict[str, Track] = field(default_factory=dict)
    velocity: dict[str, Track] = field(default_factory=dict)
    names: dict[str, None] = field(default_factory=dict)  # in JointStates, also those without a number
    pending: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # trajectories' points not replaced yet
    paths: dict[str, Track] = field(default_factory=dict)  # what was commanded, when the state should have come to it
    frame_id: str = ""
    points: int = 0  # most points of a trajectory
    parts: bool = False  # not every message has every joint
    fault: str = ""  # why the first message that could not be read was refused

    def path(self, part: str) -> Track:
        """What was commanded, each value at the time when the state should have come to it."""
        return self.paths[part] if part in self.paths else held(*self.tracks[part].arrays())

    def replace_points(self, joint: str, now_ns: int, points: list[tuple[int, float]]) -> None:
        """The points due by now were commanded; the last of them was held since. Of others the first was begun."""
        path, before = self.paths.setdefault(joint, Track()), self.pending.get(joint)
        done = [point for point in before or () if point[0] <= now_ns]
        for due_ns, value in done[:-1]:
            path.add(due_ns, value)
        if done:
            path.add(min(now_ns, done[-1][0] + LONGEST_HOLD_NS), done[-1][1])
        elif before:
            path.add(now_ns, before[0][1])
        self.pending[joint] = points

    @property
    def period_s(self) -> float | None:
        return period_s(self.times)


@dataclass(frozen=True)
class Images:
    """One topic of images; `fault`: why they cannot be used."""

    name: str
    type: str
    rate_hz: float | None
    size: tuple[int, int] = (0, 0)  # height, width
    fault: str = ""


@dataclass
class BagSurvey:
    """What was seen in a bag; `types` has all topics with messages."""

    path: Path
    types: dict[str, str]
    topics: dict[str, Topic]
    images: dict[str, Images]
    robot_description: str
    gripper_actions: list[str]
    seconds: float
    faults: list[str]

    def of_type(self, *types: str) -> list[Topic]:
        return [topic for topic in self.topics.values() if topic.type in types]


def survey_bag(path: Path) -> BagSurvey:
    """ConfigurationError if there is no bag; damage is in `faults`."""
    with open_bag(path) as bag:
        return survey(bag)


def survey(bag: Bag) -> BagSurvey:
    """The same of an open bag."""
    types = {name: topic.type for name, topic in bag.topics.items() if topic.count != 0 and not _ours(name)}
    seconds = 0.0 if bag.start_ns is None or bag.end_ns is None else (bag.end_ns - bag.start_ns) / NS_PER_S
    topics = {name: Topic(name, kind) for name, kind in types.items() if kind in NUMBERS}
    descriptions = [n for n, kind in types.items() if kind == TEXT and n.endswith("robot_description")]
    every = {name: 1 + (bag.topics[name].count or 0) // MOST_READ for name in topics}
    description = ""
    for message in bag.messages([*topics, *descriptions]) if topics or descriptions else ():
        if message.topic in topics:
            topic = topics[message.topic]
            topic.times.append(message.log_ns)
            if message.type == topic.type and (len(topic.times) - 1) % every[message.topic] == 0:
                _read(topic, message)
        elif not description:
            description = _text(message)
    for topic in topics.values():
        for joint, points in list(topic.pending.items()):
            topic.replace_points(joint, points[-1][0] + LONGEST_HOLD_NS, [])
    images = {image.name: image for image in _survey_images(bag, types, seconds)}
    return BagSurvey(
        path=bag.path,
        types=types,
        topics={name: topic for name, topic in topics.items() if topic.times},
        images=images,
        robot_description=description,
        gripper_actions=[
            name.removesuffix(FEEDBACK)
            for name, kind in types.items()
            if name.endswith(FEEDBACK) and kind.startswith(GRIPPER_COMMAND)
        ],
        seconds=seconds,
        faults=[str(fault) for fault in bag.faults],
    )


def _ours(topic: str) -> bool:
    """The node's own chunks, and what it would have commanded in shadow mode: no robot's."""
    return topic.endswith("/chunk") or "/shadow/" in topic


def _text(message: BagMessage) -> str:
    try:
        return str(decode(message).data)
    except InputError:
        return ""


def _read(topic: Topic, message: BagMessage) -> None:
    try:
        _READERS[topic.type](topic, message)
    except (InputError, ValueError, IndexError) as error:
        topic.fault = topic.fault or str(error)


def _keep(tracks: dict[str, Track], time_ns: int, names: Sequence[str], values: Sequence[float]) -> None:
    for name, value in zip(names, values, strict=True):
        if math.isfinite(value):
            tracks.setdefault(name, Track()).add(time_ns, float(value))


def _read_joints(topic: Topic, message: BagMessage) -> None:
    state = decode(message)
    names = [str(name) for name in state.name]
    topic.names |= dict.fromkeys(names)
    topic.parts |= bool(topic.tracks) and set(names) != set(topic.tracks)
    if len(state.position):
        _keep(topic.tracks, message.log_ns, names, state.position)
    if len(state.velocity):
        _keep(topic.velocity, message.log_ns, names, state.velocity)


def _read_trajectory(topic: Topic, message: BagMessage) -> None:
    """Of each message the point that is due within a tenth of a second, else the first."""
    command = decode(message)
    topic.points = max(topic.points, len(command.points))
    timed = [(time_to_ns(point.time_from_start), point) for point in command.points]
    near = [pair for pair in timed if pair[0] <= NS_PER_S // 10] or timed[:1]
    if near:
        due_ns, point = near[-1]
        names = [str(name) for name in command.joint_names]
        _keep(topic.tracks, message.log_ns + min(due_ns, NS_PER_S // 10), names, point.positions)
        for i, name in enumerate(names):
            points = [(message.log_ns + ns, float(p.positions[i])) for ns, p in timed if math.isfinite(p.positions[i])]
            if points:
                topic.replace_points(name, message.log_ns, points)


def _read_array(topic: Topic, message: BagMessage) -> None:
    values = decode(message).data
    _keep(topic.tracks, message.log_ns, [str(i) for i in range(len(values))], values)


def _read_twist(topic: Topic, message: BagMessage) -> None:
    content = decode(message)
    if message.type == TWIST_STAMPED:
        topic.frame_id, content = str(content.header.frame_id), content.twist
    values = [getattr(part, axis) for part in (content.linear, content.angular) for axis in "xyz"]
    _keep(topic.tracks, message.log_ns, ["vx", "vy", "vz", "wx", "wy", "wz"], values)


def _read_pose(topic: Topic, message: BagMessage) -> None:
    content = decode(message)
    topic.frame_id, pose = str(content.header.frame_id), content.pose
    place, turn = pose.position, pose.orientation
    values = [place.x, place.y, place.z, turn.x, turn.y, turn.z, turn.w]
    _keep(topic.tracks, message.log_ns, ["x", "y", "z", "qx", "qy", "qz", "qw"], values)


_READERS = {
    JOINT_STATE: _read_joints,
    TRAJECTORY: _read_trajectory,
    ARRAY: _read_array,
    TWIST: _read_twist,
    TWIST_STAMPED: _read_twist,
    POSE: _read_pose,
}


def _survey_images(bag: Bag, types: dict[str, str], seconds: float) -> Iterator[Images]:
    wanted = {name for name, kind in types.items() if kind in IMAGES}
    firsts: dict[str, BagMessage] = {}
    for number, message in enumerate(bag.messages(wanted) if wanted else ()):
        firsts.setdefault(message.topic, message)
        if len(firsts) == len(wanted) or number > MOST_IMAGES:
            break
    for name in sorted(wanted):
        count = bag.topics[name].count
        rate = None if count is None or count < 2 or not seconds else (count - 1) / seconds
        if name not in firsts:
            yield Images(name, types[name], rate, fault="no image among the first messages")
            continue
        size, fault = (0, 0), ""
        try:
            if firsts[name].type == IMAGE and is_depth(read_image(name, firsts[name].data).encoding):
                raise InputError("depth, not colour")
            size = camera_frame(firsts[name], name).rgb_HWC.shape[:2]
        except InputError as error:
            fault = str(error)
        yield Images(name, types[name], rate, size, fault)
