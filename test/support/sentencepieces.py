"""A small sentencepiece model trained like PaliGemma's, for the tests of the tokenizer and of the import."""

from __future__ import annotations

import io
from collections.abc import Sequence

import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto

PLACES, SEGMENTS = 6, 4
TEXT = """Pick up the red cube and place it in the bowl. Pick up the blue cup, then put it on the plate!
Task: fold the towel, State: 127 128 3 255 0;
Action: Open the drawer; close the drawer. stack the plates stack the cups, wipe the table with the sponge
naïve café über straße, señor — the robot's gripper is half-open (3.5 cm); move 10 cm left, 20 cm right.
picking placing putting opening closing stacking folding wiping pouring pushing pulling lifting turning
aaaa aaaaa aaa abab ababab banana bananas\tcabbage
if (x) {\n    return 42;\n}\n
"""


def train(texts: Sequence[str] = (), **changes: object) -> ModelProto:
    """Gemma's settings: digits apart, bytes for unknown characters, nothing normalised; places and segments last.

    `texts` are further ones to learn from.
    """
    settings: dict[str, object] = {
        "model_type": "bpe",
        "vocab_size": 540,
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "user_defined_symbols": ["<mask>", "\n", "\n\n", "\u2581\u2581", "\u2581\u2581\u2581\u2581", "<table>"],
        "pad_id": 0,
        "eos_id": 1,
        "bos_id": 2,
        "unk_id": 3,
        "pad_piece": "<pad>",
        "eos_piece": "<eos>",
        "bos_piece": "<bos>",
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    file = io.BytesIO()
    sentences = [line for text in (TEXT, *texts) for line in text.split("\n") if line] * 4
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=file, **{**settings, **changes}
    )
    model = ModelProto.FromString(file.getvalue())
    for name in [f"<loc{i:04d}>" for i in range(PLACES)] + [f"<seg{i:03d}>" for i in range(SEGMENTS)]:
        model.pieces.add(piece=name, score=0.0, type=ModelProto.SentencePiece.USER_DEFINED)
    return model
