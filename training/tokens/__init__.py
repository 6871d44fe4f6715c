"""Text and actions as tokens: FAST, PaliGemma's vocabulary, words, prompts."""

from training.tokens.fast import FastDecodeError, FastTokenizer, cosine_basis
from training.tokens.paligemma import VOCABULARY, read_tokenizer
from training.tokens.prompt import EOS_TOKEN, fast_id, loc_id, prompt_tokenizer, prompt_vocab_size, token_id
from training.tokens.words import DEMO_PROMPT, LOCATIONS, STATE_BINS, act_query_ids, build_tokenizer

__all__ = [
    "DEMO_PROMPT",
    "EOS_TOKEN",
    "LOCATIONS",
    "STATE_BINS",
    "VOCABULARY",
    "FastDecodeError",
    "FastTokenizer",
    "act_query_ids",
    "build_tokenizer",
    "cosine_basis",
    "fast_id",
    "loc_id",
    "prompt_tokenizer",
    "prompt_vocab_size",
    "read_tokenizer",
    "token_id",
]
