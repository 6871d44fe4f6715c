"""What the flow makes of a condition: clean rows stay, soft rows pull, and no condition changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.bundles import HORIZON, demo_observation, write_test_bundle

from ki_vla_ros.bundle.folder import Bundle
from ki_vla_ros.engines.onnx_engine import OnnxEngine
from ki_vla_ros.policy.guidance import Guide, guidance
from ki_vla_ros.policy.policy import Policy
from ki_vla_ros.policy.preprocess import make_model_input
from ki_vla_ros.records import Condition

TEXT = "touch the red cube"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_test_bundle(tmp_path_factory.mktemp("guidance") / "text")


def denoise(bundle: Bundle, guide: Guide | None) -> NDArray[np.float32]:
    policy = Policy(bundle, OnnxEngine(bundle))
    given = make_model_input(bundle.manifest, bundle.tokenizer, demo_observation(), TEXT)
    return policy.denoise(policy.prefill(given), policy.noise(0), given.state_S, guide)


def wanted(bundle: Bundle) -> NDArray[np.float32]:
    return (denoise(bundle, None) + 0.5).astype(np.float32)


def test_the_weight_of_the_guidance() -> None:
    """min(beta, (1 - tau) / tau * (tau^2 + (1 - tau)^2) / (1 - tau)^2) at tau = 1 - t."""
    for t in (0.1, 0.5, 0.9):
        tau = 1.0 - t
        paper = (1 - tau) / tau * (tau**2 + (1 - tau) ** 2) / (1 - tau) ** 2
        assert guidance(t, 1e9) == pytest.approx(paper, rel=1e-6)
    assert guidance(1.0, 5.0) == 5.0 and guidance(0.9, 5.0) == 5.0
    assert guidance(0.5, 5.0) == pytest.approx(2.0)


def test_clean_rows_enter_every_step_as_given_with_time_zero(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    weight_H = (np.arange(HORIZON) < 4).astype(np.float32)
    given, seen = wanted(bundle), []
    real = OnnxEngine.velocity

    def look(self: OnnxEngine, cache: Any, state_S: Any, x_t_HA: Any, time: float, clean_H: Any) -> Any:
        seen.append((x_t_HA.copy(), time, clean_H.copy()))
        return real(self, cache, state_S, x_t_HA, time, clean_H)

    monkeypatch.setattr(OnnxEngine, "velocity", look)
    found = denoise(bundle, Guide(given, weight_H, True, 0.0))
    np.testing.assert_array_equal(found[:4], given[:4])
    for step, (x_t_HA, time, clean_H) in enumerate(seen):
        np.testing.assert_array_equal(x_t_HA[:4], given[:4])
        np.testing.assert_array_equal(clean_H, weight_H == 1.0)
        assert time == 1.0 - step / 10 and x_t_HA.dtype == np.float32


def test_guided_rows_come_near_the_guide_and_free_ones_hardly_move(bundle: Bundle) -> None:
    free = denoise(bundle, None)
    weight_H = np.where(np.arange(HORIZON) < 6, 1.0, 0.0).astype(np.float32)
    gaps = []
    for strength in (0.0, 1.0, 5.0):
        found = denoise(bundle, Guide(wanted(bundle), weight_H, False, strength))
        gaps.append(float(np.abs(found[:6] - wanted(bundle)[:6]).mean()))
        if strength == 0.0:
            np.testing.assert_array_equal(found, free)
    assert gaps[0] == pytest.approx(0.5, abs=1e-5) and gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 0.3


def test_a_condition_becomes_relative_to_the_new_observation(bundle: Bundle) -> None:
    policy = Policy(bundle, OnnxEngine(bundle))
    observation = demo_observation()
    chunk = policy.infer(observation, TEXT, 0)
    moved = demo_observation()
    moved.state_S[:] += 0.05
    guide = policy.guide(Condition(chunk.position_HJ, chunk.velocity_HJ, np.ones(HORIZON), True), moved)
    again = policy.decode(guide.action_HA, moved)
    np.testing.assert_allclose(again.position_HJ, chunk.position_HJ, atol=1e-5)
