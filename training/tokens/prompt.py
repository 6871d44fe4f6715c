"""Special tokens, the places in a text, and the part of a vocabulary that a prompt can hold.

Ids that a prompt can contain come first, in one block: the exported prefill graph carries the embedding rows of that
block only, so location and action (FAST) tokens cannot even be expressed on the robot. All vocabularies (words.py,
bpe.py, paligemma.py) have that order, but that special tokens for the state follow PaliGemma's own: at export their
rows come after the block's.

Texts of data have PaliGemma's places, <loc0000> to <loc1023>; `localise` writes them as a vocabulary has them.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from ki_vla_ros.bundle import PAD_TOKEN, UNKNOWN_TOKEN, encode, state_bin_token
from ki_vla_ros.errors import InputError

BOS_TOKEN = "<bos>"
EOS_TOKEN = "<eos>"
LOCATION_BINS = 1024  # of a place in a text, along one side of the image
STATE_BINS = 256
FIRST_SEGMENT = "<seg000>"
_TOKEN = re.compile(r"<(?:loc|seg)[^<>\s]*>")
_RESERVED = re.compile(r"<(?:pad|bos|eos|unk|act_query_\d+|state_\d+|fast_\d+)>")
_PLACE = re.compile(r"<loc(0\d{3}|10[01]\d|102[0-3])>")
_SEGMENT = re.compile(r"<seg(0\d\d|1[01]\d|12[0-7])>")


def prompt_template(queries: int) -> str:
    """The prompt of a robot's frame, with so many learned tokens at its end."""
    return "Task: {task}, State: {state};\nAction: " + "".join(map(act_query_token, range(queries)))


def prompt_frame() -> str:
    """The words of that prompt, which every vocabulary has."""
    return prompt_template(0).replace("{task}", " ").replace("{state}", " ")


def act_query_token(i: int) -> str:
    """The i-th learned readout token at the end of the prompt."""
    return f"<act_query_{i}>"


def without_queries(template: str) -> str:
    """The template without the learned tokens at its end."""
    return re.sub(r"(<act_query_\d+>)+$", "", template)


def loc_token(i: int) -> str:
    """Location i along one image axis in our own vocabularies, from left to right or top to bottom."""
    return f"<loc_{i}>"


def paligemma_loc_token(i: int) -> str:
    """The same in PaliGemma's vocabulary: location i of 1024."""
    return f"<loc{i:04d}>"


def fast_token(i: int) -> str:
    """Token i of the FAST action vocabulary."""
    return f"<fast_{i}>"


def start_block(queries: int) -> list[str]:
    """The tokens that our own vocabularies begin with."""
    return [PAD_TOKEN, BOS_TOKEN, EOS_TOKEN, UNKNOWN_TOKEN, *map(act_query_token, range(queries))]


def own_tokens(action_ids: int, state_tokens: bool = False) -> list[str]:
    """What PaliGemma's vocabulary lacks: a token for each bin of the state, if asked for, and FAST's."""
    return [*map(state_bin_token, range(STATE_BINS if state_tokens else 0)), *map(fast_token, range(action_ids))]


def end_block(locations: int, action_ids: int, state_tokens: bool = False) -> list[str]:
    """The tokens that they end with, of which a prompt can hold only those for the state."""
    own = own_tokens(action_ids, state_tokens)
    states = len(own) - action_ids
    return [*own[:states], *map(loc_token, range(locations)), *own[states:]]


def begin_with_bos(vocabulary: Mapping[str, int]) -> TemplateProcessing:
    return TemplateProcessing(single=f"{BOS_TOKEN} $A", pair=None, special_tokens=[(BOS_TOKEN, vocabulary[BOS_TOKEN])])


def check_text(text: str) -> None:
    """InputError if a text of data has a place or a segment that is none of PaliGemma's, or a token with a meaning."""
    if reserved := _RESERVED.search(text):
        raise InputError(f"text: expected words and places, got the token {reserved[0]} in {text[:80]!r}")
    for token in _TOKEN.findall(text):
        if not (_PLACE.fullmatch(token) or _SEGMENT.fullmatch(token)):
            raise InputError(
                f"text: expected places <loc0000> to <loc{LOCATION_BINS - 1}> and segments <seg000> to <seg127>, got "
                f"{token[:40]!r} in {text[:80]!r}"
            )


