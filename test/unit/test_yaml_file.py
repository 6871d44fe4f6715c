"""YAML files: what is read, and faults named with file and line."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict

from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.yaml_file import line_of, read_yaml, yaml_lines


class Meal(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    parts: list[dict[str, float]] = []


def read(path: Path) -> Meal:
    return read_yaml(path, Meal, "meal", "config/meals/")


def test_a_file_is_read_with_anchors_and_merged_keys(tmp_path: Path) -> None:
    path = tmp_path / "meal.yaml"
    path.write_text("name: crêpes\nparts: [&first {flour: 1, milk: 2.5}, {<<: *first, milk: 3}, *first]\n", "utf-8")
    flour = {"flour": 1.0, "milk": 2.5}
    assert read(path) == Meal(name="crêpes", parts=[flour, {**flour, "milk": 3.0}, flour])


@pytest.mark.parametrize(
    "content, fault",
    [
        ("name: a\nparts: []\nname: b\n", "line 3: expected each key once, got 'name' again"),
        ('name: a\n"name": a\n', "line 2: expected each key once, got 'name' again"),
        ("name: a\nparts:\n- {salt: 1}\n- {oil: 1,\n   oil: 1}\n", "line 5: expected each key once, got 'oil' again"),
        ("name: a\nparts:\n- salt:1\n  oil: 2\n", "with a space after the colon"),
        ("name: [", "expected YAML, got something else (line 1: "),
        ("name: 2026-13-45", "expected YAML, got something else (month must be in 1..12"),
        ("[" * 5000, "expected YAML, got something else ("),
        ("name: !!python/object:os.system {}", "could not determine a constructor"),
        ("name: \x07", "expected YAML, got something else ("),
        (
            "nam: a",
            "line 1: name: expected name, got none; nam: expected one of name, parts, got 'a' for nam: no such key",
        ),
        ("", "as a whole: expected keys with values, got None"),
    ],
)
def test_a_fault_is_named_with_its_file_and_place(tmp_path: Path, content: str, fault: str) -> None:
    path = tmp_path / "meal.yaml"
    path.write_text(content)
    with pytest.raises(ConfigurationError) as refused:
        read(path)
    said = str(refused.value)
    assert said.startswith(f"meal {path}: ") and fault in said and said.endswith("; config/meals/ has examples")
    assert "\n" not in said


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "meal.yaml"
    with pytest.raises(ConfigurationError, match=r"expected a YAML file, got one that cannot be read .No such file"):
        read(path)
    path.write_bytes(b"name: \xff")
    with pytest.raises(ConfigurationError, match=r"expected YAML, got something else .'utf-8' codec"):
        read(path)


def test_every_value_has_its_line() -> None:
    lines = yaml_lines("a: 1\nb:\n  - {c: 2}\n  - c:\n      3\n")
    assert [lines[place] for place in [("a",), ("b",), ("b", 0, "c"), ("b", 1), ("b", 1, "c")]] == [1, 2, 3, 4, 4]
    assert line_of(("b", 1, "nothing", 5), lines) == 4 and line_of(("z",), lines) == 1
    assert yaml_lines("a: [") == {}
