"""PaliGemma's tokenizer: sentencepiece's ids, prompts as openpi makes them, and only words on the robot."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sentencepieces import PLACES, SEGMENTS, TEXT, train
from tokenizers import AddedToken, Tokenizer

from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.policy.preprocess import render_prompt, state_to_bins, tokenize
from training.tokens.paligemma import read_tokenizer
from training.tokens.prompt import encode_text, fast_ids, localise, prompt_tokenizer, prompt_vocab_size

MODEL = train()
SIZE = len(MODEL.pieces)
THEIRS = sentencepiece.SentencePieceProcessor(model_proto=MODEL.SerializeToString())
PI0, PI05 = "{task}\n", "Task: {task}, State: {state};\nAction: "


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "paligemma_tokenizer.model"
    path.write_bytes(MODEL.SerializeToString())
    return path


@pytest.fixture(scope="module")
def ours(file: Path) -> Tokenizer:
    return read_tokenizer(file, vocabulary=SIZE)


def check_same(ours: Tokenizer, text: str) -> None:
    assert ours.encode(text).ids == THEIRS.encode(text, add_bos=True), repr(text)


@pytest.mark.parametrize(
    "text",
    [
        *TEXT.split("\n"),
        TEXT,
        "",
        " ",
        "  ",
        "   leading and trailing     ",
        "\n",
        "\n\n\n",
        "a\n \n\nb\t\r\n",
        "0123456789 3.14159 -1 127 -1",
        "ünïcödé 東京 🤖 ع \u0301 e\u0301 \u00a0 \u2003 \ufeff",
        "\u2581already\u2581escaped\u2581\u2581",
        "<table><mask> <tab <0x41> <bos> <unk> <pad>",
        "go to <loc0003><loc0005> <seg001>, not <loc0006>",
        "aaaaaaaaaaaaaaaaaaaaaaaaaaaaa abababababa bananananas",
        "\x00\x01\x7f",
    ],
)
def test_ids_are_those_of_sentencepiece(ours: Tokenizer, text: str) -> None:
    check_same(ours, text)


@settings(max_examples=1000)
@given(st.text(st.sampled_from("abcdeilnoprstu  .,;:0123456789\n\t<>x0A\u2581éß東🤖'-"), max_size=60))
def test_ids_of_any_text(ours: Tokenizer, text: str) -> None:
    check_same(ours, text)


@settings(max_examples=300)
@given(st.text(max_size=30))
def test_ids_of_any_unicode(ours: Tokenizer, text: str) -> None:
    check_same(ours, text)


@pytest.mark.parametrize(
    "task", ["pick up the red cube", "Fold_the Towel.", "  put it\non the plate ", "wipe!  twice", "ß"]
)
def test_prompt_of_pi0(ours: Tokenizer, task: str) -> None:
    """openpi encodes the task and the line break separately."""
    expected = THEIRS.encode(task.strip().replace("_", " ").replace("\n", " "), add_bos=True) + THEIRS.encode("\n")
    tokens_L, mask_L = tokenize(prompt_tokenizer(ours), render_prompt(PI0, task, style="openpi"), 48)
    assert tokens_L.tolist() == expected + [0] * (48 - len(expected))
    assert mask_L.sum() == len(expected)


def test_prompt_of_pi05(ours: Tokenizer) -> None:
    state = np.array([-1.5, -1.0, -0.999, 0.0, 0.49, 0.9999, 1.0, 7.0])
    bins = state_to_bins(state, style="openpi")
    assert bins.tolist() == [-1, 0, 0, 128, 190, 255, 255, 255]
    text = "Task: Fold the towel., State: -1 0 0 128 190 255 255 255;\nAction: "
    assert render_prompt(PI05, " Fold_the\ntowel.", bins, style="openpi") == text
    expected = THEIRS.encode(text, add_bos=True)
    tokens_L, mask_L = tokenize(prompt_tokenizer(ours), text, 200)
    assert tokens_L[mask_L].tolist() == expected
    assert not tokens_L[~mask_L].any()


def test_the_robot_cannot_express_places_or_actions(file: Path) -> None:
    full = read_tokenizer(file, action_ids=5, vocabulary=SIZE)
    assert full.get_vocab_size() == SIZE + 5
    assert fast_ids(full).tolist() == list(range(SIZE, SIZE + 5))
    assert full.encode("<fast_3>", add_special_tokens=False).ids == [SIZE + 3]
    words = SIZE - PLACES - SEGMENTS
    assert prompt_vocab_size(full) == words
    robot = prompt_tokenizer(full)
    assert sorted(robot.get_vocab().values()) == list(range(words))
    for text in ("<loc0003>", "<seg001>", "<fast_3>", "to <loc0000><loc0005>"):
        ids = robot.encode(text, add_special_tokens=False).ids
        assert max(ids) < words
        assert robot.decode(ids) == text
    for text in TEXT.split("\n"):
        assert robot.encode(text).ids == full.encode(text).ids


def test_without_ids_of_their_own_actions_have_openpis(file: Path) -> None:
    """V - 1 - segments - token: the last place is FAST's token 0, and after the places come words."""
    ids = fast_ids(read_tokenizer(file, vocabulary=SIZE))
    assert ids[:20].tolist() == [SIZE - 1 - SEGMENTS - i for i in range(20)]
    assert ids[0] == THEIRS.piece_to_id(f"<loc{PLACES - 1:04d}>")


