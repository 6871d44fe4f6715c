"""Offline figures of a model on held-out instructions: the gates of training.

"Follow" here means: of the demonstrator's chunks towards each object of the scene, the one towards the instructed
object is the nearest to the prediction.

Legend: B batch, F frames, O objects of a scene, H horizon, J joints, A action dim, N image cells.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.data import NO_TARGET, Batch, RobotFrames
from training.losses import TrainingHeads, asking_rows, prompt_start, scene_scores, take_rows
from training.model import VLA
from training.tokens import FastDecodeError, FastTokenizer, cosine_basis

FRAMES = 256  # held-out frames that the offline figures are computed on
BATCH = 64  # frames at once; FAST is decoded token by token, which is slow, so only for the first batch


@torch.no_grad()
def measure(
    model: VLA,
    frames: RobotFrames,
    flow_steps: int,
    heads: TrainingHeads | None = None,
    probe: tuple[int, int] | None = None,
) -> dict[str, float]:
    """Figures by name: rates in 0..1, and `*_error` in rad (mean over joints and steps).

    The arrays of `frames` also have `rivals` [F, O, H, J] (the demonstrator's chunks towards each object; NaN: none),
    `target` [F] (the instructed object) and `uv` [F, O, 2] (the objects in the last camera's image).
    `pointing` (with heads and probe): the object nearest to the probe's strongest scene cell is the instructed one.
    `*_follow` (see the module's docstring): by the expert (`flow`), the readout tokens (`readout`, with heads) and
    greedy FAST decoding (`fast`); malformed FAST counts as a miss.
    `fast_clamped`: the share of coefficients that FAST's vocabulary cannot express, so that their tokens are not exact.
    """
    arrays = frames.arrays
    rows_F = np.linspace(0, len(arrays["state"]) - 1, FRAMES).astype(np.int64)
    state_FJ, chunk_FHJ = (arrays[name][rows_F].astype(np.float64) for name in ("state", "chunk"))
    clamped = frames.fast.count_clamped(frames.space.normalize_chunk(chunk_FHJ, state_FJ)) / chunk_FHJ.size
    rng = np.random.default_rng(0)
    hits: dict[str, list[NDArray[Any]]] = {}
    errors: dict[str, list[NDArray[Any]]] = {}
    for start in range(0, FRAMES, BATCH):
        rows = rows_F[start : start + BATCH]
        batch = frames.take(rows, rng)
        if heads is not None and probe is not None:
            cells_B = strongest_cells(model, batch, probe)
            hits.setdefault("pointing", []).append(points_right(cells_B, batch, arrays["uv"][rows], frames))
        for name, action_BHA in predict(model, frames, batch, flow_steps, heads, with_fast=start == 0):
            chunk_BHJ = frames.space.unnormalize_chunk(action_BHA, arrays["state"][rows].astype(np.float64))
            distance = np.nan_to_num(np.abs(arrays["rivals"][rows] - chunk_BHJ[:, None]).mean(axis=(2, 3)), nan=np.inf)
            hits.setdefault(f"{name}_follow", []).append(distance.argmin(axis=1) == arrays["target"][rows])
            errors.setdefault(f"{name}_error", []).append(np.abs(arrays["chunk"][rows] - chunk_BHJ).mean(axis=(1, 2)))
    figures = {name: np.concatenate(values) for name, values in (hits | errors).items()}
    # FAST has no error if every sequence is malformed; its follow rate says so.
    means = {name: float(np.nanmean(values)) for name, values in figures.items() if not np.isnan(values).all()}
    return means | {"fast_clamped": clamped}


def strongest_cells(model: VLA, batch: Batch, probe: tuple[int, int]) -> NDArray[np.int64]:
    """[B]: the cell of the last camera's image that the first asking token attends to most."""
    output = model(*batch.prefix, probe=probe)
    cells_B: NDArray[np.int64] = scene_scores(model, batch, output)[:, 0].argmax(dim=1).cpu().numpy()
    return cells_B


def points_right(
    cells_B: NDArray[np.int64], batch: Batch, uv_BO2: NDArray[np.floating], frames: RobotFrames
) -> NDArray[np.bool_]:
    """[B]: whether the object nearest to the cell's middle is the target."""
    if batch.target_cell_B is None:
        raise ValueError("points_right: expected a batch with target cells, got one without")
    maker, right = frames.maker, []
    for cell, places_O2, target in zip(cells_B.tolist(), uv_BO2, batch.target_cell_B.tolist(), strict=True):
        place = np.array([cell % maker.grid + 0.5, cell // maker.grid + 0.5]) / maker.grid
        seen = [(float(u), float(v)) for u, v in places_O2 if 0 <= u < 1 and 0 <= v < 1]
        nearest = min(seen, key=lambda uv: float(np.hypot(*(place - uv))), default=(np.nan, np.nan))
        right.append(target != NO_TARGET and maker.cell_of(*nearest) == target)
    return np.array(right)


def predict(
    model: VLA, frames: RobotFrames, batch: Batch, flow_steps: int, heads: TrainingHeads | None, with_fast: bool
) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Normalised chunks [B, H, A] by each way of reading the model; NaN rows where FAST was malformed."""
    if batch.action_BHA is None:
        raise ValueError("predict: expected a batch with actions, got one without")
    cache = model.prefill(*batch.prefix)
    noise = torch.randn(batch.action_BHA.shape, generator=torch.Generator().manual_seed(0)).to(batch.action_BHA.device)
    state = None if model.config.state_dim is None else batch.state_BJ
    yield "flow", model.sample_actions(cache, noise, flow_steps, state).double().cpu().numpy()
    if heads is not None:
        hidden_BPD = model.backbone.norm(model(*batch.prefix).prefix_by_layer[-2])
        named_BKA = heads.name_coefficients(take_rows(hidden_BPD, asking_rows(model, batch)))[0]
        coefficients_BKA = named_BKA.double().cpu().numpy() / frames.fast.scale
        basis_KH = cosine_basis(batch.action_BHA.shape[1])[: coefficients_BKA.shape[1]]
        yield "readout", np.einsum("kh,bka->bha", basis_KH, coefficients_BKA)
    if with_fast:
        yield "fast", decode_greedily(model, frames.fast, frames.first_fast, batch)


def decode_greedily(
    model: VLA, fast: FastTokenizer, first: int, batch: Batch, longest: int = 80
) -> NDArray[np.float64]:
    """Chunks decoded from FAST tokens by argmax, NaN if malformed; only a figure: the robot never decodes tokens.

    `first` is the id of FAST's token 0 in the model's vocabulary.
    """
    if batch.action_BHA is None:
        raise ValueError("decode_greedily: expected a batch with actions, got one without")
    _, horizon, action_dim = batch.action_BHA.shape
    tokens = torch.zeros(len(batch.tokens_BL), 0, dtype=torch.int64, device=batch.tokens_BL.device)
    last = prompt_start(model, batch) + batch.last_token_B
    lengths = np.array([len(fast.integers(i)) for i in range(fast.vocab_size)])
    count = np.zeros(len(tokens))
    whole = horizon * action_dim
    while tokens.shape[1] < longest and (count < whole).any():
        output = model(*batch.prefix, postfix_BT=tokens if tokens.shape[1] else None)
        postfix = output.postfix_hidden_BTD
        hidden: Tensor = (
            postfix[:, -1]
            if postfix is not None
            else output.prefix_hidden_BPD[torch.arange(len(last), device=last.device), last]
        )
        best = model.logits(hidden)[:, first : first + fast.vocab_size].argmax(dim=1)
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
            chunks.append(fast.decode(used))
        except FastDecodeError:
            chunks.append(np.full((horizon, action_dim), np.nan))
    return np.stack(chunks)
