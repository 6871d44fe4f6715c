"""The full-size model on an NVIDIA card: one command fills the table in docs/results/gpu.md.

    python -m training.speed.gpu
    python -m training.speed.gpu --bundles out/random/pi05 --calls 10000

Random weights, bfloat16, batch 1, one to three views, 200 prompt tokens, 50 actions, 10 steps. Compared are the
training classes (eager, compiled, and compiled within CUDA graphs); the graphs as they are exported
(training.export.graphs: merged matrices, flow time looked up), compiled within CUDA graphs; and, with `--bundles
FOLDER`, the tensorrt engine on FOLDER/1, /2 and /3 (by number of views, exported from the same seed). A way that cannot
run here becomes a row that says why.

It was written on a machine without a card: with `--device cpu --size pi05-slice` (in tests, a tiny model) it runs
everything but the CUDA graphs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ki_vla_ros.bench import (
    Durations,
    EngineSetUp,
    Work,
    least_ms,
    measure_ceiling,
    time_alternating,
    time_parts,
)
from ki_vla_ros.bundle import PolicySpec
from ki_vla_ros.console import ExitCode, run_command
from ki_vla_ros.engines.base import step_times
from ki_vla_ros.errors import ConfigurationError, KiVlaError
from ki_vla_ros.policy import longest_input
from ki_vla_ros.statistics import spread
from training.export import PrefixTensors, arrange, as_batch, cast_weights, cosine, describe_graphs, modulations
from training.export.random_weights import PROMPT_LENGTH, SIZES, draw_weights, policy_spec
from training.model import VLA, Cache, VLAConfig
from training.weights import assemble

CALLS, ROUNDS, WARM_UP = 10_000, 100, 10
GOALS = {"chunk_ms": 11.0, "steps_ms": 3.0, "p99_over_p50": 1.05, "cosine": 0.999}
"""On one H200 with three views; docs/results/gpu.md says where they come from."""


@dataclass(frozen=True)
class ChunkInputs:
    """The inputs of one chunk, on the device; legend as in training.model.vla, batch and rows are 1."""

    prefix: PrefixTensors
    noise_RHA: Tensor
    state_RS: Tensor | None
    steps: int

    def to(self, device: torch.device) -> ChunkInputs:
        state_RS = None if self.state_RS is None else self.state_RS.to(device)
        return replace(
            self,
            prefix=tuple(tensor.to(device) for tensor in self.prefix),  # type: ignore[arg-type]
            noise_RHA=self.noise_RHA.to(device),
            state_RS=state_RS,
        )


@dataclass(frozen=True)
class Way:
    """A way of computing a chunk: its two halves, put on the device's queue without waiting."""

    prefill: Callable[[], Any]
    steps: Callable[[Any], Tensor]

    def chunk(self) -> Tensor:
        return self.steps(self.prefill())


def make_inputs(policy: PolicySpec, config: VLAConfig, seed: int) -> ChunkInputs:
    prefix, state_RS = as_batch(longest_input(policy, config.vocab_size, seed), config.state_dim)
    rng = torch.Generator().manual_seed(seed)
    assert policy.flow is not None, "only policies with a flow become bundles"
    return ChunkInputs(
        prefix, torch.randn(1, config.horizon, config.action_dim, generator=rng), state_RS, policy.flow.steps
    )


def build_model(config: VLAConfig, seed: int, dtype: torch.dtype) -> VLA:
    """Large weights in `dtype`, drawn in bfloat16 so that every dtype has the same numbers.

    The time layers feed each other. The export, which looks up their result, may keep the first ones in float32; the
    training classes run all of them in one type.
    """
    model = assemble(config, draw_weights(config, seed, torch.bfloat16))
    cast_weights(model.eval().requires_grad_(False), dtype)
    if config.conditioning == "adarms":
        model.expert.time_in.to(dtype)
        model.expert.time_out.to(dtype)
    return model


def plain(model: VLA, inputs: ChunkInputs, compiler: Callable[[Any], Any] = lambda function: function) -> Way:
    """The training classes: `sample_actions`, its two halves passed through `compiler`."""
    prefill, velocity = compiler(model.prefill), compiler(model.velocity)
    # Made once: putting a number into a tensor on the device cannot be captured in a graph.
    times = [torch.full_like(inputs.noise_RHA[..., 0], time) for time in step_times(inputs.steps)]

    def steps(cache: Cache) -> Tensor:
        x_t = inputs.noise_RHA
        for time_RH in times:
            x_t = x_t - velocity(cache, x_t, time_RH, inputs.state_RS) / inputs.steps
        return x_t

    return Way(lambda: prefill(*inputs.prefix), steps)


