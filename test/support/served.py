"""A policy server in a thread of this process, somebody else's, and what clients send."""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from websockets.asyncio.server import serve as asyncio_serve
from websockets.sync.server import ServerConnection, serve

from ki_vla_ros.bundle import Bundle, load_bundle
from ki_vla_ros.engines import open_engine
from ki_vla_ros.policy import Policy
from ki_vla_ros.serve import Keys, PolicyServer, named_keys, pack, unpack
from ki_vla_ros.settings import Settings
from ki_vla_ros.share import find_bundle

TASK = "touch the red cube"


def bench_bundle() -> Bundle:
    """Three cameras, seven joints, random weights, a few ms per chunk."""
    return load_bundle(find_bundle("bench"))


def open_policy(bundle: Bundle) -> Policy:
    return Policy(bundle, open_engine(bundle, Settings()))


@contextmanager
def serving(policy: Policy, keys: Keys | None = None, at_port: int = 0, **options: Any) -> Iterator[int]:
    """The port of a server, which ends with the block."""
    options = {"say": lambda line: None} | options
    server = PolicyServer(policy, keys or named_keys(policy.bundle.manifest.robot), **options)
    with in_thread(lambda stop, ready: server.run("127.0.0.1", at_port, stop, ready)) as port:
        yield port


@contextmanager
def in_thread(run: Callable[[asyncio.Event, Callable[[int], object]], Coroutine[Any, Any, None]]) -> Iterator[int]:
    """The port that `run` says it is ready on, until the end of the block, which sets its event."""
    ports: list[int] = []
    started, ended = threading.Event(), threading.Event()
    ends: list[Any] = []

    async def serve_here() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        ends.append(lambda: loop.call_soon_threadsafe(stop.set))
        await run(stop, lambda port: (ports.append(port), started.set()))
        ended.set()

    thread = threading.Thread(target=asyncio.run, args=(serve_here(),))
    thread.start()
    assert started.wait(20)
    try:
        yield ports[0]
    finally:
        ends[0]()
        thread.join(20)
        assert ended.is_set()


@contextmanager
def openpis(infer: Callable[[dict[str, Any]], dict[str, Any]]) -> Iterator[int]:
    """A server that does as openpi's own does, with its own packing.

    It says nothing of itself; it computes in its event loop, where it hears nobody meanwhile; and to an observation
    that fails it answers with the traceback as a text, and closes (1011).
    """
    from openpi_client.msgpack_numpy import packb, unpackb

    async def talk(connection: Any) -> None:
        await connection.send(packb({}))
        async for frame in connection:
            try:
                answer = infer(unpackb(frame)) | {"server_timing": {"infer_ms": 1.0}}
            except Exception:
                await connection.send(traceback.format_exc())
                await connection.close(1011, "Internal server error. Traceback included in previous frame.")
                return
            await connection.send(packb(answer))

    async def run(stop: asyncio.Event, ready: Callable[[int], object]) -> None:
        async with asyncio_serve(talk, "127.0.0.1", 0, compression=None, max_size=None) as server:
            ready(next(iter(server.sockets)).getsockname()[1])
            await stop.wait()

    with in_thread(run) as port:
        yield port


def message(bundle: Bundle, seed: int = 0, height: int = 24, width: int = 32) -> dict[str, Any]:
    """An observation by the robot file's names."""
    rng, robot = np.random.default_rng(seed), bundle.manifest.robot
    images = {name: rng.integers(0, 256, (height, width, 3)).astype(np.uint8) for name in robot.camera_names}
    state = {dimension.name: float(rng.uniform(-0.5, 0.5)) for dimension in robot.state}
    return {"images": images, "state": state, "prompt": TASK}


def ask(connection: Any, observation: Any) -> Any:
    """The answer to an observation: a map, or the text of an error."""
    connection.send(pack(observation))
    answer = connection.recv(20)
    return answer if isinstance(answer, str) else unpack(answer)


@contextmanager
def scripted(*answers: Any, metadata: Any = None, port: int = 0) -> Iterator[int]:
    """A server that answers each frame with the next of `answers`: a message, bytes, a text, or what a call gives.

    It sends all of a tuple, and closes the connection where an answer is None. `metadata` is the first frame of each
    connection.
    """
    left, talking = list(answers), list[ServerConnection]()

    def talk(connection: ServerConnection) -> None:
        talking.append(connection)
        first = metadata() if callable(metadata) else metadata
        connection.send(first if isinstance(first, bytes | str) else pack(first or {}))
        for _ in connection:
            answer = left.pop(0)
            answer = answer() if callable(answer) else answer
            if answer is None:
                return
            for one in answer if isinstance(answer, tuple) else (answer,):
                connection.send(one if isinstance(one, bytes | str) else pack(one))

    with serve(talk, "127.0.0.1", port, compression=None, close_timeout=0.2) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.socket.getsockname()[1]
        finally:
            server.shutdown()
            for connection in talking:  # not all releases of the library do it
                connection.close()
            thread.join()


def after(seconds: float, answer: Any) -> Callable[[], Any]:
    def wait() -> Any:
        time.sleep(seconds)
        return answer

    return wait
