"""Where a robot file does not fit a bag, a dataset, a bundle or a URDF: expected, got, and the line to change.

Only what the file says is judged; what else is there, is nobody's fault.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ki_vla_ros.bundle import Manifest
from ki_vla_ros.errors import ConfigurationError, Finding, did_you_mean, validation_findings
from ki_vla_ros.files import read_text
from ki_vla_ros.messages import COMPRESSED_IMAGE, IMAGE
from ki_vla_ros.robot import (
    ARRAY,
    FOLLOW_TRAJECTORY,
    GRIPPER_COMMAND,
    JOINT_STATE,
    POSE,
    TRAJECTORY,
    TWIST,
    TWIST_STAMPED,
    ActionDimension,
    Lines,
    Output,
    Robot,
    Signal,
    disagreements,
    find_columns,
    read_urdf,
    recorded_signal,
    with_urdf,
)
from ki_vla_ros.settings import NODE, resolve
from ki_vla_ros.survey.bag import BagSurvey
from ki_vla_ros.survey.dataset import DatasetSurvey
from ki_vla_ros.survey.guesses import BEYOND_RADIANS, DEGREE, FILL_IN
from ki_vla_ros.survey.tracks import Track, following
from ki_vla_ros.yaml_file import LARGEST_YAML, line_of, parse_yaml, yaml_lines

Place = tuple[str | int, ...]
# Values farther outside the limits than this share of the range are of another unit, zero or joint.
SLACK = 0.1
# Values farther outside are no rounding: the limits are wrong. `training.data check` refuses a dataset for as much.
BEYOND = 1e-3
# A joint that uses less of its range than this, when taken as degrees, was never in degrees.
LEAST_USED = 0.05
# A state that uses less of its range than this, while its commands or its raw values use much, is of another unit.
BARELY_USED = 0.01
# How much slower than the actions a topic may be.
LATE = 1.2
# Below this correlation what was commanded and what followed go opposite ways.
OPPOSED = -0.8
# A gripper's mean opening in state and action: so far apart, and so near when one is turned round.
APART, NEAR = 0.3, 0.15


@dataclass(frozen=True)
class Misfit:
    """`line` of the robot file; `where` is the dimension, output or camera; `change` is what to do."""

    line: int
    where: str
    expected: str
    got: str
    change: str

    def __str__(self) -> str:
        return f"{self.where}: expected {self.expected}, got {self.got}"


class RobotFile:
    """A robot file with the lines that its parts are on."""

    def __init__(self, path: Path) -> None:
        """ConfigurationError if there is no YAML at `path`; what is wrong inside is in `faults`."""
        self.path = path
        try:
            text = read_text(path, LARGEST_YAML)
            content = with_urdf(parse_yaml(text), path.parent)
        except ConfigurationError as error:
            raise ConfigurationError(f"robot file {path}: {error}") from None
        except OSError as error:
            raise ConfigurationError(f"robot file {path}: expected a YAML file, got {error.strerror}") from None
        except ValueError as error:
            raise ConfigurationError(f"robot file {path}: expected YAML, got something else ({error})") from None
        self._lines = yaml_lines(text)
        self.faults: list[Misfit] = []
        self.robot: Robot | None = None
        try:
            self.robot = Robot.model_validate(content)
        except ValidationError as error:
            self.faults = [self._fault(finding) for finding in validation_findings(error, Robot)]

    @classmethod
    def of(cls, robot: Robot, name: str) -> RobotFile:
        """A robot that is in no file of its own, such as a bundle's: every line is 0."""
        file = cls.__new__(cls)
        file.path, file.robot, file.faults, file._lines = Path(name), robot, [], {}
        return file

    def _fault(self, finding: Finding) -> Misfit:
        line = line_of(finding.place, self._lines)
        if finding.value == FILL_IN:
            change = "fill it in: the data sheet or the URDF says"
            return Misfit(line, finding.where, "what nothing showed", repr(FILL_IN), change)
        head, split, rest = finding.said.partition("expected ")
        expected, _, got = (rest if split else finding.said).partition(", got ")
        got, _, remedy = got.partition("; ")
        where = ": ".join(part for part in (finding.where, head.rstrip(": ") if split else "") if part)
        change = remedy or finding.remedy or "docs/robot.md explains every field"
        return Misfit(line, where, expected, got or "none", change)

    def line(self, *place: str | int) -> int:
        return line_of(place, self._lines) if self._lines else 0

    def place_of(self, group: str, name: str) -> Place:
        """Of the dimension, camera or output of this name."""
        assert self.robot is not None
        names = [item.name for item in getattr(self.robot, group)]
        return (group, names.index(name)) if name in names else (group,)


