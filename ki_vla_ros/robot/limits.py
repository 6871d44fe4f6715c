"""Limits of a robot file that come from a URDF beside it: what the file leaves out is filled in, the tighter counts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.files import read_text
from ki_vla_ros.robot.urdf import LONGEST, UrdfJoint, read_urdf

KINDS = ("joint_position", "joint_velocity", "gripper")


def with_urdf(content: Any, folder: Path) -> Any:
    """The content of a robot file with the limits of its `urdf`, a path from `folder`.

    ConfigurationError names a URDF that cannot be read. Without one the content stays as it is, and joints that it does
    not have keep what the file says.
    """
    if not isinstance(content, dict) or content.get("urdf") is None:
        return content
    rest = {name: value for name, value in content.items() if name != "urdf"}
    actions = rest.get("actions")
    if not isinstance(content["urdf"], str) or not isinstance(actions, list):
        return content  # whoever validates it says what is wrong
    path = folder / Path(content["urdf"]).expanduser()
    try:
        found = read_urdf(read_text(path, LONGEST), [name for action in actions if (name := _joint(action))])
    except OSError as error:
        raise ConfigurationError(f"urdf: {path} cannot be read ({error.strerror})") from error
    except ConfigurationError as error:
        raise ConfigurationError(f"urdf {path}: {str(error).removeprefix(_PARAMETER)}") from error
    rest["actions"] = [_filled(action, found.get(_joint(action))) for action in actions]
    return rest


_PARAMETER = "parameter 'robot_description': "


def _joint(action: Any) -> str:
    """The joint that an action moves; "" if it is none."""
    if not isinstance(action, dict) or action.get("kind") not in KINDS:
        return ""
    return str(action.get("joint") or action.get("name") or "")


def _filled(action: Any, joint: UrdfJoint | None) -> Any:
    if joint is None:
        return action
    filled = {**action}
    if math.isfinite(joint.velocity):
        filled["max_velocity"] = _tighter(min, action.get("max_velocity"), joint.velocity)
    if action["kind"] != "joint_position":  # a gripper has open and closed, a velocity its state's limits
        return filled
    if joint.continuous:
        filled.setdefault("continuous", True)
    else:
        filled["lower"] = _tighter(max, action.get("lower"), joint.lower)
        filled["upper"] = _tighter(min, action.get("upper"), joint.upper)
    return filled


def _tighter(choose: Any, ours: Any, theirs: float) -> Any:
    """The tighter of two; whatever is no number is left for the validation to name."""
    if ours is None:
        return theirs
    return choose(ours, theirs) if isinstance(ours, (int, float)) and not isinstance(ours, bool) else ours
