"""Pixels, state and text as the model reads them, against slow references written here."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT
from support.bundles import JOINTS, TASK, demo_observation, demo_policy, state_token_policy
from support.vocabularies import DEMO_PROMPT, LOCATIONS, demo_tokenizer
from tokenizers import Tokenizer

from ki_vla_ros.bundle.folder import load_bundle
from ki_vla_ros.errors import InputError, InstructionError
from ki_vla_ros.policy.preprocess import (
    check_instruction,
    clean_instruction,
    images_to_input,
    longest_input,
    make_model_input,
    normalize,
    render_prompt,
    resize_with_pad,
    state_to_bins,
    tokenize,
    unnormalize,
)
from training.tokens.prompt import act_query_ids, fast_ids, loc_id, prompt_tokenizer, prompt_vocab_size, token_id

PROMPT = (
    "Task: touch the red cube, State: 0 1 2 3 4 5 255;\nAction: <act_query_0><act_query_1><act_query_2><act_query_3>"
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return prompt_tokenizer(demo_tokenizer(fast_vocab=8))


def test_shrinking_by_three_averages_nine_pixels() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (288, 288, 3), dtype=np.uint8)
    means = rgb.reshape(96, 3, 96, 3, 3).astype(float).mean(axis=(1, 3))
    assert np.abs(resize_with_pad(rgb, 96) - means).max() <= 0.5 + 1e-3


@pytest.mark.parametrize(("height", "width"), [(48, 96), (96, 48), (480, 640), (31, 77), (5, 1)])
def test_other_aspect_ratios_are_padded_not_stretched(height: int, width: int) -> None:
    out = resize_with_pad(np.full((height, width, 3), 200, dtype=np.uint8), 64)
    assert out.shape == (64, 64, 3)
    inside = (out == 200).all(axis=2)
    assert np.array_equal(inside, ~(out == 0).all(axis=2))
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    long_side = max(height, width)
    assert (len(rows), len(columns)) == (round(64 * height / long_side) or 1, round(64 * width / long_side) or 1)
    for span in (rows, columns):
        before, after = span[0], 63 - span[-1]
        assert 0 <= after - before <= 1, "the black bars must be equal"


def test_an_image_of_the_right_size_is_untouched() -> None:
    rgb = np.random.default_rng(1).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    assert np.array_equal(resize_with_pad(rgb, 96), rgb)


@pytest.mark.parametrize("bad", [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)])
def test_an_array_that_is_not_an_rgb_image_is_refused(bad: np.ndarray) -> None:
    with pytest.raises(InputError, match="image: expected uint8"):
        resize_with_pad(bad, 96)


def test_images_become_channels_first_from_minus_one_to_one() -> None:
    rgb = np.zeros((2, 4, 5, 3), dtype=np.uint8)
    rgb[1, 2, 3] = (255, 0, 51)
    images = images_to_input(rgb)
    assert images.shape == (2, 3, 4, 5) and images.dtype == np.float32 and images.flags.c_contiguous
    assert images[1, :, 2, 3] == pytest.approx([1.0, -1.0, -0.6])
    assert images[0].max() == -1.0


@given(st.lists(st.floats(-10, 10), min_size=3, max_size=3))
def test_unnormalize_inverts_normalize_even_outside_the_range(values: list[float]) -> None:
    low, high = (-1.0, 0.0, 2.0), (1.0, 0.04, 5.0)
    x = np.array(values)
    assert unnormalize(normalize(x, low, high), low, high) == pytest.approx(x, abs=1e-9)


def test_normalize_maps_low_and_high_to_the_ends() -> None:
    low, high = (-2.0, 0.0), (4.0, 0.04)
    assert normalize(np.array([low, high]), low, high) == pytest.approx(np.array([[-1, -1], [1, 1]]))
    assert normalize(np.array([7.0, 0.06]), low, high) == pytest.approx([2.0, 2.0])


@given(st.floats(-3, 3), st.sampled_from([2, 16, 256]))
def test_bins_have_equal_widths_and_clamp(value: float, bins: int) -> None:
    got = int(state_to_bins(np.array([value]), bins)[0])
    assert 0 <= got < bins
    if value < -1:
        assert got == 0
    elif value >= 1:
        assert got == bins - 1
    else:
        left = -1 + got * 2 / bins
        assert left - 1e-12 <= value < left + 2 / bins + 1e-12


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_state_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(InputError, match="finite"):
        state_to_bins(np.array([0.0, value]))


@pytest.mark.parametrize(
    ("given_text", "cleaned"),
    [("  Touch  the\tRED cube. ", "touch the red cube"), ("point at\nthe ball...", "point at the ball")],
)
def test_instructions_are_cleaned(given_text: str, cleaned: str) -> None:
    assert clean_instruction(given_text) == cleaned


@pytest.mark.parametrize("text", ["", "   ", ".", " \n. "])
def test_an_empty_instruction_is_refused(text: str) -> None:
    with pytest.raises(InstructionError, match="expected some words"):
        clean_instruction(text)


def test_an_instruction_cannot_contain_special_tokens() -> None:
    with pytest.raises(InstructionError, match="plain words"):
        clean_instruction("touch <act_query_0> the cube")


def test_the_demo_prompt() -> None:
    assert render_prompt(DEMO_PROMPT, "Touch the red cube.", [0, 1, 2, 3, 4, 5, 255]) == PROMPT


def test_tokens_are_padded_and_masked(tokenizer: Tokenizer) -> None:
    tokens_L, mask_L = tokenize(tokenizer, PROMPT, 32)
    words = [tokenizer.id_to_token(int(i)) for i in tokens_L]
    assert words[:10] == ["<bos>", "Task", ":", "touch", "the", "red", "cube", ",", "State", ":"]
    assert words[10:25] == [
        *("0", "1", "2", "3", "4", "5", "255", ";", "\n", "Action", ":"),
        *("<act_query_0>", "<act_query_1>", "<act_query_2>", "<act_query_3>"),
    ]
    assert words[25:] == ["<pad>"] * 7
    assert mask_L.tolist() == [True] * 25 + [False] * 7
    assert tokens_L.dtype == np.int64


def test_unknown_words_are_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(InstructionError, match="does not know 'banana', 'mugs'"):
        tokenize(tokenizer, "touch the banana and the mugs", 32)


def test_a_long_prompt_is_refused_not_cut(tokenizer: Tokenizer) -> None:
    tokenize(tokenizer, PROMPT, 25)
    with pytest.raises(InstructionError, match="at most 24 tokens, got 25"):
        tokenize(tokenizer, PROMPT, 24)


def test_model_input_of_the_demo(tokenizer: Tokenizer) -> None:
    policy, observation = demo_policy(), demo_observation()
    made = make_model_input(policy, tokenizer, observation, "touch the red cube")
    for v, camera in enumerate(("scene", "wrist")):
        pixels = resize_with_pad(observation.frames[camera].rgb_HWC, 96)
        assert np.array_equal(made.images_VCHW[v], images_to_input(pixels))
    assert made.image_mask_V.tolist() == [True, True]
    assert made.state_S is None
    bins = [int((x + 3.1) / 6.2 * 256) for x in observation.state_S[:-1]] + [0]
    expected = tokenize(tokenizer, render_prompt(DEMO_PROMPT, "touch the red cube", bins), 32)
    assert np.array_equal(made.tokens_L, expected[0]) and np.array_equal(made.token_mask_L, expected[1])


def test_a_state_token_is_normalised_and_leaves_the_prompt_alone(tokenizer: Tokenizer) -> None:
    policy, observation = state_token_policy(), demo_observation()
    made = make_model_input(policy, tokenizer, observation, "touch the red cube")
    assert made.state_S is not None and made.state_S.dtype == np.float32
    assert made.state_S == pytest.approx([*(observation.state_S[:-1] / 3.1), -1.0], rel=1e-6)
    other = dataclasses.replace(observation, state_S=observation.state_S + 0.1)
    assert np.array_equal(make_model_input(policy, tokenizer, other, "touch the red cube").tokens_L, made.tokens_L)


def test_an_absent_camera_is_masked_if_optional_and_refused_if_not(tokenizer: Tokenizer) -> None:
    observation = demo_observation()
    only_scene = dataclasses.replace(observation, frames={"scene": observation.frames["scene"]})
    with pytest.raises(InputError, match=r"camera 'wrist': expected a frame .* got only \['scene'\]"):
        make_model_input(demo_policy(), tokenizer, only_scene, "touch the red cube")
    policy = demo_policy(cameras=[{"name": "scene"}, {"name": "wrist", "optional": True}])
    made = make_model_input(policy, tokenizer, only_scene, "touch the red cube")
    assert made.image_mask_V.tolist() == [True, False]
    assert (made.images_VCHW[1] == policy.image.pad_value).all()


@pytest.mark.parametrize("state", [np.zeros(6), np.zeros((7, 1)), np.array([0, 0, 0, np.nan, 0, 0, 0])])
@pytest.mark.parametrize("policy", [demo_policy(), state_token_policy()], ids=["text", "token"])
def test_a_wrong_state_is_refused(tokenizer: Tokenizer, policy: object, state: np.ndarray) -> None:
    observation = dataclasses.replace(demo_observation(), state_S=state)
    with pytest.raises(InputError, match="joint state: expected"):
        make_model_input(policy, tokenizer, observation, "touch the red cube")


def test_an_overlong_instruction_is_refused_by_its_characters(tokenizer: Tokenizer) -> None:
    policy = demo_policy(prompt={"template": DEMO_PROMPT, "length": 32, "max_instruction_chars": 18})
    make_model_input(policy, tokenizer, demo_observation(), "touch the red cube")
    with pytest.raises(InstructionError, match="at most 18 characters, got 19"):
        make_model_input(policy, tokenizer, demo_observation(), "touch the red cube.")


def test_prompt_ids_come_first_and_answers_are_consecutive() -> None:
    tokenizer = demo_tokenizer(fast_vocab=512)
    start = prompt_vocab_size(tokenizer)
    assert [loc_id(tokenizer, i) for i in range(LOCATIONS)] == list(range(start, start + LOCATIONS))
    first = start + LOCATIONS
    assert fast_ids(tokenizer).tolist() == list(range(first, first + 512))
    assert tokenizer.get_vocab_size() == first + 512
    assert max(tokenizer.encode(PROMPT).ids) < start
    assert len(set(act_query_ids(tokenizer))) == 4
    with pytest.raises(KeyError, match="fast_512"):
        token_id(tokenizer, "<fast_512>")


def test_every_number_of_the_state_is_one_token(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(" ".join(map(str, range(256))), add_special_tokens=False).ids
    assert len(set(ids)) == 256 and tokenizer.token_to_id("<unk>") not in ids


def test_special_tokens_stay_whole_and_answers_need_no_bos() -> None:
    tokenizer = demo_tokenizer(fast_vocab=8)
    text = "<loc_3> <loc_31><fast_7><fast_0>"
    assert tokenizer.encode(text, add_special_tokens=False).tokens == ["<loc_3>", "<loc_31>", "<fast_7>", "<fast_0>"]


def test_the_robots_tokenizer_is_the_same_without_answers() -> None:
    full = demo_tokenizer(fast_vocab=512)
    robot = prompt_tokenizer(full)
    assert robot.encode(PROMPT).ids == full.encode(PROMPT).ids
    assert robot.get_vocab_size() == prompt_vocab_size(full)
    assert robot.token_to_id("<fast_0>") is None and robot.token_to_id("<loc_0>") is None


def test_every_demo_instruction_is_known(tokenizer: Tokenizer) -> None:
    for verb in ("touch", "point at"):
        for colour in ("red", "green", "blue", "yellow", "purple", "white"):
            for shape in ("cube", "ball", "disc", "pole"):
                prompt = render_prompt(DEMO_PROMPT, f"{verb} the {colour} {shape}", [255] * len(JOINTS))
                tokenize(tokenizer, prompt, 32)


def test_the_longest_input_fills_every_camera_and_token() -> None:
    manifest = load_bundle(ROOT / "models" / "bench").manifest
    given = longest_input(manifest, manifest.graph.vocab_size)
    assert given.image_mask_V.all() and given.token_mask_L.all() and given.state_S is not None
    assert given.tokens_L.max() < manifest.graph.vocab_size
    assert given.images_VCHW.shape == (3, 3, 224, 224) and given.images_VCHW.dtype == np.float32


def test_an_instruction_is_checked_without_resizing(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenCV 4.5.4, which comes with Ubuntu 22.04, fails at images of one pixel."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("resized")

    monkeypatch.setattr("cv2.resize", refuse)
    check_instruction(load_bundle(ROOT / "models" / "demo"), TASK)
