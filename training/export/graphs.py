"""The two graphs of a bundle, as modules made from a trained model: what runs on the robot, and nothing else.

They compute what `VLA.prefill` and `VLA.velocity` compute, arranged for speed: one matrix for queries, keys and values,
one for gate and up, and the flow time as a `modulation` that the robot looks up (ki_vla_ros/bundle/time_table.py).

Legend: V cameras, S image size, L prompt tokens, P prefix length, N layers, K kv heads, D head dim, H horizon,
A action dim, M modulation, W width, Q query heads.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ki_vla_ros.bundle import GraphSpec, PolicySpec
from training.model import (
    MLP,
    VLA,
    AdaRMSNorm,
    Cache,
    Expert,
    LayerNorm,
    Projections,
    RMSNorm,
    Rotation,
    VisionLayer,
    rotate,
    time_periods,
)

GraphInputs = dict[str, Tensor]
"""A graph's inputs by the names of the bundle's interface."""


class PrefillGraph(nn.Module):
    """The prefix of one observation, without a batch axis; inputs are named as in the bundle's interface."""

    def __init__(self, model: VLA) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, images: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        cache = self.model.prefill(images[None], image_mask[None], tokens[None], token_mask[None])
        return cache.keys_NBKPD[:, 0], cache.values_NBKPD[:, 0], cache.mask_BP[0]


class ExpertGraph(nn.Module):
    """One expert step on the cached prefix, without a batch axis like `PrefillGraph`."""

    def __init__(self, model: VLA) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        keys: Tensor,
        values: Tensor,
        prefix_mask: Tensor,
        x_t: Tensor,
        modulation: Tensor,
        clean: Tensor,
        step: Tensor,
        state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        cache = Cache(keys[:, None], values[:, None], prefix_mask[None])
        time = StepTime(modulation, clean)
        velocity = self.model.velocity(
            cache,
            x_t[None],
            time,  # type: ignore[arg-type]  # what the expert of this model, a `LookedUpExpert`, takes
            None if state is None else state[None],
        )[0]
        return velocity, torch.where(clean[:, None], x_t, x_t - step * velocity)


class StepTime(NamedTuple):
    """The graph's stand-in for the time of each action: one modulation [M], and which actions [H] have time 0."""

    modulation: Tensor
    clean: Tensor


class LookedUpExpert(Expert):
    """The expert without the layers that only the time goes through; it takes a `StepTime` in place of times.

    It shares the layers of the expert that it is made from; their norms must have become `LookedUpNorm`.
    """

    def __init__(self, expert: Expert) -> None:
        nn.Module.__init__(self)
        self.config, self.conditioning = expert.config, expert.conditioning
        self.layers, self.norm = expert.layers, expert.norm
        if expert.conditioning == "concat":
            # The first layer's matrix, cut in two: for the action, and (in the table) for the time.
            self.action_in = nn.Linear(expert.config.width, expert.config.width, bias=False)
            self.action_in.weight = frozen(expert.time_in.weight[:, : expert.config.width])
            self.time_out = expert.time_out
            self.clean = frozen(modulations(expert, torch.zeros(1))[0].to(expert.time_in.weight.dtype))

    def embed_actions(self, action_RHW: Tensor, time: StepTime) -> Tensor:  # type: ignore[override]
        if self.conditioning == "adarms":
            return action_RHW
        time_HW = torch.where(time.clean[:, None], self.clean, time.modulation)
        return self.time_out(F.silu(self.action_in(action_RHW) + time_HW))

    def condition(self, time: StepTime, with_state: bool) -> StepTime:  # type: ignore[override]
        return StepTime(time.modulation, F.pad(time.clean, (1, 0), value=True) if with_state else time.clean)


class LookedUpNorm(nn.Module):
    """Stands in for an `AdaRMSNorm`'s dense layer: its result is a part of the modulation, a constant for time 0."""

    def __init__(self, start: int, clean: Tensor) -> None:
        super().__init__()
        self.start = start
        self.clean = frozen(clean)

    def forward(self, condition: StepTime) -> Tensor:
        own = condition.modulation[self.start : self.start + len(self.clean)]
        return torch.where(condition.clean[None, :, None], self.clean, own)


