"""The stage loop: which batches, which losses, which parameters, for how many steps, and what a run resumes from.

    python -m training.train config/training/demo.yaml

Knowledge insulation (arXiv 2505.23705): the backbone learns from cross-entropies only (answers, FAST action tokens),
the action expert learns flow matching and reads the backbone's keys and values through a stop-gradient. So the expert
never affects the backbone, and the same code can train both at once, or one after the other at less cost, as the
configuration says. A run that stops resumes at its last checkpoint; what it draws depends only on seed, stage, step and
process.

Nothing is built here: `training.run` makes data, robots and model from the configuration.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ki_vla_ros.errors import ConfigurationError
from training.config import Loss, StageConfig, TrainingConfig
from training.data import Batch, Loader, Source
from training.ema import MovingAverage
from training.losses import BatchLosses, TrainingHeads, targets
from training.model import VLA
from training.optimizer import (
    Parameters,
    clip_gradients,
    load_optimizer,
    make_optimizer,
    part_norms,
    peaks,
    select_parameters,
    set_learning_rates,
)
from training.parallel import average_gradients, free_gathered, gather, load_whole
from training.weights import load_resume, newest_checkpoint, read_config, read_weights, save_run


@dataclass(frozen=True)
class RunPosition:
    """Where a run stands: the next step of a stage; `optimizer` is its state there, None when a stage begins.

    `minutes` is the time that each stage has taken so far, including the runs that were resumed.
    """

    stage: int = 0
    step: int = 0
    optimizer: dict[str, Any] | None = None
    minutes: dict[str, float] = field(default_factory=dict)


class Trainer:
    """Trains a model by its stages; `figures` measures it for their gates (if sharded, in all processes)."""

    def __init__(
        self,
        config: TrainingConfig,
        model: VLA,
        heads: TrainingHeads | None,
        sources: Mapping[str, Source],
        losses: BatchLosses,
        figures: Callable[[], dict[str, float]],
        rank: int = 0,
        base: str | None = None,
    ) -> None:
        self.config, self.model, self.heads = config, model, heads
        self.sources, self.losses, self.figures, self.rank = sources, losses, figures, rank
        every = {name: p for stage in config.stages for name, p in self.choose(stage).items()}
        self.trained, self.base = frozenset(every), base
        self.average = None if config.ema is None else MovingAverage(every, config.ema)
        # A sharded model's forward pass takes all processes.
        self.measures = rank == 0 or config.parallel.shard

    def run(self) -> RunPosition:
        """Run all stages, from the last checkpoint if there is one."""
        for stage in self.config.stages:
            self.check_sources(stage)
            peaks(self.choose(stage), stage)
        progress = self.load()
        with open_log(self.config.out / "tensorboard" / f"rank{self.rank}") as board:
            for index, stage in enumerate(self.config.stages[progress.stage :], start=progress.stage):
                progress = self.run_stage(index, stage, progress, board)
                if self.measures:
                    self.check_gates(stage, board)
                self.save(progress)  # only now: a run that missed its gate must meet it again when it is resumed
        return progress

    def run_stage(self, index: int, stage: StageConfig, progress: RunPosition, board: SummaryWriter) -> RunPosition:
        """Take gradient steps from `progress.step` to the stage's last; returns the beginning of the next stage."""
        began_s, before = time.monotonic(), progress.minutes

        def minutes() -> dict[str, float]:
            return before | {stage.name: before.get(stage.name, 0.0) + (time.monotonic() - began_s) / 60}

        parameters = self.choose(stage)
        optimizer = make_optimizer(parameters, stage)
        if progress.optimizer is not None:
            load_optimizer(optimizer, progress.optimizer)
        steps = range(progress.step, stage.steps)
        bar = tqdm(
            steps, initial=progress.step, total=stage.steps, desc=stage.name, mininterval=5, disable=self.rank > 0
        )
        ahead = Loader(partial(self.draw, index, stage), self.config.workers).iterate(steps)
        for step, batches in zip(bar, ahead, strict=True):
            rng = np.random.default_rng([self.config.seed, index, step, self.rank])
            set_learning_rates(optimizer, stage, step)
            optimizer.zero_grad(set_to_none=True)
            values = self.accumulate_gradients(stage, batches, rng)
            average_gradients(parameters.values())
            if step % 20 == 0:  # all processes take part
                values |= {f"gradient/{part}": norm for part, norm in part_norms(parameters).items()}
            norm = clip_gradients(parameters.values(), stage.largest_norm)
            if not torch.isfinite(norm):
                raise FloatingPointError(f"stage {stage.name}, step {step}: gradient norm {norm}; losses {values}")
            optimizer.step()
            if self.average is not None:
                self.average.update()
            if step % 20 == 0:
                bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()})
                for name, value in values.items():
                    board.add_scalar(f"{stage.name}/{name}", value, step)
            if (step + 1) % stage.checkpoint_every == 0 and step + 1 < stage.steps:
                self.save(RunPosition(index, step + 1, optimizer.state_dict(), minutes()))
        return RunPosition(index + 1, minutes=minutes())

    def choose(self, stage: StageConfig) -> Parameters:
        """The parameters that the stage trains, by name; gradients are computed for these alone."""
        return select_parameters(self.model, self.heads, stage.train, stage.freeze, f"stage {stage.name}: train")

    def draw(self, index: int, stage: StageConfig, step: int) -> list[Batch]:
        """A batch from each source. Seed, stage, step and process decide it: a resumed run gets the same."""
        batches = []
        for number, (name, count) in enumerate(stage.sources.items()):
            rng = np.random.default_rng([self.config.seed, index, step, self.rank, number])
            batches.append(self.sources[name].draw(count, rng))
        return batches

    def accumulate_gradients(
        self, stage: StageConfig, batches: Sequence[Batch], rng: np.random.Generator
    ) -> dict[str, float]:
        """One backward pass per source's batch; returns the losses' values by name, summed over the sources."""
        values: dict[str, float] = {}
        device = next(self.model.parameters()).device
        for batch in batches:
            with self.precision():
                found = self.losses(batch.to(device), stage, rng)
            torch.stack([stage.losses[loss] * value for loss, value in found.items()]).sum().backward()
            for loss, value in found.items():
                values[loss] = values.get(loss, 0.0) + float(value.detach())
        return values

    def precision(self) -> torch.autocast:
        """The context for forward passes: products in `parallel.dtype`, sensitive operations in float32."""
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.config.parallel.dtype == "bfloat16")

    def check_sources(self, stage: StageConfig) -> None:
        """ConfigurationError if a source is unknown or teaches nothing, or a loss has no targets in any source."""
        if unknown := stage.sources.keys() - self.sources.keys():
            raise ConfigurationError(
                f"stage {stage.name}: sources: expected some of {', '.join(self.sources)}, got {', '.join(unknown)}"
            )
        rng, met = np.random.default_rng(0), set[Loss]()
        for name in stage.sources:
            taught = targets(self.sources[name].draw(1, rng)) & stage.losses.keys()
            if not taught:
                raise ConfigurationError(
                    f"stage {stage.name}: source {name}: expected targets for one of the losses "
                    f"{', '.join(stage.losses)}, got none; leave the source out"
                )
            met |= taught
        if unmet := stage.losses.keys() - met:
            raise ConfigurationError(
                f"stage {stage.name}: losses {', '.join(sorted(unmet))}: expected a source with targets for them, got "
                f"only {', '.join(stage.sources)}"
            )

    def check_gates(self, stage: StageConfig, board: SummaryWriter) -> None:
        """ConfigurationError if a figure misses its gate, so that no later stage builds on sand."""
        if not stage.gates:
            return
        with self.averaged():
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

    def save(self, progress: RunPosition) -> None:
        """Write a checkpoint in the first process; the others hold the same weights, or a shard each."""
        weights = self.whole_weights(self.trained if self.config.lora else None)
        heads = {} if self.heads is None else self.heads.state_dict()
        average = {} if self.average is None else {"ema": gather(self.average.averages, keep=self.rank == 0)}
        resume = gather(vars(progress), keep=self.rank == 0) | {"heads": heads} | average | self.lora_facts()
        if self.rank == 0:
            save_run(self.config.out, self.model, resume, weights)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it, the model has the weights to measure and to export: their moving average if there is one."""
        free_gathered(self.model)
        with nullcontext() if self.average is None else self.average.in_place():
            yield
            free_gathered(self.model)

    def whole_weights(self, names: Set[str] | None = None) -> dict[str, Tensor]:
        """The model's whole weights, all or those with these names, in the first process only; all must call this."""
        free_gathered(self.model)
        ours = {name: w for name, w in self.model.state_dict().items() if names is None or name in names}
        whole: dict[str, Tensor] = gather(ours, keep=self.rank == 0)
        return whole

    def lora_facts(self) -> dict[str, Any]:
        """What checkpoints that hold only adapters say about where they belong."""
        lora = self.config.lora
        return {} if lora is None else {"lora": lora.model_dump(mode="json"), "base": self.base}

    def load(self) -> RunPosition:
        """Load an earlier run's weights from the same folder; returns its progress, or the beginning if none.

        ConfigurationError if they are of another model, or one run has hints and the other has none.
        """
        folder = newest_checkpoint(self.config.out)
        if folder is None:
            return RunPosition()
        state, found = load_resume(folder), read_config(folder)
        heads, average = state.pop("heads"), state.pop("ema", None)
        ours = {} if self.heads is None else self.heads.state_dict()
        shapes = [{f"heads.{name}": tuple(x.shape) for name, x in given.items()} for given in (ours, heads)]
        facts = {name: state.pop(name) for name in ("lora", "base") if name in state}
        expected, got = vars(self.model.config) | shapes[0] | self.lora_facts(), vars(found) | shapes[1] | facts
        for name in expected | got:
            if expected.get(name) != got.get(name):
                raise ConfigurationError(
                    f"resume {folder}: {name}: expected {expected.get(name, 'none')}, as this configuration says, got "
                    f"{got.get(name, 'none')}; keep the model, the robot, the hints and the weights (start) that the "
                    "run began with, or name another folder under out"
                )
        ours_now = self.model.state_dict()
        saved = {n: tuple(w.shape) for n, w in ours_now.items() if self.config.lora is None or n in self.trained}
        load_whole(self.model, read_weights(folder, saved))
        if self.heads is not None:
            self.heads.load_state_dict(heads)
        if (average is None) != (self.average is None):
            raise ConfigurationError(
                f"resume {folder}: ema: expected {'none' if self.average is None else 'averages of the weights'}, as "
                f"this configuration says, got {'none' if average is None else 'some'}; keep ema as the run began"
            )
        if self.average is not None and average is not None:
            self.average.load(average)
        return RunPosition(**state)


@contextmanager
def open_log(folder: Path) -> Iterator[SummaryWriter]:
    """TensorBoard's writer; ConfigurationError if the log cannot be written.

    The file is written by a thread, which would print a traceback; its error comes up in whichever call is next.
    """
    failed: list[BaseException] = []
    print_traceback = threading.excepthook

    def note(thread: threading.ExceptHookArgs) -> None:
        if isinstance(thread.exc_value, OSError):
            failed.append(thread.exc_value)
        else:
            print_traceback(thread)

    threading.excepthook = note
    try:
        with SummaryWriter(str(folder)) as board:
            yield board
    except OSError as error:
        if not failed:
            raise
        raise ConfigurationError(
            f"{folder}: expected to write the log, got {failed[0]}; make room on the disk, and the same command goes "
            "on from the last checkpoint"
        ) from error
    finally:
        threading.excepthook = print_traceback


if __name__ == "__main__":
    from training.run import main  # the command builds a run and hands it to the loop above

    sys.exit(main())
