"""Data parallelism over processes: `torchrun --nproc-per-node N -m training.train ...`.

Each process draws its own samples; gradients are averaged, so N processes equal one with an N times larger batch. A
single process needs none of this.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from ki_vla_ros.errors import ConfigurationError

T = TypeVar("T")


def choose_device(kind: str) -> torch.device:
    """This process's device: with "cuda", the card of its number on this machine; ConfigurationError if none."""
    if kind == "cpu":
        return torch.device("cpu")
    index, cards = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if index >= cards:
        raise ConfigurationError(
            f"parallel.device: expected a usable NVIDIA card {index}, got torch {torch.__version__} that sees {cards}; "
            "start as many processes as there are cards, with a torch built for CUDA, or set device to cpu"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def join_group(alone: bool = True, device: str = "cpu") -> tuple[int, int]:
    """Rank and number of processes; connects to the others if torchrun started this process.

    With `alone`, a single process forms no group; sharding needs one, even of a single process.
    """
    if not alone and "WORLD_SIZE" not in os.environ:
        raise ConfigurationError(
            "parallel.shard: expected a process started by torchrun, got another; torchrun with one process is enough"
        )
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if (size > 1 or not alone) and not dist.is_initialized():
        # Rank 0 alone simulates data and measures figures while the others wait for it.
        dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl", timeout=timedelta(hours=2))
    return (dist.get_rank(), size) if dist.is_initialized() else (0, 1)


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


def from_first(work: Callable[[], T]) -> T:
    """What `work` gives in the first process, in all of them; so is its ConfigurationError."""
    if not dist.is_initialized():
        return work()
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            answer = [work()]
        except ConfigurationError as error:
            answer = [error]
    dist.broadcast_object_list(answer)
    if isinstance(answer[0], ConfigurationError):
        raise answer[0]
    found: T = answer[0]
    return found


def in_any_process(*flags: bool) -> list[bool]:
    """For each flag, whether one process has it set; every process must call this."""
    if not dist.is_initialized():
        return list(flags)
    found = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return [bool(flag) for flag in found]


def mean_of_processes(value: float) -> float:
    """Every process must call this."""
    if not dist.is_initialized():
        return value
    found = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(found)
    return float(found) / dist.get_world_size()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes, in one message.

    A process whose samples gave a parameter no gradient counts as zero; where no process has one, it stays without.
    """
    if not dist.is_initialized():
        return
    # The backward pass averages a sharded parameter's gradient.
    whole = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
    if not whole:
        return
    has = torch.tensor([float(parameter.grad is not None) for parameter in whole], device=whole[0].device)
    dist.all_reduce(has)
    for parameter, count in zip(whole, has.tolist(), strict=True):
        if count and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in whole if parameter.grad is not None]
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    offset = 0
    for gradient in gradients:
        gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
        offset += gradient.numel()
