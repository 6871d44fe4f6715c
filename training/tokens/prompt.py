"""Special tokens, and the part of a vocabulary that a prompt can hold.

Ids that a prompt can contain come first, in one block: the exported prefill graph carries the embedding rows of that
block only, so location and action (FAST) tokens cannot even be expressed on the robot. The demo's vocabulary (words.py)
and PaliGemma's (paligemma.py) both have that order.
"""

from __future__ import annotations

import json

from tokenizers import Tokenizer

BOS_TOKEN = "<bos>"
EOS_TOKEN = "<eos>"


def loc_token(i: int) -> str:
    """Location i along one image axis in our own vocabularies, from left to right or top to bottom."""
    return f"<loc_{i}>"


def paligemma_loc_token(i: int) -> str:
    """The same in PaliGemma's vocabulary: location i of 1024."""
    return f"<loc{i:04d}>"


def fast_token(i: int) -> str:
    """Token i of the FAST action vocabulary."""
    return f"<fast_{i}>"


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that must exist."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise KeyError(f"vocabulary: expected token {token!r}, got {tokenizer.get_vocab_size()} others")
    return int(found)


def fast_id(tokenizer: Tokenizer, i: int) -> int:
    """Vocabulary id of FAST token i; the ids of all FAST tokens are consecutive."""
    return token_id(tokenizer, fast_token(i))


def loc_id(tokenizer: Tokenizer, i: int) -> int:
    """Vocabulary id of location i; the ids of all locations are consecutive."""
    return token_id(tokenizer, loc_token(i))


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
