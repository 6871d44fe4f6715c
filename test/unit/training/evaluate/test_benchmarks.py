"""The page of benchmarks: every figure is from a file, and the one in docs/ is up to date."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from support import ROOT

from training.evaluate.benchmarks import RESULTS, main

NAME = "aloha_transfer_cube"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / RESULTS, tmp_path / "benchmarks")
    return tmp_path / "benchmarks"


def row(page: str, name: str) -> str:
    (found,) = re.findall(rf"^\|.*\(#{name}\) \|$", page, re.MULTILINE)
    return str(found)


def test_the_page_is_that_of_its_files(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If not: python -m training.evaluate.benchmarks"""
    assert main(["--results", str(results)]) == 0
    assert capsys.readouterr().out == f"{results.with_suffix('.md')}\n"
    assert results.with_suffix(".md").read_text() == (ROOT / RESULTS).with_suffix(".md").read_text()


def test_figures_are_those_of_the_file(results: Path) -> None:
    content = json.loads((results / f"{NAME}.json").read_text())
    content |= {"successes": 31, "episodes": 40, "success_rate": 0.775, "success_95": [0.625, 0.877], "complete": True}
    content |= {"groups": {"left": {"episodes": 40, "success_rate": 0.775}}, "mean_of_groups": 0.775}
    (results / f"{NAME}.json").write_text(json.dumps(content))
    main(["--results", str(results)])
    page = results.with_suffix(".md").read_text()
    assert "| **31 / 40** | **77.5** [62.5, 87.7] | **77.5** | left 77.5 |" in row(page, NAME)
    told = page[page.index(f"### {NAME}\n") :]
    told = told[: told.index("###", 5)]
    assert "200 trials" not in told and content["commit"] in told and content["machine"] in told


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        (
            "notes.yaml",
            f"\n  {NAME}:",
            "\n  gone:",
            f"runs: expected words for each file, got none for {NAME}.json",
        ),
        ("notes.yaml", "kind: from scratch", "kind: scratch", "line .*kind: expected .*got 'scratch'"),
        ("notes.yaml", "mean: 10.5", "mean: 105", "line .*mean: .*105"),
        (f"{NAME}.json", '"format": 1', '"format": 2', f"{NAME}.json: expected the result of a run in format 1"),
        (f"{NAME}.json", '"outcomes"', '"out"', f"{NAME}.json: expected a file of training.evaluate --out, got one wi"),
        (f"{NAME}.json", None, None, f"notes.yaml: runs: expected files that are there, got {NAME}.json"),
    ],
)
def test_what_does_not_fit_leaves_the_page_as_it_was(
    file: str, old: str | None, new: str | None, said: str, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, path = results.with_suffix(".md"), results / file
    page.write_text("before")
    if old is None or new is None:
        path.unlink()
    else:
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))
    assert main(["--results", str(results)]) == 2
    assert re.search(said, capsys.readouterr().err) and page.read_text() == "before"
