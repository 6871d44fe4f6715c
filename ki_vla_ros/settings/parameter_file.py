"""ROS parameter files without ROS: what a node gets from one, by the rules of rcl's YAML parser.

rcl builds no YAML document. It goes through the events of libyaml with a few variables and reads numbers with the C
library, so its rules are not quite those of YAML: `010` is 8, `08` is 8.0, `y` is true, aliases are refused, and where
a parameter is given twice with different types, the type decides which counts, not the order. `_Walk` keeps the same
variables and uses the same two libraries; test/ros/test_parameter_file.py compares the results (rcl 10.1, ROS Kilted).
"""

from __future__ import annotations

import ctypes
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import yaml

from ki_vla_ros.errors import ConfigurationError, ParameterError
from ki_vla_ros.files import read_file
from ki_vla_ros.settings.names import (
    OF_ROS,
    foreign_names,
    of_ros,
    override_faults,
    parameter_specs,
    settings_from_parameters,
    sort_names,
)
from ki_vla_ros.settings.settings import Settings

PARAMETERS = "ros__parameters"
# Beyond these no node starts, and rcl's own walk takes minutes.
LARGEST_FILE, MOST_DEPTH, MOST_NAMES = 1 << 20, 100, 5000
# The node's name unless it is given another.
NODE = "/policy"


class NoSectionError(ConfigurationError):
    """No section of a parameter file is for the node: ROS would silently start it with its defaults."""


_TRUE = ("Y", "y", "yes", "Yes", "YES", "true", "True", "TRUE", "on", "On", "ON")
_FALSE = ("N", "n", "no", "No", "NO", "false", "False", "FALSE", "off", "Off", "OFF")
_SPECIAL = re.compile(r"[+-]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
# A node's name with its namespaces, as rmw limits them; each may be a wildcard.
_SECTION = re.compile(r"/?((\*\*?|[A-Za-z_]\w{0,243})/)*(\*\*?|[A-Za-z_]\w{0,254})", re.ASCII)
# Where a parameter has values of several types, rclpy takes the first of these; arrays come after all of them.
_TYPES = (bool, int, float, str)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.strtoll.restype, _libc.strtod.restype = ctypes.c_longlong, ctypes.c_double


def load_parameters(path: Path, node: str = NODE) -> dict[str, object]:
    """Values by dotted parameter name for the node of this full name; None stands for an empty array or table.

    ConfigurationError if rcl would refuse the file, and if no section is for this node: ROS would then silently start
    the node with its defaults.
    """
    return _values_for(load_sections(path), path, node)


def _values_for(sections: Mapping[str, Mapping[str, object]], path: Path, node: str) -> dict[str, object]:
    matching = [values for name, values in sections.items() if matches(name, node)]
    if not matching:
        raise NoSectionError(
            f"{path}: no parameters for node {node}, only for {', '.join(sections) or 'no node'}; name it "
            f"/**{node[node.rindex('/') :]}, which matches any namespace"
        )
    return {name: value for values in matching for name, value in values.items()}


def load_settings(path: Path, node: str = NODE, warn: Callable[[str], None] = lambda message: None) -> Settings:
    """Settings from a file; ConfigurationError with every reason for which the node would refuse to start with it.

    `warn` is told of each parameter that this node does not know, in a section that is for other nodes too.
    """
    sections = load_sections(path)
    values = _values_for(sections, path, node)
    shared = shared_names([sections], node)
    for name in foreign_names(values, shared):
        del values[name]
        warn(foreign_warning(name))
    problems = list(override_faults(values, shared))
    cameras, joints, _ = sort_names(values)
    types = {name: bool for name in OF_ROS} | {
        spec.name: type(spec.default) for spec in parameter_specs(cameras, joints)
    }
    for name, expected in types.items():
        # ROS does not turn 10 into 10.0: the node would not start.
        if name in values and type(values[name]) is not expected:
            got = values.pop(name)
            problems.append(f"parameter {name!r}: expected {expected.__name__}, got {type(got).__name__} {got!r}")
    try:
        settings = settings_from_values(values)
    except ParameterError as error:
        problems += error.problems
    if problems:
        raise ParameterError(problems, str(path))
    return settings


def check_sections(sections: Mapping[str, Mapping[str, object]], path: Path, node: str) -> None:
    """NoSectionError if a file has a policy's bundle or limits, but under names that are not this node's."""
    of_policy = any(name == "bundle" or name.startswith("limits.") for values in sections.values() for name in values)
    if of_policy:  # a file of other nodes alone need not mention this one
        _values_for(sections, path, node)


def shared_names(files: Iterable[Mapping[str, Mapping[str, object]]], node: str) -> set[str]:
    """Parameters that `node` has only from sections for nodes of any name (`/**`, `/left/*`), given all its files."""
    shared, own = set[str](), set[str]()
    for pattern, values in (section for sections in files for section in sections.items() if matches(section[0], node)):
        (shared if pattern.rpartition("/")[2].startswith("*") else own).update(values)
    return shared - own


def foreign_warning(name: str) -> str:
    return (
        f"parameter {name!r}: ignored, this node has none of that name, and the section that sets it is for other "
        "nodes too"
    )


def settings_from_values(values: Mapping[str, object]) -> Settings:
    """Settings from a node's parameters, which include those that rclpy declares."""
    return settings_from_parameters({name: value for name, value in values.items() if not of_ros(name)})


def parameter_values(settings: Settings, cameras: Sequence[str], joints: Sequence[str]) -> dict[str, object]:
    """The inverse: every setting by its parameter name, with those of these cameras and joints."""
    values: dict[str, object] = {}
    for spec in parameter_specs(cameras, joints):
        *path, last = spec.name.split(".")
        owner: object = settings
        if path[:1] == ["cameras"]:
            owner = settings.camera(spec.name.removeprefix("cameras.").rpartition(".")[0])
        elif path[:2] == ["limits", "joints"]:
            owner = settings.limits.of(spec.name.removeprefix("limits.joints.").rpartition(".")[0])
        else:
            for part in path:
                owner = getattr(owner, part)
        values[spec.name] = getattr(owner, last)
    return values


def matches(pattern: str, node: str) -> bool:
    """Whether a section is for this node: `*` stands for one part of a name, `**` for any number of them."""
    expression = ("/" + pattern.removeprefix("/")).replace("/*", r"(/\w+)")
    return re.fullmatch(expression, node, re.ASCII) is not None


def load_sections(path: Path) -> dict[str, dict[str, object]]:
    """By section, which names a node or is a pattern for several, its values by dotted parameter name."""
    walk = _Walk()
    try:
        for event in yaml.parse(read_file(path, LARGEST_FILE), Loader=yaml.CLoader):
            walk.take(event)
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, _RefusedError) as error:
        raise ConfigurationError(f"{path}: expected a ROS parameter file (YAML): {error}") from error
    return {name: section.parameters() for name, section in walk.sections.items()}


