"""The executors: when they infer, how they condition the next chunk, and what they make of it."""

from __future__ import annotations

import contextlib
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel
from support.bundles import demo_policy

from ki_vla_ros.engines.base import step_times
from ki_vla_ros.errors import ParameterError, SafetyRefusal
from ki_vla_ros.policy.guidance import guidance
from ki_vla_ros.records import ActionChunk
from ki_vla_ros.runtime.chunking import WARM_UP, ChunkExecutor, cubic, ensemble, resample, soft_mask
from ki_vla_ros.settings.names import settings_from_parameters
from ki_vla_ros.settings.settings import Settings

MS = 1_000_000
PERIOD = 50 * MS


def chosen(executor: str = "asynchronous", **changes: Any) -> Settings:
    return settings_from_parameters({"executor": executor, **changes})


def ramp(horizon: int = 16, start_ns: int = 0, slope: float = 1.0, offset: float = 0.0) -> ActionChunk:
    """Action k at offset + slope * (k + 1)."""
    position_HJ = offset + slope * np.arange(1.0, horizon + 1)[:, None]
    return ActionChunk(start_ns, PERIOD, ("a",), position_HJ, np.full_like(position_HJ, slope / 0.05))


def executor(max_prefix: int = 4) -> ChunkExecutor:
    return ChunkExecutor(16, PERIOD, max_prefix)


def running(chunk: ActionChunk, tick_ns: int = 0, max_prefix: int = 4) -> ChunkExecutor:
    made = executor(max_prefix)
    made.accept(chunk, tick_ns)
    return made


def test_the_first_tick_infers_and_the_next_after_the_execution_horizon() -> None:
    assert executor().wants_chunk(chosen(), 0, at_rest=True)
    settings = chosen(execution_horizon_s=0.3)
    made = running(ramp())
    # Half a tick early is accepted: ticks jitter, and a chunk missed by a hair would otherwise wait a whole tick.
    assert not made.wants_chunk(settings, 249 * MS, at_rest=False)
    assert made.wants_chunk(settings, 250 * MS, at_rest=False)


def test_synchronous_waits_for_rest_and_starts_when_the_chunk_is_ready() -> None:
    settings = chosen("synchronous", execution_horizon_s=0.2)
    made = running(ramp())
    assert not made.wants_chunk(settings, 900 * MS, at_rest=False)
    assert made.wants_chunk(settings, 10 * MS, at_rest=True)
    target = made.join(settings, ramp(), 500 * MS, 10 * MS)
    assert (target.horizon, target.start_ns) == (4, 510 * MS)
    np.testing.assert_array_equal(target.position_HJ[:, 0], [1, 2, 3, 4])


def test_asynchronous_keeps_the_chunks_times() -> None:
    target = executor().join(chosen(), ramp(), 120 * MS, 10 * MS)
    assert target.start_ns == 0
    np.testing.assert_array_equal(target.position_HJ, ramp().position_HJ)


@pytest.mark.parametrize("name", ["asynchronous", "temporal_ensemble", "rtc", "rtc_trained"])
def test_a_chunk_of_a_resting_arm_begins_when_the_arm_does(name: str) -> None:
    target = executor().join(chosen(name), ramp(), 120 * MS, 400 * MS, still=True)
    assert target.start_ns == 520 * MS
    np.testing.assert_array_equal(target.position_HJ, ramp().position_HJ)
    with pytest.raises(SafetyRefusal, match="inference takes longer than the chunk lasts"):
        executor().join(chosen(name), ramp(), 900 * MS, 10 * MS, still=True)


@pytest.mark.parametrize("name", ["asynchronous", "temporal_ensemble", "rtc", "rtc_trained"])
def test_a_chunk_whose_actions_have_all_passed_is_refused(name: str) -> None:
    with pytest.raises(SafetyRefusal, match="chunk: its last action was due 100 ms ago"):
        executor().join(chosen(name), ramp(), 900 * MS, 10 * MS)


