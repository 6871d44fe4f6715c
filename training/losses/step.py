"""What one batch teaches: a forward pass, and every loss that the stage asks for and the batch has targets for.

Knowledge insulation itself is in `training.model.vla`: keys and values reach the expert through a stop-gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.config import Loss, StageConfig, TrainingConfig
from training.data import Batch
from training.losses import flow, tokens
from training.losses.flow import FlowRows
from training.losses.hints import (
    Term,
    TrainingHeads,
    give_hints,
    has_coefficients,
    has_place,
    has_target,
    name_cells,
    weigh_cells,
)
from training.model import VLA, Output, empty_actions
from training.parallel import in_any_process

NEXT_TOKEN: frozenset[Loss] = frozenset({"text", "fast", "tokens"})
OF_EXPERT: frozenset[Loss] = frozenset({"flow", "regression"})
"""What the expert learns, or whatever stands in its place: one of them in a stage."""


def targets(batch: Batch) -> set[Loss]:
    """The losses that can be computed on this batch."""
    needs: dict[Loss, tuple[Tensor | None, ...]] = {
        "text": (batch.text_mask_BT,),
        "fast": (batch.fast_mask_BT,),
        "tokens": (batch.postfix_mask_BT,),
        "flow": (batch.action_BHA,),
        "regression": (batch.action_BHA,),
        "cells": (batch.cells_BVN,),
        "pointing": (batch.asking_BR, batch.target_cell_B),
        "grounding": (batch.asking_BR, batch.place_B2),
        "readout": (batch.asking_BR, batch.readout_BKA),
    }
    return {loss for loss, labels in needs.items() if all(label is not None for label in labels)}


def count_tokens(batch: Batch) -> int:
    """How many tokens of the batch's postfixes are learned, words and actions."""
    return 0 if batch.postfix_mask_BT is None else int(batch.postfix_mask_BT.sum())


@dataclass(frozen=True)
class Piece:
    """Samples of one batch that go through the model together.

    Their losses, each times its `share`, add up over the pieces to the losses of the whole batch.
    """

    batch: Batch
    flow_rows: FlowRows | None
    share: Mapping[Term, float]
    """What counts in each loss here (tokens, weighed actions, samples with a label), in parts of the whole batch's."""

    def to(self, device: torch.device | str) -> Piece:
        rows = None if self.flow_rows is None else FlowRows(*(tensor.to(device) for tensor in self.flow_rows))
        return Piece(self.batch.to(device), rows, self.share)


