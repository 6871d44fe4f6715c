"""What a robot's policy is given for an observation is what training made of the same frame, number for number."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import CONFIG, make_model
from support.samples import ArmSamples, make_robot

from ki_vla_ros.bundle import ImageSpec, PromptSpec, Provenance
from ki_vla_ros.policy import make_model_input, resize_with_pad
from ki_vla_ros.records import CameraFrame, Observation
from ki_vla_ros.robot import Robot, find_robot, read_robot
from training.action_space import ActionSpace, Numbers
from training.data import BatchForm, BatchMaker, Embodiment, RobotSample, draw_numbers, fit_fast, whole_chunks
from training.data.augmentation import Augmentation
from training.policy import describe_policy
from training.tokens import VocabularyConfig, make_vocabulary, prompt_template, prompt_tokenizer

SIZE = CONFIG.vision.image_size
ROBOTS = [path.stem for path in sorted(find_robot("aloha").parent.glob("*.yaml"))]


def make_optional(robot: Robot, *names: str) -> Robot:
    cameras = [camera.model_copy(update={"optional": camera.name in names}) for camera in robot.cameras]
    return robot.model_copy(update={"cameras": tuple(cameras)})


@given(seed=st.integers(0, 10_000), missing=st.booleans(), task=st.sampled_from(["wave", "Wave.", " WAVE  wave"]))
@settings(max_examples=20, deadline=None)
def test_the_robots_input_is_the_trainers(seed: int, missing: bool, task: str) -> None:
    rng = np.random.default_rng(seed)
    robot = make_optional(make_robot("one", 3, cameras=("top", "side", "hand")), "side")
    numbers = draw_numbers([ArmSamples(robot)], seed=0)
    space = ActionSpace.fit(robot, numbers)
    embodiment = Embodiment(space, fit_fast([whole_chunks(space, numbers, 100, 0)], vocabulary=256, scale=10.0))
    tokenizer = make_vocabulary(VocabularyConfig(), ["wave"], 256)
    prompt = PromptSpec(template=prompt_template(0), length=24)
    form = BatchForm(SIZE, 2, 4, 3, 3, prompt, augmentation=Augmentation(brightness=0.0, contrast=0.0))
    shapes = [(20, 31), (17, 9), (SIZE, SIZE)]
    frames = {c.name: rng.integers(0, 256, (*s, 3), dtype=np.uint8) for c, s in zip(robot.cameras, shapes, strict=True)}
    if missing:
        del frames["side"]
    state_S = rng.uniform(-2.0, 2.0, 3)  # beyond what was seen, too
    images = tuple(resize_with_pad(frames[c.name], SIZE) if c.name in frames else None for c in robot.cameras)
    sample = RobotSample(images, task, state_S, np.zeros((4, 3)), np.ones(4, bool))
    batch = BatchMaker(tokenizer, form).of_robots([embodiment], [sample], rng)
    policy = describe(space, prompt)
    seen = Observation(0, {name: CameraFrame(name, 0, rgb) for name, rgb in frames.items()}, state_S)
    served = make_model_input(policy, prompt_tokenizer(tokenizer), seen, task)
    count = int(served.token_mask_L.sum())
    np.testing.assert_array_equal(batch.tokens_BL[0], served.tokens_L[:count])
    # The trainer leaves out an image that no sample of a batch has, the robot masks it: of no effect (next test).
    seen_V = np.array([camera.name in frames for camera in robot.cameras])
    np.testing.assert_array_equal(served.image_mask_V, seen_V)
    np.testing.assert_array_equal(batch.image_mask_BV[0], np.ones(seen_V.sum(), bool))
    np.testing.assert_allclose(batch.images_BVCHW[0], served.images_VCHW[seen_V], atol=1e-6)
    assert batch.state_BS is not None and served.state_S is not None
    np.testing.assert_allclose(batch.state_BS[0], served.state_S, atol=1e-6)


def describe(space: ActionSpace, prompt: PromptSpec) -> Any:
    return describe_policy(
        space.robot,
        name="one",
        image=ImageSpec(size=SIZE),
        prompt=prompt,
        state={"low": space.state_low, "high": space.state_high, "encoding": "both"},
        action={"low": space.action_low, "high": space.action_high},
        flow={"steps": 2},
        provenance=Provenance(recipe="none", seed=0, commit="none", data_fingerprint="none"),
    )


def test_it_does_not_matter_where_an_image_is_missing() -> None:
    """In a batch missing images come first, or not at all; on the robot they are where their camera is."""
    model = make_model()
    torch.manual_seed(2)
    images = torch.rand(1, 3, 3, SIZE, SIZE) * 2 - 1
    tokens, real = torch.randint(0, 20, (1, 5)), torch.ones(1, 5, dtype=torch.bool)
    noise, time = torch.randn(1, CONFIG.horizon, CONFIG.action_dim), torch.full((1, CONFIG.horizon), 0.6)
    found = []
    for order, mask in (((0, 1, 2), (1, 0, 1)), ((1, 0, 2), (0, 1, 1)), ((0, 2, 1), (1, 1, 0))):
        cache = model.prefill(images[:, list(order)], torch.tensor([mask], dtype=torch.bool), tokens, real)
        found.append(model.velocity(cache, noise, time))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[2], found[0], atol=1e-5, rtol=1e-5)
    cache = model.prefill(images[:, [0, 2]], torch.ones(1, 2, dtype=torch.bool), tokens, real)
    torch.testing.assert_close(model.velocity(cache, noise, time), found[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ROBOTS)
@given(seed=st.integers(0, 10_000), turned=st.integers(-2, 2))
@settings(max_examples=5, deadline=None)
def test_chunks_come_back_from_their_normalised_form(name: str, seed: int, turned: int) -> None:
    """For every robot file: relative or not, continuous joints in another turn, rotations near their middle."""
    rng, robot = np.random.default_rng(seed), read_robot(find_robot(name))
    count, horizon = 20, 5
    state_NS = rng.uniform(-0.5, 0.5, (count, len(robot.state)))
    chunk_NHD = rng.uniform(-0.5, 0.5, (count, horizon, len(robot.actions)))
    ends = state_NS.min(axis=0), state_NS.max(axis=0)
    space = ActionSpace.fit(robot, Numbers(state_NS, chunk_NHD, np.ones((count, horizon), bool), *ends))
    endless_S = np.array([dimension.continuous for dimension in robot.state])
    state_NS = state_NS + endless_S * turned * 2 * np.pi
    again_NHD = space.unnormalize_chunk(space.normalize_chunk(chunk_NHD, state_NS), state_NS)
    turns_NHD = (again_NHD - chunk_NHD) / (2 * np.pi)
    endless_D = np.array([dimension.continuous for dimension in robot.actions])
    np.testing.assert_allclose(np.where(endless_D, turns_NHD - np.rint(turns_NHD), turns_NHD), 0.0, atol=1e-9)
