"""FAST's published form: a vocabulary fitted here as theirs was, against a slow tokenizer with explicit sums."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
from numpy.typing import NDArray
from support.recipes import tiny_run
from support.vocabularies import demo_tokenizer
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import NFKC
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from ki_vla_ros.errors import ConfigurationError
from training.config import TrainingConfig
from training.model.gemma import GemmaConfig
from training.model.initialization import order_embeddings
from training.model.siglip import VisionConfig
from training.model.vla import VLA, VLAConfig
from training.sources import make_actions
from training.tokens.fast import PROCESSOR, VOCABULARY, FastDecodeError, FastTokenizer
from training.tokens.prompt import fast_ids

HORIZON, ACTION_DIM, SCALE = 10, 4, 10
UNIVERSAL_LOWEST = -354  # of the universal vocabulary: a zero is a character of two bytes there
GPT2_WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

Chunk = NDArray[np.float64]


def smooth_chunks(count: int, seed: int = 0) -> Chunk:
    rng = np.random.default_rng(seed)
    time = np.linspace(0, 1, HORIZON)[None, :, None]
    return rng.uniform(-1, 1, (count, 1, ACTION_DIM)) * time ** rng.uniform(1, 3, (count, 1, 1))


# --- the slow tokenizer


def slow_coefficients(chunk_HA: Chunk) -> list[int]:
    """The sums that define the DCT-II, rounded half to even."""
    found = []
    for k in range(HORIZON):
        size = math.sqrt((1 if k == 0 else 2) / HORIZON)
        for a in range(ACTION_DIM):
            waves = (chunk_HA[n, a] * math.cos(math.pi * (2 * n + 1) * k / (2 * HORIZON)) for n in range(HORIZON))
            found.append(round(SCALE * size * sum(waves)))
    return found


def byte_symbols() -> dict[int, str]:
    """From the library's alphabet: symbols below 256 are their own bytes, the others come in order."""
    alphabet = set(ByteLevel.alphabet())
    others = iter(sorted(symbol for symbol in alphabet if ord(symbol) > 255))
    return {byte: chr(byte) if chr(byte) in alphabet else next(others) for byte in range(256)}


def slow_encode(folder: Path, chunk_HA: Chunk) -> list[int]:
    model = json.loads((folder / VOCABULARY).read_text())["model"]
    lowest = json.loads((folder / PROCESSOR).read_text())["min_token"]
    ranks = {tuple(merge): rank for rank, merge in enumerate(model["merges"])}
    symbols, ids = byte_symbols(), []
    for word in GPT2_WORDS.findall("".join(chr(c - lowest) for c in slow_coefficients(chunk_HA))):
        pieces = [symbols[byte] for byte in word.encode()]
        while pairs := [pair for pair in pairwise(pieces) if pair in ranks]:
            i = list(pairwise(pieces)).index(min(pairs, key=ranks.__getitem__))
            pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
        ids += [model["vocab"][piece] for piece in pieces]
    return ids


# --- a vocabulary in the published form


def publish(folder: Path, chunk_NHA: Chunk, lowest: int | None = None, **config: Any) -> Path:
    """Fitted as theirs was: characters from `lowest` on (theirs: the data's), merges of bytes that occur twice."""
    coefficients = [slow_coefficients(chunk_HA) for chunk_HA in chunk_NHA]
    lowest = min(map(min, coefficients)) if lowest is None else lowest
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer, bpe.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=1024,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=[chr(i) for i in range(max(map(max, coefficients)) - lowest + 1)],
        special_tokens=[],
    )
    bpe.train_from_iterator(("".join(chr(c - lowest) for c in row) for row in coefficients), trainer)
    folder.mkdir(exist_ok=True)
    bpe.save(str(folder / VOCABULARY))
    written = {"scale": SCALE, "min_token": lowest, "vocab_size": 1024, "time_horizon": None, "action_dim": None}
    (folder / PROCESSOR).write_text(json.dumps(written | {"processor_class": "UniversalActionProcessor"} | config))
    return folder


