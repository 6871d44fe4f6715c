"""Weights on disk: what is saved comes back, and what does not fit is named."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import CONFIG, make_model

from ki_vla_ros.errors import ConfigurationError
from training.weights.checkpoints import (
    load_checkpoint,
    load_resume,
    newest_checkpoint,
    read_config,
    save_checkpoint,
    save_run,
)


def test_weights_and_sizes_come_back(tmp_path: Path) -> None:
    model = make_model()
    save_checkpoint(tmp_path / "run", model)
    loaded = load_checkpoint(tmp_path / "run")
    assert loaded.config == CONFIG
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json", "weights.safetensors"]


def test_training_resumes_where_it_stopped(tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    model.action_out.weight.sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path, model, {"step": 7, "optimizer": optimizer.state_dict()})
    resumed = load_resume(tmp_path)
    assert resumed["step"] == 7
    fresh = torch.optim.AdamW(load_checkpoint(tmp_path).parameters())
    fresh.load_state_dict(resumed["optimizer"])
    for ours, theirs in zip(
        optimizer.state_dict()["state"].values(), fresh.state_dict()["state"].values(), strict=True
    ):
        assert torch.equal(ours["exp_avg"], theirs["exp_avg"])


def test_saving_again_replaces(tmp_path: Path) -> None:
    model = make_model()
    save_checkpoint(tmp_path, model, {"step": 1})
    with torch.no_grad():
        model.action_out.bias.fill_(3.0)
    save_checkpoint(tmp_path, model, {"step": 2})
    assert load_resume(tmp_path) == {"step": 2}
    assert (load_checkpoint(tmp_path).action_out.bias == 3.0).all()


def test_files_of_others_in_the_folder_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    save_checkpoint(folder, make_model(), {"step": 1})
    (folder / "notes").mkdir()
    (folder / "notes" / "config.json").write_text("mine")
    save_checkpoint(folder, make_model())
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "notes", "weights.safetensors"]
    assert (folder / "notes" / "config.json").read_text() == "mine"


def test_weights_and_state_of_two_checkpoints_are_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_checkpoint(tmp_path / name, make_model(), {"step": 1})
    shutil.copy(tmp_path / "one" / "weights.safetensors", tmp_path / "two")
    with pytest.raises(
        ConfigurationError, match=r"two: expected weights\.safetensors and resume\.pt that were saved tog"
    ):
        load_resume(tmp_path / "two")
    save_checkpoint(tmp_path / "three", make_model())  # without an identity
    shutil.copy(tmp_path / "three" / "weights.safetensors", tmp_path / "two")
    with pytest.raises(ConfigurationError, match="got identities none and "):
        load_resume(tmp_path / "two")


def test_a_runs_newest_checkpoint_counts_and_the_earlier_one_goes(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-notes").mkdir()  # not ours
    for step in range(3):
        save_run(tmp_path, make_model(), {"step": step})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-000003", "checkpoint-notes"]
    (tmp_path / "checkpoint-000002").mkdir()  # as a process that is killed while it removes it leaves it
    assert load_resume(newest_checkpoint(tmp_path) or tmp_path) == {"step": 2}
    save_run(tmp_path, make_model(), {"step": 3})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-000004", "checkpoint-notes"]


def save_as_0_2(folder: Path, step: int, after: int = 3) -> None:
    """As version 0.2 saved: all parts, then one after the other in its place; killed after `after` of them."""
    save_file(make_model().state_dict(), folder / "weights.safetensors.part")
    (folder / "config.json.part").write_text(json.dumps(dataclasses.asdict(CONFIG)))
    torch.save({"step": step}, folder / "resume.pt.part")
    for name in ("config.json", "resume.pt", "weights.safetensors")[:after]:
        (folder / f"{name}.part").replace(folder / name)


def test_a_run_of_version_0_2_goes_on(tmp_path: Path) -> None:
    save_as_0_2(tmp_path, 1)
    assert newest_checkpoint(tmp_path) == tmp_path and load_resume(tmp_path) == {"step": 1}
    for after in (0, 1):
        save_as_0_2(tmp_path, 2, after)
        assert newest_checkpoint(tmp_path) == tmp_path and load_resume(tmp_path) == {"step": 1}
    save_run(tmp_path, make_model(), {"step": 3})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000001"]


def test_a_run_that_version_0_2_left_half_saved_is_refused(tmp_path: Path) -> None:
    save_as_0_2(tmp_path, 1)
    save_as_0_2(tmp_path, 2, after=2)
    with pytest.raises(
        ConfigurationError, match=r"got the weights of an earlier one.*rename weights\.safetensors\.part"
    ):
        newest_checkpoint(tmp_path)
    (tmp_path / "weights.safetensors.part").rename(tmp_path / "weights.safetensors")
    assert newest_checkpoint(tmp_path) == tmp_path


def test_resume_file_cannot_run_code(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make_model(), {"step": 1})
    torch.save({"path": Path("x")}, tmp_path / "resume.pt")
    with pytest.raises(ConfigurationError, match=r"resume\.pt: expected the state of a run, without code"):
        load_resume(tmp_path)


def test_a_resume_file_that_is_cut_off_is_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make_model(), {"step": 1})
    whole = (tmp_path / "resume.pt").read_bytes()
    for content in (whole[:-20], whole[: len(whole) // 2], b"", b"[1]"):
        (tmp_path / "resume.pt").write_bytes(content)
        with pytest.raises(ConfigurationError, match=rf"resume\.pt: expected .* got {len(content)} bytes"):
            load_resume(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"found no config\.json"):
        load_checkpoint(tmp_path)
    save_checkpoint(tmp_path, make_model())
    with pytest.raises(ConfigurationError, match=r"expected resume\.pt to resume from, found none"):
        load_resume(tmp_path)
    (tmp_path / "weights.safetensors").unlink()
    with pytest.raises(ConfigurationError, match=r"weights\.safetensors"):
        load_checkpoint(tmp_path)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make_model())
    (tmp_path / "weights.safetensors").write_bytes(b"not weights")
    with pytest.raises(ConfigurationError, match=r"weights\.safetensors"):
        load_checkpoint(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    for broken in ("{", json.dumps(fields | {"layers": 3}), json.dumps({"vision": fields["vision"]})):
        (tmp_path / "config.json").write_text(broken)
        with pytest.raises(ConfigurationError, match="not the config of a model"):
            read_config(tmp_path)


def test_weights_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make_model())
    weights = load_file(tmp_path / "weights.safetensors")
    weights["extra"] = weights.pop("projector.bias")
    weights["action_out.bias"] = torch.zeros(9)
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(ConfigurationError) as error:
        load_checkpoint(tmp_path)
    message = str(error.value)
    assert "1 missing: projector.bias" in message
    assert "1 unknown: extra" in message
    assert "1 misshapen: action_out.bias: expected [3], got [9]" in message
