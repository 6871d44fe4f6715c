"""Kills a training run again and again: `python support/killed_training.py FOLDER PROCESSES KILLS [SEED]`.

The first run is not killed. Then runs in another folder, each going on where the one before was killed, are killed: at
a random moment, or before a random operation of a save on files. Of several PROCESSES one dies so, and then the others,
as torchrun sees to. Where a run comes through, it is begun again in another folder, until there were KILLS kills; the
last one comes through too. Every loss that any of them computed must be the whole run's, bit for bit. So must be, of
each that came through, all that the last checkpoint holds, its records, and the curves that TensorBoard shows: no step
twice, none missing. Prints figures.

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
from torch.distributed.tensor import DTensor
from torch.utils.tensorboard import SummaryWriter

from support.kills import die_at, die_within, on_operation
from support.models import make_model
from support.toy_training import curves, toy_stage, toy_trainer
from training import train as loop
from training.config import ParallelConfig, StageConfig
from training.data import Batch
from training.parallel import join_group, shard

SAVING = ".checkpoint-"
Losses = dict[str, dict[str, str]]
"""By step and process, each loss in hexadecimal."""


def train(out: Path, note: Path, rank: int, processes: int) -> None:
    """Runs all stages; notes each step's losses as soon as they are known. Two short stages and a moving average."""
    first = toy_stage(steps=5, evaluate_every=1)
    stages = (first, toy_stage(name="expert", steps=5, evaluate_every=1, train=["expert"], losses={"flow": 1.0}))
    sharded = ParallelConfig(shard=processes > 1)
    model = make_model().train()
    if processes > 1:
        join_group()
        shard(model, sharded, init_device_mesh("cpu", (processes,)))
    trainer = toy_trainer(out, *stages, model=model, parallel=sharded, ema=0.9)
    trainer.rank = rank
    loop.SummaryWriter = partial(SummaryWriter, flush_secs=0)  # type: ignore[misc] # a kill finds more than was saved
    trainer.figures = lambda driven: {"bias": float(whole(model.action_out.bias).sum())}
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


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def held(out: Path) -> dict[str, bytes]:
    """The tensors of the last checkpoint, and the records."""
    last = max(out.glob("checkpoint-*"))
    tensors = {f"{file.name} {name}": x for file in last.glob("*.safetensors") for name, x in load_file(file).items()}
    records = {file.name: file.read_bytes() for file in out.glob("*.jsonl")}
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()} | records


def main() -> None:
    folder, processes, times = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    rng = random.Random(int(sys.argv[4]) if len(sys.argv) > 4 else 0)
    torch.set_num_threads(1)
    noted = os.open(folder / "operations", os.O_RDWR | os.O_CREAT)

    def count_operations() -> None:
        on_operation(lambda number: os.pwrite(noted, b"%6d" % number, 0), SAVING)

    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # loads what takes seconds
    began_s = time.monotonic()
    assert not start(folder / "whole", folder / "of_whole", processes, count_operations, 0)
    longest_s, most = time.monotonic() - began_s, int(os.pread(noted, 6, 0))
    counts = {"kills": 0, "in_a_save": 0, "came_through": 0}
    while True:
        killed = folder / f"killed_{counts['came_through']}"
        saving = bool(rng.randrange(2))
        # A run that goes on has less before it: so that most of them are killed, in the first part of what is left.
        doomed, doom = rng.randrange(processes), partial(die_within, rng.uniform(0.1, 0.7) * longest_s)
        if counts["kills"] == times:
            doom = lambda: None  # noqa: E731
        elif saving:
            doomed, doom = 0, partial(die_at, rng.randint(1, most // 3), SAVING)
        if start(killed, folder / "of_killed", processes, doom, doomed):
            counts["kills"] += 1
            counts["in_a_save"] += saving or any(killed.glob(".checkpoint-*.part"))
            continue
        counts["came_through"] += 1
        one, two = held(folder / "whole"), held(killed)
        assert one == two, [name for name in one.keys() | two.keys() if one.get(name) != two.get(name)]
        shown, expected = curves(killed), curves(folder / "whole")
        assert shown == expected, (shown, expected)
        if counts["kills"] == times:
            break
    one_losses, two_losses = losses(folder / "of_whole"), losses(folder / "of_killed")
    assert one_losses == two_losses, one_losses.keys() ^ two_losses.keys()
    print(json.dumps(counts | {"steps": len(one_losses), "seconds": round(longest_s, 2)}))


if __name__ == "__main__":
    main()
