"""The full-size model on an NVIDIA card: one command, at most nine minutes, fills the table in docs/results/gpu.md.

    python -m training.speed.gpu --json gpu.json

Random weights, bfloat16, batch 1, one to three views, 200 prompt tokens, 50 actions, 10 steps. Compared with a float32
run of the same weights, and timed, are the graphs as they are exported (training.export.graphs: merged matrices, flow
time looked up) compiled within CUDA graphs; a bundle of the same weights on both kinds of TensorRT, on onnxruntime and
on the torch engine; and the training classes (eager, compiled, and compiled within CUDA graphs). A way that cannot run
here becomes a row that says why.

What is worth most comes first: three views, then 10,000 calls of the fastest way there, then one view and two. After
each row the JSON is written; when `--within-s` is over, what is there is printed and the process ends.

It was written on a machine without a card: with `--device cpu --size pi05-slice` (in tests, a tiny model) it runs
everything but CUDA graphs and TensorRT.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ki_vla_ros.bench import (
    Durations,
    Work,
    least_ms,
    measure_ceiling,
    time_alternating,
)
from ki_vla_ros.bundle import PolicySpec, load_bundle
from ki_vla_ros.console import ExitCode, run_command
from ki_vla_ros.engines import open_engine
from ki_vla_ros.engines.base import step_times
from ki_vla_ros.errors import ConfigurationError, KiVlaError
from ki_vla_ros.policy import Policy, longest_input
from ki_vla_ros.records import ModelInput
from ki_vla_ros.settings import settings_from_parameters
from ki_vla_ros.statistics import spread
from training.export import (
    PrefixTensors,
    arrange,
    as_batch,
    cast_weights,
    cosine,
    describe_graphs,
    export_bundle,
    modulations,
)
from training.export.random_weights import PROMPT_LENGTH, SIZES, draw_weights, policy_spec, write_checkpoint
from training.model import VLA, Cache, VLAConfig
from training.speed.cpu import Actions
from training.weights import assemble

CALLS, ROUNDS, WARM_UP = 10_000, 100, 10
WITHIN_S = 540.0
LEAST_TOKENS = 256  # that every prompt's table has
LEAST_S = 5.0  # a way is not begun with less
GOALS = {"chunk_ms": 11.0, "steps_ms": 3.0, "p99_over_p50": 1.05, "cosine": 0.999}
"""On one H200 with three views; docs/results/gpu.md says where they come from."""


@dataclass(frozen=True)
class ChunkInputs:
    """The inputs of one chunk, on the device; legend as in training.model.vla, batch and rows are 1."""

    prefix: PrefixTensors
    noise_RHA: Tensor
    state_RS: Tensor | None
    steps: int
    given: ModelInput
    """The same prefix and state, as a policy takes them."""

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
    given = longest_input(policy, min(config.vocab_size - 1, LEAST_TOKENS), seed)  # tokens that a bundle has, too
    prefix, state_RS = as_batch(given, config.state_dim)
    rng = torch.Generator().manual_seed(seed)
    assert policy.flow is not None, "only policies with a flow become bundles"
    noise_RHA = torch.randn(1, config.horizon, config.action_dim, generator=rng)
    return ChunkInputs(prefix, noise_RHA, state_RS, policy.flow.steps, given)


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


@dataclass(frozen=True)
class Runner:
    """One way, ready to be timed: both calls return when the work is done."""

    chunk: Callable[[], Actions]
    steps: Callable[[], object]
    """All of them, on the cache of an earlier prefill."""
    close: Callable[[], None] = lambda: None


Builder = Callable[[], Runner]


def run_way(build: Callable[[], Way], wait: Callable[[], None]) -> Runner:
    with torch.no_grad():
        way = build()
        cache = way.prefill()
    wait()

    @torch.no_grad()
    def chunk() -> Actions:
        actions_HA: Actions = way.chunk()[0].float().cpu().numpy()  # which waits
        return actions_HA

    @torch.no_grad()
    def steps() -> None:
        way.steps(cache)
        wait()

    return Runner(chunk, steps)


def run_engine(path: Path, settings: Mapping[str, str], inputs: ChunkInputs) -> Runner:
    """A bundle through the policy, as the robot runs it."""
    bundle = load_bundle(path)
    policy = Policy(bundle, open_engine(bundle, settings_from_parameters(settings)))
    given, noise_HA = inputs.given, inputs.noise_RHA[0].cpu().numpy()
    held = [policy.prefill(given)]

    def chunk() -> Actions:
        held[0] = policy.prefill(given)
        return policy.denoise(held[0], noise_HA, given.state_S)

    return Runner(chunk, lambda: policy.denoise(held[0], noise_HA, given.state_S), policy.engine.close)


def ways(
    model: VLA, inputs: ChunkInputs, bundle: Callable[[], Path], wait: Callable[[], None]
) -> Iterator[tuple[str, Builder]]:
    """The ways by name, those first that matter most; each is built when its turn comes."""

    def compiler(function: Any) -> Any:
        return torch.compile(function, dynamic=False, fullgraph=True)

    card = inputs.noise_RHA.device.type == "cuda"
    torch_ways: dict[str, Callable[[], Way]]
    if card:
        torch_ways = {
            "arranged graphs, torch.compile + CUDA graph": lambda: captured(arranged(model, inputs, compiler)),
            "torch.compile + CUDA graph": lambda: captured(plain(model, inputs, compiler)),
            "torch.compile": lambda: plain(model, inputs, compiler),
            "eager": lambda: plain(model, inputs),
        }
    else:
        torch_ways = {
            "arranged graphs, eager": lambda: arranged(model, inputs),
            "eager": lambda: plain(model, inputs),
        }
    provider = "cuda" if card else "cpu"
    engines = {
        "TensorRT": {"engine": "tensorrt", "provider": "cuda"},
        "TensorRT for RTX": {"engine": "tensorrt_rtx", "provider": "cuda"},
        "onnxruntime": {"engine": "onnx", "provider": provider},
        "torch engine": {"engine": "torch", "provider": provider},
    }
    first, *others = torch_ways
    yield first, lambda: run_way(torch_ways[first], wait)
    for name, settings in engines.items():
        yield name, lambda settings=settings: run_engine(bundle(), settings, inputs)  # type: ignore[misc]
    for name in others:
        yield name, lambda name=name: run_way(torch_ways[name], wait)  # type: ignore[misc]


def measure(runner: Runner, reference_HA: Actions, rounds: int) -> dict[str, Any]:
    """Times of whole chunks, and of all steps on one cache, in ms; cosine with the float32 reference's actions."""
    agreement = cosine(runner.chunk(), reference_HA)
    taken_ms = time_alternating({"chunk": runner.chunk, "all steps": runner.steps}, rounds, WARM_UP)
    return {"ms": {name: tails(values) for name, values in taken_ms.items()}, "calls": rounds, "cosine": agreement}