@pytest.fixture(scope="module", params=[None, UNIVERSAL_LOWEST], ids=["narrow", "universal"])
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(tmp_path_factory.mktemp("fast") / "published", smooth_chunks(600), request.param)


def load(folder: Path) -> FastTokenizer:
    return FastTokenizer.load_published(folder, HORIZON, ACTION_DIM)


def test_ids_are_those_of_the_slow_tokenizer(published: Path) -> None:
    fast = load(published)
    assert 300 < fast.vocab_size <= 1024
    for chunk_HA in smooth_chunks(60, seed=1):
        assert fast.count_clamped(chunk_HA) == 0
        ids = fast.encode(chunk_HA)
        assert ids == slow_encode(published, chunk_HA)
        assert len(ids) < HORIZON * ACTION_DIM, "merged"


def test_both_forms_have_the_same_coefficients(published: Path) -> None:
    ours, theirs = FastTokenizer.fit(smooth_chunks(600), vocab_size=512), load(published)
    bound = 0.5 / SCALE * math.sqrt(2 / HORIZON) * HORIZON
    for chunk_HA in smooth_chunks(60, seed=2):
        if ours.count_clamped(chunk_HA) == 0:
            back_HA = theirs.decode(theirs.encode(chunk_HA))
            np.testing.assert_array_equal(ours.decode(ours.encode(chunk_HA)), back_HA)
            assert np.rint(theirs.coefficients(back_HA)).ravel().tolist() == slow_coefficients(chunk_HA)
            assert np.abs(back_HA - chunk_HA).max() <= bound


def test_a_vocabulary_of_bytes_is_fitted_as_the_published_one_was(tmp_path: Path) -> None:
    """Its files can be published: whoever reads them has the same ids and the same actions."""
    fast = FastTokenizer.fit(smooth_chunks(600), vocab_size=700, byte_level=True)
    config = {"scale": SCALE, "min_token": fast.lowest, "vocab_size": 700}
    fast.bpe.save(str(tmp_path / VOCABULARY))
    (tmp_path / PROCESSOR).write_text(json.dumps(config))
    read = load(tmp_path)
    symbols = {read.bpe.id_to_token(i) for i in range(256)}
    assert 256 < fast.vocab_size <= 700 and symbols == set(byte_symbols().values())
    for chunk_HA in smooth_chunks(40, seed=5):
        ids = fast.encode(chunk_HA)
        assert ids == read.encode(chunk_HA) == slow_encode(tmp_path, chunk_HA)
        np.testing.assert_array_equal(fast.decode(ids), read.decode(ids))
        assert np.rint(fast.coefficients(fast.decode(ids))).ravel().tolist() == slow_coefficients(chunk_HA)


def test_bytes_write_what_no_chunk_of_the_fit_had(tmp_path: Path) -> None:
    fast = FastTokenizer.fit(smooth_chunks(100), vocab_size=300, byte_level=True)
    far = 40 * smooth_chunks(1, seed=6)[0]
    below = int((np.rint(fast.coefficients(far)) < fast.lowest).sum())
    assert fast.count_clamped(far) == below > 0, "below the lowest there is no character"
    expected = np.maximum(np.rint(fast.coefficients(far)), fast.lowest)
    np.testing.assert_array_equal(np.rint(fast.coefficients(fast.decode(fast.encode(far)))), expected)
    with pytest.raises(ConfigurationError, match="at least 256 tokens for merges of bytes, got 255"):
        FastTokenizer.fit(smooth_chunks(10), vocab_size=255, byte_level=True)


