"""Offline figures of a model on held-out instructions: the gates of training.

"Follow" here means: among the expert's chunks towards every object of the scene,
the predicted one lies nearest to that towards the instructed object.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from training.data.simulated.draw import NO_TARGET, Batch
from training.data.simulated.generate import seen_objects
from training.data.simulated.robot import FLOW_STEPS, HORIZON
from training.tokens.fast import FastDecodeError, cosine_basis

if TYPE_CHECKING:
    from training.train import Trainer

FRAMES = 256  # held-out frames that the offline figures are computed on
BATCH = 64  # frames at once; FAST is decoded token by token, which takes long, so only the first batch of them


@torch.no_grad()
def measure(trainer: Trainer) -> dict[str, float]:
    """Offline figures, all on held-out combinations; rates in 0..1, `*_error` in rad (mean over joints and steps).

    `pointing`: the probe head's strongest scene cell lies nearest to the instructed object. `*_follow`: see the
    module's docstring, by the expert (`flow`), the readout tokens (`readout`) and greedy FAST decoding (`fast`);
    malformed FAST counts as a miss.
    """
    frames = np.linspace(0, len(trainer.validation["state"]) - 1, FRAMES).astype(np.int64)
    rng = np.random.default_rng(0)
    hits: dict[str, list[NDArray[np.bool_]]] = {}
    errors: dict[str, list[NDArray[np.float64]]] = {}
    for start in range(0, FRAMES, BATCH):
        chosen = frames[start : start + BATCH]
        batch = trainer.maker.draw_robot(trainer.validation, len(chosen), rng, frames=chosen)
        hits.setdefault("pointing", []).append(_points_right(trainer, batch, chosen))
        for name, action in _predict(trainer, batch, with_fast=start == 0):
            state = trainer.validation["state"][chosen].astype(np.float64)
            chunk = trainer.space.unnormalize_chunk(action, state)
            rivals = trainer.validation["rivals"][chosen]
            distance = np.nan_to_num(np.abs(rivals - chunk[:, None]).mean(axis=(2, 3)), nan=np.inf)
            hits.setdefault(f"{name}_follow", []).append(
                distance.argmin(axis=1) == trainer.validation["target"][chosen]
            )
            errors.setdefault(f"{name}_error", []).append(
                np.abs(trainer.validation["chunk"][chosen] - chunk).mean(axis=(1, 2))
            )
    figures = {name: np.concatenate(values) for name, values in (hits | errors).items()}
    # No error can be given for FAST while every sequence is malformed; its follow rate says so.
    return {name: float(np.nanmean(values)) for name, values in figures.items() if not np.isnan(values).all()}


def _points_right(trainer: Trainer, batch: Batch, frames: NDArray[np.int64]) -> NDArray[np.bool_]:
    output = trainer.model(
        batch.images_BVCHW,
        batch.image_mask_BV,
        batch.tokens_BL,
        batch.token_mask_BL,
        probe=(trainer.config.probe_layer, trainer.config.probe_head),
    )
    cells = trainer.scene_scores(batch, output.probe_logits_BPQ, trainer.query_rows(batch))[:, 0].argmax(dim=1)
    grid = trainer.maker.grid
    right = []
    for cell, frame, target in zip(cells.tolist(), frames, batch.target_cell_B.tolist(), strict=True):
        seen = seen_objects(trainer.validation, frame)
        place = np.array([cell % grid + 0.5, cell // grid + 0.5]) / grid
        nearest = min(seen, key=lambda item: float(np.hypot(*(place - (item.u, item.v)))))
        right.append(target != NO_TARGET and trainer.maker.cell_of(nearest) == target)
    return np.array(right)


def _predict(trainer: Trainer, batch: Batch, with_fast: bool) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Normalised chunks [B, H, A] by each way of reading the model; NaN rows where FAST was malformed."""
    model = trainer.model
    cache = model.prefill(batch.images_BVCHW, batch.image_mask_BV, batch.tokens_BL, batch.token_mask_BL)
    noise = torch.randn(batch.action_BHA.shape, generator=torch.Generator().manual_seed(0)).to(trainer.device)
    yield "flow", model.sample_actions(cache, noise, FLOW_STEPS, trainer.expert_state(batch, 1)).double().cpu().numpy()
    output = model(batch.images_BVCHW, batch.image_mask_BV, batch.tokens_BL, batch.token_mask_BL)
    hidden = model.backbone.norm(output.prefix_by_layer[-2]).gather(
        1, trainer.query_rows(batch)[:, :, None].expand(-1, -1, model.config.backbone.width)
    )
    coefficients = trainer.heads.name_coefficients(hidden)[0].double().cpu().numpy() / trainer.fast.scale
    basis = cosine_basis(HORIZON)[: coefficients.shape[1]]
    yield "readout", np.einsum("kh,bka->bha", basis, coefficients)
    if with_fast:
        yield "fast", decode_greedily(trainer, batch)


def decode_greedily(trainer: Trainer, batch: Batch, longest: int = 80) -> NDArray[np.float64]:
    """FAST tokens by argmax, decoded; NaN where they are no chunk. Only a figure: the robot never decodes tokens."""
    first, size = trainer.maker.first_fast, trainer.fast.vocab_size
    tokens = torch.zeros(len(batch.tokens_BL), 0, dtype=torch.int64, device=trainer.device)
    last = trainer.prefix_offset(batch) + batch.token_mask_BL.sum(dim=1) - 1
    lengths = np.array([len(trainer.fast.bpe.id_to_token(i)) for i in range(size)])
    count = np.zeros(len(tokens))
    whole = HORIZON * batch.action_BHA.shape[2]
    while tokens.shape[1] < longest and (count < whole).any():
        output = trainer.model(
            batch.images_BVCHW,
            batch.image_mask_BV,
            batch.tokens_BL,
            batch.token_mask_BL,
            postfix_BT=tokens if tokens.shape[1] else None,
        )
        postfix = output.postfix_hidden_BTD
        hidden = (
            postfix[:, -1]
            if postfix is not None
            else output.prefix_hidden_BPD[torch.arange(len(last), device=last.device), last]
        )
        best = trainer.model.logits(hidden)[:, first : first + size].argmax(dim=1)
        tokens = torch.cat([tokens, (first + best)[:, None]], dim=1)
        count += lengths[best.cpu().numpy()]
    chunks = []
    for row in tokens.tolist():
        used, total = [], 0
        for token in row:
            if total < whole:
                used.append(token - first)
                total += lengths[token - first]
        try:
            chunks.append(trainer.fast.decode(used))
        except FastDecodeError:
            chunks.append(np.full(batch.action_BHA.shape[1:], np.nan))
    return np.stack(chunks)
