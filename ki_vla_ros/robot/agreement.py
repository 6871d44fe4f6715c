"""Whether the robot that a policy was trained for and the robot here are one: what must agree, and what may differ.

Topics, types, frames and the units of datasets are this robot's own affair. What the policy's numbers mean must be the
same in both, and limits may only be tighter here than in training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.robot.dimensions import ActionDimension
from ki_vla_ros.robot.outputs import Output
from ki_vla_ros.robot.robot import Robot

_CAMERA = ("name", "optional")
_STATE = ("name", "kind", "unit", "component", "open", "closed")
_ACTION = (*_STATE, "relative", "binary")
_DELTA = ("delta_frame", "delta_from")


@dataclass(frozen=True)
class Disagreement:
    """One thing that is different: where in the robot file, and both values; `remark`: what is wrong with it."""

    place: tuple[str | int, ...]
    trained: str
    here: str
    remark: str = ""

    def __str__(self) -> str:
        where = ".".join(map(str, self.place))
        return f"{where}: {self.trained} in the bundle, {self.here} in the robot file{self.remark}"


def disagreements(trained: Robot, here: Robot) -> Iterator[Disagreement]:
    """Each thing in which the two disagree, with both values."""
    yield from _different("cameras", trained.cameras, here.cameras, _CAMERA)
    yield from _different("state", trained.state, here.state, _STATE)
    yield from _different("actions", trained.actions, here.actions, _ACTION)
    for name in ("action_period_s", "horizon"):
        if getattr(trained, name) != getattr(here, name):
            yield Disagreement((name,), str(getattr(trained, name)), str(getattr(here, name)))
    if len(trained.actions) != len(here.actions):
        return
    for number, (then, now) in enumerate(zip(trained.actions, here.actions, strict=True)):
        yield from _wider(number, then, now)
        if then.kind == "pose_delta":
            theirs, ours = _output_of(trained, then), _output_of(here, now)
            place = ("outputs", here.outputs.index(ours))
            for field in _DELTA:
                if getattr(theirs, field) != getattr(ours, field):
                    yield Disagreement((*place, field), getattr(theirs, field), getattr(ours, field))


def check_agreement(trained: Robot, here: Robot) -> None:
    """ConfigurationError with all that the two disagree in."""
    if faults := list(disagreements(trained, here)):
        more = f"; and {len(faults) - 6} more" if len(faults) > 6 else ""
        raise ConfigurationError(
            f"robot {here.name!r}: expected the robot of the bundle, got {'; '.join(map(str, faults[:6]))}{more}"
        )


def _different(what: str, then: Sequence[Any], now: Sequence[Any], fields: Sequence[str]) -> Iterator[Disagreement]:
    if len(then) != len(now):
        names = [", ".join(part.name for part in parts) for parts in (then, now)]
        yield Disagreement((what,), f"{len(then)} ({names[0]})", f"{len(now)} ({names[1]})")
        return
    for number, (one, other) in enumerate(zip(then, now, strict=True)):
        for field in fields:
            ours, theirs = _value(one, field), _value(other, field)
            if ours != theirs:
                yield Disagreement((what, number, field), str(ours), str(theirs))


def _value(part: Any, field: str) -> Any:
    return part.own_unit() if field == "unit" else getattr(part, field)


def _wider(number: int, then: ActionDimension, now: ActionDimension) -> Iterator[Disagreement]:
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
            yield Disagreement(("actions", number, field), f"{trained:g}", f"{here:g}", ", which is wider")


def _output_of(robot: Robot, action: ActionDimension) -> Output:
    return next(output for output in robot.outputs if output.name == action.output)
