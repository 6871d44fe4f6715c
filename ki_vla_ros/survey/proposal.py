"""Writes a robot file from a bag, a dataset and a URDF: whatever they show, with a comment at each guess."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import yaml

from ki_vla_ros.errors import ConfigurationError, printable
from ki_vla_ros.messages import COMPRESSED_IMAGE
from ki_vla_ros.robot import (
    ARRAY,
    GRIPPER_COMMAND,
    JOINT_STATE,
    POSE,
    TRAJECTORY,
    TWIST,
    TWIST_STAMPED,
    UrdfJoint,
    movable_joints,
    read_urdf,
)
from ki_vla_ros.share import find_share
from ki_vla_ros.survey.bag import BagSurvey, Images, Topic
from ki_vla_ros.survey.dataset import DatasetSurvey, Numbers
from ki_vla_ros.survey.guesses import DEGREE, FILL_IN, Guess, Seen, guess_joint, is_gripper, looks_like_degrees
from ki_vla_ros.survey.tracks import FASTEST, Track, together

SCHEMA = "config/robots/robot.schema.json"
# Of two topics with the same joints these are not where the robot is.
NOT_MEASURED = re.compile(r"leader|master|teleop|command|cmd|target|desired|goal|reference|gello", re.IGNORECASE)
COMMANDED = re.compile(r"command|cmd|target|desired|goal|reference|equilibrium", re.IGNORECASE)
# Parts of a camera's topic that do not tell it from another's.
GENERIC = re.compile(r"camera|color|rgb|raw|compressed|image(_raw|_rect|_color|_rect_color)?")
WHEEL = re.compile(r"wheel|caster", re.IGNORECASE)
MOVING = re.compile(r"wrist|hand|gripper|tool|tcp|eef|ee(_|$)", re.IGNORECASE)
# Commands that go over so many times the range of the states may be in another unit.
SAME_UNIT = 5.0
RATES = (5, 10, 15, 20, 25, 30, 50, 60, 100)
# What a robot file can have as a name.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-/ ]{0,127}")
POSE_PARTS = ("x", "y", "z", "qx", "qy", "qz", "qw")
AXIS_ANGLE = {"axis_angle1": "rx", "axis_angle2": "ry", "axis_angle3": "rz"}
# Who might take the actions of a dataset, by their kind.
GROUPS = {"twist": "base", "pose": "hand", "pose_delta": "hand", "joint_velocity": "velocities"}
CONTROLLERS = {
    "arm": ("arm_controller/joint_trajectory", TRAJECTORY),
    "velocities": ("forward_velocity_controller/commands", ARRAY),
    "base": ("cmd_vel", TWIST),
    "hand": (FILL_IN, POSE),
}
EULER = ("roll", "pitch", "yaw")
BASE = {"x.vel": "vx", "y.vel": "vy", "theta.vel": "wz"}


@dataclass
class Commands:
    """One output: its topic and the joints (or components) that it takes, in its order."""

    name: str
    topic: str
    type: str
    parts: tuple[str, ...]
    notes: list[str] = field(default_factory=list)
    frame_id: str = ""
    tracks: dict[str, Track] = field(default_factory=dict)


class Proposal:
    """A robot file as `text`; `fill_in` says what nothing showed, `to_check` what was guessed."""

    def __init__(self, name: str, bag: BagSurvey | None, dataset: DatasetSurvey | None, urdf: str) -> None:
        self.bag, self.dataset = bag, dataset
        self.urdf = urdf or (bag.robot_description if bag else "")
        self.fill_in: list[str] = []
        self._kinds = movable_joints(self.urdf) if self.urdf else {}
        self._limits = _readable_limits(self.urdf, self._kinds)
        self.outputs = self._find_outputs()
        self._turns_or_degrees: set[str] = set()
        self._degrees = self._topics_in_degrees()
        self.text = self._write(name or self._name())

    # --- what there is

    def _name(self) -> str:
        given = self.dataset.robot_type if self.dataset else ""
        if not given and self.urdf:
            given = ElementTree.fromstring(self.urdf).get("name", "")
        source = self.bag or self.dataset
        return _plain(given or (source.path.resolve().stem if source else "my_robot"))

    def _topics_in_degrees(self) -> set[str]:
        """By the joints that are commanded, where any are: wheels turn as far as they like.

        A joint whose commands are as large as its state may turn on and on, or both are in degrees: where no URDF tells
        which, its limits are left to be filled in.
        """
        told = {
            joint: track
            for output in self.outputs
            if output.type in (TRAJECTORY, ARRAY) and "veloc" not in output.topic
            for joint, track in output.tracks.items()
        }
        found = set()
        for topic in self.bag.of_type(JOINT_STATE) if self.bag else ():
            for joint, track in topic.tracks.items():
                revolute = self._kinds.get(joint, "revolute") == "revolute"
                if not revolute or is_gripper(joint) or WHEEL.search(joint) or (told and joint not in told):
                    continue
                seen = Seen(track.low, track.high, None, topic.name)
                command = told.get(joint)
                as_large = (
                    command is not None and seen.largest < 10.0 * Seen(command.low, command.high, None, "").largest
                )
                if looks_like_degrees(seen, self._limits.get(joint)):
                    if as_large and joint not in self._limits:
                        self._turns_or_degrees.add(joint)
                    else:
                        found.add(topic.name)
        return found

    def _measuring(self, joint: str) -> Topic | None:
        """The topic that says where the joint is."""
        having = [t for t in (self.bag.of_type(JOINT_STATE) if self.bag else ()) if joint in t.tracks]
        return min(having, key=lambda t: (bool(NOT_MEASURED.search(t.name)), -len(t.times)), default=None)

    def _recorded(self, joint: str, output: Commands) -> Topic | None:
        """The joint states that stand for commands that the bag does not have: a leader's, or a gripper's own."""
        measured = self._measuring(joint)
        if output.type == GRIPPER_COMMAND:
            return measured
        topics = self.bag.of_type(JOINT_STATE) if self.bag and output.topic == FILL_IN else []
        return next((t for t in topics if t is not measured and joint in t.tracks), None)

    def _guess(self, joint: str, topic: str = "", alone: bool = False) -> Guess:
        measured, kind, urdf = self._measuring(joint), self._kinds.get(joint, ""), self._limits.get(joint)
        gripper = is_gripper(joint, topic, alone)
        if measured is None:
            return guess_joint(joint, None, urdf, kind, degrees=False, gripper=gripper)
        track = measured.tracks[joint]
        degrees = measured.name in self._degrees
        fastest = FASTEST / DEGREE if degrees else FASTEST
        seen = Seen(track.low, track.high, track.speed(fastest), measured.name, len(track.jumps(fastest)))
        command = self._commanded(joint)
        if command is not None:
            scale = 1.0 / DEGREE if degrees and not gripper else 1.0
            seen = _with_commands(seen, scale * command.low, scale * command.high)
        guess = guess_joint(joint, seen, urdf, kind, degrees=degrees, gripper=gripper)
        if joint not in self._turns_or_degrees:
            return guess
        note = "FILL IN, or continuous: true if it turns on and on; are state and commands in degrees? Rad is sent"
        return replace(guess, lower=None, upper=None, notes=(*guess.notes, note))

    def _commanded(self, joint: str) -> Track | None:
        """The positions that were commanded of a joint."""
        for output in self.outputs:
            if output.type in (TRAJECTORY, ARRAY) and "veloc" not in output.topic and joint in output.tracks:
                return output.tracks[joint]
        return None

    def _find_outputs(self) -> list[Commands]:
        if self.bag is None:
            return []
        found: list[Commands] = []
        claimed: dict[str, str] = {}
        self._left_out: list[str] = []  # what is said of topics before any output is found
        for topic in sorted(self.bag.of_type(TRAJECTORY), key=lambda t: -len(t.times)):
            joints = tuple(topic.tracks)
            if taken := [joint for joint in joints if joint in claimed]:
                _note(found, claimed[taken[0]], f"{topic.name} commands {taken[0]} as well; it is left out")
            elif joints:
                found.append(_commands(topic, joints))
                claimed.update(dict.fromkeys(joints, topic.name))
        for topic in sorted(self.bag.of_type(ARRAY), key=lambda t: -len(t.times)):
            if COMMANDED.search(topic.name) and topic.tracks:
                self._add_array(topic, found, claimed)
        for action in self.bag.gripper_actions:
            if joint := next((j for j in self._seen_joints() if j not in claimed and is_gripper(j)), None):
                note = "CHECK: the bag does not say which joint the action moves"
                found.append(Commands(_output_name(action), action, GRIPPER_COMMAND, (joint,), [note]))
                claimed[joint] = action
        for topic in sorted(self.bag.of_type(TWIST, TWIST_STAMPED), key=lambda t: -len(t.times)):
            moving = tuple(name for name, track in topic.tracks.items() if track.moved > 0.0)
            same = next((o for o in found if o.type in (TWIST, TWIST_STAMPED)), None)
            if moving and same is not None:
                same.notes.append(f"{topic.name} has twists as well; it is left out")
            elif moving:
                found.append(_commands(topic, moving))
        # A gripper beside a commanded pose is usual; an arm's joints and its tool are one thing commanded twice.
        joints_commanded = any(not is_gripper(joint, topic, len(claimed) == 1) for joint, topic in claimed.items())
        for topic in self.bag.of_type(POSE):
            if COMMANDED.search(topic.name) and joints_commanded:
                _note(found, found[0].topic, f"{topic.name} has poses as commands; joints were commanded, too")
            elif COMMANDED.search(topic.name) and set(POSE_PARTS) <= set(topic.tracks):
                found.append(_commands(topic, POSE_PARTS))
                joints_commanded = True
        for note in self._left_out if found else ():
            found[0].notes.append(note)
        _make_distinct(found)
        return found

    def _seen_joints(self) -> list[str]:
        return list(dict.fromkeys(j for t in (self.bag.of_type(JOINT_STATE) if self.bag else ()) for j in t.tracks))

    def _add_array(self, topic: Topic, found: list[Commands], claimed: dict[str, str]) -> None:
        """A Float64MultiArray has no names: its columns are the joints that they are nearest to."""
        velocities = "veloc" in topic.name
        free = [j for j in self._seen_joints() if j not in claimed and not WHEEL.search(j)]
        chosen: list[str] = []
        for track in topic.tracks.values():
            near: list[tuple[float, str]] = []
            for joint in free:
                measured = self._measuring(joint)
                side = (measured.velocity if velocities else measured.tracks).get(joint) if measured else None
                fit = together(track, side) if side is not None and joint not in chosen else None
                if fit is not None:
                    near.append((fit[1] / max(fit[0], 0.1), joint))
            if near:
                chosen.append(min(near)[1])
        if len(chosen) == len(topic.tracks):
            note = "its columns have no names; joints by which they are nearest to"
            found.append(_commands(topic, tuple(chosen), note))
            found[-1].tracks = dict(zip(chosen, topic.tracks.values(), strict=True))
            claimed.update(dict.fromkeys(chosen, topic.name))
        else:
            self._left_out.append(
                f"CHECK: {topic.name} has {len(topic.tracks)} columns that no joints fit; it is left out"
            )

    # --- writing

    def _write(self, name: str) -> str:
        sources = [str(s.path) for s in (self.bag, self.dataset) if s is not None] + (["a URDF"] if self.urdf else [])
        lines = [
            f"# yaml-language-server: $schema={find_share(SCHEMA).resolve()}",
            f"# Proposed from {' and '.join(sources)} by `python -m ki_vla_ros.robot new`. Check each line against",
            "# the robot: numbers that were seen are no limits. docs/robot.md explains every field.",
            f"name: {_scalar(name)}",
        ]
        state, actions, outputs = self._body()
        lines += self._cameras()
        lines += ["# What the policy sees of the robot, in its order.", "state:", *state]
        lines += [
            "# What the policy commands. `seen` stands where a recording is all that is known: replace it by the",
            "# data sheet's or the URDF's limits; max_velocity is per second.",
            "actions:",
            *actions,
            "outputs:",
            *outputs,
            *self._period(),
        ]
        # Names from a recording stand in comments, too: none may begin a line.
        return "\n".join(printable(line.replace("\n", "\\n")) for line in lines) + "\n"

    def _body(self) -> tuple[list[str], list[str], list[str]]:
        if self.outputs:
            return self._from_commands()
        if self.dataset is not None:
            return self._from_dataset()
        joints = self._seen_joints() or list(self._kinds)
        if not joints:
            raise ConfigurationError(
                "expected joints, commands or poses in what is given, got none; record the robot's joint states, or "
                "give its URDF"
            )
        arm = Commands("arm", FILL_IN, TRAJECTORY, tuple(joints), [f"FILL IN: no command was seen{self._in_bag()}"])
        self.fill_in.append("outputs: topic: who takes the commands")
        self.outputs = [arm]
        return self._from_commands()

    def _in_bag(self) -> str:
        return f" in {self.bag.path.name}" if self.bag else ""

    def _from_commands(self) -> tuple[list[str], list[str], list[str]]:
        state, actions, outputs = [], [], []
        commanded: list[str] = []
        for output in self.outputs:
            where = f"  # {'; '.join(output.notes)}" if output.notes else ""
            kind = f", type: {output.type}"
            if output.type in (TWIST, TWIST_STAMPED):
                actions += self._twist(output)
                frame = f", frame_id: {_scalar(output.frame_id)}" if output.frame_id else ""
                outputs.append(f"  - {{name: {output.name}, topic: {_scalar(output.topic)}{kind}{frame}}}{where}")
            elif output.type == POSE:
                state += self._pose_state()
                actions += [
                    f"  - {{name: {output.name}.{part}, kind: pose, component: {part}, output: {output.name}}}"
                    for part in POSE_PARTS
                ]
                outputs += self._pose_output(output)
            else:
                commanded += output.parts
                for joint in output.parts:
                    guess = self._guess(joint, output.topic, alone=len(output.parts) == 1)
                    state += self._state_line(guess)
                    actions.append(self._action_line(guess, output))
                outputs.append(f"  - {{name: {output.name}, topic: {_scalar(output.topic)}{kind}}}{where}")
        for joint in commanded:
            if not NAME.fullmatch(joint):
                self.fill_in.append(f"a name for {joint!r}: letters, digits, and _ . - / behind the first")
        measuring = {topic.name for joint in commanded if (topic := self._measuring(joint)) is not None}
        for topic in self.bag.of_type(JOINT_STATE) if self.bag else ():
            if topic.name not in measuring and not set(commanded).isdisjoint(topic.tracks):
                state.append(f"  # {topic.name} has joints of these names as well; it is not where the robot is")
        left = [joint for joint in self._seen_joints() if joint not in commanded]
        if left:
            state.append(f"  # Seen, but commanded by nothing, and left out: {', '.join(left)}")
        measured = self._measured_poses()
        if measured and not any(o.type == POSE for o in self.outputs):
            state.append(f"  # Poses that could be part of the state: {', '.join(t.name for t in measured)}")
        if not any(line.lstrip().startswith("-") for line in state):  # a base, or a tool that is moved by a twist
            for joint in left:
                state += [] if WHEEL.search(joint) else self._state_line(self._guess(joint))
        if not any(line.lstrip().startswith("-") for line in state):
            self.fill_in.append("state: what the policy sees")
            state.append(f"  - {FILL_IN}  # a policy needs a state")
        return state, actions, outputs

    def _state_line(self, guess: Guess) -> list[str]:
        measured = self._measuring(guess.name)
        if measured is None and self.bag is not None:
            self.fill_in.append(f"state: {guess.name}: the topic that says where it is")
            topic = FILL_IN
        else:
            topic = measured.name if measured else "joint_states"
        source = [] if topic == "joint_states" else [f"topic: {_scalar(topic)}"]
        source += ["unit: deg"] if guess.degrees else []
        fields = [f"name: {_scalar(guess.name)}", *self._kind(guess)]
        fields += [f"source: {{{', '.join(source)}}}"] if source else []
        fields += self._mapping(guess, self.dataset.state_key if self.dataset else "")
        note = ["CHECK: is it in degrees?"] if guess.degrees else []
        return [f"  - {{{', '.join(fields)}}}" + (f"  # {'; '.join(note)}" if note else "")]

    def _kind(self, guess: Guess) -> list[str]:
        if not guess.gripper:
            return ["kind: joint_position", f"unit: {guess.unit}", *(["continuous: true"] if guess.continuous else [])]
        opened, closed = (self._number(value, f"{guess.name}: open and closed") for value in guess.ends)
        return ["kind: gripper", f"unit: {guess.unit}", f"open: {opened}", f"closed: {closed}"]

    def _action_line(self, guess: Guess, output: Commands) -> str:
        velocity = output.type == ARRAY and "veloc" in output.topic
        fields = [f"name: {_scalar(guess.name)}"]
        notes = list(guess.notes)
        if velocity:
            fields += ["kind: joint_velocity", f"unit: {guess.unit}/s"]
        else:
            fields += self._kind(guess)
            if not guess.gripper and not guess.continuous:
                fields += [
                    f"lower: {self._number(guess.lower, f'{guess.name}: lower')}",
                    f"upper: {self._number(guess.upper, f'{guess.name}: upper')}",
                ]
        fields.append(f"max_velocity: {self._number(guess.speed, f'{guess.name}: max_velocity')}")
        fields.append(f"output: {output.name}")
        if (recorded := self._recorded(guess.name, output)) is not None:
            unit = ", unit: deg" if recorded.name in self._degrees and guess.unit == "rad" and not guess.gripper else ""
            fields.append(f"recorded: {{topic: {_scalar(recorded.name)}{unit}}}")
            notes.append("CHECK: what was commanded is taken from there")
        fields += self._mapping(guess, self.dataset.action_key if self.dataset else "")
        if guess.gripper:
            notes.append(f"CHECK: {'more' if guess.open_high else 'less'} is open?")
            if len(output.parts) > 1 and not is_gripper(output.topic):
                notes.append("gripper by its name")
        return f"  - {{{', '.join(fields)}}}" + (f"  # {'; '.join(notes)}" if notes else "")

    def _twist(self, output: Commands) -> list[str]:
        lines = []
        for part in output.parts:
            track = output.tracks[part]
            most = max(abs(track.low), abs(track.high))
            lines.append(
                f"  - {{name: {output.name}.{part}, kind: twist, component: {part}, max_velocity: "
                f"{_decimal(most)}, output: {output.name}}}  # the most that was seen, no limit"
            )
        return lines

    def _measured_poses(self) -> list[Topic]:
        poses = self.bag.of_type(POSE) if self.bag else []
        return [t for t in poses if not COMMANDED.search(t.name) and set(POSE_PARTS) <= set(t.tracks)]

    def _pose_state(self) -> list[str]:
        topics = [t.name for t in self._measured_poses()]
        topic = topics[0] if topics else FILL_IN
        if not topics:
            self.fill_in.append("state: the PoseStamped topic that says where the tool is")
        source = f"source: {{topic: {_scalar(topic)}, type: {POSE}}}"
        note = f"  # or {', '.join(topics[1:])}" if len(topics) > 1 else ""
        return [f"  - {{name: {part}, kind: pose, component: {part}, {source}}}{note}" for part in POSE_PARTS]

    def _pose_output(self, output: Commands) -> list[str]:
        box = {}
        for axis in "xyz":
            track = output.tracks[axis]
            box[axis] = f"[{_decimal(track.low - 0.05)}, {_decimal(track.high + 0.05)}]"
        linear = float(np.linalg.norm([output.tracks[axis].speed() for axis in "xyz"]))
        angular = 2.0 * float(np.linalg.norm([output.tracks[part].speed() for part in POSE_PARTS[3:]]))
        speeds = {"max_linear_velocity": linear, "max_angular_velocity": angular}
        lines = [
            f"  - name: {output.name}" + (f"  # {'; '.join(output.notes)}" if output.notes else ""),
            f"    topic: {_scalar(output.topic)}",
            f"    type: {POSE}",
            f"    frame_id: {_scalar(output.frame_id)}" if output.frame_id else '    frame_id: ""  # none was given',
            f"    workspace: {{{', '.join(f'{axis}: {ends}' for axis, ends in box.items())}}}  # seen + 5 cm, no limit",
        ]
        for field_, speed in speeds.items():
            known = self._number(speed if speed > 1e-3 else None, f"{output.name}: {field_}")
            lines.append(f"    {field_}: {known}  # seen, no limit")
        return lines

    # --- datasets

    def _from_dataset(self) -> tuple[list[str], list[str], list[str]]:
        dataset = self.dataset
        assert dataset is not None
        state_column, action_column = (self._column(key) for key in (dataset.state_key, dataset.action_key))
        degrees = self._in_degrees(state_column) or self._in_degrees(action_column)
        state, actions = [], []
        for i, name in enumerate(_element_names(state_column)):
            if name in BASE:  # a body's velocity cannot be part of the state
                state.append(f"  # Left out: {name}, a velocity of the base")
            else:
                state.append(self._from_column(state_column, i, "", degrees))
        groups: list[str] = []
        for i, name in enumerate(_element_names(action_column)):
            group = GROUPS.get(_kind_of(name, action_column), "arm")
            groups += [] if group in groups else [group]
            actions.append(self._from_column(action_column, i, group, degrees))
        outputs = []
        for group in groups:
            topic, kind = CONTROLLERS[group]
            fields = [f"name: {group}", f"topic: {_scalar(topic)}", f"type: {kind}"]
            if group == "hand":
                self.fill_in.append("outputs: hand: topic, workspace, max_linear_velocity, max_angular_velocity")
                bounds = ("workspace", "max_linear_velocity", "max_angular_velocity")
                fields += [f"{bound}: {_scalar(FILL_IN)}" for bound in bounds]
            outputs.append(f"  - {{{', '.join(fields)}}}  # CHECK: a dataset does not say who takes the commands")
        return state, actions, outputs

    def _column(self, key: str) -> Numbers:
        assert self.dataset is not None
        if key in self.dataset.columns:
            return self.dataset.columns[key]
        raise ConfigurationError(
            f"dataset {self.dataset.path}: expected a feature {key}, got "
            f"{', '.join(self.dataset.columns) or 'no numbers'}; write the robot file by hand, with "
            "dataset: {column: ..., index: ...} in each dimension"
        )

    def _in_degrees(self, column: Numbers) -> bool:
        for name, low, high in zip(_element_names(column), column.low, column.high, strict=False):
            turns = _kind_of(name, column) == "joint_position" and not is_gripper(name)
            if turns and looks_like_degrees(Seen(low, high, None, column.key), self._limits.get(_joint_name(name))):
                return True
        return False

    def _from_column(self, column: Numbers, i: int, output: str, degrees: bool) -> str:
        """A dimension of a dataset's column; an action if it has an output."""
        elements = _element_names(column)
        element, kind = elements[i], _kind_of(elements[i], column)
        alike = elements.count(element) > 1
        name = _joint_name(element) + (str(elements[: i + 1].count(element)) if alike else "")
        assert self.dataset is not None
        seen = Seen(column.low[i], column.high[i], None, self.dataset.path.name) if column.low else None
        other = self._column(self.dataset.state_key if output else self.dataset.action_key)
        if seen is not None and other.low and elements.count(element) == _element_names(other).count(element) == 1:
            k = _element_names(other).index(element)
            seen = _with_commands(seen, other.low[k], other.high[k])
        notes, fields = [], [f"name: {_scalar(name)}"]
        mapping = [] if not column.names or element == name else [f"name: {_scalar(element)}"]
        if any(elements.count(other) > 1 for other in elements):  # names that are the same tell nothing
            mapping = [f"index: {i}"]
        if kind in ("twist", "pose", "pose_delta"):
            component = BASE.get(element) or AXIS_ANGLE.get(element) or element
            if element in EULER:
                component = _scalar(FILL_IN)
                self.fill_in.append(f"{name}: Euler angles; a robot file has rotation vectors (rx ry rz) and others")
            fields += [f"kind: {kind}", f"component: {component}"]
            if not output:
                if "state: the PoseStamped topic that says where the tool is" not in self.fill_in:
                    self.fill_in.append("state: the PoseStamped topic that says where the tool is")
                fields.append(f"source: {{topic: {_scalar(FILL_IN)}, type: {POSE}}}")
            elif kind != "twist":
                notes.append("CHECK: steps (pose_delta) or places (pose)? scale: what 1 means, in m or rad")
            if kind == "twist":
                most = None if seen is None else max(abs(seen.low), abs(seen.high)) or None
                if element == "theta.vel":
                    mapping.append("unit: deg/s")
                    most = None if most is None else most * DEGREE
                    notes.append("degrees per second, as LeKiwi has them")
                fields.append(f"max_velocity: {self._number(most, f'{name}: max_velocity')}")
                notes.append("the most that was seen, no limit")
        else:
            gripper = is_gripper(element)
            guess = guess_joint(
                name, seen, self._limits.get(name), self._kinds.get(name, ""), degrees=degrees, gripper=gripper
            )
            notes += guess.notes
            if kind == "joint_velocity":
                joint = re.sub(r"(\.vel|_velocity)$", "", element)
                fields += ["kind: joint_velocity", f"unit: {guess.unit}/s"]
                if output:
                    fields.append(f"joint: {_scalar(joint)}")
                else:
                    fields.append(f"source: {{joint: {_scalar(joint)}, field: velocity}}")
            elif gripper:
                fields += self._dataset_gripper(guess, seen, mapping)
                notes.append("CHECK: is more open?")
            else:
                mapping += ["unit: deg"] if guess.degrees else []
                notes += ["CHECK: degrees, or -100..100 (range: [-100, 100])?"] if guess.degrees else []
                fields += self._kind(guess)
                if output and not guess.continuous:
                    for what, value in (("lower", guess.lower), ("upper", guess.upper)):
                        fields.append(f"{what}: {self._number(value, f'{name}: {what}')}")
            if output:
                fields.append(f"max_velocity: {self._number(guess.speed, f'{name}: max_velocity')}")
        fields += [f"output: {output}"] if output else []
        fields += [f"dataset: {{{', '.join(mapping)}}}"] if mapping else []
        return f"  - {{{', '.join(fields)}}}" + (f"  # {'; '.join(notes)}" if notes else "")

    def _dataset_gripper(self, guess: Guess, seen: Seen | None, mapping: list[str]) -> list[str]:
        """Its own ends from the URDF; else 0 and 1, and the dataset's where they plainly are others."""
        theirs = _gripper_ends(seen) if seen else None
        if guess.name in self._limits:
            ends = guess.ends if guess.lower is not None else (None, None)
            own, unit = ends, guess.unit
        elif theirs is not None:
            own, unit = (1.0, 0.0), "ratio"
        else:
            own, unit = guess.ends, guess.unit
        if theirs is not None and (unit != "ratio" or theirs != (1.0, 0.0)):
            mapping += [f"open: {theirs[0]}", f"closed: {theirs[1]}"]
        opened, closed = (self._number(value, f"{guess.name}: open and closed") for value in own)
        return ["kind: gripper", f"unit: {unit}", f"open: {opened}", f"closed: {closed}"]

    def _mapping(self, guess: Guess, key: str) -> list[str]:
        """Where the dataset that was given beside the bag has a joint."""
        column = self.dataset.columns.get(key) if self.dataset else None
        if column is None:
            return []
        names = _element_names(column)
        own = next((n for n in names if n == guess.name or _joint_name(n) == guess.name), None)
        if own is None:
            return []
        i = names.index(own)
        mapping = [] if own == guess.name else [f"name: {_scalar(own)}"]
        if column.low:
            seen = Seen(column.low[i], column.high[i], None, column.key)
            most = max(abs(seen.low), abs(seen.high))
            theirs = _gripper_ends(seen)
            if guess.gripper and guess.unit != "ratio" and most > 0.9 and theirs is not None:
                mapping += [f"open: {theirs[0]}", f"closed: {theirs[1]}"]
            elif not guess.gripper and guess.unit == "rad" and self._in_degrees(column):
                mapping.append("unit: deg")
        return [f"dataset: {{{', '.join(mapping)}}}"] if mapping else []

    # --- cameras and time

    def _cameras(self) -> list[str]:
        seen: set[str] = set()
        lines, left = ["cameras:"], []
        images = list(self.bag.images.values()) if self.bag else []
        raw = {image.name for image in images if image.type != COMPRESSED_IMAGE and not image.fault}
        for image in images:
            base = image.name.removesuffix("/compressed")
            if image.fault:
                left.append(f"{image.name} ({image.fault})")
            elif image.type == COMPRESSED_IMAGE and base in raw:
                left.append(f"{image.name} (the same as {base})")
            else:
                name = _distinct(_camera_name(image.name), seen)
                lines.append(self._camera(name, image))
        for key, (height, width) in self.dataset.images.items() if self.dataset and not images else ():
            name = _distinct(_plain(key.removeprefix("observation.images.").rpartition(".")[2]), seen)
            dataset = "" if key == f"observation.images.{name}" else f", dataset: {_scalar(key)}"
            moving = ", mounting: moving" if MOVING.search(name) else ""
            lines.append(f"  - {{name: {name}{dataset}{moving}}}  # {width}x{height}")
        if len(lines) == 1:
            self.fill_in.append("cameras: topic: none was seen")
            lines.append(f"  - {{name: camera, topic: {_scalar(FILL_IN)}}}  # none was seen")
        return [*lines, *(f"  # Left out: {what}" for what in left)]

    def _camera(self, name: str, image: Images) -> str:
        transport = ", transport: compressed" if image.type == COMPRESSED_IMAGE else ""
        moving = ", mounting: moving" if MOVING.search(image.name) else ""
        rate = f", {image.rate_hz:.0f} Hz" if image.rate_hz else ""
        note = f"  # {image.size[1]}x{image.size[0]}{rate}" + ("; CHECK: is it on the arm?" if moving else "")
        return f"  - {{name: {name}, topic: {_scalar(image.name)}{transport}{moving}}}{note}"

    def _period(self) -> list[str]:
        rate, why = self._rate()
        if rate is None:
            self.fill_in.append("action_period_s: nothing that was given has a rate")
            return [
                f"action_period_s: {_scalar(FILL_IN)}",
                "horizon: 50  # actions per chunk; as the policy was trained",
            ]
        return [
            f"action_period_s: {1.0 / rate!r}  # {why}",
            f"horizon: {max(2, min(50, round(rate)))}  # actions per chunk: a second, or as the policy was trained",
        ]

    def _rate(self) -> tuple[float | None, str]:
        """The dataset's; else the slowest camera's, or the fastest commands' if they are slower; a usual one."""
        if self.dataset is not None:
            return self.dataset.fps, f"{self.dataset.path.name} has {self.dataset.fps:g} frames per second"
        if self.bag is None:
            return None, ""
        cameras = [image.rate_hz for image in self.bag.images.values() if image.rate_hz and not image.fault]
        periods = [t.period_s for t in self.bag.topics.values() if t.name in {o.topic for o in self.outputs}]
        commands = [1.0 / p for p in periods if p and p < 0.5]
        rates = ([min(cameras)] if cameras else []) + ([max(commands)] if commands else [])
        if not rates:
            joints = [1.0 / t.period_s for t in self.bag.of_type(JOINT_STATE) if t.period_s]
            rates = [min(*joints, 30.0)] if joints else []
        if not rates:
            return None, ""
        usual = min(RATES, key=lambda r: abs(float(np.log(r / min(rates)))))
        said = f"cameras at {min(cameras):.0f} Hz" if cameras else "no camera"
        said += f", commands at {max(commands):.0f} Hz" if commands else ", no stream of commands"
        return float(usual), f"CHECK: {said}; 1 / --fps of the dataset"

    def _number(self, value: float | None, what: str) -> str:
        if value is None:
            if what not in self.fill_in:
                self.fill_in.append(what)
            return _scalar(FILL_IN)
        return _decimal(value)

    @property
    def to_check(self) -> int:
        return sum("CHECK" in line for line in self.text.splitlines())

    @property
    def only_seen(self) -> int:
        """Lines whose limits are only what was seen."""
        noted = [line.partition("  # ")[2] for line in self.text.splitlines()]
        return sum("not limits" in note or "no limit" in note for note in noted)


