"""Mixing: frames on disk -> the tensors of one training step.

Legend: B batch, V cameras, L prompt tokens, T postfix tokens, H horizon, A action dim, J joints, K readout frequencies.
Both sources give the same `Batch`: a prefix (images and prompt), a postfix to predict (an answer, or FAST tokens), and
what only one of them has is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from ki_vla_ros.policy.preprocess import images_to_input, normalize, render_prompt, state_to_bins, tokenize
from ki_vla_ros.sim.task import VERBS, Task
from training.action_space import ActionSpace
from training.data.simulated.generate import CAMERAS, Arrays, seen_objects
from training.data.simulated.questions import COMBINATIONS, SeenObject, draw_sample
from training.tokens.fast import FastTokenizer
from training.tokens.prompt import EOS_TOKEN, fast_id, token_id
from training.tokens.words import DEMO_PROMPT

QUESTION_PROMPT = "Question: {task}\nAnswer:"
LEAST_PIXELS = 15  # visible pixels (of 96 x 96) from which on an object is asked about
NO_TARGET = -1


@dataclass(frozen=True)
class Batch:
    """Inputs and targets of one step; images float32 in [-1, 1].

    `target_cell_B` is the scene image's cell with the asked object (-1: none), `place_B2` its u and v (NaN: none),
    `readout_BKA` the scaled DCT coefficients of the lowest frequencies, `action_BHA` the normalised chunk, `cells_BVN`
    what each image cell shows.
    """

    images_BVCHW: Tensor
    image_mask_BV: Tensor
    tokens_BL: Tensor
    token_mask_BL: Tensor
    postfix_BT: Tensor
    postfix_mask_BT: Tensor
    target_cell_B: Tensor
    place_B2: Tensor
    cells_BVN: Tensor | None = None
    readout_BKA: Tensor | None = None
    action_BHA: Tensor | None = None
    state_BJ: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        moved = {name: None if tensor is None else tensor.to(device) for name, tensor in vars(self).items()}
        return Batch(**moved)


class BatchMaker:
    """Draws batches from frames; all randomness comes from the generator passed to each call."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        fast: FastTokenizer,
        space: ActionSpace,
        *,
        length: int,
        grid: int,
        frequencies: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.tokenizer, self.fast, self.space = tokenizer, fast, space
        self.length, self.grid, self.frequencies, self.device = length, grid, frequencies, device
        self.eos = token_id(tokenizer, EOS_TOKEN)
        self.first_fast = fast_id(tokenizer, 0)

    def draw_scenes(self, scenes: Arrays, count: int, rng: np.random.Generator) -> Batch:
        """Vision-language samples: one question on each of `count` random frames, scene camera only."""
        frames = np.sort(rng.choice(len(scenes["uv"]), size=count, replace=False))
        prompts, answers, targets = [], [], []
        for frame in frames:
            sample = draw_sample(seen_objects(scenes, frame, least_pixels=LEAST_PIXELS), rng)
            prompts.append(QUESTION_PROMPT.replace("{task}", sample.question))
            answers.append([*self.tokenizer.encode(sample.answer, add_special_tokens=False).ids, self.eos])
            targets.append(sample.about)
        images = scenes["images"][frames][:, [CAMERAS.index("scene")]]
        cells = torch.from_numpy(scenes["cells"][frames][:, [CAMERAS.index("scene")]].astype(np.int64))
        return self._assemble(images, prompts, answers, targets, rng, cells=cells)

    def draw_views(self, scenes: Arrays, count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Images [count * V, C, H, W] of all cameras and their cell labels, for the stem."""
        frames = np.sort(rng.choice(len(scenes["uv"]), size=count, replace=False))
        images = scenes["images"][frames].reshape(-1, *scenes["images"].shape[2:])
        cells = scenes["cells"][frames].reshape(len(images), -1).astype(np.int64)
        views = augment(torch.from_numpy(images_to_input(images)), rng)
        return views.to(self.device), torch.from_numpy(cells).to(self.device)

    def draw_robot(
        self, robot: Arrays, count: int, rng: np.random.Generator, frames: NDArray[np.int64] | None = None
    ) -> Batch:
        """Robot samples:

        the commanded task, state and images -> chunk; `frames` picks them instead of the generator.
        """
        chosen = np.sort(rng.choice(len(robot["state"]), size=count, replace=False)) if frames is None else frames
        state_BJ = robot["state"][chosen].astype(np.float64)
        action_BHA = self.space.normalize_chunk(robot["chunk"][chosen].astype(np.float64), state_BJ)
        prompts, answers, targets = [], [], []
        for row, frame in enumerate(chosen):
            instruction, seen = commanded(robot, frame)
            prompts.append(self.robot_prompt(instruction, state_BJ[row]))
            answers.append([self.first_fast + i for i in self.fast.encode(action_BHA[row])])
            targets.append(seen)
        readout = self.fast.coefficients(action_BHA)[:, : self.frequencies]
        return self._assemble(
            robot["images"][chosen],
            prompts,
            answers,
            targets,
            rng,
            readout=torch.from_numpy(readout.astype(np.float32)),
            action=torch.from_numpy(action_BHA.astype(np.float32)),
            state=torch.from_numpy(normalize(state_BJ, self.space.state_low, self.space.state_high).astype(np.float32)),
        )

    def look(self, views_VHWC: NDArray[np.uint8], instruction: str, state_J: NDArray[np.float64]) -> Batch:
        """One observation without targets (its postfix is a placeholder), images as the camera gave them."""
        prompt = self.robot_prompt(instruction, state_J)
        return self._assemble(views_VHWC[None], [prompt], [[self.eos]], [None], rng=None)

    def robot_prompt(self, instruction: str, state_J: NDArray[np.float64]) -> str:
        """The demo's prompt, rendered exactly as on the robot."""
        bins = state_to_bins(normalize(state_J, self.space.state_low, self.space.state_high))
        return render_prompt(DEMO_PROMPT, instruction, bins)

    def cell_of(self, seen: SeenObject | None) -> int:
        if seen is None or not (0 <= seen.u < 1 and 0 <= seen.v < 1):
            return NO_TARGET
        return int(seen.v * self.grid) * self.grid + int(seen.u * self.grid)

    def _assemble(
        self,
        images: NDArray[np.uint8],
        prompts: Sequence[str],
        answers: Sequence[Sequence[int]],
        targets: Sequence[SeenObject | None],
        rng: np.random.Generator | None,
        cells: Tensor | None = None,
        readout: Tensor | None = None,
        action: Tensor | None = None,
        state: Tensor | None = None,
    ) -> Batch:
        tokenized = [tokenize(self.tokenizer, prompt, self.length) for prompt in prompts]
        tokens = torch.from_numpy(np.stack([tokens for tokens, _ in tokenized]))
        mask = torch.from_numpy(np.stack([mask for _, mask in tokenized]))
        pixels = torch.from_numpy(images_to_input(images))
        longest = int(mask.sum(dim=1).max())  # columns that no sample of this batch uses cost time and change nothing
        width = max(len(answer) for answer in answers)
        postfix = torch.zeros(len(answers), width, dtype=torch.int64)
        postfix_mask = torch.zeros(len(answers), width, dtype=torch.bool)
        for row, answer in enumerate(answers):
            postfix[row, : len(answer)] = torch.tensor(answer)
            postfix_mask[row, : len(answer)] = True
        return Batch(
            images_BVCHW=pixels if rng is None else augment(pixels, rng),
            image_mask_BV=torch.ones(images.shape[:2], dtype=torch.bool),
            tokens_BL=tokens[:, :longest],
            token_mask_BL=mask[:, :longest],
            postfix_BT=postfix,
            postfix_mask_BT=postfix_mask,
            target_cell_B=torch.tensor([self.cell_of(seen) for seen in targets]),
            place_B2=torch.tensor([(torch.nan, torch.nan) if seen is None else (seen.u, seen.v) for seen in targets]),
            cells_BVN=cells,
            readout_BKA=readout,
            action_BHA=action,
            state_BJ=state,
        ).to(self.device)


def commanded(robot: Arrays, frame: int) -> tuple[str, SeenObject | None]:
    """The instruction of a robot frame and its object, wherever it is now in the scene image.

    Recorded frames have the instruction as text (`task`), and nobody knows where its object is.
    """
    if "task" in robot:
        return str(robot["task"][frame]), None
    target = int(robot["target"][frame])
    colour, shape = COMBINATIONS[robot["kind"][frame][target]]
    u, v = robot["uv"][frame][target]
    task = Task(VERBS[int(robot["verb"][frame])], colour, shape)
    return task.instruction, SeenObject(colour, shape, float(u), float(v))


def augment(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Brightness and contrast of each sample (all its cameras alike) by up to a tenth.

    No crop or shift: places are the lesson.
    """
    shape = (len(images), *(1,) * (images.dim() - 1))
    gain = torch.from_numpy(rng.uniform(0.9, 1.1, shape).astype(np.float32))
    offset = torch.from_numpy(rng.uniform(-0.1, 0.1, shape).astype(np.float32))
    return (images * gain + offset).clamp_(-1.0, 1.0)
