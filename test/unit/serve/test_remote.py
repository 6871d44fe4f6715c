"""The other side: a policy whose chunks a server computes, and what servers may do wrong."""

from __future__ import annotations

import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.between import Between
from support.bundles import JOINTS, demo_observation, demo_policy, write_test_bundle
from support.loop_rig import Rig
from support.served import TASK, after, bench_bundle, open_policy, openpis, scripted, serving

from ki_vla_ros.bundle import Bundle
from ki_vla_ros.engines import open_engine
from ki_vla_ros.errors import ConfigurationError, EngineError, InstructionError, ParameterError
from ki_vla_ros.policy import Policy
from ki_vla_ros.records import CameraFrame, Observation
from ki_vla_ros.robot import find_robot, read_robot
from ki_vla_ros.serve import RemotePolicy, ServerEngine, find_keys, named_keys, open_remote, read_keys
from ki_vla_ros.serve.remote import LARGEST_ANSWER
from ki_vla_ros.settings import Settings

BUNDLE = bench_bundle()
ROBOT = BUNDLE.manifest.robot
SHAPE = (BUNDLE.manifest.horizon, len(ROBOT.actions))
GOOD = {"actions": np.zeros(SHAPE)}
TOKEN = "a token of twenty-four"


def remote_policy(port: int, bundle: Bundle = BUNDLE, token: str = "", timeout_s: float = 5.0) -> RemotePolicy:
    engine = ServerEngine(f"ws://127.0.0.1:{port}", token, timeout_s)
    return RemotePolicy(bundle, engine, named_keys(bundle.manifest.robot))


def observation(seed: int = 0) -> Observation:
    rng = np.random.default_rng(seed)
    frames = {
        name: CameraFrame(name, 0, rng.integers(0, 256, (240, 320, 3)).astype(np.uint8)) for name in ROBOT.camera_names
    }
    return Observation(0, frames, rng.uniform(-0.5, 0.5, len(ROBOT.state)))


def test_chunks_of_a_server_are_those_of_the_engine() -> None:
    with serving(open_policy(BUNDLE), token=TOKEN) as port:
        theirs, ours = remote_policy(port, token=TOKEN), open_policy(BUNDLE)
        theirs.warm_up()
        for chunk_index in range(3):
            seen = observation(chunk_index)
            got = theirs.infer(seen, TASK, 77)  # the server counts itself
            expected = ours.infer(seen, TASK, chunk_index)
            np.testing.assert_allclose(got.position_HJ, expected.position_HJ, rtol=0, atol=1e-6)
        theirs.engine.close()


