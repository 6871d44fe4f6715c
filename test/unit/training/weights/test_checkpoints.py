"""Weights on disk: what is saved comes back, and what does not fit is named."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import CONFIG, make_model

from ki_vla_ros.errors import ConfigurationError
from training.weights.checkpoints import load_checkpoint, read_config, save_checkpoint


def test_weights_and_sizes_come_back(tmp_path: Path) -> None:
    model = make_model()
    save_checkpoint(tmp_path / "run", model)
    loaded = load_checkpoint(tmp_path / "run")
    assert loaded.config == CONFIG
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json", "weights.safetensors"]


def test_saving_again_replaces(tmp_path: Path) -> None:
    model = make_model()
    save_checkpoint(tmp_path, model)
    with torch.no_grad():
        model.action_out.bias.fill_(3.0)
    save_checkpoint(tmp_path, model)
    assert (load_checkpoint(tmp_path).action_out.bias == 3.0).all()


def test_files_of_others_in_the_folder_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    save_checkpoint(folder, make_model())
    (folder / "notes").mkdir()
    (folder / "notes" / "config.json").write_text("mine")
    save_checkpoint(folder, make_model())
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "notes", "weights.safetensors"]
    assert (folder / "notes" / "config.json").read_text() == "mine"


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"found no config\.json"):
        load_checkpoint(tmp_path)
    save_checkpoint(tmp_path, make_model())
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
