"""The demo's vocabulary: the words of its instructions, questions and answers, its locations and its actions."""

from __future__ import annotations

import re

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing

from ki_vla_ros.bundle import PAD_TOKEN, UNKNOWN_TOKEN
from training.tokens.prompt import BOS_TOKEN, EOS_TOKEN, fast_token, loc_token, token_id

ACT_QUERIES = 4
LOCATIONS = 32  # along one image axis
STATE_BINS = 256
DEMO_PROMPT = "Task: {task}, State: {state};\nAction: " + "".join(f"<act_query_{i}>" for i in range(ACT_QUERIES))

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
_TOKEN = r"\w+|[^\w\s]|\n"


def act_query_token(i: int) -> str:
    """The i-th learned readout token at the end of the prompt."""
    return f"<act_query_{i}>"


def build_tokenizer(fast_vocab: int = 512, text: str = "") -> Tokenizer:
    """A word-level tokenizer; `encode` puts <bos> first, unless add_special_tokens=False (answers after a prompt).

    It also knows the words of `text`.
    """
    numbers = [str(n) for n in range(STATE_BINS)]
    more = dict.fromkeys(word for word in re.findall(_TOKEN, text) if word not in {"\n", *WORDS, *numbers})
    start = [PAD_TOKEN, BOS_TOKEN, EOS_TOKEN, UNKNOWN_TOKEN, *(act_query_token(i) for i in range(ACT_QUERIES))]
    places = [loc_token(i) for i in range(LOCATIONS)]
    actions = [fast_token(i) for i in range(fast_vocab)]
    vocabulary = {token: i for i, token in enumerate([*start, "\n", *WORDS, *numbers, *more, *places, *actions])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN_TOKEN))
    # Runs of letters and digits, single punctuation marks and line breaks are tokens; other white space only separates.
    tokenizer.pre_tokenizer = Split(Regex(_TOKEN), behavior="removed", invert=True)
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS_TOKEN} $A", pair=None, special_tokens=[(BOS_TOKEN, vocabulary[BOS_TOKEN])]
    )
    tokenizer.add_special_tokens([*start, *places, *actions])
    return tokenizer


def act_query_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Vocabulary ids of the readout tokens in prompt order."""
    return tuple(token_id(tokenizer, act_query_token(i)) for i in range(ACT_QUERIES))
