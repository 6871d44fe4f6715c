"""The robot that a bag was recorded of, with the full names of its topics, and the node's settings for reading them.

They come from a robot file, the bag itself (`~/session`), the node's parameter file or the command line; they are never
guessed from similar names.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from pydantic import ValidationError

from ki_vla_ros.bags import Bag
from ki_vla_ros.bundle import Manifest, load_bundle
from ki_vla_ros.errors import ConfigurationError, describe_validation
from ki_vla_ros.messages import COMPRESSED_IMAGE, IMAGE
from ki_vla_ros.records import to_ns
from ki_vla_ros.robot import (
    FOLLOW_TRAJECTORY,
    GRIPPER_COMMAND,
    JOINT_STATE,
    ActionDimension,
    CameraSpec,
    Output,
    Robot,
    Source,
    StateDimension,
)
from ki_vla_ros.settings import DEFAULT_COMMAND, Session, Settings, command_topics, resolve, signal_topics
from ki_vla_ros.share import find_bundle

# What is said of joints of which only the names are known: wider than any place and speed that a message may say.
UNKNOWN = 1e6


@dataclass(frozen=True)
class Sources:
    """`robot` has the full names of its topics. `plain`: only the names of its joints are known, not even their unit.

    `instruction`: the node's at its start, by its settings. The rest is as `ObservationBuffer` takes it.
    """

    robot: Robot
    instruction_topic: str
    max_age_ns: int
    slop_ns: int
    camera_age_ns: Mapping[str, int]
    joint_age_ns: int | None = None
    use_receive_time: bool = False
    plain: bool = False
    instruction: str | None = None

    @property
    def cameras(self) -> dict[str, str]:
        """Topic by camera."""
        return {camera.name: camera.topic or "" for camera in self.robot.cameras}

    @property
    def signal_topics(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(signal.topic for signal in self.robot.signals))

    @property
    def recorded_topics(self) -> tuple[str, ...]:
        """Those of joint states that say what the actions were."""
        return tuple(dict.fromkeys(a.recorded.topic for a in self.robot.actions if a.recorded is not None))

    def commanded(self) -> tuple[Output, ...]:
        """The outputs whose own topic says what the actions were."""
        return tuple(o for o in self.robot.outputs if any(a.recorded is None for a in self.robot.actions_of(o)))

    def within(self, bag: Bag, commands: bool) -> Sources:
        """The same with cameras as recorded: a raw topic's images may be in the bag as `<topic>/compressed`.

        ConfigurationError names what the bag lacks, and the line of the robot file that says so; of the topics that
        commands come from, too, if they are asked for.
        """
        recorded = {name: _as_recorded(bag, topic) for name, topic in self.cameras.items()}
        found = replace(self, robot=rename_topics(self.robot, cameras=recorded))
        missing: list[str] = []
        for camera in found.robot.cameras:
            missing += _misfit(bag, f"camera {camera.name!r}", camera.topic or "", (IMAGE, COMPRESSED_IMAGE))
        for signal in {signal.topic: signal for signal in found.robot.signals}.values():
            what = "joint states" if signal.type == JOINT_STATE else "pose"
            missing += _misfit(bag, what, signal.topic, (signal.type,))
        if commands:
            for topic in found.recorded_topics:
                missing += _misfit(bag, "recorded joint states", topic, (JOINT_STATE,))
        if missing:
            raise ConfigurationError(
                f"bag {bag.path}: expected {', '.join(missing)}, got only {_list(bag)}; give the right names "
                f"{'' if self.plain else 'in the robot file (topic of cameras and of source) or '}"
                "with --params, --camera or --joint-states"
            )
        if commands:
            found._check_commands(bag)
        return found

    def _check_commands(self, bag: Bag) -> None:
        for output in self.commanded():
            line = f"outputs: {output.name!r}: topic"
            if output.type in (FOLLOW_TRAJECTORY, GRIPPER_COMMAND):
                raise ConfigurationError(
                    f"bag {bag.path}: robot {self.robot.name}: outputs: {output.name!r}: expected commands, got an "
                    f"action ({output.type}), whose goals bags do not have; give its actions `recorded`, a topic of "
                    "joint states that says what they were (the gripper's own, say), or take --actions states"
                )
            types = output.message_types
            if missing := _misfit(bag, f"output {output.name!r}", output.topic, types):
                raise ConfigurationError(
                    f"bag {bag.path}: expected commands on {missing[0]}, got only {_list(bag)}; name their topic "
                    f"(--command, or in the robot file {line}), give the actions `recorded` if a leader arm's joint "
                    "states say what they were, or take --actions states"
                )


def _as_recorded(bag: Bag, topic: str) -> str:
    compressed = f"{topic}/compressed"
    return compressed if compressed in bag.topics and not bag.has_messages(topic) else topic


def _misfit(bag: Bag, what: str, topic: str, types: Sequence[str]) -> list[str]:
    """What is wrong with a topic, as a list of none or one."""
    if topic not in bag.topics:
        return [f"{topic} ({what})"]
    if (got := bag.topics[topic].type) not in types:
        return [f"{topic} ({what}) of {' or '.join(types)} instead of {got}"]
    return []


def _list(bag: Bag) -> str:
    return ", ".join(f"{name} ({topic.type})" for name, topic in sorted(bag.topics.items())) or "no topics"


def rename_topics(
    robot: Robot,
    *,
    cameras: Mapping[str, str] = {},
    sources: Mapping[str, str] = {},
    outputs: Mapping[str, str] = {},
) -> Robot:
    """The same robot with other topics: of cameras and outputs by their names, of what is read by the topic's."""

    def renamed(source: Source | None) -> Source | None:
        return source and source.model_copy(update={"topic": sources.get(source.topic, source.topic)})

    fields = {name: getattr(robot, name) for name in Robot.model_fields}
    fields["cameras"] = tuple(c.model_copy(update={"topic": cameras.get(c.name, c.topic)}) for c in robot.cameras)
    fields["state"] = tuple(d.model_copy(update={"source": renamed(d.source)}) for d in robot.state)
    fields["actions"] = tuple(
        a.model_copy(update={"source": renamed(a.source), "recorded": renamed(a.recorded)}) for a in robot.actions
    )
    fields["outputs"] = tuple(
        o.model_copy(update={"topic": outputs.get(o.name, o.topic), "source": renamed(o.source)}) for o in robot.outputs
    )
    return Robot.model_validate(fields)


