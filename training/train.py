"""The recipe, from top to bottom: data, tokenizers, model, then one stage after another.

    python -m training.train config/training/demo.yaml

Knowledge insulation (arXiv 2505.23705): the backbone learns from cross-entropies only (answers, FAST action tokens),
the action expert learns flow matching and reads the backbone's keys and values through a stop-gradient. So the backbone
never feels the expert, and a stage may train both at once, or one after the other at less cost: the configuration
decides, the code is one. A run that stops resumes at its last checkpoint; what it draws depends on seed, stage and step
alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ki_vla_ros.console import ExitCode, run_command
from ki_vla_ros.errors import ConfigurationError
from training.action_space import ActionSpace
from training.config import Loss, StageConfig, TrainingConfig, load_config
from training.data.lerobot.arrays import load_recorded
from training.data.simulated.draw import Batch, BatchMaker
from training.data.simulated.generate import Arrays, ChunkTiming, load_arrays, make_data
from training.data.simulated.questions import COMBINATIONS
from training.data.simulated.robot import ACTION_PERIOD_S, HORIZON, describe_policy
from training.evaluate.offline import measure
from training.losses import losses
from training.losses.losses import TrainingHeads
from training.model.initialization import order_embeddings
from training.model.vla import VLA, Output, VLAConfig
from training.optimizer import clip_gradients, learning_rate, load_optimizer, make_optimizer, select_parameters
from training.parallel.group import average_gradients, choose_device, join_group, wait_for_all
from training.parallel.sharding import checkpoint_activations, free_gathered, gather, load_whole, shard
from training.tokens.fast import FastTokenizer
from training.tokens.words import act_query_ids, build_tokenizer
from training.weights.checkpoints import RESUME, load_checkpoint, load_resume, save_checkpoint

FIT_CHUNKS = 20_000  # chunks that FAST's merges are fitted on


@dataclass(frozen=True)
class Progress:
    """Where a run stands: the next step of a stage. `optimizer` is its state there, None at a stage's beginning.

    `minutes` is the time that each stage has taken so far, over all runs that were resumed.
    """

    stage: int = 0
    step: int = 0
    optimizer: dict[str, Any] | None = None
    minutes: dict[str, float] = field(default_factory=dict)


class Trainer:
    """One run: everything that `config` determines, and the state that training changes (`model`, `heads`)."""

    def __init__(self, config: TrainingConfig) -> None:
        torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.config = config
        self.device = choose_device(config.parallel.device)
        self.rank, self.processes = join_group(alone=not config.parallel.shard, device=config.parallel.device)
        # Sharded, a forward pass takes all processes.
        self.measures = self.rank == 0 or config.parallel.shard
        if self.rank == 0:
            make_data(config.data, chunk_timing(config))
        wait_for_all()
        self.meta = make_data(config.data, chunk_timing(config))
        self.robot, self.scenes, self.validation = (
            load_arrays(config.data.folder / source) for source in ("robot", "scenes", "validation")
        )
        if config.data.recorded is not None:
            self.robot, self.meta = load_recorded(config.data.recorded, chunk_timing(config), self.meta)
        self.space = ActionSpace.fit(self.robot["state"], self.robot["chunk"])
        self.fast = fit_fast(config, self.robot, self.space)
        self.tokenizer = build_tokenizer(config.fast_vocabulary)
        self.queries = torch.tensor(act_query_ids(self.tokenizer)[: config.readout_frequencies], device=self.device)
        sizes = {"length": config.prompt_length, "grid": chunk_timing(config).grid, "frequencies": len(self.queries)}
        self.maker = BatchMaker(self.tokenizer, self.fast, self.space, **sizes, device=self.device)
        action_dim = self.robot["state"].shape[1]
        self.model = VLA(
            VLAConfig(
                vision=config.model.vision,
                backbone=config.model.backbone,
                expert=config.model.expert,
                vocab_size=self.tokenizer.get_vocab_size(),
                action_dim=action_dim,
                horizon=HORIZON,
                state_dim=action_dim if config.model.state_token else None,
            )
        )
        order_embeddings(self.model, self.tokenizer, self.fast)
        self.heads = TrainingHeads(
            config.model.vision.width,
            config.model.backbone.width,
            len(COMBINATIONS) + 1,
            config.readout_frequencies,
            action_dim,
        )
        self.model.to(self.device)
        self.heads.to(self.device)
        if config.parallel.activation_checkpointing:
            checkpoint_activations(self.model)
        if config.parallel.shard:
            shard(self.model, config.parallel, init_device_mesh(self.device.type, (self.processes,)))

    def run(self) -> None:
        """All stages, each from its checkpoint where there is one; then the policy folder that `training.export`
        reads.
        """
        out = self.config.out
        out.mkdir(parents=True, exist_ok=True)
        progress = self.load()
        with SummaryWriter(str(out / "tensorboard" / f"rank{self.rank}")) as board:
            for index, stage in enumerate(self.config.stages[progress.stage :], start=progress.stage):
                progress = self.run_stage(index, stage, progress, board)
                if self.measures:
                    self.check_gates(stage, board)
                self.save(progress)  # not before: a run that missed its gate must meet it again when it goes on
        if self.measures:
            self.save_policy(out / "policy", progress)
        wait_for_all()

    def run_stage(self, index: int, stage: StageConfig, progress: Progress, board: SummaryWriter) -> Progress:
        """Gradient steps from `progress.step` to the stage's last; returns the beginning of the next stage."""
        began_s, before = time.monotonic(), progress.minutes

        def minutes() -> dict[str, float]:
            return before | {stage.name: before.get(stage.name, 0.0) + (time.monotonic() - began_s) / 60}

        parameters = select_parameters(self.model, self.heads, stage.train)
        optimizer = make_optimizer(parameters, stage.learning_rate, stage.weight_decay)
        if progress.optimizer is not None:
            load_optimizer(optimizer, progress.optimizer)
        steps = range(progress.step, stage.steps)
        bar = tqdm(
            steps, initial=progress.step, total=stage.steps, desc=stage.name, mininterval=5, disable=self.rank > 0
        )
        for step in bar:
            rng = np.random.default_rng([self.config.seed, index, step, self.rank])
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(stage, step)
            optimizer.zero_grad(set_to_none=True)
            values = self.accumulate_gradients(stage, rng)
            average_gradients(parameters)
            norm = clip_gradients(parameters, 1.0)
            if not torch.isfinite(norm):
                raise FloatingPointError(f"stage {stage.name}, step {step}: gradient norm {norm}; losses {values}")
            optimizer.step()
            if step % 20 == 0:
                bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()})
                for name, value in values.items():
                    board.add_scalar(f"{stage.name}/{name}", value, step)
            if (step + 1) % stage.checkpoint_every == 0 and step + 1 < stage.steps:
                self.save(Progress(index, step + 1, optimizer.state_dict(), minutes()))
        return Progress(index + 1, minutes=minutes())

    def save(self, progress: Progress) -> None:
        """All processes hold the same weights, or a shard each; the first one writes them."""
        weights = self.whole_weights()
        resume = gather(vars(progress), keep=self.rank == 0) | {"heads": self.heads.state_dict()}
        if self.rank == 0:
            save_checkpoint(self.config.out, self.model, resume, weights)

    def whole_weights(self) -> dict[str, Tensor]:
        """The model's, in the first process; every process must ask for them."""
        free_gathered(self.model)
        whole: dict[str, Tensor] = gather(self.model.state_dict(), keep=self.rank == 0)
        return whole

    def load(self) -> Progress:
        """Weights and progress of an earlier run in the same folder; the beginning where there is none."""
        if not (self.config.out / RESUME).exists():
            return Progress()
        state = load_resume(self.config.out)
        load_whole(self.model, load_checkpoint(self.config.out).state_dict())
        self.heads.load_state_dict(state.pop("heads"))
        return Progress(**state)

    def accumulate_gradients(self, stage: StageConfig, rng: np.random.Generator) -> dict[str, float]:
        """Backward passes of all the stage's losses; their values by name."""
        values: dict[str, float] = {}
        if "cells" in stage.losses:
            views, cells = self.maker.draw_views(self.scenes, stage.scene_batch, rng)
            with self.precision():
                found = {"cells": losses.name_cells(self.heads, self.model.stem_features(views), cells)}
            losses.backpropagate(found, stage.losses, values)
        if stage.scene_batch and {"text", "pointing"} & set(stage.losses):
            batch = self.maker.draw_scenes(self.scenes, stage.scene_batch, rng)
            with self.precision():
                found = self.language_losses(batch)
            losses.backpropagate(found, stage.losses, values)
        if stage.robot_batch:
            batch = self.maker.draw_robot(self.robot, stage.robot_batch, rng)
            generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
            compute = self.expert_losses if set(stage.losses) == {"flow"} and stage.insulate else self.robot_losses
            with self.precision():
                found = compute(batch, stage, generator)
            losses.backpropagate(found, stage.losses, values)
        return values

    def precision(self) -> torch.autocast:
        """What forward passes are to run under: products in `parallel.dtype`, sensitive operations in float32."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.config.parallel.dtype == "bfloat16")

    def language_losses(self, batch: Batch) -> dict[Loss, Tensor]:
        """Next-token prediction of the answer, and pointing at what was asked about."""
        output = self.forward(batch)
        rows = self.prefix_offset(batch) + last_token(batch)[:, None]
        return {
            "grounding": losses.ground(self.heads, self.probed(output, rows), batch.place_B2, None),
            "text": self.predict(batch, output),
            "pointing": self.point(batch, output.probe_logits_BPQ, rows),
        }

    def robot_losses(self, batch: Batch, stage: StageConfig, generator: torch.Generator) -> dict[Loss, Tensor]:
        """FAST tokens, pointing and readout for the backbone; flow for the expert when the stage asks for it, in one
        forward pass.
        """
        flow = self.draw_flow(batch, stage.noise_samples, generator) if "flow" in stage.losses else None
        x_t, time = flow[:2] if flow else (None, None)
        state = self.expert_state(batch, stage.noise_samples) if flow else None
        output = self.forward(batch, x_t=x_t, time=time, state=state, insulate=stage.insulate)
        rows = self.query_rows(batch)
        # The last layer's output enters no key or value, so the expert could not read what is named only there: also
        # name it earlier.
        streams = output.prefix_by_layer[-3:-1]
        readout = [
            losses.read_out(self.heads, take_rows(self.model.backbone.norm(stream), rows), batch.readout_BKA)
            for stream in streams
        ]
        found: dict[Loss, Tensor] = {
            "fast": self.predict(batch, output),
            "pointing": self.point(batch, output.probe_logits_BPQ, rows),
            "readout": torch.stack(readout).mean(),
            "grounding": losses.ground(self.heads, self.probed(output, rows), batch.place_B2, batch.state_BJ),
        }
        if flow:
            found["flow"] = losses.match_flow(output.velocity_RHA, *flow[2:])
        return found

    def forward(self, batch: Batch, **expert: Any) -> Output:
        """The model on a batch with its postfix; of the prefix only the prompt passes through the last layer."""
        return self.model(
            batch.images_BVCHW,
            batch.image_mask_BV,
            batch.tokens_BL,
            batch.token_mask_BL,
            batch.postfix_BT,
            batch.postfix_mask_BT,
            probe=(self.config.probe_layer, self.config.probe_head),
            prefix_rows=batch.tokens_BL.shape[1],
            **expert,
        )

    def probed(self, output: Output, rows_BR: Tensor) -> Tensor:
        """[B, R, D]: what the asking rows hold after the layer that points."""
        return take_rows(self.model.backbone.norm(output.prefix_by_layer[self.config.probe_layer]), rows_BR)

    def expert_losses(self, batch: Batch, stage: StageConfig, generator: torch.Generator) -> dict[Loss, Tensor]:
        """Flow alone on a backbone that does not learn:

        the same gradients as above (tested), the prefix without any graph.
        """
        x_t, time, target, learned = self.draw_flow(batch, stage.noise_samples, generator)
        with torch.no_grad():
            cache = self.model.prefill(batch.images_BVCHW, batch.image_mask_BV, batch.tokens_BL, batch.token_mask_BL)
        velocity = self.model.velocity(cache, x_t, time, self.expert_state(batch, stage.noise_samples))
        return {"flow": losses.match_flow(velocity, target, learned)}

    def expert_state(self, batch: Batch, samples: int) -> Tensor | None:
        """[R, J]: the joint state for each of the expert's rows; None where it is in the prompt alone."""
        return batch.state_BJ.repeat_interleave(samples, dim=0) if self.config.model.state_token else None

    def draw_flow(
        self, batch: Batch, samples: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x_t, time, velocity target and mask of what is learned; `samples` rows for each chunk of the batch,
        adjacent.
        """
        action = batch.action_BHA.repeat_interleave(samples, dim=0)
        # From the CPU's generator: a seed means the same on every device.
        drawn = losses.draw_flow_time(len(action), action.shape[1], self.config.max_prefix_delay, generator)
        time, learned = (tensor.to(self.device) for tensor in drawn)
        if self.config.prefix_lead:
            action, learned = losses.run_ahead(action, learned, self.config.prefix_lead, generator)
        x_t, target = losses.mix_flow(action, torch.randn(action.shape, generator=generator).to(self.device), time)
        return x_t, time, target, learned

    def predict(self, batch: Batch, output: Output) -> Tensor:
        """Next-token loss of the postfix; `output` has the prompt's rows only."""
        hidden = losses.next_token_hidden(output.prefix_hidden_BPD, last_token(batch), output.postfix_hidden_BTD)
        if self.config.parallel.activation_checkpointing:
            return losses.predict_in_pieces(self.model.logits, hidden, batch.postfix_BT, batch.postfix_mask_BT)
        return losses.predict_postfix(self.model.logits(hidden), batch.postfix_BT, batch.postfix_mask_BT)

    def prefix_offset(self, batch: Batch) -> int:
        """Where the prompt starts in the prefix."""
        return batch.images_BVCHW.shape[1] * self.config.model.vision.tokens

    def query_rows(self, batch: Batch) -> Tensor:
        """[B, K]: where the learned prompt tokens stand in the prefix."""
        places = (batch.tokens_BL[:, :, None] == self.queries).int().argmax(dim=1)
        return self.prefix_offset(batch) + places

    def scene_scores(self, batch: Batch, scores_BPQ: Tensor, rows_BR: Tensor) -> Tensor:
        """[B, R, N]: the probe head's scores from the asking rows to the scene image, the last camera."""
        tokens = self.config.model.vision.tokens
        end = self.prefix_offset(batch)
        return take_rows(scores_BPQ[:, :, end - tokens : end], rows_BR)

    def point(self, batch: Batch, scores_BPQ: Tensor, rows_BR: Tensor) -> Tensor:
        """The pointing loss over the whole prefix:

        the asking rows shall look at the target's cell and at nothing else.
        """
        tokens = self.config.model.vision.tokens
        seen_BP = torch.cat([batch.image_mask_BV.repeat_interleave(tokens, dim=1), batch.token_mask_BL], dim=1)
        scores_BRP = take_rows(scores_BPQ, rows_BR).masked_fill(~seen_BP[:, None], -torch.inf)
        return losses.point_at_target(scores_BRP, batch.target_cell_B, self.prefix_offset(batch) - tokens)

    def check_gates(self, stage: StageConfig, board: SummaryWriter) -> None:
        """ConfigurationError when a figure misses its gate, so that no later stage builds on sand."""
        if not stage.gates:
            return
        figures = self.figures()
        if self.rank == 0:
            print(f"{stage.name}: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()), flush=True)
        for name, value in figures.items():
            board.add_scalar(f"figures/{name}", value, stage.steps)
        missed = {name: least for name, least in stage.gates.items() if figures[name] < least}
        free_gathered(self.model)
        if missed:
            raise ConfigurationError(
                f"stage {stage.name}: expected {missed}, got { {name: round(figures[name], 3) for name in missed} }; "
                "train longer (steps), or look at the losses in TensorBoard"
            )

    def figures(self) -> dict[str, float]:
        with self.precision():
            return measure(self)

    def save_policy(self, folder: Path, progress: Progress) -> None:
        """What `training.export` turns into a bundle, with the finished model's figures on held-out frames."""
        figures = self.figures()
        weights = self.whole_weights()
        if self.rank > 0:
            return
        save_checkpoint(folder, self.model, weights=weights)
        self.tokenizer.save(str(folder / "tokenizer.json"))
        self.fast.save(folder / "fast.json")
        (folder / "space.json").write_text(json.dumps(asdict(self.space)))
        minutes = {f"minutes_{name}": value for name, value in progress.minutes.items()}
        figures |= minutes | {"processes": float(self.processes)}
        spec = describe_policy(self.config, self.space, fingerprint=self.meta["fingerprint"], figures=figures)
        (folder / "policy.json").write_text(spec.model_dump_json(indent=1))


def chunk_timing(config: TrainingConfig) -> ChunkTiming:
    vision = config.model.vision
    return ChunkTiming(vision.image_size, HORIZON, ACTION_PERIOD_S, vision.image_size // vision.patch_size)


def fit_fast(config: TrainingConfig, robot: Arrays, space: ActionSpace) -> FastTokenizer:
    rng = np.random.default_rng(config.seed)
    chosen = np.sort(rng.choice(len(robot["state"]), size=min(FIT_CHUNKS, len(robot["state"])), replace=False))
    chunks = space.normalize_chunk(robot["chunk"][chosen].astype(np.float64), robot["state"][chosen].astype(np.float64))
    return FastTokenizer.fit(chunks, vocab_size=config.fast_vocabulary, scale=config.fast_scale)


def last_token(batch: Batch) -> Tensor:
    """[B]: index of each prompt's last token."""
    return batch.token_mask_BL.sum(dim=1) - 1


def take_rows(x_BPD: Tensor, rows_BR: Tensor) -> Tensor:
    """[B, R, D]: for each sample the rows with these indices."""
    return x_BPD.gather(1, rows_BR[:, :, None].expand(-1, -1, x_BPD.shape[2]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a YAML file in config/training/")
    return run_command("train", partial(_train, parser.parse_args(arguments).config))


def _train(config: Path) -> int:
    Trainer(load_config(config)).run()
    return ExitCode.FINE


if __name__ == "__main__":
    sys.exit(main())