@pytest.mark.parametrize("name", ["droid", "libero", "aloha"])
def test_what_is_sent_is_what_openpis_clients_send(name: str) -> None:
    robot = read_robot(find_robot(name))
    keys = read_keys(find_keys(name), robot)
    rng = np.random.default_rng(0)
    images = {c: CameraFrame(c, 0, rng.integers(0, 256, (60, 80, 3)).astype(np.uint8)) for c in robot.camera_names}
    seen = Observation(0, images, rng.uniform(0.01, 0.05, len(robot.state)))
    message = keys.message(seen, TASK, robot, 64)
    if name == "aloha":
        assert message["images"]["cam_high"].shape == (3, 64, 64) and message["state"].shape == (14,)
    if name == "droid":
        assert message["observation/wrist_image_left"].shape == (64, 64, 3)
        assert message["observation/gripper_position"] == pytest.approx(seen.state_S[7:] / 0.7929)
    back, instruction = keys.observation(message, robot)
    assert instruction == TASK and list(back.frames) == list(images)
    np.testing.assert_allclose(back.state_S, seen.state_S, rtol=1e-12)
    actions_HD = rng.normal(size=(3, len(robot.actions)))
    np.testing.assert_allclose(keys.robot_actions(keys.actions(actions_HD, robot), robot), actions_HD, atol=1e-12)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("'prompt': expected\n a text", "it refused the observation: 'prompt': expected a text"),
        ("Traceback (most recent call last):\n  File x\nKeyError: 'a'\n", "it refused the observation: KeyError: 'a'"),
        ({"error": "Traceback (most recent call last):\nOOM"}, "it refused the observation: OOM"),
        ({"type": "error", "message": "Internal"}, "it refused the observation: Internal"),
        (np.zeros((1, 7)), "actions: expected float [50, 7], got float64 [1, 7]"),
        (b"\xc1", "expected an answer, got nonsense: message: expected msgpack"),
        ([1], "expected an answer, a map, got [1]"),
        ({}, "actions: expected float [50, 7], got None"),
        ({"actions": [[0.0] * 7] * 50}, "actions: expected float [50, 7], got [[0.0,"),
        ({"actions": np.zeros((49, 7))}, "actions: expected float [50, 7], got float64 [49, 7]"),
        ({"actions": np.zeros((50, 8))}, "actions: expected float [50, 7], got float64 [50, 8]"),
        ({"actions": np.zeros((50, 7), np.int64)}, "actions: expected float [50, 7], got int64 [50, 7]"),
        ({"actions": np.full((50, 7), np.nan)}, "actions: expected numbers within 1e+09, got nan"),
        ({"actions": np.full((50, 7), np.inf)}, "actions: expected numbers within 1e+09, got inf"),
        ({"actions": np.full((50, 7), -1e300)}, "actions: expected numbers within 1e+09, got -1e+300"),
        ({"actions": np.zeros((1 << 20, 0))}, "actions: expected float [50, 7], got float64 [1048576, 0]"),
        (None, "expected an answer, got the end of the connection"),
        ({"actions": np.zeros((1, 50, 7))}, "actions: expected float [50, 7], got float64 [1, 50, 7]"),
        (bytes(LARGEST_ANSWER + 1), "expected an answer, got the end of the connection"),
        (after(0.6, GOOD), "expected an answer within 0.3 s, got none"),
    ],
)
def test_what_a_server_does_wrong_is_named_and_the_next_chunk_is_asked_for_anew(answer: Any, said: str) -> None:
    right = {"actions": np.full(SHAPE, 0.25)}
    with scripted(answer, right, right) as port:
        policy = remote_policy(port, timeout_s=0.3)
        with pytest.raises(EngineError, match=re.escape(said)) as raised:
            policy.infer(observation(), TASK, 0)
        assert str(raised.value).startswith(f"policy server ws://127.0.0.1:{port}: ") and "\n" not in str(raised.value)
        chunk = policy.infer(observation(), TASK, 0)
        np.testing.assert_allclose(chunk.position_HJ, 0.25, atol=1e-6)
        policy.engine.close()


def test_the_actions_may_come_alone_as_from_vllm() -> None:
    with scripted(np.full(SHAPE, 0.25, np.float32)) as port:
        policy = remote_policy(port)
        np.testing.assert_allclose(policy.infer(observation(), TASK, 0).position_HJ, 0.25, atol=1e-6)
        policy.engine.close()


def test_a_server_that_was_restarted_between_two_chunks_costs_none() -> None:
    with serving(open_policy(BUNDLE)) as port:
        policy = remote_policy(port)
        before = policy.infer(observation(), TASK, 0)
    with serving(open_policy(BUNDLE), at_port=port):
        after = policy.infer(observation(), TASK, 0)  # its count begins anew
        assert np.array_equal(before.position_HJ, after.position_HJ)
        policy.engine.close()


def test_a_connection_and_an_answer_have_a_time_each() -> None:
    """Where a fault is over, a wire on which both together take longer must not mean a hold for ever."""
    with scripted(after(0.25, GOOD), metadata=after(0.25, {})) as port:
        policy = remote_policy(port, timeout_s=0.4)
        assert policy.infer(observation(), TASK, 0).horizon == 50
        policy.engine.close()


def test_a_wire_that_takes_nothing_any_more_blocks_no_longer_than_the_timeout() -> None:
    with scripted() as port:
        between = Between(port)
        engine = ServerEngine(f"ws://127.0.0.1:{between.port}", timeout_s=0.4)
        engine.metadata()
        between.way = "stalls"
        began_s = time.monotonic()
        with pytest.raises(EngineError, match="policy server"):
            engine.ask({"image": np.zeros(40 << 20, np.uint8)})
        assert time.monotonic() - began_s < 3.0
        engine.close()
        between.close()