def test_the_delay_counts_passed_actions_without_the_warm_up() -> None:
    made, settings = executor(), chosen("rtc")
    for n in range(WARM_UP):
        made.join(settings, ramp(start_ns=n * PERIOD), n * PERIOD + 600 * MS, 0)
    assert made.delay(settings) == 0
    for n in range(20):
        made.join(settings, ramp(start_ns=n * PERIOD), n * PERIOD + 140 * MS, 10 * MS)
    assert made.delay(settings) == 2  # actions due at 50 and 100 ms; the one at 150 is still ahead
    assert made.delay(chosen("rtc", inference_delay=5)) == 5


def test_rtc_mask_is_firm_then_falls_and_ends() -> None:
    mask = soft_mask(16, 4, 10)
    np.testing.assert_array_equal(mask[:4], 1.0)
    np.testing.assert_array_equal(mask[10:], 0.0)
    assert np.all(np.diff(mask[3:11]) < 0)
    share = (10 - 6) / (10 - 4 + 1)
    assert mask[6] == pytest.approx(share * (math.exp(share) - 1) / (math.e - 1))


def test_rtc_is_guided_by_the_running_chunk_at_the_new_ones_times() -> None:
    settings = chosen("rtc", inference_delay=2, guidance_weight=7.0)
    condition = running(ramp()).condition(settings, 200 * MS)
    assert condition is not None and not condition.clean and condition.strength == 7.0
    # The new chunk's action 0 is due at 250 ms, where the running one is at 5; it covers 12 of the new one's actions.
    np.testing.assert_allclose(condition.position_HJ[:12, 0], np.arange(5.0, 17.0))
    np.testing.assert_array_equal(condition.weight_H > 0, np.arange(16) < 12)
    np.testing.assert_array_equal(condition.weight_H[:2], 1.0)
    shorter = running(ramp()).condition(chosen("rtc", inference_delay=2, guidance_horizon_s=0.3), 200 * MS)
    assert shorter is not None and np.count_nonzero(shorter.weight_H) == 6


def test_rtc_trained_gives_at_most_as_many_clean_actions_as_trained() -> None:
    settings = chosen("rtc_trained", inference_delay=6)
    condition = running(ramp(), max_prefix=4).condition(settings, 0)
    assert condition is not None and condition.clean
    np.testing.assert_array_equal(condition.weight_H, np.arange(16) < 4)


def test_first_chunks_and_other_executors_are_unconditioned() -> None:
    assert executor().condition(chosen("rtc", inference_delay=2), 0) is None
    assert running(ramp()).condition(chosen("asynchronous"), 0) is None
    stopped = running(ramp())
    stopped.stop()
    assert stopped.condition(chosen("rtc", inference_delay=2), 0) is None and stopped.wants_chunk(chosen(), 1, False)


def test_ensemble_is_the_weighted_mean_of_all_chunks_at_an_instant() -> None:
    old, new = ramp(horizon=4), ramp(horizon=4, start_ns=2 * PERIOD, offset=12.0)
    mean = ensemble([old, new], decay=0.5)
    assert mean.start_ns == new.start_ns
    weight = math.exp(-0.5)
    # At 150 and 200 ms the old chunk is at 3 and 4, the new one at 13 and 14; later there is only the new one.
    expected = [(3 + weight * 13) / (1 + weight), (4 + weight * 14) / (1 + weight), 15.0, 16.0]
    np.testing.assert_allclose(mean.position_HJ[:, 0], expected)
    made, settings = executor(), chosen("temporal_ensemble", ensemble_decay=0.5)
    made.join(settings, old, 0, 0)
    np.testing.assert_allclose(made.join(settings, new, 2 * PERIOD, 0).position_HJ[:, 0], expected)


