"""All steps of a chunk without the host in between, compiled programs, and CUDA graphs on a double of the card."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support import ROOT
from support.bundles import HORIZON
from support.exported import NONE, A, Made, draw
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ki_vla_ros.bundle.folder import EXPERT, PREFILL, PROGRAMS
from ki_vla_ros.bundle.pt2 import Operation, Program, read_program
from ki_vla_ros.engines import torch_engine
from ki_vla_ros.engines.base import IntegratingEngine, step_times
from ki_vla_ros.engines.onnx_engine import OnnxEngine
from ki_vla_ros.engines.torch_engine import TorchEngine
from ki_vla_ros.engines.torch_program import Interpreter, compile_program, graph_module
from ki_vla_ros.engines.torch_stream import GraphCall, HostStream
from ki_vla_ros.errors import BundleError, EngineError
from ki_vla_ros.policy.guidance import Guide
from ki_vla_ros.policy.policy import Policy
from ki_vla_ros.settings.names import parameter_specs

pytestmark = pytest.mark.slow  # torch compiles
CPU = torch.device("cpu")
Array = NDArray[np.float32]
CLEAN = np.arange(HORIZON) < 4


@pytest.fixture
def engine(made: Made) -> TorchEngine:
    return TorchEngine(made.bundle)


def by_velocity(made: Made, engine: TorchEngine, x_t: Array, steps: int, clean: NDArray[np.bool_] = NONE) -> Array:
    """The chunk as a host computes it from single steps."""
    cache = engine.prefill(made.given)
    for t in step_times(steps):
        v_t = engine.velocity(cache, made.given.state_S, x_t, t, clean)
        x_t = np.where(clean[:, None], x_t, x_t - np.float32(1.0 / steps) * v_t)
    return x_t


# --- all steps


@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize("clean", [NONE, CLEAN], ids=["free", "clean prefix"])
def test_all_steps_at_once_are_the_single_steps_bit_for_bit(
    made: Made, engine: TorchEngine, steps: int, clean: NDArray[np.bool_]
) -> None:
    x_t = draw(0)
    got = engine.integrate(engine.prefill(made.given), made.given.state_S, x_t, steps, clean)
    assert got.dtype == np.float32 and got.tobytes() == by_velocity(made, engine, x_t, steps, clean).tobytes()
    assert np.array_equal(got[clean], x_t[clean]) and np.abs(got - x_t)[~clean].max() > 0.1
    assert np.array_equal(x_t, draw(0))


def test_all_steps_agree_with_the_policys_own_loop(made: Made) -> None:
    """The policy divides by the number of steps, the graph multiplies: equal to the bit only for powers of two."""
    guide = Guide(draw(1), CLEAN.astype(np.float32), True, 0.0)
    for steps, atol in ((8, 0.0), (10, 1e-6)):
        at_once = Policy(made.bundle, TorchEngine(made.bundle), flow_steps=steps)
        looped = Policy(made.bundle, TorchEngine(made.bundle), flow_steps=steps)
        looped._integrating = None
        for given in (None, guide):
            ours, theirs = (
                p.denoise(p.prefill(made.given), p.noise(3), made.given.state_S, given) for p in (at_once, looped)
            )
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


def test_the_policy_takes_all_steps_at_once_unless_it_guides_each(
    made: Made, engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(engine, IntegratingEngine)
    policy, called = Policy(made.bundle, engine), []
    for name in ("velocity", "integrate"):
        method = getattr(TorchEngine, name)
        monkeypatch.setattr(TorchEngine, name, lambda *a, m=method, n=name: called.append(n) or m(*a))
    cache = policy.prefill(made.given)
    policy.denoise(cache, policy.noise(0), made.given.state_S)
    assert called == ["integrate"]
    policy.denoise(cache, policy.noise(0), made.given.state_S, Guide(draw(1), np.ones(HORIZON, np.float32), False, 5.0))
    assert called[1:] == ["velocity"] * policy.flow_steps


def test_the_same_inputs_give_the_same_bytes(made: Made, engine: TorchEngine) -> None:
    def chunk(engine: TorchEngine, steps: int) -> bytes:
        cache = engine.prefill(made.given)
        return engine.integrate(cache, made.given.state_S, draw(0), steps, NONE).tobytes()

    first = chunk(engine, 10)
    assert chunk(engine, 4) != first and chunk(engine, 10) == first and chunk(TorchEngine(made.bundle), 10) == first


def test_bad_actions_stale_caches_and_a_closed_engine_are_refused(made: Made, engine: TorchEngine) -> None:
    state_S, broken = made.given.state_S, draw(0)
    broken[1, 1] = np.inf
    old, cache = engine.prefill(made.given), engine.prefill(made.given)
    with pytest.raises(EngineError, match="expected finite actions"):
        engine.integrate(cache, state_S, broken, 10, NONE)
    with pytest.raises(EngineError, match="got one of prefill 1"):
        engine.integrate(old, state_S, draw(0), 10, NONE)
    with pytest.raises(EngineError, match=r"x_t: expected float32 \[16, 7\], got float32 \[16, 6\]"):
        engine.integrate(cache, state_S, draw(0, HORIZON, A - 1), 10, NONE)
    engine.close()
    for call in (lambda: engine.integrate(cache, state_S, draw(0), 10, NONE), engine.synchronize):
        with pytest.raises(EngineError, match="expected an open one"):
            call()


# --- compiled


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_engine_computes_what_the_others_do(
    made: Made, engine: TorchEngine, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch makes of the operations, without the last stage, which the next test covers."""
    monkeypatch.setattr(torch_engine, "compile_program", lambda program: compile_program(program, backend))
    compiled = TorchEngine(made.bundle, mode="compile")
    assert ", compile, " in compiled.description
    chunks = []
    for own in (compiled, engine, OnnxEngine(made.bundle)):
        policy = Policy(made.bundle, own)
        chunks.append(policy.denoise(policy.prefill(made.given), policy.noise(0), made.given.state_S))
    assert chunks[0] == pytest.approx(chunks[1], abs=1e-6) and chunks[0] == pytest.approx(chunks[2], abs=1e-4)
    cache = compiled.prefill(made.given)
    at_once = compiled.integrate(cache, made.given.state_S, draw(0), 3, CLEAN)
    assert at_once.tobytes() == by_velocity(made, compiled, draw(0), 3, CLEAN).tobytes()
    pulled = [
        e.pullback(e.prefill(made.given), made.given.state_S, draw(0), 0.5, NONE, draw(1)) for e in (compiled, engine)
    ]
    assert np.array_equal(*pulled)


