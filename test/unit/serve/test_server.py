"""The server: chunks, errors, turns, and who may come."""

from __future__ import annotations

import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bundles import write_test_bundle
from support.served import TASK, ask, bench_bundle, message, open_policy, serving
from support.waiting import PATIENCE_S, until
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from ki_vla_ros.bundle import Bundle
from ki_vla_ros.policy import Policy
from ki_vla_ros.records import CameraFrame, Observation
from ki_vla_ros.robot import find_robot, read_robot
from ki_vla_ros.serve import find_keys, pack, read_keys, unpack
from ki_vla_ros.serve.connection import MOST_ARRIVING, MOST_PIECES
from ki_vla_ros.serve.server import MOST_CLIENTS

TOKEN = "a token of twenty-four"
BUNDLE = bench_bundle()
REQUEST = (
    b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with serving(open_policy(BUNDLE)) as port:
        yield port


@pytest.fixture(scope="module")
def policy() -> Policy:
    """Another than the server's."""
    return open_policy(BUNDLE)


def client(port: int, **options: Any) -> Any:
    """A connection as openpi's client opens it, with the metadata still to be read."""
    return connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None, close_timeout=0.5, **options)


def expected(policy: Policy, sent: dict[str, Any], chunk_index: int) -> np.ndarray:
    """What the library says."""
    frames = {name: CameraFrame(name, 0, image) for name, image in sent["images"].items()}
    observation = Observation(0, frames, np.array(list(sent["state"].values())))
    return policy.infer(observation, sent["prompt"], chunk_index).position_HJ


def test_the_metadata_says_what_the_policy_takes_and_gives(port: int) -> None:
    with client(port) as connection:
        said = unpack(connection.recv(20))
    robot = BUNDLE.manifest.robot
    assert (said["policy"], said["units"], said["horizon"]) == ("bench", "robot", 50)
    assert said["actions"] == said["state"] == [action.name for action in robot.actions]
    assert said["observation"]["images/front"] == "uint8 [height, width, 3]"


def test_chunks_are_those_of_the_library_bit_for_bit(port: int, policy: Policy) -> None:
    with client(port) as connection:
        connection.recv(20)
        for chunk_index in range(3):
            sent = message(BUNDLE, seed=chunk_index, height=240, width=320)
            answer = ask(connection, sent)
            assert answer["actions"].dtype == np.float64
            assert np.array_equal(answer["actions"], expected(policy, sent, chunk_index))
    timing = {**answer["server_timing"], **answer["policy_timing"]}
    assert set(timing) >= {"infer_ms", "prev_total_ms", "wait_ms", "prefill_ms", "denoise_ms"}
    assert all(isinstance(value, float) and value >= 0 for value in timing.values())