def _with_commands(seen: Seen, low: float, high: float) -> Seen:
    """The range of states and commands: what was commanded must be allowed, too, where it is in the states' unit."""
    if high - low > SAME_UNIT * (seen.high - seen.low):
        return replace(seen, remark=f"CHECK: commanded {low:.4g} to {high:.4g}: is that another unit?")
    return replace(seen, low=min(seen.low, low), high=max(seen.high, high))


def _gripper_ends(seen: Seen) -> tuple[float, float] | None:
    """Open and closed of a dataset's gripper: 1 or 100, or the most of a count such as 255, and 0, or as far below it.

    None: too small for any of them, so it may be metres.
    """
    most = max(abs(seen.low), abs(seen.high))
    if most <= 0.2:
        return None
    opened = most if most > 105.0 else 100.0 if most > 2.0 else 1.0
    return opened, -opened if seen.low < -0.3 * opened else 0.0


def _commands(topic: Topic, parts: tuple[str, ...], *notes: str) -> Commands:
    return Commands(_output_name(topic.name), topic.name, topic.type, parts, list(notes), topic.frame_id, topic.tracks)


def _note(found: list[Commands], topic: str, note: str) -> None:
    next(output for output in found if output.topic == topic).notes.append(note)


def _readable_limits(urdf: str, kinds: Iterable[str]) -> dict[str, UrdfJoint]:
    return dict(read_urdf(urdf, list(kinds))) if kinds else {}