def expert(made: Made) -> tuple[Interpreter, dict[str, torch.Tensor]]:
    program = read_program(made.bundle.path / PROGRAMS[EXPERT])
    engine = TorchEngine(made.bundle)
    engine.integrate(engine.prefill(made.given), made.given.state_S, draw(0), 10, CLEAN)
    return Interpreter(program, CPU), engine._inputs | engine.prefix


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own use
# torch imports distutils once in a process, whichever test comes first.
@pytest.mark.filterwarnings("ignore:The distutils package is deprecated:DeprecationWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles C++ with g++, which is not here")
@pytest.mark.parametrize("made", ["token"], indirect=True)
def test_inductor_compiles_the_expert(made: Made) -> None:
    interpreter, inputs = expert(made)
    with torch.no_grad():
        compiled = compile_program(interpreter)
        for ours, theirs in zip(compiled(inputs), interpreter(inputs), strict=True):
            assert float(theirs.abs().max()) > 0.5
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("made", ["token"], indirect=True)
def test_a_missing_compiler_is_named(made: Made, tmp_path: Path) -> None:
    """In a separate process: torch looks for a compiler only once."""
    program = (
        "import sys, torch\n"
        "from ki_vla_ros.engines.torch_program import Interpreter, compile_program\n"
        "from ki_vla_ros.bundle.pt2 import read_program\n"
        "program = read_program(__import__('pathlib').Path(sys.argv[1]))\n"
        "run = compile_program(Interpreter(program, torch.device('cpu')))\n"
        "run({name: torch.zeros(t.shape, dtype=getattr(torch, t.dtype)) for name, t in program.inputs.items()})\n"
    )
    nothing = {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}  # nor what was compiled before
    command = [sys.executable, "-c", program, str(made.bundle.path / PROGRAMS[EXPERT])]
    ended = subprocess.run(command, env=os.environ | nothing, cwd=ROOT, capture_output=True, text=True)
    *_, last = ended.stderr.strip().splitlines()
    assert re.search(r"EngineError: .*expert\.pt2: torch .* could not compile it \(.*No working C\+\+ compiler", last)
    assert last.endswith(
        "needs a C++ compiler (g++, or what CXX says): install what is missing, or set torch_mode to eager"
    )


def test_a_process_that_switched_compiling_off_is_refused(made: Made) -> None:
    import torch._dynamo.config

    with (
        torch._dynamo.config.patch(disable=True),
        pytest.raises(EngineError, match=r"switched off; unset TORCHDYNAMO_DISABLE .* or set torch_mode to eager"),
    ):
        TorchEngine(made.bundle, mode="compile")


