"""Our own hints, which let small models learn in minutes; none is in the paper, none is needed at inference.

All act on the backbone alone: `name_cells`, `point_at_target`, `read_out` (cross-entropies), `name_place` and
`name_state` (smooth L1 errors, together the loss `grounding`). They need labels that a batch may carry
(`training.data.batch.Batch`); places are in its last camera's image.

Legend: B batch, P prefix tokens, D width, N image cells, R asking tokens (K where each names one readout frequency),
A action dim.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ki_vla_ros.errors import ConfigurationError
from training.config import HintsConfig, Loss
from training.data import NO_TARGET, Batch
from training.model import VLA, Output

Term = Loss | Literal["state"]
"""A mean of its own: `grounding` is that of places, and that of states beside it."""
BACKGROUND_WEIGHT = 0.1
"""Of image cells that show background, beside 1 for the others."""


class TrainingHeads(nn.Module):
    """Heads that only training needs; never exported.

    `cells` names what an image cell shows. `place` says where the object asked about is (u and v in the last camera's
    image), `state` what the prompt says about the joints (normalised). `readout[k]` turns the k-th learned prompt token
    into one distribution per joint over the integer coefficients of FAST's k-th lowest frequency. It is a logistic
    distribution, because neighbouring integers mean neighbouring motions; a softmax over hundreds of integers would
    have to learn that, which took too long here.
    """

    COEFFICIENT_SCALE = 10.0  # factor on the heads' outputs, which are about 1 at first

    def __init__(
        self, vision_width: int, width: int, kinds: int, frequencies: int, action_dim: int, state_dim: int
    ) -> None:
        super().__init__()
        self.cells = nn.Linear(vision_width, kinds) if kinds else None
        self.place = nn.Linear(width, 2)
        self.state = nn.Linear(width, state_dim)
        self.readout = nn.ModuleList(nn.Linear(width, 2 * action_dim) for _ in range(frequencies))

    def name_coefficients(self, hidden_BKD: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and spread [B, K, A] of each coefficient's distribution."""
        named = torch.stack([head(hidden_BKD[:, k]) for k, head in enumerate(self.readout)], dim=1)
        mean, log_spread = named.chunk(2, dim=-1)
        return self.COEFFICIENT_SCALE * mean, (log_spread + 1.0).clamp(-2.0, 5.0).exp()


def weigh_cells(heads: TrainingHeads, cells: Tensor) -> Tensor:
    """How much each cell counts: one without label not at all, background (most of an image) a tenth."""
    if heads.cells is None:
        raise ConfigurationError("loss cells: expected hints.cell_classes (kinds, and the background), got none")
    classes = heads.cells.out_features
    if int(cells.max()) >= classes:
        raise ConfigurationError(
            f"loss cells: expected cells of {classes} classes (hints.cell_classes), got class {int(cells.max())}"
        )
    weight = torch.where(cells == classes - 1, BACKGROUND_WEIGHT, 1.0)
    return weight.masked_fill(cells == NO_TARGET, 0.0)


def name_cells(heads: TrainingHeads, features_BND: Tensor, cells_BN: Tensor) -> Tensor:
    """Cross-entropy of what each image cell shows, mean by the cells' weights; 0 if none has a label."""
    weight_BN = weigh_cells(heads, cells_BN)
    assert heads.cells is not None
    logits = heads.cells(features_BND).flatten(0, -2)
    surprise = F.cross_entropy(logits, cells_BN.flatten(), ignore_index=NO_TARGET, reduction="none")
    return (surprise * weight_BN.flatten()).sum() / weight_BN.sum().clamp(min=BACKGROUND_WEIGHT)


def has_target(target_cell_B: Tensor) -> Tensor:
    return target_cell_B != NO_TARGET


def has_place(place_B2: Tensor) -> Tensor:
    return ~place_B2.isnan().any(dim=1)


def has_coefficients(coefficient_BKA: Tensor) -> Tensor:
    return ~coefficient_BKA.isnan().any(dim=(1, 2))


def point_at_target(scores_BRP: Tensor, target_cell_B: Tensor, first_cell: int) -> Tensor:
    """Cross-entropy of attention scores towards the cell of the object asked about, where there is one.

    The scores are of R asking rows over P prefix tokens, -inf where masked. The image's first cell is prefix token
    `first_cell`.
    """
    asked = has_target(target_cell_B)
    if not asked.any():
        return 0.0 * scores_BRP.clamp(min=0.0).sum()  # zero with a graph, also where scores are -inf
    rows = scores_BRP[asked]
    targets = first_cell + target_cell_B[asked][:, None].expand(-1, rows.shape[1])
    return F.cross_entropy(rows.flatten(0, 1), targets.flatten())


def name_place(heads: TrainingHeads, hidden_BRD: Tensor, place_B2: Tensor) -> Tensor:
    """Mean error of the place that the asking rows name.

    A place is in 0..1, or NaN for none. Attention to the right cell does not by itself carry the cell's place along;
    this loss makes it do so.
    """
    known = has_place(place_B2)
    if not known.any():
        return 0.0 * hidden_BRD.sum()  # zero with a graph: `backward` needs one
    wanted = place_B2[known][:, None].expand(-1, hidden_BRD.shape[1], -1)
    return 4.0 * F.smooth_l1_loss(heads.place(hidden_BRD[known]), wanted, beta=0.02)


