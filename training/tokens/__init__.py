"""Text and actions as tokens: FAST, vocabularies of words, of byte pairs and PaliGemma's, prompts."""

from training.tokens.bpe import LEAST_SIZE
from training.tokens.fast import FastDecodeError, FastTokenizer, cosine_basis
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
    loc_id,
    localise,
    location_count,
    plain_text,
    prompt_template,
    prompt_tokenizer,
    prompt_vocab_size,
    token_id,
)
from training.tokens.vocabulary import VocabularyConfig, make_vocabulary

__all__ = [
    "EOS_TOKEN",
    "FIRST_SEGMENT",
    "LEAST_SIZE",
    "LOCATION_BINS",
    "STATE_BINS",
    "VOCABULARY",
    "FastDecodeError",
    "FastTokenizer",
    "VocabularyConfig",
    "act_query_ids",
    "act_query_token",
    "check_text",
    "cosine_basis",
    "encode_text",
    "fast_ids",
    "fast_token",
    "loc_id",
    "localise",
    "location_count",
    "make_vocabulary",
    "plain_text",
    "prompt_template",
    "prompt_tokenizer",
    "prompt_vocab_size",
    "read_tokenizer",
    "token_id",
]
