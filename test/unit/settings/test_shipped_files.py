"""The parameter files in config/: every parameter named and explained once, and every file one that a node takes."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from support import ROOT

from ki_vla_ros.settings import check_names, parameter_specs, settings_from_parameters


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat.update(flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return flat


def test_the_demo_file_names_and_explains_every_parameter() -> None:
    text = (ROOT / "config" / "demo.yaml").read_text()
    values = flatten(yaml.safe_load(text)["/**/policy"]["ros__parameters"])
    specs = {spec.name: spec for spec in parameter_specs(*check_names(values))}
    assert set(values) == set(specs)
    for name, value in values.items():
        assert type(value) is type(specs[name].default), name  # ROS takes no 10 for 10.0
    settings_from_parameters(values)
    lines = text.splitlines()
    for number, line in enumerate(lines):
        key = line.strip().split(":")[0]
        if key in {name.split(".")[-1] for name in specs} - {"topic", "transport"}:
            before = lines[number - 1].strip()
            assert before.startswith("#") or before.split(":")[0] in specs, f"line {number + 1} is not explained"


@pytest.mark.parametrize("name, cameras, joints", [("seven_joint_arm", 2, 1), ("bimanual_arm", 3, 0)])
def test_example_files_are_valid(name: str, cameras: int, joints: int) -> None:
    values = flatten(yaml.safe_load((ROOT / "config" / f"{name}.yaml").read_text())["/**/policy"]["ros__parameters"])
    found = check_names(values)
    assert (len(found[0]), len(found[1])) == (cameras, joints)
    specs = {spec.name: spec for spec in parameter_specs(*found)}
    for key, value in values.items():
        assert type(value) is type(specs[key].default), key
    settings_from_parameters(values)
