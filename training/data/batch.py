"""What one training step is given, and how samples of data sets become it.

Legend: B batch, V cameras, C channels, H W image sides, L prompt tokens, T postfix tokens, N image cells, R asking
tokens, K readout frequencies, S state; of actions H horizon, D the robot's, A the model's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from ki_vla_ros.bundle import PromptSpec, StateEncoding
from ki_vla_ros.errors import ConfigurationError, InputError
from ki_vla_ros.policy import images_to_input, tokenize, write_prompt
from training.data.augmentation import Augmentation, recolour, turn_and_crop
from training.data.embodiment import Embodiment
from training.data.samples import Image, Labels, LanguageSample, RobotSample
from training.tokens import EOS_TOKEN, PostfixKind, encode_text, localise, make_postfix, token_id

NO_TARGET = -1
# Of the loss of dimensions that only other robots have, beside 1 for the robot's own. They are learned, as zeros,
# because the flow integrates them too: their noise would otherwise go wherever untrained velocities lead.
PADDING_WEIGHT = 0.1


@dataclass(frozen=True)
class Batch:
    """A prefix (images in [-1, 1] and a prompt), a postfix to predict, and labels; None for what the samples lack.

    `text_mask_BT` and `fast_mask_BT` say which tokens of the postfix count as words and which as FAST actions.
    `asking_BR` holds the indices of the prompt tokens that hints are read from. `place_B2` is where the last camera's
    image shows the object asked about, as u and v in 0..1 (NaN: unknown or none); `target_cell_B` is the image cell
    there, or `NO_TARGET`. `cells_BVN` says what each image cell shows, `readout_BKA` holds the scaled DCT coefficients
    of the lowest frequencies, `action_BHA` the normalised chunk, of which `known_BH` says what is known (the rest lies
    past an episode's end), and `state_BS` the normalised state.

    Robots of fewer dimensions than the model have zeros after their own; `weight_BA` weighs those (`PADDING_WEIGHT`).
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
    state_BS: Tensor | None = None
    known_BH: Tensor | None = None
    weight_BA: Tensor | None = None

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

    def rows(self, rows: slice) -> Batch:
        """These samples of the batch alone, padded as they are."""
        chosen: dict[str, Any] = {name: None if label is None else label[rows] for name, label in vars(self).items()}
        return Batch(**chosen)


@dataclass(frozen=True)
class BatchForm:
    """The sizes that the model gives its batches, and what prompts look like."""

    image_size: int
    grid: int  # image cells along one side
    horizon: int
    action_dim: int
    state_dim: int
    prompt: PromptSpec
    state: StateEncoding = "text"
    postfix: PostfixKind = "bare"
    longest_text: int = 256  # tokens of a question, and of its answer
    separator: str = ""
    """After a question, before its answer: a line break in PaliGemma's training."""
    asking: tuple[int, ...] = ()
    """Ids of the prompt tokens that hints are read from; none: the last token."""
    readouts: int = 0
    """How many of FAST's lowest frequencies the asking tokens name, one each."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    cameras: Mapping[str, Augmentation] = field(default_factory=dict)
    """By name, where a camera has its own."""


class BatchMaker:
    """Normalises, tokenizes, augments and pads, so that the model sees in training what it sees on the robot."""

    def __init__(self, tokenizer: Tokenizer, form: BatchForm) -> None:
        self.tokenizer, self.form = tokenizer, form
        self.eos = token_id(tokenizer, EOS_TOKEN)
        self.postfix = make_postfix(tokenizer, form.postfix, form.prompt.template)

    def of_robots(
        self,
        embodiments: Sequence[Embodiment],
        samples: Sequence[RobotSample],
        rng: np.random.Generator,
        action_tokens: bool = True,
    ) -> Batch:
        """A batch of robots' samples, each with the robot that it is of; without `action_tokens`, with no postfix."""
        form, count = self.form, len(samples)
        state_BS = np.zeros((count, form.state_dim), dtype=np.float32)
        action_BHA = np.zeros((count, form.horizon, form.action_dim), dtype=np.float32)
        weight_BA = np.full((count, form.action_dim), PADDING_WEIGHT, dtype=np.float32)
        readout_BKA = np.zeros((count, form.readouts, form.action_dim), dtype=np.float32)
        prompts, postfixes = [], []
        for b, (embodiment, sample) in enumerate(zip(embodiments, samples, strict=True)):
            width = sample.chunk_HD.shape[1]
            state_S = embodiment.space.normalize_state(sample.state_S)
            action_HD = embodiment.space.normalize_chunk(sample.chunk_HD, sample.state_S)
            state_BS[b, : len(state_S)], action_BHA[b, :, :width], weight_BA[b, :width] = state_S, action_HD, 1.0
            prompts.append(self.render(sample.task, state_S))
            # A chunk's tokens stand for all of it; of one that is not known to its end, none can be learned.
            whole = bool(sample.known_H.all())
            if action_tokens:
                postfixes.append(self.postfix.write(embodiment.chunks.encode(action_HD)) if whole else [])
            if form.readouts:
                coefficients_HD = embodiment.frequencies.coefficients(action_HD)
                readout_BKA[b, :, :width] = coefficients_HD[: form.readouts] if whole else np.nan
        looks = [[self._look(camera.name) for camera in embodiment.robot.cameras] for embodiment in embodiments]
        images = [self._turned(sample, look, rng) for sample, look in zip(samples, looks, strict=True)]
        postfix_BT, counts_BT = pad(postfixes) if action_tokens else (None, None)
        return Batch(
            *self._images(images, looks, rng, [sample.labels for sample in samples]),
            *(tokens := self._tokens(prompts, form.prompt.length)),
            postfix_BT=postfix_BT,
            fast_mask_BT=counts_BT,
            asking_BR=self._asking(*tokens, prompts, form.asking),
            **self._labels([sample.labels for sample in samples]),
            readout_BKA=torch.from_numpy(readout_BKA) if form.readouts else None,
            action_BHA=torch.from_numpy(action_BHA),
            state_BS=torch.from_numpy(state_BS),
            known_BH=torch.from_numpy(np.stack([sample.known_H for sample in samples])),
            weight_BA=torch.from_numpy(weight_BA) if (weight_BA < 1.0).any() else None,
        )

    def of_language(self, samples: Sequence[LanguageSample], rng: np.random.Generator) -> Batch:
        """A batch of questions or prefixes about images, and their answers."""
        form = self.form
        looks = [[form.augmentation] * len(sample.images) for sample in samples]
        answers = [self._answer(sample) for sample in samples]
        postfix_BT, counts_BT = pad(answers)
        prompts = [localise(self.tokenizer, sample.prefix + form.separator) for sample in samples]
        has_text = bool(counts_BT.any())
        return Batch(
            *self._images([sample.images for sample in samples], looks, rng, [sample.labels for sample in samples]),
            *(tokens := self._tokens(prompts, form.longest_text)),
            postfix_BT=postfix_BT if has_text else None,
            text_mask_BT=counts_BT if has_text else None,
            asking_BR=self._asking(*tokens, prompts, ()),
            **self._labels([sample.labels for sample in samples]),
        )

    def render(self, task: str, state_S: NDArray[np.float64]) -> str:
        """The prompt, exactly as the robot renders it; `state_S` is normalised."""
        return write_prompt(self.form.prompt, self.form.state, task, state_S)

    def cell_of(self, u: float, v: float) -> int:
        """The image cell at a place, counted in raster order; `NO_TARGET` outside the image and for NaN."""
        if not (0 <= u < 1 and 0 <= v < 1):
            return NO_TARGET
        return int(v * self.form.grid) * self.form.grid + int(u * self.form.grid)

    def _answer(self, sample: LanguageSample) -> list[int]:
        if not sample.suffix:
            return []
        ids = encode_text(self.tokenizer, sample.suffix)
        if len(ids) >= self.form.longest_text:
            raise InputError(
                f"suffix {sample.suffix[:60]!r}...: expected at most {self.form.longest_text - 1} tokens, got "
                f"{len(ids)}; raise longest_text, or shorten it"
            )
        return [*ids, self.eos]

    def _look(self, camera: str) -> Augmentation:
        return self.form.cameras.get(camera, self.form.augmentation)

    def _turned(
        self, sample: RobotSample, looks: Sequence[Augmentation], rng: np.random.Generator
    ) -> list[Image | None]:
        """The images, cropped and turned; not where labels say what is where."""
        if sample.labels.place is not None or sample.labels.cells_VN is not None:
            if any(look.moves_pixels for look in looks):
                raise ConfigurationError(
                    "augmentation: expected no crop and no rotation for data with places or cells, which say where in "
                    "the image something is, got some; leave them out, or leave the hints out"
                )
            return list(sample.images)
        return [
            None if image is None else turn_and_crop(image, look, rng)
            for image, look in zip(sample.images, looks, strict=True)
        ]

    def _images(
        self,
        images: Sequence[Sequence[Image | None]],
        looks: Sequence[Sequence[Augmentation]],
        rng: np.random.Generator,
        labels: Sequence[Labels],
    ) -> tuple[Tensor, Tensor]:
        """[B, V, C, H, W] in -1..1, and which are there [B, V].

        A sample with fewer images than others has them last, so that the last image is always beside the prompt. A view
        that no sample of this batch has costs time and changes nothing, so it is left out, unless labels count views.
        """
        most, size = max(len(row) for row in images), self.form.image_size
        pixels_BVCHW = np.full((len(images), most, 3, size, size), -1.0, dtype=np.float32)
        mask_BV = np.zeros((len(images), most), dtype=np.bool_)
        for b, row in enumerate(images):
            for v, image in enumerate(row, start=most - len(row)):
                if image is not None:
                    look = looks[b][v - most + len(row)]
                    pixels_BVCHW[b, v] = recolour(images_to_input(image[None])[0], look, rng)
                    mask_BV[b, v] = True
        if most and all(label.place is None and label.cells_VN is None for label in labels):
            seen = np.flatnonzero(mask_BV.any(axis=0)) if mask_BV.any() else [most - 1]
            pixels_BVCHW, mask_BV = pixels_BVCHW[:, seen], mask_BV[:, seen]
        return torch.from_numpy(pixels_BVCHW), torch.from_numpy(mask_BV)

    def _tokens(self, prompts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """[B, L] and their mask; columns that no sample of this batch uses cost time and change nothing."""
        tokenized = [tokenize(self.tokenizer, prompt, length) for prompt in prompts]
        tokens = torch.from_numpy(np.stack([tokens for tokens, _ in tokenized]))
        mask = torch.from_numpy(np.stack([mask for _, mask in tokenized]))
        longest = int(mask.sum(dim=1).max())
        return tokens[:, :longest], mask[:, :longest]

    def _asking(self, tokens: Tensor, mask: Tensor, prompts: Sequence[str], asking: Sequence[int]) -> Tensor:
        """[B, R]: where each of these ids first occurs; without any, the last token."""
        if not asking:
            return (mask.sum(dim=1) - 1)[:, None]
        found_BLR = tokens[:, :, None] == torch.tensor(asking)
        if not found_BLR.any(dim=1).all():
            row, which = (~found_BLR.any(dim=1)).nonzero()[0].tolist()
            raise ConfigurationError(
                f"prompt {prompts[row]!r}: expected the token that hints are read from, "
                f"{self.tokenizer.id_to_token(asking[which])!r}, got a prompt without it"
            )
        return found_BLR.int().argmax(dim=1)

    def _labels(self, labels: Sequence[Labels]) -> dict[str, Any]:
        """Places and cells, where any of the samples has them."""
        found: dict[str, Any] = {}
        if any(label.place is not None for label in labels):
            places = [(np.nan, np.nan) if label.place is None else label.place for label in labels]
            found["place_B2"] = torch.tensor(places, dtype=torch.float32)
            found["target_cell_B"] = torch.tensor([self.cell_of(*place) for place in places])
        if any(label.cells_VN is not None for label in labels):
            most = max(len(label.cells_VN) for label in labels if label.cells_VN is not None)
            cells_BVN = np.full((len(labels), most, self.form.grid**2), NO_TARGET, dtype=np.int64)
            for b, label in enumerate(labels):
                if label.cells_VN is not None:
                    if label.cells_VN.shape[1] != self.form.grid**2:
                        raise ConfigurationError(
                            f"cells: expected {self.form.grid**2} (the model's image has {self.form.grid} x "
                            f"{self.form.grid} patches), got {label.cells_VN.shape[1]}; make the data for this model"
                        )
                    cells_BVN[b, most - len(label.cells_VN) :] = label.cells_VN
            found["cells_BVN"] = torch.from_numpy(cells_BVN)
        return found


def pad(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] with zeros after each sequence, and the mask of what is not padding."""
    width = max(1, max(len(sequence) for sequence in sequences))
    postfix_BT = torch.zeros(len(sequences), width, dtype=torch.int64)
    counts_BT = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        postfix_BT[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
        counts_BT[row, : len(sequence)] = True
    return postfix_BT, counts_BT