def arranged(model: VLA, inputs: ChunkInputs, compiler: Callable[[nn.Module], Any] = lambda graph: graph) -> Way:
    """The bundle's two graphs, with the table of modulations made once."""
    device = inputs.noise_RHA.device
    prefill, expert = (compiler(graph) for graph in arrange(model, model.config.vocab_size))
    rows = modulations(model.expert, torch.tensor(step_times(inputs.steps), dtype=torch.float64)).to(device)
    clean_H = torch.zeros(inputs.noise_RHA.shape[1], dtype=torch.bool, device=device)
    step = torch.full((1,), 1.0 / inputs.steps, device=device)
    prefix = [tensor[0] for tensor in inputs.prefix]
    state = () if inputs.state_RS is None else (inputs.state_RS[0],)

    def steps(cache: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x_t = inputs.noise_RHA[0]
        for modulation in rows:
            x_t = expert(*cache, x_t, modulation, clean_H, step, *state)[1]
        return x_t[None]

    return Way(lambda: prefill(*prefix), steps)


def captured(way: Way) -> Way:
    """Both halves as CUDA graphs, launched without a wait between them; the results lie where the capture put them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and lets libraries allocate their workspaces before the capture
            way.chunk()
    torch.cuda.current_stream().wait_stream(stream)
    first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(first):
        cache = way.prefill()
    with torch.cuda.graph(second, pool=first.pool()):
        actions = way.steps(cache)

    def prefill() -> Any:
        first.replay()
        return cache

    def steps(_: Any) -> Tensor:
        second.replay()
        return actions

    return Way(prefill, steps)


def ways(model: VLA, inputs: ChunkInputs) -> Iterator[tuple[str, Callable[[], Way]]]:
    """The ways from the slowest to what should be the fastest; each is built when its turn comes."""

    def compiler(function: Any) -> Any:
        return torch.compile(function, dynamic=False, fullgraph=True)

    yield "eager", lambda: plain(model, inputs)
    if inputs.noise_RHA.device.type != "cuda":
        yield "arranged graphs, eager", lambda: arranged(model, inputs)
        return
    yield "torch.compile", lambda: plain(model, inputs, compiler)
    yield "torch.compile + CUDA graph", lambda: captured(plain(model, inputs, compiler))
    yield "arranged graphs, torch.compile + CUDA graph", lambda: captured(arranged(model, inputs, compiler))


@torch.no_grad()
def measure(way: Way, reference_RHA: Tensor, rounds: int, wait: Callable[[], None]) -> dict[str, Any]:
    """Times of whole chunks, and of all steps on one cache, in ms; cosine with the float32 reference's actions."""
    agreement = cosine(*(chunk.float().cpu().numpy() for chunk in (way.chunk(), reference_RHA)))
    cache = way.prefill()
    wait()

    def chunk() -> None:
        way.chunk()
        wait()

    def steps() -> None:
        way.steps(cache)
        wait()

    taken_ms = time_alternating({"chunk": chunk, "all steps": steps}, rounds, WARM_UP)
    return figures_of(taken_ms, agreement)


def figures_of(taken_ms: dict[str, Durations], agreement: float) -> dict[str, Any]:
    found = {name: spread(values) for name, values in taken_ms.items()}
    steadiness = found["chunk"]["p99"] / found["chunk"]["p50"]
    return {"ms": found, "calls": len(taken_ms["chunk"]), "p99_over_p50": steadiness, "cosine": agreement}


def measure_engine(bundle: Path, rounds: int) -> dict[str, Any]:
    """The tensorrt engine through the policy, as the robot runs it; no cosine, as its parity is tested elsewhere."""
    policy = EngineSetUp(bundle=str(bundle), engine="tensorrt", provider="cuda").open()
    try:
        taken_ms = time_parts(policy, rounds, lambda line: None)
        return figures_of({name: taken_ms[name] for name in ("chunk", "all steps")}, float("nan"))
    finally:
        policy.engine.close()


def compare(
    config: VLAConfig,
    policy: PolicySpec,
    device: torch.device,
    rounds: int,
    calls: int,
    seed: int,
    bundle: Path | None,
) -> dict[str, Any]:
    """Rows by way, for one number of views; the last torch way is timed `calls` times, the others `rounds` times."""
    inputs = make_inputs(policy, config, seed).to(device)
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    exact = build_model(config, seed, torch.float32).to(device)
    with torch.no_grad():
        reference_RHA = plain(exact, inputs).chunk()
    del exact
    model = build_model(config, seed, torch.bfloat16).to(device)
    rows: dict[str, Any] = {}
    todo = list(ways(model, inputs))
    for name, build in todo:
        count = calls if name == todo[-1][0] else rounds
        try:
            with torch.no_grad():
                way = build()
            rows[name] = measure(way, reference_RHA, count, wait)
        except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:  # what compilers and captures raise
            rows[name] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    if bundle is not None:
        try:
            rows["tensorrt engine"] = measure_engine(bundle, calls)
        except KiVlaError as error:
            rows["tensorrt engine"] = {"failed": str(error)}
    graph = describe_graphs(model, policy, config.vocab_size)
    sizes = [model_bytes(model.vision, model.projector, *model.backbone.layers), model_bytes(model.expert)]
    prefill, step = Work(graph.prefill_flops, sizes[0]), Work(graph.step_flops, sizes[1])
    ceiling = measure_ceiling("cuda" if device.type == "cuda" else "cpu", torch.get_num_threads(), "bfloat16", sizes)
    return {
        "views": len(policy.cameras),
        "rows": rows,
        "roofline_ms": least_ms(ceiling, prefill, step, inputs.steps),
        "roofline_source": ceiling.source,
    }


def model_bytes(*modules: nn.Module) -> int:
    """Bytes of all weights but the time conditioning's, whose results the bundle looks up."""
    total = 0
    for module in modules:
        for name, parameter in module.named_parameters():
            if "dense" not in name and not name.startswith("time_"):
                total += parameter.numel() * parameter.element_size()
    return total


def table(figures: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| views | way | chunk p50, ms | p99 | p99 / p50 | all steps p50, ms | cosine | calls |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for found in figures["views"]:
        for name, row in found["rows"].items():
            if "failed" in row:
                lines.append(f"| {found['views']} | {name} | not measured: {row['failed']} | | | | | |")
                continue
            chunk, steps = row["ms"]["chunk"], row["ms"]["all steps"]
            lines.append(
                f"| {found['views']} | {name} | {chunk['p50']:.2f} | {chunk['p99']:.2f} | {row['p99_over_p50']:.3f} "
                f"| {steps['p50']:.2f} | {row['cosine']:.5f} | {row['calls']} |"
            )
        roof = found["roofline_ms"]
        lines.append(f"| {found['views']} | roofline | {roof['chunk']:.2f} | | | {roof['all steps']:.2f} | | |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.speed.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=SIZES, default="pi05")
    parser.add_argument("--views", type=int, nargs="+", choices=(1, 2, 3), default=[1, 2, 3])
    parser.add_argument("--calls", type=int, default=CALLS, help=f"of the fastest way; default {CALLS}")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of the others; default {ROUNDS}")
    parser.add_argument("--bundles", type=Path, help="folder with bundles 1, 2, 3 (views) for the tensorrt engine")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures there")
    return run_command("speed.gpu", partial(_measure, parser.parse_args(arguments)))


def _measure(chosen: argparse.Namespace) -> int:
    if chosen.device == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(
            f"--device cuda: expected an NVIDIA card, got torch {torch.__version__} without one; run this where "
            "there is one, with a torch built for its driver"
        )
    config = SIZES[chosen.size]()
    found = []
    for views in chosen.views:
        policy = policy_spec(config, chosen.size, views, PROMPT_LENGTH[chosen.size], chosen.seed)
        bundle = None if chosen.bundles is None else chosen.bundles / str(views)
        device = torch.device(chosen.device)
        found.append(compare(config, policy, device, chosen.rounds, chosen.calls, chosen.seed, bundle))
        print(table({"views": found[-1:]}), flush=True)
    card = torch.cuda.get_device_name() if chosen.device == "cuda" else "cpu"
    figures = {
        "size": chosen.size,
        "config": asdict(config),
        "card": card,
        "torch": torch.__version__,
        "goals": GOALS,
        "views": found,
    }
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(figures, indent=1) + "\n")
    return ExitCode.FINE


if __name__ == "__main__":
    sys.exit(main())
