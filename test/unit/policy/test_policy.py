"""From model input to chunk: Euler steps against closed forms, the engine against plain onnxruntime sessions."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from support.bundles import (
    HORIZON,
    both_ways_policy,
    demo_observation,
    demo_policy,
    joint_fields,
    state_token_policy,
    write_test_bundle,
)

from ki_vla_ros.bundle.folder import EXPERT, PREFILL, TIME, Bundle
from ki_vla_ros.bundle.time_table import TimeTable
from ki_vla_ros.engines.base import KVCache
from ki_vla_ros.engines.onnx_engine import OnnxEngine
from ki_vla_ros.errors import ConfigurationError, EngineError
from ki_vla_ros.policy.policy import Policy
from ki_vla_ros.policy.preprocess import make_model_input, state_token, unnormalize
from ki_vla_ros.records import Condition, ModelInput

TEXT = "touch the red cube"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_test_bundle(tmp_path_factory.mktemp("policy") / "text")


@pytest.fixture(scope="module")
def state_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_test_bundle(tmp_path_factory.mktemp("policy") / "token", state_token_policy())


@pytest.fixture(scope="module")
def both_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_test_bundle(tmp_path_factory.mktemp("policy") / "both", both_ways_policy())


def test_the_state_may_enter_as_text_and_as_token(both_bundle: Bundle) -> None:
    """Each of the two ways alone changes the chunk."""
    policy = Policy(both_bundle, OnnxEngine(both_bundle))
    given = make_model_input(both_bundle.manifest, both_bundle.tokenizer, demo_observation(), TEXT)
    assert given.state_S is not None
    moved_J = demo_observation().state_S + 0.1
    moved = make_model_input(
        both_bundle.manifest, both_bundle.tokenizer, dataclasses.replace(demo_observation(), state_S=moved_J), TEXT
    )
    assert not np.array_equal(moved.tokens_L, given.tokens_L) and not np.array_equal(moved.state_S, given.state_S)
    chunks = [
        policy.denoise(policy.prefill(text), policy.noise(0), token.state_S)
        for text, token in ((given, given), (given, moved), (moved, given))
    ]
    assert not np.allclose(chunks[0], chunks[1]) and not np.allclose(chunks[0], chunks[2])


class StraightFlow:
    """An engine whose flow leads straight to `target`; it records the times it was asked for."""

    description = "straight flow"

    def __init__(self, target_HA: NDArray[np.float32]) -> None:
        self.target_HA = target_HA
        self.times: list[float] = []
        self.prefills = 0

    def prefill(self, model_input: ModelInput) -> KVCache:
        self.prefills += 1
        return KVCache(self, self.prefills)

    def velocity(
        self,
        cache: KVCache,
        state_S: NDArray[np.float32] | None,
        x_t_HA: NDArray[np.float32],
        time: float,
        clean_H: NDArray[np.bool_],
    ) -> NDArray[np.float32]:
        assert clean_H.shape == (HORIZON,) and not clean_H.any()
        self.times.append(time)
        return (x_t_HA - self.target_HA) / np.float32(time)

    def close(self) -> None:
        pass


@pytest.fixture
def target_HA() -> NDArray[np.float32]:
    return np.random.default_rng(5).uniform(-1, 1, (HORIZON, 7)).astype(np.float32)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 49])
def test_euler_walks_from_one_to_zero_in_equal_steps(
    bundle: Bundle, target_HA: NDArray[np.float32], steps: int
) -> None:
    engine = StraightFlow(target_HA)
    policy = Policy(bundle, engine, flow_steps=steps)
    actions_HA = policy.denoise(KVCache(engine, 0), policy.noise(0))
    assert engine.times == pytest.approx([(steps - i) / steps for i in range(steps)])
    assert actions_HA == pytest.approx(target_HA, abs=1e-5)
    assert actions_HA.dtype == np.float32


def test_one_prefill_serves_all_steps(bundle: Bundle, target_HA: NDArray[np.float32]) -> None:
    engine = StraightFlow(target_HA)
    Policy(bundle, engine).infer(demo_observation(), TEXT, 0)
    assert engine.prefills == 1 and len(engine.times) == bundle.manifest.flow.steps == 10


def test_flow_steps_may_change_between_chunks_and_are_at_least_one(
    bundle: Bundle, target_HA: NDArray[np.float32]
) -> None:
    engine = StraightFlow(target_HA)
    policy = Policy(bundle, engine, flow_steps=10)
    policy.flow_steps = 2
    policy.infer(demo_observation(), TEXT, 0)
    assert engine.times == [1.0, 0.5]
    with pytest.raises(ConfigurationError, match="flow_steps: expected at least 1, got 0"):
        Policy(bundle, engine, flow_steps=0)


def test_noise_depends_only_on_seed_and_index(bundle: Bundle, target_HA: NDArray[np.float32]) -> None:
    first, second = (Policy(bundle, StraightFlow(target_HA), noise_seed=seed) for seed in (3, 4))
    expected = np.random.default_rng((3, 1)).standard_normal((HORIZON, 7), dtype=np.float32)
    first.noise(0)
    assert np.array_equal(first.noise(1), expected)
    assert not np.array_equal(first.noise(2), expected)
    assert not np.array_equal(second.noise(1), expected)


def test_actions_are_unnormalised_and_relative_ones_start_at_the_state(
    tmp_path: Path, target_HA: NDArray[np.float32]
) -> None:
    joints = [joint_fields(axis) for axis in demo_policy().axes]
    joints[2]["relative"] = False
    policy = Policy(write_test_bundle(tmp_path / "mixed", demo_policy(joints=joints)), StraightFlow(target_HA))
    observation = demo_observation(stamp_ns=123)
    chunk = policy.decode(target_HA, observation)
    for k in range(HORIZON):
        for j in range(7):
            span = 0.04 if j == 6 else 0.4
            expected = float(target_HA[k, j]) * span + (0.0 if j == 2 else observation.state_S[j])
            assert chunk.position_HJ[k, j] == pytest.approx(expected, abs=1e-7)
    assert (chunk.start_ns, chunk.period_ns, chunk.due_ns(0)) == (123, 50_000_000, 123 + 50_000_000)
    assert chunk.joints == policy.bundle.manifest.axis_names


def test_velocities_are_central_differences_of_the_path_from_the_state(
    bundle: Bundle, target_HA: NDArray[np.float32]
) -> None:
    observation = demo_observation()
    chunk = Policy(bundle, StraightFlow(target_HA)).decode(target_HA, observation)
    path = np.vstack([observation.state_S, chunk.position_HJ])
    assert chunk.velocity_HJ.shape == (HORIZON, 7)
    for k in range(HORIZON - 1):
        assert chunk.velocity_HJ[k] == pytest.approx((path[k + 2] - path[k]) / 0.1)
    assert chunk.velocity_HJ[-1] == pytest.approx((path[-1] - path[-2]) / 0.05)


def test_a_joint_that_turns_without_end_takes_the_shortest_way(tmp_path: Path, target_HA: NDArray[np.float32]) -> None:
    """Its state may be some turns away from those that training saw: the model sees the same, and the arm goes on."""
    joints = [joint_fields(axis) | {"continuous": j in (0, 2)} for j, axis in enumerate(demo_policy().axes)]
    joints[2]["relative"] = False
    given = state_token_policy().model_copy(update={"robot": demo_policy(joints=joints).robot})
    policy = Policy(write_test_bundle(tmp_path / "turning", given), StraightFlow(target_HA))
    manifest, seen = policy.bundle.manifest, demo_observation()
    turns_J = 2 * np.pi * np.array([3, 0, -2, 0, 0, 0, 0])
    moved = dataclasses.replace(seen, state_S=seen.state_S + turns_J)
    np.testing.assert_allclose(state_token(manifest, moved.state_S), state_token(manifest, seen.state_S), atol=1e-6)
    there, here = policy.decode(target_HA, moved), policy.decode(target_HA, seen)
    np.testing.assert_allclose(there.position_HJ, here.position_HJ + turns_J, atol=1e-6)
    np.testing.assert_allclose(there.velocity_HJ, here.velocity_HJ, atol=1e-6)
    np.testing.assert_allclose(
        policy.encode(there.position_HJ, there.velocity_HJ, moved),
        policy.encode(here.position_HJ, here.velocity_HJ, seen),
        atol=1e-6,
    )
    # An absolute target just beyond pi, which training saw as just above -pi.
    high = np.float32(np.pi / 0.4)
    across_HA = np.zeros_like(target_HA)
    across_HA[:, 2] = [high * sign for sign in (0.99, -0.99)] * (HORIZON // 2)
    near = dataclasses.replace(seen, state_S=np.where(np.arange(7) == 2, 3.0, seen.state_S))
    assert np.ptp(policy.decode(across_HA, near).position_HJ[:, 2]) == pytest.approx(0.02 * np.pi, abs=1e-6)


def test_positions_that_are_not_finite_are_refused(bundle: Bundle, target_HA: NDArray[np.float32]) -> None:
    target_HA[3, 2] = np.nan
    with pytest.raises(EngineError, match="expected finite positions"):
        Policy(bundle, StraightFlow(target_HA)).decode(target_HA, demo_observation())


def test_stages_are_marked_in_order(bundle: Bundle) -> None:
    marks: list[str] = []
    Policy(bundle, OnnxEngine(bundle)).infer(demo_observation(), TEXT, 0, marks.append)
    assert marks == ["preprocess", "prefill", "denoise", "decode"]


def plain_chunk(bundle: Bundle, given: ModelInput, noise_HA: NDArray[np.float32], steps: int) -> NDArray[np.float32]:
    """The slow reference: sessions without binding, keys and values carried by hand."""
    prefill, expert = (
        onnxruntime.InferenceSession(str(bundle.path / name), providers=["CPUExecutionProvider"])
        for name in (PREFILL, EXPERT)
    )
    inputs = {"images": given.images_VCHW, "image_mask": given.image_mask_V}
    inputs |= {"tokens": given.tokens_L, "token_mask": given.token_mask_L}
    cache = dict(
        zip(("keys", "values", "prefix_mask"), prefill.run(["keys", "values", "prefix_mask"], inputs), strict=True)
    )
    state = {} if given.state_S is None else {"state": given.state_S}
    x_t_HA = noise_HA
    for step in range(steps):
        row_M = TimeTable(bundle.path / TIME, bundle.manifest.graph.modulation)[1 - step / steps]
        rest = {"clean": np.zeros(HORIZON, np.bool_), "step": np.full(1, 1 / steps, np.float32)}
        inputs = {**cache, **state, **rest, "x_t": x_t_HA, "modulation": row_M}
        velocity_HA, next_HA = expert.run(["velocity", "x_next"], inputs)
        x_t_HA = x_t_HA - np.float32(1.0 / steps) * velocity_HA
        assert next_HA == pytest.approx(x_t_HA, abs=1e-6)
    return np.asarray(x_t_HA)


@pytest.mark.parametrize("kind", ["text", "token", "both"])
def test_bound_buffers_give_what_plain_sessions_give(
    bundle: Bundle, state_bundle: Bundle, both_bundle: Bundle, kind: str
) -> None:
    chosen = {"text": bundle, "token": state_bundle, "both": both_bundle}[kind]
    policy = Policy(chosen, OnnxEngine(chosen), noise_seed=1)
    for index, instruction in enumerate((TEXT, "point at the blue ball", TEXT)):
        observation = demo_observation(seed=index)
        given = make_model_input(chosen.manifest, chosen.tokenizer, observation, instruction)
        expected_HA = plain_chunk(chosen, given, policy.noise(index), 10)
        assert np.array_equal(policy.denoise(policy.prefill(given), policy.noise(index), given.state_S), expected_HA)
        chunk = policy.infer(observation, instruction, index)
        stats = chosen.manifest.action
        absolute_HJ = unnormalize(expected_HA, stats.low, stats.high) + observation.state_S
        assert chunk.position_HJ == pytest.approx(absolute_HJ)


def test_chunks_depend_on_images_instruction_and_state(bundle: Bundle) -> None:
    policy, observation = Policy(bundle, OnnxEngine(bundle)), demo_observation()
    moved = dataclasses.replace(observation, state_S=observation.state_S + 0.2 * (np.arange(7) == 1))

    def motion(instruction: str, observed: object = observation) -> NDArray[np.float64]:
        chunk = policy.infer(observed, instruction, 0)  # type: ignore[arg-type]
        return chunk.position_HJ - observed.state_S  # type: ignore[attr-defined]

    reference = motion(TEXT)
    assert np.array_equal(motion(TEXT), reference)
    assert np.abs(motion("point at the blue ball") - reference).max() > 1e-4
    assert np.abs(motion(TEXT, demo_observation(seed=9)) - reference).max() > 1e-4
    assert np.abs(motion(TEXT, moved) - reference).max() > 1e-4


def test_keys_and_values_are_written_where_the_expert_reads_them(bundle: Bundle) -> None:
    engine = OnnxEngine(bundle)
    policy = Policy(bundle, engine)
    places = {name: buffer.data_ptr() for name, buffer in engine._buffers.items()}
    policy.infer(demo_observation(), TEXT, 0)
    assert {name: buffer.data_ptr() for name, buffer in engine._buffers.items()} == places
    assert np.abs(engine._buffers["keys"].numpy()).max() > 0


def test_the_caller_may_keep_velocities(bundle: Bundle) -> None:
    engine = OnnxEngine(bundle)
    policy = Policy(bundle, engine)
    cache = policy.prefill(make_model_input(bundle.manifest, bundle.tokenizer, demo_observation(), TEXT))
    clean_H = np.zeros(HORIZON, dtype=np.bool_)
    first = engine.velocity(cache, None, policy.noise(0), 1.0, clean_H)
    before = first.copy()
    engine.velocity(cache, None, policy.noise(1), 1.0, clean_H)
    assert np.array_equal(first, before)


def test_a_stale_cache_is_refused(bundle: Bundle) -> None:
    engine, other = OnnxEngine(bundle), OnnxEngine(bundle)
    given = make_model_input(bundle.manifest, bundle.tokenizer, demo_observation(), TEXT)
    policy = Policy(bundle, engine)
    old = engine.prefill(given)
    newest = engine.prefill(given)
    policy.denoise(newest, policy.noise(0))
    with pytest.raises(EngineError, match=r"newest prefill \(2\), got one of prefill 1"):
        policy.denoise(old, policy.noise(0))
    other.prefill(given)
    with pytest.raises(EngineError, match="of another engine"):
        policy.denoise(dataclasses.replace(newest, engine=other), policy.noise(0))


def test_a_closed_engine_is_refused(bundle: Bundle) -> None:
    engine = OnnxEngine(bundle)
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.prefill(make_model_input(bundle.manifest, bundle.tokenizer, demo_observation(), TEXT))


def test_inputs_of_another_shape_or_type_are_refused(bundle: Bundle) -> None:
    engine = OnnxEngine(bundle)
    given = make_model_input(bundle.manifest, bundle.tokenizer, demo_observation(), TEXT)
    with pytest.raises(EngineError, match=r"tokens: expected int64 \[32\], got int64 \[31\]"):
        engine.prefill(dataclasses.replace(given, tokens_L=given.tokens_L[:-1]))
    with pytest.raises(EngineError, match=r"images: expected float32 .*, got float64"):
        engine.prefill(dataclasses.replace(given, images_VCHW=given.images_VCHW.astype(np.float64)))


def test_an_unexpected_and_a_missing_state_are_refused(bundle: Bundle, state_bundle: Bundle) -> None:
    for chosen, state, message in (
        (bundle, np.zeros(7, np.float32), "expected none, the prompt has it as text, got one"),
        (state_bundle, None, "expected a state token, got none"),
    ):
        policy = Policy(chosen, OnnxEngine(chosen))
        given = make_model_input(chosen.manifest, chosen.tokenizer, demo_observation(), TEXT)
        with pytest.raises(EngineError, match=message):
            policy.denoise(policy.prefill(given), policy.noise(0), state)


def test_velocities_that_are_not_finite_are_refused(bundle: Bundle) -> None:
    engine = OnnxEngine(bundle)
    policy = Policy(bundle, engine)
    given = make_model_input(bundle.manifest, bundle.tokenizer, demo_observation(), TEXT)
    given.images_VCHW[0, 0, 0, 0] = np.nan
    with pytest.raises(EngineError, match="expected finite velocities"):
        policy.denoise(policy.prefill(given), policy.noise(0))


def test_a_token_beyond_the_table_is_an_error_not_a_crash(bundle: Bundle) -> None:
    engine = OnnxEngine(bundle)
    given = make_model_input(bundle.manifest, bundle.tokenizer, demo_observation(), TEXT)
    with pytest.raises(EngineError, match=r"prefill\.onnx: onnxruntime failed"):
        engine.prefill(dataclasses.replace(given, tokens_L=np.full(32, 10_000)))


def test_an_absent_provider_names_the_wheel(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match=r"expected one of .*got 'MagicProvider'"):
        OnnxEngine(bundle, provider="MagicProvider")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(EngineError, match=r"expected CUDAExecutionProvider.*install the wheel onnxruntime-gpu"):
        OnnxEngine(bundle, provider="CUDAExecutionProvider")
    with pytest.raises(EngineError, match=r"expected TensorrtExecutionProvider.*onnxruntime-gpu \(and TensorRT's lib"):
        OnnxEngine(bundle, provider="TensorrtExecutionProvider")


def test_half_precision_is_refused_where_it_has_no_kernels(bundle: Bundle) -> None:
    graph = bundle.manifest.graph.model_copy(update={"dtype": "bfloat16"})
    half = dataclasses.replace(bundle, manifest=bundle.manifest.model_copy(update={"graph": graph}))
    with pytest.raises(EngineError, match=r"expected a float32 bundle for CPUExec.*got bfloat16.*--dtype float32"):
        OnnxEngine(half)


def test_tensorrt_in_onnxruntime_caches_what_it_builds(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the CPU's provider exists here, so the test sees only what onnxruntime is asked for."""
    asked: list[object] = []

    class Stop(Exception):
        pass

    def session(path: str, options: object, providers: object) -> None:
        asked.append(providers)
        raise Stop(path)

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["TensorrtExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(OnnxEngine, "_allocate", lambda self, tensor: None)
    with pytest.raises(EngineError, match="TensorrtExecutionProvider cannot load it"):
        OnnxEngine(bundle, provider="TensorrtExecutionProvider", engine_cache=tmp_path / "cache")
    ((name, options),) = asked[0]  # type: ignore[misc, attr-defined]
    assert name == "TensorrtExecutionProvider" and (tmp_path / "cache").is_dir()
    assert options["trt_engine_cache_enable"] == "1" and options["trt_engine_cache_path"] == str(tmp_path / "cache")


def test_a_graph_that_onnxruntime_cannot_load_is_named(bundle: Bundle, tmp_path: Path) -> None:
    for name in (PREFILL, EXPERT):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(EngineError, match=r"prefill\.onnx: CPUExecutionProvider cannot load it"):
        OnnxEngine(dataclasses.replace(bundle, path=tmp_path))


@pytest.mark.parametrize("kind", ["text", "token"])
def test_warming_up_changes_nothing(bundle: Bundle, state_bundle: Bundle, kind: str) -> None:
    chosen = bundle if kind == "text" else state_bundle
    cold, warm = Policy(chosen, OnnxEngine(chosen)), Policy(chosen, OnnxEngine(chosen))
    warm.warm_up()
    observation = demo_observation()
    chunks = [policy.infer(observation, TEXT, 0) for policy in (cold, warm)]
    assert np.array_equal(chunks[0].position_HJ, chunks[1].position_HJ)


@pytest.mark.parametrize("executor", ["rtc", "rtc_trained"])
def test_a_model_wider_than_the_robot_sees_zeros_after_the_joints(tmp_path: Path, executor: str) -> None:
    wide = write_test_bundle(tmp_path / "wide", state_token_policy().model_copy(update={"pad_to": 9}))
    policy = Policy(wide, OnnxEngine(wide))
    observation = demo_observation()
    given = make_model_input(wide.manifest, wide.tokenizer, observation, TEXT)
    seen: list[NDArray[np.float32]] = []
    real = policy.engine.velocity

    def look(cache: KVCache, state_S: NDArray[np.float32], x_t_HA: NDArray[np.float32], *rest: object) -> object:
        seen.extend((state_S, x_t_HA))
        return real(cache, state_S, x_t_HA, *rest)  # type: ignore[arg-type]

    policy.engine.velocity = look  # type: ignore[assignment, method-assign]
    running = np.tile(observation.state_S, (HORIZON, 1))
    weight_H = (np.arange(HORIZON) < 3).astype(np.float64)
    guide = policy.guide(
        Condition(running, np.zeros_like(running), weight_H, executor == "rtc_trained", 5.0), observation
    )
    assert guide.action_HA.shape == (HORIZON, 9) and not guide.action_HA[:, 7:].any()
    actions_HA = policy.denoise(policy.prefill(given), policy.noise(0), given.state_S, guide)
    state_S, x_t_HA = seen[0], seen[1]
    assert state_S.shape == (9,) and not state_S[7:].any() and np.array_equal(state_S[:7], given.state_S)
    assert x_t_HA.shape == (HORIZON, 9) and np.abs(x_t_HA[3:, 7:]).min() > 0, "noise in all dimensions"
    chunk = policy.decode(actions_HA, observation)
    low, high = np.array(wide.manifest.action.low), np.array(wide.manifest.action.high)
    expected = (actions_HA[:, :7] + 1.0) / 2.0 * (high - low) + low + observation.state_S
    assert chunk.position_HJ == pytest.approx(expected)