@pytest.mark.parametrize("decay", [-5.0, -0.7, 0.0, 0.01, 5.0])
def test_an_ensemble_of_many_chunks_has_its_weights_to_rounding(decay: float) -> None:
    """Exact arithmetic in place of exp(-decay * i), which is 0 for all, or infinite, with 200 chunks."""
    horizon = 200
    chunks = [ramp(horizon, start_ns=i * PERIOD, slope=0.001, offset=0.5 * (i % 3)) for i in range(horizon)]
    with np.errstate(all="raise", under="ignore"):
        mean = ensemble(chunks, decay)
    weights = [Fraction(math.exp(-decay)) ** i for i in range(horizon)]
    for k in (0, 1, 100, 198, 199):
        covering = range(k, horizon)  # chunk i ends i instants after the oldest
        value = [Fraction(float(resample(chunks[i], np.array([mean.due_ns(k)]))[0, 0])) for i in covering]
        wanted = sum(weights[i] * x for i, x in zip(covering, value, strict=True)) / sum(weights[i] for i in covering)
        assert mean.position_HJ[k, 0] == pytest.approx(float(wanted), abs=1e-9)
    assert np.isfinite(mean.velocity_HJ).all()


def bounds(model: type[BaseModel], prefix: str = "") -> dict[str, list[float]]:
    """Both bounds of every numeric setting, and a value between them."""
    found = {}
    for name, field in model.model_fields.items():
        least, most = (next((getattr(m, key) for m in field.metadata if hasattr(m, key)), None) for key in ("ge", "le"))
        if isinstance(field.default, BaseModel):
            found |= bounds(type(field.default), f"{prefix}{name}.")
        elif least is not None and most is not None:
            between = [(least + most) // 2 if isinstance(field.default, int) else (least + most) / 2]
            found[f"{prefix}{name}"] = [least, *between, most]
    return found


@pytest.mark.parametrize("name", ["synchronous", "asynchronous", "temporal_ensemble", "rtc", "rtc_trained"])
@pytest.mark.parametrize("horizon", [2, 16, 200])
def test_every_permitted_setting_gives_finite_actions_between_those_of_the_chunks(name: str, horizon: int) -> None:
    """Each numeric setting at its bounds and between them: refused by name for the bundle, or it works."""
    policy = demo_policy(horizon=horizon, max_prefix_delay=horizon - 1)
    tried = 0
    for setting, values in bounds(Settings).items():
        for value in values:
            settings = chosen(name, **{setting: value})
            with contextlib.suppress(ParameterError):
                settings.validate_against(policy)
                tried += 1
            made, rng = ChunkExecutor(horizon, PERIOD, horizon - 1), np.random.default_rng(0)
            with np.errstate(all="raise", under="ignore"):
                for tick in range(12):
                    now_ns = tick * 100 * MS
                    made.wants_chunk(settings, now_ns, at_rest=tick % 2 == 0)
                    condition = made.condition(settings, now_ns)
                    if condition is not None:
                        assert np.isfinite(condition.position_HJ).all() and (condition.weight_H <= 1.0).all()
                        assert (condition.weight_H >= 0.0).all()
                        for steps in (1, 2, 10, 100):
                            strengths = [guidance(t, condition.strength) for t in step_times(steps)]
                            assert np.isfinite(strengths).all() and max(strengths) <= 100.0
                    chunk = ramp(horizon, now_ns, slope=0.01 * rng.standard_normal(), offset=rng.standard_normal())
                    target = made.join(settings, chunk, now_ns, 0)
                    assert np.isfinite(target.position_HJ).all() and np.isfinite(target.velocity_HJ).all()
                    assert np.abs(target.position_HJ).max() < 20.0
                    made.accept(target, now_ns)
    assert tried > 60 or horizon < 16


def test_the_cubic_goes_through_the_actions_and_rests_after_the_last() -> None:
    chunk = ramp(horizon=4)
    due = np.array([chunk.due_ns(k) for k in range(4)])
    np.testing.assert_allclose(resample(chunk, due), chunk.position_HJ)
    position, velocity = cubic(chunk, np.array([25 * MS, 75 * MS, 400 * MS]))
    np.testing.assert_allclose(position[:, 0], [0.5, 1.5, 4.0])
    np.testing.assert_allclose(velocity[:, 0], [20.0, 20.0, 0.0])
    single = ramp(horizon=1)
    np.testing.assert_allclose(cubic(single, np.array([0, 50 * MS, 90 * MS]))[0][:, 0], [0.0, 1.0, 1.0])
