"""A small vocabulary of byte pairs, fitted on the data's texts: any text can be written in it, known words are short.

The form is GPT-2's: merges of UTF-8 bytes within words. Numbers 0..255 are tokens of their own, with the space before
them, because a prompt has one for each number of the state.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from itertools import chain

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as FromBytes
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from training.tokens.prompt import STATE_BINS, begin_with_bos, end_block, plain_text, prompt_frame, start_block

BYTES = 256
LEAST_SIZE = 768
"""Special tokens, numbers and bytes, and some merges."""
_NUMBER = re.compile(r"\s*\b\d+\b")


def fit_bpe(
    texts: Iterable[str], *, size: int, queries: int, locations: int, action_ids: int, state_tokens: bool = False
) -> Tokenizer:
    """At most `size` tokens that a text can be made of, then `state_tokens`, `locations` and `action_ids`.

    Texts are read once.
    """
    start, numbers = start_block(queries), [str(n) for n in range(STATE_BINS)]
    alphabet = sorted(ByteLevel.alphabet())
    room = size - len({*start, *numbers, *alphabet})
    trainer = BpeTrainer(
        vocab_size=BYTES + room, show_progress=False, initial_alphabet=alphabet, special_tokens=[], max_token_length=32
    )
    fitted = Tokenizer(BPE())
    fitted.pre_tokenizer = ByteLevel(add_prefix_space=False)
    words = (_NUMBER.sub("", plain_text(text)) for text in chain((prompt_frame(),), texts))
    fitted.train_from_iterator(words, trainer)
    model = json.loads(fitted.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    end = end_block(locations, action_ids, state_tokens)
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*start, *numbers, *pieces, *end]))}
    made = Tokenizer(BPE(vocabulary, [(left, right) for left, right in model["merges"]]))
    made.pre_tokenizer, made.decoder = ByteLevel(add_prefix_space=False), FromBytes()
    made.post_processor = begin_with_bos(vocabulary)
    made.add_special_tokens(start)
    # Only whole numbers: 1024 is no 102 and 4.
    made.add_tokens([AddedToken(number, single_word=True, lstrip=True, normalized=False) for number in numbers])
    made.add_special_tokens(end)
    return made