def test_an_id_stands_for_whole_coefficients_or_a_part_of_one(published: Path) -> None:
    fast = load(published)
    read = {token: fast.integers(token) for token in range(fast.vocab_size)}
    assert max(len(found) for found in read.values()) > 3
    assert {c for found in read.values() for c in found} <= set(fast.known.tolist())
    if fast.lowest != UNIVERSAL_LOWEST:  # one byte each: what ids stand for is what they decode to
        ids = fast.encode(smooth_chunks(1, seed=3)[0])
        assert [c for token in ids for c in read[token]] == slow_coefficients(smooth_chunks(1, seed=3)[0])
    else:
        assert [] in read.values(), "one byte of two is not a coefficient"


def test_malformed_ids_are_errors(published: Path) -> None:
    fast = load(published)
    ids = fast.encode(smooth_chunks(1, seed=4)[0])
    with pytest.raises(FastDecodeError, match=f"id {fast.vocab_size} at position 1"):
        fast.decode([ids[0], fast.vocab_size])
    for wrong in (ids[:-1], [*ids, *ids[-1:]], []):
        with pytest.raises(FastDecodeError, match="coefficients"):
            fast.decode(wrong)


def test_half_a_character_is_an_error_and_not_another_coefficient(tmp_path: Path) -> None:
    fast = load(publish(tmp_path / "f", smooth_chunks(200), UNIVERSAL_LOWEST))
    ids, first_byte = fast.encode(np.zeros((HORIZON, ACTION_DIM))), chr(0xC5)
    with pytest.raises(FastDecodeError, match="bytes that are not coefficients"):
        fast.decode([*ids, fast.bpe.token_to_id(first_byte)])
    # The fit put every character into the vocabulary as it is; those beyond the bytes' own can never be encoded.
    assert fast.bpe.token_to_id(chr(0x162)) is not None
    with pytest.raises(FastDecodeError, match="bytes that are not coefficients"):
        fast.decode([fast.bpe.token_to_id(chr(0x162))] * HORIZON * ACTION_DIM)


def test_coefficients_without_a_character_are_clamped_and_counted(tmp_path: Path) -> None:
    """Below the lowest, and where the fit never met a byte, which a byte-level BPE drops silently."""
    fast = load(publish(tmp_path / "narrow", smooth_chunks(20)))
    assert fast.known[0] == fast.lowest and fast.known[-1] < 1000
    low = np.zeros((HORIZON, ACTION_DIM))
    low[:, 1] = -40.0
    assert fast.count_clamped(low) == 1 and fast.count_clamped(np.stack([low, low])) == 2
    assert np.rint(fast.coefficients(fast.decode(fast.encode(low))))[0].tolist() == [0, fast.lowest, 0, 0]
    (unsaid,) = np.flatnonzero(np.diff(fast.known) > 1)[:1]
    below, above = fast.known[unsaid : unsaid + 2].tolist()
    gap = np.zeros((HORIZON, ACTION_DIM))
    gap[:, 0] = (below + 1) / SCALE / math.sqrt(HORIZON)
    assert fast.count_clamped(gap) == 1 and above > below + 1
    assert np.rint(fast.coefficients(fast.decode(fast.encode(gap))))[0].tolist() == [below, 0, 0, 0]


def test_a_run_takes_the_vocabulary_that_its_configuration_names(published: Path, tmp_path: Path) -> None:
    chunk_NHA, settings = smooth_chunks(50), tiny_run(tmp_path, steps=1)
    fitted = make_actions(TrainingConfig.model_validate(settings), [chunk_NHA, chunk_NHA[..., :3]])
    named = make_actions(TrainingConfig.model_validate(settings | {"fast_published": str(published)}), [chunk_NHA])
    assert fitted.vocab_size == 512 and not fitted.byte_level and fitted.action_dim == ACTION_DIM
    bytewise = make_actions(TrainingConfig.model_validate(settings | {"fast_merges": "bytes"}), [chunk_NHA])
    assert bytewise.byte_level and bytewise.encode(chunk_NHA[0]) != fitted.encode(chunk_NHA[0])
    assert named.bpe.get_vocab() == load(published).bpe.get_vocab() and named.lowest == load(published).lowest
    with pytest.raises(ConfigurationError, match=r"action_dim: expected 3, .*, got 4"):
        folder = publish(tmp_path / "other", smooth_chunks(30), action_dim=4)
        config = TrainingConfig.model_validate(settings | {"fast_published": str(folder)})
        make_actions(config, [chunk_NHA, chunk_NHA[..., :3]])


