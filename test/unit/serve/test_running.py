"""The running chunk in an observation: a server goes on from it as an engine here does, or says what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from support.bundles import TASK, demo_observation, demo_policy, write_test_bundle
from support.loop_rig import Rig
from support.served import ask, open_policy, scripted, serving
from websockets.sync.client import connect

from ki_vla_ros.bundle import Bundle
from ki_vla_ros.errors import ConfigurationError, EngineError
from ki_vla_ros.policy import Guide
from ki_vla_ros.serve import RemotePolicy, ServerEngine, named_keys, open_remote, unpack
from ki_vla_ros.settings import Settings

LIMIT = demo_policy().max_prefix_delay


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_test_bundle(tmp_path_factory.mktemp("served") / "arm")


@pytest.fixture(scope="module")
def port(bundle: Bundle) -> Iterator[int]:
    with serving(open_policy(bundle)) as port:
        yield port


def remote(port: int, bundle: Bundle, executor: str = "rtc") -> RemotePolicy:
    engine = ServerEngine(f"ws://127.0.0.1:{port}", timeout_s=5.0)
    return RemotePolicy(bundle, engine, named_keys(bundle.manifest.robot), executor)


def guide_of(bundle: Bundle, clean: bool, seed: int = 0) -> Guide:
    manifest, rng = bundle.manifest, np.random.default_rng(seed)
    action_HA = np.zeros((manifest.horizon, manifest.graph.action_dim), np.float32)
    action_HA[:, : len(manifest.robot.actions)] = rng.uniform(-1, 1, (manifest.horizon, len(manifest.robot.actions)))
    soft_H = np.linspace(1.0, 0.0, manifest.horizon) ** 2
    weight_H = (np.arange(manifest.horizon) < 3) * 1.0 if clean else soft_H
    return Guide(action_HA, weight_H.astype(np.float32), clean, 0.0 if clean else 5.0)


@pytest.mark.parametrize("clean", [True, False])
def test_the_chunk_goes_on_from_the_running_one_as_with_an_engine_here(port: int, bundle: Bundle, clean: bool) -> None:
    theirs, ours, seen = remote(port, bundle), open_policy(bundle), demo_observation()
    theirs.warm_up()
    for k in range(2):
        guide = guide_of(bundle, clean, k)
        got_HA = theirs.denoise(theirs.see(seen, TASK), np.zeros(0, np.float32), None, guide)
        expected_HA = ours.sample(seen, TASK, k, guide=guide)
        np.testing.assert_allclose(got_HA, expected_HA, rtol=0, atol=2e-5)
        free_HA = ours.sample(seen, TASK, k)
        assert np.abs(got_HA - free_HA).max() > 0.05, "the guide counts"
        if clean:
            np.testing.assert_allclose(got_HA[:3], guide.action_HA[:3], rtol=0, atol=2e-5)
    theirs.engine.close()


def sent(bundle: Bundle, **changes: Any) -> dict[str, Any]:
    manifest, seen = bundle.manifest, demo_observation(image_size=8)
    shape = (manifest.horizon, len(manifest.robot.actions))
    running = {"actions": np.zeros(shape), "weight": np.zeros(shape[0]), "clean": False, "strength": 5.0} | changes
    message = named_keys(manifest.robot).message(seen, TASK, manifest.robot)
    return message | {"running": {key: value for key, value in running.items() if value is not None}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"actions": None}, "'running': expected actions, weight, clean, strength, got {"),
        ({"more": 1}, "'running': expected actions, weight, clean, strength, got {"),
        ({"actions": np.zeros((16, 6))}, "'running/actions': expected float [16, 7], got float64 [16, 6]"),
        ({"actions": np.full((16, 7), np.nan)}, "'running/actions': expected numbers from -1e+09 to 1e+09, got others"),
        ({"actions": np.full((16, 7), 1e300)}, "'running/actions': expected numbers from -1e+09 to 1e+09, got others"),
        ({"weight": np.zeros(15)}, "'running/weight': expected float [16], got float64 [15]"),
        ({"weight": np.full(16, 1.5)}, "'running/weight': expected numbers from 0 to 1, got others"),
        ({"weight": np.full(16, np.nan)}, "'running/weight': expected numbers from 0 to 1, got others"),
        ({"weight": 1.0}, "'running/weight': expected float [16], got 1.0"),
        ({"clean": 1}, "'running/clean': expected true or false, got 1"),
        ({"strength": -1.0}, "'running/strength': expected 0 to 1000, got -1.0"),
        ({"strength": float("nan")}, "'running/strength': expected 0 to 1000, got nan"),
        ({"strength": "5"}, "'running/strength': expected 0 to 1000, got '5'"),
        ({"clean": True, "weight": np.ones(16)}, f"expected at most {LIMIT} clean actions, on which the model was tra"),
    ],
)
def test_what_is_no_running_chunk_is_refused(port: int, bundle: Bundle, changes: dict[str, Any], said: str) -> None:
    with connect(f"ws://127.0.0.1:{port}") as connection:
        assert unpack(connection.recv(20))["running"] == LIMIT
        assert said in ask(connection, sent(bundle, **changes))
        assert "actions" in ask(connection, sent(bundle))


def test_a_server_that_does_not_take_it_is_refused_at_configure_and_held_later(bundle: Bundle) -> None:
    with scripted() as port:
        policy = remote(port, bundle)
        with pytest.raises(ConfigurationError, match="'executor': expected a server that takes the running chunk"):
            policy.warm_up()
        remote(port, bundle, "asynchronous").warm_up()
        with pytest.raises(EngineError, match="expected a server that takes the running chunk"):
            policy.denoise(policy.see(demo_observation(), TASK), np.zeros(0, np.float32), None, guide_of(bundle, True))
        policy.engine.close()


@pytest.mark.parametrize("said", [None, False, "4", -1])
def test_what_says_nothing_of_clean_actions_is_no_server_that_takes_it(bundle: Bundle, said: object) -> None:
    with (
        scripted(metadata={"running": said}) as port,
        pytest.raises(ConfigurationError, match="takes the running chunk"),
    ):
        remote(port, bundle).warm_up()


def test_clean_prefixes_need_a_server_whose_model_was_trained_on_as_many(bundle: Bundle) -> None:
    """rtc makes none clean, so it takes any."""
    with scripted(metadata={"running": LIMIT - 1}) as port:
        remote(port, bundle, "rtc").warm_up()
        said = f"rtc_trained: expected a server whose model was trained on clean prefixes of {LIMIT} .* got {LIMIT - 1}"
        with pytest.raises(ConfigurationError, match=said):
            remote(port, bundle, "rtc_trained").warm_up()
    with scripted(metadata={"running": LIMIT}) as port:
        remote(port, bundle, "rtc_trained").warm_up()


def test_the_executor_decides_whether_it_is_asked_for(bundle: Bundle) -> None:
    with scripted() as port:
        for executor, refused in (("rtc", True), ("rtc_trained", True), ("asynchronous", False)):
            policy = open_remote(bundle, Settings(policy_server=f"ws://127.0.0.1:{port}", executor=executor))
            with pytest.raises(ConfigurationError, match="takes the running chunk") if refused else nullcontext():
                policy.warm_up()
            policy.engine.close()


@pytest.mark.parametrize("executor", ["rtc", "rtc_trained"])
def test_the_loop_sends_what_runs_and_goes_on_from_it(
    port: int, bundle: Bundle, executor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, asked = remote(port, bundle), []
    ask_server = policy.engine.ask  # type: ignore[attr-defined]
    monkeypatch.setattr(policy.engine, "ask", lambda message: (asked.append(message), ask_server(message))[1])
    clamp = {f"limits.on_{rule}": "clamp" for rule in ("position", "jump", "speed")}
    rig = Rig(bundle, policy, executor=executor, inference_delay=2, **clamp)
    rig.run_ticks(4, lambda _: rig.give_inputs())
    policy.engine.close()
    assert [tick["hold"] for tick in rig.wire.ticks] == [None] * 4
    assert "running" not in asked[0] and all("running" in message for message in asked[2:])
    assert all(message["running"]["clean"] == (executor == "rtc_trained") for message in asked[2:])
