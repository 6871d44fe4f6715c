"""The demo's vocabulary: the words of its instructions, questions and answers, and own tokens for places and actions.

Ids that a prompt can contain come first, in one block: the exported prefill graph carries the embedding rows of that
block only, so location and action (FAST) tokens cannot even be expressed on the robot. PaliGemma's vocabulary
(paligemma_tokenizer.py) has the same order.
"""

from __future__ import annotations

import json

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing

from ki_vla_ros.bundle.manifest import PAD_TOKEN, UNKNOWN_TOKEN

BOS_TOKEN = "<bos>"
EOS_TOKEN = "<eos>"
ACT_QUERIES = 4
LOCATIONS = 32
STATE_BINS = 256
DEMO_PROMPT = "Task: {task}, State: {state};\nAction: " + "".join(f"<act_query_{i}>" for i in range(ACT_QUERIES))

# A word that no training sample uses has a meaningless embedding: the robot should refuse it, so leave it out here.
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


def act_query_token(i: int) -> str:
    """The i-th learned readout token at the end of the prompt."""
    return f"<act_query_{i}>"


def loc_token(i: int) -> str:
    """Place i of LOCATIONS along one image axis, from left to right or top to bottom."""
    return f"<loc_{i}>"


def paligemma_loc_token(i: int) -> str:
    """The same in PaliGemma's vocabulary: place i of 1024."""
    return f"<loc{i:04d}>"


def fast_token(i: int) -> str:
    """Token i of the FAST action vocabulary."""
    return f"<fast_{i}>"


def build_tokenizer(fast_vocab: int = 512) -> Tokenizer:
    """Word-level tokenizer; `encode` puts <bos> first unless add_special_tokens=False (for answers after a prompt)."""
    numbers = [str(n) for n in range(STATE_BINS)]
    start = [PAD_TOKEN, BOS_TOKEN, EOS_TOKEN, UNKNOWN_TOKEN, *(act_query_token(i) for i in range(ACT_QUERIES))]
    places = [loc_token(i) for i in range(LOCATIONS)]
    actions = [fast_token(i) for i in range(fast_vocab)]
    vocabulary = {token: i for i, token in enumerate([*start, "\n", *WORDS, *numbers, *places, *actions])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN_TOKEN))
    # Runs of letters and digits, single punctuation marks and line breaks are tokens; other white space only separates.
    tokenizer.pre_tokenizer = Split(Regex(r"\w+|[^\w\s]|\n"), behavior="removed", invert=True)
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS_TOKEN} $A", pair=None, special_tokens=[(BOS_TOKEN, vocabulary[BOS_TOKEN])]
    )
    tokenizer.add_special_tokens([*start, *places, *actions])
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that must exist."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise KeyError(f"vocabulary: expected {token!r} in it; it has {tokenizer.get_vocab_size()} other tokens")
    return int(found)


def fast_id(tokenizer: Tokenizer, i: int) -> int:
    """Vocabulary id of FAST token i; the ids of all FAST tokens are consecutive."""
    return token_id(tokenizer, fast_token(i))


def loc_id(tokenizer: Tokenizer, i: int) -> int:
    """Vocabulary id of location i; the ids of all locations are consecutive."""
    return token_id(tokenizer, loc_token(i))


def act_query_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Vocabulary ids of the readout tokens in prompt order."""
    return tuple(token_id(tokenizer, act_query_token(i)) for i in range(ACT_QUERIES))


def prompt_vocab_size(tokenizer: Tokenizer) -> int:
    """How many ids, from 0, a prompt can contain: everything before the location, segment and action tokens."""
    paligemma = tokenizer.token_to_id(paligemma_loc_token(0))
    return loc_id(tokenizer, 0) if paligemma is None else int(paligemma)


def prompt_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer as the robot gets it: without the location, segment and action tokens."""
    size = prompt_vocab_size(tokenizer)
    description = json.loads(tokenizer.to_str())
    model = description["model"]
    model["vocab"] = {token: i for token, i in model["vocab"].items() if i < size}
    description["added_tokens"] = [token for token in description["added_tokens"] if token["id"] < size]
    return Tokenizer.from_str(json.dumps(description))