def test_an_answer_that_is_late_is_never_taken_for_the_next() -> None:
    """The first answer is sent while the second question waits."""
    with scripted(after(0.4, {"actions": np.full(SHAPE, 1.0)}), {"actions": np.full(SHAPE, 2.0)}) as port:
        policy = remote_policy(port, timeout_s=0.3)
        with pytest.raises(EngineError, match="within"):
            policy.infer(observation(), TASK, 0)
        np.testing.assert_allclose(policy.infer(observation(), TASK, 0).position_HJ, 2.0, atol=1e-6)
        policy.engine.close()


def test_an_answer_that_nobody_asked_for_is_not_taken_for_the_next() -> None:
    """The second of two answers to one observation."""
    twice = ({"actions": np.full(SHAPE, 1.0)}, {"actions": np.full(SHAPE, 2.0)})
    with scripted(twice, GOOD, {"actions": np.full(SHAPE, 3.0)}) as port:
        policy = remote_policy(port)
        np.testing.assert_allclose(policy.infer(observation(), TASK, 0).position_HJ, 1.0, atol=1e-6)
        time.sleep(0.2)
        with pytest.raises(EngineError, match="expected one answer to each observation, got one more"):
            policy.infer(observation(), TASK, 0)
        np.testing.assert_allclose(policy.infer(observation(), TASK, 0).position_HJ, 0.0, atol=1e-6)
        policy.engine.close()


def test_nobody_there_and_somebody_silent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        began_s = time.monotonic()
        with pytest.raises(EngineError, match=r"expected a connection within 0\.2 s, got none"):
            remote_policy(port, timeout_s=0.2).warm_up()
        assert time.monotonic() - began_s < 2.0
    with pytest.raises(EngineError, match=r"expected a connection, got .*; is it running"):
        remote_policy(port).warm_up()


def test_a_server_that_starts_later_or_connects_slowly_is_waited_for() -> None:
    """The robot's computer may have started first, and a busy one may take longer than an answer ever may."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    engine = ServerEngine(f"ws://127.0.0.1:{port}", timeout_s=0.1, wait_s=20.0)
    policy = RemotePolicy(BUNDLE, engine, named_keys(ROBOT))
    with ThreadPoolExecutor() as pool:
        warm = pool.submit(policy.warm_up)
        time.sleep(0.5)
        assert not warm.done()
        with scripted(GOOD, metadata=after(0.4, {}), port=port):
            warm.result(20)
            engine.timeout_s = 5.0
            assert policy.infer(observation(), TASK, 0).horizon == 50
            engine.close()


def test_a_server_that_is_waited_for_in_vain_is_named_after_that_time() -> None:
    engine = ServerEngine("ws://127.0.0.1:9", timeout_s=0.1, wait_s=0.7)
    began_s = time.monotonic()
    with pytest.raises(EngineError, match=r"expected a connection, got .*; is it running\? \(waited 0\.7 s\)"):
        engine.reach()
    assert 0.3 < time.monotonic() - began_s < 5.0


def answering(status: str) -> Callable[[socket.socket], None]:
    return lambda client: client.sendall(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode())


@contextmanager
def behind(answer: Callable[[socket.socket], object], times: int, server_port: int) -> Iterator[int]:
    """The port of a tunnel or proxy that answers so the first times, and then is a wire to the server."""
    with socket.create_server(("127.0.0.1", 0)) as front, ThreadPoolExecutor() as pool:
        front.settimeout(20)  # where nobody comes, the test is to fail, not to hang

        def run() -> Between:
            for _ in range(times):
                client, _ = front.accept()
                with client:
                    client.recv(1 << 16)
                    answer(client)
            port = front.getsockname()[1]
            front.close()
            return Between(server_port, port)

        between = pool.submit(run)
        yield front.getsockname()[1]
        between.result(20).close()


@pytest.mark.parametrize("answer", [lambda client: None, answering("502 Bad Gateway"), answering("503 Busy")])
def test_a_tunnel_or_a_proxy_whose_server_is_not_there_yet_is_waited_for(
    answer: Callable[[socket.socket], object],
) -> None:
    """`ssh -L` takes a connection and ends it; others answer 502 or 503."""
    with serving(open_policy(BUNDLE)) as port, behind(answer, 2, port) as front:
        engine = ServerEngine(f"ws://127.0.0.1:{front}", timeout_s=5.0, wait_s=20.0)
        said = list[str]()
        engine.reach(say=said.append)
        engine.close()
    assert len(said) == 1 and said[0].startswith("waiting up to 20 s: policy server ws://"), said
    assert "token" not in said[0]


@pytest.mark.parametrize(
    ("scheme", "status", "said"),
    [
        ("ws", "302 Found\r\nLocation: http://127.0.0.1:9/", "expected a policy server, got "),
        ("ws", "404 Not Found", "expected a policy server, got "),
        ("wss", "200 OK", "expected TLS, got "),
    ],
)
def test_who_is_no_policy_server_is_named_at_once_and_as_a_servers_fault(scheme: str, status: str, said: str) -> None:
    """Also where it sends us elsewhere, or speaks no TLS: the parameter is as it should be."""
    with scripted() as port, behind(answering(status), 1, port) as front:
        engine = ServerEngine(f"{scheme}://127.0.0.1:{front}", timeout_s=5.0, wait_s=30.0)
        began_s = time.monotonic()
        with pytest.raises(EngineError) as found:
            engine.reach()
        assert time.monotonic() - began_s < 20.0
    assert str(found.value).startswith(f"policy server {scheme}://127.0.0.1:{front}: {said}"), found.value
    assert "token" not in str(found.value)


def test_a_certificate_that_nobody_vouches_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The handshake is a STAND-IN: the suite has no certificates."""

    def refuse(*_: object, **__: object) -> None:
        raise ssl.SSLCertVerificationError(1, "self-signed certificate")

    monkeypatch.setattr(ssl.SSLContext, "wrap_socket", refuse)
    with scripted() as port:
        engine = ServerEngine(f"wss://127.0.0.1:{port}", timeout_s=5.0)
        with pytest.raises(EngineError, match=r"policy server wss://.*: expected a certificate that is trusted"):
            engine.reach()


