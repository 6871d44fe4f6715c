"""Real-time chunking's guidance in its two forms: with the identity for the Jacobian, and with the true one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.bundles import HORIZON, write_test_bundle
from support.exported import A, Made, draw

from ki_vla_ros.bundle.folder import Bundle
from ki_vla_ros.engines.base import KVCache
from ki_vla_ros.engines.onnx_engine import OnnxEngine
from ki_vla_ros.engines.torch_engine import TorchEngine
from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.policy.guidance import Guide, guidance
from ki_vla_ros.policy.policy import Policy
from ki_vla_ros.records import ModelInput
from ki_vla_ros.runtime.chunking import soft_mask
from ki_vla_ros.settings.names import settings_from_parameters

Array = NDArray[np.float32]


@pytest.fixture
def engine(made: Made) -> TorchEngine:
    return TorchEngine(made.bundle)


# --- the two forms, on flows whose Jacobian is known


class LinearFlow:
    """v = matrix @ x_t + offset over the flattened chunk, so the Jacobian of the predicted chunk is I - t * matrix."""

    description = "linear flow"

    def __init__(self, matrix: NDArray[np.float64], offset: NDArray[np.float64]) -> None:
        self.matrix, self.offset = matrix, offset
        self.pullbacks = 0

    def prefill(self, model_input: ModelInput) -> KVCache:
        return KVCache(self, 0)

    def velocity(self, cache: KVCache, state_S: Array | None, x_t_HA: Array, time: float, clean_H: Array) -> Array:
        return (self.matrix @ x_t_HA.ravel() + self.offset).reshape(x_t_HA.shape).astype(np.float32)

    def pullback(
        self, cache: KVCache, state_S: Array | None, x_t_HA: Array, time: float, clean_H: Array, vector_HA: Array
    ) -> Array:
        self.pullbacks += 1
        return (self.matrix.T @ vector_HA.ravel()).reshape(x_t_HA.shape).astype(np.float32)

    def close(self) -> None: ...


class StraightFlow(LinearFlow):
    """v = (x_t - target) / t: it predicts the target whatever x_t is, so the true Jacobian is 0."""

    def velocity(self, cache: KVCache, state_S: Array | None, x_t_HA: Array, time: float, clean_H: Array) -> Array:
        return ((x_t_HA - self.offset.reshape(x_t_HA.shape)) / time).astype(np.float32)

    def pullback(
        self, cache: KVCache, state_S: Array | None, x_t_HA: Array, time: float, clean_H: Array, vector_HA: Array
    ) -> Array:
        return vector_HA / np.float32(time)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_test_bundle(tmp_path_factory.mktemp("plain") / "bundle")


def soft_guide(action_HA: Array, strength: float = 5.0) -> Guide:
    return Guide(action_HA, soft_mask(HORIZON, 4, 12).astype(np.float32), False, strength)


@pytest.mark.parametrize("jacobian", ["identity", "exact"])
def test_both_forms_follow_their_formulas_on_a_linear_flow(plain: Bundle, jacobian: str) -> None:
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


def test_the_true_form_does_not_pull_what_the_flow_cannot_change(plain: Bundle) -> None:
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
    state = None if given.state_S is None else torch.from_numpy(given.state_S)[None]
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
    got = policy.denoise(policy.prefill(made.given), policy.noise(0), made.given.state_S, guide)
    expected = paper_chunk(made, policy.noise(0), guide, steps)
    assert got == pytest.approx(expected, abs=1e-4)
    free = policy.denoise(policy.prefill(made.given), policy.noise(0), made.given.state_S)
    assert np.abs(got - free).max() > 0.1


def test_both_forms_draw_a_chunk_towards_the_running_one(made: Made, engine: TorchEngine) -> None:
    """The running chunk is one that the model itself made from other noise.

    Measured over both models and these seeds: unguided, the first four actions lie up to 4.0 away; guided, at most 0.06
    (identity) or 0.11 (true). The two forms differ by up to 0.26 in single actions.
    """
    identity = Policy(made.bundle, engine)
    true = Policy(made.bundle, engine, guidance_jacobian="exact")
    state_S = made.given.state_S
    cache = engine.prefill(made.given)
    for seed in range(3):
        running = identity.denoise(cache, identity.noise(100 + seed), state_S)
        guide = soft_guide(running)
        chunks = [identity.denoise(cache, identity.noise(seed), state_S)]
        chunks += [policy.denoise(cache, policy.noise(seed), state_S, guide) for policy in (identity, true)]
        gaps = [float(np.abs(chunk - running)[:4].max()) for chunk in chunks]
        weighted = [float(np.sum(guide.weight_H[:, None] * (chunk - running) ** 2)) for chunk in chunks]
        apart = float(np.abs(chunks[1] - chunks[2]).max())
        print(f"seed {seed}: free {gaps[0]:.3f}, identity {gaps[1]:.3f}, true {gaps[2]:.3f}, forms apart {apart:.3f}")
        assert gaps[0] > 1.0 and gaps[1] < 0.15 and gaps[2] < 0.15
        assert weighted[1] < 0.1 * weighted[0] and weighted[2] < 0.1 * weighted[0]
        assert 1e-3 < apart < 0.5


# --- choosing it


def test_the_true_jacobian_needs_a_backward_pass(made: Made, plain: Bundle) -> None:
    wanted = settings_from_parameters({"guidance_jacobian": "exact", "engine": "torch"})
    wanted.validate_against(made.bundle.manifest)
    with pytest.raises(ConfigurationError, match=r"'guidance_jacobian': exact needs .* got engine onnx; set engine to"):
        settings_from_parameters({"guidance_jacobian": "exact"}).validate_against(made.bundle.manifest)
    with pytest.raises(ConfigurationError, match=r"expected an engine with a backward pass, got onnxruntime"):
        Policy(plain, OnnxEngine(plain), guidance_jacobian="exact")
