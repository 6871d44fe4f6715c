"""What a replay is asked to do, checked before anything runs: bag, bundle, settings, topics, options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from ki_vla_ros.bags import Bag, find_session
from ki_vla_ros.bundle import MANIFEST, Bundle, file_sha256, load_bundle
from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.messages import BagMessage, joint_reading
from ki_vla_ros.records import CameraFrame, JointReading
from ki_vla_ros.replay.frames import bag_frame
from ki_vla_ros.replay.latency import Latency
from ki_vla_ros.replay.topics import ReplayTopics, resolve_topics
from ki_vla_ros.robot import find_robot, read_robot
from ki_vla_ros.settings import (
    NODE,
    ReferenceName,
    Session,
    Settings,
    load_sections,
    load_settings,
    parameter_values,
    settings_from_parameters,
)
from ki_vla_ros.share import find_bundle

# In the parameter file, beside the policy's own parameters: `/**/replay: {ros__parameters: {reference: command}}`.
REPLAY = "replay"
REFERENCES = (*get_args(ReferenceName), "none")


@dataclass(frozen=True)
class ReplayOptions:
    """How to replay.

    `instruction` replaces those in the bag. `probe_every_s`: bag time between two "what if" probes (0: none).
    `as_recorded`: repeat the node's own ticks, with the frames that it used. `follow_session`: settings change where
    the node's did. `latency`: None: as recorded, or assumed where the bag has no ticks of the node. `noise_by_tick`: a
    chunk's noise depends on its tick's number and not on the count of chunks, so that replays with other settings start
    from the same noise. `read_frame` and `read_joints` decode messages; a sweep shares their results.
    """

    instruction: str = ""
    other_instruction: str = ""
    probe_every_s: float = 2.0
    as_recorded: bool = False
    follow_session: bool = True
    latency: Latency | None = None
    noise_by_tick: bool = False
    read_frame: Callable[[BagMessage, str, int, bool], CameraFrame] = bag_frame
    read_joints: Callable[[BagMessage], JointReading] = joint_reading


@dataclass(frozen=True)
class Setup:
    """What a replay runs with.

    `node`: the policy's full name in the bag. `follow_session`: settings come from the bag and change as they do there.
    """

    bundle: Bundle
    manifest_sha256: str
    settings: Settings
    topics: ReplayTopics
    reference: ReferenceName | None
    node: str
    follow_session: bool
    notes: tuple[str, ...]

    def parameters(self) -> dict[str, object]:
        """Every setting by its parameter name."""
        manifest = self.bundle.manifest
        return parameter_values(self.settings, [c.name for c in manifest.cameras], manifest.axis_names)


def set_up(
    bag: Bag,
    bundle: str = "",
    params: Path | None = None,
    node: str | None = None,
    reference: str | None = None,
    reference_topic: str | None = None,
    changes: Mapping[str, object] | None = None,
) -> Setup:
    """Loads and checks everything that a replay needs.

    Settings are those in `params`, or else in the bag's session, or else the defaults; `changes` are applied on top.
    ConfigurationError, or InputError for an unreadable session, if something is missing or does not fit.
    """
    session = find_session(bag, node)
    notes: list[str] = []
    if params is not None:
        name_of_node = node or (session.node if session else NODE)
        settings, told = load_settings(params, name_of_node, notes.append), _replay_table(params)
    else:
        settings, told = (session.settings if session else Settings()), {}
    chosen = reference or str(told.get("reference", "joint_states"))
    if chosen not in REFERENCES:
        raise ConfigurationError(f"reference: expected one of {', '.join(REFERENCES)}, got {chosen!r}")
    name: ReferenceName | None = None if chosen == "none" else chosen  # type: ignore[assignment]
    topic = reference_topic or str(told.get("reference_topic", ""))
    if changes:
        cameras, joints = list(settings.cameras), list(settings.limits.joints)
        settings = settings_from_parameters({**parameter_values(settings, cameras, joints), **changes})
    loaded = load_bundle(_bundle_folder(bundle, settings, session))
    if settings.robot:
        loaded = loaded.described_by(read_robot(find_robot(settings.robot)))
    sha256 = file_sha256(loaded.path / MANIFEST)
    if session is not None and session.bundle.manifest_sha256 != sha256:
        notes.append(
            f"bundle: the bag was recorded with {session.bundle.name!r}, which is not this {loaded.manifest.name!r}"
        )
    named = session if params is None else None
    settings = settings.on_robot(loaded.manifest.robot)
    topics = resolve_topics(bag, loaded.manifest, settings, named, node, name, topic)
    return Setup(
        bundle=loaded,
        manifest_sha256=sha256,
        settings=settings,
        topics=topics,
        reference=name,
        node=session.node if session else node or NODE,
        follow_session=named is not None and not changes,
        notes=(*notes, *topics.notes),
    )


def _replay_table(params: Path) -> Mapping[str, object]:
    """The parameter file's values for replays; empty if it has none."""
    return {
        name: value
        for section, values in load_sections(params).items()
        if section.rpartition("/")[2] == REPLAY
        for name, value in values.items()
    }


def _bundle_folder(bundle: str, settings: Settings, session: Session | None) -> Path:
    """The bundle's folder: `bundle`, or else the one in the settings.

    If that was a folder on the robot that does not exist here, it is the shipped bundle of the same name.
    """
    if bundle:
        return find_bundle(bundle)
    if not settings.bundle:
        raise ConfigurationError(
            "bundle: expected one, got none; give --bundle with a folder or the name of one in models/"
        )
    folder = find_bundle(settings.bundle)
    if folder.is_dir() or session is None:
        return folder
    try:
        return find_bundle(session.bundle.name)
    except ConfigurationError:
        raise ConfigurationError(
            f"bundle: the bag was recorded with {session.bundle.name!r} in {settings.bundle}, which is not here; give "
            "--bundle"
        ) from None