def name_state(heads: TrainingHeads, hidden_BRD: Tensor, state_BS: Tensor) -> Tensor:
    """Mean error of the normalised joint state that the asking rows name."""
    named = heads.state(hidden_BRD)
    return F.smooth_l1_loss(named, state_BS[:, None].expand_as(named), beta=0.05)


def read_out(heads: TrainingHeads, hidden_BKD: Tensor, coefficient_BKA: Tensor) -> Tensor:
    """Cross-entropy of FAST's coefficients under the readout's logistic distributions.

    A coefficient counts as the interval of half an integer to either side; it need not be rounded first. Samples with
    NaN have none to learn.
    """
    known_B = has_coefficients(coefficient_BKA)
    if not known_B.any():
        return 0.0 * hidden_BKD.sum()
    hidden_BKD, coefficient_BKA = hidden_BKD[known_B], coefficient_BKA[known_B]
    mean, spread = heads.name_coefficients(hidden_BKD)
    above = torch.sigmoid((coefficient_BKA + 0.5 - mean) / spread)
    below = torch.sigmoid((coefficient_BKA - 0.5 - mean) / spread)
    near = (above - below).clamp(min=1e-6).log()
    # Far out both are 0 or 1 in float32; there the logarithm of the density still has a gradient that pulls back.
    z = (coefficient_BKA - mean) / spread
    far = -z.abs() - 2 * F.softplus(-z.abs()) - spread.log()
    return -torch.where(z.abs() < 8, near, far).mean()


def give_hints(
    model: VLA, heads: TrainingHeads, config: HintsConfig, batch: Batch, output: Output, wanted: Set[Loss]
) -> dict[Term, Tensor]:
    """The losses `pointing`, `readout` and `grounding`, if wanted, from one forward pass of the model.

    With `grounding`, where the batch has states, comes its other term, `state`.
    """
    found: dict[Term, Tensor] = {}
    if not wanted & {"pointing", "readout", "grounding"}:
        return found
    rows_BR = asking_rows(model, batch)
    if "readout" in wanted and batch.readout_BKA is not None:
        # No key or value comes from the last layer's output, so the expert could not read what is named only there:
        # name it in the two layers before.
        streams = output.prefix_by_layer[-3:-1]
        named = [
            read_out(heads, take_rows(model.backbone.norm(stream), rows_BR), batch.readout_BKA) for stream in streams
        ]
        found["readout"] = torch.stack(named).mean()
    if "pointing" in wanted and batch.target_cell_B is not None and output.probe_logits_BPQ is not None:
        # Over the whole prefix: the asking tokens should look at the target's cell and at nothing else.
        cells = model.config.vision.tokens
        seen_BP = torch.cat([batch.image_mask_BV.repeat_interleave(cells, dim=1), batch.token_mask_BL], dim=1)
        scores_BRP = take_rows(output.probe_logits_BPQ, rows_BR).masked_fill(~seen_BP[:, None], -torch.inf)
        found["pointing"] = point_at_target(scores_BRP, batch.target_cell_B, prompt_start(model, batch) - cells)
    if "grounding" in wanted and batch.place_B2 is not None:
        # After the layer that points.
        hidden_BPD = model.backbone.norm(output.prefix_by_layer[config.probe_layer])
        hidden_BRD = take_rows(hidden_BPD, rows_BR)
        found["grounding"] = name_place(heads, hidden_BRD, batch.place_B2)
        if batch.state_BS is not None:
            found["state"] = name_state(heads, hidden_BRD, batch.state_BS)
    return found


def scene_scores(model: VLA, batch: Batch, output: Output) -> Tensor:
    """[B, R, N]: the probe's attention scores from the asking tokens to the cells of the last camera."""
    if output.probe_logits_BPQ is None:
        raise ValueError(
            "scene_scores: expected an output with probe scores, got one without; pass `probe` to the model"
        )
    end = prompt_start(model, batch)
    return take_rows(output.probe_logits_BPQ[:, :, end - model.config.vision.tokens : end], asking_rows(model, batch))


def prompt_start(model: VLA, batch: Batch) -> int:
    """Where the prompt begins in the prefix: after the tokens of all images."""
    return batch.images_BVCHW.shape[1] * model.config.vision.tokens


def asking_rows(model: VLA, batch: Batch) -> Tensor:
    """[B, R]: where in the prefix the asking tokens stand."""
    if batch.asking_BR is None:
        raise ValueError("asking_rows: expected a batch with asking tokens, got one without")
    return prompt_start(model, batch) + batch.asking_BR


def take_rows(x_BPD: Tensor, rows_BR: Tensor) -> Tensor:
    """[B, R, D]: for each sample, the rows with these indices."""
    return x_BPD.gather(1, rows_BR[:, :, None].expand(-1, -1, x_BPD.shape[2]))
