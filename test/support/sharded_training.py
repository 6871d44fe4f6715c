"""What test_sharding.py runs in every process of a group: `torchrun ... support/sharded_training.py SETTINGS.json`."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from training.config import StageConfig, TrainingConfig
from training.data import Batch
from training.evaluate import offline
from training.optimizer import clip_gradients, load_optimizer, make_optimizer, optimizer_tensors, select_parameters
from training.parallel.group import average_gradients, wait_for_all
from training.parallel.sharding import gather
from training.run import Run
from training.weights.checkpoints import load_checkpoint

CHECKPOINTED = {"shard": True, "activation_checkpointing": True}
OFFLOADED = {"shard": True, "cpu_offload": True, "activation_checkpointing": True, "dtype": "bfloat16"}


def configure(settings: dict[str, Any], parallel: dict[str, Any], **changes: Any) -> TrainingConfig:
    return TrainingConfig.model_validate(settings | {"parallel": parallel} | changes)


def adapted_run(settings: dict[str, Any], out: Path, parallel: dict[str, Any]) -> TrainingConfig:
    """A stage with LoRA, with a checkpoint after each of its four steps."""
    stage = settings["stages"][3] | {"steps": 4, "checkpoint_every": 1, "train": ["backbone", "expert"]}
    stage |= {"losses": {"fast": 1.0, "flow": 1.0}}
    lora = {"parts": ["backbone", "expert"], "rank": 2, "alpha": 4}
    return configure(settings, parallel, stages=[stage], out=out, lora=lora)


def opened(config: TrainingConfig) -> Run:
    """A run whose expert reads the prefix: the gates of its branches, which start closed, are opened."""
    run = Run(config)
    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            if name.endswith("dense.bias"):
                parameter.fill_(0.5)
    return run


def named(run: Run) -> dict[str, nn.Parameter]:
    assert run.heads is not None
    return dict([*run.model.named_parameters(), *run.heads.named_parameters(prefix="heads")])


def gradients(run: Run) -> dict[str, torch.Tensor | None]:
    found = {name: parameter.grad for name, parameter in named(run).items()}
    whole: dict[str, torch.Tensor | None] = gather(found, keep=True)
    return {name: None if gradient is None else gradient.clone() for name, gradient in whole.items()}


def draw(run: Run, stage: StageConfig) -> list[Batch]:
    return run.trainer.draw(0, stage, 0)


def draw_without_places(run: Run, stage: StageConfig) -> list[Batch]:
    """No sample of the second process has a place to point at."""
    lacking: dict[str, Any] = {"place_B2": None, "target_cell_B": None} if run.rank else {}
    return [dataclasses.replace(batch, **lacking) for batch in draw(run, stage)]


def draw_of_two_kinds(run: Run, stage: StageConfig) -> list[Batch]:
    """The first process drew questions, and the second cells to be named."""
    return run.trainer.draw(0, stage.model_copy(update={"sources": {"views" if run.rank else "scenes": 2}}), 0)


def gradients_of(
    run: Run, stage: StageConfig, draw: Callable[[Run, StageConfig], list[Batch]] = draw
) -> tuple[dict[str, torch.Tensor | None], torch.Tensor]:
    """The gradients of all the stage's losses, and their norm as clipping reports it."""
    parameters = select_parameters(run.model, run.heads, stage.train).values()
    run.trainer.accumulate_gradients(stage, draw(run, stage), np.random.default_rng([1, run.rank]))
    average_gradients(parameters)
    found = gradients(run)
    return found, clip_gradients(parameters, 1.0)


def check_gradients(plain: Run, sharded: Run, stages: Sequence[int] = (0, 1, 2, 3)) -> None:
    """In these stages the weights are shards, with the gradients and the norm of the unsharded model.

    So they are where what the processes drew teaches different things.
    """
    assert sum(isinstance(parameter, DTensor) for parameter in sharded.model.parameters()) > 0
    everything = plain.config.stages[2].model_copy(update={"losses": {"text": 1.0, "cells": 1.0, "pointing": 1.0}})
    cases = [(plain.config.stages[n], draw) for n in stages]
    cases += [(plain.config.stages[2], draw_without_places), (everything, draw_of_two_kinds)]
    for stage, drawing in cases:
        expected, norm = gradients_of(plain, stage, drawing)
        got, sharded_norm = gradients_of(sharded, stage, drawing)
        torch.testing.assert_close(sharded_norm, norm)
        assert expected.keys() == got.keys()
        for name, gradient in expected.items():
            assert (gradient is None) == (got[name] is None), (stage.name, name)
            if gradient is not None:
                torch.testing.assert_close(got[name], gradient, atol=1e-6, rtol=1e-4, msg=lambda m: f"{name}: {m}")  # noqa: B023
        for run in (plain, sharded):
            for parameter in named(run).values():
                parameter.grad = None


def check_bfloat16(plain: Run, rounded: Run) -> None:
    """Gradients are float32 shards in host memory and point where the exact ones do."""
    stage = plain.config.stages[2]
    expected, _ = gradients_of(plain, stage)
    got, _ = gradients_of(rounded, stage)
    for part in ("vision", "backbone", "expert", "heads"):
        names = [name for name, gradient in expected.items() if name.startswith(part) and gradient is not None]
        one, two = (torch.cat([grads[name].flatten() for name in names]) for grads in (expected, got))
        assert two.dtype == torch.float32 and not torch.equal(one, two)
        assert torch.cosine_similarity(one, two, dim=0) > 0.98, part


