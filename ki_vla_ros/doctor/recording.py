"""The doctor's look at a recording: its settings and bundle, then what its topics say."""

from __future__ import annotations

from pathlib import Path

from ki_vla_ros.bags import Bag, find_session, open_bag
from ki_vla_ros.doctor.checks import check_inputs
from ki_vla_ros.doctor.findings import Findings
from ki_vla_ros.doctor.inputs import Expected, InputWatch
from ki_vla_ros.doctor.robot import examine_robot, find_file
from ki_vla_ros.doctor.setup import Request, examine_setup, read_settings
from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.messages import COMPRESSED_IMAGE
from ki_vla_ros.settings import Session, Settings, command_topics, resolve


def examine(path: Path, request: Request, findings: Findings) -> list[str]:
    """What was looked at."""
    looked_at: list[str] = []
    with open_bag(path) as bag:
        session = find_session(bag, request.node)
        settings = _settings_for(bag, session, request, findings, looked_at)
        if settings is not None:
            _examine(bag, settings, session if request.params is None else None, request, findings, looked_at)
        looked_at.append(f"bag {path} ({_extent(bag)})")
        for fault in bag.faults:
            findings.warning(
                "bag",
                fault.where,
                fault.message,
                "the figures of this bag are from the rest; record again if it matters",
            )
    return looked_at


def _examine(
    bag: Bag, settings: Settings, session: Session | None, request: Request, findings: Findings, looked_at: list[str]
) -> None:
    """By the robot file, if there is one, or the bundle's robot where it has more than a node of one output reads."""
    bundle = None
    if request.bundle or settings.bundle or not request.robot:
        bundle = examine_setup(settings, request, findings, looked_at)
    file = find_file(request.robot or settings.robot, bundle, findings, looked_at)
    if file is not None:
        examine_robot(bag, file, settings, bundle, request, findings)
    else:
        if bundle is not None:
            settings = settings.on_robot(bundle.manifest.robot)
        expected = Expected.of(bundle, settings, session, request.node)
        _examine_topics(bag, settings, expected, session, request, findings)


def _settings_for(
    bag: Bag, session: Session | None, request: Request, findings: Findings, looked_at: list[str]
) -> Settings | None:
    """Settings from the parameter file, or from the session recorded in the bag."""
    if request.params is not None:
        looked_at.append(f"parameters {request.params}")
        return read_settings(request.params, findings, request.node)
    if session is not None:
        looked_at.append("parameters as recorded")
        return session.settings
    if request.bundle or request.robot:
        looked_at.append("default parameters")
        return Settings(bundle=request.bundle)
    raise ConfigurationError(
        f"bag {bag.path}: has no {request.node}/session; give --params, --robot, or at least --bundle"
    )


def _examine_topics(
    bag: Bag, settings: Settings, expected: Expected, session: Session | None, request: Request, findings: Findings
) -> None:
    node = request.node
    cameras = {name: resolve(settings.camera(name).topic, node) for name in expected.optional_cameras}
    commands = command_topics(settings, expected.robot, node, session)
    if session is not None:  # names after remapping
        cameras |= {name: topic for name, topic in session.topics.cameras.items() if name in cameras}
    # A node that made chunks had raw images: then it was the recorder that compressed them.
    chunks = bag.topics.get(f"{node}/chunk")
    recorded_compressed = {}
    for name, topic in cameras.items():
        packed = f"{topic}/compressed"
        if topic in bag.topics or packed not in bag.topics:
            continue
        if chunks is not None and chunks.count:
            recorded_compressed[name] = packed
        else:
            findings.warning(
                "transport",
                topic,
                f"camera {name!r} is not in the bag as raw images, but {packed} is: a replay takes those",
                f"if the robot has no raw images either, set cameras.{name}.transport to compressed and its topic to "
                f"{packed}",
            )
            recorded_compressed[name] = packed
    counts = {name: topic.count or 0 for name, topic in bag.topics.items()}
    watch = InputWatch(
        expected,
        settings,
        {**cameras, **recorded_compressed},
        commands,
        counts,
    )
    watch.image_types.update(dict.fromkeys(recorded_compressed, COMPRESSED_IMAGE))
    for message in bag.messages(watch.topics):
        watch.add(message)
    check_inputs(watch, findings, {name: [topic.type] for name, topic in bag.topics.items() if counts[name]})


def _extent(bag: Bag) -> str:
    count = sum(topic.count or 0 for topic in bag.topics.values())
    if bag.start_ns is None or bag.end_ns is None:
        return "no messages"
    return f"{count} messages, {(bag.end_ns - bag.start_ns) / 1e9:.1f} s"