def test_waiting_ends_where_the_node_is_to_stop() -> None:
    engine, asked = ServerEngine("ws://127.0.0.1:9", timeout_s=0.1, wait_s=60.0), list[int]()
    began_s = time.monotonic()
    with pytest.raises(EngineError, match="no longer waited for: the node is to stop"):
        engine.reach(stopped=lambda: asked.append(1) or len(asked) > 2)  # type: ignore[func-returns-value]
    assert time.monotonic() - began_s < 20.0


def test_all_addresses_of_a_name_share_one_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three that take a connection and say nothing; the name is looked up once."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as silent:
        place = silent.getsockname()
        fill = [socket.socket() for _ in range(4)]  # its queue is full: who comes now waits for TCP
        for one in fill:
            one.setblocking(False)
            with suppress(BlockingIOError):
                one.connect(place)
        looked, real = list[str](), socket.getaddrinfo
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", place)] * 3
        monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **named: looked.append(given[0]) or found)
        engine = ServerEngine("ws://robot.local:8000", timeout_s=1.5)
        for _ in range(2):
            began_s = time.monotonic()
            with pytest.raises(EngineError, match="expected a connection within"):
                engine.metadata()
            assert time.monotonic() - began_s < 4.0  # not three times as long
        monkeypatch.setattr(socket, "getaddrinfo", real)
        assert looked == ["robot.local"]
        for one in fill:
            one.close()


def test_a_server_that_answers_no_ping_is_not_given_up() -> None:
    """One that compiles where it listens, as openpi's, is silent for as long as it takes."""
    with scripted(GOOD) as port:
        engine = ServerEngine(f"ws://127.0.0.1:{port}", timeout_s=1.0)
        engine.metadata()
        assert engine._connection is not None and engine._connection.ping_interval is None
        engine.close()


