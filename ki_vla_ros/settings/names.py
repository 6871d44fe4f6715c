"""Settings by their flat ROS names: what is declared, what a name refers to, and values by name to Settings."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ki_vla_ros.errors import ConfigurationError, ParameterError, did_you_mean
from ki_vla_ros.settings.limits import JointLimitSettings
from ki_vla_ros.settings.settings import CameraSettings, Settings

# Parameters that rclpy declares in every node, and those that it declares for each topic.
OF_ROS = ("use_sim_time", "start_type_description_service")
OVERRIDES = "qos_overrides."
_OVERRIDE = re.compile(r"qos_overrides\.(?P<topic>/.+)\.(publisher|subscription)\.(?P<policy>[a-z_]+)")
# Nodes in C++ can let more of it be overridden, and of one publisher among several.
_OVERRIDE_ELSEWHERE = re.compile(
    r"qos_overrides\./.+\.(publisher|subscription)(_\w+)?\.(history|depth|reliability|durability|deadline|lifespan"
    r"|liveliness(_lease_duration)?|avoid_ros_namespace_conventions)"
)
# What may be overridden of a topic's quality of service, with the values that rclpy takes; depth is a number.
QOS_POLICIES: Mapping[str, tuple[str, ...]] = {
    "history": ("keep_last", "keep_all", "system_default"),
    "depth": (),
    "reliability": ("reliable", "best_effort", "system_default"),
    "durability": ("volatile", "transient_local", "system_default"),
}
# An unknown name that is at least this similar to one of ours is a misspelt one of ours.
MISSPELT = 0.8
# Parameters of one camera or joint; the bundle has their names.
_NAMED = re.compile(r"^(?P<table>cameras|limits\.joints)\.(?P<name>.+)\.(?P<field>[a-z_]+)$")


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter as ROS sees it; `minimum` and `maximum` are inclusive."""

    name: str
    default: bool | int | float | str
    description: str
    minimum: float | None
    maximum: float | None
    changeable: bool


def parameter_specs(cameras: Iterable[str] = (), joints: Iterable[str] = ()) -> tuple[ParameterSpec, ...]:
    """All parameters, with those of the named cameras and joints."""
    specs = list(_specs(Settings, ""))
    for camera in cameras:
        specs.extend(_specs(CameraSettings, f"cameras.{camera}."))
    for joint in joints:
        specs.extend(_specs(JointLimitSettings, f"limits.joints.{joint}."))
    return tuple(specs)


