"""Kills a training run again and again: `python support/killed_training.py FOLDER PROCESSES KILLS [SEED]`.

The first run is not killed. Then runs in another folder, each going on where the one before was killed, are killed
KILLS times: at a random moment, or before a random operation of a save on files. Of several PROCESSES one dies so, and
then the others, as torchrun sees to. The last run comes through. Every loss that any of them
computed must be the whole run's, bit for bit, and so must all that the last checkpoint holds. Prints figures.

This process has no threads and trains nothing, so that its children can be forked.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh

from support.kills import die_at, die_within, on_operation
from support.models import make_model
from support.toy_training import toy_stage, toy_trainer
from training.config import ParallelConfig, StageConfig
from training.data import Batch
from training.parallel import join_group, shard

SAVING = ".checkpoint-"
Losses = dict[str, dict[str, str]]
"""By step and process, each loss in hexadecimal."""


def train(out: Path, note: Path, rank: int, processes: int) -> None:
    """Runs all stages; notes each step's losses as soon as they are known. Two short stages and a moving average."""
    stages = (toy_stage(steps=5), toy_stage(name="expert", steps=5, train=["expert"], losses={"flow": 1.0}))
    sharded = ParallelConfig(shard=processes > 1)
    model = make_model().train()
    if processes > 1:
        join_group()
        shard(model, sharded, init_device_mesh("cpu", (processes,)))
    trainer = toy_trainer(out, *stages, model=model, parallel=sharded, ema=0.9)
    trainer.rank = rank
    real = trainer.accumulate_gradients

    def noting(stage: StageConfig, batches: Sequence[Batch], rng: np.random.Generator) -> dict[str, float]:
        drawn = rng.bit_generator.state["state"]["state"]  # tells stage, step and process apart
        values = real(stage, batches, rng)
        with note.with_suffix(f".{rank}").open("a") as file:
            file.write(
                json.dumps([f"{stage.name} {drawn}", {name: value.hex() for name, value in values.items()}]) + "\n"
            )
        return values

    trainer.accumulate_gradients = noting  # type: ignore[method-assign]
    trainer.run()


def start(out: Path, note: Path, processes: int, doom: Callable[[], None], doomed: int) -> bool:
    """Whether the run was killed; RuntimeError if it failed by itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = {}
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            try:
                group = {"RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ |= {name: str(value) for name, value in group.items()} if processes > 1 else {}
                if rank == doomed:
                    doom()
                sys.stderr = open(note.with_suffix(".err"), "a")  # noqa: SIM115 (of a process that is killed)
                train(out, note, rank, processes)
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        children[child] = rank
    killed, failed = False, False
    while children:
        child, status = os.wait()
        rank = children.pop(child)
        if rank == doomed and os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGALRM):
            killed = True
            for other in children:
                os.kill(other, signal.SIGKILL)
        failed = failed or status != 0
    if failed and not killed:
        raise RuntimeError(note.with_suffix(".err").read_text()[-2000:])
    return killed


def losses(note: Path) -> Losses:
    """What all runs noted; AssertionError if two of them had other losses in the same step of the same process."""
    found: Losses = {}
    for file in note.parent.glob(f"{note.name}.[0-9]"):
        for line in file.read_text().splitlines():
            if not line.endswith("}]"):
                continue  # killed while it was written
            step, values = json.loads(line)
            assert found.setdefault(step, values) == values, (step, values, found[step])
    return found


def held(out: Path) -> dict[str, torch.Tensor]:
    last = max(out.glob("checkpoint-*"))
    return {f"{file.name} {name}": x for file in last.glob("*.safetensors") for name, x in load_file(file).items()}


def main() -> None:
    folder, processes, times = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    rng = random.Random(int(sys.argv[4]) if len(sys.argv) > 4 else 0)
    torch.set_num_threads(1)
    whole, killed = folder / "whole", folder / "killed"
    noted = os.open(folder / "operations", os.O_RDWR | os.O_CREAT)

    def count_operations() -> None:
        on_operation(lambda number: os.pwrite(noted, b"%6d" % number, 0), SAVING)

    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # loads what takes seconds
    began_s = time.monotonic()
    assert not start(whole, folder / "of_whole", processes, count_operations, 0)
    longest_s, most = time.monotonic() - began_s, int(os.pread(noted, 6, 0))
    saves = 0
    for number in range(times):
        if number % 2:
            doomed, doom = rng.randrange(processes), partial(die_within, rng.uniform(0.3, 1.0) * longest_s)
        else:
            doomed, doom = 0, partial(die_at, rng.randint(1, most), SAVING)
        start(killed, folder / "of_killed", processes, doom, doomed)
        saves += any(killed.glob(".checkpoint-*.part"))
    assert not start(killed, folder / "of_killed", processes, lambda: None, 0)
    one, two = losses(folder / "of_whole"), losses(folder / "of_killed")
    assert one == two, one.keys() ^ two.keys()
    one_held, two_held = held(whole), held(killed)
    assert one_held.keys() == two_held.keys() and all(torch.equal(one_held[name], two_held[name]) for name in one_held)
    print(json.dumps({"kills": times, "in_a_save": saves, "steps": len(one), "seconds": round(longest_s, 2)}))


if __name__ == "__main__":
    main()
