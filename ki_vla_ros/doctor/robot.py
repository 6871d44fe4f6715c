"""The doctor's look at a recording with a robot file: whether the two fit, and when the messages come.

Several topics of joint states and of commands, and poses: all that a robot file can name. No bundle is needed.
"""

from __future__ import annotations

import numpy as np

from ki_vla_ros.bags import Bag
from ki_vla_ros.bundle import Bundle
from ki_vla_ros.doctor.ages import Limit, check_period, check_skew, check_stamps
from ki_vla_ros.doctor.checks import camera_limit, check_camera, check_refused
from ki_vla_ros.doctor.findings import Findings
from ki_vla_ros.doctor.inputs import Expected, InputWatch, Traffic
from ki_vla_ros.doctor.setup import Request
from ki_vla_ros.errors import InputError
from ki_vla_ros.messages import BagMessage, joint_reading, read_stamp_ns
from ki_vla_ros.records import NS_PER_S
from ki_vla_ros.robot import JOINT_STATE, Robot, find_robot
from ki_vla_ros.settings import Settings, resolve
from ki_vla_ros.survey import FASTEST, BagSurvey, Misfit, RobotFile, check_bag, survey

_Part = tuple[str, tuple[str, ...]]  # a topic, and the joints in its messages


def find_file(name: str, bundle: Bundle | None, findings: Findings, looked_at: list[str]) -> RobotFile | None:
    """The robot file that was named; else the bundle's robot, if one topic of joints and commands is not all of it."""
    if name:
        file = RobotFile(find_robot(name))
        looked_at.append(f"robot file {file.path}")
        for misfit in file.faults:
            _report(file, misfit, findings)
        return file
    robot = bundle.manifest.robot if bundle else None
    return RobotFile.of(robot, f"bundle {robot.name}") if robot is not None and not _is_plain(robot) else None


def _is_plain(robot: Robot) -> bool:
    """Whether it is a list of joints with one topic of states and one of commands, as in bundles of format 2."""
    topics = {(signal.topic, signal.type) for signal in robot.signals}
    default = {("joint_states", JOINT_STATE)}
    mapped = any((signal.scale, signal.offset) != (1.0, 0.0) for signal in robot.signals)
    return topics == default and not mapped and len(robot.outputs) == 1 and robot.outputs[0].type is None


def examine_robot(
    bag: Bag, file: RobotFile, settings: Settings, bundle: Bundle | None, request: Request, findings: Findings
) -> None:
    robot = file.robot
    if robot is None:  # its faults are findings already
        return
    seen = survey(bag)
    for misfit in check_bag(file, seen, request.node):
        _report(file, misfit, findings)
    if bundle is not None:
        _check_trained(seen, robot, bundle, request.node, findings)
    _check_jumps(seen, robot, request.node, findings)
    cameras = {}
    for camera in robot.cameras:
        suffix = "/compressed" if camera.transport == "compressed" else ""
        topic = resolve(camera.topic or f"camera/{camera.name}/image_raw{suffix}", request.node)
        there = next((name for name in (topic, f"{topic}/compressed") if name in bag.topics), topic)
        cameras[camera.name] = there
    counts = {name: topic.count or 0 for name, topic in bag.topics.items()}
    optional = {camera.name: camera.optional for camera in robot.cameras}
    watch = InputWatch(Expected(optional, {}), settings, cameras, {}, counts)
    inputs = {resolve(signal.topic, request.node): signal.type for signal in robot.signals}
    traffic: dict[_Part, Traffic] = {}
    for message in bag.messages([*cameras.values(), *inputs]):
        if message.topic in inputs:
            _count(traffic, message, inputs[message.topic])
        else:
            watch.add(message)
    for name, camera_traffic in watch.cameras.items():
        check_refused(camera_traffic, camera_limit(watch, name), findings)
        if camera_traffic.stamps:
            check_camera(watch, name, findings)
    limit = Limit.of("joint_max_age_s", settings.joint_max_age_s, settings)
    topics = [topic for topic, names in traffic if names]
    for (topic, names), one in traffic.items():
        if topics.count(topic) > 1:
            one.topic = f"{topic} ({', '.join(names)})"
        check_refused(one, limit, findings)
        if one.stamps:
            check_period(watch, one, limit, findings)
            check_stamps(watch, one, limit, findings)
    if not settings.use_receive_time:
        check_skew(watch, findings)


def _report(file: RobotFile, misfit: Misfit, findings: Findings) -> None:
    where = f"{file.path}:{misfit.line}" if misfit.line else str(file.path)
    findings.error("robot file", where, str(misfit), misfit.change)


def _count(parts: dict[_Part, Traffic], message: BagMessage, expected: str) -> None:
    """Joint states count by the joints in them: the parts of a robot may share a topic, and its stamps."""
    part: _Part = (message.topic, ())
    try:
        if message.type == expected == JOINT_STATE:
            reading = joint_reading(message)
            part, stamp_ns = (message.topic, reading.names), reading.stamp_ns
        elif message.type == expected:
            stamp_ns = read_stamp_ns(message)
    except InputError as error:
        parts.setdefault(part, Traffic(message.topic)).refuse(error)
        return
    traffic = parts.setdefault(part, Traffic(message.topic))
    traffic.kinds[message.type] += 1
    if message.type == expected:
        traffic.stamps.append(stamp_ns)
        traffic.received.append(message.log_ns)


def _check_jumps(seen: BagSurvey, robot: Robot, node: str, findings: Findings) -> None:
    """Steps of a joint that no motion explains: it was put back between two episodes, or two programs publish it."""
    for signal in robot.signals:
        topic = seen.topics.get(resolve(signal.topic, node))
        track = topic.tracks.get(signal.part) if topic is not None and signal.field == "position" else None
        if track is None or signal.continuous or signal.type != JOINT_STATE:
            continue
        jumps = track.jumps(FASTEST / abs(signal.scale))
        if not len(jumps):
            continue
        times, values = track.arrays()
        steps = np.abs(np.diff(values))[jumps]
        at = int(jumps[steps.argmax()])
        often = "once" if len(jumps) == 1 else f"{len(jumps)} times"
        unit = {"ratio": ""}.get(signal.unit, f" {signal.unit}")
        findings.warning(
            "jump",
            signal.name,
            f"jumps {often}, by up to {steps.max() * abs(signal.scale):.3f}{unit} in "
            f"{(times[at + 1] - times[at]) / 1e6:.0f} ms, {(times[at] - times[0]) / NS_PER_S:.1f} s after it began",
            "put back between episodes: mark where they end before you train on it; else, do two programs publish it?",
        )


def _check_trained(seen: BagSurvey, robot: Robot, bundle: Bundle, node: str, findings: Findings) -> None:
    """Values that lie outside the range of training most of the time."""
    trained = bundle.manifest.state
    if len(trained.low) != len(robot.state):
        return
    for dimension, low, high in zip(robot.state, trained.low, trained.high, strict=True):
        topic = seen.topics.get(resolve(dimension.source.topic, node))
        track = topic.tracks.get(dimension.joint) if topic is not None else None
        if track is None or dimension.kind == "pose" or dimension.source.field != "position" or dimension.continuous:
            continue
        (scale, offset), _ = dimension.lines()
        values = scale * np.array(track.values) + offset
        outside = float(((values < min(low, high)) | (values > max(low, high))).mean())
        if outside > 0.5:
            findings.warning(
                "trained range",
                dimension.name,
                f"was outside the range of training ({low:.3f} to {high:.3f} {dimension.own_unit()}) "
                f"{100 * outside:.0f} % of the time",
                "compare its zero, sign and unit with the training data's; or train on data from here",
            )
