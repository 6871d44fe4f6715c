"""How a chunk of the full-size model can be computed on an NVIDIA card, for `training.speed.gpu`: the ways, by name.

The graphs as they are exported (training.export.graphs: merged matrices, flow time looked up) compiled within CUDA
graphs; the training classes (eager, compiled, and compiled within CUDA graphs); and a bundle of the same weights on
each engine. Each is built when its turn comes, and closed before the next one is.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from ki_vla_ros.bundle import Bundle, PolicySpec
from ki_vla_ros.engines import open_engine
from ki_vla_ros.engines.base import step_times
from ki_vla_ros.policy import Policy, longest_input
from ki_vla_ros.records import ModelInput
from ki_vla_ros.settings import settings_from_parameters
from training.export import PrefixTensors, arrange, as_batch, cast_weights, modulations
from training.export.random_weights import draw_weights
from training.model import VLA, Cache, VLAConfig
from training.speed.cpu import Actions
from training.weights import assemble

LEAST_TOKENS: Final = 256  # that every prompt's table has


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


def run_engine(bundle: Bundle, settings: Mapping[str, object], inputs: ChunkInputs) -> Runner:
    """A bundle through the policy, as the robot runs it: from images and tokens in memory, all of it checked."""
    threads = torch.get_num_threads()
    policy = Policy(bundle, open_engine(bundle, settings_from_parameters(settings)))
    torch.set_num_threads(threads)  # the torch engine's own are nobody else's
    given, noise_HA = inputs.given, inputs.noise_RHA[0].cpu().numpy()
    try:
        held = [policy.prefill(given)]
    except BaseException:
        policy.engine.close()
        raise

    def chunk() -> Actions:
        held[0] = policy.prefill(given)
        return policy.denoise(held[0], noise_HA, given.state_S)

    return Runner(chunk, lambda: policy.denoise(held[0], noise_HA, given.state_S), policy.engine.close)


def torch_ways(model: VLA, inputs: ChunkInputs, wait: Callable[[], None]) -> dict[str, Builder]:
    """The ways without a bundle, the likely fastest first. Their inputs lie on the device."""

    def compiler(function: Any) -> Any:
        return torch.compile(function, dynamic=False, fullgraph=True)

    found: dict[str, Callable[[], Way]]
    if inputs.noise_RHA.device.type == "cuda":
        found = {
            "arranged graphs, torch.compile + CUDA graph": lambda: captured(arranged(model, inputs, compiler)),
            "torch.compile + CUDA graph": lambda: captured(plain(model, inputs, compiler)),
            "torch.compile": lambda: plain(model, inputs, compiler),
            "eager": lambda: plain(model, inputs),
        }
    else:
        found = {
            "arranged graphs, eager": lambda: arranged(model, inputs),
            "eager": lambda: plain(model, inputs),
        }
    return {name: partial(run_way, build, wait) for name, build in found.items()}


def engine_settings(card: bool, cache: Path) -> dict[str, dict[str, object]]:
    """The engines on a bundle, by the names of their rows; `cache` takes the plans that are built."""
    provider = "cuda" if card else "cpu"
    return {
        "TensorRT": {"engine": "tensorrt", "provider": "cuda", "engine_cache": str(cache)},
        "TensorRT for RTX": {"engine": "tensorrt_rtx", "provider": "cuda", "engine_cache": str(cache)},
        "onnxruntime": {"engine": "onnx", "provider": provider},
        "torch engine": {"engine": "torch", "provider": provider},
    }


def versions() -> dict[str, str]:
    """Of what may be compared, where it is installed."""
    found = {"torch": str(torch.__version__)}
    for name in ("triton", "tensorrt", "tensorrt_rtx", "onnxruntime", "onnxruntime-gpu"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
