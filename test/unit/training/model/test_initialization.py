"""The head start: values that are close have close embeddings, and what has no order is left alone."""

from __future__ import annotations

import numpy as np
import torch
from support.vocabularies import LOCATIONS, demo_tokenizer
from torch import Tensor

from training.model.gemma import GemmaConfig
from training.model.initialization import order_embeddings, wave_features
from training.model.siglip import VisionConfig
from training.model.vla import VLA, VLAConfig
from training.tokens.fast import FastTokenizer
from training.tokens.prompt import STATE_BINS, fast_ids, loc_id, token_id

SIZES = GemmaConfig(width=32, depth=2, mlp=32, heads=2, kv_heads=1, head_dim=16)
VISION = VisionConfig(image_size=48, patch_size=12, width=32, depth=1, heads=2, mlp=32, stem="conv")


def order_of(rows: Tensor) -> Tensor:
    """Cosine between neighbours minus that between rows half the table apart; positive where there is an order."""
    unit = torch.nn.functional.normalize(rows, dim=1)
    half = len(rows) // 2
    return (unit[1:] * unit[:-1]).sum(dim=1).mean() - (unit[half:] * unit[: len(unit) - half]).sum(dim=1).mean()


def made() -> tuple[VLA, dict[str, Tensor], dict[str, Tensor], FastTokenizer]:
    rng = np.random.default_rng(0)
    chunks = np.cumsum(rng.normal(0, 0.1, (200, 8, 3)), axis=1)
    fast = FastTokenizer.fit(chunks, vocab_size=256)
    tokenizer = demo_tokenizer(256)
    torch.manual_seed(0)
    vla = VLA(VLAConfig(VISION, SIZES, SIZES, tokenizer.get_vocab_size(), action_dim=3, horizon=8))
    blocks = {
        "numbers": slice(token_id(tokenizer, "0"), token_id(tokenizer, "0") + STATE_BINS),
        "places": slice(loc_id(tokenizer, 0), loc_id(tokenizer, 0) + LOCATIONS),
        "words": slice(0, token_id(tokenizer, "0")),
    }
    first = fast_ids(tokenizer)[0]
    singles = sorted((fast.integers(t)[0], t) for t in range(fast.vocab_size) if len(fast.integers(t)) == 1)
    fast_rows = [first + token for _, token in singles]

    def rows() -> dict[str, Tensor]:
        table = vla.backbone.embedding.weight.detach()
        found = {name: table[block].clone() for name, block in blocks.items()}
        return {**found, "fast": table[fast_rows].clone(), "cells": vla.vision.position.weight.detach()[:4].clone()}

    before = rows()
    order_embeddings(vla, tokenizer, fast)
    return vla, before, rows(), fast


def test_ordered_tokens_start_ordered_and_words_stay_random() -> None:
    _, before, after, _ = made()
    assert torch.equal(before["words"], after["words"])
    for name in ("numbers", "places", "fast"):
        assert order_of(after[name]) > 0.6, name
        assert order_of(before[name]) < 0.2, name
    row, column = after["cells"].chunk(2, dim=1)  # of the four cells of the first row
    assert torch.equal(row, row[:1].expand_as(row)) and float(torch.pdist(column).min()) > 0.5


def test_merged_tokens_with_the_same_first_coefficient_are_told_apart() -> None:
    vla, _, _, fast = made()
    table, first = vla.backbone.embedding.weight.detach(), fast_ids(demo_tokenizer(256))[0]
    merged = [first + token for token in range(fast.vocab_size) if len(fast.integers(token)) > 1]
    assert len(merged) > 50
    assert float(torch.pdist(torch.nn.functional.normalize(table[merged], dim=1)).min()) > 0.25


def test_sizes_stay_those_of_a_fresh_table() -> None:
    _, before, after, _ = made()
    for name in ("numbers", "places", "fast"):
        assert 0.7 < float(after[name].square().mean() / before[name].square().mean()) < 1.4, name


def test_wave_features_have_unit_size_and_tell_values_apart() -> None:
    features = wave_features(torch.linspace(0, 1, 256), 64, finest=32.0)
    assert abs(float(features.square().mean()) - 1.0) < 0.05
    assert float(torch.pdist(features).min()) > 0.1


def test_a_fast_tokens_integers_are_its_coefficients() -> None:
    fast = made()[3]
    chunk = np.full((8, 3), 0.2)
    ids = fast.encode(chunk)
    integers = [i for token in ids for i in fast.integers(token)]
    np.testing.assert_array_equal(integers, np.rint(fast.coefficients(chunk)).astype(int).ravel())
