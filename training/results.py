"""What came out of a run: a small JSON file, which is there as a whole or not at all, and says what it is of."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.files import read_json
from training.storage import write_whole, writing

FORMAT = 1
MADE_OF = "made_of"


def result_path(results: Path, name: str) -> Path:
    return results / f"{name}.json"


def read_result(path: Path) -> dict[str, Any] | None:
    """A run's figures; None if it has not been run. ConfigurationError for a file that is none of ours."""
    if not path.exists():
        return None
    try:
        found = read_json(path)
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']}")
        found[MADE_OF].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(
            f"{path}: expected the result of a run in format {FORMAT}, got something else ({error!r}); move it away, "
            "and the run is made again"
        ) from error
    result: dict[str, Any] = found
    return result


def write_result(path: Path, made_of: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {"format": FORMAT} | dict(figures) | {MADE_OF: dict(made_of)}
    with writing(path):
        write_whole(path, json.dumps(plain(whole), indent=1, sort_keys=False) + "\n")


def check_result(path: Path, made_of: Mapping[str, Any]) -> dict[str, Any] | None:
    """A run's figures, None if it has not been run; ConfigurationError if they are of another configuration."""
    found = read_result(path)
    if found is None:
        return None
    theirs, ours = found[MADE_OF], plain(dict(made_of))
    if different := [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]:
        told = "; ".join(
            f"{name}: expected {ours.get(name)!r}, got {theirs.get(name)!r}" for name in sorted(different)[:3]
        )
        more = f"; and {len(different) - 3} more" if len(different) > 3 else ""
        raise ConfigurationError(
            f"{path}: expected a run of this configuration, got one of another ({told}{more}); give that back, or move "
            "what came of it away: runs of two configurations are no comparison"
        )
    return found


def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of Markdown."""
    for row in (names, ["---"] * len(names), *rows):
        yield f"| {' | '.join(cell.replace('|', '/').replace(chr(10), ' ') for cell in row)} |"


def plain(value: Any) -> Any:
    """As JSON gives it back; numbers that are none as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value
