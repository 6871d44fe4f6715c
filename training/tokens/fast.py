"""FAST action tokens (arXiv 2501.09747): cosine transform, rounding, byte-pair encoding.

Legend: N chunks, H horizon, A action dim. A chunk in about [-1, 1] becomes H x A integer coefficients, lowest frequency
of all dimensions first, and then a short sequence of ids in [0, vocab_size). Ids are FAST's own;
`training.tokens.prompt` names their places in the language model's vocabulary, apart from the location tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

FIRST_CHARACTER = (
    0x4E00  # a long run of assigned letters: any coefficient range fits, none is a space or a control code
)


class FastDecodeError(ValueError):
    """Ids that are no chunk: unknown id, or another number of coefficients than H x A."""


def cosine_basis(horizon: int) -> NDArray[np.float64]:
    """Orthonormal DCT-II matrix [H, H]:

    row k is frequency k, so that `basis @ x` transforms and `basis.T @ c` inverts.
    """
    time = (np.arange(horizon) + 0.5) / horizon
    basis = np.sqrt(2.0 / horizon) * np.cos(np.pi * np.arange(horizon)[:, None] * time[None, :])
    basis[0] /= np.sqrt(2.0)
    return basis


@dataclass(frozen=True)
class FastTokenizer:
    """Fitted on the training chunks; `fit` makes one, `save` and `load` keep it."""

    horizon: int
    action_dim: int
    scale: float
    lowest: int
    highest: int
    bpe: Tokenizer

    @classmethod
    def fit(cls, chunk_NHA: NDArray[np.floating], *, vocab_size: int, scale: float = 10.0) -> FastTokenizer:
        """Fit range and merges on normalised chunks.

        Raises ValueError when the coefficient range alone does not fit the vocabulary.
        """
        _, horizon, action_dim = chunk_NHA.shape
        coefficient_NHA = np.rint(scale * (cosine_basis(horizon) @ chunk_NHA.astype(np.float64))).astype(np.int64)
        lowest, highest = int(coefficient_NHA.min()), int(coefficient_NHA.max())
        if highest - lowest + 1 > vocab_size:
            raise ValueError(
                f"FAST: coefficients span {lowest}..{highest}, {highest - lowest + 1} symbols, but the vocabulary has "
                f"{vocab_size}; enlarge it, lower the scale ({scale}), or normalise the actions"
            )
        bpe = Tokenizer(BPE())
        trainer = BpeTrainer(
            vocab_size=vocab_size,
            show_progress=False,
            initial_alphabet=[chr(FIRST_CHARACTER + i) for i in range(highest - lowest + 1)],
            special_tokens=[],
        )
        texts = (_to_text(row.ravel() - lowest) for row in coefficient_NHA)
        bpe.train_from_iterator(texts, trainer=trainer, length=len(coefficient_NHA))
        return cls(horizon, action_dim, scale, lowest, highest, bpe)

    @property
    def vocab_size(self) -> int:
        return int(self.bpe.get_vocab_size())

    @property
    def error_bound(self) -> float:
        """Largest |decode(encode(x)) - x| for a chunk whose coefficients lie in the fitted range."""
        return float(0.5 / self.scale * np.abs(cosine_basis(self.horizon)).sum(axis=0).max())

    def coefficients(self, chunk_HA: NDArray[np.floating]) -> NDArray[np.float64]:
        """Scaled, unrounded DCT coefficients [..., H, A] of normalised chunks [..., H, A]."""
        expected = (self.horizon, self.action_dim)
        if chunk_HA.shape[-2:] != expected or not np.isfinite(chunk_HA).all():
            raise ValueError(f"FAST: expected finite chunks of shape {expected}, got {chunk_HA.shape}")
        return self.scale * (cosine_basis(self.horizon) @ chunk_HA.astype(np.float64))

    def count_clamped(self, chunk_HA: NDArray[np.floating]) -> int:
        """How many coefficients of these chunks lie outside the fitted range and are clamped by `encode`."""
        rounded = np.rint(self.coefficients(chunk_HA))
        return int(((rounded < self.lowest) | (rounded > self.highest)).sum())

    def encode(self, chunk_HA: NDArray[np.floating]) -> list[int]:
        """Ids of one normalised chunk [H, A].

        Coefficients outside the fitted range are clamped; see `count_clamped`.
        """
        rounded = np.rint(self.coefficients(chunk_HA)).astype(np.int64)
        symbols = np.clip(rounded, self.lowest, self.highest).ravel() - self.lowest
        return list(self.bpe.encode(_to_text(symbols)).ids)

    def integers(self, token: int) -> list[int]:
        """The coefficients that one id stands for, in order; one, or several that were merged."""
        return [ord(character) - FIRST_CHARACTER + self.lowest for character in self.bpe.id_to_token(token)]

    def decode(self, ids: Sequence[int]) -> NDArray[np.float64]:
        """The normalised chunk [H, A] of these ids; FastDecodeError when they are not exactly one chunk."""
        pieces = []
        for position, token in enumerate(ids):
            piece = self.bpe.id_to_token(int(token)) if 0 <= token < self.vocab_size else None
            if piece is None:
                raise FastDecodeError(f"FAST: id {token} at position {position} is not in 0..{self.vocab_size - 1}")
            pieces.append(piece)
        text = "".join(pieces)
        if len(text) != self.horizon * self.action_dim:
            raise FastDecodeError(
                f"FAST: {len(ids)} ids hold {len(text)} coefficients, expected {self.horizon} x {self.action_dim} = "
                f"{self.horizon * self.action_dim}"
            )
        symbols = np.array([ord(character) - FIRST_CHARACTER for character in text], dtype=np.float64)
        coefficient_HA = (symbols + self.lowest).reshape(self.horizon, self.action_dim) / self.scale
        return cosine_basis(self.horizon).T @ coefficient_HA

    def save(self, path: Path) -> None:
        path.write_text(
            json.dumps(
                {
                    "horizon": self.horizon,
                    "action_dim": self.action_dim,
                    "scale": self.scale,
                    "lowest": self.lowest,
                    "highest": self.highest,
                    "bpe": json.loads(self.bpe.to_str()),
                }
            )
        )

    @classmethod
    def load(cls, path: Path) -> FastTokenizer:
        data = json.loads(path.read_text())
        bpe = Tokenizer.from_str(json.dumps(data.pop("bpe")))
        return cls(bpe=bpe, **data)


def _to_text(symbols: NDArray[np.int64]) -> str:
    return "".join(chr(FIRST_CHARACTER + int(symbol)) for symbol in symbols)
