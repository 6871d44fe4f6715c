"""What a training configuration determines: data, robots and model, and the stage loop that trains it.

`python -m training.train CONFIG` comes here.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh

from ki_vla_ros.bundle import ImageSpec, Provenance
from ki_vla_ros.console import ExitCode, run_command
from training import train
from training.config import StartConfig, TrainingConfig, load_config
from training.evaluate import measure
from training.lora import add_lora, fingerprint, merge, save_adapter
from training.losses import BatchLosses, TrainingHeads
from training.model import VLA, VLAConfig, order_embeddings
from training.parallel import checkpoint_activations, choose_device, join_group, shard, wait_for_all
from training.policy import commit, describe_policy
from training.sources import Sources
from training.weights import RunState, adopt, open_start, save_checkpoint


class Run:
    """What `config` determines, and its trainer."""

    def __init__(self, config: TrainingConfig) -> None:
        torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.config = config = adopt(config)
        self.device = choose_device(config.parallel.device)
        self.rank, self.processes = join_group(alone=not config.parallel.shard, device=config.parallel.device)
        self.data = Sources(config)
        self.build_model()
        losses = BatchLosses(self.model, self.heads, config)
        self.trainer = train.Trainer(
            config, self.model, self.heads, self.data.training, losses, self.figures, self.rank, self.made_of()
        )

    def made_of(self) -> dict[str, Any]:
        """What a checkpoint must be of, beside the configuration: its files' content, and what was fitted on data."""
        data = self.data
        return {
            "robots": {robot.name: robot.model_dump(mode="json") for robot in data.robots.values()},
            "normalisation": {
                found.robot.name: {
                    field.name: getattr(found.space, field.name)
                    for field in fields(found.space)
                    if field.name != "robot"
                }
                for found in data.embodiments.values()
            },
            "tokenizer": hashlib.sha256(data.tokenizer.to_str().encode()).hexdigest(),
            "base": self.base,
        }

    def build_model(self) -> None:
        config, data = self.config, self.data
        if config.start is not None:
            self.model = self.continue_model(config.start)
        else:
            self.model = VLA(
                VLAConfig(
                    vision=config.model.vision,
                    backbone=config.model.backbone,
                    expert=config.model.expert,
                    vocab_size=data.tokenizer.get_vocab_size(),
                    action_dim=data.action_dim,
                    horizon=data.robot.horizon,
                    state_dim=data.state_dim if config.model.state_token else None,
                )
            )
            if config.vocabulary.kind != "paligemma":
                order_embeddings(self.model, data.tokenizer, data.fast)
        self.base = None
        if config.lora is not None:
            add_lora(self.model, config.lora, config.seed)
            self.base = fingerprint(self.model)
        self.model.to(self.device)
        self.heads = None
        if config.hints is not None:
            self.heads = TrainingHeads(
                config.model.vision.width,
                config.model.backbone.width,
                config.hints.cell_classes,
                config.hints.readout_frequencies,
                data.action_dim,
                data.state_dim,
            )
            self.heads.to(self.device)
        if config.parallel.activation_checkpointing:
            checkpoint_activations(self.model)
        if config.parallel.shard:
            shard(self.model, config.parallel, init_device_mesh(self.device.type, (self.processes,)))

    def continue_model(self, start: StartConfig) -> VLA:
        """The checkpoint's model, for this run's robots and vocabulary."""
        data, widths = self.data, [(len(robot.state), len(robot.actions)) for robot in self.data.robots.values()]
        state_width, action_width = (max(sizes) for sizes in zip(*widths, strict=True))
        if "expert" not in start.parts:
            state_width, action_width = data.state_dim, data.action_dim
        return open_start(
            start,
            state_width=state_width,
            action_width=action_width,
            horizon=data.robot.horizon,
            action_ids=data.action_ids,
            model=self.config.model,
            seed=self.config.seed,
        ).model()

    def run(self) -> None:
        """Run all stages, then write the policy folder that `training.export` reads."""
        self.config.out.mkdir(parents=True, exist_ok=True)
        progress = self.trainer.run()
        if self.trainer.measures:
            self.save_policy(self.config.out / "policy", progress)
        wait_for_all()

    def figures(self) -> dict[str, float]:
        """Figures of the model on held-out data."""
        with self.trainer.precision():
            return measure(self.model, self.data, self.trainer.losses, self.heads)

    def save_policy(self, folder: Path, progress: RunState) -> None:
        """Write what `training.export` turns into a bundle, with the model's figures on held-out data."""
        config, data = self.config, self.data
        with self.trainer.averaged():
            figures = self.figures()
            weights = self.trainer.whole_weights()
        if self.rank > 0:
            return
        figures |= {f"minutes_{name}": value for name, value in progress.minutes.items()}
        figures["processes"] = float(self.processes)
        space = data.embodiment.space
        spec = describe_policy(
            space.robot,
            name=config.name,
            image=ImageSpec(size=config.model.vision.image_size),
            prompt=data.form.prompt,
            state={"low": space.state_low, "high": space.state_high, "encoding": config.model.state},
            action={"low": space.action_low, "high": space.action_high},
            flow={"steps": config.flow_steps},
            max_prefix_delay=config.max_prefix_delay,
            pad_to=data.pad_to,
            provenance=Provenance(
                recipe=describe_recipe(config),
                seed=config.seed,
                commit=commit(),
                data_fingerprint=data.fingerprint(),
                figures=figures,
            ),
        )
        if config.lora is not None:
            adapter = config.out / "adapter"
            save_adapter(adapter, weights, self.trainer.trained, config.lora, self.model.config)
            weights = merge(weights, config.lora)
        save_checkpoint(folder, self.model, weights=weights, tokenizer=data.tokenizer, policy=spec)


def describe_recipe(config: TrainingConfig) -> str:
    """In words, for the model card."""
    with_flow = [stage for stage in config.stages if "flow" in stage.losses]
    insulated = all(stage.insulate for stage in with_flow)
    return "knowledge insulation" if insulated else "flow matching end to end, without insulation"


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