# --- a bag


def check_bag(file: RobotFile, bag: BagSurvey, node: str = NODE) -> Iterator[Misfit]:
    robot = file.robot
    assert robot is not None
    yield from _check_cameras(file, bag, node)
    for signal in robot.signals:
        yield from _check_signal(file, signal, (*_place_of_signal(file, signal), "source"), bag, node)
    for number, action in enumerate(robot.actions):
        if (recorded := recorded_signal(action)) is not None:
            yield from _check_signal(file, recorded, ("actions", number, "recorded"), bag, node)
    for output in robot.outputs:
        yield from _check_output(file, output, bag, node)


def _check_cameras(file: RobotFile, bag: BagSurvey, node: str) -> Iterator[Misfit]:
    assert file.robot is not None
    for i, camera in enumerate(file.robot.cameras):
        kind = COMPRESSED_IMAGE if camera.transport == "compressed" else IMAGE
        suffix = "/compressed" if camera.transport == "compressed" else ""
        topic = resolve(camera.topic or f"camera/{camera.name}/image_raw{suffix}", node)
        where, line = f"camera {camera.name}", file.line("cameras", i)
        found = bag.types.get(topic)
        if found is None:
            packed = f"{topic}/compressed" in bag.types
            if packed:  # conversion and replay take the recorder's compressed copy
                topic = f"{topic}/compressed"
            elif not camera.optional:
                yield Misfit(
                    line,
                    where,
                    f"images on {topic}",
                    f"no such topic{_offer(topic, bag, (IMAGE, COMPRESSED_IMAGE))}",
                    "correct its topic",
                )
                continue
        elif found != kind:
            transport = {IMAGE: "raw", COMPRESSED_IMAGE: "compressed"}.get(found)
            change = f"set transport: {transport}" if transport else "correct its topic"
            yield Misfit(line, where, f"{kind} on {topic}", found, change)
            continue
        images = bag.images.get(topic)
        if images is None:
            continue
        if images.fault:
            yield Misfit(line, where, f"colour images on {topic}", images.fault, "choose another topic")
        elif images.rate_hz and images.rate_hz * file.robot.action_period_s * LATE < 1.0:
            yield Misfit(
                file.line("action_period_s"),
                where,
                f"an image per action, {1 / file.robot.action_period_s:.4g} Hz",
                f"{images.rate_hz:.4g} Hz on {topic}",
                f"set action_period_s to {1 / images.rate_hz:.4g} or more",
            )


def _check_signal(file: RobotFile, signal: Signal, place: Place, bag: BagSurvey, node: str) -> Iterator[Misfit]:
    """`place`: the key that names the signal's topic."""
    assert file.robot is not None
    place, key = place[:-1], str(place[-1])
    line, where, topic = file.line(*place, key), f"{place[0]} {_name(file, place)}", resolve(signal.topic, node)
    seen = bag.topics.get(topic)
    if seen is None or seen.type != signal.type:
        got = f"no such topic{_offer(topic, bag, (signal.type,))}" if seen is None else seen.type
        yield Misfit(line, where, f"{signal.type} on {topic}", got, f"set topic in its {key}")
        return
    tracks = seen.velocity if signal.field == "velocity" else seen.tracks
    if seen.type == JOINT_STATE and signal.field == "effort":
        return
    if signal.part not in tracks and signal.part in seen.names:
        change = f"let its driver fill in {signal.field}, or set topic in its {key} to one that has it"
        yield Misfit(line, where, f"a {signal.field} of {signal.part} on {topic}", "its name without a number", change)
        return
    if signal.part not in tracks:
        names = ", ".join(list(tracks)[:20]) or seen.fault or "nothing that can be read"
        change = f"correct its name, or set joint in its {key}"
        yield Misfit(line, where, f"{signal.part} on {topic}", f"{names}{did_you_mean(signal.part, tracks)}", change)
        return
    track = tracks[signal.part]
    if signal.field == "position":
        yield from _check_values(
            file,
            place,
            key,
            where,
            topic,
            track.low,
            track.high,
            (signal.scale, signal.offset),
            (signal.lower, signal.upper),
            signal.continuous,
        )
    every_s = seen.period_s
    if every_s is not None and every_s > LATE * file.robot.action_period_s and not seen.parts:
        yield Misfit(
            file.line("action_period_s"),
            where,
            f"a value per action, {1 / file.robot.action_period_s:.4g} Hz",
            f"{1 / every_s:.4g} Hz on {topic}",
            f"set action_period_s to {every_s:.4g} or more",
        )


