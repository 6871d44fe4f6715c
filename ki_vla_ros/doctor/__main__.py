"""Looks for what costs people days, and says what to do about each.

    ros2 run ki_vla_ros doctor --params my_robot.yaml            the running robot, without commanding it
    ros2 run ki_vla_ros doctor --bag BAG --params my_robot.yaml  a recording; the same as python -m ki_vla_ros.doctor

Exit code 1 if there are errors, 2 if it could not look. Nothing is published and nothing is changed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ki_vla_ros.bags.bag import Bag, open_bag
from ki_vla_ros.bundle.folder import Bundle
from ki_vla_ros.doctor.checks import check_inputs
from ki_vla_ros.doctor.findings import Findings, as_json, as_table, errors
from ki_vla_ros.doctor.inputs import InputWatch
from ki_vla_ros.doctor.setup import (
    Machine,
    check_engine,
    check_fit,
    check_machine,
    check_profile_is_set,
    read_bundle,
    read_settings,
)
from ki_vla_ros.errors import ConfigurationError, KiVlaError
from ki_vla_ros.messages.type_names import COMPRESSED_IMAGE
from ki_vla_ros.replay.topics import find_session
from ki_vla_ros.settings.parameter_file import NODE
from ki_vla_ros.settings.session import Session
from ki_vla_ros.settings.settings import Settings


@dataclass(frozen=True)
class Request:
    """What the doctor shall look at; `node` is the policy node's full name."""

    bag: Path | None = None
    params: Path | None = None
    bundle: str = ""
    node: str = NODE
    seconds: float = 5.0


def diagnose(request: Request, machine: Machine | None = None) -> tuple[Findings, list[str]]:
    """The findings, and what was looked at. ConfigurationError if it is not clear what to look at."""
    machine = machine or Machine.here()
    findings, looked_at = Findings(), [f"Python {machine.python[0]}.{machine.python[1]}, numpy {machine.numpy}"]
    check_machine(machine, findings)
    if request.bag is None:
        from ki_vla_ros.doctor import graph as doctor_graph  # the only part that needs ROS

        check_profile_is_set(doctor_graph.with_node_environment(machine), findings)
        looked_at += doctor_graph.examine(request, findings)
        return findings, looked_at
    with open_bag(request.bag) as bag:
        session = find_session(bag, request.node)
        settings = _settings_for(bag, session, request, findings, looked_at)
        if settings is not None:
            bundle = examine_setup(settings, request, findings, looked_at)
            if bundle is not None:
                _examine_bag(bag, settings, bundle, session, request, findings)
        looked_at.append(f"bag {request.bag} ({_extent(bag)})")
        for fault in bag.faults:
            findings.warning(
                "bag", fault.where, fault.message, "figures of this bag are of the rest; record again if it matters"
            )
    return findings, looked_at


def examine_setup(settings: Settings, request: Request, findings: Findings, looked_at: list[str]) -> Bundle | None:
    name = request.bundle or settings.bundle
    bundle = read_bundle(name, findings)
    check_engine(settings, bundle, findings)
    if bundle is not None:
        looked_at.append(f"bundle {bundle.manifest.name}")
        check_fit(settings, bundle, findings)
    return bundle


def _settings_for(
    bag: Bag, session: Session | None, request: Request, findings: Findings, looked_at: list[str]
) -> Settings | None:
    """Of the parameter file, or of the session that was recorded with the bag."""
    if request.params is not None:
        looked_at.append(f"parameters {request.params}")
        return read_settings(request.params, findings, request.node)
    if session is not None:
        looked_at.append("parameters as recorded")
        return session.settings
    if request.bundle:
        looked_at.append("default parameters")
        return Settings(bundle=request.bundle)
    raise ConfigurationError(f"bag {bag.path}: has no {request.node}/session; give --params, or at least --bundle")


def _examine_bag(
    bag: Bag, settings: Settings, bundle: Bundle, session: Session | None, request: Request, findings: Findings
) -> None:
    manifest, node = bundle.manifest, request.node
    cameras = {c.name: resolve(settings.camera(c.name).topic, node) for c in manifest.cameras}
    joints, command = resolve(settings.joint_states_topic, node), resolve(settings.command_topic, node)
    if session is not None and request.params is None:  # names after remapping
        cameras |= {name: topic for name, topic in session.topics.cameras.items() if name in cameras}
        joints, command = session.topics.joint_states, session.topics.command
    # Where the node made chunks it had images: then it is the recorder that compressed them.
    chunks = bag.topics.get(f"{node}/chunk")
    recorded_compressed = {}
    for name, topic in cameras.items():
        packed = f"{topic}/compressed"
        if topic in bag.topics or packed not in bag.topics:
            continue
        if chunks is not None and chunks.count:
            recorded_compressed[name] = packed
        else:
            findings.error(
                "transport",
                topic,
                f"camera {name!r} is not in the bag as raw images, but {packed} is",
                f"set cameras.{name}.transport to compressed and its topic to {packed}, or start a raw publisher",
            )
            recorded_compressed[name] = packed
    counts = {name: topic.count or 0 for name, topic in bag.topics.items()}
    watch = InputWatch(
        manifest,
        settings,
        {**cameras, **recorded_compressed},
        joints,
        command,
        counts,
    )
    watch.image_types.update(dict.fromkeys(recorded_compressed, COMPRESSED_IMAGE))
    for message in bag.messages(watch.topics):
        watch.add(message)
    check_inputs(watch, findings, {name: [topic.type] for name, topic in bag.topics.items() if counts[name]})


def resolve(topic: str, node: str) -> str:
    """A topic's full name: `~` is the node, a name without slash lies in its namespace."""
    if topic.startswith("/"):
        return topic
    if topic.startswith("~"):
        return node + topic[1:]
    return f"{node[: node.rindex('/')]}/{topic}"


def _extent(bag: Bag) -> str:
    count = sum(topic.count or 0 for topic in bag.topics.values())
    if bag.start_ns is None or bag.end_ns is None:
        return "no messages"
    return f"{count} messages, {(bag.end_ns - bag.start_ns) / 1e9:.1f} s"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ki_vla_ros.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bag", type=Path, help="a recording; without it, what runs in this ROS domain")
    parser.add_argument("--params", type=Path, help="the node's parameter file; default: the running node's, the bag's")
    parser.add_argument("--bundle", default="", help="folder or name; default: as the parameters say")
    parser.add_argument("--node", default=NODE, help=f"the policy node's full name; default {NODE}")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long running topics are watched; default 5")
    parser.add_argument("--json", action="store_true", help="findings as JSON instead of a table")
    given = parser.parse_args(arguments)
    try:
        if not given.node.startswith("/") or given.seconds <= 0:
            raise ConfigurationError("expected --node to begin with a slash and --seconds above 0")
        request = Request(given.bag, given.params, given.bundle, given.node, given.seconds)
        findings, looked_at = diagnose(request)
    except KiVlaError as error:
        print(f"doctor: {error}", file=sys.stderr)
        return 2
    print(json.dumps(as_json(findings, looked_at), indent=1) if given.json else as_table(findings, looked_at))
    return 1 if errors(findings) else 0


if __name__ == "__main__":
    sys.exit(main())
