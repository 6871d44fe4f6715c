"""What the test folders promise, checked by imports and names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ROOT

TEST = ROOT / "test"
FOLDERS = {"support", "unit", "contracts", "bad", "ros", "engines", "gpu", "system"}
FILES = sorted(TEST.rglob("*.py"))
PROCESSES = {"subprocess", "multiprocessing"}


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all modules that a file imports, names taken from packages included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def breaks(path: Path) -> list[str]:
    """The rules that a file breaks."""
    found, place = [], path.relative_to(TEST)
    for name in imports(path):
        parts = name.split(".")
        if any(part.startswith("test_") or part == "conftest" for part in parts) or parts[0] in FOLDERS - {"support"}:
            found.append(f"{place} imports {name}: what tests share belongs in support/")
        is_ros = parts[0] in ("rclpy", "launch", "launch_ros") or parts[0].endswith(("_msgs", "_srvs"))
        if place.parts[0] == "unit" and (is_ros or parts[0] in PROCESSES or name.startswith("support.robots")):
            found.append(f"{place} imports {name}: what needs ROS or processes belongs in ros/ or system/")
    return found


def test_tests_are_independent_and_units_need_neither_ros_nor_processes() -> None:
    assert len(FILES) > 100
    assert [fault for path in FILES for fault in breaks(path)] == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("unit/policy/test_x.py", "from test_policy import bundle"),
        ("contracts/test_x.py", "import contracts.test_model"),
        ("ros/test_x.py", "from conftest import robot"),
        ("unit/policy/test_x.py", "from unit import policy"),
        ("unit/policy/test_x.py", "def f():\n    import rclpy"),
        ("unit/policy/test_x.py", "from sensor_msgs.msg import Image"),
        ("unit/policy/test_x.py", "import subprocess"),
        ("unit/policy/test_x.py", "from support.robots import Robot"),
    ],
)
def test_a_broken_rule_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, line: str) -> None:
    monkeypatch.setitem(globals(), "TEST", tmp_path)
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text("from support.bundles import demo_policy\nfrom ki_vla_ros.policy import policy\n")
    assert breaks(path) == []
    path.write_text(line)
    assert len(breaks(path)) == 1


def test_unit_mirrors_the_packages() -> None:
    folders = {path.name for path in TEST.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == FOLDERS
    for path in (TEST / "unit").rglob("test_*.py"):
        package = path.relative_to(TEST / "unit").parent
        assert any((ROOT / top / package / "__init__.py").is_file() for top in ("", "ki_vla_ros")) or package == Path()
