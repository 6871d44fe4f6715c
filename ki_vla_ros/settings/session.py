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
from ki_vla_ros.messages import COMPRESSED_IMAGE, IMAGE, JOINT_STATE, POSITIONS, TEXT, TRAJECTORY
from ki_vla_ros.settings.names import settings_from_parameters
from ki_vla_ros.settings.settings import Settings

ParameterValue = bool | int | float | str
FULL_NAME: Final = re.compile(r"(/[A-Za-z_][A-Za-z0-9_]*)+")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class BundleIdentity(_Part):
    """`manifest_sha256` is that of manifest.json, which holds the hashes of all other files."""

    name: str
    manifest_sha256: str


class SessionTopics(_Part):
    """Full names, after remapping.

    `command` is the arm's, whoever commands it; `shadow`, set only in shadow mode, is for what the policy would
    command.
    """

    cameras: dict[str, str]
    joint_states: str
    instruction: str
    command: str
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
    def topic(self) -> str:
        """Where it is published."""
        return session_topic(self.node)

    @property
    def message_types(self) -> dict[str, str]:
        """ROS type by topic, of all that replay can use."""
        settings, topics = self.settings, self.topics
        command = POSITIONS if settings.publish_mode == "stream" else TRAJECTORY
        types = {
            topic: IMAGE if settings.camera(name).transport == "raw" else COMPRESSED_IMAGE
            for name, topic in topics.cameras.items()
        }
        types |= {topics.joint_states: JOINT_STATE, topics.command: command, topics.chunk: TRAJECTORY}
        types |= dict.fromkeys((topics.instruction, topics.tick, self.topic), TEXT)
        return types if topics.shadow is None else types | {topics.shadow: command}

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
