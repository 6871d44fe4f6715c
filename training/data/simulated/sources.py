"""The simulator's frames as sources: questions about scenes, camera views with named cells, and robot episodes.

Legend: F frames, V cameras, S image side, N image cells.
"""

from __future__ import annotations

import numpy as np
import torch

from ki_vla_ros.policy import images_to_input
from ki_vla_ros.sim import VERBS, Task
from training.data.batch import Arrays, Batch, BatchMaker, augment
from training.data.simulated.generate import BACKGROUND, CAMERAS, seen_objects
from training.data.simulated.questions import COMBINATIONS, draw_sample
from training.tokens import EOS_TOKEN, localise, token_id

QUESTION_PROMPT = "Question: {task}\nAnswer:"
LEAST_PIXELS = 15  # visible pixels (of 96 x 96) that an object needs before it is asked about
SCENE = CAMERAS.index("scene")


class SceneQuestions:
    """Vision-language samples: one question about each frame, scene camera only."""

    def __init__(self, scenes: Arrays, maker: BatchMaker) -> None:
        self.scenes, self.maker = scenes, maker
        self.eos = token_id(maker.tokenizer, EOS_TOKEN)

    def draw(self, count: int, rng: np.random.Generator) -> Batch:
        frames = np.sort(rng.choice(len(self.scenes["uv"]), size=count, replace=False))
        samples = [draw_sample(seen_objects(self.scenes, frame, least_pixels=LEAST_PIXELS), rng) for frame in frames]
        answers = [
            self.maker.tokenizer.encode(localise(self.maker.tokenizer, s.answer), add_special_tokens=False).ids
            for s in samples
        ]
        places = [(np.nan, np.nan) if (seen := sample.about) is None else (seen.u, seen.v) for sample in samples]
        return self.maker.make(
            self.scenes["images"][frames][:, [SCENE]],
            [QUESTION_PROMPT.replace("{task}", localise(self.maker.tokenizer, sample.question)) for sample in samples],
            [[*answer, self.eos] for answer in answers],
            rng,
            fast=False,
            place_B2=np.array(places),
        )


class SceneViews:
    """Images of all cameras, each a separate sample without a prompt, and what their cells show."""

    kinds = BACKGROUND + 1

    def __init__(self, scenes: Arrays, device: torch.device | str) -> None:
        self.scenes, self.device = scenes, device

    def draw(self, count: int, rng: np.random.Generator) -> Batch:
        """`count` frames, so `count` x V samples."""
        frames = np.sort(rng.choice(len(self.scenes["uv"]), size=count, replace=False))
        images = self.scenes["images"][frames].reshape(-1, 1, *self.scenes["images"].shape[2:])
        cells = self.scenes["cells"][frames].reshape(len(images), 1, -1).astype(np.int64)
        return Batch(
            images_BVCHW=augment(torch.from_numpy(images_to_input(images)), rng),
            image_mask_BV=torch.ones(len(images), 1, dtype=torch.bool),
            tokens_BL=torch.zeros(len(images), 0, dtype=torch.int64),
            token_mask_BL=torch.zeros(len(images), 0, dtype=torch.bool),
            cells_BVN=torch.from_numpy(cells),
        ).to(self.device)


def describe_tasks(episodes: Arrays) -> Arrays:
    """The arrays with two more: each frame's `task` and `place`.

    `task` is the instruction; `place` is u and v of its object, also where that lies outside the scene image.
    """
    rows = np.arange(len(episodes["state"]))
    target = episodes["target"].astype(np.int64)
    kinds = episodes["kind"][rows, target]
    tasks = [
        Task(VERBS[int(verb)], *COMBINATIONS[kind]).instruction
        for verb, kind in zip(episodes["verb"], kinds, strict=True)
    ]
    return episodes | {"task": np.array(tasks), "place": episodes["uv"][rows, target]}
