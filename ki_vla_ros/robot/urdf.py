"""What a URDF says about joints: limits, soft limits, and which joints turn without end.

Whoever gives a URDF relies on its limits, so whatever in it cannot be read as a limit is refused and named.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from ki_vla_ros.errors import ConfigurationError, did_you_mean

# The largest URDFs of whole humanoids have 1 MB.
LONGEST = 10_000_000
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|inf)", re.ASCII)


@dataclass(frozen=True, slots=True)
class UrdfJoint:
    """Position limits and the greatest speed (per second); infinite where the URDF gives none."""

    lower: float
    upper: float
    velocity: float
    continuous: bool


def read_urdf(robot_description: str, joints: Sequence[str]) -> Mapping[str, UrdfJoint]:
    """Those of `joints` that the URDF has, by name; empty for an empty string.

    ConfigurationError if the text is no URDF or has none of `joints`, or if one of them appears twice or has a limit
    that is none. Of hard and soft limits (`safety_controller`) the tighter counts. Other joints are not looked at.
    """
    if not robot_description:
        return {}
    found: dict[str, UrdfJoint] = {}
    names = []
    for element in _joints(robot_description):
        name = element.get("name", "")
        names.append(name)
        if name in found:
            raise _refusal(f"joint {name!r}: expected it once, got it twice")
        if name in joints:
            found[name] = _read_joint(name, element)
    if not found:
        wanted = ", ".join(joints)
        near = did_you_mean(joints[0], names) if joints else ""
        raise _refusal(f"expected joints {wanted}, got {', '.join(names[:20]) or 'none'}; is it this robot's?{near}")
    return found


def movable_joints(robot_description: str) -> dict[str, str]:
    """Type by name of the joints that are moved by themselves: not fixed ones, not those that mimic others."""
    moved = ("revolute", "prismatic", "continuous")
    return {
        element.get("name", ""): element.get("type", "")
        for element in _joints(robot_description)
        if element.get("type") in moved and not any(_local_name(child) == "mimic" for child in element)
    }


def _joints(robot_description: str) -> Iterator[ElementTree.Element]:
    """The robot's own joints; elements of the same name in transmissions, ros2_control or gazebo are others."""
    if len(robot_description) > LONGEST:
        raise _refusal(f"expected at most {LONGEST} characters, got {len(robot_description)}")
    if "<!DOCTYPE" in robot_description:  # a few lines of entities could expand to gigabytes
        raise _refusal("expected no document type and no entities (<!DOCTYPE ...>); remove them")
    try:
        root = ElementTree.fromstring(robot_description)
    except (ElementTree.ParseError, ValueError) as error:
        path = "" if "<" in robot_description else f" in {robot_description[:60]!r}; give its content, not its path"
        raise _refusal(f"expected a URDF, got {error}{path}") from None
    if _local_name(root) != "robot":
        raise _refusal(f"expected a URDF, whose root is <robot>, got <{_local_name(root)[:60]}>")
    for element in root:
        if "xacro" in element.tag:
            raise _refusal(
                f"expected a URDF, got xacro (<xacro:{_local_name(element)[:60]}>); expand it with xacro first"
            )
        if _local_name(element) == "joint":
            yield element


def _read_joint(name: str, joint: ElementTree.Element) -> UrdfJoint:
    kind = joint.get("type", "")
    if kind not in ("revolute", "prismatic", "continuous"):
        raise _refusal(f"joint {name!r}: expected type revolute, prismatic or continuous, got {kind!r:.60}")
    limit, soft = (_only_child(name, joint, what) for what in ("limit", "safety_controller"))
    if limit is None and kind != "continuous":
        raise _refusal(f"joint {name!r}: expected <limit>, which a {kind} joint must have, got none")
    velocity = _number(name, limit, "velocity", math.inf)
    if not velocity > 0.0:
        raise _refusal(f"joint {name!r}: expected velocity > 0, got {velocity:g}")
    if kind == "continuous":
        return UrdfJoint(-math.inf, math.inf, velocity, True)
    # A hard limit that is left out is 0 by definition; a soft one is none, as otherwise most arms could not move.
    lower = max(_number(name, limit, "lower", 0.0), _number(name, soft, "soft_lower_limit", -math.inf))
    upper = min(_number(name, limit, "upper", 0.0), _number(name, soft, "soft_upper_limit", math.inf))
    if not lower < upper:
        raise _refusal(
            f"joint {name!r}: expected lower < upper, got {lower:g} and {upper:g} (the tighter ones of <limit> and "
            "<safety_controller>)"
        )
    return UrdfJoint(lower, upper, velocity, False)


def _only_child(joint: str, element: ElementTree.Element, what: str) -> ElementTree.Element | None:
    found = [child for child in element if _local_name(child) == what]
    if len(found) > 1:  # readers differ in which of them counts
        raise _refusal(f"joint {joint!r}: expected <{what}> once, got it {len(found)} times")
    return found[0] if found else None


def _number(joint: str, element: ElementTree.Element | None, attribute: str, default: float) -> float:
    text = None if element is None else element.get(attribute)
    if text is None:
        return default
    written = _NUMBER.fullmatch(text.strip())
    # A number too large for a float would pass for no limit, which is written inf.
    if not written or (math.isinf(float(text)) and "inf" not in text):
        xacro = "; expand it with xacro first" if "${" in text else ""
        raise _refusal(f"joint {joint!r}: expected a number as {attribute}, got {text[:60]!r}{xacro}")
    return float(text)


def _local_name(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _refusal(fault: str) -> ConfigurationError:
    return ConfigurationError(f"parameter 'robot_description': {fault}")
