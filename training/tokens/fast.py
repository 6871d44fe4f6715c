"""FAST action tokens (arXiv 2501.09747): cosine transform, rounding, byte-pair encoding.

A chunk in about [-1, 1] becomes H x A integer coefficients, those of all dimensions' lowest frequency first, and then a
short sequence of ids in [0, vocab_size). Each coefficient is one character of the text that is byte-pair encoded, in
one of two forms that have the same coefficients:

    ours        character FIRST_CHARACTER + coefficient - lowest; merges of characters, fitted on the training chunks
    bytes       character coefficient - lowest; merges of the UTF-8 bytes of these characters, within the words that
                GPT-2's pattern sees in them: the published form (Hugging Face's physical-intelligence/fast:
                tokenizer.json and processor_config.json), read from there or fitted in the same way

Ids are FAST's own; `training.tokens.prompt` maps them to ids of the language model's vocabulary.
Legend: N chunks, H horizon, A action dim.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as FromBytes
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from ki_vla_ros.bundle import load_tokenizer
from ki_vla_ros.errors import ConfigurationError, short_repr
from ki_vla_ros.files import read_json

FIRST_CHARACTER = 0x4E00
"""The first of a long run of assigned letters: any coefficient range fits, none is a space or a control code."""
LAST_CHARACTER = 0xD7FF
"""The last one before the surrogates, which have no UTF-8 form."""
MOST_CLAMPED = 0.01  # of the coefficients, when a vocabulary is fitted
SMALLEST, LARGEST = 1e-6, 10**7  # of the numbers in a published configuration
VOCABULARY, PROCESSOR = "tokenizer.json", "processor_config.json"  # of the published form


class FastDecodeError(ValueError):
    """Ids that do not make a chunk: an unknown id, bytes that are not text, or not H x A coefficients."""


def cosine_basis(horizon: int) -> NDArray[np.float64]:
    """Orthonormal DCT-II matrix [H, H], row k for frequency k: `basis @ x` transforms, `basis.T @ c` inverts."""
    time = (np.arange(horizon) + 0.5) / horizon
    basis = np.sqrt(2.0 / horizon) * np.cos(np.pi * np.arange(horizon)[:, None] * time[None, :])
    basis[0] /= np.sqrt(2.0)
    return basis


@dataclass(frozen=True)
class FastTokenizer:
    """FAST for chunks of one shape: `fit` makes it from the training chunks, `load_published` reads one from disk."""

    horizon: int
    action_dim: int
    scale: float
    lowest: int
    highest: int
    bpe: Tokenizer
    byte_level: bool = False
    """The published form. Bytes write any coefficient from `lowest` on, so `highest` is what a character can be."""
    ends: bool = False
    """No merges: a token for each coefficient, and in place of the zeros at a chunk's end one more, the last."""

    @classmethod
    def fit(
        cls,
        *chunks_NHA: NDArray[np.floating],
        vocab_size: int,
        scale: float = 10.0,
        byte_level: bool = False,
        merged: int | None = None,
        ends: bool = False,
    ) -> FastTokenizer:
        """Fit range and merges on normalised chunks; several arrays may have different shapes (`for_shape`).

        Where outliers make the range larger than the vocabulary, half of it is kept for merges, and coefficients beyond
        what the other half can express are clamped (`count_clamped`); ConfigurationError if those are too many.
        `byte_level`: as the published vocabulary was fitted, of which 256 tokens are the bytes. `merged`: at most so
        many tokens stand for more than one coefficient (or byte). `ends`: nothing is merged, but for the zeros at a
        chunk's end, which are one token of any length.
        """
        if not sum(len(chunk_NHA) for chunk_NHA in chunks_NHA):
            raise ConfigurationError("FAST: expected chunks to fit the vocabulary on, got none")
        coefficients = [
            np.rint(scale * (cosine_basis(chunk_NHA.shape[1]) @ chunk_NHA.astype(np.float64))).astype(np.int64)
            for chunk_NHA in chunks_NHA
        ]
        lowest = min(int(found.min()) for found in coefficients if found.size)
        highest = max(int(found.max()) for found in coefficients if found.size)
        _, horizon, action_dim = chunks_NHA[0].shape
        merged = 0 if ends else vocab_size if merged is None else merged
        if byte_level:
            if vocab_size < len(BYTES):
                raise ConfigurationError(
                    f"FAST: expected a vocabulary of at least {len(BYTES)} tokens for merges of bytes, got {vocab_size}"
                )
            bpe = _merge_bytes(coefficients, lowest, min(vocab_size, len(BYTES) + merged))
            return cls(horizon, action_dim, scale, lowest, lowest + LAST_CHARACTER, bpe, byte_level=True)
        if highest - lowest + 1 + ends > vocab_size:
            most = max(1, vocab_size // 2 - 1) // 2
            lowest, highest = -most, most
        beyond = sum(int(((found < lowest) | (found > highest)).sum()) for found in coefficients)
        every = sum(found.size for found in coefficients)
        if beyond > MOST_CLAMPED * every:
            raise ConfigurationError(
                f"FAST: expected at most {MOST_CLAMPED:.0%} of the coefficients beyond {lowest}..{highest}, which is "
                f"what half of a vocabulary of {vocab_size} can express, got {beyond / every:.1%}; enlarge the "
                f"vocabulary, lower the scale ({scale}), or look at the normalisation"
            )
        bpe = Tokenizer(BPE())
        trainer = BpeTrainer(
            vocab_size=min(vocab_size, highest - lowest + 1 + merged),
            show_progress=False,
            initial_alphabet=[chr(FIRST_CHARACTER + i) for i in range(highest - lowest + 1)],
            special_tokens=[],
        )
        texts = (
            _to_text(np.clip(row.ravel(), lowest, highest) - lowest, FIRST_CHARACTER)
            for found in coefficients
            for row in found
        )
        bpe.train_from_iterator(texts, trainer=trainer, length=sum(len(found) for found in coefficients))
        return cls(horizon, action_dim, scale, lowest, highest, bpe, ends=ends)

    def for_shape(self, horizon: int, action_dim: int) -> FastTokenizer:
        """The same vocabulary for chunks [horizon, action_dim]."""
        return replace(self, horizon=horizon, action_dim=action_dim)

    @classmethod
    def load_published(cls, folder: Path, horizon: int, action_dim: int) -> FastTokenizer:
        """The vocabulary in `folder`, for chunks [horizon, action_dim]; the universal one fits chunks of any shape.

        ConfigurationError if the files have another form, or are for chunks of another shape.
        """
        bpe, config = read_vocabulary(folder / VOCABULARY), read_processor(folder / PROCESSOR)
        for key, expected in (("time_horizon", horizon), ("action_dim", action_dim)):
            if config.get(key) not in (None, expected):
                raise ConfigurationError(
                    f"{folder / PROCESSOR}: {key}: expected {expected}, as the data has it, or null, got "
                    f"{config[key]}; take a vocabulary that was fitted on chunks of this shape, or the universal one"
                )
        size, most = bpe.get_vocab_size(), config.get("vocab_size")
        if most is not None and size > most:
            raise ConfigurationError(
                f"{folder / VOCABULARY}: expected at most {most} tokens, as {PROCESSOR} says, got {size}; do both "
                "files belong together?"
            )
        lowest = config["min_token"]
        found = cls(horizon, action_dim, float(config["scale"]), lowest, lowest + LAST_CHARACTER, bpe, byte_level=True)
        if not len(found.known):
            raise ConfigurationError(f"{folder / VOCABULARY}: expected the bytes of at least one coefficient, got none")
        return found

    @property
    def numbers(self) -> int:
        """How many coefficients a chunk is written as."""
        return self.horizon * self.action_dim

    @property
    def vocab_size(self) -> int:
        return int(self.bpe.get_vocab_size()) + self.ends

    @cached_property
    def known(self) -> NDArray[np.int64]:
        """The coefficients that the vocabulary can express, in rising order.

        A published vocabulary may lack bytes that no chunk had when it was fitted; the BPE drops those in silence.
        """
        every = np.arange(self.lowest, self.highest + 1)
        if not self.byte_level:
            return every
        vocabulary = self.bpe.get_vocab()
        has_bytes = [
            all(BYTE_SYMBOLS[byte] in vocabulary for byte in chr(symbol).encode()) for symbol in range(len(every))
        ]
        return every[has_bytes]

    def coefficients(self, chunk_HA: NDArray[np.floating]) -> NDArray[np.float64]:
        """Scaled, unrounded DCT coefficients [..., H, A] of normalised chunks [..., H, A]."""
        expected = (self.horizon, self.action_dim)
        if chunk_HA.shape[-2:] != expected or not np.isfinite(chunk_HA).all():
            raise ValueError(f"FAST: expected finite chunks of shape {expected}, got {chunk_HA.shape}")
        return self.scale * (cosine_basis(self.horizon) @ chunk_HA.astype(np.float64))

    def count_clamped(self, chunk_HA: NDArray[np.floating]) -> int:
        """How many coefficients of these chunks the vocabulary cannot express; `encode` takes the nearest it can."""
        return int((~np.isin(np.rint(self.coefficients(chunk_HA)), self.known)).sum())

    def encode(self, chunk_HA: NDArray[np.floating]) -> list[int]:
        """Ids of one normalised chunk [H, A]; coefficients it cannot express are clamped, see `count_clamped`."""
        coefficients = _nearest(np.rint(self.coefficients(chunk_HA)).ravel(), self.known)
        written = len(coefficients)
        if self.ends:
            written -= int((np.cumsum(coefficients[::-1] != 0) == 0).sum())
        text = _to_text(coefficients[:written] - self.lowest, self.first_character)
        end = [self.vocab_size - 1] * (written < len(coefficients))
        return [*self.bpe.encode(text, add_special_tokens=False).ids, *end]

    @property
    def first_character(self) -> int:
        """The code point that stands for the lowest coefficient."""
        return 0 if self.byte_level else FIRST_CHARACTER

    def integers(self, token: int) -> list[int]:
        """The coefficients that one id stands for, in order: one, or several that were merged.

        An id of a published vocabulary may also be a part of a coefficient, which does not count. The end stands for at
        most a whole chunk of zeros.
        """
        if self.ends and token == self.vocab_size - 1:
            return [0] * self.numbers
        piece = self._piece(token)
        text = _to_bytes(piece).decode(errors="ignore") if self.byte_level else piece
        return [ord(character) - self.first_character + self.lowest for character in text]

    def decode(self, ids: Sequence[int]) -> NDArray[np.float64]:
        """The normalised chunk [H, A] of these ids; FastDecodeError if they are not exactly one chunk."""
        ended = self.ends and len(ids) > 0 and ids[-1] == self.vocab_size - 1
        ids, given = ids[: len(ids) - ended], len(ids)
        text = "".join(self._piece(token, f" at position {position}") for position, token in enumerate(ids))
        if self.byte_level:
            try:
                text = _to_bytes(text).decode()
            except ValueError as error:
                raise FastDecodeError(f"FAST: {len(ids)} ids hold bytes that are not coefficients ({error})") from None
        if ended and len(text) < self.numbers:
            text += chr(self.first_character - self.lowest) * (self.numbers - len(text))
        elif ended or len(text) != self.numbers:
            more = " before the end" if ended else ""
            raise FastDecodeError(
                f"FAST: expected {self.horizon} x {self.action_dim} = {self.numbers} coefficients, got {len(text)} in "
                f"{given} ids{more}"
            )
        symbols = np.array([ord(character) - self.first_character for character in text], dtype=np.float64)
        coefficient_HA = (symbols + self.lowest).reshape(self.horizon, self.action_dim) / self.scale
        return cosine_basis(self.horizon).T @ coefficient_HA

    def _piece(self, token: int, where: str = "") -> str:
        if self.ends and token == self.vocab_size - 1:
            raise FastDecodeError(f"FAST: expected the end after all coefficients, got it{where}")
        piece: str | None = self.bpe.id_to_token(int(token)) if 0 <= token < self.vocab_size else None
        if piece is None:
            raise FastDecodeError(f"FAST: expected ids in 0..{self.vocab_size - 1}, got id {token}{where}")
        return piece


def _merge_bytes(coefficients: Sequence[NDArray[np.int64]], lowest: int, vocab_size: int) -> Tokenizer:
    """Merges of bytes that follow each other at least twice, of any length, as published."""
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer, bpe.decoder = ByteLevel(add_prefix_space=False), FromBytes()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=BYTE_SYMBOLS,
        special_tokens=[],
        max_token_length=10_000,
    )
    texts = (_to_text(row.ravel() - lowest, 0) for found in coefficients for row in found)
    bpe.train_from_iterator(texts, trainer=trainer)
    return bpe


