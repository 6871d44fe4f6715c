"""The vocabulary of a model: the words of its data, a small BPE fitted on them, or PaliGemma's.

All have one order: what a prompt can hold comes first (training/tokens/prompt.py), then locations, then actions.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator
from tokenizers import Tokenizer

from ki_vla_ros.robot import Frozen
from training.tokens.bpe import LEAST_SIZE, fit_bpe
from training.tokens.paligemma import read_tokenizer
from training.tokens.prompt import LOCATION_BINS
from training.tokens.words import collect_words

WORD_LOCATIONS = 32
FastIds = Literal["own", "places"]


class VocabularyConfig(Frozen):
    """Which vocabulary a run has; one that is not PaliGemma's is made from the run's own texts."""

    kind: Literal["words", "paligemma", "bpe"] = Field(
        default="words",
        description="words: one token for each word of the data, any other is refused; bpe: merges fitted on the data, "
        "no text is unknown; paligemma: PaliGemma's, for weights that were trained with it",
    )
    file: Path | None = Field(
        default=None, description="with paligemma: its tokenizer (paligemma_tokenizer.model, or a tokenizer.json)"
    )
    size: Annotated[int, Field(ge=LEAST_SIZE, le=1 << 17)] | None = Field(
        default=None, description="with bpe: the most tokens that a prompt can be made of; 4096 if none is given"
    )
    locations: Annotated[int, Field(ge=2, le=LOCATION_BINS)] | None = Field(
        default=None,
        description="bins along one side of an image, which the 1024 of data files become; if none is given, 1024, "
        f"with words {WORD_LOCATIONS}",
    )
    fast_ids: FastIds = Field(
        default="own",
        description="of FAST's tokens: own ones after all others; or places, for PaliGemma's vocabulary, as openpi has "
        "them: V - 1 - 128 - token, which are the ids of <loc1023> and down",
    )
    share_places: bool = Field(
        default=False, description="with fast_ids: places, train on data that has such places in its texts all the same"
    )
    queries: Annotated[int, Field(ge=0, le=64)] = Field(
        default=0, description="learned tokens at the end of a robot's prompt, which hints are read from"
    )

    @model_validator(mode="after")
    def _check_kind(self) -> VocabularyConfig:
        if (self.kind == "paligemma") != (self.file is not None):
            got = "none" if self.file is None else f"{self.file} with kind {self.kind}"
            raise ValueError(f"file: expected PaliGemma's tokenizer with kind paligemma alone, got {got}")
        if self.size is not None and self.kind != "bpe":
            raise ValueError(f"size: expected it with kind bpe alone, got {self.size} with kind {self.kind}")
        if self.kind == "paligemma" and self.locations not in (None, LOCATION_BINS):
            raise ValueError(f"locations: expected {LOCATION_BINS}, as PaliGemma has them, got {self.locations}")
        if self.share_places and self.fast_ids != "places":
            raise ValueError(f"share_places: expected it with fast_ids: places alone, got fast_ids: {self.fast_ids}")
        if self.kind == "paligemma" and self.queries:
            raise ValueError(
                f"queries: expected 0 with PaliGemma's vocabulary, which has no such tokens, got {self.queries}"
            )
        return self


def make_vocabulary(
    config: VocabularyConfig, texts: Iterable[str], action_ids: int, state_tokens: bool = False
) -> Tokenizer:
    """The tokenizer; `encode` puts <bos> first, unless add_special_tokens=False (answers after a prompt).

    `texts` are all that training tokenizes, in the form in which it does (cleaned tasks, prefixes, suffixes); the words
    of a robot's prompt are known without. The same texts give the same vocabulary, in whatever order they come.
    `action_ids` is how many FAST tokens there are; with `state_tokens` there is one for each bin of the state.
    """
    if config.kind == "paligemma":
        assert config.file is not None
        return read_tokenizer(config.file, action_ids, state_tokens=state_tokens)
    if config.kind == "bpe":
        return fit_bpe(
            texts,
            size=config.size or 4096,
            queries=config.queries,
            locations=config.locations or LOCATION_BINS,
            action_ids=action_ids,
            state_tokens=state_tokens,
        )
    return collect_words(
        texts,
        queries=config.queries,
        locations=config.locations or WORD_LOCATIONS,
        action_ids=action_ids,
        state_tokens=state_tokens,
    )
