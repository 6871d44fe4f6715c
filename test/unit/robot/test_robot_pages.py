"""docs/robot.md explains every field and names every file; docs/your_robot.md shows what `robot new` writes."""

from __future__ import annotations

import json
import re
from pathlib import Path

from support import ROOT
from support.sample_bags import write_mcap
from support.unknown_arm import recording

from ki_vla_ros.robot.__main__ import main

PAGE = (ROOT / "docs/robot.md").read_text()


def test_every_field_kind_and_type_is_explained() -> None:
    schema = json.loads((ROOT / "config/robots/robot.schema.json").read_text())
    explained = {word for text in re.findall(r"`([^`\n]+)`", PAGE) for word in re.split(r"[^\w./]+", text)}
    models = {"Robot": schema, **schema["$defs"]}
    fields = {name for definition in models.values() for name in definition.get("properties", {})} - {"x", "y", "z"}
    values = {
        value
        for model, name in (("ActionDimension", "kind"), ("StateDimension", "kind"), ("Output", "type"))
        for option in [models[model]["properties"][name], *models[model]["properties"][name].get("anyOf", [])]
        for value in option.get("enum", [])
    }
    assert len(fields) > 40 and len(values) > 10
    assert sorted((fields | values) - explained) == []


def test_every_robot_file_is_named() -> None:
    named = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE))
    assert {path.stem for path in (ROOT / "config/robots").glob("*.yaml")} <= named


def test_the_example_is_what_the_command_writes(tmp_path: Path) -> None:
    out = tmp_path / "my_arm.yaml"
    assert main(["new", "--from", str(write_mcap(tmp_path / "bag.mcap", recording(20.0))), "--out", str(out)]) == 0
    text = (ROOT / "docs/your_robot.md").read_text()
    shown = text.split("```yaml\n")[1].split("```")[0].splitlines()
    assert len(shown) > 8
    assert [line for line in shown if line not in out.read_text().splitlines()] == []