def check_insulation(run: Run) -> None:
    for insulate in (True, False):
        stage = run.config.stages[3].model_copy(update={"insulate": insulate})
        select_parameters(run.model, run.heads, ("vision", "backbone", "expert"))
        rng = np.random.default_rng(run.rank)
        batch = run.data.training["robot"].draw(2, rng)
        [whole] = run.trainer.losses.split(batch, stage, rng)
        run.trainer.losses.joint(whole, stage)["flow"].backward()
        nonzero = {name for name, g in gradients(run).items() if g is not None and g.count_nonzero()}
        knowledge = {name for name in nonzero if name.startswith(("vision", "projector", "backbone"))}
        assert "expert.layers.0.mlp.up.weight" in nonzero and bool(knowledge) != insulate, knowledge
        for parameter in named(run).values():
            parameter.grad = None


Losses = list[dict[str, float]]


def stopped(config: TrainingConfig, step: int) -> Losses:
    """Runs until it is interrupted in this step, counted from where it begins; the losses of the steps before."""
    run, seen = Run(config), Losses()
    real = run.trainer.accumulate_gradients

    def noting(*given: Any) -> dict[str, float]:
        if len(seen) == step:
            raise KeyboardInterrupt
        seen.append(real(*given))
        return seen[-1]

    run.trainer.accumulate_gradients = noting  # type: ignore[method-assign]
    try:
        run.run()
    except KeyboardInterrupt:
        wait_for_all()
    return seen


def check_loaded(config: TrainingConfig, step: int) -> None:
    """Weights, average and the optimizer's state are those of the checkpoint's files, bit for bit."""
    run = Run(config)
    state, saved = run.trainer.load()
    assert saved is not None and (state.stage, state.step) == (0, step)
    parameters = run.trainer.choose(config.stages[0])
    optimizer = make_optimizer(parameters, config.stages[0])
    load_optimizer(optimizer, parameters, saved)
    ours: dict[str, torch.Tensor] = gather(run.trainer.tensors() | optimizer_tensors(optimizer, parameters), keep=True)
    assert ours.keys() == saved.shapes.keys() and any(name.startswith("optimizer.exp_avg.") for name in ours)
    theirs = {name: torch.empty_like(tensor) for name, tensor in ours.items()}
    saved.load(theirs)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def check_resuming(settings: dict[str, Any], out: Path) -> None:
    """A run that stops in its fourth step goes on to the weights of one that does not; both end in a policy.

    The policy has the weights' moving average, which is sharded too. Whole where it was sharded, or the other way
    round, it goes on to the same losses, to rounding.
    """
    stages = [stage | {"steps": 4, "checkpoint_every": 2} for stage in settings["stages"][2:]]
    whole = configure(settings, CHECKPOINTED, stages=stages, out=out / "whole", ema=0.9)
    expected = stopped(whole, 100)
    config = configure(settings, CHECKPOINTED, stages=stages, out=out / "broken", ema=0.9)
    assert stopped(config, 3) == expected[:3]
    check_loaded(config, 2)
    resumed = Run(config)
    resumed.run()
    assert resumed.trainer.average is not None
    assert sum(isinstance(average, DTensor) for average in resumed.trainer.average.averages.values()) > 0
    one, two = (load_checkpoint(folder / "policy").state_dict() for folder in (whole.out, config.out))
    assert all(torch.equal(one[name], two[name]) for name in one)
    for first, then in (({}, CHECKPOINTED), (CHECKPOINTED, {})):
        before, after = (
            configure(settings, parallel, stages=stages[:1], out=out / f"other_{len(first)}", ema=0.9)
            for parallel in (first, then)
        )
        found = stopped(before, 3)
        check_loaded(after, 2)
        found[2:] = stopped(after, 100)
        for ours, theirs in zip(found, expected[:4], strict=True):
            assert ours.keys() == theirs.keys()
            for name, value in ours.items():
                assert math.isclose(value, theirs[name], rel_tol=1e-3), (first, name, value, theirs[name])


def check_adapted(settings: dict[str, Any], out: Path) -> None:
    """With LoRA and in bfloat16: what one process began goes on in these, sharded, and later in one again."""
    config = adapted_run(settings, out, {"dtype": "bfloat16", **CHECKPOINTED})
    check_loaded(config, 1)
    run = Run(config)
    factors = {name: p for name, p in run.model.named_parameters() if ".lora_" in name}
    assert factors and all(isinstance(p, DTensor) and p.dtype == torch.float32 for p in factors.values())
    assert len(stopped(config, 1)) == 1


def main() -> None:
    offline.FRAMES = 4
    settings = json.loads(Path(sys.argv[1]).read_text())
    out = Path(settings["out"])
    plain = opened(configure(settings, {}))
    check_gradients(plain, opened(configure(settings, {"shard": True})))
    sharded = opened(configure(settings, CHECKPOINTED))
    check_gradients(plain, sharded, [2])
    check_insulation(sharded)
    check_bfloat16(plain, opened(configure(settings, OFFLOADED)))
    check_resuming(settings, out)
    check_adapted(settings, out / "adapted")
    dist.destroy_process_group()
    (out / f"{plain.rank}.passed").touch()


if __name__ == "__main__":
    main()
