"""Batches: several robots in one, what is masked, what hints are read from, what is augmented."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.models import make_model
from support.samples import SIDE, ArmSamples, Questions, make_robot

from ki_vla_ros.bundle import PromptSpec
from ki_vla_ros.errors import ConfigurationError, InputError
from ki_vla_ros.policy import state_to_bins
from training.action_space import ActionSpace
from training.data import (
    NO_TARGET,
    BatchForm,
    BatchMaker,
    Embodiment,
    Labels,
    Mixture,
    Part,
    draw_numbers,
    fit_fast,
    whole_chunks,
)
from training.data.augmentation import Augmentation
from training.tokens import VocabularyConfig, act_query_ids, encode_text, make_vocabulary, prompt_template

ONE, TWO = make_robot("one", 2, cameras=("top", "wrist")), make_robot("two", 3)


def embody(*robots: Any) -> list[Embodiment]:
    numbers = [draw_numbers([ArmSamples(robot)], seed=0) for robot in robots]
    spaces = [ActionSpace.fit(robot, found) for robot, found in zip(robots, numbers, strict=True)]
    chunks = [whole_chunks(space, found, 100, 0) for space, found in zip(spaces, numbers, strict=True)]
    fast = fit_fast(chunks, vocabulary=256, scale=10.0)
    return [Embodiment(space, fast) for space in spaces]


def make_maker(queries: int = 2, **form: Any) -> BatchMaker:
    tokenizer = make_vocabulary(VocabularyConfig(queries=queries), ["wave", *Questions().texts()], 256)
    fields: dict[str, Any] = {
        "image_size": SIDE,
        "grid": 2,
        "horizon": 4,
        "action_dim": 3,
        "state_dim": 3,
        "prompt": PromptSpec(template=prompt_template(queries), length=24),
        "asking": act_query_ids(tokenizer),
        "readouts": queries,
        "augmentation": Augmentation(brightness=0.0, contrast=0.0),
    }
    return BatchMaker(tokenizer, BatchForm(**(fields | form)))


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_two_robots_are_padded_to_one_batch_and_masked() -> None:
    one, two = embody(ONE, TWO)
    samples = [ArmSamples(ONE).take([3])[0], ArmSamples(TWO).take([39])[0]]
    maker = make_maker()
    batch = maker.of_robots([one, two], samples, rng())
    assert batch.image_mask_BV.tolist() == [[True, True], [False, True]], "the last image is the one beside the prompt"
    assert batch.weight_BA is not None and batch.weight_BA.tolist()[0][:2] == [1.0, 1.0]
    assert batch.weight_BA[0, 2] == pytest.approx(0.1) and batch.weight_BA[1].tolist() == [1.0] * 3
    assert batch.action_BHA is not None and not batch.action_BHA[0, :, 2].any()
    assert batch.known_BH is not None and batch.known_BH.tolist() == [[True] * 4, [True, False, False, False]]
    # Each in its own statistics, and with tokens of its own shape; an unknown end has no tokens to learn.
    for row, (embodiment, sample) in enumerate(zip((one, two), samples, strict=True)):
        chunk_HD = embodiment.space.unnormalize_chunk(
            batch.action_BHA[row, :, : sample.chunk_HD.shape[1]].double().numpy(), sample.state_S
        )
        np.testing.assert_allclose(chunk_HD, sample.chunk_HD, atol=1e-6)
        bins = state_to_bins(embodiment.space.normalize_state(sample.state_S), maker.form.prompt.state_bins, "words")
        ids = batch.tokens_BL[row].tolist()
        said = [int(token) for token in map(maker.tokenizer.id_to_token, ids) if token.isdecimal()]
        assert said == list(bins), "its own state"
    assert batch.fast_mask_BT is not None and batch.postfix_BT is not None and not batch.fast_mask_BT[1].any()
    ids = (batch.postfix_BT[0][batch.fast_mask_BT[0]] - int(maker.postfix.ids[0])).tolist()
    decoded_HD = one.chunks.decode(ids)
    np.testing.assert_allclose(decoded_HD, batch.action_BHA[0, :, :2].numpy(), atol=0.1)
    assert (
        batch.readout_BKA is not None and batch.readout_BKA[0].isfinite().all() and batch.readout_BKA[1].isnan().all()
    )


def test_chunks_are_written_as_tokens_only_where_a_stage_learns_them() -> None:
    class Unwritten:
        def for_shape(self, *_: int) -> Unwritten:
            return self

    (two,) = embody(TWO)
    samples = ArmSamples(TWO).take([0, 5])
    without = make_maker(readouts=0).of_robots([replace(two, actions=Unwritten())] * 2, samples, rng(), False)
    assert without.postfix_BT is without.fast_mask_BT is None
    whole = make_maker(readouts=0).of_robots([two] * 2, samples, rng())
    for name, tensor in vars(without).items():
        if tensor is not None:
            assert torch.equal(tensor, getattr(whole, name)), name


def test_one_robot_needs_no_weights() -> None:
    (two,) = embody(TWO)
    assert make_maker().of_robots([two], ArmSamples(TWO).take([0]), rng()).weight_BA is None


def test_a_view_that_no_sample_has_is_not_computed_and_changes_no_loss() -> None:
    (one,) = embody(ONE)
    samples = [replace(sample, images=(None, sample.images[1])) for sample in ArmSamples(ONE).take([0, 1])]
    batch = make_maker().of_robots([one, one], samples, rng())
    assert batch.image_mask_BV.tolist() == [[True], [True]]
    # To the model, as if the view had been there and masked.
    model = make_model()
    size = model.config.vision.image_size
    images, prompt = torch.randn(2, 2, 3, size, size), (batch.tokens_BL % model.config.vocab_size, batch.token_mask_BL)
    masks = batch.image_mask_BV, torch.tensor([[False, True]] * 2)
    with torch.inference_mode():
        short, whole = (model.prefill(images[:, 2 - mask.shape[1] :], mask, *prompt) for mask in masks)
    seen = short.mask_BP[None, :, None, :, None]
    for kept, padded in ((short.keys_NBKPD, whole.keys_NBKPD), (short.values_NBKPD, whole.values_NBKPD)):
        padded = padded[..., -kept.shape[3] :, :]
        torch.testing.assert_close(kept.masked_select(seen), padded.masked_select(seen))
    # Labels count views, from the first.
    labels = Labels(cells_VN=np.zeros((2, 4), dtype=np.int64))
    assert make_maker().of_robots([one], [replace(samples[0], labels=labels)], rng()).image_mask_BV.shape == (1, 2)
    # One is left where none is there, for the model to have its sizes.
    none = [replace(sample, images=(None, None)) for sample in samples]
    assert make_maker().of_robots([one, one], none, rng()).image_mask_BV.tolist() == [[False], [False]]


def test_hints_are_read_from_the_query_tokens() -> None:
    (two,) = embody(TWO)
    maker = make_maker()
    batch = maker.of_robots([two] * 2, ArmSamples(TWO).take([0, 5]), rng())
    assert batch.asking_BR is not None
    assert batch.tokens_BL.gather(1, batch.asking_BR).tolist() == [list(act_query_ids(maker.tokenizer))] * 2
    lacking = make_maker(prompt=PromptSpec(template=prompt_template(1), length=24))
    with pytest.raises(ConfigurationError, match=r"prompt 'Task: wave.*expected the token .*'<act_query_1>'"):
        lacking.of_robots([two], ArmSamples(TWO).take([0]), rng())
    without = make_maker(queries=0).of_robots([two], ArmSamples(TWO).take([0]), rng())
    assert without.asking_BR is not None and without.asking_BR[0, 0] == without.last_token_B[0]


def test_questions_have_answers_places_and_an_end() -> None:
    maker = make_maker()
    batch = maker.of_language(Questions(place=(0.9, 0.1)).take([0, 1]), rng())
    assert batch.text_mask_BT is not None and batch.postfix_BT is not None and batch.fast_mask_BT is None
    answer = [*encode_text(maker.tokenizer, "<loc0512> <loc0100> a ball"), maker.eos]
    assert batch.postfix_BT[0][batch.text_mask_BT[0]].tolist() == answer
    assert batch.target_cell_B is not None and batch.target_cell_B.tolist() == [1, 1]
    assert maker.cell_of(1.0, 0.5) == maker.cell_of(float("nan"), 0.5) == NO_TARGET
    silent = maker.of_language(Questions(suffix="", cells_VN=np.array([[0, 1, 2, 3]])).take([0]), rng())
    assert silent.postfix_BT is None and silent.text_mask_BT is None
    assert silent.cells_BVN is not None and silent.cells_BVN.tolist() == [[[0, 1, 2, 3]]]
    with pytest.raises(ConfigurationError, match=r"cells: expected 4 \(.*2 x 2 patches\), got 9"):
        maker.of_language(Questions(cells_VN=np.zeros((1, 9), np.int64)).take([0]), rng())
    with pytest.raises(InputError, match=r"suffix 'a ball a .*: expected at most 7 tokens, got 12"):
        make_maker(longest_text=8).of_language(Questions(suffix="a ball " * 6).take([0]), rng())


def test_an_image_is_changed_as_its_cameras_augmentation_says() -> None:
    (one,) = embody(ONE)
    samples = ArmSamples(ONE).take([30])
    plain = make_maker().of_robots([one], samples, rng()).images_BVCHW
    assert len(plain.unique()) == 1
    wrist = make_maker(cameras={"wrist": Augmentation(brightness=0.5)}).of_robots([one], samples, rng()).images_BVCHW
    assert torch.equal(wrist[:, 0], plain[:, 0]) and not torch.equal(wrist[:, 1], plain[:, 1])
    assert wrist.abs().max() <= 1.0


def test_images_with_places_are_not_turned() -> None:
    (two,) = embody(TWO)
    maker = make_maker(augmentation=Augmentation(rotation_deg=10.0))
    with pytest.raises(ConfigurationError, match="expected no crop and no rotation for data with places or cells"):
        maker.of_robots([two], ArmSamples(TWO, place=(0.5, 0.5)).take([0]), rng())
    maker.of_robots([two], ArmSamples(TWO).take([0]), rng())


def test_a_mixture_draws_by_weight_and_only_by_its_random_numbers() -> None:
    one, two = embody(ONE, TWO)
    maker = make_maker()
    parts = [Part(ArmSamples(ONE), 3.0), Part(ArmSamples(TWO), 1.0)]
    mixture = Mixture(parts, lambda n, samples, rng, _: maker.of_robots([(one, two)[i] for i in n], samples, rng))
    batch, again = (mixture.draw(400, np.random.default_rng(7)) for _ in range(2))
    assert all(
        torch.equal(a, b) or (a.isnan() == b.isnan()).all()
        for a, b in zip(vars(batch).values(), vars(again).values(), strict=True)
        if a is not None and b is not None
    )
    assert batch.weight_BA is not None
    share = float((batch.weight_BA[:, 2] < 1).float().mean())
    assert share == pytest.approx(0.75, abs=0.06)
    few = mixture.draw(8, np.random.default_rng(1))
    assert len(few.tokens_BL) == 8
    assert mixture.spread(4) == [(0, 0), (0, 26), (1, 12), (1, 39)]