def test_the_state_goes_out_in_the_turn_that_the_model_was_trained_in(tmp_path: Path) -> None:
    """As an engine here would have it: a joint that turns without end has made two turns more than in training."""
    actions = [
        {"name": name, "unit": "rad", "lower": -30, "upper": 30, "max_velocity": 3.0, "relative": False}
        | {"continuous": name == JOINTS[3]}
        for name in JOINTS[:-1]
    ]
    gripper = {"name": JOINTS[-1], "unit": "m", "lower": 0.0, "upper": 0.04, "max_velocity": 0.1, "relative": False}
    within = {"low": [-3.1] * 6 + [0.0], "high": [3.1] * 6 + [0.04]}
    bundle = write_test_bundle(tmp_path / "turns", demo_policy(joints=[*actions, gripper], action=within))
    seen = demo_observation()
    turned_S = seen.state_S + np.eye(7)[3] * 4 * np.pi
    sent, answers = list[Any](), np.tile(seen.state_S, (bundle.manifest.horizon, 1))
    with scripted({"actions": answers}, {"actions": answers}) as port:
        policy = remote_policy(port, bundle)
        ask = policy._server.ask
        policy._server.ask = lambda message: sent.append(message) or ask(message)  # type: ignore
        for state_S in (seen.state_S, turned_S):
            chunk = policy.infer(replace(seen, state_S=state_S), TASK, 0)
            np.testing.assert_allclose(chunk.position_HJ[-1], state_S, atol=1e-5)  # here, in the robot's own turn
        policy.engine.close()
    key = f"state/{JOINTS[3]}"
    np.testing.assert_allclose(sent[0][key], sent[1][key], atol=1e-9)


@pytest.mark.parametrize("token", ["", "another token, as long"])
def test_a_token_that_is_missing_or_wrong_is_named(token: str) -> None:
    with (
        serving(open_policy(BUNDLE), token=TOKEN) as port,
        pytest.raises(EngineError, match=r"expected a policy server, got .*401.*; is a token needed"),
    ):
        remote_policy(port, token=token).warm_up()


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"actions": ["a"] * 7}, "actions: expected ['joint1', 'joint2',"),
        ({"horizon": 10}, "horizon: expected 50, as bundle 'bench' and the keys say, got 10"),
        ({"action_period_s": 0.1}, "action_period_s: expected 0.02"),
        ({"units": "dataset"}, "units: expected robot"),
        ({"units": np.float32(0.5)}, "units: expected robot, as bundle 'bench' and the keys say, got np.float32(0.5)"),
    ],
)
def test_a_server_of_another_robot_is_refused_at_configure(metadata: dict[str, Any], said: str) -> None:
    with scripted(metadata=metadata) as port:
        policy = remote_policy(port)
        with pytest.raises(ConfigurationError, match=re.escape(said)):
            policy.warm_up()
        policy.engine.close()


def test_a_server_that_comes_back_with_another_policy_is_refused() -> None:
    names = iter(["first", "first", "second", "first"])
    with scripted(None, GOOD, None, GOOD, metadata=lambda: {"policy": next(names), "scale": np.float32(0.5)}) as port:
        policy = remote_policy(port)
        with pytest.raises(EngineError, match="the end of the connection"):
            policy.infer(observation(), TASK, 0)
        policy.infer(observation(), TASK, 0)  # it came back as it was
        with pytest.raises(EngineError, match="the end of the connection"):
            policy.infer(observation(), TASK, 0)
        with pytest.raises(EngineError, match="expected the same policy as before, got another"):
            policy.infer(observation(), TASK, 0)
        policy.infer(observation(), TASK, 0)
        policy.engine.close()


def test_an_instruction_that_is_none_is_not_sent() -> None:
    with scripted() as port, pytest.raises(InstructionError):
        remote_policy(port).infer(observation(), " ", 0)


def test_a_closed_one_says_so() -> None:
    policy = remote_policy(1)
    policy.engine.close()
    with pytest.raises(EngineError, match="one that was closed"):
        policy.infer(observation(), TASK, 0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"policy_server": "127.0.0.1:8000"}, "expected ws://host:port, got '127.0.0.1:8000'"),
        ({"guidance_jacobian": "exact", "engine": "torch"}, "got exact, but a policy server takes it as the identity"),
        ({"prefill_period_s": 0.1}, "a policy server computes all of a chunk at once"),
    ],
)
def test_settings_that_no_server_can_follow_are_refused(changes: dict[str, Any], said: str) -> None:
    settings = Settings(**{"policy_server": "ws://127.0.0.1:8000", **changes})
    with pytest.raises(ParameterError, match=re.escape(said)):
        settings.validate_against(BUNDLE.manifest)


