"""Settings by their flat ROS names: what is declared, what a name refers to, and values by name to Settings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ki_vla_ros.errors import ParameterError, did_you_mean
from ki_vla_ros.settings.limits import JointLimitSettings
from ki_vla_ros.settings.settings import CameraSettings, Settings

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
            candidates = [*known, *(f"{match['table']}.{match['name']}.{f}" for f in fields if match)]
            unknown[name] = f"parameter {name!r}: no such parameter{did_you_mean(name, candidates)}"
    return tuple(found["cameras"]), tuple(found["limits.joints"]), unknown


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
