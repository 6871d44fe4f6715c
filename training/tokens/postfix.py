"""A chunk's tokens as the language model writes them after a prompt: alone, or as openpi's pi0-FAST has them.

    bare    FAST or naive action tokens
    whole   `Action: `, action tokens, `|`, end-of-sequence

The words are left out where the prompt ends with them already (pi0.5's does).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from training.tokens.prompt import EOS_TOKEN, encode_text, fast_ids, token_id, without_queries

PostfixKind = Literal["bare", "whole"]
BEGIN: Final = "Action: "
END: Final = "|"


@dataclass(frozen=True)
class ActionPostfix:
    """Ids in the language model's vocabulary: of each action token, and of what stands before and after a chunk's."""

    ids: NDArray[np.int64]
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    """The last one ends the sequence; without any, a chunk ends where it has all its numbers."""

    def write(self, tokens: Sequence[int]) -> list[int]:
        """The postfix of a chunk's action tokens."""
        return [*self.before, *self.ids[list(tokens)].tolist(), *self.after]


def make_postfix(tokenizer: Tokenizer, kind: PostfixKind, template: str) -> ActionPostfix:
    """For prompts of this template; InputError where the vocabulary lacks a word of it."""
    ids = fast_ids(tokenizer)
    if kind == "bare":
        return ActionPostfix(ids)
    begin = [] if without_queries(template).endswith(BEGIN) else encode_text(tokenizer, BEGIN)
    return ActionPostfix(ids, tuple(begin), (*encode_text(tokenizer, END), token_id(tokenizer, EOS_TOKEN)))
