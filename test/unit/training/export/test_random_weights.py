"""Checkpoints with random weights: their sizes, and activations that stay sane and depend on every input."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.models import DEEP

from training.export.bundle import check_policy
from training.export.random_weights import (
    PROMPT_LENGTH,
    SIZES,
    draw_weights,
    main,
    policy_spec,
    stand_in_tokenizer,
    write_checkpoint,
)
from training.tokens.prompt import prompt_tokenizer, prompt_vocab_size
from training.weights.checkpoints import WEIGHTS, load_checkpoint, read_policy, shapes


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random") / "small"
    write_checkpoint(folder, DEEP, policy_spec(DEEP, "small", 2, 24, 0))
    return folder


def test_every_layer_stays_at_its_size_and_every_input_counts(checkpoint: Path) -> None:
    model = load_checkpoint(checkpoint).eval().requires_grad_(False)
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(1, 2, 3, 56, 56, generator=rng) * 2 - 1
    mask, tokens = torch.ones(1, 2, dtype=torch.bool), torch.randint(0, 200, (1, 20), generator=rng)
    token_mask = torch.ones(1, 20, dtype=torch.bool)
    output = model(images, mask, tokens, token_mask)
    sizes = [float(layer.square().mean().sqrt()) for layer in output.prefix_by_layer]
    assert all(0.5 < size < 20.0 for size in sizes)
    cache = model.prefill(images, mask, tokens, token_mask)
    noise = torch.randn(1, 8, 5, generator=rng)
    times = torch.full((1, 8), 0.5)
    velocity = model.velocity(cache, noise, times)
    assert 0.1 < float(velocity.square().mean().sqrt()) < 10.0
    assert float((velocity - model.velocity(cache, noise, 1.6 * times)).abs().max()) > 1e-3
    for changed in (
        model.prefill(-images, mask, tokens, token_mask),
        model.prefill(images, mask, (tokens + 1) % 200, token_mask),
    ):
        assert float((velocity - model.velocity(changed, noise, times)).abs().max()) > 1e-3


def test_what_the_export_reads_is_there(checkpoint: Path) -> None:
    tokenizer = stand_in_tokenizer(DEEP.vocab_size)
    check_policy(read_policy(checkpoint / "policy.json"), load_checkpoint(checkpoint), tokenizer)
    assert load_file(checkpoint / WEIGHTS).keys() == shapes(DEEP).keys()


def test_the_same_seed_draws_the_same_weights() -> None:
    first, again, other = (draw_weights(DEEP, seed, torch.bfloat16) for seed in (0, 0, 1))
    assert all(weight.dtype == torch.bfloat16 for weight in first.values())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("name", SIZES)
def test_named_sizes_have_a_policy_and_a_tokenizer(name: str) -> None:
    config = SIZES[name]()
    weights = sum(math.prod(shape) for shape in shapes(config).values())
    low, high = {
        "100m": (90e6, 110e6), "pi05-slice": (250e6, 450e6), "pi05": (3.2e9, 3.5e9), "pi0": (3.1e9, 3.4e9)
    }[name]  # fmt: skip
    assert low < weights < high
    policy = policy_spec(config, name, 3, PROMPT_LENGTH[name], 0)
    assert policy.state.as_token == (config.state_dim is not None) == (name == "pi0")
    assert len(policy.axes) == config.action_dim


@pytest.mark.parametrize("vocab_size", [600, 1024, pytest.param(257_152, marks=pytest.mark.slow)])
def test_the_stand_in_tokenizer_has_the_models_size(vocab_size: int) -> None:
    tokenizer = stand_in_tokenizer(vocab_size)
    assert tokenizer.get_vocab_size() == vocab_size
    assert sorted(tokenizer.get_vocab().values()) == list(range(vocab_size))
    rows = prompt_vocab_size(tokenizer)
    assert rows == (256_000 if vocab_size == 257_152 else prompt_vocab_size(stand_in_tokenizer(600)))
    assert prompt_tokenizer(tokenizer).get_vocab_size() == rows
    ids = tokenizer.encode("Task: touch the red cube").ids
    assert ids == stand_in_tokenizer(600).encode("Task: touch the red cube").ids and max(ids) < rows


def test_too_few_tokens_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SIZES, "100m", lambda: dataclasses.replace(DEEP, vocab_size=100))
    assert main(["--size", "100m", "--out", str(tmp_path / "c")]) == 2
    assert "random_weights: vocab_size: expected at least" in capsys.readouterr().err