def _check_values(
    file: RobotFile,
    place: Place,
    key: str,
    where: str,
    source: str,
    low: float,
    high: float,
    line: tuple[float, float],
    limits: tuple[float, float],
    continuous: bool = False,
) -> Iterator[Misfit]:
    """Values `low` to `high`, as the source has them, in the robot's unit against `limits`."""
    lower, upper = limits
    if continuous or not (math.isfinite(lower) and math.isfinite(upper)):
        return

    def fits(scale: float, offset: float, share: float = SLACK) -> bool:
        slack = share * (upper - lower)
        ends = sorted((scale * low + offset, scale * high + offset))
        return lower - slack <= ends[0] and ends[1] <= upper + slack

    dimension = _dimension(file, place)
    own = sorted((line[0] * low + line[1], line[0] * high + line[1]))
    got = f"{own[0]:.4g} to {own[1]:.4g} from {source}"
    expected, at = f"{lower:.4g} to {upper:.4g} {dimension.own_unit()}", file.line(*place, key)
    if not fits(*line):
        change, hint = "correct the limits, the unit or the zero", ""
        degrees = dimension.own_unit() == "rad" and fits(DEGREE, 0.0) and max(-low, high) > BEYOND_RADIANS
        if degrees and dimension.kind != "gripper":
            change, hint = f"set unit: deg in its {key}", ", which would fit as degrees"
            if max(-low, high) <= 100.5:
                change += ", or range: [-100, 100] if they are shares of the range"
        elif dimension.kind == "gripper":
            for ends in ((0.0, 1.0), (0.0, 100.0), (-1.0, 1.0), (-100.0, 100.0)):
                if ends[0] - 0.05 * ends[1] <= low and high <= 1.05 * ends[1]:
                    change, hint = f"set open: {ends[1]:g} and closed: {ends[0]:g} in its {key}, or the reverse", ""
                    break
        elif BEYOND_RADIANS < max(-low, high) <= 100.5:
            change = f"correct the limits, or set range: [-100, 100] in its {key} if they are shares of the range"
        elif max(-low, high) <= 1.05 and line == (1.0, 0.0):
            change = f"correct the limits, or set range: [-1, 1] in its {key} if they are shares of the range"
        yield Misfit(at, where, expected, got + hint, change)
        return
    if not fits(*line, BEYOND):
        change = "correct open and closed, or its limits" if dimension.kind == "gripper" else "correct the limits"
        yield Misfit(at, where, expected, got, f"{change}, or leave what is outside out of what you train on")
    moved, raw = (x / (upper - lower) for x in (own[1] - own[0], high - low))
    in_degrees = abs(abs(line[0]) - DEGREE) < 1e-12
    least = LEAST_USED if in_degrees else BARELY_USED
    if fits(1.0, 0.0) and 0.0 < moved < least and raw > 5.0 * BARELY_USED and high - low < 2.0 * math.pi:
        unit = {"rad": "radians", "m": "metres"}.get(dimension.own_unit(), dimension.own_unit())
        got = f"{low:.4g} to {high:.4g} from {source}, which fits as {unit}"
        expected = "degrees" if in_degrees else f"values {1 / abs(line[0]):.4g} times as large"
        yield Misfit(at, where, expected, got, f"leave the unit out of its {key}")


