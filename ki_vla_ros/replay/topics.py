"""Which topics of a bag a replay reads: those that the bag's session names, or else the settings."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from ki_vla_ros.bags import Bag
from ki_vla_ros.bundle import PolicySpec
from ki_vla_ros.errors import ConfigurationError, InputError
from ki_vla_ros.messages import COMPRESSED_IMAGE, IMAGE, JOINT_STATE, POSITIONS, TEXT, TRAJECTORY
from ki_vla_ros.runtime import camera_sources
from ki_vla_ros.settings import (
    NODE,
    ReferenceName,
    Session,
    Settings,
    command_topics,
    read_session,
    resolve,
    session_topic,
    signal_topics,
)


@dataclass(frozen=True)
class ReplayTopics:
    """Full topic names; `instruction`, `tick`, `chunk` and `session` are None where the bag has none.

    `signals`, by their names in the robot file, are the topics of joint states and poses; `commands`, by output, those
    of the reference, if that is what the robot was told.
    `missing_reference`: why there is no reference (None: there is one). `notes`: remarks for the user.
    """

    cameras: dict[str, str]
    signals: dict[str, str]
    instruction: str | None
    commands: dict[str, str]
    tick: str | None
    chunk: str | None
    session: str | None
    missing_reference: str | None
    notes: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        signals, commands = self.signals.values(), self.commands.values()
        others = (*signals, self.instruction, *commands, self.tick, self.chunk, self.session)
        return (*self.cameras.values(), *(topic for topic in others if topic is not None))

    def described(self) -> dict[str, str | None]:
        """By what they are for."""
        one, signals = len(self.commands) < 2, {f"state {name}": topic for name, topic in self.signals.items()}
        if len(self.signals) == 1:
            signals = {"joint_states": next(iter(self.signals.values()))}
        commands = {"command": None} | {"command" if one else f"command {n}": t for n, t in self.commands.items()}
        return {
            **{f"camera {name}": topic for name, topic in self.cameras.items()},
            **signals,
            "instruction": self.instruction,
            **({name: topic for name, topic in commands.items() if one or topic is not None}),
            "tick": self.tick,
            "session": self.session,
        }


def resolve_topics(
    bag: Bag,
    manifest: PolicySpec,
    settings: Settings,
    session: Session | None,
    node: str | None,
    reference: ReferenceName | None,
    reference_topic: str,
) -> ReplayTopics:
    """The topics that `session` names or, if it is None, `settings`; ConfigurationError if the bag lacks an input."""
    node = session.node if session else node or NODE
    full_name = partial(resolve, node=node)
    notes: list[str] = []
    cameras = {}
    for source in camera_sources(manifest, settings, full_name, session.topics.cameras if session else None):
        topic = source.topic
        found = next((t for t in (topic, f"{topic}/compressed") if _has(bag, t, (IMAGE, COMPRESSED_IMAGE))), None)
        if found is not None:
            cameras[source.name] = found
            if found != topic:
                notes.append(f"camera {source.name!r}: the bag has {found} instead of {topic}")
        elif source.optional:
            notes.append(f"camera {source.name!r} (optional): no images on {topic}; the policy runs without it")
        else:
            raise _absent(bag, f"camera {source.name!r}", topic, (IMAGE, COMPRESSED_IMAGE), "cameras.*.topic")
    signals = signal_topics(settings, manifest.robot, node, session)
    for name, kind in {signal.topic: signal.type for signal in manifest.robot.signals}.items():
        if not _has(bag, signals[name], (kind,)):
            what, remedy = ("joint states", "joint_states_topic") if kind == JOINT_STATE else ("poses", "robot file")
            raise _absent(bag, what, signals[name], (kind,), remedy)
    commands: dict[str, str] = {}
    missing = None
    if reference == "command":
        commands, missing = _find_commands(bag, manifest, settings, session, node, reference_topic, notes)
    elif reference is None:
        missing = "reference: none was asked for (--reference none)"
    instruction = session.topics.instruction if session else f"{node}/instruction"
    tick = session.topics.tick if session else f"{node}/tick"
    chunk = session.topics.chunk if session else f"{node}/chunk"
    session_name = session.topic if session else session_topic(node)
    return ReplayTopics(
        cameras=cameras,
        signals=signals,
        instruction=instruction if _has(bag, instruction, (TEXT,)) else None,
        commands=commands,
        chunk=chunk if _has(bag, chunk, (TRAJECTORY,)) else None,
        tick=tick if _has(bag, tick, (TEXT,)) else None,
        session=session_name if session is not None and _has(bag, session_name, (TEXT,)) else None,
        missing_reference=missing,
        notes=tuple(notes),
    )


def _find_commands(
    bag: Bag,
    manifest: PolicySpec,
    settings: Settings,
    session: Session | None,
    node: str,
    reference_topic: str,
    notes: list[str],
) -> tuple[dict[str, str], str | None]:
    """The topics on which the robot was told what to do, by output, and why there is no reference (None: there is)."""
    wanted = command_topics(settings, manifest.robot, node, session)
    if reference_topic and len(wanted) > 1:
        raise ConfigurationError(
            f"reference_topic: got {reference_topic}, but the robot has {len(wanted)} outputs: {', '.join(wanted)}; "
            "leave it out"
        )
    found, lacking = {}, []
    for name, command in wanted.items():
        topic = resolve(reference_topic, node) if reference_topic else command.topic
        # A robot file without a type takes what publish_mode said, which may have changed since.
        kinds = (TRAJECTORY, POSITIONS) if command.type in (TRAJECTORY, POSITIONS) else (command.type,)
        if _has(bag, topic, kinds):
            found[name] = topic
        else:
            lacking.append(f"no {' or '.join(kinds)} on {topic}; {_candidates(bag, topic, kinds)}")
    if not found:
        return {}, f"reference: {'; '.join(lacking)}"
    notes += [f"reference: {fault}; what it moves is not compared" for fault in lacking]
    return found, None


def _has(bag: Bag, topic: str, types: Iterable[str]) -> bool:
    found = bag.topics.get(topic)
    return found is not None and found.type in types and found.count != 0


def _absent(bag: Bag, what: str, topic: str, types: tuple[str, ...], parameter: str) -> ConfigurationError:
    found = bag.topics.get(topic)
    if found is None:
        got = "which is not there"
    elif found.type not in types:
        got = f"which has {found.type}"
    else:
        got = "which has no messages"
    remedy = "correct the robot file" if parameter == "robot file" else f"set {parameter} in --params"
    return ConfigurationError(
        f"bag {bag.path}: {what}: expected {' or '.join(types)} on {topic}, {got}; {_candidates(bag, topic, types)}; "
        f"{remedy}"
    )


def _candidates(bag: Bag, topic: str, types: Iterable[str]) -> str:
    fitting = [name for name, found in bag.topics.items() if found.type in types and found.count != 0]
    nearest = difflib.get_close_matches(topic, fitting, n=5, cutoff=0.0)
    return f"of that type it has {', '.join(nearest)}" if nearest else "it has none of that type"


def read_later_session(text: str) -> Session | None:
    """A session that replaces the previous one; None if it cannot be read (the previous one stays in force)."""
    try:
        return read_session(text)
    except InputError:
        return None
