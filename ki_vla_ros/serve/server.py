"""The server: who may connect, whose turn it is, and what a frame is answered with.

The protocol is openpi's. After the handshake the server sends one frame, its metadata. From then on each binary frame
is an observation and is answered with a chunk, or with a text frame, one line that says what was wrong with it; the
connection goes on either way. Everything but text is msgpack (packing.py).

One thread of its own decodes frames and runs the model, in the order in which they came. A client has at most one frame
there, so no client waits for more than one of each other's, and a slow one is waited for by nobody.

Legend: D dimensions of an action.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from itertools import pairwise
from typing import Any, Final

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from ki_vla_ros.bundle import MANIFEST, file_sha256
from ki_vla_ros.errors import InputError, KiVlaError
from ki_vla_ros.policy import Policy
from ki_vla_ros.serve.connection import Connection
from ki_vla_ros.serve.keys import LARGEST_SIDE, RUNNING, Keys
from ki_vla_ros.serve.packing import pack, unpack
from ki_vla_ros.serve.running import read_running
from ki_vla_ros.serve.token import SCHEME

MOST_CLIENTS: Final = 16
HEALTH: Final = "/healthz"
# The library logs tracebacks for every port scanner.
_SILENT: Final = logging.getLogger(f"{__name__}.websockets")
_SILENT.addHandler(logging.NullHandler())
_SILENT.propagate = False


@dataclass
class Client:
    """What the server keeps of a client. `chunks` counts its answers: the noise of a chunk is that of its number."""

    name: str
    chunks: int = 0
    errors: int = 0
    said_s: float = -math.inf  # when one of its errors was printed
    previous_s: float | None = None


class PolicyServer:
    """Serves one policy; `token`, unless empty, is what a client must know, `instruction` what it may leave out."""

    def __init__(
        self,
        policy: Policy,
        keys: Keys,
        token: str = "",
        instruction: str = "",
        say: Callable[[str], object] = lambda line: print(line, file=sys.stderr, flush=True),
    ) -> None:
        keys.check(policy.bundle.manifest.robot)
        self._policy, self._keys, self._instruction, self._print = policy, keys, instruction, say
        self._sha256 = file_sha256(policy.bundle.path / MANIFEST)  # of the files that were loaded, whatever comes later
        self._authorization = f"{SCHEME} {token}".encode() if token else b""
        self._clients, self._refused_s = 0, -math.inf
        self._worker = ThreadPoolExecutor(1, "policy")

    def _say(self, line: str) -> None:
        with suppress(OSError, ValueError):  # a log that is full or closed must not end the service
            self._print(line)

    @property
    def metadata(self) -> dict[str, Any]:
        """The first frame: what this policy is, what it takes, and what its answers mean."""
        manifest, keys = self._policy.bundle.manifest, self._keys
        return {
            "policy": manifest.name,
            "manifest_sha256": self._sha256,
            "flow_steps": self._policy.flow_steps,
            "noise_seed": self._policy.noise_seed,
            "robot": manifest.robot.name,
            "observation": keys.expected(manifest.robot),
            "horizon": manifest.horizon,
            RUNNING: manifest.max_prefix_delay,
            **keys.meaning(manifest.robot),
        }

    @property
    def largest_message(self) -> int:
        """Bytes: the largest images, one more, so that a larger one can be answered, and a MiB for all else."""
        return (len(self._keys.cameras) + 1) * 3 * LARGEST_SIDE**2 + (1 << 20)

    async def run(self, host: str, port: int, stop: asyncio.Event, ready: Callable[[int], object]) -> None:
        """Serve until `stop` is set; `ready` is called with the port once clients may come. OSError: no such place."""
        try:
            async with serve(
                self._converse,
                host,
                port,
                process_request=self._admit,
                origins=[None],  # no web page of this machine's browser, which reaches loopback, too
                compression=None,
                max_size=self.largest_message,
                max_queue=0,  # one more is kept in memory while an answer is made
                create_connection=partial(Connection, arriving={}),  # type: ignore[arg-type]
                close_timeout=1.0,
                server_header=None,
                logger=_SILENT,
            ) as server:
                ready(next(iter(server.sockets)).getsockname()[1])
                await stop.wait()
        finally:
            self._worker.shutdown(wait=True, cancel_futures=True)

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        if request.path == HEALTH:
            return connection.respond(HTTPStatus.OK, "OK\n")
        given = request.headers.get_all("Authorization")
        if self._authorization and not (
            len(given) == 1 and hmac.compare_digest(given[0].encode(errors="replace"), self._authorization)
        ):
            self._refuse(connection, f"expected the token, got {'another' if given else 'none'}")
            return connection.respond(HTTPStatus.UNAUTHORIZED, "expected the header Authorization: Api-Key TOKEN\n")
        if self._clients >= MOST_CLIENTS:
            self._refuse(connection, f"{MOST_CLIENTS} clients are connected")
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, f"expected at most {MOST_CLIENTS} clients\n")
        return None

    def _refuse(self, connection: ServerConnection, why: str) -> None:
        if time.monotonic() >= self._refused_s + 1.0:  # those who may not come must not fill the log either
            self._refused_s = time.monotonic()
            self._say(f"{_name(connection)}: refused: {why}")

    async def _converse(self, connection: ServerConnection) -> None:
        client, loop = Client(_name(connection)), asyncio.get_running_loop()
        gone: asyncio.Future[Any] = asyncio.ensure_future(connection.wait_closed())
        self._clients += 1
        try:
            self._say(f"{client.name}: connected")
            with suppress(ConnectionClosed):
                await connection.send(pack(self.metadata))
                async for frame in connection:
                    came_s = time.monotonic()
                    answer: asyncio.Future[Any] = loop.run_in_executor(
                        self._worker, self._answer, client, frame, came_s
                    )
                    await asyncio.wait([answer, gone], return_when=asyncio.FIRST_COMPLETED)
                    if not answer.done():  # who has gone waits for no chunk; one that has not begun is not computed
                        answer.cancel()
                        break
                    await connection.send(answer.result())
                    client.previous_s = time.monotonic() - came_s
        finally:
            gone.cancel()
            self._clients -= 1
            self._say(f"{client.name}: gone after {client.chunks} chunks, {client.errors} errors")

    def _answer(self, client: Client, frame: str | bytes, came_s: float) -> str | bytes:
        """The chunk for an observation, or the error as a line. Runs in the worker's thread."""
        trace = ""
        try:
            if isinstance(frame, str):
                raise InputError(f"message: expected a binary frame, got a text of {len(frame)} characters")
            return pack(self._chunk(client, frame, came_s))
        except KiVlaError as error:
            line = " ".join(str(error).split())
        except Exception:
            trace = traceback.format_exc()
            line = "the server hit a bug, and has printed where; please report it"
        client.errors += 1
        if time.monotonic() >= client.said_s + 1.0:  # a client must not fill the log
            client.said_s = time.monotonic()
            self._say(f"{client.name}: {trace or line}")
        return line

    def _chunk(self, client: Client, frame: bytes, came_s: float) -> dict[str, Any]:
        began_s = time.monotonic()
        policy, robot = self._policy, self._policy.bundle.manifest.robot
        message = unpack(frame)
        running = message.pop(RUNNING, None) if isinstance(message, dict) else None
        observation, instruction = self._keys.observation(message, robot, self._instruction)
        guide = None if running is None else read_running(running, observation.state_S, policy, self._keys)
        marks_s = [("", time.monotonic())]
        actions_HA = policy.sample(
            observation, instruction, client.chunks, lambda stage: marks_s.append((stage, time.monotonic())), guide
        )
        actions_HD = self._keys.actions(policy.actions(actions_HA, observation.state_S), robot)
        ended_s = time.monotonic()
        client.chunks += 1
        stages = {f"{stage}_ms": (at_s - before_s) * 1e3 for (_, before_s), (stage, at_s) in pairwise(marks_s)}
        server = {"infer_ms": (ended_s - began_s) * 1e3, "wait_ms": (began_s - came_s) * 1e3}
        if client.previous_s is not None:
            server["prev_total_ms"] = client.previous_s * 1e3
        policy_ms = {"infer_ms": (ended_s - marks_s[0][1]) * 1e3}
        return {"actions": actions_HD, "server_timing": server, "policy_timing": policy_ms | stages}


def _name(connection: ServerConnection) -> str:
    address = connection.remote_address
    return f"{address[0]}:{address[1]}" if isinstance(address, tuple) else "client"