def _check_output(file: RobotFile, output: Output, bag: BagSurvey, node: str) -> Iterator[Misfit]:
    robot = file.robot
    assert robot is not None
    place = file.place_of("outputs", output.name)
    where, line = f"output {output.name}", file.line(*place)
    topic, kind = resolve(output.topic, node), output.type or TRAJECTORY
    if kind in (GRIPPER_COMMAND, FOLLOW_TRAJECTORY):  # a bag has no goals of actions
        return
    if all(action.recorded is not None for action in robot.actions_of(output)):  # which say what they were
        return
    found = bag.types.get(topic)
    if found is None or found != kind:
        got = found or f"no such topic{_offer(topic, bag, (kind,))}"
        change = "correct its topic or its type (without commands a dataset needs --actions states)"
        yield Misfit(line, where, f"{kind} on {topic}", got, change)
        return
    seen = bag.topics.get(topic)
    if seen is None:
        return
    actions = robot.actions_of(output)
    if kind == TRAJECTORY:
        missing = [a.target for a in actions if a.target not in seen.tracks]
        if missing:
            names = ", ".join(seen.tracks) or seen.fault or "nothing that can be read"
            near = did_you_mean(missing[0], seen.tracks)
            yield Misfit(
                line,
                where,
                f"joints {', '.join(missing)} on {topic}",
                f"{names}{near}",
                "correct the joints of its actions",
            )
    elif kind == ARRAY and len(seen.tracks) != len(actions):
        yield Misfit(
            line,
            where,
            f"{len(actions)} values on {topic}",
            str(len(seen.tracks)),
            "list each of them as an action of this output, in its order",
        )
    elif kind in (TWIST, TWIST_STAMPED):
        own = [str(a.component) for a in actions]
        others = [name for name, track in seen.tracks.items() if track.moved > 0.0 and name not in own]
        if others:
            still = [a for a in actions if (t := seen.tracks.get(str(a.component))) is None or t.moved == 0.0]
            change = "add an action for each component"
            if still and len(still) == len(others):  # one was written for the other
                line = file.line(*file.place_of("actions", still[0].name), "component")
                turned = zip(still, others, strict=True)
                change = ", ".join(f"change {action.component} to {other}" for action, other in turned)
            expected = f"only {', '.join(own)} to be commanded on {topic}"
            yield Misfit(line, where, expected, ", ".join(others), change)
    if kind in (TWIST_STAMPED, POSE) and output.frame_id and seen.frame_id and seen.frame_id != output.frame_id:
        yield Misfit(
            file.line(*place, "frame_id"), where, f"frame {output.frame_id}", seen.frame_id, "correct frame_id"
        )
    for number, action in enumerate(actions):
        part = str(number) if kind == ARRAY else str(action.component or action.target)
        track = seen.tracks.get(part)
        if track is not None and action.kind not in ("pose", "pose_delta"):
            yield from _check_command(file, action, track, seen.path(part), topic, bag, node)


def _check_command(
    file: RobotFile, action: ActionDimension, track: Track, path: Track, topic: str, bag: BagSurvey, node: str
) -> Iterator[Misfit]:
    """What was commanded against the action's limits, and against what followed."""
    assert file.robot is not None
    place = file.place_of("actions", action.name)
    where = f"action {action.name}"
    most = action.max_velocity or math.inf
    limits = (-most, most) if action.kind in ("twist", "joint_velocity") else action.span
    yield from _check_values(
        file, place, "command", where, topic, track.low, track.high, action.command_line(), limits, action.continuous
    )
    signal = next(
        (s for s in file.robot.signals if s.part in (action.target, action.name) and s.field == "position"), None
    )
    seen = bag.topics.get(resolve(signal.topic, node)) if signal else None
    if (
        signal is None
        or seen is None
        or signal.part not in seen.tracks
        or action.kind not in ("joint_position", "gripper")
    ):
        return
    state, lower, upper = seen.tracks[signal.part], *action.span
    scale = action.command_line()[0]
    if not (math.isfinite(lower) and math.isfinite(upper)):
        return
    line = file.line(*_place_of_signal(file, signal), "source")
    moved, told = (x / (upper - lower) for x in (state.moved * abs(signal.scale), track.moved * abs(scale)))
    raw = state.moved / (upper - lower)  # where that is as much as it should be, the source's own unit was named above
    if 0.0 < max(moved, raw) < BARELY_USED and told > 20.0 * BARELY_USED:
        got = f"it to use {100 * moved:.2g} % of its range, the commands {100 * told:.0f} %"
        change = "is the unit right? correct the unit in its source, or in the command of its action"
        yield Misfit(line, where, "the state to go as far as the commands", got, change)
        return
    if min(moved, told) < LEAST_USED:
        return
    fit = following(path, state)
    fit = None if fit is None else fit * math.copysign(1.0, signal.scale * scale)
    if fit is not None and fit < OPPOSED:
        way, turn = "it goes the other way", "take the sign out of" if signal.scale < 0.0 else "set sign: -1 in"
        if action.kind == "gripper":
            way, turn = "open is closed", "exchange open and closed in"
        got = f"it to go against them (correlation {fit:.2f}): {way}"
        change = f"look at the robot; if it is so, {turn} its source, or mend the driver"
        yield Misfit(line, where, "the state to follow the commands", got, change)


