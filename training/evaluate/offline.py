"""Figures of a model on held-out data: the gates of training.

Legend: B batch, H horizon, D actions of a robot, A actions of the model, N image cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.data import NO_TARGET, Batch, Embodiment, RobotSample
from training.losses import BatchLosses, TrainingHeads, asking_rows, prompt_start, scene_scores, take_rows
from training.model import VLA
from training.tokens import FastDecodeError, FastTokenizer, cosine_basis

if TYPE_CHECKING:
    from training.sources import Sources

FRAMES = 256  # held-out frames that the figures are computed on
BATCH = 64  # frames at once; FAST is decoded token by token, which is slow, so only for the first batch


@torch.no_grad()
def measure(model: VLA, data: Sources, losses: BatchLosses, heads: TrainingHeads | None = None) -> dict[str, float]:
    """Figures by name, of the policy's robot, on what is held out under each name of the configuration.

    `WAY_error`: the mean error of the chunks that WAY predicts, in normalised units, and `WAY_error.DIMENSION` in the
    robot's own; ways are `flow` (the expert), `fast` (greedy FAST decoding; malformed sequences are left out, and
    `fast_whole` says how many are none) and `readout` (the hint's tokens, with heads). `pointing` (with heads): where
    the data says a place, how often the probe's strongest cell is at most one cell from it. `fast_clamped`: the share
    of coefficients that FAST's vocabulary cannot express, so that their tokens are not exact.
    """
    config, embodiment = losses.config, data.embodiment
    found: dict[str, list[NDArray[np.float64]]] = {}
    rng = np.random.default_rng(0)
    for name in data.robot_sources:
        if name not in data.held_out:
            continue
        mixture = data.held_out[name]
        rows = [row for row in mixture.spread(FRAMES) if data.robot_of(name, row[0]) is embodiment]
        for start in range(0, len(rows), BATCH):
            samples = mixture.read(rows[start : start + BATCH])
            batch = data.maker.of_robots([embodiment] * len(samples), samples, rng)
            device = next(model.parameters()).device
            first = data.maker.first_fast if start == 0 else None
            for key, values in measure_batch(
                model, embodiment, samples, batch.to(device), config.flow_steps, heads, first
            ):
                found.setdefault(key, []).append(values)
            if config.hints is not None and batch.target_cell_B is not None:
                cells_B = strongest_cells(model, batch.to(device), config.hints.probe)
                found.setdefault("pointing", []).append(points_right(cells_B, batch, data.form.grid))
    figures = {}
    for key, parts in found.items():
        known = np.concatenate(parts)
        if not np.isnan(known).all():
            figures[key] = float(np.nanmean(known))
    return figures


def measure_batch(
    model: VLA,
    embodiment: Embodiment,
    samples: Sequence[RobotSample],
    batch: Batch,
    flow_steps: int,
    heads: TrainingHeads | None,
    first_fast: int | None,
) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Each figure's values, one for each sample; NaN where there is none."""
    space, actions = embodiment.space, embodiment.robot.actions
    state_BS = np.stack([sample.state_S for sample in samples])
    chunk_BHD = np.stack([sample.chunk_HD for sample in samples])
    unknown_BH = ~np.stack([sample.known_H for sample in samples])
    true_BHD = space.normalize_chunk(chunk_BHD, state_BS)
    clamped = embodiment.chunks.count_clamped(true_BHD) / true_BHD.size
    yield "fast_clamped", np.full(len(samples), float(clamped))
    for way, action_BHA in predict(model, embodiment, batch, flow_steps, heads, first_fast):
        action_BHD = action_BHA[..., : len(actions)]
        error_BHD: NDArray[np.float64] = np.abs(action_BHD - true_BHD)
        error_BHD[unknown_BH] = np.nan
        with np.errstate(invalid="ignore"):
            # A mean over steps of which some are known; all of a malformed chunk is NaN.
            known_B = np.maximum(1, (~unknown_BH).sum(axis=1))
            malformed_B = np.isnan(action_BHD).any(axis=(1, 2))
            error_BD = np.nansum(error_BHD, axis=1) / known_B[:, None]
            error_BD[malformed_B] = np.nan
        yield f"{way}_error", np.asarray(error_BD.mean(axis=1))
        scale_D = (np.array(space.action_high) - np.array(space.action_low)) / 2.0
        for d, action in enumerate(actions):
            yield f"{way}_error.{action.name}", np.asarray(error_BD[:, d] * abs(scale_D[d]))
        if way == "fast":
            yield "fast_whole", np.where(malformed_B, 0.0, 1.0)


def strongest_cells(model: VLA, batch: Batch, probe: tuple[int, int]) -> NDArray[np.int64]:
    """[B]: the cell of the last camera's image that the first asking token attends to most."""
    output = model(*batch.prefix, probe=probe)
    cells_B: NDArray[np.int64] = scene_scores(model, batch, output)[:, 0].argmax(dim=1).cpu().numpy()
    return cells_B


def points_right(cells_B: NDArray[np.int64], batch: Batch, grid: int) -> NDArray[np.float64]:
    """[B]: 1 where the cell is the target's or next to it, 0 where not, NaN where nothing is in sight."""
    if batch.target_cell_B is None:
        raise ValueError("points_right: expected a batch with target cells, got one without")
    target_B = batch.target_cell_B.cpu().numpy()
    apart_B = np.maximum(np.abs(cells_B // grid - target_B // grid), np.abs(cells_B % grid - target_B % grid))
    return np.where(target_B == NO_TARGET, np.nan, apart_B <= 1)


def predict(
    model: VLA,
    embodiment: Embodiment,
    batch: Batch,
    flow_steps: int,
    heads: TrainingHeads | None,
    first_fast: int | None,
) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Normalised chunks [B, H, A] by each way of reading the model; NaN rows where FAST was malformed.

    `first_fast` is the id of FAST's token 0; None: without decoding FAST.
    """
    if batch.action_BHA is None:
        raise ValueError("predict: expected a batch with actions, got one without")
    cache = model.prefill(*batch.prefix)
    noise = torch.randn(batch.action_BHA.shape, generator=torch.Generator().manual_seed(0)).to(batch.action_BHA.device)
    state = None if model.config.state_dim is None else batch.state_BS
    yield "flow", model.sample_actions(cache, noise, flow_steps, state).double().cpu().numpy()
    if heads is not None and len(heads.readout):
        hidden_BPD = model.backbone.norm(model(*batch.prefix).prefix_by_layer[-2])
        named_BKA = heads.name_coefficients(take_rows(hidden_BPD, asking_rows(model, batch)))[0]
        coefficients_BKA = named_BKA.double().cpu().numpy() / embodiment.chunks.scale
        basis_KH = cosine_basis(batch.action_BHA.shape[1])[: coefficients_BKA.shape[1]]
        yield "readout", np.einsum("kh,bka->bha", basis_KH, coefficients_BKA)
    if first_fast is not None:
        yield "fast", decode_greedily(model, embodiment.chunks, first_fast, batch)


def decode_greedily(
    model: VLA, fast: FastTokenizer, first: int, batch: Batch, longest: int = 80
) -> NDArray[np.float64]:
    """Chunks decoded from FAST tokens by argmax, NaN if malformed; only a figure: the robot never decodes tokens.

    `first` is the id of FAST's token 0 in the model's vocabulary.
    """
    horizon, action_dim = fast.horizon, fast.action_dim
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
