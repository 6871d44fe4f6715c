"""FSDP2 (`torch.distributed.fsdp.fully_shard`): parameters, gradients and optimizer state divided over the processes.

    each layer      gathered before it runs, freed after it, gathered again for its backward pass
    root            everything outside the layers (token table, stem, norms, time and action maps), one unit; gathered
                    in the forward pass and kept until the backward pass has ended

The root's lifetime is what lets losses use the token table (tied with the output head) and the final norm after the
forward pass. Each process holds a float32 shard of every weight; layers compute in `dtype`, gradients are averaged in
float32.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from training.config import ParallelConfig
from training.model import VLA, VisionLayer


def layers(model: VLA) -> Iterator[nn.Module]:
    """The units that are gathered, computed and checkpointed one at a time."""
    yield from model.vision.layers
    yield from model.backbone.layers
    yield from model.expert.layers


def checkpoint_activations(model: VLA) -> None:
    """Keep only each layer's inputs for the backward pass, which computes the rest again.

    The method is replaced on the instance, inside FSDP's hooks: no module changes its name, and the second computation
    finds the weights that FSDP has gathered for the backward pass.
    """
    for layer in layers(model):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def shard(model: VLA, config: ParallelConfig, mesh: DeviceMesh) -> None:
    """Shard the model in place over a one-dimensional mesh; its parameters are DTensors from here on.

    Entry points other than `forward` get FSDP's hooks too, because they read weights: `prefill`, `velocity`,
    `read_on` and `stem_features` of the model, `keys_values`, `read_on` and `scores` of the backbone's layers.
    """
    # Keys and values are transposed views; nothing writes to them in place, which is what torch warns of.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
    dtype = getattr(torch, config.dtype)
    mixed = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    policy: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": mixed,
        # Only with pinned memory do copies to a GPU overlap with computation.
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu")
        if config.cpu_offload
        else OffloadPolicy(),
    }
    # Vision casts its activations to the type of a layer's weights, which are float32 until the layer gathers them.
    seeing = policy | {"mp_policy": dataclasses.replace(mixed, cast_forward_inputs=True)}
    for layer in layers(model):
        fully_shard(layer, **(seeing if isinstance(layer, VisionLayer) else policy))
    fully_shard(model, **policy)
    for layer in model.backbone.layers:
        for method in ("keys_values", "read_on", "scores"):
            register_fsdp_forward_method(layer, method)
    for method in ("prefill", "velocity", "read_on", "stem_features"):
        register_fsdp_forward_method(model, method)


def free_gathered(model: nn.Module) -> None:
    """Free what a forward pass without a backward pass left gathered, so that `parameters()` are shards again."""
    if isinstance(model, FSDPModule):
        model.reshard()


def gather(value: Any, keep: bool) -> Any:
    """The same nested state with whole tensors in host memory if `keep`, else None, in place of shards.

    Every process must call it at the same point, because gathering a tensor takes all of them.
    """
    if isinstance(value, DTensor):
        whole = value.full_tensor()
        return whole.cpu() if keep else None
    if isinstance(value, Mapping):
        return {key: gather(item, keep) for key, item in value.items()}
    return value