def test_training_from_scratch_orders_the_tokens_of_whole_coefficients(published: Path) -> None:
    fast, tokenizer = load(published), demo_tokenizer(1024)
    sizes = GemmaConfig(width=64, depth=1, mlp=8, heads=1, kv_heads=1, head_dim=8)
    vision = VisionConfig(image_size=4, patch_size=2, width=16, depth=1, heads=1, mlp=8)
    model = VLA(VLAConfig(vision, sizes, sizes, tokenizer.get_vocab_size(), ACTION_DIM, HORIZON))
    start = fast_ids(tokenizer)[0]
    before = model.backbone.embedding.weight.detach().clone()[start : start + fast.vocab_size]
    order_embeddings(model, tokenizer, fast)
    after = model.backbone.embedding.weight.detach()[start : start + fast.vocab_size]
    moved = (after != before).any(dim=1).tolist()
    assert moved == [bool(fast.integers(token)) for token in range(fast.vocab_size)] and after.isfinite().all()


# --- other files


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def normalise(folder: Path) -> None:
    bpe = Tokenizer.from_file(str(folder / VOCABULARY))
    bpe.normalizer = NFKC()
    bpe.save(str(folder / VOCABULARY))


def prefix_space(folder: Path) -> None:
    bpe = Tokenizer.from_file(str(folder / VOCABULARY))
    bpe.pre_tokenizer = ByteLevel(add_prefix_space=True)
    bpe.save(str(folder / VOCABULARY))


def add_token(folder: Path) -> None:
    bpe = Tokenizer.from_file(str(folder / VOCABULARY))
    bpe.add_special_tokens(["<pad>"])
    bpe.save(str(folder / VOCABULARY))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / VOCABULARY).unlink(), r"tokenizer\.json: expected a published FAST vocabulary"),
        (lambda f: (f / VOCABULARY).write_text("{"), r"tokenizer\.json: expected a published FAST vocabulary"),
        (lambda f: (f / PROCESSOR).unlink(), r"processor_config\.json: expected FAST's configuration as JSON"),
        (lambda f: (f / PROCESSOR).write_text("[1]"), "expected a JSON object, got list"),
        (lambda f: change(f / PROCESSOR, scale=0), r"scale: expected a number from 1e-06 to .*, got 0"),
        (lambda f: change(f / PROCESSOR, min_token=None), r"min_token: expected a whole number from .*, got None"),
        (lambda f: change(f / PROCESSOR, min_token=-1.5), r"min_token: expected a whole number from .*, got -1\.5"),
        (lambda f: change(f / PROCESSOR, time_horizon=50), "time_horizon: expected 10, .*, got 50"),
        (lambda f: change(f / PROCESSOR, action_dim=7), "action_dim: expected 4, .*, got 7"),
        (lambda f: change(f / PROCESSOR, vocab_size=20), "expected at most 20 tokens"),
        (normalise, "normalizer: expected Replace, got 'NFKC'"),
        (prefix_space, r"add_prefix_space: expected False, as in the published FAST vocabulary, got True"),
        (add_token, "added_tokens: expected"),
        (lambda f: Tokenizer(BPE()).save(str(f / VOCABULARY)), "pre_tokenizer: expected ByteLevel"),
    ],
)  # fmt: skip
def test_other_files_are_refused(tmp_path: Path, spoil: Any, message: str) -> None:
    folder = publish(tmp_path / "f", smooth_chunks(30))
    load(folder)
    spoil(folder)
    with pytest.raises(ConfigurationError, match=message):
        load(folder)
