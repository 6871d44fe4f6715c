"""Data parallelism over processes: `torchrun --nproc-per-node N -m training.train ...`. One process alone needs nothing
of it.

Each process draws its own samples; gradients are averaged, so N processes are one with an N times larger batch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from ki_vla_ros.errors import ConfigurationError


def choose_device(kind: str) -> torch.device:
    """This process's: with "cuda" the card of its number on this machine. ConfigurationError where there is none."""
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
    """(rank, number of processes); connects to the others when torchrun started this process.

    With `alone` one process needs no group; sharding does, even of one.
    """
    if not alone and "WORLD_SIZE" not in os.environ:
        raise ConfigurationError("parallel.shard: expected a process started by torchrun (one is enough), got another")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if (size > 1 or not alone) and not dist.is_initialized():
        # Rank 0 alone simulates data and measures figures while the others wait for it.
        dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl", timeout=timedelta(hours=2))
    return (dist.get_rank(), size) if dist.is_initialized() else (0, 1)


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes, in one message.

    A parameter without gradient stays so everywhere.
    """
    if not dist.is_initialized():
        return
    # A sharded parameter's gradient is averaged by the backward pass.
    gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    offset = 0
    for gradient in gradients:
        gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
        offset += gradient.numel()