def _offer(topic: str, bag: BagSurvey, types: Sequence[str]) -> str:
    there = [name for name, kind in bag.types.items() if kind in types]
    if not there:
        return "; there is none of that type"
    return f"{did_you_mean(topic, there)}; of that type there are {', '.join(there)}"


def _place_of_signal(file: RobotFile, signal: Signal) -> Place:
    robot = file.robot
    assert robot is not None
    for i, d in enumerate(robot.state):
        if d.source.topic == signal.topic and (
            d.kind == "pose" or (d.joint, d.source.field) == (signal.part, signal.field)
        ):
            return "state", i
    for i, a in enumerate(robot.actions):
        if signal.part in (a.target, a.name, a.source.joint if a.source else None):
            return "actions", i
    return ("outputs",)


def _dimension(file: RobotFile, place: Place) -> Any:
    assert file.robot is not None
    return getattr(file.robot, str(place[0]))[int(place[1])]


def _name(file: RobotFile, place: Place) -> str:
    return str(_dimension(file, place).name) if len(place) > 1 else ""


# --- a dataset


def check_dataset(file: RobotFile, dataset: DatasetSurvey) -> Iterator[Misfit]:
    robot = file.robot
    assert robot is not None
    features = {key: (numbers.width, numbers.names) for key, numbers in dataset.columns.items()}
    rate = 1.0 / robot.action_period_s
    if abs(dataset.fps - rate) > 0.01 * rate:
        yield Misfit(
            file.line("action_period_s"),
            "action_period_s",
            f"1 / {dataset.fps:g} s, the dataset's frames",
            f"{robot.action_period_s:g} s",
            f"set it to {1.0 / dataset.fps:.6g}",
        )
    for i, camera in enumerate(robot.cameras):
        if camera.key not in dataset.images and not camera.optional:
            got = f"{', '.join(dataset.images) or 'no images'}{did_you_mean(camera.key, dataset.images)}"
            yield Misfit(
                file.line("cameras", i),
                f"camera {camera.name}",
                f"images {camera.key}",
                got,
                "set its dataset to the key",
            )
    opening: dict[str, tuple[str, float]] = {}
    groups: tuple[tuple[str, Sequence[Any], str, Lines], ...] = (
        ("state", robot.state, dataset.state_key, robot.state_lines),
        ("actions", robot.actions, dataset.action_key, robot.action_lines),
    )
    for group, dimensions, key, lines in groups:
        try:
            places = find_columns(dimensions, key, features)
        except ConfigurationError as error:
            name = str(error).split("'")[1] if str(error).startswith("'") else ""
            said, _, found = str(error).partition(", got ")
            place = file.place_of(group, name)
            expected, line = said.partition("expected ")[2], file.line(*place, "dataset")
            yield Misfit(line, f"{group} {name}".strip(), expected, found, "correct its dataset")
            continue
        for number, (dimension, (column, index)) in enumerate(zip(dimensions, places, strict=True)):
            numbers = dataset.columns[column]
            if not numbers.low:
                continue
            mapping = float(lines.scale_D[number]), float(lines.offset_D[number])
            limits = _limits_of(robot, dimension)
            yield from _check_values(
                file,
                (group, number),
                "dataset",
                f"{group} {dimension.name}",
                f"{column}[{index}]",
                numbers.low[index],
                numbers.high[index],
                mapping,
                limits,
                dimension.continuous,
            )
            if dimension.kind == "gripper" and dimension.ends and numbers.mean:
                opened, closed = dimension.ends
                share = (mapping[0] * numbers.mean[index] + mapping[1] - closed) / (opened - closed)
                yield from _check_opening(file, group, number, dimension, share, opening)


