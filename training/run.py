"""What a training configuration determines: robot, data, tokenizers and model, and the stage loop that trains it.

`python -m training.train CONFIG` comes here.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.device_mesh import init_device_mesh

from ki_vla_ros.bundle import ImageSpec, PromptSpec, Provenance
from ki_vla_ros.console import ExitCode, run_command
from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.robot import find_robot, read_robot
from training import train
from training.action_space import ActionSpace
from training.config import TrainingConfig, load_config
from training.data import Arrays, BatchMaker, ChunkTiming, RobotFrames, Source
from training.data.lerobot import load_recorded
from training.evaluate import measure
from training.lora import add_lora, fingerprint, merge, save_adapter
from training.losses import BatchLosses, TrainingHeads
from training.model import VLA, VLAConfig, order_embeddings
from training.parallel import checkpoint_activations, choose_device, join_group, shard, wait_for_all
from training.policy import commit, describe_policy
from training.tokens import DEMO_PROMPT, FastTokenizer, act_query_ids, build_tokenizer
from training.weights import save_checkpoint

FIT_CHUNKS = 20_000  # chunks that FAST's merges are fitted on


class Run:
    """What `config` determines, and its trainer; `frames` and `validation` draw from robot episodes."""

    def __init__(self, config: TrainingConfig) -> None:
        torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.config = config
        self.device = choose_device(config.parallel.device)
        self.rank, self.processes = join_group(alone=not config.parallel.shard, device=config.parallel.device)
        self.robot = read_robot(find_robot(config.robot))
        if config.max_prefix_delay >= self.robot.horizon:
            raise ConfigurationError(
                f"max_prefix_delay: expected less than the horizon {self.robot.horizon} of robot {self.robot.name!r}, "
                f"got {config.max_prefix_delay}"
            )
        self.open_data()
        self.build_model()
        losses = BatchLosses(self.model, self.heads, config)
        self.trainer = train.Trainer(
            config, self.model, self.heads, self.sources, losses, self.figures, self.rank, self.base
        )

    def open_data(self) -> None:
        """The arrays, what is fitted on them (normalisation, FAST), and the sources that stages draw from."""
        # Imported late: the simulator's modules load MuJoCo, which chooses how it renders when it is imported.
        from training.data.simulated import (
            SceneQuestions,
            SceneViews,
            check_robot,
            describe_tasks,
            load_arrays,
            make_data,
        )

        config, timing = self.config, ChunkTiming.of(self.config.model.vision, self.robot)
        check_robot(self.robot)
        if self.rank == 0:
            make_data(config.data, timing)
        wait_for_all()
        self.meta = make_data(config.data, timing)
        episodes, validation, scenes = (
            load_arrays(config.data.folder / source) for source in ("robot", "validation", "scenes")
        )
        episodes, validation = describe_tasks(episodes), describe_tasks(validation)
        if config.data.recorded is not None:
            episodes, self.meta = load_recorded(config.data.recorded, self.robot, timing, self.meta)
        joints, columns = len(self.robot.actions), episodes["state"].shape[1]
        if columns != joints:
            raise ConfigurationError(
                f"data.recorded {config.data.recorded}: expected the {joints} joints of robot {self.robot.name!r}, got "
                f"{columns}; name the robot's file under robot"
            )
        self.space = ActionSpace.fit(episodes["state"], episodes["chunk"])
        self.fast = make_fast(config, episodes, self.space)
        # A fit may use fewer tokens than it is allowed; the model's size must not depend on that.
        action_ids = config.fast_vocabulary if config.fast_published is None else self.fast.vocab_size
        self.tokenizer = build_tokenizer(action_ids)
        maker = BatchMaker(self.tokenizer, length=config.prompt_length, grid=timing.grid, device=self.device)
        asking = () if config.hints is None else act_query_ids(self.tokenizer)[: config.hints.readout_frequencies]
        self.frames, self.validation = (
            RobotFrames(arrays, maker, self.space, self.fast, prompt=DEMO_PROMPT, asking=asking)
            for arrays in (episodes, validation)
        )
        self.kinds = SceneViews.kinds
        self.sources: Mapping[str, Source] = {
            "views": SceneViews(scenes, self.device),
            "scenes": SceneQuestions(scenes, maker),
            "robot": self.frames,
        }

    def build_model(self) -> None:
        config, action_dim = self.config, len(self.robot.actions)
        self.model = VLA(
            VLAConfig(
                vision=config.model.vision,
                backbone=config.model.backbone,
                expert=config.model.expert,
                vocab_size=self.tokenizer.get_vocab_size(),
                action_dim=action_dim,
                horizon=self.robot.horizon,
                state_dim=action_dim if config.model.state_token else None,
            )
        )
        order_embeddings(self.model, self.tokenizer, self.fast)
        self.base = None
        if config.lora is not None:
            add_lora(self.model, config.lora, config.seed)
            self.base = fingerprint(self.model)
        self.model.to(self.device)
        self.heads = None
        if config.hints is not None:
            widths = config.model.vision.width, config.model.backbone.width
            self.heads = TrainingHeads(*widths, self.kinds, config.hints.readout_frequencies, action_dim)
            self.heads.to(self.device)
        if config.parallel.activation_checkpointing:
            checkpoint_activations(self.model)
        if config.parallel.shard:
            shard(self.model, config.parallel, init_device_mesh(self.device.type, (self.processes,)))

    def run(self) -> None:
        """Run all stages, then write the policy folder that `training.export` reads."""
        self.config.out.mkdir(parents=True, exist_ok=True)
        progress = self.trainer.run()
        if self.trainer.measures:
            self.save_policy(self.config.out / "policy", progress)
        wait_for_all()

    def figures(self) -> dict[str, float]:
        """Offline figures of the model on held-out instructions."""
        probe = None if self.config.hints is None else self.config.hints.probe
        with self.trainer.precision():
            return measure(self.model, self.validation, self.config.flow_steps, self.heads, probe)

    def save_policy(self, folder: Path, progress: train.RunPosition) -> None:
        """Write what `training.export` turns into a bundle, with the model's figures on held-out frames."""
        config = self.config
        with self.trainer.averaged():
            figures = self.figures()
            weights = self.trainer.whole_weights()
        if self.rank > 0:
            return
        figures |= {f"minutes_{name}": value for name, value in progress.minutes.items()}
        figures["processes"] = float(self.processes)
        state: dict[str, Any] = {"low": self.space.state_low, "high": self.space.state_high}
        spec = describe_policy(
            self.robot,
            name=config.name,
            image=ImageSpec(size=config.model.vision.image_size),
            prompt=PromptSpec(template=DEMO_PROMPT, length=config.prompt_length, max_instruction_chars=80),
            state=state | {"encoding": "both" if config.model.state_token else "text"},
            action={"low": self.space.action_low, "high": self.space.action_high},
            flow={"steps": config.flow_steps},
            max_prefix_delay=config.max_prefix_delay,
            provenance=Provenance(
                recipe="knowledge insulation",
                seed=config.seed,
                commit=commit(),
                data_fingerprint=self.meta["fingerprint"],
                figures=figures,
            ),
        )
        if config.lora is not None:
            adapter = config.out / "adapter"
            save_adapter(adapter, weights, self.trainer.trained, config.lora, self.model.config)
            weights = merge(weights, config.lora)
        save_checkpoint(folder, self.model, weights=weights, tokenizer=self.tokenizer, policy=spec)


def make_fast(config: TrainingConfig, episodes: Arrays, space: ActionSpace) -> FastTokenizer:
    """The published vocabulary that the configuration names, or one fitted on chunks of the episodes."""
    if config.fast_published is not None:
        return FastTokenizer.load_published(config.fast_published, *episodes["chunk"].shape[1:])
    rng, frames = np.random.default_rng(config.seed), len(episodes["state"])
    chosen = np.sort(rng.choice(frames, size=min(FIT_CHUNKS, frames), replace=False))
    state_FJ, chunk_FHJ = (episodes[name][chosen].astype(np.float64) for name in ("state", "chunk"))
    chunks = space.normalize_chunk(chunk_FHJ, state_FJ)
    return FastTokenizer.fit(chunks, vocab_size=config.fast_vocabulary, scale=config.fast_scale)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.train",
        description=train.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="a YAML file in config/training/")
    return run_command("train", partial(_train, parser.parse_args(arguments).config))


def _train(config: Path) -> int:
    Run(load_config(config)).run()
    return ExitCode.FINE
