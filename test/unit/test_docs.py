"""What README, CONTRIBUTING and docs/ name is there; figures with dates are in docs/results/ only."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from support import ROOT

from ki_vla_ros.__main__ import COMMANDS

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
# Folders in which a path in a text may begin.
FROM = [ROOT / place for place in ("", "ki_vla_ros", "training", "test", "launch")]
OF_OTHERS = {"examples/convert_jax_model_to_pytorch.py", "docs/source/lerobot-dataset-v3.mdx"}  # openpi's, LeRobot's
MADE = {"out", "build"}  # folders that commands write
README_WORDS = 900


@cache
def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ +(.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(page: Path, text: str) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        if not linked.exists():
            yield f"link to {target}: no such file"
        elif anchor and anchor not in anchors(linked):
            yield f"link to {target}: no such heading"


def missing_files(page: Path, text: str) -> Iterator[str]:
    """Python files by their path or name, and what lies in a folder of this repository."""
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()} - MADE
    for name in re.findall(r"(?<![\w./*~<-])[\w.-]+(?:/[\w.-]+)*/?(?![\w*])", text):
        if name in OF_OTHERS or re.search(r"[A-Z]{4}|\.\.\.", name):  # placeholders
            continue
        is_python = name.endswith(".py")
        if "/" in name and (is_python or name.split("/")[0] in folders):
            if not any((place / name.rstrip(".")).exists() for place in FROM):
                yield f"{name}: no such file"
        elif is_python and not any(any(place.rglob(name)) for place in FROM[1:]) and not (ROOT / name).exists():
            yield f"{name}: no such file"


def source(module: str) -> Path | None:
    """The file of one of our modules; of a package its `__init__`, without importing either."""
    for place in (ROOT, ROOT / "test"):
        path = place / module.replace(".", "/")
        for file in (path.with_name(f"{path.name}.py"), path / "__init__.py"):
            if file.is_file():
                return file
    return None


def missing_modules(page: Path, text: str) -> Iterator[str]:
    """`python -m NAME` that cannot be run, and dotted names that lead nowhere."""
    for name in re.findall(r"python3? -m ([\w.]*\w)", text):
        file = source(name)
        if file is None:
            # Not find_spec: for pip, setuptools answers, and takes distutils away from torch.
            top = name.split(".")[0]
            ours = top in ("ki_vla_ros", "training", "system", "support")
            if ours or not any(entry and (Path(entry) / top).is_dir() for entry in sys.path):
                yield f"python -m {name}: no such module"
        elif file.name == "__init__.py":
            if not (file.parent / "__main__.py").is_file():
                yield f"python -m {name}: a package without __main__"
        elif 'if __name__ == "__main__":' not in file.read_text():
            yield f"python -m {name}: does nothing when run"
    for name in re.findall(r"(?<!-m )(?<![\w./-])((?:ki_vla_ros|training|support)(?:\.\w+)+)(?!\.\w)", text):
        if source(name) is None and not name.endswith((".py", ".md")):
            module, _, attribute = name.rpartition(".")
            file = source(module)
            if file is None or not re.search(rf"\b{attribute}\b", file.read_text()):
                yield f"{name}: no such name"


def missing_commands(page: Path, text: str) -> Iterator[str]:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"(?:`|^    |^)make ([a-z-]+)", text, re.MULTILINE):
        if target not in targets:
            yield f"make {target}: no such target"
    for name in re.findall(r"ros2 run ki_vla_ros (\w+)", text):
        if name != "NAME" and not (ROOT / "scripts" / "ros" / name).is_file():
            yield f"ros2 run ki_vla_ros {name}: no such executable"


def missing_tests(page: Path, text: str) -> Iterator[str]:
    """Tests, as `folder/test_x.py::test_y`, that are not there."""
    for file, test in re.findall(r"([\w/]+\.py)::(\w+)", text):
        path = ROOT / "test" / file
        if not path.is_file() or not re.search(rf"^ *def {test}\(", path.read_text(), re.MULTILINE):
            yield f"{file}::{test}: no such test"


def dates(page: Path, text: str) -> Iterator[str]:
    if page.parent != DOCS / "results":
        yield from (f"{date}: dated figures are in docs/results" for date in re.findall(r"\b20\d\d-\d\d-\d\d\b", text))


def merges(page: Path, text: str) -> Iterator[str]:
    """Marks of a merge that nobody finished; in code they do not parse."""
    yield from (f"{mark}: half a merge" for mark in re.findall(r"^(?:<{7}|>{7})(?= )", text, re.MULTILINE))


def faults(page: Path, text: str) -> list[str]:
    checks = (dead_links, missing_files, missing_modules, missing_commands, missing_tests, dates, merges)
    return [f"{page.relative_to(ROOT)}: {fault}" for check in checks for fault in check(page, text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page: Path) -> None:
    assert faults(page, page.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "[gone](gone.md)",
        "[gone](runtime.md#gone)",
        "[gone](#gone)",
        "![gone](images/gone.png)",
        "`runtime/gone.py` does it",
        "see ki_vla_ros/runtime/gone.py.",
        "`gone.py` does it",
        "`config/gone.yaml`",
        "`ki_vla_ros/gone/`",
        "python -m ki_vla_ros.gone --help",
        "python -m ki_vla_ros.runtime",
        "python -m ki_vla_ros.errors",
        "python -m gone",
        "`training.weights.checkpoints.gone`",
        "`make gone`",
        "    make gone ARGS=x",
        "ros2 run ki_vla_ros gone",
        "`unit/test_docs.py::test_gone`",
        "measured on 2026-11-21",
        "<<<<<<< HEAD",
    ],
)
def test_a_broken_page_is_seen(line: str) -> None:
    good = "[runtime](runtime.md#time), `runtime/loop.py`, `loop.py`, ki_vla_ros/bags/, config/demo.yaml, `a.yaml`\n"
    good += (
        "`make demo`, `training.weights.checkpoints.load_checkpoint`, python -m ki_vla_ros.replay, python -m pytest\n"
    )
    page = DOCS / "replay.md"
    assert faults(page, good) == []
    assert len(faults(page, f"{good}\n{line}\n")) == 1


def test_every_page_and_picture_is_linked() -> None:
    for index in (DOCS / "README.md", DOCS / "results" / "README.md"):
        listed = set(re.findall(r"\]\((\w+\.md)\)", index.read_text()))
        assert listed == {path.name for path in index.parent.glob("*.md")} - {"README.md"}
    texts = "".join(page.read_text() for page in PAGES)
    assert [path.name for path in (DOCS / "images").iterdir() if f"images/{path.name}" not in texts] == []


def test_every_command_is_listed() -> None:
    page = (DOCS / "commands.md").read_text()
    for name, _, _ in COMMANDS:
        assert f"| `{name}` |" in page, name
    for path in (ROOT / "training").rglob("*.py"):
        if 'if __name__ == "__main__":' in path.read_text():
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
            assert f"| `{module}` |" in page, module


def test_the_imports_of_examples_work() -> None:
    lines = 0
    for page in PAGES:
        for line in re.findall(r"^ *(from ki_vla_ros\S* import [\w, ]+)$", page.read_text(), re.MULTILINE):
            statement = ast.parse(line).body[0]
            assert isinstance(statement, ast.ImportFrom) and statement.module is not None
            module = importlib.import_module(statement.module)
            assert [name.name for name in statement.names if not hasattr(module, name.name)] == [], page
            lines += 1
    assert lines >= 4


def test_the_log_of_changes_is_merged() -> None:
    assert list(merges(ROOT, (ROOT / "CHANGELOG.rst").read_text())) == []


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= README_WORDS