def _output_name(topic: str) -> str:
    parts = [p.removesuffix("_controller").removesuffix("_node") for p in topic.strip("/").split("/")]
    if "cmd_vel" in topic:
        return "base"
    return _plain("_".join(parts[:-1] or parts))


def _make_distinct(outputs: Sequence[Commands]) -> None:
    seen: set[str] = set()
    for output in outputs:
        output.name = _distinct(output.name, seen)


def _distinct(name: str, seen: set[str]) -> str:
    number, own = 2, name
    while own in seen:
        own, number = f"{name}{number}", number + 1
    seen.add(own)
    return own


def _camera_name(topic: str) -> str:
    parts = [p for p in topic.strip("/").split("/") if not GENERIC.fullmatch(p)]
    return _plain(parts[0] if len(parts) == 1 else "_".join(dict.fromkeys(parts[-2:])) if parts else "camera")


def _plain(text: str) -> str:
    """Letters, digits and underscores, beginning with a letter or digit."""
    return re.sub(r"[^A-Za-z0-9_]+", "_", text).strip("_")[:100] or "robot"


def _element_names(column: Numbers) -> list[str]:
    word = "joint" if column.width > 1 else column.key.rpartition(".")[2]
    return list(column.names) or [f"{word}{i + 1}" for i in range(column.width)]


