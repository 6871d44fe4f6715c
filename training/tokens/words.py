"""A vocabulary of words: those of the data and no others, so a robot refuses an instruction that means nothing."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Final

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from ki_vla_ros.bundle import UNKNOWN_TOKEN
from ki_vla_ros.errors import ConfigurationError
from training.tokens.prompt import STATE_BINS, begin_with_bos, end_block, plain_text, prompt_frame, start_block

MOST_WORDS: Final = 1 << 17
# Runs of letters and digits, single punctuation marks and line breaks are tokens; other white space only separates.
_SPLIT: Final = Split(Regex(r"\w+|[^\w\s]|\n"), behavior="removed", invert=True)


def collect_words(
    texts: Iterable[str], *, queries: int, locations: int, action_ids: int, state_tokens: bool = False
) -> Tokenizer:
    """A token for each word of `texts` and of a robot's prompt, sorted; ConfigurationError if there are too many."""
    numbers = [str(n) for n in range(STATE_BINS)]
    words: set[str] = set()
    for text in chain((prompt_frame(),), texts):
        words.update(word for word, _ in _SPLIT.pre_tokenize_str(plain_text(text)))
        if len(words) > MOST_WORDS:
            raise ConfigurationError(
                f"vocabulary: expected at most {MOST_WORDS} words in the data, got more; take kind bpe"
            )
    end = end_block(locations, action_ids, state_tokens)
    tokens = [*start_block(queries), *sorted(words.difference(numbers)), *numbers, *end]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN_TOKEN))
    tokenizer.pre_tokenizer = _SPLIT
    tokenizer.post_processor = begin_with_bos(vocabulary)
    tokenizer.add_special_tokens([*start_block(queries), *end])
    return tokenizer
