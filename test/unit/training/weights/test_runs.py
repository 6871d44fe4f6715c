"""A run's checkpoints: what is saved comes back, the last few stay, and what is not of this run is named."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

from ki_vla_ros.errors import ConfigurationError
from training.weights.pieces import OFFSETS
from training.weights.runs import RunState, check_same, newest_checkpoint, open_run, save_run

ONE, TWO = "part-00001-of-00002.safetensors", "part-00002-of-00002.safetensors"


def tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    weight = torch.arange(12.0).reshape(4, 3) * value
    return {
        "model.weight": weight,
        "heads.scale": torch.tensor([float(value)]),
        "optimizer.step.model.weight": weight[0, 0],
    }


def save(out: Path, step: int = 1, keep: int = 2) -> Path:
    save_run(out, RunState(step=step, minutes={"a": 0.5}, made_of={"robot.name": "x"}), tensors(step), keep)
    return newest_checkpoint(out) or out


def two_pieces(out: Path) -> Path:
    """As two processes save them: four rows in two files."""
    folder = save(out)
    whole = load_file(folder / "part-00001-of-00001.safetensors")
    (folder / "part-00001-of-00001.safetensors").unlink()
    state = json.loads((folder / "state.json").read_text())
    for name, rows, at in ((ONE, slice(0, 3), 0), (TWO, slice(3, 4), 3)):
        pieces = {"model.weight": whole["model.weight"][rows].clone()}
        offsets = json.dumps({"model.weight": {"saved_offsets": [at, 0]}})
        save_file(pieces, folder / name, {"identity": state["identity"], OFFSETS: offsets})
    (folder / "state.json").write_text(json.dumps(state | {"files": [ONE, TWO]}))
    return folder


def rewrite(folder: Path, name: str, shape: tuple[int, ...], at: list[int]) -> None:
    state = json.loads((folder / "state.json").read_text())
    offsets = json.dumps({"model.weight": {"saved_offsets": at}})
    pieces = {"model.weight": torch.zeros(shape)}
    save_file(pieces, folder / name, {"identity": state["identity"], OFFSETS: offsets})


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    folder = save(tmp_path, step=3)
    state, saved = open_run(folder)
    assert (state.stage, state.step, state.minutes, state.made_of) == (0, 3, {"a": 0.5}, {"robot.name": "x"})
    found = {name: torch.full_like(tensor, -1.0) for name, tensor in tensors().items()}
    saved.load(found)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors(3).items())
    assert sorted(path.name for path in folder.iterdir()) == ["part-00001-of-00001.safetensors", "state.json"]


def test_the_last_few_stay_and_nothing_else_goes(tmp_path: Path) -> None:
    for name in ("checkpoint-notes", "policy"):
        (tmp_path / name).mkdir()
    for step in range(1, 5):
        save(tmp_path, step)
    others = ["checkpoint-notes", "policy"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-000003", "checkpoint-000004", *others]
    save(tmp_path, 5, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-000005", *others]
    save(tmp_path, 6, keep=3)
    (tmp_path / "checkpoint-000005" / "state.json").unlink()  # as a process killed while it removes it leaves it
    assert open_run(newest_checkpoint(tmp_path) or tmp_path)[0].step == 6


def test_pieces_make_a_tensor_as_torchs_own_reader_reads_them(tmp_path: Path) -> None:
    folder = two_pieces(tmp_path)
    ours, theirs = ({"model.weight": torch.zeros(4, 3)} for _ in range(2))
    open_run(folder)[1].load(ours)
    with pytest.warns(UserWarning, match="assuming the intent is to load in a single process"):
        load(theirs, storage_reader=HuggingFaceStorageReader(str(folder)))
    assert torch.equal(ours["model.weight"], theirs["model.weight"])
    assert torch.equal(ours["model.weight"], tensors()["model.weight"])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """torch's reader takes what is left for a smaller tensor."""
    for name in (ONE, TWO):
        folder = two_pieces(tmp_path / name)
        (folder / name).unlink()
        with pytest.raises(ConfigurationError, match=f"{name}: expected the weights as safetensors, got no such file"):
            open_run(folder)
    (folder / "state.json").unlink()
    with pytest.raises(ConfigurationError, match=r"expected state\.json to resume from, found none; delete this"):
        open_run(folder)


def test_files_of_two_checkpoints_are_refused(tmp_path: Path) -> None:
    one, two = save(tmp_path / "one"), save(tmp_path / "two")
    shutil.copy(one / "part-00001-of-00001.safetensors", two)
    with pytest.raises(ConfigurationError, match=r"-of-00001\.safetensors: expected a file of identity .*"):
        open_run(two)
    save_file({"model.weight": torch.zeros(1)}, two / "part-00001-of-00001.safetensors")
    with pytest.raises(ConfigurationError, match="got none; take all files from one checkpoint"):
        open_run(two)