def tails(values: Durations) -> dict[str, float]:
    found = spread(values) | {"min": float(values.min())}
    return found | {"p99_over_p50": found["p99"] / found["p50"], "p99_minus_min": found["p99"] - found["min"]}


@dataclass
class Report:
    """What is found so far, on disk after each row."""

    head: dict[str, Any]
    path: Path | None
    ends_s: float
    """On the clock of `time.monotonic`."""
    views: list[dict[str, Any]] = field(default_factory=list)

    def left_s(self) -> float:
        return self.ends_s - time.monotonic()

    def write(self) -> None:
        if self.path is not None:
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(self.head | {"views": self.views}, indent=1) + "\n")
            part.replace(self.path)

    def finish(self) -> None:
        """Write and print, whatever the measuring thread is doing; for the timer."""
        for found in self.views:
            found["rows"] = {name: row or {"failed": "no time was left"} for name, row in found["rows"].items()}
        self.write()
        print(table({"views": self.views}), flush=True)


def compare(
    found: dict[str, Any],
    report: Report,
    todo: Sequence[tuple[str, Builder]],
    reference_HA: Actions,
    rounds: int,
    calls: int,
) -> None:
    """Fill `found["rows"]`, by way; then time the fastest `calls` times, or as often as half the time left allows."""
    rows: dict[str, Any] = found["rows"]
    rows |= {name: {} for name, _ in todo}
    best: tuple[float, str, Builder] | None = None
    for name, build in todo:
        if report.left_s() < LEAST_S:
            rows[name] = {"failed": "no time was left"}
            continue
        try:
            runner = build()
            try:
                rows[name] = measure(runner, reference_HA, rounds)
            finally:
                runner.close()
        except (KiVlaError, RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:  # of compilers and captures
            rows[name] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        else:
            p50_ms = rows[name]["ms"]["chunk"]["p50"]
            best = min(best or (p50_ms, name, build), (p50_ms, name, build), key=lambda way: way[0])
        report.write()
    if best is None:
        return
    p50_ms, name, build = best
    count = min(calls, int(report.left_s() / 2 / (p50_ms / 1e3)))
    if count > rounds:
        runner = build()
        try:
            taken_ms = time_alternating({"chunk": runner.chunk}, count, WARM_UP)
        finally:
            runner.close()
        rows[name] = {**rows[name], "ms": rows[name]["ms"] | {"chunk": tails(taken_ms["chunk"])}, "calls": count}
        report.write()


def make_bundle(folder: Path, config: VLAConfig, policy: PolicySpec, seed: int, dtype: str) -> Path:
    """The bundle at `folder`, exported from the same seed unless it is there."""
    if not folder.exists():
        with tempfile.TemporaryDirectory() as place:
            write_checkpoint(Path(place) / "checkpoint", config, policy, seed, torch.bfloat16)  # as `build_model` does
            export_bundle(Path(place) / "checkpoint", folder, "Random weights: **never for an arm**.", True, dtype)
    return folder


def roofline(model: VLA, policy: PolicySpec, device: torch.device, steps: int) -> dict[str, Any]:
    graph = describe_graphs(model, policy, model.config.vocab_size)
    sizes = [model_bytes(model.vision, model.projector, *model.backbone.layers), model_bytes(model.expert)]
    prefill, step = Work(graph.prefill_flops, sizes[0]), Work(graph.step_flops, sizes[1])
    ceiling = measure_ceiling("cuda" if device.type == "cuda" else "cpu", torch.get_num_threads(), "bfloat16", sizes)
    return {"roofline_ms": least_ms(ceiling, prefill, step, steps), "roofline_source": ceiling.source}


def model_bytes(*modules: nn.Module) -> int:
    """Bytes of all weights but the time conditioning's, whose results the bundle looks up."""
    total = 0
    for module in modules:
        for name, parameter in module.named_parameters():
            if "dense" not in name and not name.startswith("time_"):
                total += parameter.numel() * parameter.element_size()
    return total


def table(figures: Mapping[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| views | way | chunk p50, ms | p99 | p99 / p50 | p99 - min | all steps p50, ms | cosine | calls |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for found in figures["views"]:
        for name, row in found["rows"].items():
            if "failed" in row:
                lines.append(f"| {found['views']} | {name} | not measured: {row['failed']} | | | | | | |")
                continue
            chunk, steps = row["ms"]["chunk"], row["ms"]["all steps"]
            lines.append(
                f"| {found['views']} | {name} | {chunk['p50']:.2f} | {chunk['p99']:.2f} | {chunk['p99_over_p50']:.3f} "
                f"| {chunk['p99_minus_min']:.2f} | {steps['p50']:.2f} | {row['cosine']:.5f} | {row['calls']} |"
            )
        if "roofline_ms" in found:
            roof = found["roofline_ms"]
            lines.append(f"| {found['views']} | roofline | {roof['chunk']:.2f} | | | | {roof['all steps']:.2f} | | |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.speed.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=SIZES, default="pi05")
    parser.add_argument("--views", type=int, nargs="+", choices=(1, 2, 3), default=[3, 1, 2], help="in this order")
    parser.add_argument("--calls", type=int, default=CALLS, help=f"of the first views' fastest way; default {CALLS}")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of each way; default {ROUNDS}")
    parser.add_argument(
        "--bundles", type=Path, help="folder of bundles 1, 2, 3 (views); missing ones are exported there"
    )
    parser.add_argument("--within-s", type=float, default=WITHIN_S, help=f"time for everything; default {WITHIN_S:.0f}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures there")
    return run_command("speed.gpu", partial(_measure, parser.parse_args(arguments)))


def _stop(report: Report) -> None:
    report.finish()
    os._exit(ExitCode.FINE)  # a compiler or a builder in another thread cannot be asked to end


def _measure(chosen: argparse.Namespace) -> int:
    if chosen.device == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(
            f"--device cuda: expected an NVIDIA card, got torch {torch.__version__} without one; run this where "
            "there is one, with a torch built for its driver"
        )
    config, device = SIZES[chosen.size](), torch.device(chosen.device)
    head = {
        "size": chosen.size,
        "config": asdict(config),
        "card": torch.cuda.get_device_name() if chosen.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "goals": GOALS,
    }
    report = Report(head, chosen.json, time.monotonic() + chosen.within_s)
    timer = threading.Timer(chosen.within_s, _stop, [report])
    timer.daemon = True
    timer.start()
    try:
        with tempfile.TemporaryDirectory() as folder:
            _fill(report, chosen, config, device, chosen.bundles or Path(folder))
    finally:
        timer.cancel()
    report.finish()
    return ExitCode.FINE


def _fill(report: Report, chosen: argparse.Namespace, config: VLAConfig, device: torch.device, bundles: Path) -> None:
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    policies = [
        policy_spec(config, chosen.size, views, PROMPT_LENGTH[chosen.size], chosen.seed) for views in chosen.views
    ]
    inputs = [make_inputs(policy, config, chosen.seed).to(device) for policy in policies]
    exact = build_model(config, chosen.seed, torch.float32).to(device)
    with torch.no_grad():
        references = [plain(exact, given).chunk()[0].cpu().numpy() for given in inputs]
    del exact
    model = build_model(config, chosen.seed, torch.bfloat16).to(device)
    dtype = "bfloat16" if device.type == "cuda" else "float32"  # onnxruntime on a CPU has no other kernels
    for n, (views, policy) in enumerate(zip(chosen.views, policies, strict=True)):
        report.views.append(found := {"views": views, "rows": {}})
        found |= roofline(model, policy, device, inputs[n].steps)
        bundle = partial(make_bundle, bundles / str(views), config, policy, chosen.seed, dtype)
        todo = list(ways(model, inputs[n], bundle, wait))
        compare(found, report, todo, references[n], chosen.rounds, chosen.calls if n == 0 else 0)


if __name__ == "__main__":
    sys.exit(main())