def test_tokenizer_json(ours: Tokenizer, tmp_path: Path) -> None:
    """Hugging Face's file has <image> after the vocabulary, and puts no <bos> before a prompt by itself."""
    theirs = Tokenizer.from_str(ours.to_str())
    theirs.add_special_tokens([AddedToken("<image>")])
    theirs.enable_truncation(5)
    description = json.loads(theirs.to_str())
    description["post_processor"] = None
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(description))
    read = read_tokenizer(path, vocabulary=SIZE)
    assert read.get_vocab() == ours.get_vocab()
    for text in TEXT.split("\n"):
        assert read.encode(text).ids == ours.encode(text).ids


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"byte_fallback": False},
            "expected a sentencepiece model with byte_fallback, as PaliGemma's, got one without",
        ),
        ({"add_dummy_prefix": True}, "without add_dummy_prefix"),
        ({"remove_extra_whitespaces": True}, "without remove_extra_whitespaces"),
        ({"normalization_rule_name": "nmt_nfkc"}, "without a table of normalised characters"),
        ({"model_type": "unigram"}, "with BPE"),
    ],
)
def test_other_sentencepiece_models_are_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = tmp_path / "other.model"
    path.write_bytes(train(**changes).SerializeToString())
    with pytest.raises(ConfigurationError, match=message):
        read_tokenizer(path, vocabulary=SIZE)


def test_bad_files_are_refused(file: Path, ours: Tokenizer, tmp_path: Path) -> None:
    def refused(name: str, content: bytes, message: str, vocabulary: int = SIZE) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigurationError, match=message):
            read_tokenizer(tmp_path / name, vocabulary=vocabulary)

    whole = file.read_bytes()
    refused("cut.model", whole[: len(whole) // 2 + 1], "expected a sentencepiece model")
    refused("text.model", b"words words", "expected a sentencepiece model")
    refused("empty.model", b"", "with pieces")
    refused("short.model", whole, rf"expected the tokens 0\.\.{SIZE}, got {SIZE} up to {SIZE - 1}", SIZE + 1)
    gemma = train()
    del gemma.pieces[-PLACES - SEGMENTS :]
    refused("gemma.model", gemma.SerializeToString(), "tokenizer of Gemma alone", len(gemma.pieces))
    refused("a.json", b"{", "expected a file of the tokenizers library")
    refused(
        "b.json",
        json.dumps({"model": {"type": "WordLevel", "byte_fallback": None}, "added_tokens": []}).encode(),
        "BPE",
    )
    with pytest.raises(ConfigurationError, match="got none"):
        read_tokenizer(tmp_path / "missing.model")
    with pytest.raises(ConfigurationError, match="got a folder"):
        read_tokenizer(tmp_path)


def test_places_of_data_are_its_own(ours: Tokenizer) -> None:
    text = "it is <loc0003><loc0005> <seg001>"
    assert localise(ours, text) == text
    assert encode_text(ours, text) == THEIRS.encode(text)