class MergedProjections(Projections):
    """Queries, keys and values by one matrix; queries and keys are rotated together."""

    def __init__(self, parts: Projections) -> None:
        nn.Module.__init__(self)
        self.heads, self.head_dim, self.out = parts.heads, parts.head_dim, parts.out
        self.qkv = merge(parts.q, parts.k, parts.v)

    def project(self, x_BSW: Tensor, turn: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        heads_BSHD = self.qkv(x_BSW).unflatten(-1, (-1, self.head_dim))
        kv_heads = (heads_BSHD.shape[2] - self.heads) // 2
        turned = rotate(heads_BSHD[:, :, : self.heads + kv_heads], turn)
        key, value = turned[:, :, self.heads :], heads_BSHD[:, :, self.heads + kv_heads :]
        return turned[:, :, : self.heads], key.transpose(1, 2), value.transpose(1, 2)


class MergedKeysValues(Projections):
    """For the last prefix layer: only keys and values."""

    def __init__(self, parts: Projections) -> None:
        nn.Module.__init__(self)
        self.head_dim = parts.head_dim
        self.kv = merge(parts.k, parts.v)

    def keys_values(self, x_BSW: Tensor, turn: Rotation) -> tuple[Tensor, Tensor]:
        key, value = self.kv(x_BSW).unflatten(-1, (-1, self.head_dim)).transpose(1, 2).chunk(2, dim=1)
        return rotate(key.transpose(1, 2), turn).transpose(1, 2), value


class MergedMLP(MLP):
    """Gate and up by one matrix."""

    def __init__(self, parts: MLP) -> None:
        nn.Module.__init__(self)
        self.gate_up, self.down = merge(parts.gate, parts.up), parts.down

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.gelu(gate, approximate="tanh") * up)


class MergedVisionLayer(VisionLayer):
    """Queries, keys and values by one matrix."""

    def __init__(self, parts: VisionLayer) -> None:
        nn.Module.__init__(self)
        self.heads, self.qkv = parts.heads, merge(parts.q, parts.k, parts.v)
        self.norm1, self.norm2, self.out, self.up, self.down = parts.norm1, parts.norm2, parts.out, parts.up, parts.down

    def project(self, x_BMW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.qkv(x_BMW).chunk(3, dim=-1)
        return query, key, value


def frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().clone(), requires_grad=False)


def merge(*parts: nn.Linear) -> nn.Linear:
    """One layer whose output is the outputs of `parts`, one after the other."""
    with torch.device("meta"):
        merged = nn.Linear(parts[0].in_features, sum(p.out_features for p in parts), parts[0].bias is not None)
    merged.weight = nn.Parameter(torch.cat([p.weight.detach() for p in parts]), requires_grad=False)
    if merged.bias is not None:
        merged.bias = nn.Parameter(torch.cat([p.bias.detach() for p in parts]), requires_grad=False)
    return merged


def put_first(model: VLA, ids: Sequence[int]) -> None:
    """Give these tokens the ids 0, 1, 2, ... in place, as the robot's tokenizer has them; the others are gone."""
    if not isinstance(ids, range):
        table = model.backbone.embedding
        table.weight = nn.Parameter(table.weight.detach()[ids], requires_grad=False)


def arrange(model: VLA, prompt_rows: int) -> tuple[PrefillGraph, ExpertGraph]:
    """Both graphs of a model, which stays as it is; weights that are not merged are shared with it, not copied.

    The token table is cut to the `prompt_rows` that a prompt can hold. The output head, the heads of training and the
    last prefix layer's queries and MLP are left out.
    """
    prefill = copy_sharing_weights(model)
    del prefill.expert, prefill.action_in, prefill.action_out, prefill.state_in, prefill.backbone.norm
    rows = frozen(model.backbone.embedding.weight[:prompt_rows])
    prefill.backbone.embedding = nn.Embedding.from_pretrained(rows)
    *layers, last = prefill.backbone.layers
    for layer in layers:
        layer.attention, layer.mlp = MergedProjections(layer.attention), MergedMLP(layer.mlp)
    last.attention = MergedKeysValues(last.attention)
    del last.norm2, last.mlp
    for index, vision_layer in enumerate(prefill.vision.layers):
        prefill.vision.layers[index] = MergedVisionLayer(vision_layer)

    step = copy_sharing_weights(model)
    del step.vision, step.projector, step.backbone
    clean, start = modulations(model.expert, torch.zeros(1))[0], 0
    for norm in expert_norms(step.expert):
        size = norm.dense.out_features
        norm.dense = LookedUpNorm(  # type: ignore[assignment]
            start, clean[start : start + size]
        )
        start += size
    for expert_layer in step.expert.layers:
        expert_layer.attention = MergedProjections(expert_layer.attention)
        expert_layer.mlp = MergedMLP(expert_layer.mlp)
    looked_up = LookedUpExpert(model.expert)
    looked_up.layers, looked_up.norm = step.expert.layers, step.expert.norm
    step.expert = looked_up
    return PrefillGraph(prefill).eval(), ExpertGraph(step).eval()


def copy_sharing_weights(model: VLA) -> VLA:
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def expert_norms(expert: Expert) -> list[AdaRMSNorm]:
    """The norms that the time conditions, in the order of the modulation."""
    norms = [norm for layer in expert.layers for norm in (layer.norm1, layer.norm2)] + [expert.norm]
    return [norm for norm in norms if isinstance(norm, AdaRMSNorm)]


def time_layers(expert: Expert) -> list[tuple[Tensor, Tensor]]:
    """Weights and biases of the layers from the embedded time to the modulation, with silu between layers."""
    if expert.conditioning == "concat":
        return [(expert.time_in.weight[:, expert.config.width :], expert.time_in.bias)]
    norms = [norm.dense for norm in expert_norms(expert)]
    last = torch.cat([dense.weight for dense in norms]), torch.cat([dense.bias for dense in norms])
    return [(expert.time_in.weight, expert.time_in.bias), (expert.time_out.weight, expert.time_out.bias), last]


