"""Naive action tokens: one bin for each number; and the file that either kind of action tokens has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ki_vla_ros.errors import ConfigurationError
from training.tokens import (
    ActionTokenizer,
    FastDecodeError,
    FastTokenizer,
    NaiveTokenizer,
    describe_actions,
    load_actions,
)

HALF_BIN = 1 / 256


def draw_chunk(seed: int, horizon: int, action_dim: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (horizon, action_dim))


@settings(max_examples=60)
@given(seed=st.integers(0, 1000), horizon=st.integers(1, 9), action_dim=st.integers(1, 4), stride=st.integers(1, 9))
def test_every_written_number_is_one_token_and_comes_back_within_half_a_bin(
    seed: int, horizon: int, action_dim: int, stride: int
) -> None:
    naive, chunk_HA = NaiveTokenizer(horizon, action_dim, stride), draw_chunk(seed, horizon, action_dim)
    steps = [h for h in range(horizon) if h % stride == 0 or h == horizon - 1]
    ids = naive.encode(chunk_HA)
    assert ids == [int((chunk_HA[h, a] + 1) * 128) for h in steps for a in range(action_dim)], "step after step"
    assert len(ids) == naive.numbers and naive.vocab_size == 256 and naive.count_clamped(chunk_HA) == 0
    decoded_HA = naive.decode(ids)
    np.testing.assert_allclose(decoded_HA[steps], chunk_HA[steps], atol=HALF_BIN + 1e-12)
    for h in range(horizon):  # between two that are written, on the line from one to the other
        before, after = max(s for s in steps if s <= h), min(s for s in steps if s >= h)
        share = (h - before) / max(1, after - before)
        line = decoded_HA[before] + share * (decoded_HA[after] - decoded_HA[before])
        np.testing.assert_allclose(decoded_HA[h], line, atol=1e-12)


def test_a_straight_motion_survives_any_stride() -> None:
    line_HA = np.linspace([-0.9, 0.3], [0.9, -0.7], 50)
    for stride, count in ((1, 100), (5, 22), (49, 4)):
        naive = NaiveTokenizer(50, 2, stride)
        ids = naive.encode(line_HA)
        assert len(ids) == count
        np.testing.assert_allclose(naive.decode(ids), line_HA, atol=HALF_BIN + 1e-12)


def test_numbers_beyond_the_bins_are_clamped_and_counted_where_they_are_written() -> None:
    naive, chunk_HA = NaiveTokenizer(4, 2, 2), np.array([[1.5, 0.0], [-9.0, 9.0], [0.0, -1.2], [1.0, -1.0]])
    assert naive.count_clamped(chunk_HA) == 2 and naive.count_clamped(np.stack([chunk_HA] * 3)) == 6
    assert naive.encode(chunk_HA) == [255, 128, 128, 0, 255, 0]


@pytest.mark.parametrize(
    ("ids", "fault"),
    [
        ([0] * 5, r"expected 3 steps x 2 = 6, got 5"),
        ([0] * 7, r"expected 3 steps x 2 = 6, got 7"),
        ([0, 256, 0, 0, 0, 0], r"expected ids in 0\.\.255, got id 256 at position 1"),
        ([0, 0, -1, 0, 0, 0], r"got id -1 at position 2"),
    ],
)
def test_ids_that_are_no_chunk_are_errors(ids: list[int], fault: str) -> None:
    with pytest.raises(FastDecodeError, match=fault):
        NaiveTokenizer(4, 2, 2).decode(ids)


def test_what_is_no_chunk_is_refused() -> None:
    for chunk_HA in (np.zeros((4, 3)), np.full((4, 2), np.nan)):
        with pytest.raises(ValueError, match=r"expected finite chunks of shape \(4, 2\)"):
            NaiveTokenizer(4, 2).encode(chunk_HA)


def kinds() -> dict[str, ActionTokenizer]:
    chunks_NHA = np.cumsum(np.random.default_rng(0).normal(size=(300, 6, 2)), axis=1) / 9
    return {
        "naive": NaiveTokenizer(6, 2, 3),
        "fast": FastTokenizer.fit(chunks_NHA, vocab_size=128),
        "bytes": FastTokenizer.fit(chunks_NHA, vocab_size=300, byte_level=True),
    }


@pytest.mark.parametrize("kind", ["naive", "fast", "bytes"])
def test_what_is_saved_means_the_same_when_it_is_loaded(kind: str, tmp_path: Path) -> None:
    actions, file = kinds()[kind], tmp_path / "actions.json"
    file.write_text(describe_actions(actions), encoding="utf-8")
    loaded = load_actions(file)
    assert type(loaded) is type(actions) and describe_actions(loaded) == describe_actions(actions)
    for seed in range(20):
        chunk_HA = draw_chunk(seed, 6, 2)
        ids = actions.encode(chunk_HA)
        assert loaded.encode(chunk_HA) == ids
        np.testing.assert_array_equal(loaded.decode(ids), actions.decode(ids))
    assert loaded.for_shape(3, 1).numbers == actions.for_shape(3, 1).numbers


@pytest.mark.parametrize(
    ("kind", "change", "fault"),
    [
        ("naive", {"kind": "other"}, r"actions\.json: .*'naive', 'fast'"),
        ("naive", {"stride": 0}, r"actions\.json: naive\.stride: expected >= 1, got 0"),
        ("naive", {"more": 1}, r"more"),
        ("fast", {"highest": -99999}, r"expected lowest to highest within \d+, got -\d+ to -99999"),
        ("fast", {"highest": 0}, r"expected merges of the coefficients -\d+ to 0, got others"),
        ("fast", {"bpe": {"model": {"type": "Unigram"}}}, r"model: expected BPE or WordLevel, got 'Unigram'"),
    ],
)
def test_a_file_of_something_else_is_refused(kind: str, change: dict[str, Any], fault: str, tmp_path: Path) -> None:
    file = tmp_path / "actions.json"
    file.write_text(json.dumps(json.loads(describe_actions(kinds()[kind])) | change), encoding="utf-8")
    with pytest.raises(ConfigurationError, match=fault):
        load_actions(file)
    file.write_text("no JSON")
    with pytest.raises(ConfigurationError, match=r"actions\.json: expected a policy's action tokens, got none"):
        load_actions(file)
