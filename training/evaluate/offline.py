"""Figures of a model on held-out data: the gates of training.

Legend: B batch, T postfix tokens, N tokens that count, H horizon, D actions of a robot, A actions of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.config import Loss, StageConfig, TrainingConfig
from training.data import NO_TARGET, Batch, Embodiment, RobotSample
from training.losses import BatchLosses, TrainingHeads, asking_rows, scene_scores, take_rows, targets
from training.model import VLA, Cache, FlowSampler, RegressionSampler, Sampler, SamplerName, TokenSampler, last_tokens
from training.tokens import ActionPostfix, cosine_basis

if TYPE_CHECKING:
    from training.sources import Sources

Array = NDArray[np.float64]
Values = Iterator[tuple[str, Array]]
"""Figures by name, each with the values that its mean is of; NaN where there is none."""

FRAMES = 256  # held-out frames of each source, shared by its robots
BATCH = 32  # frames at once; FAST is decoded token by token, which is slow, so only for the first batch of a robot
WORST = 6  # frames that are kept to be shown
AT_ONCE = 256  # tokens whose scores are held: with a vocabulary of 257,152, one token's take 1 MB
WAYS: Mapping[SamplerName, str] = {"flow": "flow", "regression": "regression", "tokens": "fast"}
"""What figures call each sampler's chunks."""


@dataclass(frozen=True)
class Prediction:
    """A held-out frame and what the run's sampler makes of it, in the robot's units."""

    robot: str
    embodiment: Embodiment
    source: str
    sample: RobotSample
    predicted_HD: Array
    error: float
    """Mean of the known actions' errors, in normalised units."""


@dataclass
class Measured:
    """`figures` by name, NaN for those without a value; `worst` predictions, the worst first."""

    figures: dict[str, float] = field(default_factory=dict)
    worst: list[Prediction] = field(default_factory=list)


