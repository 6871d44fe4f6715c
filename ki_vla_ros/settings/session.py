"""What a bag must say about the policy that was running: bundle, parameters and topic names, as text on `~/session`.

The node publishes it (std_msgs/String, JSON, transient local) when it is configured, at each activation and whenever a
parameter changes. A bag that holds it can be replayed without a parameter file. No ROS here.
"""

from __future__ import annotations

import re
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ki_vla_ros.errors import ConfigurationError, InputError, short_repr
from ki_vla_ros.files import parse_json
from ki_vla_ros.messages import COMPRESSED_IMAGE, IMAGE, JOINT_STATE, POSE, POSITIONS, TEXT, TRAJECTORY
from ki_vla_ros.robot import ACTIONS, Robot
from ki_vla_ros.settings.names import settings_from_parameters
from ki_vla_ros.settings.settings import Settings

SHADOW_COMMAND: Final = "~/shadow/command"
ParameterValue = bool | int | float | str
FULL_NAME: Final = re.compile(r"(/[A-Za-z_][A-Za-z0-9_]*)+")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class BundleIdentity(_Part):
    """`manifest_sha256` is that of manifest.json, which holds the hashes of all other files."""

    name: str
    manifest_sha256: str


class CommandTopic(_Part):
    """Where an output's controller is told what to do: the topic, or the action, of `type`.

    `shadow`, set only in shadow mode, is the topic for what the policy would command; actions have trajectories there.
    """

    topic: str
    type: str
    shadow: str | None = None

    @property
    def shadow_type(self) -> str:
        return TRAJECTORY if self.type in ACTIONS else self.type


class SessionTopics(_Part):
    """Full names, after remapping.

    `commands` are the robot's by the names of its outputs, whoever commands it, and `command` and `shadow` those of the
    first; older sessions have only these two. `states` and `poses` are the topics of joint states and of poses by their
    names in the robot file, `transports` those of the cameras; older sessions have only `joint_states`.
    """

    cameras: dict[str, str]
    transports: dict[str, Literal["raw", "compressed"]] = {}
    joint_states: str
    states: dict[str, str] = {}
    poses: dict[str, str] = {}
    instruction: str
    command: str
    commands: dict[str, CommandTopic] = {}
    chunk: str
    tick: str
    shadow: str | None = None


class Session(_Part):
    """`node`: the policy's full name. `parameters`: every setting of the node by its ROS name.

    `simulated_clock`: the node takes its time from /clock, so a recording must, too.
    """

    version: Literal[1] = 1
    node: str
    simulated_clock: bool = False
    bundle: BundleIdentity
    parameters: dict[str, ParameterValue]
    topics: SessionTopics

    @property
    def settings(self) -> Settings:
        """ConfigurationError if this version no longer has a parameter, or bounds it more tightly."""
        return settings_from_parameters(self.parameters)

    @property
    def commands(self) -> dict[str, CommandTopic]:
        """By the names of the outputs; an older session's only output has the name ""."""
        kind = POSITIONS if self.settings.publish_mode == "stream" else TRAJECTORY
        only = CommandTopic(topic=self.topics.command, type=kind, shadow=self.topics.shadow)
        return self.topics.commands or {"": only}

    @property
    def topic(self) -> str:
        """Where it is published."""
        return session_topic(self.node)

    @property
    def message_types(self) -> dict[str, str]:
        """ROS type by topic, of all that replay can use."""
        settings, topics = self.settings, self.topics
        types = {
            topic: IMAGE if topics.transports.get(name, settings.camera(name).transport) == "raw" else COMPRESSED_IMAGE
            for name, topic in topics.cameras.items()
        }
        types |= {topic: JOINT_STATE for topic in (topics.joint_states, *topics.states.values()) if topic}
        types |= {**dict.fromkeys(topics.poses.values(), POSE), topics.chunk: TRAJECTORY}
        types |= dict.fromkeys((topics.instruction, topics.tick, self.topic), TEXT)
        for command in self.commands.values():
            if command.type not in ACTIONS:  # goals are no messages that a bag could have
                types[command.topic] = command.type
            if command.shadow is not None:
                types[command.shadow] = command.shadow_type
        return types

    def text(self) -> str:
        return self.model_dump_json()


