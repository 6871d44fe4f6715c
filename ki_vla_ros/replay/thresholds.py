"""Conditions on figures for CI: with `--fail-if "error.rms>0.1"` a replay ends with exit code 1."""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ki_vla_ros.bundle import PolicySpec
from ki_vla_ros.errors import ConfigurationError

_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_CONDITION = re.compile(r"^\s*(?P<name>[^<>=]+?)\s*(?P<operator>>=|<=|>|<)\s*(?P<limit>[^<>=\s]+)\s*$")

_SPREAD = ("p50", "p90", "p99", "max")
_RMS = ("rms", "rms_ci.BOUND")
# The numbers in metrics.json (docs/replay.md) by their place. In capitals: names that come from the bundle or the bag.
_FIGURES: Mapping[str, Sequence[str]] = {
    "": ("schema", "realtime_factor"),
    "bag": ("start_ns", "end_ns", "duration_s", "silences.count", "silences.seconds", "messages.TOPIC"),
    "settings": ("PARAMETER",),
    "replay": ("seed", "segment_s"),
    "ticks": ("count", "chunks", "sent", "refused", "held", "idle"),
    "error": (
        *("chunks", "segments", "max", *_RMS, "rms_m", "rms_m_ci.BOUND", "rms_rad", "rms_rad_ci.BOUND"),
        *("rms_normalized", "rms_normalized_ci.BOUND"),
        "by_joint_step.JOINT.STEP",
    ),
    "error.by_joint.JOINT": (*_RMS, "bias", "max"),
    "error.by_step.STEP": ("step", "time_s", *_RMS, "rms_normalized"),
    "seam": (
        *("count", "restarts", "jump_rms", "jump_rms_ci.BOUND", "jump_max", "position_step_max", "speed_step_max"),
        *("jerk_rms", "jerk_max"),
    ),
    "safety": ("holds.CAUSE", "refusals.CAUSE", "corrections.CAUSE", "messages_refused.CAUSE"),
    "inputs.age_ms.INPUT": _SPREAD,
    "inputs.skew_ms": _SPREAD,
    "inputs.observation_to_command_ms": _SPREAD,
    "deadlines": ("period_ms", "missed", "share"),
    "deadlines.latency_ms": _SPREAD,
    "sensitivity": ("every_s", "chunks"),
    "sensitivity.probes.PROBE": (*_RMS, "ratio", "ratio_ci.BOUND", "by_joint.JOINT"),
    "parity": ("chunks", "max_difference", "unmatched", "not_reproduced.CAUSE"),
    "timing": ("wall_s", "latency_s.NUMBER"),
    "timing.stage_ms.STAGE": _SPREAD,
}
_PLACEHOLDER = re.compile(r"[A-Z]+")


# The keys in these are causes; one that never occurred is missing and counts as 0.
_COUNTERS = (
    "safety.holds.",
    "safety.refusals.",
    "safety.corrections.",
    "safety.messages_refused.",
    "parity.not_reproduced.",
)


@dataclass(frozen=True)
class Threshold:
    """A condition on one figure; `name`: its place in metrics.json, with dots, and an index from 0 in lists."""

    text: str
    name: str
    operator: str
    limit: float

    def verdict(self, metrics: Mapping[str, Any]) -> str | None:
        """Why the replay fails (None: it does not); an unknown figure fails too, because nothing was checked.

        `check_figure` must have accepted the name. A cause that never occurred has the count 0.
        """
        found = list(_find(metrics, self.name))
        value = found[0] if found else 0 if self.name.startswith(_COUNTERS) else None
        if value is None:
            return f"{self.name} is not known, so {self.text!r} cannot be checked"
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigurationError(
                f"--fail-if {self.text!r}: expected {self.name} to be a number, got {type(value).__name__}"
            )
        return f"{self.name} is {value:g}: {self.text}" if _OPERATORS[self.operator](value, self.limit) else None


def parse_threshold(text: str) -> Threshold:
    match = _CONDITION.match(text)
    try:
        if match is None:
            raise ValueError
        limit = float(match["limit"])
        if math.isnan(limit):
            raise ValueError
    except ValueError:
        raise ConfigurationError(
            f"--fail-if {text!r}: expected NAME>NUMBER (or >=, <, <=), for example error.rms>0.1"
        ) from None
    assert match is not None
    return Threshold(text, match["name"], match["operator"], limit)


def check_figure(threshold: Threshold, spec: PolicySpec, recorded_ticks: bool) -> None:
    """ConfigurationError, listing all names, if this policy's metrics.json can have no such figure."""
    cameras = [camera.name for camera in spec.cameras]
    named: Mapping[str, Sequence[str]] = {
        "JOINT": spec.axis_names,
        "STEP": [str(step) for step in range(spec.horizon)],
        "BOUND": ("0", "1"),
        "INPUT": (*cameras, "joint state"),
        "PROBE": ("noise", "instruction", *(f"camera.{name}" for name in cameras)),
    }

    def names(found: re.Match[str]) -> str:
        return f"({'|'.join(map(re.escape, named[found[0]]))})" if found[0] in named else ".+"

    known = [name for name in figure_names() if recorded_ticks or not name.startswith("parity.")]
    for name in known:
        if re.fullmatch(_PLACEHOLDER.sub(names, name.replace(".", r"\.")), threshold.name):
            return
    close = difflib.get_close_matches(threshold.name, known, n=1)
    told = "".join(
        f"; {placeholder}: {', '.join(values) if placeholder != 'STEP' else f'0 to {spec.horizon - 1}'}"
        for placeholder, values in named.items()
    )
    raise ConfigurationError(
        f"--fail-if {threshold.text!r}: no figure {threshold.name!r}"
        f"{f', did you mean {close[0]}?' if close else ''}; there are {', '.join(known)}{told}"
    )


def figure_names() -> Iterator[str]:
    """All names that a threshold may have, with placeholders in capitals."""
    for place, leaves in _FIGURES.items():
        for leaf in leaves:
            yield f"{place}.{leaf}" if place else leaf


def _find(tree: Any, name: str) -> Iterator[Any]:
    """The values at a dotted name; keys in metrics.json may contain dots themselves (camera.wrist)."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            if name == key:
                yield value
            elif name.startswith(f"{key}."):
                yield from _find(value, name[len(key) + 1 :])
    elif isinstance(tree, list):
        number, _, rest = name.partition(".")
        if number.isdecimal() and int(number) < len(tree):
            yield from _find(tree[int(number)], rest) if rest else [tree[int(number)]]