def _check_opening(
    file: RobotFile, group: str, number: int, dimension: Any, share: float, opening: dict[str, tuple[str, float]]
) -> Iterator[Misfit]:
    """The mean opening of a gripper, 0 closed to 1 open, in state and action: one of them may be turned round."""
    assert file.robot is not None
    key = dimension.state or dimension.target if group == "actions" else dimension.name
    if group == "state":
        opening.update({dimension.name: (dimension.name, share), dimension.joint: (dimension.name, share)})
    elif (known := opening.get(key) or opening.get(dimension.name)) is not None:
        name, state = known
        if abs(state - share) > APART and abs(state - (1.0 - share)) < NEAR:
            yield Misfit(
                file.line(group, number, "dataset"),
                f"action {dimension.name}",
                f"it to be open as often as the state {name} ({100 * state:.0f} % open on average)",
                f"{100 * share:.0f} %: in one of them open is closed",
                "exchange open and closed in its dataset",
            )


def _limits_of(robot: Robot, dimension: Any) -> tuple[float, float]:
    """Of a dimension in its own unit; a state's are those of the action that moves it."""
    if isinstance(dimension, ActionDimension):
        if dimension.kind in ("pose", "pose_delta"):
            return -math.inf, math.inf
        most = dimension.max_velocity or math.inf
        return (-most, most) if dimension.kind in ("twist", "joint_velocity") else dimension.span
    if dimension.kind == "pose":
        return -math.inf, math.inf
    signal = next((s for s in robot.signals if s.part == dimension.joint and s.field == "position"), None)
    known = signal is not None and dimension.kind != "joint_velocity"
    return (signal.lower, signal.upper) if known and signal is not None else (-math.inf, math.inf)


# --- a bundle and a URDF


def check_bundle(file: RobotFile, manifest: Manifest) -> Iterator[Misfit]:
    """What the node would refuse: topics, units of datasets and tighter limits are this robot's own affair."""
    assert file.robot is not None
    for found in disagreements(manifest.robot, file.robot):
        expected, where = f"{found.trained}, as bundle {manifest.name} has it", ".".join(map(str, found.place))
        change = "change it, or take a bundle that was made for this robot"
        yield Misfit(file.line(*found.place), where, expected, f"{found.here}{found.remark}", change)


def check_urdf(file: RobotFile, robot_description: str) -> Iterator[Misfit]:
    robot = file.robot
    assert robot is not None
    targets = [axis.name for axis in robot.axes if axis.joint]
    if not targets:
        return
    known = read_urdf(robot_description, targets)
    for i, action in enumerate(robot.actions):
        if action.kind not in ("joint_position", "gripper", "joint_velocity"):
            continue
        joint, where, line = known.get(action.target), f"action {action.name}", file.line("actions", i)
        if joint is None:
            yield Misfit(line, where, f"joint {action.target} in the URDF", "none", "set joint to its name there")
            continue
        if action.kind == "joint_position" and joint.continuous != action.continuous:
            says, got = str(joint.continuous).lower(), str(action.continuous).lower()
            yield Misfit(line, where, f"continuous: {says}, as the URDF says", got, "correct continuous")
        if action.kind in ("joint_position", "gripper") and not joint.continuous:
            low, high = action.span
            slack = 1e-3 * (joint.upper - joint.lower)
            if low < joint.lower - slack or high > joint.upper + slack:
                says, got = f"{joint.lower:.4g} to {joint.upper:.4g}, as the URDF says", f"{low:.4g} to {high:.4g}"
                yield Misfit(line, where, says, got, "correct lower and upper (open and closed)")
        if action.max_velocity is not None and action.max_velocity > 1.001 * joint.velocity:
            says = f"max_velocity up to {joint.velocity:.4g}, as the URDF says"
            yield Misfit(line, where, says, f"{action.max_velocity:.4g}", "lower max_velocity")