def resolve(topic: str, node: str) -> str:
    """The full name that ROS gives `topic` in the node whose full name is `node`, before remapping.

    `/arm/state` is already full, `state` is in the node's namespace, `~/state` below the node itself; `{node}`,
    `{ns}` and `{namespace}` stand for the node's name and namespace. ConfigurationError for what ROS refuses.
    """
    namespace, _, name = node.rpartition("/")
    full = topic.replace("{node}", name).replace("{namespace}", namespace or "/").replace("{ns}", namespace or "/")
    if full == "~" or full.startswith("~/"):
        full = node + full[1:]
    elif not full.startswith("/"):
        full = f"{namespace}/{full}"
    if not FULL_NAME.fullmatch(full):
        raise ConfigurationError(
            f"topic {topic!r} of node {node}: expected a ROS name such as state, ~/state or /arm/state (letters, "
            f"digits, _; no digit after a slash), got {full!r}; correct it in the parameters"
        )
    return full


def command_topics(
    settings: Settings, robot: Robot | None, node: str, session: Session | None = None
) -> dict[str, CommandTopic]:
    """Where the robot's controllers are told what to do, by the names of its outputs.

    The full names are those that `session` has, or else those of the settings, in the node whose full name is `node`.
    """
    if robot is None and session is not None:
        return session.commands
    topics = {name: resolve(topic, node) for name, topic in settings.command_topics(robot).items()}
    if session is not None:
        told = session.commands
        only = told.get("") if len(topics) == 1 else None
        topics = {name: found.topic if (found := told.get(name, only)) else topic for name, topic in topics.items()}
    outputs = {} if robot is None else {output.name: output for output in robot.outputs}
    kind = POSITIONS if settings.publish_mode == "stream" else TRAJECTORY
    return {
        name: CommandTopic(
            topic=topic, type=outputs[name].wire_type(settings.publish_mode) if name in outputs else kind
        )
        for name, topic in topics.items()
    }


def shadow_topics(robot: Robot) -> dict[str, str]:
    """Where the policy says in shadow mode what it would command, by the names of the outputs."""
    if len(robot.outputs) == 1:
        return {robot.outputs[0].name: SHADOW_COMMAND}
    return {name: f"~/shadow/{token}" for name, token in robot.output_tokens.items()}


def signal_topics(settings: Settings, robot: Robot, node: str, session: Session | None = None) -> dict[str, str]:
    """The full names of the topics that the robot's signals come from, by their names in the robot file.

    They are those that `session` names, or else those of the settings, in the node whose full name is `node`.
    """
    topics = {name: resolve(topic, node) for name, topic in settings.signal_topics(robot).items()}
    if session is None:
        return topics
    told = {**session.topics.states, **session.topics.poses}
    joints = {signal.topic for signal in robot.signals if signal.type == JOINT_STATE}
    if len(joints) == 1 and len(session.topics.states) < 2 and session.topics.joint_states:
        told[joints.pop()] = session.topics.joint_states  # an older session, or a bundle that names the topic otherwise
    return {name: told.get(name, topic) for name, topic in topics.items()}


def session_topic(node: str) -> str:
    return f"{node}/session"


def read_session(text: str) -> Session:
    """The session in a message on `~/session`; InputError if it holds none, or one of another version."""
    try:
        return Session.model_validate(parse_json(text))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "text"
        raise InputError(
            f"session: {where}: {first['msg']}, got {short_repr(first['input'])}; was it recorded with another version "
            "of ki_vla_ros? Then replay with --params"
        ) from error
    except ValueError as error:
        raise InputError(f"session: expected JSON, got {text[:80]!r} ({error})") from error
