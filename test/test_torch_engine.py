"""The torch engine against onnxruntime and the model itself, and the two forms of real-time chunking's guidance."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import HORIZON, demo_observation, write_test_bundle
from checkpoints import write_checkpoint
from numpy.typing import NDArray
from robots import PolicyProcess, Robot, until

from ki_vla_ros.bundle import Bundle
from ki_vla_ros.chunking import soft_mask
from ki_vla_ros.engines import open_engine
from ki_vla_ros.engines.base import DifferentiableEngine, KVCache
from ki_vla_ros.engines.onnx_engine import OnnxEngine
from ki_vla_ros.engines.torch_engine import TorchEngine
from ki_vla_ros.errors import ConfigurationError, EngineError
from ki_vla_ros.policy import Guide, Policy, guidance
from ki_vla_ros.preprocess import ModelInput, make_model_input
from ki_vla_ros.settings import settings_from_parameters
from training.checkpoints import load_checkpoint
from training.export import TOLERANCE, ExportError, export_bundle, parity_error
from training.model.vla import VLA

pytestmark = pytest.mark.timeout(600)  # torch traces each graph in several seconds of one core, more on a busy machine
A = 7
Array = NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Made:
    model: VLA
    bundle: Bundle
    given: ModelInput


@pytest.fixture(scope="module", params=["text", "token"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = write_checkpoint(folder / "checkpoint", request.param)
    bundle = export_bundle(checkpoint, folder / "bundle", with_torch=True)
    given = make_model_input(bundle.manifest, bundle.tokenizer, demo_observation(), "touch the red cube")
    return Made(load_checkpoint(checkpoint).eval().requires_grad_(False), bundle, given)


@pytest.fixture
def engine(made: Made) -> TorchEngine:
    return TorchEngine(made.bundle)


def draw(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape or (HORIZON, A), dtype=np.float32)


NONE = np.zeros(HORIZON, dtype=np.bool_)  # no action is clean


# --- the same numbers


def test_it_computes_what_onnxruntime_and_the_model_compute(made: Made, engine: TorchEngine) -> None:
    policies = [Policy(made.bundle, engine), Policy(made.bundle, OnnxEngine(made.bundle))]
    for index, instruction in enumerate(("touch the red cube", "point at the blue ball", "touch the red cube")):
        given = make_model_input(made.bundle.manifest, made.bundle.tokenizer, demo_observation(seed=index), instruction)
        ours, theirs = (p.denoise(p.prefill(given), p.noise(index), given.state_J) for p in policies)
        assert ours.dtype == np.float32 and np.abs(ours).max() > 0.1
        assert ours == pytest.approx(theirs, abs=1e-4)
    # The same operations in the same order: on the machine of this test the difference was 0.
    assert parity_error(made.model, made.bundle, cases=2, engine=TorchEngine(made.bundle)) <= 1e-6


def test_parity_sees_a_small_difference(made: Made) -> None:
    changed = VLA(made.model.config).eval().requires_grad_(False)
    changed.load_state_dict(made.model.state_dict())
    changed.get_parameter("expert.layers.0.norm1.dense.weight").mul_(1.1)
    assert parity_error(changed, made.bundle, cases=1, engine=TorchEngine(made.bundle)) > TOLERANCE


def test_an_export_of_other_numbers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "text")
    right, wrong = TorchEngine.velocity, np.float32(1.001)
    monkeypatch.setattr(TorchEngine, "velocity", lambda self, *arguments: right(self, *arguments) * wrong)
    with pytest.raises(ExportError, match=r"parity: expected the graphs within 0\.0001 of torch, got 0\.00"):
        export_bundle(checkpoint, tmp_path / "bundle", with_torch=True)
    assert not (tmp_path / "bundle").exists()


def test_one_time_per_action_is_heeded(made: Made, engine: TorchEngine) -> None:
    """A clean prefix: time 0 in the first rows alone."""
    onnx = OnnxEngine(made.bundle)
    clean_H = np.arange(HORIZON) < 3
    ours, theirs = (
        e.velocity(e.prefill(made.given), made.given.state_J, draw(0), 0.6, clean_H) for e in (engine, onnx)
    )
    assert ours == pytest.approx(theirs, abs=1e-4)
    plain = engine.velocity(KVCache(engine, 1), made.given.state_J, draw(0), 0.6, NONE)
    assert np.abs(ours - plain).max() > 1e-3


# --- the backward pass


@pytest.mark.parametrize("t", [1.0, 0.5, 0.1])
def test_the_pullback_agrees_with_finite_differences(made: Made, engine: TorchEngine, t: float) -> None:
    """vector . dv/dx in each of the H * A directions; float32 leaves about 1e-7 / step of the quotient."""
    cache, state_J = engine.prefill(made.given), made.given.state_J
    x_t, vector, step = draw(1), draw(2), np.float32(1e-2)
    expected = np.zeros(HORIZON * A)
    for k in range(HORIZON * A):
        nudge = np.zeros(HORIZON * A, dtype=np.float32)
        nudge[k] = step
        ahead, behind = (
            engine.velocity(cache, state_J, x_t + sign * nudge.reshape(HORIZON, A), t, NONE) for sign in (1, -1)
        )
        expected[k] = np.sum((ahead.astype(np.float64) - behind) * vector) / (2.0 * float(step))
    got = engine.pullback(cache, state_J, x_t, t, NONE, vector)
    assert got.shape == (HORIZON, A) and got.dtype == np.float32 and np.abs(got).max() > 0.3
    assert got.ravel() == pytest.approx(expected, abs=2e-3 * np.abs(expected).max())


def test_the_pullback_is_linear_and_leaves_nothing_behind(made: Made, engine: TorchEngine) -> None:
    cache, state_J = engine.prefill(made.given), made.given.state_J
    assert isinstance(engine, DifferentiableEngine) and not isinstance(OnnxEngine(made.bundle), DifferentiableEngine)
    x_t, before = draw(1), engine.velocity(cache, state_J, draw(1), 0.5, NONE)
    first, second = (engine.pullback(cache, state_J, x_t, 0.5, NONE, draw(seed)) for seed in (3, 4))
    both = engine.pullback(cache, state_J, x_t, 0.5, NONE, draw(3) - 2 * draw(4))
    assert both == pytest.approx(first - 2 * second, abs=1e-4)
    assert np.array_equal(engine.velocity(cache, state_J, draw(1), 0.5, NONE), before)
    assert not any(tensor.requires_grad for tensor in engine.prefix.values())


# --- the two forms, on flows whose Jacobian is known


class LinearFlow:
    """v = matrix @ x_t + offset over the flattened chunk, so the Jacobian of the foresight is I - t * matrix."""

    description = "linear flow"

    def __init__(self, matrix: NDArray[np.float64], offset: NDArray[np.float64]) -> None:
        self.matrix, self.offset = matrix, offset
        self.pullbacks = 0

    def prefill(self, model_input: ModelInput) -> KVCache:
        return KVCache(self, 0)

    def velocity(self, cache: KVCache, state_J: Array | None, x_t_HA: Array, time: float, clean_H: Array) -> Array:
        return (self.matrix @ x_t_HA.ravel() + self.offset).reshape(x_t_HA.shape).astype(np.float32)

    def pullback(
        self, cache: KVCache, state_J: Array | None, x_t_HA: Array, time: float, clean_H: Array, vector_HA: Array
    ) -> Array:
        self.pullbacks += 1
        return (self.matrix.T @ vector_HA.ravel()).reshape(x_t_HA.shape).astype(np.float32)

    def close(self) -> None: ...


class StraightFlow(LinearFlow):
    """v = (x_t - target) / t: it foresees the target whatever x_t is, so the true Jacobian is 0."""

    def velocity(self, cache: KVCache, state_J: Array | None, x_t_HA: Array, time: float, clean_H: Array) -> Array:
        return ((x_t_HA - self.offset.reshape(x_t_HA.shape)) / time).astype(np.float32)

    def pullback(
        self, cache: KVCache, state_J: Array | None, x_t_HA: Array, time: float, clean_H: Array, vector_HA: Array
    ) -> Array:
        return vector_HA / np.float32(time)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_test_bundle(tmp_path_factory.mktemp("plain") / "bundle")


def soft_guide(action_HA: Array, strength: float = 5.0) -> Guide:
    return Guide(action_HA, soft_mask(HORIZON, 4, 12).astype(np.float32), False, strength)


@pytest.mark.parametrize("jacobian", ["identity", "exact"])
def test_both_forms_on_a_linear_flow_are_their_formulas(plain: Bundle, jacobian: str) -> None:
    rng, size = np.random.default_rng(0), HORIZON * A
    flow = LinearFlow(rng.standard_normal((size, size)) / size**0.5, rng.standard_normal(size))
    guide = soft_guide(draw(1))
    policy = Policy(plain, flow, flow_steps=5, guidance_jacobian=jacobian)  # type: ignore[arg-type]
    got = policy.denoise(KVCache(flow, 0), draw(2), None, guide)
    x = draw(2).astype(np.float64).ravel()
    weight = np.repeat(guide.weight_H.astype(np.float64), A)
    for t in (1.0, 0.8, 0.6, 0.4, 0.2):
        v = flow.matrix @ x + flow.offset
        error = weight * (guide.action_HA.ravel() - (x - t * v))
        transposed = np.eye(size) if jacobian == "identity" else (np.eye(size) - t * flow.matrix).T
        x = x - (v - float(guidance(t, 5.0)) * transposed @ error) / 5
    assert got.ravel() == pytest.approx(x, abs=1e-4)
    assert flow.pullbacks == (5 if jacobian == "exact" else 0)


def test_what_the_flow_cannot_change_the_true_form_does_not_pull(plain: Bundle) -> None:
    flow = StraightFlow(np.zeros((1, 1)), draw(1).astype(np.float64).ravel())
    guide, target = soft_guide(draw(1) + np.float32(0.5)), draw(1)
    true = Policy(plain, flow, guidance_jacobian="exact").denoise(KVCache(flow, 0), draw(2), None, guide)
    assert true == pytest.approx(target, abs=1e-4)
    identity = Policy(plain, flow).denoise(KVCache(flow, 0), draw(2), None, guide)
    assert np.abs(identity - target)[:4].min() > 0.1 and identity[12:] == pytest.approx(target[12:], abs=1e-4)


def test_a_clean_prefix_needs_no_backward_pass(plain: Bundle) -> None:
    flow = LinearFlow(np.zeros((HORIZON * A, HORIZON * A)), np.zeros(HORIZON * A))
    guide = Guide(draw(1), (np.arange(HORIZON) < 4).astype(np.float32), True, 0.0)
    Policy(plain, flow, guidance_jacobian="exact").denoise(KVCache(flow, 0), draw(2), None, guide)
    assert flow.pullbacks == 0


# --- the true form on the exported model


def paper_chunk(made: Made, noise_HA: Array, guide: Guide, steps: int) -> Array:
    """Algorithm 1 of arXiv 2506.07339 in its own time (tau from 0 to 1), on the model, by torch.func.vjp."""
    given = made.given
    arrays = (given.images_VCHW, given.image_mask_V, given.tokens_L, given.token_mask_L)
    cache = made.model.prefill(*(torch.from_numpy(array)[None] for array in arrays))
    state = None if given.state_J is None else torch.from_numpy(given.state_J)[None]
    wanted, weight = torch.from_numpy(guide.action_HA), torch.from_numpy(guide.weight_H)[:, None]

    def v_pi(action: torch.Tensor, tau: float) -> torch.Tensor:
        return -made.model.velocity(cache, action[None], torch.full((1, HORIZON), 1.0 - tau), state)[0]

    action = torch.from_numpy(noise_HA)
    for step in range(steps):
        tau = step / steps

        def foreseen(action: torch.Tensor, tau: float = tau) -> torch.Tensor:
            return action + (1.0 - tau) * v_pi(action, tau)

        ahead, vjp = torch.func.vjp(foreseen, action)
        (pull,) = vjp(weight * (wanted - ahead))
        r2 = (1.0 - tau) ** 2 / (tau**2 + (1.0 - tau) ** 2)
        strength = guide.strength if tau == 0.0 else min(guide.strength, (1.0 - tau) / (tau * r2))
        action = action + (v_pi(action, tau) + strength * pull) / steps
    return np.asarray(action)


@pytest.mark.parametrize(("steps", "strength"), [(10, 5.0), (5, 5.0), (10, 1.0)])
def test_the_true_form_is_the_papers_algorithm(made: Made, engine: TorchEngine, steps: int, strength: float) -> None:
    guide = soft_guide(0.5 * draw(5), strength)
    policy = Policy(made.bundle, engine, flow_steps=steps, guidance_jacobian="exact")
    got = policy.denoise(policy.prefill(made.given), policy.noise(0), made.given.state_J, guide)
    expected = paper_chunk(made, policy.noise(0), guide, steps)
    assert got == pytest.approx(expected, abs=1e-4)
    free = policy.denoise(policy.prefill(made.given), policy.noise(0), made.given.state_J)
    assert np.abs(got - free).max() > 0.1


def test_both_forms_draw_a_chunk_to_the_running_one(made: Made, engine: TorchEngine) -> None:
    """The running chunk is one that the model made itself, from other noise; measured over both models and these seeds:

    unguided, the first four actions lie up to 4.0 away; guided, at most 0.06 (identity) or 0.11 (true). The two forms
    differ by up to 0.26 in single actions.
    """
    identity = Policy(made.bundle, engine)
    true = Policy(made.bundle, engine, guidance_jacobian="exact")
    state_J = made.given.state_J
    cache = engine.prefill(made.given)
    for seed in range(3):
        running = identity.denoise(cache, identity.noise(100 + seed), state_J)
        guide = soft_guide(running)
        chunks = [identity.denoise(cache, identity.noise(seed), state_J)]
        chunks += [policy.denoise(cache, policy.noise(seed), state_J, guide) for policy in (identity, true)]
        gaps = [float(np.abs(chunk - running)[:4].max()) for chunk in chunks]
        weighted = [float(np.sum(guide.weight_H[:, None] * (chunk - running) ** 2)) for chunk in chunks]
        apart = float(np.abs(chunks[1] - chunks[2]).max())
        print(f"seed {seed}: free {gaps[0]:.3f}, identity {gaps[1]:.3f}, true {gaps[2]:.3f}, forms apart {apart:.3f}")
        assert gaps[0] > 1.0 and gaps[1] < 0.15 and gaps[2] < 0.15
        assert weighted[1] < 0.1 * weighted[0] and weighted[2] < 0.1 * weighted[0]
        assert 1e-3 < apart < 0.5


# --- refusals


def test_a_stale_or_foreign_cache_is_refused(made: Made, engine: TorchEngine) -> None:
    old, newest = engine.prefill(made.given), engine.prefill(made.given)
    for call in (engine.velocity, lambda *arguments: engine.pullback(*arguments, draw(0))):
        with pytest.raises(EngineError, match=r"newest prefill \(2\), got one of prefill 1"):
            call(old, made.given.state_J, draw(0), 1.0, NONE)
        with pytest.raises(EngineError, match="of another engine"):
            call(dataclasses.replace(newest, engine=object()), made.given.state_J, draw(0), 1.0, NONE)


def test_wrong_shapes_and_types_are_refused(made: Made, engine: TorchEngine) -> None:
    given, state_J = made.given, made.given.state_J
    with pytest.raises(EngineError, match=r"tokens: expected int64 \[32\], got int64 \[31\]"):
        engine.prefill(dataclasses.replace(given, tokens_L=given.tokens_L[:-1]))
    cache = engine.prefill(given)
    with pytest.raises(EngineError, match=r"x_t: expected float32 \[16, 7\], got float32 \[15, 7\]"):
        engine.velocity(cache, state_J, draw(0)[:-1], 1.0, NONE)
    with pytest.raises(EngineError, match=r"clean: expected bool \[16\], got float64 \[16\]"):
        engine.velocity(cache, state_J, draw(0), 1.0, np.ones(HORIZON))  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=r"vector: expected float32 \[16, 7\], got float32 \[7\]"):
        engine.pullback(cache, state_J, draw(0), 1.0, NONE, draw(0)[0])


def test_a_state_where_none_belongs_is_refused_and_a_missing_one_too(made: Made, engine: TorchEngine) -> None:
    state_J = None if made.given.state_J is not None else np.zeros(A, np.float32)
    message = "expected a state token, got none" if state_J is None else "the prompt has it as text, got one"
    cache = engine.prefill(made.given)
    with pytest.raises(EngineError, match=message):
        engine.velocity(cache, state_J, draw(0), 1.0, NONE)
    with pytest.raises(EngineError, match=message):
        engine.pullback(cache, state_J, draw(0), 1.0, NONE, draw(1))


def test_numbers_that_are_none_are_refused(made: Made, engine: TorchEngine) -> None:
    state_J, broken = made.given.state_J, draw(0)
    broken[2, 3] = np.nan
    cache = engine.prefill(made.given)
    with pytest.raises(EngineError, match="expected finite velocities"):
        engine.velocity(cache, state_J, broken, 1.0, NONE)
    with pytest.raises(EngineError, match="expected finite pullbacks"):
        engine.pullback(cache, state_J, draw(0), 1.0, NONE, broken)


def test_a_token_beyond_the_table_is_an_error_not_a_crash(made: Made, engine: TorchEngine) -> None:
    with pytest.raises(EngineError, match=r"prefill\.pt2: torch failed while running it"):
        engine.prefill(dataclasses.replace(made.given, tokens_L=np.full(32, 10_000)))


def test_a_closed_engine_is_refused(made: Made, engine: TorchEngine) -> None:
    cache = engine.prefill(made.given)
    engine.close()
    engine.close()
    for call in (
        lambda: engine.velocity(cache, made.given.state_J, draw(0), 1.0, NONE),
        lambda: engine.prefill(made.given),
    ):
        with pytest.raises(EngineError, match="expected an open one, got one that was closed"):
            call()


def test_an_absent_device_is_refused(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match="expected 'cpu' or 'cuda', got 'mps'"):
        TorchEngine(made.bundle, device="mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match=r"expected cuda, got torch .* install the wheel torch .* provider to cpu"):
        TorchEngine(made.bundle, device="cuda")


def test_velocities_are_the_callers_to_keep_and_inputs_stay(made: Made, engine: TorchEngine) -> None:
    cache, x_t = engine.prefill(made.given), draw(0)
    first = engine.velocity(cache, made.given.state_J, x_t, 1.0, NONE)
    before = first.copy()
    engine.velocity(cache, made.given.state_J, draw(1), 1.0, NONE)
    engine.pullback(cache, made.given.state_J, x_t, 1.0, NONE, draw(2))
    assert np.array_equal(first, before) and np.array_equal(x_t, draw(0))


# --- choosing it


def chosen(**parameters: object) -> Callable[[Bundle], object]:
    settings = settings_from_parameters(parameters)
    return lambda bundle: open_engine(bundle, settings)


def test_the_settings_choose_the_engine(made: Made, plain: Bundle) -> None:
    assert isinstance(chosen(engine="torch")(made.bundle), TorchEngine)
    assert isinstance(chosen()(made.bundle), OnnxEngine)
    with pytest.raises(EngineError, match=r"expected prefill\.pt2 for the torch engine.*training\.export --torch"):
        chosen(engine="torch")(plain)


def test_a_missing_library_names_its_wheel(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ki_vla_ros.engines.torch_engine")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(EngineError, match="expected the Python module torch, got none; install the wheel torch"):
        chosen(engine="torch")(made.bundle)
    monkeypatch.delitem(sys.modules, "ki_vla_ros.engines.onnx_engine")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineError, match="install the wheel onnxruntime"):
        chosen()(made.bundle)


@pytest.mark.filterwarnings("ignore:module 'sre_:DeprecationWarning")  # as in test_node.py
@pytest.mark.parametrize("made", ["text"], indirect=True)
def test_the_node_runs_the_true_form(
    robot: Robot, start: Callable[..., PolicyProcess], made: Made, tmp_path: Path
) -> None:
    program = tmp_path / "node.py"
    program.write_text(
        "import sys\n"
        "from ki_vla_ros import node\n"
        "from ki_vla_ros.engines.torch_engine import TorchEngine\n"
        "pullback = TorchEngine.pullback\n"
        "TorchEngine.pullback = lambda *given: (print('pulled', flush=True), pullback(*given))[1]\n"
        "sys.exit(node.main())\n"
    )
    chosen: dict[str, Any] = {"engine": "torch", "executor": "rtc", "guidance_jacobian": "exact"}
    policy = start(
        program=(str(program),),
        bundle=str(made.bundle.path),
        autostart=True,
        instruction="touch the red cube",
        limits__on_jump="clamp",
        limits__on_speed="clamp",
        limits__on_position="clamp",
        **chosen,
    )
    until(lambda: len(robot.chunks) >= 3 and "pulled" in policy.output)
    assert policy.stop() == 0, policy.output


def test_the_true_jacobian_needs_a_backward_pass(made: Made, plain: Bundle) -> None:
    wanted = settings_from_parameters({"guidance_jacobian": "exact", "engine": "torch"})
    wanted.validate_against(made.bundle.manifest)
    with pytest.raises(ConfigurationError, match=r"'guidance_jacobian': exact needs .* got engine onnx; set engine to"):
        settings_from_parameters({"guidance_jacobian": "exact"}).validate_against(made.bundle.manifest)
    with pytest.raises(ConfigurationError, match=r"expected an engine with a backward pass, got onnxruntime"):
        Policy(plain, OnnxEngine(plain), guidance_jacobian="exact")
