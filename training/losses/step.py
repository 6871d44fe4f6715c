"""What one batch teaches: a forward pass, and every loss that the stage asks for and the batch has targets for.

Knowledge insulation itself is in `training.model.vla`: keys and values reach the expert through a stop-gradient.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from training.config import Loss, StageConfig, TrainingConfig
from training.data import Batch
from training.losses import flow, tokens
from training.losses.hints import TrainingHeads, give_hints, name_cells
from training.model import VLA, Output


def targets(batch: Batch) -> set[Loss]:
    """The losses that can be computed on this batch."""
    needs: dict[Loss, tuple[Tensor | None, ...]] = {
        "text": (batch.text_mask_BT,),
        "fast": (batch.fast_mask_BT,),
        "flow": (batch.action_BHA,),
        "cells": (batch.cells_BVN,),
        "pointing": (batch.asking_BR, batch.target_cell_B),
        "grounding": (batch.asking_BR, batch.place_B2),
        "readout": (batch.asking_BR, batch.readout_BKA),
    }
    return {loss for loss, labels in needs.items() if all(label is not None for label in labels)}


class BatchLosses:
    """`losses(batch, stage, rng)` gives each loss by name, with its graph; `rng` draws noise and flow times."""

    def __init__(self, model: VLA, heads: TrainingHeads | None, config: TrainingConfig) -> None:
        self.model, self.heads, self.config = model, heads, config

    def __call__(self, batch: Batch, stage: StageConfig, rng: np.random.Generator) -> dict[Loss, Tensor]:
        wanted = targets(batch) & stage.losses.keys()
        found: dict[Loss, Tensor] = {}
        if "cells" in wanted and self.heads is not None and batch.cells_BVN is not None:
            views_NCHW = batch.images_BVCHW.flatten(0, 1)
            found["cells"] = name_cells(self.heads, self.model.stem_features(views_NCHW), batch.cells_BVN.flatten(0, 1))
        if wanted == {"flow"} and stage.insulate:
            found |= self.flow_alone(batch, stage, rng)
        elif wanted - {"cells"}:
            found |= self.joint(batch, stage, rng)
        return found

    def joint(self, batch: Batch, stage: StageConfig, rng: np.random.Generator) -> dict[Loss, Tensor]:
        """Tokens and hints for the backbone, flow for the expert, in one forward pass."""
        wanted = targets(batch) & stage.losses.keys()
        drawn = self.draw_flow(batch, stage.noise_samples, rng) if "flow" in wanted else None
        x_t, time = drawn[:2] if drawn else (None, None)
        hints = self.config.hints
        output = self.model(
            *batch.prefix,
            batch.postfix_BT,
            batch.postfix_mask_BT,
            x_t=x_t,
            time=time,
            state=self.expert_state(batch, stage.noise_samples) if drawn else None,
            insulate=stage.insulate,
            probe=None if hints is None else hints.probe,
            # Only the prompt passes through the last layer: losses read no image token there.
            prefix_rows=batch.tokens_BL.shape[1],
        )
        found = self.predict(batch, output, wanted)
        if hints is not None and self.heads is not None:
            found |= give_hints(self.model, self.heads, hints, batch, output, wanted)
        if drawn:
            found["flow"] = flow.match_flow(output.velocity_RHA, *drawn[2:], self.weights(batch, stage.noise_samples))
        if self.config.parallel.shard and output.probe_logits_BPQ is not None:
            # A shard's layers must do the same in all processes. Where no sample has a place to point at, nothing else
            # would lead back through the probe.
            name = next(iter(found))
            found[name] = found[name] + 0.0 * output.probe_logits_BPQ.sum()
        return found

    def flow_alone(self, batch: Batch, stage: StageConfig, rng: np.random.Generator) -> dict[Loss, Tensor]:
        """The same gradients for the expert as from `joint` (tested), without a graph of the prefix."""
        x_t, time, target, learned = self.draw_flow(batch, stage.noise_samples, rng)
        with torch.no_grad():
            cache = self.model.prefill(*batch.prefix)
        velocity = self.model.velocity(cache, x_t, time, self.expert_state(batch, stage.noise_samples))
        return {"flow": flow.match_flow(velocity, target, learned, self.weights(batch, stage.noise_samples))}

    def predict(self, batch: Batch, output: Output, wanted: set[Loss]) -> dict[Loss, Tensor]:
        """Next-token losses of the postfix; of the prefix, `output` has the prompt's rows only."""
        found: dict[Loss, Tensor] = {}
        if not wanted & {"text", "fast"} or batch.postfix_BT is None or output.postfix_hidden_BTD is None:
            return found
        hidden = tokens.next_token_hidden(output.prefix_hidden_BPD, batch.last_token_B, output.postfix_hidden_BTD)
        masks: dict[Loss, Tensor | None] = {"text": batch.text_mask_BT, "fast": batch.fast_mask_BT}
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

    def draw_flow(self, batch: Batch, samples: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The flow's x_t, time, velocity target and mask of what is learned.

        Each chunk of the batch has `samples` rows, which are adjacent.
        """
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
        return x_t, time, target, learned
