"""Peers run in processes of their own, take turns with ours, and must compute our chunk; what is missing is named.

The peers' packages are not installed here: a checkout is made whose PI0Pytorch is our own model behind openpi's names.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import DEEP

from ki_vla_ros.errors import ConfigurationError, EngineError
from training.export.bundle import export_bundle
from training.export.random_weights import policy_spec, write_checkpoint
from training.speed import peers, steps
from training.speed.__main__ import main

pytestmark = pytest.mark.slow  # exports, and starts processes that import torch

CONFIG = replace(DEEP, **{part: replace(getattr(DEEP, part), depth=2) for part in ("vision", "backbone", "expert")})
POLICY = policy_spec(CONFIG, "small", 2, 24, 0)

PI0 = """
import os
from pathlib import Path
import torch
import openpi.models.gemma as gemma
import openpi.models_pytorch.preprocessing_pytorch as _preprocessing
from openpi.models_pytorch.gemma_pytorch import PaliGemmaForConditionalGeneration
from training.weights import load_checkpoint, their_name

print("what a peer prints is no answer")

class PI0Pytorch(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        assert config.pi05 and gemma.get_config(config.paligemma_variant).num_heads > 0
        self.model = load_checkpoint(Path(os.environ["CHECKPOINT"]))
        self.names = {their_name(name, self.model.config): name for name in self.model.state_dict()}
        for parameter in self.model.parameters():
            parameter.data = torch.zeros_like(parameter)

    def load_state_dict(self, weights, strict):
        unknown = [name for name in weights if name not in self.names]
        ours = {self.names[name]: tensor for name, tensor in weights.items() if name in self.names}
        return self.model.load_state_dict(ours, strict=False)[0], unknown

    def sample_actions(self, device, observation, noise, num_steps):
        got = _preprocessing.preprocess_observation_pytorch(observation, train=False)
        images, masks = (torch.stack(list(part.values()), dim=1) for part in (got.images, got.image_masks))
        cache = self.model.prefill(images, masks, got.tokenized_prompt, got.tokenized_prompt_mask)
        return self.model.sample_actions(cache, noise, num_steps) + CHANGE

    def forward(self, observation, actions, noise, time):
        got = _preprocessing.preprocess_observation_pytorch(observation, train=True)
        images, masks = (torch.stack(list(part.values()), dim=1) for part in (got.images, got.image_masks))
        share = time[:, None, None]
        given = {"x_t": share * noise + (1 - share) * actions, "time": time[:, None].expand(actions.shape[:2])}
        words = got.tokenized_prompt, got.tokenized_prompt_mask
        velocity = self.model(images, masks, *words, **given, insulate=INSULATED).velocity_RHA
        return (noise - actions - velocity) ** 2 + CHANGE
"""
GEMMA = "PaliGemmaForConditionalGeneration = GemmaForCausalLM = None\n"
PREPARE = """
def preprocess_observation_pytorch(observation, *, train, image_keys, image_resolution):
    assert not train and list(observation.images) == list(image_keys)
    assert all(tuple(image.shape[-2:]) == image_resolution for image in observation.images.values())
    return observation
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and its bundle."""
    folder = tmp_path_factory.mktemp("peers")
    write_checkpoint(folder / "checkpoint", CONFIG, POLICY)
    export_bundle(folder / "checkpoint", folder / "bundle")
    return folder / "checkpoint", folder / "bundle"


@pytest.fixture
def command(exported: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))  # the stand-in imports us, as no peer does
    monkeypatch.setenv("CHECKPOINT", str(exported[0]))
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # in the peer's process, which would compile for minutes
    return ["peers", "--checkpoint", str(exported[0]), "--bundle", str(exported[1]), "--rounds", "2"]


def make_checkout(folder: Path, change: float = 0.0, insulated: bool = False) -> str:
    """The value of --openpi: this Python, with a checkout whose chunks, and errors in training, are ours + `change`."""
    package = folder / "src" / "openpi" / "models_pytorch"
    package.mkdir(parents=True)
    for path in (package.parent, package):
        (path / "__init__.py").touch()
    (package / "gemma_pytorch.py").write_text(GEMMA)
    (package / "preprocessing_pytorch.py").write_text(PREPARE)
    (package / "pi0_pytorch.py").write_text(PI0 + f"\nCHANGE, INSULATED = {change}, {insulated}\n")
    return f"{sys.executable}:{folder}"


def test_a_peer_computes_our_chunk_with_our_weights(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, threads = tmp_path / "peers.json", torch.get_num_threads()
    try:
        assert main([*command, "--openpi", make_checkout(tmp_path), "--processor-time", "--json", str(out)]) == 0
    finally:
        torch.set_num_threads(threads)
    found = json.loads(out.read_text())
    assert found["differences"].keys() == {"openpi, eager", "openpi, compiled"}
    assert all(difference < 1e-4 for difference in found["differences"].values())
    assert all(0 < row["p50"] < 60_000 for row in found["ms"].values()) and found["ms"].keys() > {"onnxruntime"}
    assert found["ratios"]["openpi, eager"]["ratio"] == pytest.approx(
        found["ms"]["openpi, eager"]["p50"] / found["ms"]["onnxruntime"]["p50"]
    )
    said = capsys.readouterr().out
    assert "| lerobot | not measured: left out: --lerobot PYTHON was not given |" in said
    assert "| ours, torch eager | not measured: " in said and "expected prefill.pt2" in said


def test_a_peer_that_computes_something_else_is_not_timed(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--openpi", make_checkout(tmp_path, change=2e-3)]) == 2
    assert "expected the same chunk within 0.001, got {'openpi, eager': 0.002" in capsys.readouterr().err


def test_a_peer_that_is_not_installed_is_named_and_left_out(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--lerobot", sys.executable]) == 0
    said = capsys.readouterr().out
    assert "| lerobot | not measured: lerobot: ModuleNotFoundError: No module named 'lerobot' |" in said
    assert main([*command, "--lerobot", "/no/python"]) == 0
    assert "lerobot: expected a Python, got /no/python (No such file or directory)" in capsys.readouterr().out


def test_what_cannot_be_a_peer_is_refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--openpi", sys.executable]) == 2
    assert "--openpi: expected PYTHON:CHECKOUT, with openpi's source at CHECKOUT" in capsys.readouterr().err
    assert main(command[:3]) == 2
    assert "--checkpoint and --bundle: expected both or neither" in capsys.readouterr().err
    assert main(["peers", "--int8", "anywhere"]) == 2
    assert "--int8: expected it only with --checkpoint, of which it is an export" in capsys.readouterr().err


def chunk() -> np.ndarray:
    return np.zeros((2, 3), np.float32)


def broken() -> np.ndarray:
    raise EngineError("prefill.pt2: torch failed while running it")


@pytest.mark.parametrize("name", [peers.REFERENCE, "lerobot, compile"])
def test_only_a_way_that_there_is_can_be_left_out(name: str) -> None:
    calls, failed = dict.fromkeys((peers.REFERENCE, "lerobot, compiled", "mine"), chunk), {"openpi": "not there"}
    peers.leave_out(["mine", "openpi"], calls, failed)
    assert calls.keys() == {peers.REFERENCE, "lerobot, compiled"}
    assert failed == {"openpi": "not there", "mine": "left out, as --without said"}
    with pytest.raises(ConfigurationError, match=f"--without: expected some of 'lerobot, compiled', got '{name}'"):
        peers.leave_out([name], calls, failed)


def test_a_way_that_fails_at_its_first_chunk_is_a_row_that_says_so() -> None:
    calls, failed = {peers.REFERENCE: chunk, "ours, torch compiled": broken, "mine": chunk}, dict[str, str]()
    assert peers.agreement(calls, failed, lambda line: None) == {"mine": 0.0}
    assert failed == {"ours, torch compiled": "prefill.pt2: torch failed while running it"} and len(calls) == 2


@pytest.fixture
def step_command(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], list[str]]]:
    """Of the value of --openpi; the model is that of the steps."""
    config, threads = steps.peers_form(steps.SIZES), torch.get_num_threads()
    write_checkpoint(tmp_path / "checkpoint", config, policy_spec(config, "steps", steps.VIEWS, steps.PROMPT, 0))
    monkeypatch.setenv("CHECKPOINT", str(tmp_path / "checkpoint"))
    short = ["--recipes", "frozen", "--rows", "2", "--rounds", "2", "--noise-samples", "1", "--processor-time"]
    yield lambda openpi: [*short, "--openpi", openpi]
    torch.set_num_threads(threads)


def test_a_peer_takes_our_step_with_our_weights(
    step_command: Callable[[str], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert steps.main(step_command(make_checkout(tmp_path))) == 0
    found = json.loads(capsys.readouterr().out)
    theirs = {"openpi, its trainer's", "openpi, without checkpointing"}
    assert found["ms"].keys() == {steps.OURS, "frozen", "pi0", *theirs} and found["failed"] == {}
    assert all(0 < row["p50"] < 60_000 for row in found["ms"].values())
    assert {f"{name} / {steps.OURS}" for name in theirs} < found["ratios"].keys()


@pytest.mark.parametrize("wrong", [{"change": 1e-3}, {"insulated": True}])
def test_a_peer_with_another_loss_or_other_gradients_is_not_timed(
    step_command: Callable[[str], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: dict[str, Any]
) -> None:
    assert steps.main(step_command(make_checkout(tmp_path, **wrong))) == 2
    assert "openpi, its trainer's: expected our loss and norm of gradients (" in capsys.readouterr().err


def test_steps_beside_peers_have_one_noise_draw_and_recipes(
    step_command: Callable[[str], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = step_command(make_checkout(tmp_path))
    assert steps.main([*given, "--noise-samples", "4"]) == 2
    assert "--noise-samples: expected 1 beside peers, which draw one for each prefix, got 4" in capsys.readouterr().err
    assert steps.main(["--size", "100m"]) == 2
    assert "--openpi, --lerobot, --size: expected --recipes with them, got none" in capsys.readouterr().err
