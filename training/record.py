"""What a run has measured so far, as lines of JSON: stage, step, name and value. A resumed run goes on in it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ki_vla_ros.errors import ConfigurationError
from training.storage import write_whole, writing


class Record:
    """One file; `stages` are the run's, in their order. A step counts from 1: how many the stage has taken."""

    def __init__(self, path: Path, stages: Sequence[str]) -> None:
        self.path, self.stages = path, tuple(stages)

    def add(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        lines = [{"stage": stage, "step": step, "name": name, "value": value} for name, value in values.items()]
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())  # a checkpoint that is on the disk has all lines before it

    def rewind(self, stage: int, step: int) -> None:
        """Drop what was measured after so many steps of a stage: it is measured again."""
        if self.path.exists():
            kept = [line for line in self.lines() if self._place(line) <= (stage, step)]
            with writing(self.path):
                write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def lines(self) -> list[dict[str, Any]]:
        """All lines but one at the end that a killed process did not finish; ConfigurationError if another is none."""
        if not self.path.exists():
            return []
        found = []
        for number, text in enumerate(self.path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1], 1):
            try:
                line = json.loads(text)
                self._place(line)
                float(line["value"]), str(line["name"])
            except (KeyError, TypeError, ValueError) as error:
                raise ConfigurationError(
                    f"{self.path}, line {number}: expected stage, step, name and value as JSON, got {text[:80]!r}; "
                    "remove the line, or move the file away"
                ) from error
            found.append(line)
        return found

    def values(self, stage: str, step: int) -> dict[str, float]:
        """What was measured after so many steps of a stage."""
        return {line["name"]: line["value"] for line in self.lines() if (line["stage"], line["step"]) == (stage, step)}

    def _place(self, line: Mapping[str, Any]) -> tuple[int, int]:
        """Stage and step as numbers; stages that the run does not have are before all others."""
        stage = line["stage"]
        return self.stages.index(stage) if stage in self.stages else -1, int(line["step"])
