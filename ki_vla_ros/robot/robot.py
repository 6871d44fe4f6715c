"""The robot file: cameras, joints and the timing of actions, said once for training, weights import and bundles.

With config/robots/demo_arm.yaml, or the path of any such file:

    robot = read_robot(find_robot("demo_arm"))
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from ki_vla_ros.share import expand, find_share
from ki_vla_ros.yaml_file import read_yaml

Finite = Annotated[float, Field(allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-/ ]*$")]
Horizon = Annotated[int, Field(ge=2, le=1000)]
ActionPeriod = Annotated[Finite, Field(ge=0.001, le=1.0)]


class Frozen(BaseModel):
    """A record that cannot change once it is validated, and that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class CameraSpec(Frozen):
    """One camera of the model; an optional one may be absent, and then its tokens are masked out."""

    name: Name
    optional: bool = False


class JointSpec(Frozen):
    """Limits of position (`unit`) and speed (per second), and whether the joint's action is relative to its state.

    A `continuous` joint turns without end: angles a whole turn apart are one place, and the shortest way between two
    goes across pi. Commands keep its limits all the same. It is left out of files where it is false, as in those that
    were written before it existed.
    """

    name: Name
    unit: Literal["rad", "m"]
    lower: Finite
    upper: Finite
    max_velocity: Annotated[Finite, Field(gt=0)]
    relative: bool
    continuous: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> JointSpec:
        if not self.lower < self.upper:
            raise ValueError(f"joint {self.name!r}: expected lower < upper, got {self.lower} and {self.upper}")
        if self.continuous and self.unit != "rad":
            raise ValueError(f"joint {self.name!r}: expected unit rad for a continuous joint, got {self.unit}")
        return self

    @model_serializer(mode="wrap")
    def _brief(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = whole(self)
        return fields if self.continuous else {name: fields[name] for name in fields if name != "continuous"}


def main_joints(joints: Sequence[JointSpec]) -> tuple[list[bool], Literal["rad", "m"]]:
    """Which joints one figure for the whole arm is taken over, and its unit.

    Such a figure cannot mix rad and m: the revolute joints count, or all where there are none.
    """
    revolute = [joint.unit == "rad" for joint in joints]
    return (revolute, "rad") if any(revolute) else ([True] * len(revolute), "m")


class Robot(Frozen):
    """One robot: cameras in the order of the images, joints in the order of state and action.

    `horizon` actions make a chunk, `action_period_s` apart.
    """

    name: Name
    cameras: Annotated[tuple[CameraSpec, ...], Field(min_length=1)]
    joints: Annotated[tuple[JointSpec, ...], Field(min_length=1)]
    action_period_s: ActionPeriod
    horizon: Horizon

    @model_validator(mode="after")
    def _consistent(self) -> Robot:
        check_parts(self.cameras, self.joints)
        return self

    @property
    def camera_names(self) -> tuple[str, ...]:
        return tuple(camera.name for camera in self.cameras)

    @property
    def joint_names(self) -> tuple[str, ...]:
        return tuple(joint.name for joint in self.joints)


def check_parts(cameras: Sequence[CameraSpec], joints: Sequence[JointSpec]) -> None:
    """ValueError if a name appears twice, or no camera is required."""
    for what, names in (("cameras", [c.name for c in cameras]), ("joints", [j.name for j in joints])):
        if len(set(names)) != len(names):
            raise ValueError(f"{what}: expected distinct names, got {names}")
    if all(camera.optional for camera in cameras):
        raise ValueError("cameras: expected at least one required camera, got only optional ones")


def find_robot(robot: str) -> Path:
    """The file as given, or the one in config/robots/ of the robot of this name."""
    path = expand(robot)
    return find_share(f"config/robots/{robot}.yaml") if path.name == robot and not path.suffix else path


def read_robot(path: Path) -> Robot:
    """Read and check a robot file; ConfigurationError names the file, the key, what was expected and what was got."""
    return read_yaml(path, Robot, "robot file", "config/robots/")