def check_names(names: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The cameras and joints among the names; ParameterError for unknown names, which rclpy would ignore."""
    cameras, joints, unknown = sort_names(names)
    if unknown:
        raise ParameterError(list(unknown.values()))
    return cameras, joints


def sort_names(names: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, str]]:
    """The cameras and joints among the names, and a message for each unknown name."""
    known = [spec.name for spec in parameter_specs()]
    found: dict[str, dict[str, None]] = {"cameras": {}, "limits.joints": {}}
    unknown = {}
    for name in names:
        match = _NAMED.match(name)
        fields = (CameraSettings if match["table"] == "cameras" else JointLimitSettings).model_fields if match else {}
        if match and match["field"] in fields:
            found[match["table"]][match["name"]] = None
        elif name not in known:
            candidates = [*known, *OF_ROS, *(f"{match['table']}.{match['name']}.{f}" for f in fields if match)]
            unknown[name] = f"parameter {name!r}: no such parameter{did_you_mean(name, candidates)}"
    return tuple(found["cameras"]), tuple(found["limits.joints"]), unknown


def foreign_names(names: Iterable[str], shared: Collection[str]) -> list[str]:
    """Those of `shared`, which are given to several nodes, that mean nothing to this one.

    A name that stands in one of our tables or resembles one of ours, in any case of letters, is misspelt, not foreign.
    """
    unknown = sort_names(name for name in names if name in shared and not of_ros(name))[2]
    return [name for name in unknown if not _is_misspelt(name.lower())]


def _is_misspelt(name: str) -> bool:
    """Whether a name, in small letters, resembles one of ours, or one of a camera's, a joint's or a topic's."""
    if difflib.get_close_matches(name, [*(spec.name for spec in parameter_specs()), *OF_ROS], n=1, cutoff=MISSPELT):
        return True
    table, _, rest = name.partition(".")
    near = difflib.get_close_matches(table, ("cameras", "limits", "qos_overrides"), n=1, cutoff=MISSPELT)
    if not near or not rest:
        return False
    # Other nodes may have a table `camera`, but no names in it like ours.
    return table in ("cameras", "limits") or near[0] == "qos_overrides" or not sort_names([f"{near[0]}.{rest}"])[2]


def of_ros(name: str) -> bool:
    return name in OF_ROS or name.startswith(OVERRIDES)


def override_topic(name: str) -> str:
    """The topic whose quality of service this parameter overrides; "" if it overrides none."""
    match = _OVERRIDE.fullmatch(name)
    return match["topic"] if match else ""


def override_faults(values: Mapping[str, object], shared: Collection[str] = ()) -> Iterator[str]:
    """A message for each override of a quality of service that rclpy would ignore or end the node for.

    In `shared`, those that this node does not take may be for another one, if ROS has their names.
    """
    for name, value in values.items():
        if not name.startswith(OVERRIDES):
            continue
        match = _OVERRIDE.fullmatch(name)
        if match is None or match["policy"] not in QOS_POLICIES:
            if name not in shared or not _OVERRIDE_ELSEWHERE.fullmatch(name):
                yield (
                    f"parameter {name!r}: expected qos_overrides.TOPIC.publisher.POLICY or .subscription.POLICY, with "
                    f"the topic's full name and one of {', '.join(QOS_POLICIES)}"
                )
        elif match["policy"] == "depth" and (type(value) is not int or value < 1):
            yield f"parameter {name!r}: expected an int of 1 or more, got {value!r}"
        elif match["policy"] != "depth" and value not in QOS_POLICIES[match["policy"]]:
            yield f"parameter {name!r}: expected one of {', '.join(QOS_POLICIES[match['policy']])}, got {value!r}"


def settings_from_parameters(values: Mapping[str, object]) -> Settings:
    """Values by dotted parameter name -> Settings, or ParameterError naming all that are wrong."""
    unknown = sort_names(values)[2]
    tree: dict[str, Any] = {}
    for name in [name for name in values if name not in unknown]:
        match = _NAMED.match(name)
        path = [*match["table"].split("."), match["name"], match["field"]] if match else name.split(".")
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = values[name]
    problems = list(unknown.values())
    try:
        settings = Settings.model_validate(tree)
    except ValidationError as error:
        paths = [(".".join(map(str, found["loc"])), found) for found in error.errors()]
        problems += [f"parameter {path!r}: {found['msg']}, got {found['input']!r}" for path, found in paths]
    if problems:
        raise ParameterError(problems)
    return settings


def read_changes(pairs: Iterable[str]) -> dict[str, object]:
    """Values by name of a command line's --set NAME=VALUE, the last of each; they stay text, which Settings converts.

    ConfigurationError for what is no such pair.
    """
    kinds = {spec.name: type(spec.default) for spec in parameter_specs()}
    changes: dict[str, object] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ConfigurationError(f"--set {pair}: expected NAME=VALUE, for example executor=rtc")
        if kinds.get(name) is bool and value not in ("true", "false"):
            raise ConfigurationError(f"--set {pair}: expected true or false")
        changes[name] = value
    return changes


def _specs(model: type[BaseModel], prefix: str) -> Iterator[ParameterSpec]:
    for name, field in model.model_fields.items():
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            yield from _specs(nested, f"{prefix}{name}.")
        elif isinstance(field.json_schema_extra, dict):
            yield _spec(prefix + name, field, field.json_schema_extra)


def _spec(name: str, field: FieldInfo, extra: Mapping[str, Any]) -> ParameterSpec:
    details = [str(extra["unit"])] if extra["unit"] else []
    if get_origin(field.annotation) is Literal:
        details.append("one of " + ", ".join(get_args(field.annotation)))
    details.append("may change at any time" if extra["changeable"] else "changes need cleanup and configure")
    return ParameterSpec(
        name=name,
        default=field.default,
        description=f"{field.description} ({'; '.join(details)})",
        minimum=next((m.ge for m in field.metadata if hasattr(m, "ge")), None),
        maximum=next((m.le for m in field.metadata if hasattr(m, "le")), None),
        changeable=bool(extra["changeable"]),
    )
