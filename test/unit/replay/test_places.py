"""Where a replay writes: full disks, folders that are none, and folders that go away."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.bundles import write_test_bundle
from support.disks import largest_file
from support.recordings import record_inputs

from ki_vla_ros.bags.bag import open_bag
from ki_vla_ros.bundle.folder import Bundle
from ki_vla_ros.console import ExitCode
from ki_vla_ros.replay.__main__ import main
from ki_vla_ros.replay.figures import Figures

LOOSE = {"limits.on_jump": "clamp", "limits.on_speed": "clamp", "limits.on_position": "clamp", "ramp_in_s": 0.0}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_test_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bag = tmp_path_factory.mktemp("inputs") / "bag"
    record_inputs(bag, 3.0)
    return bag


def failure(bag: Path, out: Path, bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a replay ends with."""
    given = [str(bag), "--bundle", str(bundle.path), "--out", str(out)]
    settings = (part for name, value in LOOSE.items() for part in ("--set", f"{name}={value}"))
    assert main([*given, *settings]) == ExitCode.FAILED
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_full_disk_under_the_predictions(
    tmp_path: Path, bundle: Bundle, inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with largest_file(50_000):
        said = failure(inputs, tmp_path / "out", bundle, capsys)
    where = tmp_path / "out" / "predicted"
    told = "cannot be written: File too large; what was written until then can be read; make room"
    assert said == f"replay: bag {where} {told}"
    with open_bag(where) as predicted:
        assert predicted.faults[0].kind == "metadata"


def test_a_full_disk_under_the_figures(
    tmp_path: Path,
    bundle: Bundle,
    inputs: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.json").write_text("{}")  # of an earlier replay

    def interrupt(figures: Figures, tick: object) -> None:
        monkeypatch.setattr(Figures, "add", lambda figures, tick: None)
        raise KeyboardInterrupt  # the figures are written next

    monkeypatch.setattr(Figures, "add", interrupt)
    with largest_file(1_000):
        given = [str(inputs), "--bundle", str(bundle.path), "--out", str(tmp_path / "out"), "--no-mcap"]
        assert main(given) == ExitCode.FAILED
    (said,) = capsys.readouterr().err.splitlines()
    where = tmp_path / "out" / "metrics.json"
    left = "what an earlier write left there is unchanged; make room"
    assert said == f"replay: {where} cannot be written: File too large; {left}"
    assert where.read_text() == "{}" and not list(where.parent.glob("*.part"))


def test_a_file_where_a_folder_is_expected(
    tmp_path: Path, bundle: Bundle, inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    told = f"expected a folder for the results, got {'{}'}; choose another"
    said = failure(inputs, tmp_path / "file", bundle, capsys)
    assert said == f"replay: --out {tmp_path / 'file'}: {told.format('a file')}"
    said = failure(inputs, tmp_path / "file" / "out", bundle, capsys)
    assert said == f"replay: --out {tmp_path / 'file' / 'out'}: {told.format('Not a directory')}"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "predicted").touch()
    said = failure(inputs, tmp_path / "out", bundle, capsys)
    assert "expected only an earlier replay's files in" in said and (tmp_path / "out" / "predicted").is_file()


def test_a_folder_that_goes_away(
    tmp_path: Path,
    bundle: Bundle,
    inputs: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add = Figures.add

    def add_and_remove(figures: Figures, tick: object) -> None:
        add(figures, tick)  # type: ignore[arg-type]
        shutil.rmtree(tmp_path / "out", ignore_errors=True)

    monkeypatch.setattr(Figures, "add", add_and_remove)
    said = failure(inputs, tmp_path / "out", bundle, capsys)
    assert "out/predicted cannot be written: No such file or directory" in said or "metrics.json cannot be" in said