def choose_cameras(cameras: Sequence[CameraSpec], topics: Mapping[str, str]) -> Sequence[CameraSpec]:
    """Those of `topics`, if it has any, with these topics; ConfigurationError for names that no camera has."""
    known = {camera.name: camera for camera in cameras}
    try:
        chosen = [known.get(name) or CameraSpec(name=name) for name in topics]
    except ValidationError as error:
        raise ConfigurationError(f"--camera: {describe_validation(error)}") from error
    return [camera.model_copy(update={"topic": topics[camera.name]}) for camera in chosen] or cameras


def change_cameras(robot: Robot, cameras: Sequence[CameraSpec]) -> Robot:
    """The same with other cameras; ConfigurationError if they are none."""
    fields = {name: getattr(robot, name) for name in Robot.model_fields}
    try:
        return Robot.model_validate({**fields, "cameras": tuple(cameras)})
    except ValidationError as error:
        raise ConfigurationError(f"--camera: {describe_validation(error)}") from error


def plain_robot(cameras: Sequence[CameraSpec], joints: Sequence[str]) -> Robot:
    """A robot of which only cameras and the names of joints are known: no limits, and numbers as its topics have them.

    ConfigurationError for names that no robot has.
    """
    try:
        return Robot(
            name="robot",
            cameras=tuple(cameras),
            state=tuple(StateDimension(name=joint, kind="joint_position", unit="rad") for joint in joints),
            actions=tuple(
                ActionDimension(
                    name=joint,
                    kind="joint_position",
                    unit="rad",
                    lower=-UNKNOWN,
                    upper=UNKNOWN,
                    max_velocity=UNKNOWN,
                    output="arm",
                )
                for joint in joints
            ),
            outputs=(Output(name="arm", topic=DEFAULT_COMMAND),),
            action_period_s=0.1,
            horizon=2,
        )
    except ValidationError as error:
        raise ConfigurationError(f"cameras and joints: {describe_validation(error)}") from error


def find_sources(
    settings: Settings, robot: Robot, *, node: str, session: Session | None = None, plain: bool = False
) -> Sources:
    """Sources with topics as the node called `node` would resolve them; as `session` says, remappings included."""
    known = settings.on_robot(robot)
    cameras = {camera.name: known.camera(camera.name) for camera in robot.cameras}
    camera_topics = {name: resolve(camera.topic, node) for name, camera in cameras.items()}
    if session is not None:
        camera_topics |= {name: topic for name, topic in session.topics.cameras.items() if name in cameras}
    outputs = {name: command.topic for name, command in command_topics(settings, robot, node, session).items()}
    sources = {a.recorded.topic: resolve(a.recorded.topic, node) for a in robot.actions if a.recorded is not None}
    sources |= signal_topics(settings, robot, node, session)
    return Sources(
        robot=rename_topics(robot, cameras=camera_topics, sources=sources, outputs=outputs),
        instruction_topic=f"{node}/instruction" if session is None else session.topics.instruction,
        max_age_ns=to_ns(settings.max_age_s),
        slop_ns=to_ns(settings.sync_slop_s),
        camera_age_ns={name: to_ns(camera.max_age_s) for name, camera in cameras.items() if camera.max_age_s},
        joint_age_ns=to_ns(settings.joint_max_age_s) or None,
        use_receive_time=settings.use_receive_time,
        plain=plain,
        instruction=settings.instruction or None,
    )


def choose_topics(
    sources: Sources, joints: Sequence[str], commands: Sequence[str], instruction: str | None, node: str
) -> Sources:
    """The same with other topics: each TOPIC, where the robot has one of the kind, or NAME=TOPIC.

    NAME is an output of the robot file, or a topic in it that joint states come from. ConfigurationError for others.
    """
    robot = sources.robot
    read = dict.fromkeys(s.topic for s in robot.signals if s.type == JOINT_STATE) | dict.fromkeys(
        sources.recorded_topics
    )
    renamed = _by_name("--joint-states", joints, read, lambda name: name if name in read else resolve(name, node))
    outputs = _by_name("--command", commands, [output.name for output in robot.outputs], str)
    return replace(
        sources,
        robot=rename_topics(robot, sources=renamed, outputs=outputs),
        instruction_topic=instruction or sources.instruction_topic,
    )


def _by_name(option: str, given: Sequence[str], known: Collection[str], full: Callable[[str], str]) -> dict[str, str]:
    found = {}
    for text in given:
        name, _, topic = text.rpartition("=")
        if not name and len(known) != 1:
            raise ConfigurationError(
                f"{option}: expected NAME=TOPIC with one of {', '.join(known)} as NAME, got {text!r}: there are several"
            )
        name = full(name) if name else next(iter(known))
        if name not in known:
            raise ConfigurationError(f"{option}: expected one of {', '.join(known)}, got {name!r}")
        found[name] = topic
    return found


def read_manifest(bundle: str) -> Manifest:
    return load_bundle(find_bundle(bundle)).manifest