class _RefusedError(Exception):
    pass


def _refuse(event: yaml.Event, reason: str) -> NoReturn:
    raise _RefusedError(f"line {event.start_mark.line + 1 if event.start_mark else '?'}: {reason}")


@dataclass
class _Section:
    """The parameters of one section: `values` by the index of their name in `names`, then by their type."""

    names: list[str] = field(default_factory=list)
    values: defaultdict[int, dict[tuple[bool, int], object]] = field(default_factory=lambda: defaultdict(dict))

    def place(self, name: str) -> int:
        if name not in self.names:
            if len(self.names) == MOST_NAMES:
                raise _RefusedError(f"expected at most {MOST_NAMES} parameters in a section, got more")
            self.names.append(name)
        return self.names.index(name)

    def parameters(self) -> dict[str, object]:
        return {name: self._value(self.values[place]) for place, name in enumerate(self.names)}

    @staticmethod
    def _value(by_type: Mapping[tuple[bool, int], object]) -> object:
        return by_type[min(by_type)] if by_type else None


@dataclass
class _Path:
    """Joined names; like rcl, `remove` cuts at the last separator, even where that is inside a name."""

    separator: str
    text: str = ""
    count: int = 0

    def add(self, name: str) -> None:
        self.text = self.text.removesuffix(self.separator) + self.separator + name if self.count else name
        self.count += 1

    def remove(self) -> None:
        if self.count:
            self.text = self.text.rpartition(self.separator)[0] if self.count > 1 else ""
            self.count -= 1


