"""Weights on disk: what is saved comes back, and what does not fit is named."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import CONFIG, make_model

from ki_vla_ros.errors import ConfigurationError
from training.weights.checkpoints import load_checkpoint, load_resume, read_config, save_checkpoint


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


def test_resume_file_cannot_run_code(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make_model(), {"step": 1})
    torch.save({"path": Path("x")}, tmp_path / "resume.pt")
    with pytest.raises(pickle.UnpicklingError):
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