@pytest.mark.parametrize("made", ["text"], indirect=True)
def test_no_text_of_a_program_becomes_source(made: Made) -> None:
    """torch.fx writes Python from names; those in a file may be anything."""
    program = read_program(made.bundle.path / PROGRAMS[PREFILL])
    source = graph_module(Interpreter(program, CPU)).code
    assert not [name for name in (*program.inputs, *program.weights) if name in source]
    first = program.operations[0]
    evil = Operation(first.operator, first.arguments, {"x=print('owned'), y": 1}, first.outputs)
    fields = {name: getattr(program, name) for name in Program.__slots__}
    broken = Program(**fields | {"operations": (evil, *program.operations[1:])})
    with pytest.raises(
        BundleError, match=r"prefill\.pt2: .*: expected options of \[.*\], got \"x=print\('owned'\), y\""
    ):
        graph_module(Interpreter(broken, CPU))


# --- CUDA graphs, on a double


class Recording(TorchDispatchMode):
    """A CUDA graph for the CPU: operations on tensors at fixed places, repeated without the Python around them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def repeat(self) -> None:
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for place, value in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if place.data_ptr() != value.data_ptr():  # a view has its numbers already
                    place.copy_(value)


class DoubledStream(HostStream):
    """A double of `CudaStream` that needs no card: it records the order of calls, and captures into a `Recording`."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []

    def upload(self, name: str, array: NDArray[np.generic]) -> None:
        self.log.append(name)
        super().upload(name, array)

    def download(self, tensor: torch.Tensor) -> Array:
        self.log.append("wait")
        return super().download(tensor)

    def capture(self, work: GraphCall) -> GraphCall:
        self.log.append("capture")
        with Recording() as recording:
            outputs = work()
        for output in outputs:
            output.fill_(1) if output.dtype == torch.bool else output.fill_(np.nan)  # capturing computes nothing

        def replay() -> list[torch.Tensor]:
            self.log.append("replay")
            recording.repeat()
            return outputs

        return replay


def test_a_tick_is_two_replays_and_one_wait(made: Made) -> None:
    stream = DoubledStream()
    engine, plain = TorchEngine(made.bundle, mode="graph", stream=stream), TorchEngine(made.bundle)
    state = ["state"] if made.given.state_S is not None else []

    def tick(seed: int, steps: int) -> tuple[list[str], int]:
        stream.log.clear()
        chunks = []
        for own in (engine, plain):
            cache = own.prefill(made.given)
            chunks.append(own.integrate(cache, made.given.state_S, draw(seed), steps, CLEAN))
        assert chunks[0].tobytes() == chunks[1].tobytes()
        return [*stream.log], engine.prefix["keys"].data_ptr()

    images = ["images", "image_mask", "tokens", "token_mask"]
    actions = ["x_t", "clean", "step", *state]
    first, keys_at = tick(0, 10)
    assert first == [*images, "capture", "replay", *actions, "capture", "replay", "wait"]
    expected = [*images, "replay", *actions, "replay", "wait"]
    assert tick(1, 10) == (expected, keys_at) and tick(2, 10) == (expected, keys_at)
    again = [*images, "replay", *actions, "capture", "replay", "wait"]
    assert tick(3, 4) == (again, keys_at) and tick(4, 4) == (expected, keys_at) and tick(5, 10) == (again, keys_at)


def test_a_captured_engine_follows_every_input(made: Made) -> None:
    stream = DoubledStream()
    engine, plain = TorchEngine(made.bundle, mode="graph", stream=stream), TorchEngine(made.bundle)
    state_S = made.given.state_S
    for seed, t in ((0, 1.0), (1, 0.3), (2, 0.7)):
        pictures = np.clip(draw(seed, *made.given.images_VCHW.shape), -1, 1)
        given = type(made.given)(
            pictures, made.given.image_mask_V, np.roll(made.given.tokens_L, seed), made.given.token_mask_L, state_S
        )
        state_S = None if state_S is None else state_S + np.float32(0.1 * seed)
        clean_H = np.arange(HORIZON) < seed
        outcomes = []
        for own in (engine, plain):
            cache = own.prefill(given)
            outcomes.append(
                [
                    own.velocity(cache, state_S, draw(seed), t, clean_H),
                    own.integrate(cache, state_S, draw(seed), 5, clean_H),
                    own.pullback(cache, state_S, draw(seed), t, clean_H, draw(9)),
                    own.velocity(cache, state_S, draw(seed + 50), t, clean_H),
                ]
            )
        for ours, theirs in zip(*outcomes, strict=True):
            assert ours.tobytes() == theirs.tobytes()
    assert stream.log.count("capture") == 3, "prefill, one step, all steps"


def test_graphs_need_a_card(made: Made) -> None:
    for mode in ("graph", "compile_graph"):
        with pytest.raises(
            EngineError, match=rf"torch_mode {mode}: expected provider cuda.*set torch_mode to eager or"
        ):
            TorchEngine(made.bundle, mode=mode)  # type: ignore[arg-type]


def test_the_mode_changes_only_at_configure() -> None:
    (spec,) = (spec for spec in parameter_specs() if spec.name == "torch_mode")
    assert spec.default == "auto" and not spec.changeable and "compile_graph" in spec.description