def test_what_is_not_the_node_never_runs_the_bundles_own_graphs_in_its_place() -> None:
    with pytest.raises(EngineError, match="only the node asks a server"):
        open_engine(BUNDLE, Settings(policy_server="ws://127.0.0.1:8000"))


def test_the_settings_name_keys_and_token(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(f"{TOKEN.replace(' ', '-')}\n")
    with serving(open_policy(BUNDLE), token=TOKEN.replace(" ", "-")) as port:
        settings = Settings(policy_server=f"ws://127.0.0.1:{port}", policy_server_token=str(token))
        policy = open_remote(BUNDLE, settings)
        policy.warm_up()
        assert policy.infer(observation(), TASK, 0).horizon == 50
        policy.engine.close()
    with pytest.raises(ConfigurationError, match=r"parameter 'policy_server_token': .*nowhere: expected a text file"):
        open_remote(BUNDLE, Settings(policy_server="ws://a:1", policy_server_token=str(tmp_path / "nowhere")))


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_test_bundle(tmp_path_factory.mktemp("served") / "arm")


def test_the_loop_holds_while_the_server_fails_and_goes_on_when_it_is_back(arm: Bundle) -> None:
    """Good, dropped, nonsense, late, another length, gone, and back on the same port."""
    robot = arm.manifest.robot
    shape, here_J = (arm.manifest.horizon, len(robot.actions)), demo_observation().state_S
    good = {"actions": np.tile(here_J, (shape[0], 1))}
    faults = [None, b"\xc1", after(0.5, good), {"actions": np.zeros((3, shape[1]))}]
    with scripted(good, good, *faults, good) as port:
        policy: Policy = remote_policy(port, arm, timeout_s=0.3)
        policy.warm_up()
        rig = Rig(arm, policy=policy)
        rig.run_ticks(2 + len(faults), lambda _: rig.give_inputs())
    rig.run_ticks(2 + len(faults) + 1, lambda _: rig.give_inputs())  # nobody is there
    with scripted(good, good, port=port):
        rig.run_ticks(2 + len(faults) + 3, lambda _: rig.give_inputs())
    held = [str(tick["hold"] or "") for tick in rig.wire.ticks]
    sent = [tick["chunk_index"] for tick in rig.wire.ticks]
    assert [bool(hold) for hold in held] == [False] * 2 + [True] * (len(faults) + 1) + [False] * 2, held
    assert sent == [0, 1, None, None, None, None, None, 2, 3]
    assert all(hold.startswith(f"policy server ws://127.0.0.1:{port}: ") for hold in held if hold)
    policy.engine.close()


def test_openpis_own_server_fails_closes_compiles_and_is_followed_again(arm: Bundle) -> None:
    pytest.importorskip("openpi_client")
    here_J = demo_observation().state_S
    asked: list[dict[str, Any]] = []

    def infer(sent: dict[str, Any]) -> dict[str, Any]:
        asked.append(sent)
        if len(asked) == 2:
            raise KeyError("observation/gripper")
        if len(asked) == 4:
            time.sleep(0.7)  # nobody is heard meanwhile, as where it compiles
        actions_HD = np.tile(here_J, (arm.manifest.horizon, 1)).astype(np.float32)
        return {"state": sent["state/gripper"], "actions": actions_HD}

    with openpis(infer) as port:
        policy: Policy = remote_policy(port, arm, timeout_s=0.3)
        policy.warm_up()
        rig = Rig(arm, policy=policy)

        def give(_: object) -> None:
            time.sleep(0.1)
            rig.give_inputs()

        rig.run_ticks(9, give)
        policy.engine.close()
    held = [str(tick["hold"] or "") for tick in rig.wire.ticks]
    said = f"policy server ws://127.0.0.1:{port}: "
    assert held[1] == f"{said}it refused the observation: KeyError: 'observation/gripper'"
    assert [bool(hold) for hold in held[:4]] == [False, True, False, True], held
    assert held[3] == f"{said}expected an answer within 0.3 s, got none"
    assert held[-2:] == ["", ""] and all(hold.startswith(said) for hold in held if hold)
    assert asked[0]["images/scene"].dtype == np.uint8 and asked[0]["prompt"]
