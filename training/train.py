"""The stage loop: which batches, which losses, which parameters, for how many steps, and what a run resumes from.

    python -m training.train config/training/demo.yaml

Knowledge insulation (arXiv 2505.23705): the backbone learns from cross-entropies only (answers, FAST action tokens),
the action expert learns flow matching and reads the backbone's keys and values through a stop-gradient. So the expert
never affects the backbone, and the same code can train both at once, or one after the other at less cost, as the
configuration says. A run that stops resumes at its last checkpoint, to the same losses bit by bit: what a step draws
depends only on seed, stage, step and process.

Nothing is built here: `training.run` makes data, robots and model from the configuration.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ki_vla_ros.errors import ConfigurationError
from training.config import Loss, StageConfig, TrainingConfig
from training.data import Batch, Loader, Source
from training.ema import MovingAverage
from training.evaluate import is_driven
from training.losses import BatchLosses, TrainingHeads, count_tokens, targets
from training.model import VLA
from training.optimizer import (
    Parameters,
    clip_gradients,
    load_optimizer,
    make_optimizer,
    optimizer_tensors,
    part_norms,
    peaks,
    select_parameters,
    set_learning_rates,
)
from training.parallel import average_gradients, free_gathered, from_first, gather, mean_of_processes
from training.record import Record
from training.weights import PieceReader, RunState, check_same, newest_checkpoint, open_run, save_run

# What may be changed in the middle of a run, beside where data are, and a stage's steps and rates.
FREE = {
    "name",
    "made_by",
    "recipe",
    "out",
    "keep",
    "threads",
    "workers",
    "cache_gb",
    "parallel",
    "held_out",
    "flow_steps",
    "sampler",
    "environment",
}
NO_FIGURES = "no figures, as no data is held out (held_out, or held_out_share of datasets of five and more episodes)"
LEARNT_FROM = {"name", "losses", "train", "freeze", "sources", "insulate", "noise_samples"}
RECORDS = ("figures", "losses")


class Trainer:
    """Trains a model by its stages.

    `figures` measures it (if sharded, in all processes), in closed loop too if told so, and `show` makes a page of
    what `figures` found and of the two records. `made_of` says, by name, what a checkpoint must be of to be resumed,
    beside the configuration.
    """

    def __init__(
        self,
        config: TrainingConfig,
        model: VLA,
        heads: TrainingHeads | None,
        sources: Mapping[str, Source],
        losses: BatchLosses,
        figures: Callable[[bool], dict[str, float]],
        rank: int = 0,
        made_of: Mapping[str, Any] | None = None,
        show: Callable[[], object] = lambda: None,
    ) -> None:
        self.config, self.model, self.heads = config, model, heads
        self.sources, self.losses, self.figures, self.rank = sources, losses, figures, rank
        self.show = show
        names = [stage.name for stage in config.stages]
        self.figure_record, self.loss_record = (Record(config.out / f"{what}.jsonl", names) for what in RECORDS)
        every, first = dict[str, Parameter](), dict[str, int]()
        for index, stage in enumerate(config.stages):
            chosen = self.choose(stage)
            every |= chosen
            first = dict.fromkeys(chosen, sum(before.steps for before in config.stages[:index])) | first
        self.trained, self.made_of = frozenset(every), made_of or {}
        self.average = None if config.ema is None else MovingAverage(every, config.ema, first)
        # A sharded model's forward pass takes all processes.
        self.measures = rank == 0 or config.parallel.shard

    def run(self, before: Callable[[], object] = lambda: None) -> RunState:
        """Run all stages, from the last checkpoint if there is one; `before` is called before the first step."""
        for stage in self.config.stages:
            self.check_sources(stage)
            peaks(self.choose(stage), stage)
        self.config.out.mkdir(parents=True, exist_ok=True)
        progress, saved = self.load()
        before()
        if self.rank == 0:
            for record in (self.figure_record, self.loss_record):
                record.rewind(progress.stage, progress.step)
        with open_log(self.config.out / "tensorboard" / f"rank{self.rank}", self.count_steps(progress)) as board:
            for index, stage in enumerate(self.config.stages[progress.stage :], start=progress.stage):
                progress = self.run_stage(index, stage, progress, board, saved if progress.step else None)
                if self.measures:
                    self.evaluate(index, stage, stage.steps, board)
                # Only now: a run that missed its gate must meet it again when it is resumed.
                self.save(progress, board)
        return progress

    def count_steps(self, at: RunState) -> int:
        """All steps before this one: TensorBoard's steps, which a resumed run continues."""
        return sum(stage.steps for stage in self.config.stages[: at.stage]) + at.step

    def run_stage(
        self, index: int, stage: StageConfig, progress: RunState, board: SummaryWriter, saved: PieceReader | None = None
    ) -> RunState:
        """Take gradient steps from `progress.step` to the stage's last; returns the beginning of the next stage.

        `saved` is the checkpoint with the optimizer's state, of a stage that is resumed.
        """
        began_s, before = time.monotonic(), progress.minutes

        def at(index: int, step: int = 0) -> RunState:
            minutes = before.get(stage.name, 0.0) + (time.monotonic() - began_s) / 60
            return RunState(stage=index, step=step, minutes=before | {stage.name: minutes})

        parameters = self.choose(stage)
        optimizer = make_optimizer(parameters, stage)
        if saved is not None:
            load_optimizer(optimizer, parameters, saved)
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
                self.average.update(self.count_steps(at(index, step)))
            if step % 20 == 0:
                bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()})
                for name, value in values.items():
                    board.add_scalar(f"{stage.name}/{name}", value, self.count_steps(at(index, step)))
                if self.rank == 0:
                    self.loss_record.add(stage.name, step + 1, values)
            if self.measures and self.evaluates_after(stage, step + 1):
                self.evaluate(index, stage, step + 1, board)
            if (step + 1) % stage.checkpoint_every == 0 and step + 1 < stage.steps:
                self.save(at(index, step + 1), board, optimizer_tensors(optimizer, parameters))
        return at(index + 1)

    def choose(self, stage: StageConfig) -> Parameters:
        """The parameters that the stage trains, by name; gradients are computed for these alone."""
        return select_parameters(self.model, self.heads, stage.train, stage.freeze, f"stage {stage.name}: train")

    def draw(self, index: int, stage: StageConfig, step: int) -> list[Batch]:
        """A batch from each source. Seed, stage, step and process decide it: a resumed run gets the same."""
        batches = []
        for number, (name, count) in enumerate(stage.sources.items()):
            rng = np.random.default_rng([self.config.seed, index, step, self.rank, number])
            batches.append(self.sources[name].draw(count, rng, stage.learns_action_tokens))
        return batches

    def accumulate_gradients(
        self, stage: StageConfig, batches: Sequence[Batch], rng: np.random.Generator
    ) -> dict[str, float]:
        """A backward pass for each piece of each source's batch; the losses by name, summed over the sources."""
        values: dict[str, float] = {}
        device = next(self.model.parameters()).device
        # The one cross-entropy is a mean over all of the step's tokens; every other loss is one over a source's batch.
        tokens = mean_of_processes(float(sum(map(count_tokens, batches)))) if "tokens" in stage.losses else None
        for piece in chain.from_iterable(self.losses.split(batch, stage, rng, tokens) for batch in batches):
            with self.precision():
                found = self.losses(piece.to(device), stage)
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

    def evaluates_after(self, stage: StageConfig, step: int) -> bool:
        """Whether so many steps of the stage are followed by figures; its last one always is."""
        every = stage.evaluate_every is not None and step % stage.evaluate_every == 0
        return step < stage.steps and (every or step in stage.gates_at or self.drives_after(stage, step))

    def drives_after(self, stage: StageConfig, step: int) -> bool:
        """Whether these figures are also of the closed loop."""
        environment = self.config.environment
        if environment is None:
            return False
        every = environment.every is not None and step % environment.every == 0
        return every or step == stage.steps or any(map(is_driven, stage.gates_at.get(step, {})))

    def evaluate(self, index: int, stage: StageConfig, step: int, board: SummaryWriter) -> None:
        """Figures after so many steps; ConfigurationError if one misses its gate, so that nothing is built on sand."""
        with self.averaged():
            found = self.figures(self.drives_after(stage, step))
        known = {name: value for name, value in found.items() if not math.isnan(value)}
        if self.rank == 0:
            self.figure_record.add(stage.name, step, known)
            whole = ", ".join(f"{name} {value:.3f}" for name, value in known.items() if "_error." not in name)
            print(f"{stage.name}, step {step}: {whole or NO_FIGURES}", flush=True)
            for name, value in known.items():
                board.add_scalar(f"figures/{name}", value, self.count_steps(RunState(stage=index, step=step)) - 1)
            self.show()
        gates = [*stage.gates_at.get(step, {}).items(), *(stage.gates.items() if step == stage.steps else ())]
        missed = [(name, gate) for name, gate in gates if not gate.met(found.get(name, math.nan))]
        if missed:
            told = ", ".join(f"{name} {gate}, got {found.get(name, math.nan):.3g}" for name, gate in missed)
            raise ConfigurationError(
                f"stage {stage.name}, step {step}: expected {told}; look at {self.config.out}/report/index.html, and "
                "train longer (steps) or otherwise (docs/training.md, Figures and pages)"
            )

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint keeps beside the optimizer's state, `STATE.NAME`, as it is: sharded, or whole."""
        free_gathered(self.model)
        weights = self.model.state_dict()
        if self.config.lora is not None:  # the others are where the run began
            weights = {name: tensor for name, tensor in weights.items() if name in self.trained}
        states = {
            "model": weights,
            "heads": {} if self.heads is None else self.heads.state_dict(),
            "ema": {} if self.average is None else self.average.averages,
        }
        return {f"{state}.{name}": tensor for state, given in states.items() for name, tensor in given.items()}

    def save(self, progress: RunState, board: SummaryWriter, optimizer: Mapping[str, Tensor] | None = None) -> None:
        """Write a checkpoint; every process must call this, and writes its share."""
        board.flush()  # a resumed run writes the steps after this one again, and none before it
        state = progress.model_copy(update={"made_of": self.identity(progress)})
        save_run(
            self.config.out, state, {**self.tensors(), **(optimizer or {})}, self.config.keep, first=self.rank == 0
        )

    def load(self) -> tuple[RunState, PieceReader | None]:
        """Load an earlier run's weights from the same folder; returns its state, and its checkpoint if there is one.

        ConfigurationError if it is of another model, robot or recipe.
        """
        folder = from_first(lambda: newest_checkpoint(self.config.out))
        if folder is None:
            return RunState(), None
        state, saved = open_run(folder)
        ours = self.tensors()
        theirs = {name: list(shape) for name, shape in saved.shapes.items() if not name.startswith("optimizer.")}
        shapes = {name: list(tensor.shape) for name, tensor in ours.items()}
        begun = {name: value for name, value in state.made_of.items() if name.partition(".")[0] not in FREE}
        check_same(folder, self.identity(state), begun)  # an earlier version may have noted more
        check_same(folder, shapes, theirs)
        saved.load(ours)
        return state, saved

    def identity(self, at: RunState) -> dict[str, Any]:
        """What a run must go on with from here, by dotted name."""
        robots: Any = {"__all__": {"__all__": {"robot"}}}  # by their content: a file may have moved
        excluded: Any = {name: True for name in (*FREE, "robot", "stages")} | {"sources": robots}
        recipe = self.config.model_dump(exclude=excluded, exclude_none=True)
        stages = {
            str(index): stage.model_dump(include=LEARNT_FROM if index == at.stage else {"name"})
            for index, stage in enumerate(self.config.stages)
            if index < at.stage or (index == at.stage and at.step > 0)
        }
        return flatten(recipe | {"stages": stages, "model": asdict(self.model.config), **self.made_of})

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it, the model has the weights to measure and to export: their moving average if there is one."""
        free_gathered(self.model)
        with nullcontext() if self.average is None else self.average.in_place():
            yield
            free_gathered(self.model)

    def whole_weights(self) -> dict[str, Tensor]:
        """The model's whole weights, in the first process only; every process must call this."""
        free_gathered(self.model)
        whole: dict[str, Tensor] = gather(self.model.state_dict(), keep=self.rank == 0)
        return whole


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """Nested values by dotted name; of a path, only what it is called."""
    if isinstance(value, Mapping):
        inner: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, (list, tuple)):
        inner = enumerate(value)
    else:
        return {name: value.name if isinstance(value, Path) else value}
    return {key: x for k, v in inner for key, x in flatten(v, f"{name}.{k}" if name else str(k)).items()}


@contextmanager
def open_log(folder: Path, begins_at: int) -> Iterator[SummaryWriter]:
    """TensorBoard's writer; ConfigurationError if the log cannot be written.

    Steps from `begins_at` on that a run logged before it was stopped do not count.
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
        with SummaryWriter(str(folder), purge_step=begins_at) as board:
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
