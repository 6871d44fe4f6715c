"""The front door: the lines of docs/library.md do what they say, and the package costs nothing until it is used."""

import re

import pytest
from support import ROOT

import ki_vla_ros


def test_the_documented_lines_run(capsys: pytest.CaptureFixture[str]) -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "library.md").read_text(), re.DOTALL)
    assert code is not None
    statements = [line for line in code[1].splitlines() if line and not line.startswith(("import", "from"))]
    assert len(statements) <= 10
    names: dict[str, object] = {}
    exec(compile(code[1], "docs/library.md", "exec"), names)
    bundle = ki_vla_ros.load_bundle(ki_vla_ros.find_bundle("demo"))
    horizon, joints = bundle.manifest.horizon, bundle.manifest.axis_names
    assert capsys.readouterr().out.strip() == f"{joints} ({horizon}, {len(joints)})"


def test_every_name_of_the_front_door_can_be_loaded() -> None:
    for name in ki_vla_ros.__all__:
        assert getattr(ki_vla_ros, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ki_vla_ros.nothing
