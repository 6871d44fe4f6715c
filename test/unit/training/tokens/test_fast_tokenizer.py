"""FAST: round trip within its bound, malformed tokens refused, out-of-range coefficients counted."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from ki_vla_ros.errors import ConfigurationError
from training.tokens.fast import FastDecodeError, FastTokenizer, cosine_basis

HORIZON, ACTION_DIM = 16, 7


def smooth_chunks(count: int, seed: int = 0) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    time = np.linspace(0, 1, HORIZON)[None, :, None]
    return rng.uniform(-1, 1, (count, 1, ACTION_DIM)) * time ** rng.uniform(1, 3, (count, 1, 1))


def error_bound(fast: FastTokenizer) -> float:
    """Largest |decode(encode(x)) - x| for a chunk whose coefficients lie in the fitted range."""
    return float(0.5 / fast.scale * np.abs(cosine_basis(fast.horizon)).sum(axis=0).max())


@pytest.fixture(scope="module")
def fast() -> FastTokenizer:
    return FastTokenizer.fit(smooth_chunks(2000), vocab_size=256)


@pytest.fixture(scope="module")
def bytewise() -> FastTokenizer:
    return FastTokenizer.fit(smooth_chunks(1000), vocab_size=512, byte_level=True)


@pytest.fixture(scope="module")
def ended() -> FastTokenizer:
    return FastTokenizer.fit(smooth_chunks(1000), vocab_size=512, ends=True)


def test_basis_is_orthonormal_and_starts_with_the_mean() -> None:
    basis = cosine_basis(HORIZON)
    np.testing.assert_allclose(basis @ basis.T, np.eye(HORIZON), atol=1e-12)
    np.testing.assert_allclose(basis[0], np.full(HORIZON, HORIZON**-0.5))


def test_fresh_smooth_chunks_round_trip_within_the_bound_and_compress(fast: FastTokenizer) -> None:
    chunks = smooth_chunks(200, seed=1)
    assert fast.count_clamped(chunks) == 0
    lengths = []
    for chunk in chunks:
        ids = fast.encode(chunk)
        lengths.append(len(ids))
        assert np.abs(fast.decode(ids) - chunk).max() <= error_bound(fast)
    assert np.mean(lengths) < HORIZON * ACTION_DIM / 3
    assert fast.vocab_size == 256


@given(arrays(np.float64, (HORIZON, ACTION_DIM), elements=st.floats(-0.2, 0.2)))
def test_any_chunk_in_range_round_trips_within_the_bound(fast: FastTokenizer, chunk: NDArray[np.float64]) -> None:
    if fast.count_clamped(chunk) == 0:
        assert np.abs(fast.decode(fast.encode(chunk)) - chunk).max() <= error_bound(fast) + 1e-9


def test_lowest_frequencies_come_first() -> None:
    """Without merges (vocabulary = alphabet), id i belongs to frequency i // A and dimension i % A."""
    chunks = smooth_chunks(50)
    rounded = np.rint(10 * (cosine_basis(HORIZON) @ chunks))
    fast = FastTokenizer.fit(chunks, vocab_size=int(rounded.max() - rounded.min()) + 1)
    assert len(fast.encode(chunks[0])) == HORIZON * ACTION_DIM
    constant = np.zeros((HORIZON, ACTION_DIM))
    constant[:, 2] = 0.5
    ids, still = np.array(fast.encode(constant)), np.array(fast.encode(np.zeros((HORIZON, ACTION_DIM))))
    assert np.flatnonzero(ids != still).tolist() == [2]


def test_with_few_merges_a_tokens_number_says_which_coefficient_comes_next() -> None:
    """Whose coefficient it is, is nowhere in a token: a model must count those before it."""

    def begun(fast: FastTokenizer, token: int) -> set[int]:
        """Coefficients that the token of this number begins with, over chunks."""
        lengths = [[len(fast.integers(i)) for i in fast.encode(chunk)] for chunk in smooth_chunks(200, seed=2)]
        return {sum(row[:token]) for row in lengths if len(row) > token}

    fits = {merged: FastTokenizer.fit(smooth_chunks(500), vocab_size=512, merged=merged) for merged in (0, 8, None)}
    for merged, fast in fits.items():
        several = sum(len(fast.integers(i)) > 1 for i in range(fast.vocab_size))
        assert fast.vocab_size == (512 if merged is None else fast.highest - fast.lowest + 1 + several)
        assert merged is None or several == merged
    assert begun(fits[0], 7) == {7}
    assert len(begun(fits[8], 7)) < len(begun(fits[None], 7)) / 2
    bytewise = FastTokenizer.fit(smooth_chunks(500), vocab_size=512, byte_level=True, merged=8)
    assert bytewise.vocab_size == 264