def _joint_name(element: str) -> str:
    return element.removesuffix(".pos") if element not in BASE else f"base.{BASE[element]}"


def _kind_of(element: str, column: Numbers) -> str:
    names = [AXIS_ANGLE.get(name, name) for name in _element_names(column)]
    if element in BASE:
        return "twist"
    parts = (*POSE_PARTS, "rx", "ry", "rz", *EULER)
    if {"x", "y", "z"} <= set(names) and AXIS_ANGLE.get(element, element) in parts:
        z = names.index("z")  # a place above the table is not below it as well; a step is
        both_ways = bool(column.low) and column.low[z] < -0.05 and column.high[z] > 0.05
        return "pose_delta" if both_ways and column.key in ("action", "actions") else "pose"
    return "joint_velocity" if element.endswith((".vel", "_velocity")) else "joint_position"


def _scalar(text: str) -> str:
    """The text as YAML; in quotes where it would be something else without, or is nothing to look at."""
    if text.isprintable() and text.strip() == text and not re.search(r"[:#,\[\]{}]", text):
        with suppress(yaml.YAMLError):
            if text != FILL_IN and yaml.safe_load(text) == text:
                return text
    return json.dumps(text, ensure_ascii=False)


def _decimal(value: float) -> str:
    text = f"{value:.5f}".rstrip("0")
    return text + "0" if text.endswith(".") else text


def read_description(path: Path, text: str) -> str:
    """The URDF; ConfigurationError names the file where it cannot be one."""
    try:
        movable_joints(text)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {str(error).removeprefix(_PARAMETER)}") from None
    return text


_PARAMETER = "parameter 'robot_description': "
