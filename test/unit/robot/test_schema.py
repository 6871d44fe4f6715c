"""The schema for editors is the present one, and says of each field what it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from support import ROOT

from ki_vla_ros.robot.__main__ import main

SCHEMA = ROOT / "config/robots/robot.schema.json"


def test_the_shipped_schema_is_the_present_one(capsys: Any) -> None:
    assert main(["schema"]) == 0
    assert SCHEMA.read_text() == capsys.readouterr().out, (
        "python -m ki_vla_ros.robot schema > config/robots/robot.schema.json"
    )


def fields(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for model, definition in {"Robot": schema, **schema["$defs"]}.items():
        for name, field in definition.get("properties", {}).items():
            yield f"{model}.{name}", field


def test_every_field_is_described() -> None:
    described = {name: field.get("description", "") for name, field in fields(json.loads(SCHEMA.read_text()))}
    assert len(described) > 60
    assert [name for name, text in described.items() if len(text) < 8] == []


def test_every_example_names_the_schema() -> None:
    for path in sorted((ROOT / "config/robots").glob("*.yaml")):
        assert path.read_text().startswith("# yaml-language-server: $schema=robot.schema.json\n"), path
