"""Which settings a sweep tries: turns ranges from the command line into settings, each behaviour once.

    execution_horizon=1..H inference_delay=0..4 executor=asynchronous,rtc

A range is inclusive and may have a step (2..14/2); H is the bundle's horizon. `execution_horizon` counts actions and
stands for `execution_horizon_s`; every other name is that of a parameter.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from ki_vla_ros.bundle import PolicySpec
from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.settings import (
    ParameterSpec,
    Settings,
    check_names,
    parameter_specs,
    parameter_values,
    settings_from_parameters,
)

Value = bool | int | float | str
Changes = Mapping[str, Value]
MOST_POINTS = 100_000  # checking them takes seconds; trying that many would take days
HORIZON, HORIZON_S = "execution_horizon", "execution_horizon_s"
_RANGE = re.compile(r"^(-?[0-9.]+)\.\.(-?[0-9.]+|H)(?:/([0-9.]+))?$")
# Parameters that only some executors use. With other executors a sweep leaves them unchanged.
_ONLY_FOR = {
    "execution_horizon_s": ("synchronous", "asynchronous", "rtc", "rtc_trained"),
    "inference_delay": ("rtc", "rtc_trained"),
    "guidance_horizon_s": ("rtc",),
    "guidance_weight": ("rtc",),
    "ensemble_decay": ("temporal_ensemble",),
}
# Parameters that belong to the machine or to the bag; another bundle or engine needs another replay.
_FIXED = re.compile(
    r"^(bundle|engine|provider|torch_mode|engine_cache|policy_server.*|threads|autostart|instruction|dry_run|robot_description|.*_?topic|"
    r"publish_mode|use_receive_time|cameras\..*)$"
)


@dataclass(frozen=True)
class Candidate:
    """Settings to try; `changes`: the parameters that differ from the given settings, by name."""

    changes: Changes
    settings: Settings


@dataclass(frozen=True)
class Grid:
    """The settings to try, and what became of the other points.

    `asked`: points of the grid. `refused`: reasons why points are not possible, with counts. `same`: points left out
    because another one behaves the same.
    """

    names: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    asked: int
    refused: Mapping[str, int]
    same: int


def make_grid(texts: Sequence[str], base: Settings, manifest: PolicySpec) -> Grid:
    """The settings to try, the given ones first.

    ConfigurationError for a text that is no range, or if only the given settings are possible.
    """
    axes = dict(_axis(text, manifest) for text in texts)
    if len(axes) != len(texts):
        raise ConfigurationError(f"--sweep: expected each parameter once, got {' '.join(texts)}")
    if (points := math.prod(map(len, axes.values()))) > MOST_POINTS:
        raise ConfigurationError(
            f"--sweep {' '.join(texts)}: expected at most {MOST_POINTS} settings, got {points}; sweep fewer values"
        )
    given = parameters_of(base)
    first = Candidate({}, base)
    found, refused, asked = {_behaviour(base, manifest): first}, dict[str, int](), 0
    for values in itertools.product(*axes.values()):
        asked += 1
        changes = dict(zip(axes, values, strict=True))
        executor = changes.get("executor", base.executor)
        changes = {
            name: value for name, value in changes.items() if value != given[name] and is_used(name, str(executor))
        }
        try:
            settings = settings_from_parameters(given | changes)
            settings.validate_against(manifest)
        except ConfigurationError as error:
            why = re.sub(r"[0-9.]+", "N", str(error).partition(":")[0] + ":" + str(error).partition(":")[2])
            refused[why] = refused.get(why, 0) + 1
            continue
        found.setdefault(_behaviour(settings, manifest), Candidate(changes, settings))
    if len(found) == 1:
        raise ConfigurationError(
            f"--sweep {' '.join(texts)}: expected at least one setting besides the given ones; "
            + (f"all were refused, as: {next(iter(refused))}" if refused else "all do the same")
        )
    return Grid(tuple(axes), tuple(found.values()), asked, refused, asked - sum(refused.values()) - len(found) + 1)


def _axis(text: str, manifest: PolicySpec) -> tuple[str, tuple[Value, ...]]:
    name, equals, listed = text.partition("=")
    if not equals or not listed:
        raise ConfigurationError(
            f"--sweep {text}: expected NAME=VALUES, for example execution_horizon=1..H or executor=rtc"
        )
    parts = [value for part in listed.split(",") for value in _values(part, manifest.horizon, text)]
    if name == HORIZON:
        numbers = [_typed(part, 1, text) for part in parts]
        return HORIZON_S, tuple(round(int(n) * manifest.action_period_s, 9) for n in numbers)
    check_names([name])
    if _FIXED.match(name):
        raise ConfigurationError(
            f"--sweep {text}: {name} cannot be swept: it does not change how chunks are made or executed"
        )
    specs = parameter_specs([camera.name for camera in manifest.cameras], manifest.axis_names)
    spec = next(spec for spec in specs if spec.name == name)
    return name, tuple(_checked(_typed(part, spec.default, text), spec) for part in parts)


def _values(part: str, horizon: int, text: str) -> Iterator[str]:
    match = _RANGE.match(part)
    if match is None:
        yield str(horizon) if part == "H" else part
        return
    expected = f"--sweep {text}: expected LOW..HIGH or LOW..HIGH/STEP, rising, of at most 1000 steps, got {part}"
    try:
        low, high = float(match[1]), float(horizon if match[2] == "H" else match[2])
        step = float(match[3] or 1.0)
    except ValueError:  # 1.2.3
        raise ConfigurationError(expected) from None
    if not (step > 0.0 and 0.0 <= (high - low) / step <= 1000.0):
        raise ConfigurationError(expected)
    for k in range(int((high - low) / step + 1e-9) + 1):
        yield f"{round(low + k * step, 9):g}"


def _typed(part: str, like: Value, text: str) -> Value:
    try:
        if isinstance(like, bool):
            return {"true": True, "false": False}[part]
        return type(like)(part)
    except (ValueError, KeyError):
        raise ConfigurationError(f"--sweep {text}: expected {type(like).__name__}s, got {part!r}") from None


def _checked(value: Value, spec: ParameterSpec) -> Value:
    settings_from_parameters({spec.name: value})  # names the bounds
    return value


def _behaviour(settings: Settings, manifest: PolicySpec) -> tuple[object, ...]:
    """A key that is equal for settings that no replay could tell apart."""
    values = dict(parameters_of(settings))
    values |= {name: 0 for name in _ONLY_FOR if not is_used(name, settings.executor)}
    if settings.executor == "synchronous":
        executed = round(settings.execution_horizon_s / manifest.action_period_s)
        values["execution_horizon_s"] = max(1, min(manifest.horizon, executed))
    elif values["execution_horizon_s"]:
        ticks = settings.execution_horizon_s * settings.rate_hz
        # Halfway between two ticks, a millisecond more or less decides, so such horizons are kept apart.
        halfway = ticks > 1.0 and abs(ticks % 1.0 - 0.5) < 0.1
        values["execution_horizon_s"] = round(ticks, 3) if halfway else float(max(1, round(ticks)))
    return tuple(sorted(values.items()))


def is_used(name: str, executor: str) -> bool:
    """Whether an executor uses this parameter."""
    return executor in _ONLY_FOR.get(name, (executor,))


def parameters_of(settings: Settings) -> dict[str, Value]:
    """Values by dotted name, as in a parameter file."""
    values = parameter_values(settings, list(settings.cameras), list(settings.limits.joints))
    return cast("dict[str, Value]", values)
