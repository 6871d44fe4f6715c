"""Which topics of a bag a dataset is made from, and the node's settings for putting them together.

They come from the bag itself (`~/session`), the node's parameter file or the command line; they are never guessed from
similar names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ki_vla_ros.bags import Bag
from ki_vla_ros.bundle import Manifest, load_bundle
from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.records import to_ns
from ki_vla_ros.robot import Signal, plain_joints
from ki_vla_ros.settings import Session, Settings, resolve
from ki_vla_ros.share import find_bundle


@dataclass(frozen=True)
class Sources:
    """Full topic names, joints in the order of state and action, and limits as `ObservationBuffer` takes them.

    `specs` is what the bundle says of the joints, which tells degrees from radians; None without a bundle.
    """

    cameras: Mapping[str, str]
    joints: tuple[str, ...]
    joint_topic: str
    instruction_topic: str
    command_topic: str
    max_age_ns: int
    slop_ns: int
    camera_age_ns: Mapping[str, int]
    joint_age_ns: int | None = None
    use_receive_time: bool = False
    specs: Sequence[Signal] | None = None

    @property
    def signals(self) -> tuple[Signal, ...]:
        """What is read from the joint states."""
        if self.specs is None:
            return plain_joints(self.joints, self.joint_topic)
        return tuple(replace(signal, topic=self.joint_topic) for signal in self.specs)

    def within(self, bag: Bag) -> Sources:
        """The same with cameras as recorded: a raw topic's images may be in the bag as `<topic>/compressed`.

        ConfigurationError names the topics that the bag lacks.
        """
        cameras, missing = {}, []
        for name, topic in self.cameras.items():
            found = next((there for there in (topic, f"{topic}/compressed") if there in bag.topics), None)
            cameras[name] = found or topic
            missing += [] if found else [f"{topic} (camera {name!r})"]
        if self.joint_topic not in bag.topics:
            missing.append(f"{self.joint_topic} (joint states)")
        if missing:
            raise ConfigurationError(
                f"bag {bag.path}: expected {', '.join(missing)}, got only {', '.join(sorted(bag.topics))}; give "
                "the right names with --params, --camera or --joint-states"
            )
        return replace(self, cameras=cameras)


def from_settings(
    settings: Settings, cameras: Sequence[str], joints: Sequence[str], *, node: str, manifest: Manifest | None = None
) -> Sources:
    """Sources with topics as the node called `node` would resolve them, without remappings."""
    known = {name: settings.camera(name) for name in cameras}
    return Sources(
        cameras={name: resolve(camera.topic, node) for name, camera in known.items()},
        joints=tuple(joints),
        joint_topic=resolve(settings.joint_states_topic or "joint_states", node),
        instruction_topic=f"{node}/instruction",
        command_topic=resolve(settings.command_topics(None)[""], node),
        max_age_ns=to_ns(settings.max_age_s),
        slop_ns=to_ns(settings.sync_slop_s),
        camera_age_ns={name: to_ns(camera.max_age_s) for name, camera in known.items() if camera.max_age_s},
        joint_age_ns=to_ns(settings.joint_max_age_s) or None,
        use_receive_time=settings.use_receive_time,
        specs=None if manifest is None else manifest.robot.signals,
    )


def from_session(session: Session, manifest: Manifest) -> Sources:
    """Sources as the node that was running had them, remappings included."""
    settings, topics = session.settings, session.topics
    sources = from_settings(settings, list(topics.cameras), manifest.axis_names, node=session.node, manifest=manifest)
    return replace(
        sources,
        cameras=topics.cameras,
        joint_topic=topics.joint_states,
        instruction_topic=topics.instruction,
        command_topic=topics.command,
    )


def read_manifest(bundle: str) -> Manifest:
    return load_bundle(find_bundle(bundle)).manifest
