"""Reads a YAML file into a record, strictly: each key once, and only keys that the record knows."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from ki_vla_ros.errors import ConfigurationError, describe_validation, validation_findings
from ki_vla_ros.files import read_text

Record = TypeVar("Record", bound=BaseModel)
Place = tuple[str | int, ...]  # keys and indices from the outermost on
LARGEST_YAML: Final = 2 << 20  # PyYAML reads about 0.3 MB per second
MOST_NODES: Final = 200_000
MOST_DEPTH: Final = 50
LONGEST_NUMBER: Final = 400
# What PyYAML says where a key has no space after its colon.
_COLON: Final = re.compile("expected ':'|mapping values are not allowed")


def read_yaml(
    path: Path,
    record: type[Record],
    what: str,
    examples: str,
    prepare: Callable[[Any], Any] = lambda content: content,
    origin: Callable[[Place], Place] = lambda place: place,
) -> Record:
    """Read and check a file; `what` it is and the folder with `examples` of it are named in errors.

    ConfigurationError names the file, the key or line, what was expected and what was got. `prepare` may complete the
    content before it is checked; its own ConfigurationError is told with the file's name. `origin` says where in the
    file a place of the completed content comes from, () if it is not there: then no line is told.
    """
    cause: Exception
    text = ""
    try:
        text = read_text(path, LARGEST_YAML)
        return record.model_validate(prepare(parse_yaml(text)))
    except ConfigurationError as error:
        cause, fault = error, str(error)
    except OSError as error:
        cause, fault = error, f"expected a YAML file, got one that cannot be read ({error.strerror})"
    except ValidationError as error:
        place = origin(validation_findings(error)[0].place)
        line = f"line {line_of(place, yaml_lines(text))}: " if place else ""
        cause, fault = error, line + describe_validation(error, record)
    except ValueError as error:
        cause, fault = error, f"expected YAML, got something else ({' '.join(str(error).split())})"
    raise ConfigurationError(f"{what} {path}: {fault}; {examples} has examples") from cause


def parse_yaml(text: str) -> Any:
    """The value that a YAML text holds; ValueError if it is none, too large or too deep, or has a key twice."""
    if len(text) > LARGEST_YAML:
        raise ValueError(f"expected at most {LARGEST_YAML} characters, got {len(text)}")
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        hint = "; write 'key: value', with a space after the colon" if _COLON.search(str(error.problem)) else ""
        raise ValueError(f"{line}{error.problem}{hint}") from error
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(str(error)) from error  # PyYAML's own conversions of numbers and dates


def yaml_lines(text: str) -> dict[tuple[str | int, ...], int]:
    """Line (from 1) of each value, by its keys and indices; empty for a text that is no YAML."""
    found: dict[tuple[str | int, ...], int] = {}

    def walk(node: yaml.Node, place: tuple[str | int, ...]) -> None:
        found[place] = node.start_mark.line + 1
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                walk(value, (*place, str(key.value)))
                found[(*place, str(key.value))] = key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode):
            for number, item in enumerate(node.value):
                walk(item, (*place, number))

    with suppress(yaml.YAMLError, ValueError):
        root = yaml.compose(text, Loader=_Loader)
        if root is not None:
            walk(root, ())
    return found


def line_of(place: Sequence[str | int], lines: Mapping[tuple[str | int, ...], int]) -> int:
    """The line of a value, or of the nearest that it is a part of."""
    keys = tuple(place)
    while keys and keys not in lines:
        keys = keys[:-1]
    return lines.get(keys, 1)


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, where PyYAML silently takes the last value, and what does not end."""

    _depth = 0

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None and _size(node, {}) > MOST_NODES:
            raise yaml.MarkedYAMLError(
                problem=f"expected at most {MOST_NODES} values with all aliases written out, got more",
                problem_mark=node.start_mark,
            )
        return node

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > MOST_DEPTH:
            raise yaml.YAMLError(f"expected at most {MOST_DEPTH} levels, got more")
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        keys = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="expected plain keys", problem_mark=key.start_mark)
            if (name := (key.tag, key.value)) in keys:
                raise yaml.MarkedYAMLError(
                    problem=f"expected each key once, got {key.value!r} again", problem_mark=key.start_mark
                )
            keys.add(name)
        return node


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Number of values in the node, those behind an alias counted each time; also refuses endless ones."""
    if isinstance(node, yaml.ScalarNode):
        # Numbers to base 60 (1:30:00) take quadratic time.
        if len(node.value) > LONGEST_NUMBER and not node.tag.endswith(":str"):
            raise yaml.MarkedYAMLError(problem="expected a shorter number", problem_mark=node.start_mark)
        return 1
    if id(node) not in known:
        known[id(node)] = MOST_NODES + 1  # until it is known, so that an alias of itself counts as too large
        parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]
