"""How much memory an optimizer step of the full-size recipe takes on each GPU, and on which GPUs it fits.

    python -m training.speed.memory                              # 1, 4, 8 GPUs: the tables of docs/results/memory.md
    python -m training.speed.memory --measure --depth 2 --vocabulary 32000    # a real step, against its prediction

The plan runs the step itself (FSDP2, mixed precision, both losses, insulated, clipping, fused AdamW) on fake tensors in
a fake process group, and torch's FSDPMemTracker adds up every tensor's storage while it lives. So nothing is assumed
about layers or autograd. The kernels, though, are the CPU's: their attention keeps what the GPU's fused ones keep
(output and one number per row), but the plan does not see scratch memory, CUDA context, NCCL or fragmentation
(`RESERVE`).
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from ki_vla_ros.console import ExitCode, run_command
from training.config import ParallelConfig, StageConfig
from training.losses import match_flow, next_token_hidden, predict_in_pieces, predict_postfix
from training.model import VLA, VLAConfig, paligemma_3b
from training.optimizer import clip_gradients, make_optimizer
from training.parallel import checkpoint_activations, layers, shard
from training.weights import empty_model as model_without_memory

GIB = 2**30
RESERVE = 0.1
"""Share of a card that is left for CUDA context, NCCL buffers and the allocator's fragmentation: an assumption."""
CARDS_GB = (24, 40, 48, 80, 141)
PROMPT, VIEWS, FAST = 200, 3, 250
SGD_RATE = 1e-3
STAGE = StageConfig(
    name="memory", steps=1, learning_rate=1e-5, losses={"flow": 1.0}, train=("expert",), sources={"robot": 1}
)


@dataclass(frozen=True)
class Step:
    """One optimizer step: `batch` samples on each GPU, with one noise sample each."""

    model: VLAConfig
    gpus: int
    batch: int
    parallel: ParallelConfig
    prompt: int = PROMPT
    views: int = VIEWS
    fast: int = FAST
    recipe: bool = True
    """False: weights in bfloat16, and SGD that moves each weight as soon as its gradient is there, then frees the
    gradient; no moments, no clipping. That is no way to train, but a real step of the whole model then fits in 24 GiB.
    """


@dataclass(frozen=True)
class Footprint:
    """Bytes on one GPU: the first three at rest, the other ones when the total is largest."""

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    """Weights of the layers at work, in `dtype`, and their communication buffers."""
    activations: int
    """Activations, and gradients of activations and of gathered weights."""
    peak: int
    offloaded_peak: int
    """The largest total on the GPU if parameters, gradients and optimizer are in host memory. The plan's host and GPU
    share one memory, so the copies on their way to the GPU (the layer at work and the next) are added by hand."""


class Tracker(FSDPMemTracker):
    """Also tracks the largest sum of what stays on the GPU with CPU offload."""

    HOST = ("Sharded Param", "Sharded Grad", "OptState")
    offloaded_peak = 0

    def _update_peak_stats(self, peak_state: Any) -> None:
        super()._update_peak_stats(peak_state)
        for sizes in self._curr_mem_snap.values():
            now = sizes["Total"] - sum(size for kind, size in sizes.items() if label(kind) in self.HOST)
            self.offloaded_peak = max(self.offloaded_peak, now)


def label(kind: Any) -> str:
    return str(getattr(kind, "value", kind))


@contextmanager
def group(gpus: int, backend: str) -> Iterator[DeviceMesh]:
    """Processes to shard over: any number of fake ones, or only this one."""
    store = FakeStore() if backend == "fake" else dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(backend, rank=0, world_size=gpus, store=store)
    try:
        yield init_device_mesh("cpu", (gpus,))
    finally:
        dist.destroy_process_group()


def empty_model(step: Step) -> VLA:
    """The step's model, without memory for its weights."""
    model = model_without_memory(step.model)
    return model if step.recipe else model.bfloat16()


