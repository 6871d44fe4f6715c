"""What a training configuration determines: data, robots and model, and the stage loop that trains it.

`python -m training.train CONFIG` comes here.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from tokenizers.models import WordLevel
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from ki_vla_ros.bundle import ImageSpec, PolicySpec, Provenance
from ki_vla_ros.console import ExitCode, run_command
from ki_vla_ros.errors import ConfigurationError, did_you_mean, printable
from training import train
from training.config import StartConfig, TrainingConfig, load_config
from training.evaluate import (
    MALFORMED,
    Act,
    Measured,
    act_in_training,
    drive,
    measure,
    success_names,
    try_environments,
    write_page,
)
from training.export import check_policy
from training.lora import add_lora, fingerprint, merge, save_adapter
from training.losses import BatchLosses, TrainingHeads
from training.model import (
    FAULTS,
    VLA,
    FlowSampler,
    RegressionSampler,
    Sampler,
    SamplerName,
    TokenSampler,
    order_action_tokens,
    order_embeddings,
)
from training.parallel import checkpoint_activations, choose_device, join_group, shard, wait_for_all
from training.policy import commit, describe_policy
from training.sources import Sources
from training.storage import LOCK, only_run
from training.tokens import ACTIONS, describe_actions
from training.weights import RunState, adopt, open_start, save_checkpoint

POLICY, ADAPTER = "policy", "adapter"  # folders under `out`
TRIED = 2  # held-out frames of each source that are measured before the first step
NUMBER_BYTES = 4


class Run:
    """What `config` determines, and its trainer."""

    def __init__(self, config: TrainingConfig) -> None:
        torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.config = config = adopt(config)
        self.device = choose_device(config.parallel.device)
        self.rank, self.processes = join_group(alone=not config.parallel.shard, device=config.parallel.device)
        if self.rank == 0 and (config.out / LOCK).exists():
            with only_run(config.out):  # whoever is second is told now, not after the data are opened
                pass
        self.data = Sources(config)
        self.build_model()
        losses = BatchLosses(self.model, self.heads, config)
        self.trainer = train.Trainer(
            config,
            self.model,
            self.heads,
            self.data.training,
            losses,
            self.figures,
            self.rank,
            self.made_of(),
            self.show,
        )
        self.measured = Measured()

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
            "action_tokens": hashlib.sha256(describe_actions(data.actions).encode()).hexdigest(),
            "base": self.base,
        }

    def build_model(self) -> None:
        config, data = self.config, self.data
        if config.start is not None:
            self.model = self.continue_model(config.start)
        else:
            sizes = config.model.vla(
                vocab_size=data.tokenizer.get_vocab_size(),
                action_dim=data.action_dim,
                horizon=data.robot.horizon,
                state_dim=data.state_dim,
            )
            self.model = VLA(sizes)
            if config.vocabulary.kind != "paligemma":
                order_embeddings(self.model, data.tokenizer, data.actions)
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
        model = open_start(
            start,
            state_width=state_width,
            action_width=action_width,
            horizon=data.robot.horizon,
            action_ids=data.action_ids,
            model=self.config.model,
            seed=self.config.seed,
        ).model()
        if isinstance(data.tokenizer.model, WordLevel) and not (start.checkpoint / ACTIONS).exists():
            order_action_tokens(model, data.tokenizer, data.actions)  # it has never written an action
        return model

    def run(self) -> None:
        """Run all stages, then write the policy folder that `training.export` reads."""
        with only_run(self.config.out) if self.rank == 0 else nullcontext():
            try:
                progress = self.trainer.run(self.try_out)
                if self.trainer.measures:
                    self.save_policy(self.config.out / POLICY, progress)
                wait_for_all()
            finally:  # also of a run that was stopped: the next one counts its own
                for told in self.data.passed_over():
                    print(printable(told), file=sys.stderr, flush=True)

    def figures(self, driven: bool = False) -> dict[str, float]:
        """Figures of the model on held-out data, and in closed loop if `driven` and environments are named."""
        with self.trainer.precision():
            self.measured = measure(self.model, self.data, self.trainer.losses, self.heads)
            if driven and self.config.environment is not None:
                environment, sampler = self.config.environment, self.sampler()
                self.measured.figures |= drive(self.act(sampler), self.describe(), environment)
                if isinstance(sampler, TokenSampler):
                    shares = sampler.shares(environment.episodes * len(environment.names))
                    self.measured.figures |= {f"{MALFORMED}.{fault}": share for fault, share in shares.items()}
        return self.measured.figures

    def show(self) -> None:
        """Write the page of the run so far."""
        write_page(self.config, self.data, self.measured, self.trainer.figure_record, self.trainer.loss_record)

    def act(self, sampler: Sampler | None = None) -> Act:
        """The model as it is now, as a policy; by default with a new sampler."""
        data = self.data
        sampler = sampler or self.sampler()
        return act_in_training(self.model, self.describe(), data.tokenizer, data.embodiment.space, sampler)

    def sampler(self, name: SamplerName | None = None) -> Sampler:
        """How the model is asked for chunks in closed loop, or in the way of that name."""
        name = name or self.config.sampler
        if name == "tokens":
            temperature = self.config.token_temperature
            return TokenSampler(self.data.embodiment.chunks, self.data.maker.postfix, temperature=temperature)
        if name == "regression":
            return RegressionSampler()
        return FlowSampler(self.config.flow_steps)

    def try_out(self) -> None:
        """Once, in small, everything that comes after the first steps, so that nothing fails only at the end."""
        config, data = self.config, self.data
        if not self.trainer.measures:
            return
        spec = self.describe()
        if self.rank == 0:
            for told in data.warnings:
                print(printable(f"WARNING: {told}"), file=sys.stderr, flush=True)
            self.check_room()
            for robot, unseen in data.unseen.items():
                if unseen:
                    print(f"no data of {robot} has images of {', '.join(unseen)}: its policy does without", flush=True)
        check_policy(spec, self.model, data.tokenizer)
        with self.trainer.averaged(), self.trainer.precision():
            names = [*measure(self.model, data, self.trainer.losses, self.heads, frames=TRIED).figures]
            if config.environment is not None:
                names += success_names(config.environment)
                names += [f"{MALFORMED}.{fault}" for fault in FAULTS if config.sampler == "tokens"]
            check_gates(config, names)
            if config.environment is not None:
                try_environments(self.act(self.sampler()), spec, config.environment)
            weights = self.trainer.whole_weights() if config.lora else {}
        if self.rank == 0:
            tried = config.out / ".tried"
            try:
                self.write_policy(tried / POLICY, tried / ADAPTER, spec, weights, {})
            finally:
                shutil.rmtree(tried, ignore_errors=True)

    def check_room(self) -> None:
        """ConfigurationError unless the disk has room for the checkpoints that are kept, and one more or the policy."""
        state = self.model.state_dict()
        whole = sum(tensor.numel() for tensor in state.values())
        trained = sum(state[name].numel() for name in self.trainer.trained & state.keys())
        saved = (trained if self.config.lora else whole) + trained * (2 if self.config.ema is None else 3)
        wanted = NUMBER_BYTES * (self.config.keep * saved + max(saved, whole))
        there = sum(p.stat().st_size for p in self.config.out.glob("checkpoint-*/*") if p.is_file())
        free = shutil.disk_usage(self.config.out).free
        if free + there < wanted:
            raise ConfigurationError(
                f"out {self.config.out}: expected {(wanted - there) / 1e9:.1f} GB on the disk for checkpoints and "
                f"policy, got {free / 1e9:.1f} GB that are free; make room, or name another folder under out"
            )

    @cached_property
    def commit(self) -> str:
        """Of the code that this run began with."""
        return commit()

    @cached_property
    def fingerprint(self) -> str:
        return self.data.fingerprint()

    def describe(self, figures: Mapping[str, float] | None = None) -> PolicySpec:
        """What the bundle's manifest will say of the policy."""
        config, data = self.config, self.data
        space = data.embodiment.space
        return describe_policy(
            space.robot,
            name=config.name,
            image=ImageSpec(size=config.model.vision.image_size),
            prompt=data.form.prompt,
            state={"low": space.state_low, "high": space.state_high, "encoding": config.model.state},
            action={"low": space.action_low, "high": space.action_high},
            flow={"steps": config.flow_steps} if config.sampler == "flow" else None,
            max_prefix_delay=config.max_prefix_delay,
            pad_to=data.pad_to,
            provenance=Provenance(
                recipe=describe_recipe(config),
                seed=config.seed,
                commit=self.commit,
                data_fingerprint=self.fingerprint,
                figures=dict(figures or {}),
            ),
        )

    def save_policy(self, folder: Path, progress: RunState) -> None:
        """Write what `training.export` turns into a bundle, with the model's figures on held-out data."""
        with self.trainer.averaged():
            weights = self.trainer.whole_weights()
        if self.rank > 0:
            return
        last = self.config.stages[-1]  # which ended with figures, perhaps in an earlier run
        figures = self.trainer.figure_record.values(last.name, last.steps)
        figures |= {f"minutes_{name}": value for name, value in progress.minutes.items()}
        figures["processes"] = float(self.processes)
        lora = self.config.lora
        merged = weights if lora is None else merge(weights, lora)
        self.write_policy(folder, self.config.out / ADAPTER, self.describe(figures), weights, merged)

    def write_policy(
        self, folder: Path, adapter: Path, spec: PolicySpec, weights: Mapping[str, Tensor], merged: Mapping[str, Tensor]
    ) -> None:
        if self.config.lora is not None:
            save_adapter(adapter, weights, self.trainer.trained, self.config.lora, self.model.config)
        actions = self.data.embodiment.chunks if self.config.has_action_tokens else None
        save_checkpoint(folder, self.model, weights=merged, tokenizer=self.data.tokenizer, policy=spec, actions=actions)


def check_gates(config: TrainingConfig, names: Sequence[str]) -> None:
    """ConfigurationError if a gate is of a figure that there is not."""
    for stage in config.stages:
        every = {"gates": stage.gates, **{f"gates_at: {step}": gates for step, gates in stage.gates_at.items()}}
        for key, gates in every.items():
            for name in gates:
                if name not in names:
                    raise ConfigurationError(
                        f"stage {stage.name}: {key}: expected one of the figures {', '.join(names)}, got {name!r}"
                        f"{did_you_mean(name, names)}"
                    )


def describe_recipe(config: TrainingConfig) -> str:
    """In words, for the model card, after the name of the recipe that the run says."""
    with_flow = [stage for stage in config.stages if "flow" in stage.losses]
    insulated = all(stage.insulate for stage in with_flow)
    if not with_flow:
        said = f"no flow; it acts by {config.sampler}"
    elif insulated and not config.has_action_tokens:
        said = "flow matching, insulated; no action tokens teach the backbone"
    else:
        said = "knowledge insulation" if insulated else "flow matching end to end, without insulation"
    return said if config.recipe is None else f"{config.recipe} ({said})"


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
