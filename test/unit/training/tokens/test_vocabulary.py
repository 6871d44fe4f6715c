"""Vocabularies made from data: words or byte pairs, in blocks, with PaliGemma's places in the texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from support import ROOT
from tokenizers import Tokenizer

from ki_vla_ros.bundle.folder import load_bundle
from ki_vla_ros.bundle.tokenizer import read_tokenizer
from ki_vla_ros.errors import BundleError, ConfigurationError, InputError, InstructionError
from ki_vla_ros.policy.preprocess import render_prompt, tokenize
from training.tokens import words as words_file
from training.tokens.prompt import (
    act_query_ids,
    encode_text,
    fast_ids,
    loc_id,
    localise,
    location_count,
    prompt_template,
    prompt_tokenizer,
    prompt_vocab_size,
    token_id,
)
from training.tokens.vocabulary import VocabularyConfig, make_vocabulary

TEXTS = (
    "fold the towel",
    "where is the mug ?",
    "<loc0512><loc0100><loc1023><loc0200> mug",
    "Grab it, now!",
    "put 3 of 1024 bolts\ninto the Büchse",
)
KINDS = ("words", "bpe")


def made(kind: str, texts: tuple[str, ...] = TEXTS, action_ids: int = 9, **options: Any) -> Tokenizer:
    return make_vocabulary(VocabularyConfig(kind=kind, **options), texts, action_ids)


BPE = made("bpe", queries=2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("queries", [0, 1, 4])
def test_what_a_prompt_can_hold_comes_first_then_places_then_actions(kind: str, queries: int) -> None:
    vocabulary = made(kind, queries=queries, locations=16)
    rows = prompt_vocab_size(vocabulary)
    assert [loc_id(vocabulary, i) for i in range(16)] == list(range(rows, rows + 16))
    assert fast_ids(vocabulary).tolist() == list(range(rows + 16, rows + 25))
    assert vocabulary.get_vocab_size() == rows + 25 and location_count(vocabulary) == 16
    assert act_query_ids(vocabulary) == tuple(range(4, 4 + queries))
    first = token_id(vocabulary, "0")
    assert [token_id(vocabulary, str(n)) for n in range(256)] == list(range(first, first + 256))
    prompt = render_prompt(prompt_template(queries), "fold the towel", [0, 7, 12, 255])
    tokens_L, mask_L = tokenize(vocabulary, prompt, 40)
    assert tokens_L.max() < rows and tokens_L[0] == token_id(vocabulary, "<bos>")
    numbers = [token - first for token in tokens_L[mask_L] if first <= token < first + 256]
    assert numbers == [0, 7, 12, 255]
    assert tuple(tokens_L[mask_L][sum(mask_L) - queries :]) == act_query_ids(vocabulary)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_texts_in_any_order_make_the_same_vocabulary(kind: str) -> None:
    assert made(kind).to_str() == made(kind, TEXTS[::-1]).to_str()


def test_words_are_those_of_the_texts_and_of_the_prompt_alone() -> None:
    vocabulary = made("words")
    first, last = 4, token_id(vocabulary, "0")
    words = [vocabulary.id_to_token(i) for i in range(first, last)]
    expected = {"fold", "the", "towel", "where", "is", "mug", "?", "Grab", "it", ",", "now", "!", "put", "of", "1024"}
    assert words == sorted({*expected, "bolts", "\n", "into", "Büchse", "Task", "State", "Action", ":", ";"})
    with pytest.raises(InstructionError, match="does not know 'cup'"):
        tokenize(vocabulary, "fold the cup", 40)
    with pytest.raises(InputError, match=r"expected words of the vocabulary, got 'cup' in 'fold the cup'"):
        encode_text(vocabulary, "fold the cup")


def test_too_many_words_are_no_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words_file, "MOST_WORDS", 20)
    with pytest.raises(ConfigurationError, match="at most 20 words in the data, got more; take kind bpe"):
        made("words")


def test_byte_pairs_are_no_more_than_asked_for_and_shorten_the_texts() -> None:
    many = tuple(f"{verb}ing the {thing}ment" for verb in ("fold", "turn", "lift") for thing in ("pave", "com", "ele"))
    small, large = made("bpe", many, size=768), made("bpe", tuple(map(str.upper, many * 3)) + many, size=800)
    assert prompt_vocab_size(small) <= 768 and prompt_vocab_size(large) <= 800
    assert len(encode_text(small, "folding the pavement")) == 3 and len(encode_text(small, "xyz")) == 3


@settings(max_examples=200)
@given(st.text(max_size=40))
def test_no_text_is_unknown_to_byte_pairs(text: str) -> None:
    text = text.replace("<", "(")
    ids = encode_text(BPE, text)
    assert token_id(BPE, "<unk>") not in ids and (max(ids, default=0) < prompt_vocab_size(BPE))
    if not any(character.isdigit() for character in text):
        assert BPE.decode(ids) == text


def test_only_whole_numbers_are_numbers() -> None:
    first = token_id(BPE, "0")
    assert encode_text(BPE, "a 12 of 7") == [*encode_text(BPE, "a"), first + 12, *encode_text(BPE, " of"), first + 7]
    assert first + 102 not in encode_text(BPE, "1024") and first + 12 not in encode_text(BPE, "v12 12th")


@pytest.mark.parametrize("kind", KINDS)
def test_a_bundle_takes_it(kind: str, tmp_path: Path) -> None:
    """Its parts are among those that a robot reads, and it fits a prompt of words with the state in it."""
    manifest, file = load_bundle(ROOT / "models" / "bench").manifest, tmp_path / "tokenizer.json"
    robots = prompt_tokenizer(made(kind, queries=4))
    robots.save(str(file))
    graph = manifest.graph.model_copy(update={"vocab_size": robots.get_vocab_size()})
    read = read_tokenizer(file, manifest.model_copy(update={"graph": graph}))
    prompt = render_prompt(manifest.prompt.template, "Fold the towel", range(7))
    assert read.encode(prompt).ids == made(kind, queries=4).encode(prompt).ids
    assert read.token_to_id("<loc_0>") is None and read.token_to_id("<fast_0>") is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_bundle_whose_state_is_special_tokens_has_them_all(kind: str, tmp_path: Path) -> None:
    manifest, file = load_bundle(ROOT / "models" / "bench").manifest, tmp_path / "tokenizer.json"
    state = manifest.state.model_copy(update={"encoding": "special"})
    for state_tokens in (True, False):
        full = make_vocabulary(VocabularyConfig(kind=kind, queries=4), TEXTS, 9, state_tokens)
        robots = prompt_tokenizer(full)
        robots.save(str(file))
        graph = manifest.graph.model_copy(update={"vocab_size": robots.get_vocab_size()})
        changed = manifest.model_copy(update={"graph": graph, "state": state})
        if state_tokens:
            read = read_tokenizer(file, changed)
            prompt = render_prompt(manifest.prompt.template, "Fold the towel", range(7), special=True)
            assert read.encode(prompt).ids == full.encode(prompt).ids
            first = token_id(full, "<state_0>")
            assert [i - first for i in read.encode(prompt).ids if i >= first] == list(range(7))
        else:
            with pytest.raises(BundleError, match=r"a token for each state bin 0\.\.255, got none for '<state_0>'"):
                read_tokenizer(file, changed)


@pytest.mark.parametrize("kind", KINDS)
def test_places_become_the_vocabularys(kind: str) -> None:
    vocabulary = made(kind, locations=32)
    assert localise(vocabulary, "<loc0512><loc0031> mug <loc1023>") == "<loc_16><loc_0> mug <loc_31>"
    found = encode_text(vocabulary, "<loc0512><loc0100>")
    assert found == [loc_id(vocabulary, 16), loc_id(vocabulary, 3)]
    every = made(kind, locations=1024)
    assert encode_text(every, "<loc0512><loc1023>") == [loc_id(every, 512), loc_id(every, 1023)]


@pytest.mark.parametrize("text", ["<loc1024>", "<loc_16>", "<loc12>", "<loc-001>", "<seg128>", "<seg1>", "<loc>"])
def test_places_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=f"expected places <loc0000> to <loc1023> .* got '{text}' in 'it is {text}'"):
        localise(BPE, f"it is {text}")
    with pytest.raises(InputError, match="expected places"):
        made("words", (text,))


def test_segments_need_paligemma() -> None:
    with pytest.raises(InputError, match="which only PaliGemma's vocabulary has, got <seg012>"):
        encode_text(BPE, "<loc0001> <seg012>")


@pytest.mark.parametrize("token", ["<eos>", "<unk>", "<pad>", "<bos>", "<fast_3>", "<act_query_0>"])
def test_texts_of_data_cannot_have_tokens_with_a_meaning(token: str) -> None:
    with pytest.raises(InputError, match=f"expected words and places, got the token {token} in"):
        encode_text(BPE, f"a mug {token}")


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"kind": "paligemma"}, "file: expected PaliGemma's tokenizer with kind paligemma alone, got none"),
        ({"kind": "words", "file": "x.model"}, "alone, got x.model with kind words"),
        ({"kind": "words", "size": 1000}, "size: expected it with kind bpe alone, got 1000 with kind words"),
        ({"kind": "paligemma", "file": "x.model", "locations": 32}, "locations: expected 1024, as PaliGemma has them"),
        ({"kind": "paligemma", "file": "x.model", "queries": 4}, "queries: expected 0 with PaliGemma's vocabulary"),
        ({"kind": "bpe", "size": 100}, "greater than or equal to 768"),
        ({"kind": "letters"}, "'words', 'paligemma' or 'bpe'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(given: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        VocabularyConfig(**given)