def test_without_merges_a_chunk_ends_with_one_token_for_its_last_zeros(ended: FastTokenizer) -> None:
    """So that token n is the coefficient n, and the same numbers are said as by merged tokens."""
    merged, end = FastTokenizer.fit(smooth_chunks(1000), vocab_size=512), ended.vocab_size - 1
    for chunk in smooth_chunks(50, seed=4):
        ids, true = ended.encode(chunk), np.rint(ended.coefficients(chunk)).ravel().astype(int)
        assert [ended.integers(i)[0] for i in ids[:-1]] == true[: len(ids) - 1].tolist()
        assert ids[-1] == end and ids.count(end) == 1 and true[len(ids) - 2] != 0 and not true[len(ids) - 1 :].any()
        np.testing.assert_array_equal(ended.decode(ids), merged.decode(merged.encode(chunk)))
    assert ended.encode(np.zeros((HORIZON, ACTION_DIM))) == [end] and not ended.decode([end]).any()
    full = np.zeros((HORIZON, ACTION_DIM))
    full[:, -1] = cosine_basis(HORIZON)[-1]
    assert len(ended.encode(full)) == HORIZON * ACTION_DIM and end not in ended.encode(full)
    with pytest.raises(FastDecodeError, match="the end after all coefficients, got it at position 0"):
        ended.decode([end, end])
    with pytest.raises(FastDecodeError, match="got 112 in 113 ids before the end"):
        ended.decode([*ended.encode(full), end])
    with pytest.raises(FastDecodeError, match="got 1 in 1 ids"):
        ended.decode([0])


def test_coefficients_outside_the_range_are_clamped_and_counted(fast: FastTokenizer) -> None:
    huge = np.full((HORIZON, ACTION_DIM), 40.0)
    assert fast.count_clamped(huge) == ACTION_DIM
    assert np.abs(fast.decode(fast.encode(huge))).max() < 40.0


def test_malformed_ids_are_errors(fast: FastTokenizer) -> None:
    ids = fast.encode(smooth_chunks(1)[0])
    with pytest.raises(FastDecodeError, match="expected 16 x 7 = 112 coefficients, got"):
        fast.decode(ids[:-1])
    with pytest.raises(FastDecodeError, match="expected 16 x 7"):
        fast.decode([*ids, ids[-1]])
    with pytest.raises(FastDecodeError, match=f"id {fast.vocab_size} at position 1"):
        fast.decode([ids[0], fast.vocab_size])
    with pytest.raises(FastDecodeError, match="id -1 at position 0"):
        fast.decode([-1])


@given(
    arrays(np.float64, (HORIZON, ACTION_DIM), elements=st.floats(-30, 30)),
    st.sampled_from(["coefficients", "bytes", "none"]),
)
def test_whatever_is_beyond_the_range_is_counted_and_nothing_else_is_changed(
    fast: FastTokenizer, bytewise: FastTokenizer, ended: FastTokenizer, chunk: NDArray[np.float64], merges: str
) -> None:
    fast = {"coefficients": fast, "bytes": bytewise, "none": ended}[merges]
    true = np.rint(fast.coefficients(chunk))
    beyond = (true < fast.lowest) | (true > fast.highest)
    said = np.rint(fast.coefficients(fast.decode(fast.encode(chunk))))
    assert fast.count_clamped(chunk) == int(beyond.sum())
    np.testing.assert_array_equal(said, np.clip(true, fast.lowest, fast.highest))


@given(st.data(), st.sampled_from(["coefficients", "bytes", "none"]))
def test_any_ids_are_exactly_one_chunk_or_an_error(
    fast: FastTokenizer, bytewise: FastTokenizer, ended: FastTokenizer, data: st.DataObject, merges: str
) -> None:
    fast = {"coefficients": fast, "bytes": bytewise, "none": ended}[merges]
    right = fast.encode(smooth_chunks(1, seed=data.draw(st.integers(0, 20)))[0])
    ids = [*right[: data.draw(st.integers(0, len(right)))], *data.draw(st.lists(st.integers(-2, 600), max_size=3))]
    counted = [i for token in ids if 0 <= token < fast.vocab_size for i in fast.integers(token)]
    known = all(0 <= token < fast.vocab_size for token in ids)
    try:
        chunk = fast.decode(ids)
    except FastDecodeError:
        assert fast.byte_level or not known or len(counted) != HORIZON * ACTION_DIM
    else:
        assert known and chunk.shape == (HORIZON, ACTION_DIM)
        if fast.ends:  # the end stands for as many zeros as are left
            counted = counted[: HORIZON * ACTION_DIM]
        assert fast.byte_level or np.rint(fast.coefficients(chunk)).ravel().tolist() == counted


def test_bad_chunks_and_too_small_vocabularies_are_refused(fast: FastTokenizer) -> None:
    with pytest.raises(ValueError, match=r"expected finite chunks of shape \(16, 7\), got \(15, 7\)"):
        fast.encode(np.zeros((15, 7)))
    with pytest.raises(ValueError, match="expected finite chunks"):
        fast.encode(np.full((16, 7), np.nan))
    with pytest.raises(ConfigurationError, match=r"at most 1% of the coefficients beyond 0\.\.0, .* vocabulary of 4"):
        FastTokenizer.fit(smooth_chunks(100), vocab_size=4)
