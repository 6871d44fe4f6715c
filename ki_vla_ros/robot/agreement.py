"""Whether the robot that a policy was trained for and the robot here are one: what must agree, and what may differ.

Topics, types, frames and the units of datasets are this robot's own affair. What the policy's numbers mean must be the
same in both, and limits may only be tighter here than in training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.robot.dimensions import ActionDimension
from ki_vla_ros.robot.outputs import Output
from ki_vla_ros.robot.robot import Robot

_CAMERA = ("name", "optional")
_STATE = ("name", "kind", "unit", "component", "open", "closed")
_ACTION = (*_STATE, "relative", "binary")
_DELTA = ("delta_frame", "delta_from")


def disagreements(trained: Robot, here: Robot) -> Iterator[str]:
    """Each thing in which the two disagree, with both values."""
    yield from _different("cameras", trained.cameras, here.cameras, _CAMERA)
    yield from _different("state", trained.state, here.state, _STATE)
    yield from _different("actions", trained.actions, here.actions, _ACTION)
    for name in ("action_period_s", "horizon"):
        if getattr(trained, name) != getattr(here, name):
            yield f"{name}: {getattr(trained, name)} in the bundle, {getattr(here, name)} in the robot file"
    if len(trained.actions) != len(here.actions):
        return
    for then, now in zip(trained.actions, here.actions, strict=True):
        yield from _wider(then, now)
        if then.kind == "pose_delta":
            outputs = _output_of(trained, then), _output_of(here, now)
            yield from _different(f"outputs of {then.name}", outputs[:1], outputs[1:], _DELTA)


def check_agreement(trained: Robot, here: Robot) -> None:
    """ConfigurationError with all that the two disagree in."""
    if faults := list(disagreements(trained, here)):
        more = f"; and {len(faults) - 6} more" if len(faults) > 6 else ""
        raise ConfigurationError(
            f"robot {here.name!r}: expected the robot of the bundle, got {'; '.join(faults[:6])}{more}"
        )


def _different(what: str, then: Sequence[Any], now: Sequence[Any], fields: Sequence[str]) -> Iterator[str]:
    if len(then) != len(now):
        names = [[getattr(part, "name", "") for part in parts] for parts in (then, now)]
        yield (
            f"{what}: {len(then)} in the bundle ({', '.join(names[0])}), {len(now)} in the robot file "
            f"({', '.join(names[1])})"
        )
        return
    for number, (one, other) in enumerate(zip(then, now, strict=True)):
        for field in fields:
            ours, theirs = _value(one, field), _value(other, field)
            if ours != theirs:
                yield f"{what}.{number}.{field}: {ours} in the bundle, {theirs} in the robot file"


def _value(part: Any, field: str) -> Any:
    return part.own_unit() if field == "unit" else getattr(part, field)


def _wider(then: ActionDimension, now: ActionDimension) -> Iterator[str]:
    if then.kind in ("pose", "pose_delta"):
        return
    (low, high), (lower, upper) = then.span, now.span
    most, speed = then.max_velocity or math.inf, now.max_velocity or math.inf
    for field, trained, here, wider in (
        ("lower", low, lower, lower < low),
        ("upper", high, upper, upper > high),
        ("max_velocity", most, speed, speed > most),
    ):
        if wider and not now.continuous:
            yield f"actions: {now.name}: {field}: {trained:g} in the bundle, {here:g} in the robot file, which is wider"


def _output_of(robot: Robot, action: ActionDimension) -> Output:
    return next(output for output in robot.outputs if output.name == action.output)
