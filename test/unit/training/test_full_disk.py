"""A disk that fills up, as a limit on the size of files: one clear error, and what was there before stays."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from support.bundles import demo_policy
from support.disks import largest_file
from support.exported import export, skip_tracing
from support.lerobot_runs import run
from support.models import make_model
from support.sample_bags import recording, write_bag
from support.vocabularies import demo_tokenizer

from ki_vla_ros.bundle.folder import load_bundle
from ki_vla_ros.errors import ConfigurationError
from training import storage
from training.export.__main__ import main as export_main
from training.weights.checkpoints import save_checkpoint
from training.weights.runs import RunState, newest_checkpoint, open_run, save_run


@pytest.mark.parametrize(("size", "name"), [(5_000, "part-00001-of-00001.safetensors"), (20_000, "state.json")])
def test_a_runs_checkpoint(tmp_path: Path, size: int, name: str) -> None:
    tensors = {"model.weight": torch.arange(2_000.0)}
    save_run(tmp_path, RunState(step=1), tensors, keep=1)
    with (
        largest_file(size),
        pytest.raises(ConfigurationError, match=f"checkpoint-000002/{name}: expected to write it whole, got .*room"),
    ):
        save_run(tmp_path, RunState(step=2, made_of={"robot": "x" * 30_000}), tensors, keep=1)
    place = newest_checkpoint(tmp_path)
    assert place is not None
    state, saved = open_run(place)
    saved.load({"model.weight": (found := torch.empty(2_000))})
    assert state.step == 1 and torch.equal(found, tensors["model.weight"])
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000001"]


def test_a_policy(tmp_path: Path) -> None:
    model, tokenizer = make_model(), demo_tokenizer(fast_vocab=20_000)  # the larger file
    with (
        largest_file(300_000),
        pytest.raises(ConfigurationError, match=r"tokenizer\.json: expected to write it whole, got .*room"),
    ):
        save_checkpoint(tmp_path / "policy", model, tokenizer=tokenizer, policy=demo_policy())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [100, 1000, 5000])
def test_a_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int) -> None:
    """Nothing is left that anybody could take for a dataset."""
    bag = write_bag(tmp_path / "bag", recording(seconds=1.5))
    with largest_file(size):
        assert run("from-bag", bag, "--out", tmp_path / "dataset", "--actions", "states", "--bundle", "demo") == 2
    said = capsys.readouterr().err.strip()
    assert re.fullmatch(r"convert: dataset .*dataset: expected to write it whole, got .*too large.*again", said), said
    assert [path.name for path in tmp_path.iterdir()] == ["bag"]


@pytest.mark.slow
def test_an_export(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = export(tmp_path_factory, "text")
    skip_tracing(monkeypatch, made)
    shutil.copytree(made.bundle.path, tmp_path / "bundle")
    for size in (100, 2_000, 20_000):
        with largest_file(size):
            assert (
                export_main(["--checkpoint", str(made.checkpoint), "--out", str(tmp_path / "bundle"), "--torch"]) == 2
            )
        said = capsys.readouterr().err.strip()
        assert said.startswith("export: ") and "\n" not in said and "too large" in said, said
        load_bundle(tmp_path / "bundle")
        assert [path.name for path in tmp_path.iterdir()] == ["bundle"]

    def refuse(*_: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(storage, "replace_folder", refuse)  # at the last moment: nothing has gone before
    assert export_main(["--checkpoint", str(made.checkpoint), "--out", str(tmp_path / "bundle")]) == 2
    load_bundle(tmp_path / "bundle")
