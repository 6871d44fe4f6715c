"""Batches: where hints are read from."""

import numpy as np
import pytest

from ki_vla_ros.errors import ConfigurationError
from training.data.batch import Batch, BatchMaker
from training.tokens import act_query_ids
from training.tokens.words import build_tokenizer


def test_a_prompt_without_the_tokens_that_hints_are_read_from_is_refused() -> None:
    """Otherwise they would be read from the prompt's first token."""
    tokenizer = build_tokenizer(fast_vocab=4)
    maker, asking = BatchMaker(tokenizer, length=16, grid=2), act_query_ids(tokenizer)[:2]
    words = [tokenizer.id_to_token(token) for token in asking]

    def make(*prompts: str) -> Batch:
        images = np.zeros((len(prompts), 1, 4, 4, 3), np.uint8)
        postfixes = [[1]] * len(prompts)
        return maker.make(images, prompts, postfixes, np.random.default_rng(0), fast=True, asking=asking)

    made = make(f"touch {' '.join(words)}", f"touch the {' '.join(words)}")
    assert made.asking_BR is not None
    assert made.tokens_BL.gather(1, made.asking_BR).tolist() == [list(asking)] * 2
    with pytest.raises(ConfigurationError, match=f"prompt 'touch {words[0]}': expected the token .*'{words[1]}'"):
        make(f"touch {' '.join(words)}", f"touch {words[0]}")