@pytest.mark.parametrize(
    ("shape", "at", "fault"),
    [
        ((2, 3), [2, 0], r"weight: expected pieces that make a tensor of shape \[4, 3\], got .*\[2, 4\]"),  # twice
        ((1, 3), [4, 0], r"model\.weight: expected pieces that make a tensor of shape \[5, 3\]"),  # a hole
        ((1, 3), [-1, 0], "expected pieces of tensors, as training saves them"),
        ((1, 3), [3], "expected pieces of tensors, as training saves them"),
        ((3,), [3], r"pieces of several kinds"),
    ],
)
def test_pieces_that_make_no_tensor_are_refused(
    tmp_path: Path, shape: tuple[int, ...], at: list[int], fault: str
) -> None:
    folder = two_pieces(tmp_path)
    rewrite(folder, TWO, shape, at)
    with pytest.raises(ConfigurationError, match=fault):
        open_run(folder)


def test_tensors_of_another_model_are_named(tmp_path: Path) -> None:
    _, saved = open_run(save(tmp_path))
    for name, tensor, fault in (
        ("model.weight", torch.zeros(4, 4), r"model\.weight: expected \(\[4, 4\], torch\.float32\), .* got \(\[4, 3\]"),
        ("model.weight", torch.zeros(4, 3, dtype=torch.bfloat16), r"expected \(\[4, 3\], torch\.bfloat16\)"),
        ("model.other", torch.zeros(1), r"model\.other: expected .* got none; keep the model"),
    ):
        with pytest.raises(ConfigurationError, match=rf"resume .*checkpoint-000001: .*{fault}"):
            saved.load({name: tensor})
        assert not tensor.any()


def test_another_configuration_is_named(tmp_path: Path) -> None:
    folder, given = tmp_path, {"robot.name": "x", "normalisation.low.0": 0.5, "seed": 1}
    check_same(folder, given, given | {"normalisation.low.0": 0.5 + 1e-9})  # another machine's rounding
    for changes, fault in (
        ({"robot.name": "y"}, r"robot\.name: expected x, as this configuration says, got y; keep the model, the robot"),
        ({"normalisation.low.0": 0.51}, r"normalisation\.low\.0: expected 0\.5, .* got 0\.51"),
        ({"hints.probe_layer": 1}, r"hints\.probe_layer: expected none, .* got 1"),
    ):
        with pytest.raises(ConfigurationError, match=fault):
            check_same(folder, given, given | changes)


def test_a_checkpoint_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "resume.pt").write_bytes(b"")  # version 0.2
    folder = tmp_path / "later" / "checkpoint-000007"
    folder.mkdir(parents=True)
    (folder / "resume.pt").write_bytes(b"")
    for out in ("old", "later"):
        with pytest.raises(ConfigurationError, match=r"expected a checkpoint with state\.json, got one with resume"):
            newest_checkpoint(tmp_path / out)
    assert newest_checkpoint(tmp_path / "none") is None


def test_damaged_state_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path)
    state = json.loads((folder / "state.json").read_text())
    for text in ("", "[1]", "{", json.dumps(state | {"step": -1}), json.dumps(state | {"more": 1})):
        (folder / "state.json").write_text(text)
        with pytest.raises(ConfigurationError, match=r"state\.json: expected the state of a run, as training saves it"):
            open_run(folder)
    (folder / "state.json").write_text(json.dumps(state | {"files": ["../elsewhere.safetensors"]}))
    with pytest.raises(ConfigurationError, match=r"expected names of files in it, got '\.\./elsewhere"):
        open_run(folder)


class Attack:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.place,)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", [".metadata", "state.json", "part-00001-of-00001.safetensors", "__0_0.distcp"])
def test_no_file_of_a_checkpoint_runs_code(tmp_path: Path, name: str) -> None:
    """A pickle in place of any file, DCP's own among them, is not read, or refused."""
    folder = save(tmp_path)
    attack = Attack()
    attack.place = str(tmp_path / "attacked")  # type: ignore[attr-defined]
    (folder / name).write_bytes(pickle.dumps(attack))
    try:
        open_run(folder)[1].load(tensors())
    except ConfigurationError as error:
        assert name in str(error)
    else:
        assert name in (".metadata", "__0_0.distcp")
    assert not (tmp_path / "attacked").exists()
    pickle.loads(pickle.dumps(attack))
    assert (tmp_path / "attacked").exists()  # it would have run
