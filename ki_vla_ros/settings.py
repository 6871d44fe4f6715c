"""Every runtime setting once: default, unit, range, and whether it may change while the node is configured.

ROS parameters are declared from this model (see node.py), so a name, a bound or a description stands nowhere else.
Nested models become dotted names: `limits.velocity_scale`, `cameras.<camera>.topic`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from ki_vla_ros.errors import ConfigurationError

if TYPE_CHECKING:
    from ki_vla_ros.manifest import PolicySpec

_CAMERA = re.compile(r"^cameras\.(?P<camera>.+)\.(?P<field>[a-z_]+)$")


def _setting(
    default: bool | float | str,
    description: str,
    *,
    unit: str = "",
    ge: float | None = None,
    le: float | None = None,
    changeable: bool = False,
) -> Any:
    extra: dict[str, Any] = {"unit": unit, "changeable": changeable}
    return Field(default, description=description, ge=ge, le=le, json_schema_extra=extra)


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class CameraSettings(_Model):
    topic: str = _setting("", "sensor_msgs/Image topic of this camera; empty means camera/<name>/image_raw")


class LimitSettings(_Model):
    velocity_scale: float = _setting(
        1.0, "share of the bundle's joint speed limits that commands may use", ge=0.01, le=1.0, changeable=True
    )
    position_margin: float = _setting(
        0.02,
        "a commanded position beyond a joint's limit is clamped onto it if the excess is at most this share of the "
        "joint's "
        "range; otherwise the chunk is refused",
        ge=0.0,
        le=0.2,
        changeable=True,
    )
    max_slowdown: float = _setting(
        2.0,
        "a chunk that is too fast is stretched in time by at most this factor; otherwise it is refused",
        ge=1.0,
        le=10.0,
        changeable=True,
    )
    max_chunk_age_s: float = _setting(
        0.4,
        "oldest observation behind a chunk at the moment it is published; otherwise it is refused",
        unit="s",
        ge=0.02,
        le=5.0,
        changeable=True,
    )


class Settings(_Model):
    """What the user may choose. `cameras` holds the cameras that the YAML names; others have their default topic."""

    bundle: str = _setting("", "folder of the model bundle, or the name of a bundle shipped in models/")
    engine: Literal["onnx"] = _setting("onnx", "inference engine")
    provider: Literal["cpu", "cuda"] = _setting("cpu", "processor that runs the engine")
    threads: int = _setting(1, "processor threads of the engine", ge=1, le=64)
    autostart: bool = _setting(False, "configure and activate at start, without a lifecycle client")
    instruction: str = _setting("", "task at start; empty means hold until one arrives on ~/instruction")

    rate_hz: float = _setting(
        10.0, "ticks per second; each tick may compute a chunk", unit="Hz", ge=0.5, le=50.0, changeable=True
    )
    execution_horizon_s: float = _setting(
        0.1,
        "how long a chunk is executed before a newer one takes over, rounded to whole ticks; longer means fewer "
        "inferences and slower reactions",
        unit="s",
        ge=0.02,
        le=10.0,
        changeable=True,
    )
    lead_s: float = _setting(
        0.01,
        "actions due sooner than this count as consumed: what publishing and the controller's next cycle take",
        unit="s",
        ge=0.0,
        le=0.5,
        changeable=True,
    )
    join_within_s: float = _setting(
        0.25,
        "a chunk is joined at its first action that the arm can reach from its measured position at its speed limits, "
        "at most this far ahead; where there is none, the gate slows the chunk down or refuses it",
        unit="s",
        ge=0.0,
        le=2.0,
        changeable=True,
    )
    hold_s: float = _setting(
        0.2, "time within which a hold brings the arm to rest", unit="s", ge=0.02, le=2.0, changeable=True
    )
    flow_steps: int = _setting(
        0, "Euler steps from noise to actions; 0 means as many as the bundle says", ge=0, le=100, changeable=True
    )
    noise_seed: int = _setting(0, "seed of the noise that each chunk starts from", ge=0, le=2**31 - 1, changeable=True)

    max_age_s: float = _setting(
        0.25,
        "oldest observation (by stamp, on the node's clock) that may still be acted upon",
        unit="s",
        ge=0.02,
        le=5.0,
        changeable=True,
    )
    sync_slop_s: float = _setting(
        0.05,
        "largest difference between the stamps of one observation's images",
        unit="s",
        ge=0.0,
        le=1.0,
        changeable=True,
    )

    joint_states_topic: str = _setting("joint_states", "sensor_msgs/JointState topic to read")
    command_topic: str = _setting(
        "arm_controller/joint_trajectory", "trajectory_msgs/JointTrajectory topic of the robot's controller"
    )
    cameras: Mapping[str, CameraSettings] = Field(default_factory=dict)
    limits: LimitSettings = LimitSettings()

    def camera_topic(self, camera: str) -> str:
        chosen = self.cameras.get(camera, CameraSettings()).topic
        return chosen or f"camera/{camera}/image_raw"

    def validate_against(self, manifest: PolicySpec) -> None:
        """Raises ConfigurationError where a setting does not fit the loaded bundle."""
        names = [camera.name for camera in manifest.cameras]
        for camera in self.cameras:
            if camera not in names:
                raise ConfigurationError(
                    f"parameter 'cameras.{camera}.topic': bundle {manifest.name!r} has no camera {camera!r}, "
                    f"only {', '.join(names)}{_nearest(camera, names)}"
                )
        chunk_s = manifest.horizon * manifest.action_period_s
        if self.execution_horizon_s + 1.0 / self.rate_hz > chunk_s + 1e-9:
            raise ConfigurationError(
                f"parameter 'execution_horizon_s': got {self.execution_horizon_s:g} s at rate_hz {self.rate_hz:g}, "
                "but a "
                f"chunk of bundle {manifest.name!r} lasts {chunk_s:g} s and must outlast execution_horizon_s by one "
                "tick; "
                f"set at most {chunk_s - 1.0 / self.rate_hz:g}"
            )


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter as ROS sees it; `minimum` and `maximum` are inclusive."""

    name: str
    default: bool | int | float | str
    description: str
    minimum: float | None
    maximum: float | None
    changeable: bool


def parameter_specs(cameras: Iterable[str] = ()) -> tuple[ParameterSpec, ...]:
    """All parameters, with those of the named cameras."""
    specs = list(_specs(Settings, ""))
    for camera in cameras:
        specs.extend(_specs(CameraSettings, f"cameras.{camera}."))
    return tuple(specs)


def check_names(names: Iterable[str]) -> tuple[str, ...]:
    """Refuses names that no parameter has (rclpy would ignore them without a word); returns the cameras among them."""
    known = [spec.name for spec in parameter_specs()]
    cameras: dict[str, None] = {}
    for name in names:
        match = _CAMERA.match(name)
        if match and match["field"] in CameraSettings.model_fields:
            cameras[match["camera"]] = None
        elif name not in known:
            candidates = [*known, *(f"cameras.{match['camera']}.{f}" for f in CameraSettings.model_fields if match)]
            raise ConfigurationError(f"parameter {name!r}: no such parameter{_nearest(name, candidates)}")
    return tuple(cameras)


def settings_from_parameters(values: Mapping[str, object]) -> Settings:
    """Values by dotted parameter name -> Settings, or ConfigurationError naming the parameter."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        match = _CAMERA.match(name)
        path = ["cameras", match["camera"], match["field"]] if match else name.split(".")
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise ConfigurationError(f"parameter {name!r}: {first['msg']}, got {first['input']!r}") from error


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


def _nearest(name: str, candidates: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""