@torch.no_grad()
def measure(
    model: VLA, data: Sources, losses: BatchLosses, heads: TrainingHeads | None = None, frames: int | None = None
) -> Measured:
    """Figures of the policy's robot, of the other robots and of the sources, on what is held out.

    `LOSS_loss.SOURCE` (text, fast, flow or regression): as in training, of images as they are. `text_accuracy.SOURCE`
    and `fast_accuracy`: how often the likeliest next token is the right one, given those before it.
    `WAY_error`: the mean error of the chunks that WAY predicts, in normalised units, and `WAY_error.DIMENSION` in the
    robot's own; ways are `flow` (the expert) or `regression`, `fast` (action tokens, read greedily; `fast_whole` is the
    share of sequences that are a whole chunk, the others are left out of the error and counted as
    `fast_malformed.FAULT`, see `TokenSampler`) and `readout` (the hint's tokens, with heads). `pointing` (with heads):
    where the data says a place, how often the probe's strongest cell is at most one cell from it.
    `fast_clamped`: the share of coefficients that FAST's vocabulary cannot express, so that their tokens are not exact.
    Figures of another robot than the policy's begin with its name: `ROBOT/flow_error`.
    """
    found: dict[str, list[Array]] = {}
    worst: list[Prediction] = []

    def note(values: Values, before: str = "") -> None:
        for name, array in values:
            found.setdefault(before + name, []).append(array)

    rng, device = np.random.default_rng(0), next(model.parameters()).device
    shown = WAYS[losses.config.sampler]
    # A run without action tokens has no figures of them; with a hybrid mask they are read beside noisy actions alone.
    action_tokens = losses.config.has_action_tokens
    decoded = action_tokens and not model.config.hybrid_mask
    for source, mixture in data.held_out.items():
        if source not in data.robot_sources:
            for rows in batches(mixture.spread(frames or FRAMES)):
                batch = mixture.take(rows, rng).to(device)
                note(measure_losses(losses, batch, source, rng))
                if batch.text_mask_BT is not None:
                    hits = predict_tokens(model, model.prefill(*batch.prefix), batch, batch.text_mask_BT)
                    note(iter([(f"text_accuracy.{source}", hits)]))
            continue
        robots = [(e, parts) for e in data.embodiments.values() if (parts := data.held_out_parts(source, e))]
        for embodiment, parts in robots:
            robot = embodiment.robot.name
            before = "" if embodiment is data.embodiment else f"{robot}/"
            for number, rows in enumerate(batches(mixture.spread((frames or FRAMES) // len(robots) or 1, parts))):
                samples = mixture.read(rows)
                batch = data.plain.of_robots([embodiment] * len(samples), samples, rng, action_tokens).to(device)
                note(measure_losses(losses, batch, source, rng))
                if decoded:
                    note(measure_tokens(model, embodiment, samples, batch, data.plain.postfix), before)
                tokens = None
                if decoded and batch.postfix_BT is not None and number == 0:
                    # Longer sequences count as malformed: an untrained model would take minutes to end them.
                    longest = 8 + batch.postfix_BT.shape[1] * 3 // 2
                    tokens = TokenSampler(embodiment.chunks, data.plain.postfix, longest)
                for way, action_BHA in predict(model, embodiment, batch, losses.config, heads, tokens):
                    off_BHD = action_BHA[..., : len(embodiment.robot.actions)] - normalized(embodiment, samples)
                    note(measure_errors(embodiment, samples, off_BHD, way), before)
                    if way == shown:
                        worst += judge(embodiment, samples, off_BHD, robot, source)
                        worst = sorted(worst, key=lambda prediction: -prediction.error)[:WORST]
                if tokens is not None:
                    shares = tokens.shares(len(samples)).items()
                    note(((f"fast_malformed.{fault}", np.full(len(samples), share)) for fault, share in shares), before)
                if losses.config.hints is not None and batch.target_cell_B is not None:
                    cells_B = strongest_cells(model, batch, losses.config.hints.probe)
                    note(iter([("pointing", points_right(cells_B, batch, data.form.grid))]), before)
    return Measured({name: mean_of_known(np.concatenate(parts)) for name, parts in found.items()}, worst)


def batches(rows: Sequence[tuple[int, int]]) -> Iterator[Sequence[tuple[int, int]]]:
    return (rows[start : start + BATCH] for start in range(0, len(rows), BATCH))


def mean_of_known(values: Array) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def measure_losses(losses: BatchLosses, batch: Batch, source: str, rng: np.random.Generator) -> Values:
    """The losses that the batch has targets for, each as often as it has tokens, or chunks."""
    measured: tuple[Loss | None, ...] = ("text", "fast", losses.config.learned_by_expert)
    wanted = {name: 1.0 for name in measured if name is not None and name in targets(batch)}
    if not wanted:
        return
    stage = StageConfig.model_construct(name=source, losses=wanted, insulate=True, noise_samples=1)
    counts = {"text": batch.text_mask_BT, "fast": batch.fast_mask_BT}
    [whole] = losses.split(batch, stage, rng)
    for name, value in losses.joint(whole, stage).items():
        mask = counts.get(name, batch.known_BH)
        count = len(batch.tokens_BL) if mask is None else int(mask.sum())
        yield f"{name}_loss.{source}", np.full(count, float(value))


def measure_tokens(
    model: VLA, embodiment: Embodiment, samples: Sequence[RobotSample], batch: Batch, postfix: ActionPostfix
) -> Values:
    """How well action tokens say the chunks, and how well they are predicted."""
    true_BHD = normalized(embodiment, samples)
    clamped = embodiment.chunks.count_clamped(true_BHD) / (len(samples) * embodiment.chunks.numbers)
    yield "fast_clamped", np.full(len(samples), clamped)
    if batch.fast_mask_BT is not None and batch.postfix_BT is not None:
        # Words around them, which are always the same, would flatter.
        known_N = torch.from_numpy(postfix.ids[: embodiment.chunks.vocab_size]).to(batch.postfix_BT.device)
        actions_BT = batch.fast_mask_BT & torch.isin(batch.postfix_BT, known_N)
        yield "fast_accuracy", predict_tokens(model, model.prefill(*batch.prefix), batch, actions_BT)


def normalized(embodiment: Embodiment, samples: Sequence[RobotSample]) -> Array:
    """[B, H, D]"""
    chunk_BHD, state_BS = (np.stack([getattr(s, name) for s in samples]) for name in ("chunk_HD", "state_S"))
    return embodiment.space.normalize_chunk(chunk_BHD, state_BS)


def measure_errors(embodiment: Embodiment, samples: Sequence[RobotSample], off_BHD: Array, way: str) -> Values:
    """Errors of predictions that are off by so much, in normalised units; rows of NaN are no prediction."""
    error_BD = mean_over_known(np.abs(off_BHD), samples)
    yield f"{way}_error", np.asarray(error_BD.mean(axis=1))
    for action, error_B, scale in zip(embodiment.robot.actions, error_BD.T, half_widths(embodiment), strict=True):
        yield f"{way}_error.{action.name}", np.asarray(error_B * scale)
    if way == "fast":
        yield "fast_whole", np.where(np.isnan(error_BD).any(axis=1), 0.0, 1.0)


def mean_over_known(values_BHD: Array, samples: Sequence[RobotSample]) -> Array:
    """[B, D]: over the steps that are known, that is, before the episode's end."""
    known_BH1 = np.stack([sample.known_H for sample in samples])[..., None]
    return np.asarray(np.where(known_BH1, values_BHD, 0.0).sum(axis=1) / np.maximum(1, known_BH1.sum(axis=1)))


def half_widths(embodiment: Embodiment) -> Array:
    """[D]: what 1 means, in the robot's units."""
    low_D, high_D = np.array(embodiment.space.action_low), np.array(embodiment.space.action_high)
    return np.asarray(np.abs(high_D - low_D) / 2.0)


def judge(
    embodiment: Embodiment, samples: Sequence[RobotSample], off_BHD: Array, robot: str, source: str
) -> Iterator[Prediction]:
    for sample, off_HD, error in zip(
        samples, off_BHD, mean_over_known(np.abs(off_BHD), samples).mean(axis=1), strict=True
    ):
        if np.isnan(error):
            continue  # no chunk
        # Added to what was recorded, because the same place can be written in several ways (turns, rotations).
        predicted_HD = sample.chunk_HD + off_HD * half_widths(embodiment)
        yield Prediction(robot, embodiment, source, sample, predicted_HD, float(error))


def strongest_cells(model: VLA, batch: Batch, probe: tuple[int, int]) -> NDArray[np.int64]:
    """[B]: the cell of the last camera's image that the first asking token attends to most."""
    output = model(*batch.prefix, probe=probe)
    cells_B: NDArray[np.int64] = scene_scores(model, batch, output)[:, 0].argmax(dim=1).cpu().numpy()
    return cells_B


def points_right(cells_B: NDArray[np.int64], batch: Batch, grid: int) -> Array:
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
    config: TrainingConfig,
    heads: TrainingHeads | None,
    tokens: TokenSampler | None,
) -> Iterator[tuple[str, Array]]:
    """Normalised chunks [B, H, A] by each way of reading the model; NaN rows where tokens were malformed.

    `tokens` reads action tokens; None: without.
    """
    if batch.action_BHA is None:
        raise ValueError("predict: expected a batch with actions, got one without")
    noise_BHA = torch.randn(batch.action_BHA.shape, generator=torch.Generator().manual_seed(0)).to(
        batch.action_BHA.device
    )
    if config.learned_by_expert is not None:
        regresses = config.learned_by_expert == "regression"
        sampler: Sampler = RegressionSampler() if regresses else FlowSampler(config.flow_steps)
        yield config.learned_by_expert, sampler(model, batch.prefix, batch.state_BS, noise_BHA)
    if heads is not None and len(heads.readout):
        hidden_BPD = model.backbone.norm(model(*batch.prefix).prefix_by_layer[-2])
        named_BKA = heads.name_coefficients(take_rows(hidden_BPD, asking_rows(model, batch)))[0]
        coefficients_BKA = named_BKA.double().cpu().numpy() / embodiment.frequencies.scale
        basis_KH = cosine_basis(batch.action_BHA.shape[1])[: coefficients_BKA.shape[1]]
        yield "readout", np.einsum("kh,bka->bha", basis_KH, coefficients_BKA)
    if tokens is not None:
        yield "fast", tokens(model, batch.prefix, batch.state_BS, noise_BHA)


def predict_tokens(model: VLA, cache: Cache, batch: Batch, mask_BT: Tensor) -> Array:
    """[N]: 1 where the likeliest token after the right ones is the postfix's, else 0, for the tokens of the mask."""
    if batch.postfix_BT is None:
        raise ValueError("predict_tokens: expected a batch with a postfix, got one without")
    before_BT = torch.cat((last_tokens(batch.tokens_BL, batch.token_mask_BL), batch.postfix_BT[:, :-1]), dim=1)
    hidden_ND, token_N = model.read_on(cache, before_BT)[0][mask_BT], batch.postfix_BT[mask_BT]
    pieces = zip(hidden_ND.split(AT_ONCE), token_N.split(AT_ONCE), strict=True)
    hits = [model.logits(hidden).argmax(dim=1) == token for hidden, token in pieces]
    return torch.cat(hits).double().cpu().numpy()