def modulations(expert: Expert, time_N: Tensor) -> Tensor:
    """[N, M] in float32: the rows of the robot's table (ki_vla_ros/bundle/time_table.py) for these times."""
    with torch.no_grad():
        angle = time_N.double()[:, None] * (2.0 * torch.pi / time_periods(expert.config.width))
        x = torch.cat((angle.sin(), angle.cos()), dim=-1).float()
        for n, (weight, bias) in enumerate(time_layers(expert)):
            x = F.linear((F.silu(x) if n else x).to(weight.device), weight.float(), bias.float())
    return x


def time_file(expert: Expert) -> bytes:
    """The content of the bundle's `time.npz`."""
    arrays: dict[str, NDArray[Any]] = {"periods": time_periods(expert.config.width).numpy()}
    for n, layer in enumerate(time_layers(expert)):
        for kind, tensor in zip(("weight", "bias"), layer, strict=True):
            tensor = tensor.detach().contiguous()
            half = tensor.dtype == torch.bfloat16
            arrays[f"{kind}{n}"] = (tensor.view(torch.uint16) if half else tensor.float()).numpy()
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    return file.getvalue()


def cast_weights(model: VLA, dtype: torch.dtype) -> VLA:
    """Cast the weights of all large matrices to `dtype`, in place.

    Norms, time layers, the image stem, and the layers into and out of the flow stay float32: they are small, their
    results enter every layer, and ONNX has no convolution in bfloat16 before opset 22.
    """
    kept = [
        model.vision.stem,
        model.vision.position,
        model.action_in,
        model.action_out,
        model.state_in,
        model.expert.time_in,
        model.expert.time_out,
    ]
    kept += [module for module in model.modules() if isinstance(module, (LayerNorm, RMSNorm))]
    spared = {id(p) for module in kept if module is not None for p in module.parameters()}
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if id(parameter) in spared else dtype)
    return model


def prefix_length(model: VLA, policy: PolicySpec) -> int:
    return len(policy.cameras) * model.config.vision.tokens + policy.prompt.length


def kv_dtype(model: VLA) -> torch.dtype:
    """The type of the large weights, and so of keys and values."""
    return model.backbone.layers[0].attention.k.weight.dtype


def sample_inputs(model: VLA, policy: PolicySpec) -> tuple[GraphInputs, GraphInputs]:
    """Inputs of prefill and expert step, by name, in the policy's sizes."""
    config, cameras, length, size = model.config, len(policy.cameras), policy.prompt.length, policy.image.size
    prefix = prefix_length(model, policy)
    prefill = {
        "images": torch.zeros(cameras, 3, size, size),
        "image_mask": torch.ones(cameras, dtype=torch.bool),
        "tokens": torch.zeros(length, dtype=torch.long),
        "token_mask": torch.ones(length, dtype=torch.bool),
    }
    kv_shape = (config.backbone.depth, config.backbone.kv_heads, prefix, config.backbone.head_dim)
    expert = {
        # Two tensors: if one were given twice, the tracer would take it for a single input.
        "keys": torch.zeros(kv_shape, dtype=kv_dtype(model)),
        "values": torch.zeros(kv_shape, dtype=kv_dtype(model)),
        "prefix_mask": torch.ones(prefix, dtype=torch.bool),
        "x_t": torch.zeros(config.horizon, config.action_dim),
        "modulation": torch.zeros(modulation_size(model)),
        "clean": torch.zeros(config.horizon, dtype=torch.bool),
        "step": torch.full((1,), 0.1),
    }
    if config.state_dim is not None:
        expert["state"] = torch.zeros(config.state_dim)
    return prefill, expert


def modulation_size(model: VLA) -> int:
    return len(time_layers(model.expert)[-1][1])


def describe_graphs(model: VLA, policy: PolicySpec, prompt_rows: int) -> GraphSpec:
    config = model.config
    graphs = zip(arrange(on_meta(model), prompt_rows), sample_inputs(model, policy), strict=True)
    flops = [count_flops(graph, inputs.values()) for graph, inputs in graphs]
    return GraphSpec(
        layers=config.backbone.depth,
        kv_heads=config.backbone.kv_heads,
        head_dim=config.backbone.head_dim,
        image_tokens=config.vision.tokens,
        prefix_length=prefix_length(model, policy),
        action_dim=config.action_dim,
        state_dim=config.state_dim,
        modulation=modulation_size(model),
        vocab_size=prompt_rows,
        dtype="bfloat16" if kv_dtype(model) == torch.bfloat16 else "float32",
        prefill_flops=flops[0],
        step_flops=flops[1],
    )


def on_meta(model: VLA) -> VLA:
    """The model with shapes but no numbers."""
    shapes = {id(p): nn.Parameter(p.to("meta"), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, shapes)


def count_flops(graph: nn.Module, inputs: Iterable[Tensor]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        graph(*(tensor.to("meta") for tensor in inputs))
    return counter.get_total_flops()