def plain_text(text: str) -> str:
    """The text without places and segments: what a vocabulary is made from."""
    check_text(text)
    return _TOKEN.sub(" ", text)


def localise(tokenizer: Tokenizer, text: str) -> str:
    """The text with the vocabulary's own tokens for its places, which may be coarser; InputError where it has none."""
    check_text(text)
    if tokenizer.token_to_id(paligemma_loc_token(0)) is not None:
        return text
    if segment := _SEGMENT.search(text):
        raise InputError(f"text: expected no segments, which only PaliGemma's vocabulary has, got {segment[0]}")
    bins = location_count(tokenizer)
    return _PLACE.sub(lambda found: loc_token(int(found[1]) * bins // LOCATION_BINS), text)


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text with places, without <bos> and <eos>; InputError names words that the vocabulary lacks."""
    text = localise(tokenizer, text)
    encoding, unknown_id = encode(tokenizer, text, special=False), tokenizer.token_to_id(UNKNOWN_TOKEN)
    if unknown_id in encoding.ids:
        start, end = encoding.offsets[encoding.ids.index(unknown_id)]
        raise InputError(f"text: expected words of the vocabulary, got {text[start:end]!r} in {text[:80]!r}")
    return list(encoding.ids)


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that must exist."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise KeyError(f"vocabulary: expected token {token!r}, got {tokenizer.get_vocab_size()} others")
    return int(found)


def fast_ids(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Vocabulary id of each FAST token that there can be.

    Those of its own, consecutive at the vocabulary's end; where PaliGemma's has none, openpi's: from the last place,
    <loc1023>, down, so that token i of FAST has the id V - 1 - 128 - i.
    """
    first = tokenizer.token_to_id(fast_token(0))
    if first is None:
        return np.arange(token_id(tokenizer, FIRST_SEGMENT) - 1, -1, -1)
    return np.arange(first, tokenizer.get_vocab_size())


def loc_id(tokenizer: Tokenizer, i: int) -> int:
    """Vocabulary id of location i; the ids of all locations are consecutive."""
    paligemma = tokenizer.token_to_id(paligemma_loc_token(i))
    return token_id(tokenizer, loc_token(i)) if paligemma is None else int(paligemma)


def location_count(tokenizer: Tokenizer) -> int:
    """How many locations the vocabulary has along one side of an image."""
    if tokenizer.token_to_id(paligemma_loc_token(0)) is not None:
        return LOCATION_BINS
    return bisect_left(range(LOCATION_BINS), True, key=lambda i: tokenizer.token_to_id(loc_token(i)) is None)


def act_query_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Vocabulary ids of the readout tokens in prompt order."""
    ids: list[int] = []
    while (found := tokenizer.token_to_id(act_query_token(len(ids)))) is not None:
        ids.append(found)
    return tuple(ids)


def has_state_tokens(tokenizer: Tokenizer) -> bool:
    """Whether the vocabulary has a token for each bin of the state."""
    return tokenizer.token_to_id(state_bin_token(STATE_BINS - 1)) is not None


def prompt_ids(tokenizer: Tokenizer) -> Sequence[int]:
    """The ids that a prompt can contain, in the robot's order: all before the locations, then state tokens, if later.

    A range, from 0, but for PaliGemma's vocabulary with state tokens.
    """
    block = range(loc_id(tokenizer, 0))
    states = [token_id(tokenizer, state_bin_token(n)) for n in range(STATE_BINS if has_state_tokens(tokenizer) else 0)]
    after = [i for i in states if i not in block]
    return [*block, *after] if after else block


def prompt_vocab_size(tokenizer: Tokenizer) -> int:
    """How many tokens a prompt can contain: all but the location, segment and action tokens."""
    return len(prompt_ids(tokenizer))


def prompt_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer as the robot gets it, with ids counted in `prompt_ids`."""
    new = {old: i for i, old in enumerate(prompt_ids(tokenizer))}
    description = json.loads(tokenizer.to_str())
    model = description["model"]
    model["vocab"] = {token: new[i] for token, i in model["vocab"].items() if i in new}
    description["added_tokens"] = [
        token | {"id": new[token["id"]]} for token in description["added_tokens"] if token["id"] in new
    ]
    return Tokenizer.from_str(json.dumps(description))
