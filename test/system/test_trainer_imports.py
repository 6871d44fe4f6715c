"""What the trainer loads: no simulator unless data are simulated or a policy is run in one, and no circle of files."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from support import ROOT

SIMULATING = ("training.data.simulated", "training.evaluate.closed_loop", "training.evaluate.executors")


def modules() -> dict[str, Path]:
    files = sorted((ROOT / "training").rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def test_no_module_outside_the_simulators_loads_mujoco() -> None:
    """It would choose how MuJoCo renders, for every program that trains on recordings alone."""
    names = [n for n in modules() if not n.startswith(SIMULATING) and not n.endswith("__main__")]
    assert {"training.train", "training.run", "training.losses.hints", "training.evaluate.offline"} <= set(names)
    code = (
        "import importlib, os, sys; os.environ.pop('MUJOCO_GL', None);"
        f"[importlib.import_module(name) for name in {names}];"
        "print([n for n in sys.modules if n.split('.')[0] == 'mujoco' or n.startswith('ki_vla_ros.sim')],"
        " os.environ.get('MUJOCO_GL'))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[] None"), done.stdout + done.stderr


def imported(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of the trainer that a file imports, also inside of functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            for name in (f"{node.module}.{alias.name}" for alias in node.names):
                yield name if name in known else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def circles(edges: dict[str, set[str]]) -> set[str]:
    """Those from which a way leads back to themselves."""
    reached = {start: set(ends) for start, ends in edges.items()}
    for _ in edges:
        for ends in reached.values():
            ends |= set().union(*(edges.get(end, set()) for end in ends))
    return {start for start, ends in reached.items() if start in ends}


def folder(module: str) -> str:
    """`training.data.batch` -> `training.data`; files directly in training/ stand for themselves."""
    return ".".join(module.split(".")[:2])


def test_neither_files_nor_folders_import_in_circles() -> None:
    known = modules()
    files = {name: {other for other in imported(path, known) if other in known} for name, path in known.items()}
    assert circles(files) == set()
    folders: dict[str, set[str]] = {}
    for name, others in files.items():
        ends = folders.setdefault(folder(name), set())
        ends |= {folder(other) for other in others} - {folder(name), "training"}
    assert circles(folders) == set()


def test_no_module_imports_a_command() -> None:
    known = modules()
    found = {name: {o for o in imported(path, known) if o.endswith("__main__")} for name, path in known.items()}
    assert {name: others for name, others in found.items() if others} == {}


def test_a_circle_would_be_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == {"b", "c"}