def prepare(model: VLA, step: Step, mesh: DeviceMesh) -> torch.optim.Optimizer | None:
    """Fill and shard an empty model; returns its optimizer with both moments, or None for SGD."""
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    if step.parallel.activation_checkpointing:
        checkpoint_activations(model)
    shard(model, step.parallel, mesh)
    if not step.recipe:
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(descend)
        return None
    optimizer = make_optimizer(dict(model.named_parameters()), STAGE)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    # Here, not first in the measured step: a DTensor operation's first use takes whole fake tensors.
    clip_gradients(model.parameters(), STAGE.largest_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def descend(parameter: Tensor) -> None:
    """Take one step of SGD and free the gradient."""
    assert parameter.grad is not None
    local(parameter).sub_(local(parameter.grad), alpha=SGD_RATE)
    parameter.grad = None


def local(tensor: Tensor) -> Tensor:
    """This process's shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def make_inputs(step: Step) -> dict[str, Tensor]:
    """A batch at its largest: all views present, no padding."""
    model, batch = step.model, step.batch
    inputs = {
        "images_BVCSS": torch.zeros(batch, step.views, 3, model.vision.image_size, model.vision.image_size),
        "image_mask_BV": torch.ones(batch, step.views, dtype=torch.bool),
        "tokens_BL": torch.zeros(batch, step.prompt, dtype=torch.int64),
        "token_mask_BL": torch.ones(batch, step.prompt, dtype=torch.bool),
        "postfix_BT": torch.zeros(batch, step.fast, dtype=torch.int64),
        "postfix_mask_BT": torch.ones(batch, step.fast, dtype=torch.bool),
        "x_t": torch.zeros(batch, model.horizon, model.action_dim),
        "time": torch.zeros(batch, model.horizon),
    }
    return inputs | ({} if model.state_dim is None else {"state": torch.zeros(batch, model.state_dim)})


def everything(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Indices of all [batch, length] elements: what a mask without padding selects, without looking at its values."""
    return torch.arange(batch).repeat_interleave(length), torch.arange(length).repeat(batch)


def compute_loss(model: VLA, step: Step, inputs: dict[str, Tensor]) -> Tensor:
    """Next-token loss of the FAST tokens plus insulated flow loss, from one forward pass.

    `BatchLosses` cannot run here: it selects rows by a mask, and the masks of fake tensors have no values.
    """
    with torch.autocast("cpu", torch.bfloat16, enabled=step.parallel.dtype == "bfloat16"):
        output = model(**inputs, prefix_rows=step.prompt)
        last = torch.full((step.batch,), step.prompt - 1)
        hidden = next_token_hidden(output.prefix_hidden_BPD, last, output.postfix_hidden_BTD)
        tokens, counted = inputs["postfix_BT"], everything(step.batch, step.fast)
        if step.parallel.activation_checkpointing:
            text = predict_in_pieces(model.logits, hidden, tokens, counted)
        else:
            text = predict_postfix(model.logits, hidden, tokens, counted)
        flow = match_flow(output.velocity_RHA, inputs["x_t"], everything(step.batch, step.model.horizon))
    return text + flow


def take_step(
    model: VLA, optimizer: torch.optim.Optimizer | None, step: Step, inputs: dict[str, Tensor]
) -> float | None:
    """Forward and backward pass, clipping, AdamW; returns the loss before, or None on fake tensors."""
    loss = compute_loss(model, step, inputs)
    loss.backward()
    value = None if isinstance(loss, FakeTensor) else float(loss.detach())
    if optimizer is None:
        return value
    clip_gradients(model.parameters(), STAGE.largest_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return value


def predict(step: Step) -> Footprint:
    """The footprint of a step, taken on fake tensors."""
    model = empty_model(step)
    with group(step.gpus, "fake") as mesh, FakeTensorMode(allow_non_fake_inputs=True):
        optimizer = prepare(model, step, mesh)
        inputs = make_inputs(step)
        parameters = sum(local(parameter).nbytes for parameter in model.parameters())
        tracker = Tracker(model, optimizer)
        tracker.track_inputs(tuple(inputs.values()))
        with tracker:
            take_step(model, optimizer, step, inputs)
        (found,) = tracker.get_tracker_snapshot("peak").values()
        (rest,) = tracker.get_tracker_snapshot("current").values()
    peak = {label(kind): size for kind, size in found.items()}
    copied = 2 * max(sum(local(parameter).nbytes for parameter in layer.parameters()) for layer in layers(model))
    return Footprint(
        parameters=parameters,
        gradients=parameters,
        optimizer=0 if optimizer is None else {label(kind): size for kind, size in rest.items()}["OptState"],
        gathered=sum(peak[kind] for kind in ("Unsharded Param", "All Gather", "Reduce Scatter")),
        activations=sum(peak[kind] for kind in ("Activation", "Temp", "Unsharded Grad", "Inputs", "Buffer")),
        peak=peak["Total"],
        offloaded_peak=tracker.offloaded_peak + copied,
    )


@dataclass(frozen=True)
class Measured:
    """A real step: its memory, the loss before and after on the same batch, and how long it took."""

    peak: int
    """Bytes of this process's resident memory at its peak, beyond what it was before the model."""
    loss_before: float
    loss_after: float
    seconds: float


def measure(step: Step) -> Measured:
    before = resident("VmRSS")
    model = empty_model(step)
    with group(1, "gloo") as mesh:
        optimizer = prepare(model, step, mesh)
        inputs = make_inputs(step)
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak: building the model has its own
        began_s = time.monotonic()
        loss_before = take_step(model, optimizer, step, inputs)
        seconds, peak = time.monotonic() - began_s, resident("VmHWM") - before
        assert loss_before is not None
        with torch.no_grad():
            return Measured(peak, loss_before, float(compute_loss(model, step, inputs)), seconds)


def resident(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def cut(model: VLAConfig, depth: int | None, vocabulary: int | None) -> VLAConfig:
    """The same widths with fewer layers and tokens."""
    if depth is not None:
        parts = ("vision", "backbone", "expert")
        model = replace(model, **{part: replace(getattr(model, part), depth=depth) for part in parts})
    return model if vocabulary is None else replace(model, vocab_size=vocabulary)


def gib(size: float) -> str:
    return f"{size / GIB:.1f}"


def yes(answer: bool) -> str:
    return "yes" if answer else "no"


def cards(size: int) -> str:
    """The smallest card that it fits on, with `RESERVE` to spare."""
    return next((f"{card} GB" for card in CARDS_GB if size <= (1 - RESERVE) * card * GIB), "none")


def print_row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def print_plan(steps: list[Step]) -> None:
    heads = ["GPUs", "batch per GPU", "activation checkpointing", "parameters", "gradients", "optimizer"]
    heads += ["gathered", "activations", "peak", "smallest card", "peak with CPU offload", "smallest card"]
    print_row(*heads)
    print_row(*["---"] * len(heads))
    for step in steps:
        found = predict(step)
        sizes = [gib(getattr(found, field.name)) for field in dataclasses.fields(found)]
        *rest, peak, offloaded = sizes
        row = [step.gpus, step.batch, yes(step.parallel.activation_checkpointing), *rest, peak, cards(found.peak)]
        print_row(*row, offloaded, cards(found.offloaded_peak))


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.speed.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--policy", choices=("pi0", "pi05"), default="pi05")
    parser.add_argument("--gpus", default="1,4,8", type=numbers)
    parser.add_argument("--batch", default="1,8,32", help="samples on each GPU", type=numbers)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--depth", type=int, help="layers of each part, in place of 27 and 18")
    parser.add_argument("--vocabulary", type=int, help="tokens, in place of 257152")
    parser.add_argument("--measure", action="store_true", help="take a real step in this process and compare")
    parser.add_argument(
        "--checkpointing", default="yes,no", type=lambda text: [part == "yes" for part in text.split(",")]
    )
    parser.add_argument("--sgd", action="store_true", help="bfloat16 weights, SGD during the backward pass; see Step")
    return run_command("memory", partial(_plan, parser.parse_args(arguments)))


def _plan(given: argparse.Namespace) -> int:
    model = cut(paligemma_3b(given.policy), given.depth, given.vocabulary)
    steps = [
        Step(
            model,
            gpus,
            batch,
            ParallelConfig(shard=True, cpu_offload=True, activation_checkpointing=checkpointing, dtype=given.dtype),
            recipe=not given.sgd,
        )
        for gpus in given.gpus
        for batch in given.batch
        for checkpointing in given.checkpointing
    ]
    count = sum(parameter.numel() for parameter in empty_model(steps[0]).parameters())
    print(f"{count / 1e9:.3f} G parameters; {platform.machine()}, torch {torch.__version__}; all in GiB\n")
    if not given.measure:
        print_plan(steps)
        return ExitCode.FINE
    heads = ["batch", "activation checkpointing", "predicted peak", "measured peak", "measured / predicted"]
    heads += ["loss before", "after", "seconds"]
    print_row(*heads)
    print_row(*["---"] * len(heads))
    # A new process for each: what the last one left in its memory pools would count.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for step in (step for step in steps if step.gpus == 1):
            predicted, measured = predict(step).peak, pool.apply(measure, (step,))
            row = [step.batch, yes(step.parallel.activation_checkpointing), gib(predicted), gib(measured.peak)]
            row += [f"{measured.peak / predicted:.2f}", f"{measured.loss_before:.3f}", f"{measured.loss_after:.3f}"]
            print_row(*row, f"{measured.seconds:.0f}")
    return ExitCode.FINE


if __name__ == "__main__":
    sys.exit(main())
