"""What test_sharding.py runs in every process of a group: `torchrun ... support/sharded_training.py SETTINGS.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from training.config import StageConfig, TrainingConfig
from training.evaluate import offline
from training.optimizer import clip_gradients, select_parameters
from training.parallel.group import average_gradients
from training.parallel.sharding import gather
from training.run import Run
from training.weights.checkpoints import load_checkpoint

offline.FRAMES = 4
CHECKPOINTED = {"shard": True, "activation_checkpointing": True}
OFFLOADED = {"shard": True, "cpu_offload": True, "activation_checkpointing": True, "dtype": "bfloat16"}


def configure(settings: dict[str, Any], parallel: dict[str, Any], **changes: Any) -> TrainingConfig:
    return TrainingConfig.model_validate(settings | {"parallel": parallel} | changes)


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


def gradients_of(run: Run, stage: StageConfig) -> tuple[dict[str, torch.Tensor | None], torch.Tensor]:
    """The gradients of all the stage's losses, and their norm as clipping reports it."""
    parameters = select_parameters(run.model, run.heads, stage.train).values()
    run.trainer.accumulate_gradients(stage, run.trainer.draw(0, stage, 0), np.random.default_rng([1, run.rank]))
    average_gradients(parameters)
    found = gradients(run)
    return found, clip_gradients(parameters, 1.0)


def check_gradients(plain: Run, sharded: Run) -> None:
    """In all stages the weights are shards, with the gradients and the norm of the unsharded model."""
    assert sum(isinstance(parameter, DTensor) for parameter in sharded.model.parameters()) > 0
    for stage in plain.config.stages:
        expected, norm = gradients_of(plain, stage)
        got, sharded_norm = gradients_of(sharded, stage)
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


def check_resuming(settings: dict[str, Any], out: Path) -> None:
    """A run that stops in its third of four steps goes on to the weights of one that does not; both end in a policy.

    The policy has the weights' moving average, which is sharded too.
    """
    stages = [stage | {"steps": 4, "checkpoint_every": 2} for stage in settings["stages"][2:]]
    whole = configure(settings, CHECKPOINTED, stages=stages, out=out / "whole", ema=0.9)
    Run(whole).run()
    config = configure(settings, CHECKPOINTED, stages=stages, out=out / "broken", ema=0.9)
    broken = Run(config)
    real, calls = broken.trainer.accumulate_gradients, iter(range(100))

    def stop(*step: Any) -> dict[str, float]:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return real(*step)

    broken.trainer.accumulate_gradients = stop  # type: ignore[method-assign]
    try:
        broken.run()
    except KeyboardInterrupt:
        dist.barrier()
    resumed = Run(config)
    assert resumed.trainer.load()[0].step == 2
    resumed.run()
    assert resumed.trainer.average is not None
    assert sum(isinstance(average, DTensor) for average in resumed.trainer.average.averages.values()) > 0
    one, two = (load_checkpoint(folder / "policy").state_dict() for folder in (whole.out, config.out))
    assert all(torch.equal(one[name], two[name]) for name in one)


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    out = Path(settings["out"])
    plain = opened(configure(settings, {}))
    check_gradients(plain, opened(configure(settings, {"shard": True})))
    sharded = opened(configure(settings, CHECKPOINTED))
    check_gradients(plain, sharded)
    check_insulation(sharded)
    check_bfloat16(plain, opened(configure(settings, OFFLOADED)))
    check_resuming(settings, out)
    dist.destroy_process_group()
    (out / f"{plain.rank}.passed").touch()


if __name__ == "__main__":
    main()