def test_clients_take_turns_with_a_count_of_their_own(port: int, policy: Policy) -> None:
    sent = message(BUNDLE)
    expected_k = [expected(policy, sent, k) for k in range(8)]
    wrong: list[str] = []

    def talk() -> None:
        with client(port) as connection:
            connection.recv(20)
            for k in range(8):
                if not np.array_equal(ask(connection, sent)["actions"], expected_k[k]):
                    wrong.append(f"chunk {k}")

    threads = [threading.Thread(target=talk) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert wrong == [] and not np.array_equal(expected_k[0], expected_k[1])


def test_an_error_is_one_line_that_names_the_key_and_the_connection_lives_on(port: int, policy: Policy) -> None:
    sent = message(BUNDLE)
    with client(port) as connection:
        connection.recv(20)
        said = ask(connection, sent | {"images": {**sent["images"], "left": np.zeros((4, 4))}})
        assert said == "'images/left': expected an image, uint8 [height, width, 3], got float64 [4, 4]"
        assert "expected at most 200 characters, got 300" in ask(connection, sent | {"prompt": "x" * 300})
        huge = np.zeros((2049, 2048, 3), np.uint8)
        assert "shrink it before sending" in ask(connection, sent | {"images": {**sent["images"], "left": huge}})
        connection.send("hello")
        assert connection.recv(20) == "message: expected a binary frame, got a text of 5 characters"
        # An error takes no chunk's noise.
        assert np.array_equal(ask(connection, sent)["actions"], expected(policy, sent, 0))


def test_a_bug_is_printed_here_and_only_confessed_there(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = open_policy(BUNDLE)
    with serving(policy) as port, client(port) as connection:
        connection.recv(20)
        with monkeypatch.context() as patched:
            patched.setattr(policy, "sample", lambda *_: 1 / 0)
            assert ask(connection, message(BUNDLE)).startswith("the server hit a bug")
        assert "actions" in ask(connection, message(BUNDLE))


def test_while_the_model_runs_others_may_come(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = open_policy(BUNDLE)
    began, go_on, sample = threading.Event(), threading.Event(), policy.sample

    def slow(*arguments: Any) -> Any:
        began.set()
        assert go_on.wait(20)
        return sample(*arguments)

    monkeypatch.setattr(policy, "sample", slow)
    with serving(policy) as port, client(port) as first:
        first.recv(20)
        first.send(pack(message(BUNDLE)))
        assert began.wait(20)
        try:
            with (
                client(port) as second,
                urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5) as answer,
            ):
                assert answer.status == 200 and unpack(second.recv(5))["policy"] == "bench"
        finally:
            go_on.set()
        assert "actions" in unpack(first.recv(20))


def damaged(rng: np.random.Generator, good: bytes) -> bytes | str:
    """A frame that has something wrong with it, most of the time."""
    kind = rng.integers(6)
    if kind == 0:
        return rng.bytes(int(rng.integers(200)))
    if kind == 1:
        return good[: int(rng.integers(len(good)))]
    if kind == 2:
        return rng.bytes(int(rng.integers(30))).decode("latin-1")
    if kind == 3:
        return good + rng.bytes(1 + int(rng.integers(30)))
    frame = bytearray(good)
    for _ in range(int(rng.integers(1, 30)) if kind == 4 else 1):
        frame[rng.integers(len(frame))] = rng.integers(256)
    return bytes(frame)


def test_a_thousand_malformed_frames_leave_it_serving(port: int, policy: Policy) -> None:
    rng, sent, refused, chunks = np.random.default_rng(0), message(BUNDLE, height=2, width=2), 0, 0
    good = pack(sent)
    with client(port) as connection:
        connection.recv(20)
        for _ in range(1000):
            connection.send(damaged(rng, good))
            answer = connection.recv(20)
            if isinstance(answer, str):
                assert answer and "\n" not in answer and "Traceback" not in answer
                assert not answer.startswith("the server hit a bug"), answer
                refused += 1
            else:
                assert np.all(np.isfinite(unpack(answer)["actions"]))
                chunks += 1
        # A changed pixel or word is a good frame; what is refused must be more than that.
        assert refused > 800 and chunks > 0
        assert np.array_equal(ask(connection, sent)["actions"], expected(policy, sent, chunks))


def test_too_large_a_message_ends_its_own_connection_alone(port: int) -> None:
    with client(port) as connection, client(port) as other:
        connection.recv(20), other.recv(20)
        with pytest.raises(ConnectionClosed) as raised:
            connection.send(bytes(60 << 20))
            connection.recv(20)
        assert raised.value.rcvd is not None and raised.value.rcvd.code == 1009
        assert "actions" in ask(other, message(BUNDLE))


def test_a_client_that_stalls_is_waited_for_by_nobody(port: int) -> None:
    """One in the middle of its handshake, one in the middle of a frame, one that sends and never reads."""
    with socket.create_connection(("127.0.0.1", port)) as shy, client(port) as slow, client(port) as deaf:
        shy.sendall(b"GET / HTTP/1.1\r\n")
        slow.recv(20)
        slow.socket.sendall(b"\x82\xff" + (1 << 20).to_bytes(8, "big") + bytes(4) + bytes(1000))
        for _ in range(50):
            deaf.send(pack(message(BUNDLE, height=2, width=2)))
        with client(port) as connection:
            connection.recv(20)
            for _ in range(3):
                began_s = time.monotonic()
                assert "actions" in ask(connection, message(BUNDLE))
                assert time.monotonic() - began_s < 5.0
        slow.socket.shutdown(socket.SHUT_RDWR)


def test_what_is_no_websocket_leaves_it_serving(port: int, policy: Policy) -> None:
    """Noise, TLS, endless headers, other methods; then noise within a connection, after a good handshake."""
    rng = np.random.default_rng(0)
    openings = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"POST / HTTP/1.1\r\nContent-Length: 9999999999\r\n\r\n",
        b"GET / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 10_000,
        b"GET /" + b"x" * 100_000,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\r\n" * 1000,
        *(rng.bytes(int(rng.integers(1, 300))) for _ in range(40)),
    ]
    for opening in openings:
        with socket.create_connection(("127.0.0.1", port)) as connection, suppress(OSError):
            connection.sendall(opening)
            connection.shutdown(socket.SHUT_WR)
            assert b" 101 " not in connection.recv(4096)
    for _ in range(40):
        with client(port) as connection, suppress(OSError):
            connection.recv(20)
            connection.socket.sendall(rng.bytes(int(rng.integers(1, 300))))
    with client(port) as connection:
        connection.recv(20)
        assert np.array_equal(ask(connection, message(BUNDLE))["actions"], expected(policy, message(BUNDLE), 0))


def test_connections_that_never_ask_make_room_for_those_that_do(port: int) -> None:
    """The oldest are dropped, so that they take up neither memory nor the files that a process may open."""
    with ExitStack() as several:
        shy = [several.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(3 * MOST_ARRIVING)]
        for connection in shy[::2]:
            with suppress(OSError):
                connection.sendall(b"GET / HTTP/1.1\r\n")
        with client(port) as connection:
            connection.recv(20)
            assert "actions" in ask(connection, message(BUNDLE))
        dropped = [is_over(connection) for connection in shy]
        assert sum(dropped) >= 2 * MOST_ARRIVING and not any(dropped[-MOST_ARRIVING // 2 :])


def is_over(connection: socket.socket) -> bool:
    connection.settimeout(0.0)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def test_whoever_has_gone_waits_for_no_chunk_and_holds_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A robot asks anew, over a new connection, each time that it was not answered in time."""
    policy, calls, go_on, lines = open_policy(BUNDLE), list[int](), threading.Event(), list[str]()
    sample = policy.sample

    def stall(*given: Any) -> Any:
        calls.append(1)
        assert go_on.wait(PATIENCE_S)
        return sample(*given)

    monkeypatch.setattr(policy, "sample", stall)
    with serving(policy, say=lines.append) as port:
        for _ in range(MOST_CLIENTS + 4):
            with connect(f"ws://127.0.0.1:{port}") as connection:
                connection.recv(20)
                connection.send(pack(message(BUNDLE)))
                until(lambda: calls)  # the first one's is being computed
        with connect(f"ws://127.0.0.1:{port}") as connection:
            connection.recv(20)
            connection.send(pack(message(BUNDLE)))
            until(lambda: sum("gone after 0 chunks" in line for line in lines) == MOST_CLIENTS + 4)
            go_on.set()
            assert "actions" in unpack(connection.recv(20))
    assert len(calls) == 2


def test_a_log_that_cannot_be_written_ends_no_service() -> None:
    def full(_: str) -> None:
        raise OSError(28, "No space left on device")

    with serving(open_policy(BUNDLE), say=full) as port:
        for _ in range(MOST_CLIENTS + 2):
            with connect(f"ws://127.0.0.1:{port}") as connection:
                connection.recv(20)
                assert isinstance(ask(connection, {"no": 1}), str)
                assert "actions" in ask(connection, message(BUNDLE))


def test_more_clients_than_there_may_be_at_the_same_moment() -> None:
    """Their handshakes overlap: none of them is there yet when the others are let in."""
    said: list[str] = []
    with serving(open_policy(BUNDLE), say=said.append) as port, ExitStack() as several:
        crowd = [several.enter_context(socket.create_connection(("127.0.0.1", port), 20)) for _ in range(60)]
        for connection in crowd:
            connection.sendall(REQUEST)
        assert all(connection.recv(1 << 16) for connection in crowd)
        time.sleep(0.2)
        assert sum(line.endswith(": connected") for line in said) == MOST_CLIENTS


def test_a_message_of_endless_empty_pieces_ends_its_own_connection_alone(port: int) -> None:
    with client(port) as connection, client(port) as other:
        connection.recv(20), other.recv(20)
        piece = b"\x00\x80" + bytes(4)  # goes on, is masked, and has nothing in it
        with suppress(OSError):
            connection.socket.sendall(b"\x02\x80" + bytes(4) + piece * (MOST_PIECES + 1))
        with pytest.raises(ConnectionClosed) as raised:
            connection.recv(20)
        assert raised.value.rcvd is not None and raised.value.rcvd.code == 1009
        assert "actions" in ask(other, message(BUNDLE))


def test_a_message_in_pieces_is_one(port: int, policy: Policy) -> None:
    sent, packed = message(BUNDLE), pack(message(BUNDLE))
    with client(port) as connection:
        connection.recv(20)
        connection.send(packed[at : at + 100] for at in range(0, len(packed), 100))
        assert np.array_equal(unpack(connection.recv(20))["actions"], expected(policy, sent, 0))


def test_pings_that_nobody_hears_answered_end_their_own_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ki_vla_ros.serve.connection.MOST_UNREAD", 1 << 16)
    said: list[str] = []
    with serving(open_policy(BUNDLE), say=said.append) as port, socket.create_connection(("127.0.0.1", port)) as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.settimeout(PATIENCE_S)  # a busy server reads late; one that has had enough ends it at once
        deaf.sendall(REQUEST)
        ping = (b"\x89\xfd" + bytes(4) + bytes(125)) * 1000
        with suppress(OSError):
            for _ in range(400):  # 52 MB
                deaf.sendall(ping)
        began_s = time.monotonic()
        until(lambda: any("gone after 0 chunks" in line for line in said))
        assert time.monotonic() - began_s < 10.0, "not the 40 s after which nobody is there"
        with client(port) as other:
            other.recv(20)
            assert "actions" in ask(other, message(BUNDLE))


def test_those_who_are_refused_do_not_fill_the_log() -> None:
    said: list[str] = []
    with serving(open_policy(BUNDLE), token=TOKEN, say=said.append) as port:
        for _ in range(20):
            with pytest.raises(InvalidStatus):
                client(port)
    assert 1 <= len(said) < 10 and said[0].endswith(": refused: expected the token, got none")


def test_what_a_client_says_does_not_reach_a_terminal_as_it_is(port: int) -> None:
    with client(port) as connection:
        connection.recv(20)
        for sent in (message(BUNDLE) | {"prompt": "a\x1b[31m\u202e"}, message(BUNDLE) | {"\x1b[31m": 1}):
            assert ask(connection, sent).isprintable()


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": f"Api-Key {TOKEN}x"},
        {"Authorization": f"Api-Key {TOKEN[:-1]}"},
        {"Authorization": TOKEN},
        {"Authorization": f"Bearer {TOKEN}"},
        {"Authorization": "Api-Key "},
        {"Authorization": f"api-key {TOKEN}"},
        {"X-Api-Key": TOKEN},
        [("Authorization", f"Api-Key {TOKEN}"), ("Authorization", f"Api-Key {TOKEN}")],
    ],
)
def test_without_the_token_a_client_gets_nothing(headers: Any) -> None:
    with serving(open_policy(BUNDLE), token=TOKEN) as port:
        with pytest.raises(InvalidStatus) as raised:
            client(port, additional_headers=headers)
        assert raised.value.response.status_code == 401
        body = bytes(raised.value.response.body or b"")
        assert body == b"expected the header Authorization: Api-Key TOKEN\n"
        with client(port, additional_headers={"Authorization": f"Api-Key {TOKEN}"}) as connection:
            assert unpack(connection.recv(20))["policy"] == "bench"


def test_a_web_page_gets_nothing(port: int) -> None:
    with pytest.raises(InvalidStatus) as raised:
        client(port, origin="http://localhost")
    assert raised.value.response.status_code == 403


def test_health_is_told_to_anyone() -> None:
    with (
        serving(open_policy(BUNDLE), token=TOKEN) as port,
        urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=20) as answer,
    ):
        assert (answer.status, answer.read()) == (200, b"OK\n")


def test_more_clients_than_there_may_be_are_refused_and_leave_room_when_they_go() -> None:
    with serving(open_policy(BUNDLE)) as port:
        with ExitStack() as several:
            for _ in range(MOST_CLIENTS):
                several.enter_context(client(port)).recv(20)
            with pytest.raises(InvalidStatus) as raised:
                client(port)
            assert raised.value.response.status_code == 503
        end_s = time.monotonic() + 20
        while time.monotonic() < end_s:
            try:
                with client(port) as connection:
                    assert unpack(connection.recv(20))["policy"] == "bench"
                break
            except InvalidStatus:
                time.sleep(0.05)
        else:
            pytest.fail("no room")


def observation_of(robot: str) -> dict[str, Any]:
    """What openpi's client of a robot sends."""
    rng = np.random.default_rng(0)
    if robot == "aloha":
        images = {f"cam_{name}": rng.integers(0, 256, (3, 224, 224), np.uint8) for name in ("high", "low")}
        return {"state": np.full(14, 0.5), "images": images}
    image = rng.integers(0, 256, (224, 224, 3), np.uint8)
    if robot == "libero":
        parts: dict[str, Any] = {"image": image, "wrist_image": image, "state": rng.random(8)}
    else:
        parts = {"exterior_image_1_left": image, "wrist_image_left": image}
        parts |= {"joint_position": rng.random(7), "gripper_position": rng.random(1)}
    return {f"observation/{key}": value for key, value in parts.items()} | {"prompt": TASK}


@pytest.fixture(scope="module", params=["droid", "libero", "aloha"])
def robot_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Bundle]:
    from training.export.tiny import robot_policy

    robot = read_robot(find_robot(request.param))
    return request.param, write_test_bundle(tmp_path_factory.mktemp("served") / request.param, robot_policy(robot))


# websockets 17 says this of every client that is no context manager.
@pytest.mark.filterwarnings("ignore:connect\\(\\) must be used as a context manager:DeprecationWarning")
def test_openpis_own_client_gets_chunks(robot_bundle: tuple[str, Bundle]) -> None:
    pytest.importorskip("openpi_client")
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    name, bundle = robot_bundle
    robot = bundle.manifest.robot
    keys = read_keys(find_keys(name), robot)
    with serving(open_policy(bundle), keys, token=TOKEN, instruction=TASK) as port:
        theirs = WebsocketClientPolicy("127.0.0.1", port, api_key=TOKEN)
        assert theirs.get_server_metadata()["robot"] == robot.name
        sent, ours = observation_of(name), open_policy(bundle)
        for chunk_index in range(2):
            answer = theirs.infer(sent)
            observation, instruction = keys.observation(sent, robot, TASK)
            actions_HA = ours.sample(observation, instruction, chunk_index)
            actions_HD = keys.actions(ours.actions(actions_HA, observation.state_S), robot)
            assert answer["actions"].shape == (robot.horizon, len(robot.actions))
            assert np.array_equal(answer["actions"], actions_HD)
            assert answer["server_timing"]["infer_ms"] > 0
        for key in {key.partition("/")[0] for key in keys.state if "/" in key}:
            with pytest.raises(RuntimeError, match=f"'{key}': expected a map, or in its place .*{key}/"):
                theirs.infer({**{k: v for k, v in sent.items() if k.partition("/")[0] != key}, key: np.zeros(7)})
        with pytest.raises(RuntimeError, match="'imagez': expected only"):
            theirs.infer({**sent, "imagez": 1})
        assert "actions" in theirs.infer(sent)
        theirs._ws.close()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--host", "0.0.0.0"), "serve: --host 0.0.0.0: expected --token-file FILE with it, got none"),
        (("--host", "::"), "serve: --host ::: expected --token-file FILE with it, got none"),
        (("--host", "robot.local"), "serve: --host robot.local: expected --token-file FILE with it, got none"),
        (("--token-file", "{short}"), "expected one line of 16 or more ASCII characters without spaces, got 15"),
        (("--token-file", "{two}"), "expected one line of 16 or more ASCII characters without spaces, got 33"),
        (("--token-file", "/nowhere"), "--token-file /nowhere: expected a text file, got one that cannot be read"),
        (("--keys", "drod"), "expected a file or one of robot, aloha, droid, libero, sglang, got 'drod'"),
        (("--keys", "droid"), "cameras: expected those of robot 'robot' (front, left, right), got "),
        (("--prompt", "grasp"), "the bundle's tokenizer does not know"),
        (("--port", "{taken}"), "expected a free port of this machine, got "),
        (("--threads", "0"), "parameter 'threads': "),
        (("--port", "70000"), "--port: expected 0 to 65535, got 70000"),
    ],
)
def test_wrong_arguments_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    from ki_vla_ros.serve.__main__ import main

    (tmp_path / "short").write_text("x" * 15 + "\n")
    (tmp_path / "two").write_text("x" * 16 + "\n" + "y" * 16 + "\n")
    before = signal.getsignal(signal.SIGTERM)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = {"short": tmp_path / "short", "two": tmp_path / "two", "taken": taken.getsockname()[1]}
        try:
            code = main(["--bundle", "bench", *(argument.format(**words) for argument in arguments)])
        finally:
            signal.signal(signal.SIGTERM, before)
    error = capsys.readouterr().err
    assert code == 2 and said in error and error.count("\n") == 1
