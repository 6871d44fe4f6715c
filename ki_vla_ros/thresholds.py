"""Conditions on figures, as CI wants them: "error.rms>0.1" fails a replay."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ki_vla_ros.errors import ConfigurationError

_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_CONDITION = re.compile(r"^\s*(?P<name>[^<>=]+?)\s*(?P<operator>>=|<=|>|<)\s*(?P<limit>[^<>=\s]+)\s*$")


@dataclass(frozen=True)
class Threshold:
    """`name`: where the figure stands in metrics.json, with dots; in lists a number, from 0."""

    text: str
    name: str
    operator: str
    limit: float

    def verdict(self, metrics: Mapping[str, Any]) -> str | None:
        """Why the replay fails (None: it does not). A figure that is not known fails: nothing was checked.

        ConfigurationError if there is no figure of that name.
        """
        found = list(_find(metrics, self.name))
        if not found:
            known = ", ".join(sorted(_figures(metrics, "")))
            raise ConfigurationError(f"--fail-if {self.text!r}: no figure {self.name!r}; there are {known}")
        value = found[0]
        if value is None:
            return f"{self.name} is not known, so {self.text!r} cannot be checked"
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigurationError(f"--fail-if {self.text!r}: {self.name} is no number but {type(value).__name__}")
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
        raise ConfigurationError(f"--fail-if {text!r}: expected NAME>NUMBER (or >=, <, <=), as error.rms>0.1") from None
    assert match is not None
    return Threshold(text, match["name"], match["operator"], limit)


def _find(tree: Any, name: str) -> Iterator[Any]:
    """Names in metrics.json may have dots themselves (camera.wrist)."""
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


def _figures(tree: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """The names of the numbers near the top."""
    for key, value in tree.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield prefix + key
        elif isinstance(value, Mapping) and prefix.count(".") < 1 and key not in ("settings", "bag", "timing"):
            yield from _figures(value, f"{prefix}{key}.")