class _Walk:
    """What rcl remembers from one event to the next. It does not check where tables may stand, so neither does this."""

    def __init__(self) -> None:
        self.sections: dict[str, _Section] = {}
        self._section, self._place = _Section(), 0
        self._node, self._table = _Path("/"), _Path(".")
        self._in_parameters, self._depth = False, 0
        self._key_comes, self._table_begins, self._in_sequence = True, False, False
        self._array_type: tuple[bool, int] | None = None

    def take(self, event: yaml.Event) -> None:
        match event:
            case yaml.ScalarEvent():
                if self._key_comes:
                    self._take_key(event)
                    self._key_comes = False
                else:
                    self._take_value(event)
                    self._key_comes = not self._in_sequence
            case yaml.SequenceStartEvent():
                if self._key_comes or not self._in_parameters:
                    _refuse(event, f"expected a name or a mapping below {PARAMETERS}, got a list")
                self._in_sequence, self._array_type = True, None
            case yaml.SequenceEndEvent():
                self._in_sequence, self._key_comes = False, True
            case yaml.MappingStartEvent():
                self._depth += 1
                if self._depth > MOST_DEPTH:
                    _refuse(event, f"expected tables at most {MOST_DEPTH} deep")
                self._key_comes = True
                # The mapping of ros__parameters itself adds nothing to the names in it.
                self._table_begins = not self._in_parameters or self._depth - self._node.count != 2
            case yaml.MappingEndEvent():
                if self._in_parameters and self._table.count:
                    self._table.remove()
                elif self._in_parameters:
                    self._in_parameters = False
                elif self._depth == self._node.count + 1:
                    self._node.remove()
                self._depth -= 1
            case yaml.AliasEvent():
                _refuse(event, f"expected a value, got the alias *{event.anchor}, which ROS does not follow")

    def _take_key(self, event: yaml.ScalarEvent) -> None:
        name = _text(event)
        if not event.value:
            _refuse(event, "expected a name, got none")
        if self._in_parameters:
            self._take_parameter(event, name)
        elif not name.startswith(PARAMETERS):
            self._node.add(name)
        else:
            if not self._node.count:
                _refuse(event, f"expected the name of a node before {PARAMETERS}")
            if not _SECTION.fullmatch(self._node.text):
                _refuse(event, f"expected the name of a node before {PARAMETERS}, got {self._node.text!r}")
            self._section = self.sections.setdefault(self._node.text, _Section())
            self._in_parameters = True

    def _take_parameter(self, event: yaml.ScalarEvent, name: str) -> None:
        """As in rcl, a parameter with the table's own name, if there is one, becomes the first one in the table."""
        if self._table_begins:
            if self._place >= len(self._section.names):
                _refuse(event, f"expected the name of a table before {name!r}")
            self._table.text = self._section.names[self._place]
            self._table.count += 1
            self._table_begins = False
        if self._table.count:
            self._place = self._section.place(self._table.text)
            self._section.names[self._place] = f"{self._table.text}.{name}"
        else:
            self._place = self._section.place(name)

    def _take_value(self, event: yaml.ScalarEvent) -> None:
        if not self._in_parameters or not self._section.names:
            _refuse(event, f"expected a node's name and {PARAMETERS}, got the value {event.value!r:.80}")
        if not event.value and event.style not in ("'", '"'):
            _refuse(event, "expected a value, got none")
        value = _value(event)
        kind = self._in_sequence, _TYPES.index(type(value))
        values = self._section.values[self._place]
        if not self._in_sequence:
            values[kind] = value
            return
        if self._array_type is None:
            self._array_type, values[kind] = kind, []
        elif kind != self._array_type:
            _refuse(event, f"expected {_TYPES[self._array_type[1]].__name__} as before in this list, got {value!r:.80}")
        array = values[kind]
        assert isinstance(array, list)
        array.append(value)


def _text(event: yaml.ScalarEvent) -> str:
    """The text as C sees it: it ends at a zero byte."""
    return str(event.value).partition("\0")[0]


def _value(event: yaml.ScalarEvent) -> bool | int | float | str:
    text = _text(event)
    if event.tag == "tag:yaml.org,2002:str" or event.style in ("'", '"'):
        return text
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    if (integer := _number(_libc.strtoll, text, 0)) is not None:
        return int(integer)
    if _SPECIAL.fullmatch(text):
        return float(text.replace(".", ""))
    number = _number(_libc.strtod, text)
    return text if number is None else float(number)


def _number(read: Callable[..., float], text: str, *base: int) -> float | None:
    """The number that the whole text spells; None if it spells none, or one that is out of range."""
    buffer = ctypes.create_string_buffer(text.encode())
    end = ctypes.c_void_p()
    ctypes.set_errno(0)
    number = read(buffer, ctypes.byref(end), *base)
    whole = text and end.value == ctypes.addressof(buffer) + len(buffer) - 1
    return number if whole and ctypes.get_errno() == 0 else None
