"""Text and actions as tokens: FAST, vocabularies of words, of byte pairs and PaliGemma's, prompts."""

from training.tokens.actions import ACTIONS, ActionTokenizer, describe_actions, load_actions
from training.tokens.bpe import LEAST_SIZE
from training.tokens.fast import FastDecodeError, FastTokenizer, cosine_basis
from training.tokens.naive import NaiveTokenizer
from training.tokens.paligemma import VOCABULARY, read_tokenizer
from training.tokens.prompt import (
    EOS_TOKEN,
    FIRST_SEGMENT,
    LOCATION_BINS,
    STATE_BINS,
    act_query_ids,
    act_query_token,
    check_text,
    encode_text,
    fast_ids,
    fast_token,
    has_state_tokens,
    loc_id,
    localise,
    location_count,
    own_tokens,
    plain_text,
    prompt_ids,
    prompt_template,
    prompt_tokenizer,
    prompt_vocab_size,
    token_id,
)
from training.tokens.vocabulary import VocabularyConfig, make_vocabulary

__all__ = [
    "ACTIONS",
    "EOS_TOKEN",
    "FIRST_SEGMENT",
    "LEAST_SIZE",
    "LOCATION_BINS",
    "STATE_BINS",
    "VOCABULARY",
    "ActionTokenizer",
    "FastDecodeError",
    "FastTokenizer",
    "NaiveTokenizer",
    "VocabularyConfig",
    "act_query_ids",
    "act_query_token",
    "check_text",
    "cosine_basis",
    "describe_actions",
    "encode_text",
    "fast_ids",
    "fast_token",
    "has_state_tokens",
    "load_actions",
    "loc_id",
    "localise",
    "location_count",
    "make_vocabulary",
    "own_tokens",
    "plain_text",
    "prompt_ids",
    "prompt_template",
    "prompt_tokenizer",
    "prompt_vocab_size",
    "read_tokenizer",
    "token_id",
]
