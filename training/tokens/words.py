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
from training.tokens.prompt import STATE_BINS, begin_with_bos, end_block, plain_text, prompt_template, start_block

MOST_WORDS: Final = 1 << 17
# Runs of letters and digits, single punctuation marks and line breaks are tokens; other white space only separates.
_SPLIT: Final = Split(Regex(r"\w+|[^\w\s]|\n"), behavior="removed", invert=True)


def collect_words(texts: Iterable[str], *, queries: int, locations: int, action_ids: int) -> Tokenizer:
    """A token for each word of `texts` and of a robot's prompt, sorted; ConfigurationError if there are too many."""
    numbers = [str(n) for n in range(STATE_BINS)]
    frame = prompt_template(0).replace("{task}", " ").replace("{state}", " ")
    words: set[str] = set()
    for text in chain((frame,), texts):
        words.update(word for word, _ in _SPLIT.pre_tokenize_str(plain_text(text)))
        if len(words) > MOST_WORDS:
            raise ConfigurationError(
                f"vocabulary: expected at most {MOST_WORDS} words in the data, got more; take kind bpe"
            )
    tokens = [*start_block(queries), *sorted(words.difference(numbers)), *numbers, *end_block(locations, action_ids)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN_TOKEN))
    tokenizer.pre_tokenizer = _SPLIT
    tokenizer.post_processor = begin_with_bos(vocabulary)
    tokenizer.add_special_tokens([*start_block(queries), *end_block(locations, action_ids)])
    return tokenizer


# What follows is the demo's vocabulary, until its run makes one from its data.
ACT_QUERIES = 4
LOCATIONS = 32  # along one image axis
DEMO_PROMPT = prompt_template(ACT_QUERIES)
# Leave out words that no training sample uses: their embeddings mean nothing, so the robot should refuse them.
_WORD_TEXT = (
    # instructions
    "touch point at red green blue yellow purple white cube ball disc pole "
    # the frame of a prompt
    "Task State Action Question Answer Caption Locate "
    # captions, questions and answers
    "a an the and or of on in to with from is are there here it this that no not yes none any all only "
    "what which where how many colour shape kind object objects thing things scene image picture camera table robot "
    "arm left right top bottom middle front back near far behind beside between above below next leftmost rightmost "
    "nearest farthest closest most than other same different describe count list find locate name "
    # punctuation, one token each
    "? . , : ; ! ' - ( ) /"
)
WORDS = tuple(_WORD_TEXT.split())


def build_tokenizer(fast_vocab: int = 512, text: str = "") -> Tokenizer:
    """A word-level tokenizer of the demo's words and those of `text`."""
    return collect_words((" ".join(WORDS), text), queries=ACT_QUERIES, locations=LOCATIONS, action_ids=fast_vocab)
