"""What one training step is given, and how images, prompts and answers become it.

Legend: B batch, V cameras, C channels, H W image sides, L prompt tokens, T postfix tokens, N image cells, R asking
tokens, K readout frequencies, J joints; of actions H horizon, A action dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.policy import images_to_input, tokenize
from ki_vla_ros.robot import Robot
from training.model import VisionConfig

NO_TARGET = -1

Arrays = dict[str, NDArray[Any]]
"""Frames by column: the first axis of each array counts the same frames."""


@dataclass(frozen=True)
class ChunkTiming:
    """The sizes and the timing of a model that its data depend on."""

    image_size: int
    horizon: int
    period_s: float
    grid: int  # image tokens along one side

    @classmethod
    def of(cls, vision: VisionConfig, robot: Robot) -> ChunkTiming:
        return cls(vision.image_size, robot.horizon, robot.action_period_s, vision.image_size // vision.patch_size)


@dataclass(frozen=True)
class Batch:
    """A prefix (images in [-1, 1] and a prompt), a postfix to predict, and labels; None for what the samples lack.

    `text_mask_BT` and `fast_mask_BT` say which tokens of the postfix count as words and which as FAST actions.
    `asking_BR` holds the indices of the prompt tokens that hints are read from. `place_B2` is where the last camera's
    image shows the object asked about, as u and v in 0..1 (NaN: unknown or none); `target_cell_B` is the image cell
    there, or `NO_TARGET`. `cells_BVN` says what each image cell shows, `readout_BKA` holds the scaled DCT coefficients
    of the lowest frequencies, `action_BHA` the normalised chunk and `state_BJ` the normalised joint state.
    """

    images_BVCHW: Tensor
    image_mask_BV: Tensor
    tokens_BL: Tensor
    token_mask_BL: Tensor
    postfix_BT: Tensor | None = None
    text_mask_BT: Tensor | None = None
    fast_mask_BT: Tensor | None = None
    asking_BR: Tensor | None = None
    place_B2: Tensor | None = None
    target_cell_B: Tensor | None = None
    cells_BVN: Tensor | None = None
    readout_BKA: Tensor | None = None
    action_BHA: Tensor | None = None
    state_BJ: Tensor | None = None

    @property
    def prefix(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images and their mask, prompt tokens and their mask: what the model is given first."""
        return self.images_BVCHW, self.image_mask_BV, self.tokens_BL, self.token_mask_BL

    @property
    def postfix_mask_BT(self) -> Tensor | None:
        """True for the tokens of the postfix that count, False for padding."""
        if self.text_mask_BT is None or self.fast_mask_BT is None:
            return self.fast_mask_BT if self.text_mask_BT is None else self.text_mask_BT
        return self.text_mask_BT | self.fast_mask_BT

    @property
    def last_token_B(self) -> Tensor:
        """Index of each prompt's last token."""
        return self.token_mask_BL.sum(dim=1) - 1

    def to(self, device: torch.device | str) -> Batch:
        moved: dict[str, Any] = {
            name: None if label is None else label.to(device) for name, label in vars(self).items()
        }
        return Batch(**moved)


class BatchMaker:
    """Tokenizes and pads as the robot does; an image has `grid` cells along each side."""

    def __init__(self, tokenizer: Tokenizer, *, length: int, grid: int, device: torch.device | str = "cpu") -> None:
        self.tokenizer, self.length, self.grid, self.device = tokenizer, length, grid, device

    def make(
        self,
        images_BVHWC: NDArray[np.uint8],
        prompts: Sequence[str],
        postfixes: Sequence[Sequence[int]],
        rng: np.random.Generator,
        *,
        fast: bool,
        asking: Sequence[int] = (),
        place_B2: NDArray[np.floating] | None = None,
        **labels: Tensor,
    ) -> Batch:
        """A batch with augmented images; `postfixes` are token ids, of FAST actions if `fast`, else of text.

        `asking` lists the ids of the prompt tokens that hints are read from; without any, that is the last token.
        """
        tokenized = [tokenize(self.tokenizer, prompt, self.length) for prompt in prompts]
        tokens = torch.from_numpy(np.stack([tokens for tokens, _ in tokenized]))
        mask = torch.from_numpy(np.stack([mask for _, mask in tokenized]))
        longest = int(mask.sum(dim=1).max())  # columns that no sample of this batch uses cost time and change nothing
        tokens, mask = tokens[:, :longest], mask[:, :longest]
        width = max(len(postfix) for postfix in postfixes)
        postfix_BT = torch.zeros(len(postfixes), width, dtype=torch.int64)
        counts_BT = torch.zeros(len(postfixes), width, dtype=torch.bool)
        for row, postfix in enumerate(postfixes):
            postfix_BT[row, : len(postfix)] = torch.tensor(postfix)
            counts_BT[row, : len(postfix)] = True
        if asking:  # where each of these ids first occurs
            found_BLR = tokens[:, :, None] == torch.tensor(asking)
            if not found_BLR.any(dim=1).all():
                row, which = (~found_BLR.any(dim=1)).nonzero()[0].tolist()
                raise ConfigurationError(
                    f"prompt {prompts[row]!r}: expected the token that hints are read from, "
                    f"{self.tokenizer.id_to_token(asking[which])!r}, got a prompt without it"
                )
            asking_BR = found_BLR.int().argmax(dim=1)
        else:
            asking_BR = (mask.sum(dim=1) - 1)[:, None]
        if place_B2 is None:
            place_B2 = np.full((len(prompts), 2), np.nan)
        return Batch(
            images_BVCHW=augment(torch.from_numpy(images_to_input(images_BVHWC)), rng),
            image_mask_BV=torch.ones(images_BVHWC.shape[:2], dtype=torch.bool),
            tokens_BL=tokens,
            token_mask_BL=mask,
            postfix_BT=postfix_BT,
            text_mask_BT=None if fast else counts_BT,
            fast_mask_BT=counts_BT if fast else None,
            asking_BR=asking_BR,
            place_B2=torch.from_numpy(place_B2.astype(np.float32)),
            target_cell_B=torch.tensor([self.cell_of(float(u), float(v)) for u, v in place_B2]),
            **labels,
        ).to(self.device)

    def cell_of(self, u: float, v: float) -> int:
        """The image cell at a place, counted in raster order; `NO_TARGET` outside the image and for NaN."""
        if not (0 <= u < 1 and 0 <= v < 1):
            return NO_TARGET
        return int(v * self.grid) * self.grid + int(u * self.grid)


def augment(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Change each sample's brightness and contrast by up to a tenth, the same for all its cameras.

    No crop or shift: the model is to learn where things are.
    """
    shape = (len(images), *(1,) * (images.dim() - 1))
    gain = torch.from_numpy(rng.uniform(0.9, 1.1, shape).astype(np.float32))
    offset = torch.from_numpy(rng.uniform(-0.1, 0.1, shape).astype(np.float32))
    return (images * gain + offset).clamp_(-1.0, 1.0)