def read_vocabulary(path: Path) -> Tokenizer:
    """A byte-level BPE that leaves the text unchanged; ConfigurationError if the file holds another tokenizer."""
    try:
        bpe = load_tokenizer(path)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{path}: expected a published FAST vocabulary ({VOCABULARY} and {PROCESSOR}), got none ({error})"
        ) from error
    form = json.loads(bpe.to_str())
    words = form["pre_tokenizer"] or {}
    for what, expected, got in (
        ("model", "BPE", form["model"]["type"]),
        ("pre_tokenizer", "ByteLevel", words.get("type")),
        ("pre_tokenizer.add_prefix_space", False, words.get("add_prefix_space")),
        ("normalizer", None, form["normalizer"]),
        ("added_tokens", [], form["added_tokens"]),
    ):
        if got != expected:
            raise ConfigurationError(
                f"{path}: {what}: expected {expected}, as in the published FAST vocabulary, got {got}; is it the "
                "tokenizer of another model?"
            )
    bpe.no_truncation()
    bpe.no_padding()
    return bpe


def read_processor(path: Path) -> dict[str, Any]:
    """The configuration: `scale` and `min_token`; `vocab_size`, `time_horizon`, `action_dim` may be missing or null."""
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path}: expected FAST's configuration as JSON, got none ({error})") from error
    if not isinstance(config, dict):
        raise ConfigurationError(f"{path}: expected a JSON object, got {type(config).__name__}")
    for key, kinds, needed in (
        ("scale", (int, float), True),
        ("min_token", (int,), True),
        ("vocab_size", (int,), False),
        ("time_horizon", (int,), False),
        ("action_dim", (int,), False),
    ):
        got = config.get(key)
        if got is None and not needed:
            continue
        lowest = -LARGEST if key == "min_token" else SMALLEST
        if isinstance(got, bool) or not isinstance(got, kinds) or not lowest <= got <= LARGEST:
            wanted = "number" if float in kinds else "whole number"
            raise ConfigurationError(
                f"{path}: {key}: expected a {wanted} from {lowest:g} to {LARGEST:g}, got {short_repr(got)}"
            )
    return config


def _nearest(values_N: NDArray[np.floating], known: NDArray[np.int64]) -> NDArray[np.int64]:
    """The nearest known value to each; `known` is sorted."""
    above = np.searchsorted(known, values_N).clip(1, len(known) - 1)
    low, high = known[above - 1], known[above]
    return np.where(values_N - low <= high - values_N, low, high)


def _to_text(symbols: NDArray[np.int64], first_character: int) -> str:
    return "".join(chr(first_character + int(symbol)) for symbol in symbols)


def _byte_symbols() -> list[str]:
    """The character that a byte-level BPE writes for each byte, as in GPT-2.

    Printable bytes are written as themselves, the others as the characters from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


BYTE_SYMBOLS = _byte_symbols()
BYTES = {symbol: byte for byte, symbol in enumerate(BYTE_SYMBOLS)}


def _to_bytes(text: str) -> bytes:
    """The bytes that a piece of a byte-level BPE stands for; 0xFF, which is not UTF-8, for any other character."""
    return bytes(BYTES.get(symbol, 0xFF) for symbol in text)
