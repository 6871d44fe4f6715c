"""What a bag has on its topics, by its beginning: stamps, names of joints, kinds of images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from ki_vla_ros.bags import Bag
from ki_vla_ros.errors import ConfigurationError, InputError, did_you_mean
from ki_vla_ros.messages import (
    COMPRESSED_IMAGE,
    IMAGE,
    JOINT_STATE,
    POSITIONS,
    TRAJECTORY,
    BagMessage,
    camera_frame,
    decode,
    read_stamp_ns,
)
from ki_vla_ros.records import NS_PER_S
from ki_vla_ros.robot import Output, Robot
from training.convert.sources import Sources

# So many messages of each topic are looked at, and, where joints are missing in them, so much of the bag.
ENOUGH: Final = 20
LONGEST_NS: Final = 10 * NS_PER_S


@dataclass
class _Seen:
    """What the first messages of a topic have: names of joints, width of an array; `depth`: why they are no colour."""

    stamps: list[tuple[int, int]] = field(default_factory=list)
    names: dict[str, None] = field(default_factory=dict)
    width: int | None = None
    depth: str | None = None


class Beginning:
    """The beginning of a bag. Damaged messages say nothing here."""

    def __init__(self, bag: Bag, sources: Sources, commands: bool) -> None:
        self._bag, self._robot = bag, sources.robot
        self._outputs: Sequence[Output] = sources.commanded() if commands else ()
        self._commands = {output.topic for output in self._outputs}
        self._joints = {(s.topic, s.part) for s in self._robot.signals if s.type == JOINT_STATE}
        if commands:
            recorded = [action for action in self._robot.actions if action.recorded is not None]
            self._joints |= {(a.recorded.topic, a.recorded.joint or a.target) for a in recorded if a.recorded}
        topics = (*sources.cameras.values(), *sources.signal_topics, *(topic for topic, _ in self._joints))
        self._seen = {topic: _Seen() for topic in (*topics, *self._commands)}
        self._look()

    @property
    def stamps(self) -> dict[str, list[tuple[int, int]]]:
        """The first stamps and log times of each topic that has stamps."""
        return {topic: seen.stamps for topic, seen in self._seen.items() if seen.stamps}

    def _look(self) -> None:
        looked_ns, last_ns = 0, None
        for message in self._bag.messages(set(self._seen)):
            if last_ns is not None:  # a silence, after a stray message, say, does not count
                looked_ns += min(message.log_ns - last_ns, NS_PER_S)
            last_ns = message.log_ns
            if looked_ns > LONGEST_NS or self._is_enough():
                break
            try:
                self._take(self._seen[message.topic], message)
            except InputError:
                continue  # counted when it is converted

    def _is_enough(self) -> bool:
        counted = all(len(seen.stamps) >= ENOUGH for topic, seen in self._seen.items() if topic not in self._commands)
        return counted and all(joint in self._seen[topic].names for topic, joint in self._joints)

    def _take(self, seen: _Seen, message: BagMessage) -> None:
        kind = message.type
        if kind == POSITIONS:
            seen.width = len(decode(message).data)
            return
        if message.topic in self._commands and kind != TRAJECTORY:
            return  # in force when it arrives, whatever its stamp
        stamp_ns = read_stamp_ns(message)
        if kind == TRAJECTORY:
            seen.names |= dict.fromkeys(decode(message).joint_names)
            if stamp_ns == 0:
                return  # which means its time of arrival
        elif kind == JOINT_STATE:
            seen.names |= dict.fromkeys(decode(message).name)
        elif kind in (IMAGE, COMPRESSED_IMAGE) and not seen.stamps:
            try:
                camera_frame(message, message.topic)
            except InputError as error:
                seen.depth = str(error) if "depth" in str(error) else None
        seen.stamps.append((stamp_ns, message.log_ns))

    def check(self) -> None:
        """ConfigurationError where it is no recording of the robot, with the lines of the robot file that say so."""
        if faults := list(self._faults()):
            raise ConfigurationError(f"bag {self._bag.path}: robot {self._robot.name}: {'; '.join(faults)}")

    def _faults(self) -> Iterator[str]:
        for camera in self._robot.cameras:
            if depth := self._seen[camera.topic or ""].depth:
                yield f"cameras: {camera.name!r}: topic: {depth}"
        for topic, joint in sorted(self._joints):
            if (names := self._seen[topic].names) and joint not in names:
                line = _line(self._robot, topic, joint)
                yield f"{line}: expected {joint!r} on {topic}, got {', '.join(names)}{did_you_mean(joint, names)}"
        for output in self._outputs:
            names, width = self._seen[output.topic].names, self._seen[output.topic].width
            actions = self._robot.actions_of(output)
            for action in actions:
                if names and action.target not in names:
                    yield (
                        f"actions: {action.name!r}: joint: expected {action.target!r} on {output.topic}, got "
                        f"{', '.join(names)}{did_you_mean(action.target, names)}"
                    )
            if width is not None and width != len(actions):
                yield (
                    f"outputs: {output.name!r}: expected a number for each of its {len(actions)} actions on "
                    f"{output.topic}, got {width}"
                )


def _line(robot: Robot, topic: str, joint: str) -> str:
    """The line of the robot file that names a joint on a topic."""
    for dimension in robot.state:
        if dimension.kind != "pose" and (dimension.source.topic, dimension.joint) == (topic, joint):
            return f"state: {dimension.name!r}: source.joint"
    for action in robot.actions:
        for field_name, source in (("source", action.source), ("recorded", action.recorded)):
            if source is not None and (source.topic, source.joint or action.target) == (topic, joint):
                return f"actions: {action.name!r}: {field_name}.joint"
    action = next(action for action in robot.actions if action.target == joint)
    return f"actions: {action.name!r}: source"