class BatchLosses:
    """`split` makes pieces of a batch; `losses(piece, stage)` gives a piece's share of each loss, with its graph."""

    def __init__(self, model: VLA, heads: TrainingHeads | None, config: TrainingConfig) -> None:
        self.model, self.heads, self.config = model, heads, config

    def split(
        self, batch: Batch, stage: StageConfig, rng: np.random.Generator, step_tokens: float | None = None
    ) -> list[Piece]:
        """`stage.accumulate` pieces, as many as there are samples at most; their sizes differ by one at most.

        `rng` draws noise and flow times for the whole batch first, so that they do not depend on the pieces.
        `step_tokens`: how many the loss `tokens` is a mean over; by default those of this batch.
        """
        samples, rows = stage.noise_samples, len(batch.tokens_BL)
        learned = targets(batch) & stage.losses.keys() & OF_EXPERT
        draw = self.draw_flow if "flow" in learned else self.leave_empty
        flow_rows = draw(batch, samples, rng) if learned else None
        whole = self.count(batch, flow_rows, stage)
        if step_tokens is not None and "tokens" in whole:
            whole["tokens"] = step_tokens
        pieces = []
        for own in torch.arange(rows).tensor_split(min(stage.accumulate, rows)):
            first, end = int(own[0]), int(own[-1]) + 1
            part, drawn = batch.rows(slice(first, end)), None
            if flow_rows is not None:
                drawn = FlowRows(*(tensor[first * samples : end * samples] for tensor in flow_rows))
            counts = self.count(part, drawn, stage)
            pieces.append(Piece(part, drawn, {term: count / (whole[term] or 1.0) for term, count in counts.items()}))
        return pieces

    def count(self, batch: Batch, flow_rows: FlowRows | None, stage: StageConfig) -> dict[Term, float]:
        """How much there is in the batch that each loss is a mean over."""
        counted: dict[Term, Tensor | None] = {
            "text": batch.text_mask_BT,
            "fast": batch.fast_mask_BT,
            "tokens": batch.postfix_mask_BT,
            "pointing": None if batch.target_cell_B is None else has_target(batch.target_cell_B),
            "grounding": None if batch.place_B2 is None else has_place(batch.place_B2),
            "state": torch.ones(len(batch.tokens_BL)),
            "readout": None if batch.readout_BKA is None else has_coefficients(batch.readout_BKA),
        }
        if "cells" in stage.losses and self.heads is not None and batch.cells_BVN is not None:
            counted["cells"] = weigh_cells(self.heads, batch.cells_BVN)
        if flow_rows is not None:
            weight_RA = self.weights(batch, stage.noise_samples)
            learned_R = flow_rows.learned_RH.sum(dim=1)
            of_expert = learned_R if weight_RA is None else learned_R * weight_RA.sum(dim=1)
            counted |= dict.fromkeys(OF_EXPERT & stage.losses.keys(), of_expert)
        return {term: float(x.sum(dtype=torch.float64)) for term, x in counted.items() if x is not None}

    def __call__(self, piece: Piece, stage: StageConfig) -> dict[Loss, Tensor]:
        batch = piece.batch
        wanted = targets(batch) & stage.losses.keys()
        found: dict[Term, Tensor] = {}
        stem = "cells" in wanted and self.heads is not None
        joint = bool(wanted - {"cells"}) and not (wanted <= OF_EXPERT and stage.insulate)
        if self.config.parallel.shard:  # all processes gather the same layers, whatever their samples teach
            stem, joint = in_any_process(stem, joint)
        shares: dict[Loss, Tensor] = {}
        if stem:
            features = self.model.stem_features(batch.images_BVCHW.flatten(0, 1))
            if "cells" in wanted and self.heads is not None and batch.cells_BVN is not None:
                found["cells"] = name_cells(self.heads, features, batch.cells_BVN.flatten(0, 1))
            else:
                shares["cells"] = 0.0 * features.sum()
        if joint:
            found |= self.joint(piece, stage)
        elif wanted & OF_EXPERT:
            found |= self.flow_alone(piece, stage)
        for term, mean in found.items():
            loss: Loss = "grounding" if term == "state" else term
            shares[loss] = shares.get(loss, 0.0) + piece.share.get(term, 0.0) * mean
        return shares

    def joint(self, piece: Piece, stage: StageConfig) -> dict[Term, Tensor]:
        """Tokens and hints for the backbone, flow for the expert, in one forward pass; each the piece's own mean."""
        batch, drawn, hints = piece.batch, piece.flow_rows, self.config.hints
        wanted = targets(batch) & stage.losses.keys()
        reads_postfix = bool(wanted & NEXT_TOKEN)
        output = self.model(
            *batch.prefix,
            batch.postfix_BT if reads_postfix else None,
            batch.postfix_mask_BT if reads_postfix else None,
            x_t=None if drawn is None else drawn.x_t_RHA,
            time=None if drawn is None else drawn.time_RH,
            state=None if drawn is None else self.expert_state(batch, stage.noise_samples),
            insulate=stage.insulate,
            probe=None if hints is None else hints.probe,
            # Through the last layer pass the tokens that the postfix is predicted from; the flow reads none there.
            prefix_rows=1 if wanted <= OF_EXPERT else batch.tokens_BL.shape[1] - int(batch.last_token_B.min()),
        )
        found = self.predict(batch, output, wanted)
        if hints is not None and self.heads is not None:
            found |= give_hints(self.model, self.heads, hints, batch, output, wanted)
        if drawn is not None:
            found |= self.match(output.velocity_RHA, piece, stage)
        if self.config.parallel.shard:
            # A shard's layers must do the same in all processes, also where the samples of one teach less: with no
            # place to point at, say, nothing else would lead back through the probe.
            outputs = (
                output.prefix_hidden_BPD,
                output.postfix_hidden_BTD,
                output.velocity_RHA,
                output.probe_logits_BPQ,
            )
            name: Term = next(iter(found), next(loss for loss in stage.losses if loss != "cells"))
            found[name] = found.get(name, 0.0) + sum(0.0 * tensor.sum() for tensor in outputs if tensor is not None)
        return found

    def flow_alone(self, piece: Piece, stage: StageConfig) -> dict[Term, Tensor]:
        """The same gradients for the expert as from `joint` (tested), the prefix without a graph."""
        if piece.flow_rows is None:
            raise ValueError("flow_alone: expected a batch with actions, got one without")
        with torch.no_grad():
            cache = self.model.prefill(*piece.batch.prefix)
        state = self.expert_state(piece.batch, stage.noise_samples)
        velocity = self.model.velocity(cache, piece.flow_rows.x_t_RHA, piece.flow_rows.time_RH, state)
        return self.match(velocity, piece, stage)

    def predict(self, batch: Batch, output: Output, wanted: set[Loss]) -> dict[Term, Tensor]:
        """Next-token losses of the postfix; of the prefix, `output` has the rows from the shortest prompt's end on."""
        found: dict[Term, Tensor] = {}
        if not wanted & NEXT_TOKEN or batch.postfix_BT is None or output.postfix_hidden_BTD is None:
            return found
        last_B = batch.last_token_B - (batch.tokens_BL.shape[1] - output.prefix_hidden_BPD.shape[1])
        hidden = tokens.next_token_hidden(output.prefix_hidden_BPD, last_B, output.postfix_hidden_BTD)
        masks: dict[Loss, Tensor | None] = {
            "text": batch.text_mask_BT,
            "fast": batch.fast_mask_BT,
            "tokens": batch.postfix_mask_BT,
        }
        for name, mask in masks.items():
            if name not in wanted or mask is None:
                continue
            pieces = self.config.parallel.activation_checkpointing
            predict = tokens.predict_in_pieces if pieces else tokens.predict_postfix
            found[name] = predict(self.model.logits, hidden, batch.postfix_BT, mask)
        return found

    def expert_state(self, batch: Batch, samples: int) -> Tensor | None:
        """[R, S]: the state for each of the expert's rows; None if only the prompt has it."""
        if self.model.config.state_dim is None or batch.state_BS is None:
            return None
        return batch.state_BS.repeat_interleave(samples, dim=0)

    def weights(self, batch: Batch, samples: int) -> Tensor | None:
        """[R, A]: how much each dimension of the expert's rows counts; None: all alike."""
        return None if batch.weight_BA is None else batch.weight_BA.repeat_interleave(samples, dim=0)

    def match(self, named_RHA: Tensor | None, piece: Piece, stage: StageConfig) -> dict[Term, Tensor]:
        """The loss of velocities, or of actions in a regression."""
        if named_RHA is None or piece.flow_rows is None:
            raise ValueError("match: expected a batch with actions, got one without")
        _, _, target, learned = piece.flow_rows
        weights = self.weights(piece.batch, stage.noise_samples)
        if "regression" in stage.losses:
            return {"regression": flow.match_actions(named_RHA, target, learned, weights)}
        return {"flow": flow.match_flow(named_RHA, target, learned, weights)}

    def leave_empty(self, batch: Batch, samples: int, rng: np.random.Generator) -> FlowRows:
        """A regression's rows, one for each chunk of the batch; nothing is drawn."""
        if batch.action_BHA is None:
            raise ValueError("leave_empty: expected a batch with actions, got one without")
        empty, place = empty_actions(batch.action_BHA)
        known_BH = torch.ones_like(place, dtype=torch.bool) if batch.known_BH is None else batch.known_BH
        return FlowRows(empty, place, batch.action_BHA, known_BH)

    def draw_flow(self, batch: Batch, samples: int, rng: np.random.Generator) -> FlowRows:
        """Noise and times for each chunk of the batch, which has `samples` rows; they are adjacent."""
        if batch.action_BHA is None:
            raise ValueError("draw_flow: expected a batch with actions, got one without")
        # On the CPU, so that a seed means the same on every device.
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        action = batch.action_BHA.repeat_interleave(samples, dim=0)
        drawn = flow.draw_flow_time(len(action), action.shape[1], self.config.max_prefix_delay, generator)
        time, learned = (tensor.to(action.device) for tensor in drawn)
        known_RH = torch.ones_like(learned)
        if batch.known_BH is not None:
            known_RH = batch.known_BH.repeat_interleave(samples, dim=0)
        if self.config.prefix_lead:
            lead = self.config.prefix_lead
            action, learned = flow.run_ahead(action, learned, known_RH.sum(dim=1), lead, generator)
        learned = learned & known_RH
        noise = torch.randn(action.shape, generator=generator).to(action.device)
        x_t, target = flow.mix_flow(action, noise, time)
        return FlowRows(x_t, time, target, learned)
