"""ROS parameter files without ROS: what a node would get from one, by the rules of rcl's YAML parser."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ki_vla_ros.errors import ConfigurationError, ParameterError
from ki_vla_ros.settings.settings import Settings, parameter_specs, settings_from_parameters, sort_names

PARAMETERS = "ros__parameters"
# The node's name where nobody gives it another.
NODE = "/policy"


def load_parameters(path: Path, node: str = NODE) -> dict[str, object]:
    """Values by dotted parameter name for the node of this full name.

    ConfigurationError if the file is no parameter file, or no name in it means this node: ROS would then start the node
    with its defaults, without a word.
    """
    tables = load_tables(path)
    matching = [table for name, table in tables.items() if matches(name, node)]
    if not matching:
        raise ConfigurationError(
            f"{path}: no parameters for node {node}, only for {', '.join(tables) or 'no node'}; name it "
            f"/**{node[node.rindex('/') :]}, which fits any namespace"
        )
    return {name: value for table in matching for name, value in _dotted(table, "")}


def load_settings(path: Path, node: str = NODE) -> Settings:
    """ConfigurationError with all for which the node would refuse to start with this file."""
    values = _ours(load_parameters(path, node))
    cameras, joints, _ = sort_names(values)
    problems = []
    for spec in parameter_specs(cameras, joints):
        # ROS does not turn 10 into 10.0: the node would not start.
        if spec.name in values and type(values[spec.name]) is not type(spec.default):
            got = values.pop(spec.name)
            problems.append(
                f"parameter {spec.name!r}: expected {type(spec.default).__name__}, got {type(got).__name__} {got!r}"
            )
    try:
        settings = settings_from_parameters(values)
    except ParameterError as error:
        problems += error.problems
    if problems:
        raise ParameterError(problems, str(path))
    return settings


def matches(pattern: str, node: str) -> bool:
    """`*` stands for one part of a name, `**` for any number of them."""
    pattern = "/" + pattern.lstrip("/")
    expression = re.escape(pattern).replace(r"/\*\*", r"(/\w+)*").replace(r"/\*", r"/\w+")
    return re.fullmatch(expression, node) is not None


def load_tables(path: Path) -> dict[str, Mapping[str, object]]:
    """The parameters by node name, which may be nested in namespaces."""
    try:
        content = YAML(typ="safe", pure=True).load(path.read_text())
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from error
    except (YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigurationError(f"{path}: expected a ROS parameter file (YAML): {error}") from error
    tables: dict[str, Mapping[str, object]] = {}

    def collect(tree: object, name: str) -> None:
        if not isinstance(tree, Mapping):
            raise ConfigurationError(
                f"{path}: expected NODE: {{{PARAMETERS}: {{...}}}}, got {tree!r:.80} at {name or 'the top'}"
            )
        for key, value in tree.items():
            if key == PARAMETERS:
                if not isinstance(value, Mapping):
                    raise ConfigurationError(f"{path}: expected parameters by name at {name}, got {value!r:.80}")
                tables[name] = value
            else:
                collect(value, "/".join(filter(None, (name, str(key).strip("/")))) if name else str(key))

    collect(content, "")
    return tables


def _dotted(table: Mapping[str, object], prefix: str) -> Iterator[tuple[str, object]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def settings_from_values(values: Mapping[str, object]) -> Settings:
    """Of a running node's parameters."""
    return settings_from_parameters(_ours(values))


def _ours(values: Mapping[str, object]) -> dict[str, object]:
    """Without those that rclpy declares in every node."""
    of_ros = ("use_sim_time", "start_type_description_service")
    return {name: value for name, value in values.items() if name not in of_ros and not name.startswith("qos_")}
