"""PaliGemma's tokenizer for our prompts: from its sentencepiece file, or from Hugging Face's tokenizer.json.

Either becomes a `tokenizers` BPE that gives the same ids: spaces are written as U+2581, characters outside the
vocabulary as their bytes, and `encode` puts <bos> first. Our own action tokens, if asked for, come after the places
<loc0000>.. and segments <seg000>..
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteFallback, Fuse, Replace, Sequence
from tokenizers.models import BPE
from tokenizers.normalizers import Replace as ReplaceText
from tokenizers.processors import TemplateProcessing

from ki_vla_ros.bundle import LARGEST_TOKENIZER, PAD_TOKEN, UNKNOWN_TOKEN, make_tokenizer
from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.files import parse_json, read_file
from training.tokens.prompt import BOS_TOKEN, EOS_TOKEN, own_tokens, paligemma_loc_token

LONGEST_PIECE = 1000
VOCABULARY = 257_152
"""Gemma's 256,000 tokens, 1,024 places <loc0000>.., 128 segments <seg000>.."""

SPACE = "\u2581"


def read_tokenizer(
    path: Path, action_ids: int = 0, vocabulary: int = VOCABULARY, state_tokens: bool = False
) -> Tokenizer:
    """The tokenizer at `path` (.model or .json) with `vocabulary` tokens.

    Our own follow: one for each bin of the state with `state_tokens`, and `action_ids`.
    """
    if path.is_dir():
        raise ConfigurationError(f"{path}: expected a tokenizer's file (.model or .json), got a folder")
    try:
        content = read_file(path, LARGEST_TOKENIZER)
    except OSError as error:
        raise ConfigurationError(
            f"{path}: expected PaliGemma's tokenizer (.model or .json), got none ({error})"
        ) from error
    tokenizer = from_json(content, path, vocabulary) if path.suffix == ".json" else from_sentencepiece(content, path)
    vocab = tokenizer.get_vocab()
    if sorted(vocab.values()) != list(range(vocabulary)):
        raise ConfigurationError(
            f"{path}: expected the tokens 0..{vocabulary - 1}, got {len(vocab)} up to {max(vocab.values())}; "
            "is it the tokenizer of another model?"
        )
    for token in (PAD_TOKEN, BOS_TOKEN, EOS_TOKEN, UNKNOWN_TOKEN, paligemma_loc_token(0)):
        if token not in vocab:
            raise ConfigurationError(
                f"{path}: expected the token {token}, got none; is it the tokenizer of Gemma alone?"
            )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS_TOKEN} $A", pair=None, special_tokens=[(BOS_TOKEN, vocab[BOS_TOKEN])]
    )
    tokenizer.add_special_tokens(own_tokens(action_ids, state_tokens))
    return tokenizer


def from_json(content: bytes, path: Path, vocabulary: int) -> Tokenizer:
    """The tokenizer in Hugging Face's file, without the tokens that follow the vocabulary (<image>)."""
    try:
        description = parse_json(content, LARGEST_TOKENIZER)
        kind = description["model"]["type"], description["model"]["byte_fallback"]
        added = [token for token in description["added_tokens"] if token["id"] < vocabulary]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"{path}: expected a file of the tokenizers library, got another ({error})") from error
    if kind != ("BPE", True):
        raise ConfigurationError(f"{path}: expected a BPE with byte_fallback, got {kind[0]} with {kind[1]}")
    description["added_tokens"] = added
    try:
        return make_tokenizer(json.dumps(description).encode())
    except ValueError as error:
        raise ConfigurationError(f"{path}: expected a file of the tokenizers library, got another ({error})") from error


def from_sentencepiece(content: bytes, path: Path) -> Tokenizer:
    """A BPE with the ids of a sentencepiece model that normalises nothing, as Gemma's.

    sentencepiece joins the neighbours whose joint piece has the best score; so each way to cut a piece in two is a
    merge, ranked by the piece's score. User-defined pieces are matched first, whole, the longest first; control and
    byte pieces are never matched in the text.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]  # made when imported

    model = ModelProto()
    try:
        model.ParseFromString(content)
    except DecodeError as error:
        raise ConfigurationError(f"{path}: expected a sentencepiece model, got something else ({error})") from error
    refuse_other_forms(model, path)
    kinds = model.SentencePiece
    vocab = {piece.piece: i for i, piece in enumerate(model.pieces)}
    if not all(isinstance(piece, str) for piece in vocab):  # protobuf gives bytes where they are no UTF-8
        raise ConfigurationError(f"{path}: expected pieces of text, got bytes; is the file damaged?")
    if len(vocab) != len(model.pieces):
        raise ConfigurationError(f"{path}: expected each piece once, got {len(model.pieces) - len(vocab)} twice")
    normal = [(piece.piece, piece.score) for piece in model.pieces if piece.type == kinds.NORMAL]
    unknown = next((piece.piece for piece in model.pieces if piece.type == kinds.UNKNOWN), None)
    tokenizer = Tokenizer(BPE(vocab, list(merges(normal)), unk_token=unknown, byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = ReplaceText(" ", SPACE)
    tokenizer.decoder = Sequence([Replace(SPACE, " "), ByteFallback(), Fuse()])
    whole = [piece.piece for piece in model.pieces if piece.type == kinds.USER_DEFINED]
    tokenizer.add_tokens([AddedToken(piece, normalized=True, special=False) for piece in whole])
    return tokenizer


def refuse_other_forms(model: Any, path: Path) -> None:
    trainer, normalizer, kinds = model.trainer_spec, model.normalizer_spec, model.SentencePiece
    for what, expected, got in (
        ("pieces", True, bool(model.pieces)),
        ("BPE", True, trainer.model_type == trainer.BPE),
        ("byte_fallback", True, trainer.byte_fallback),
        ("a table of normalised characters", False, bool(normalizer.precompiled_charsmap)),
        ("add_dummy_prefix", False, normalizer.add_dummy_prefix),
        ("remove_extra_whitespaces", False, normalizer.remove_extra_whitespaces),
        ("escape_whitespaces", True, normalizer.escape_whitespaces),
        ("treat_whitespace_as_suffix", False, trainer.treat_whitespace_as_suffix),
        ("unused pieces", False, any(piece.type == kinds.UNUSED for piece in model.pieces)),
    ):
        if got != expected:
            words = ("without", "with")
            raise ConfigurationError(
                f"{path}: expected a sentencepiece model {words[expected]} {what}, as PaliGemma's, got one {words[got]}"
            )


def merges(normal: Iterable[tuple[str, float]]) -> Iterable[tuple[str, str]]:
    """Pairs of normal pieces that make a normal piece, best first."""
    scores = dict(normal)
    for piece in sorted(scores, key=lambda piece: -scores[piece]):
        if len(piece) > LONGEST_PIECE:  # each is cut in every place
            raise ConfigurationError(f"sentencepiece model: expected pieces of at most {LONGEST_PIECE} characters")
        for cut in range(1, len(piece)):
            if piece[:cut] in scores and piece[cut:] in scores:
                yield piece[:cut], piece[cut:]
