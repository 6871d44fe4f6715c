"""The other side: a policy whose chunks a server computes, ours or any that speaks openpi's protocol.

The bundle here says what the robot is, and what goes out and comes back is checked against it. Its graphs are not
opened. Whatever the server does wrong is an EngineError, so that the arm is held; the next chunk asks anew.

Legend: H horizon, D dimensions of an action, A width of the model's actions.
"""

from __future__ import annotations

import logging
import math
import socket
import ssl
import struct
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from websockets.exceptions import InvalidHandshake, InvalidMessage, InvalidStatus, InvalidURI, WebSocketException
from websockets.protocol import State
from websockets.sync.client import ClientConnection, connect
from websockets.uri import parse_uri

from ki_vla_ros.bundle import Bundle
from ki_vla_ros.engines import KVCache
from ki_vla_ros.errors import ConfigurationError, EngineError, InputError, printable, short_repr
from ki_vla_ros.policy import Guide, Policy, Stage, clean_instruction, trained_turn, untimed
from ki_vla_ros.records import ModelInput, Observation
from ki_vla_ros.serve.keys import LARGEST_NUMBER, RUNNING, Keys, open_keys
from ki_vla_ros.serve.packing import pack, unpack
from ki_vla_ros.serve.running import running_message
from ki_vla_ros.serve.token import SCHEME, read_token
from ki_vla_ros.settings import Settings

LARGEST_ANSWER: Final = 16 << 20
LONGEST_SAID: Final = 300  # characters of a server's own words in our errors
CLOSING_S: Final = 0.05  # a server that does not answer does not say goodbye either
AGAIN_S: Final = 0.2  # between two attempts to reach a server that is waited for
ATTEMPT_S: Final = 3.0  # of one: to a computer that is still starting, TCP asks ever more rarely
# What a proxy answers while the server behind it is not there (as websockets judges it, too).
STARTING: Final = (500, 502, 503, 504)
_SILENT: Final = logging.getLogger(f"{__name__}.websockets")
_SILENT.addHandler(logging.NullHandler())
_SILENT.propagate = False


class NotThereError(EngineError):
    """Nobody took the connection, or said anything: the server may still be starting."""


class ServerEngine:
    """The connection, in the place of an engine: it has no graphs, and answers whole observations.

    It connects when it is first asked, and again after every fault: an answer that is late must not be taken for that
    to a later question.
    """

    def __init__(self, address: str, token: str = "", timeout_s: float = 0.5, wait_s: float = 0.0) -> None:
        """`wait_s`: how long `reach` waits; never less than `timeout_s`. ConfigurationError for no address."""
        try:
            parse_uri(address)
        except (InvalidURI, ValueError) as error:
            raise ConfigurationError(f"policy_server: expected ws://host:port, got {address!r} ({error})") from None
        self.address, self.timeout_s, self.wait_s = address, timeout_s, max(wait_s, timeout_s)
        self._places: list[Any] = []  # the addresses of its name, once it was looked up
        self._headers = {"Authorization": f"{SCHEME} {token}"} if token else {}
        self._resources = ExitStack()
        self._connection: ClientConnection | None = None
        self._metadata: dict[str, Any] | None = None
        self._closed = False

    @property
    def description(self) -> str:
        return f"policy server {self.address}"

    def reach(
        self, stopped: Callable[[], bool] = lambda: False, say: Callable[[str], object] = lambda line: None
    ) -> None:
        """Connect, and wait for a server that is not there yet; EngineError if it is not after `wait_s`.

        `stopped` is asked between attempts, and ends the waiting; `say` gets a line when it begins.
        """
        until_s, told = time.monotonic() + self.wait_s, False
        while True:
            try:
                self._connected(min(until_s - time.monotonic(), max(ATTEMPT_S, self.timeout_s)))
                return
            except NotThereError as fault:
                if time.monotonic() + AGAIN_S >= until_s:
                    raise NotThereError(f"{fault} (waited {self.wait_s:g} s)") from None
                if not told:
                    say(f"waiting up to {self.wait_s:g} s: {fault}")
                    told = True
            if stopped():
                raise EngineError(f"{self.description}: no longer waited for: the node is to stop")
            time.sleep(AGAIN_S)

    def metadata(self) -> dict[str, Any]:
        """What the server said of itself when it was first reached; connects if nobody has. EngineError if it fails."""
        self._connected(self.timeout_s)
        assert self._metadata is not None
        return self._metadata

    def agree(self, ours: Mapping[str, Any], whose: str) -> None:
        """ConfigurationError if the server says otherwise of its policy; openpi's own says nothing of it."""
        said = self.metadata()
        for key, expected in ours.items():
            if key in said and not _same(said[key], expected):
                raise ConfigurationError(
                    f"{self.description}: {key}: expected {expected}, as {whose} and the keys say, got "
                    f"{_said(said[key])}"
                )

    def actions(self, message: dict[str, Any], horizon: int | None, count: int) -> NDArray[np.float64]:
        """The actions [H, D] that an observation is answered with, `count` numbers each; EngineError for all else.

        `horizon`: how many; None: as many as the server gives.
        """
        answer = self.ask(message)
        given = answer.get("actions")
        if given is None and isinstance(error := answer.get("error", answer.get("message")), str):  # SGLang's, vLLM's
            raise EngineError(f"{self.description}: it refused the observation: {_said(error)}")
        if (
            not isinstance(given, np.ndarray)
            or given.dtype.kind != "f"
            or given.ndim != 2
            or given.shape != (horizon or max(1, len(given)), count)
        ):
            shape = f"[{horizon or 'any'}, {count}]"
            got = f"{given.dtype} {list(given.shape)}" if isinstance(given, np.ndarray) else _said(given)
            raise EngineError(f"{self.description}: actions: expected float {shape}, got {got}")
        actions_HD = given.astype(np.float64)
        if not np.all(fits := np.abs(actions_HD) < LARGEST_NUMBER):
            raise EngineError(
                f"{self.description}: actions: expected numbers within {LARGEST_NUMBER:g}, got {actions_HD[~fits][0]}"
            )
        return actions_HD

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """The answer to an observation, within `timeout_s` once there is a connection; EngineError for all else."""
        connection = self._connected(self.timeout_s)
        until_s = time.monotonic() + self.timeout_s  # its own: on a slow wire one time is not enough for both
        try:
            with suppress(TimeoutError):
                connection.recv(0)
                raise self._fail("expected one answer to each observation, got one more")
            connection.send(pack(message))
            answer = connection.recv(max(0.0, until_s - time.monotonic()))
        except TimeoutError:
            raise self._fail(f"expected an answer within {self.timeout_s:g} s, got none") from None
        except (OSError, WebSocketException) as error:
            raise self._fail(f"expected an answer, got the end of the connection ({_said(error)})") from None
        if isinstance(answer, str):  # openpi's server closes after it; ours lives on
            raise EngineError(f"{self.description}: it refused the observation: {_said(answer)}")
        return self._unpacked(answer, "an answer")

    def prefill(self, model_input: ModelInput) -> KVCache:
        raise EngineError(f"{self.description}: expected whole observations, got a model's input")

    def velocity(
        self,
        cache: KVCache,
        state_W: NDArray[np.float32] | None,
        x_t_HA: NDArray[np.float32],
        time: float,
        clean_H: NDArray[np.bool_],
    ) -> NDArray[np.float32]:
        raise EngineError(f"{self.description}: expected whole observations, got a step of the expert")

    def disconnect(self) -> None:
        """Leave; the next question connects anew."""
        self._connection = None
        self._resources.close()

    def close(self) -> None:
        self._closed = True
        self.disconnect()

    def _connected(self, within_s: float) -> ClientConnection:
        until_s = time.monotonic() + within_s
        if self._closed:
            raise EngineError("engine: expected an open one, got one that was closed; configure again")
        if self._connection is not None:
            if self._connection.protocol.state is State.OPEN:
                return self._connection
            self.disconnect()  # the server has gone since the last answer, and may be back
        try:
            self._connection = self._resources.enter_context(
                connect(
                    self.address,
                    sock=self._dial(until_s),
                    additional_headers=self._headers,
                    compression=None,
                    max_size=LARGEST_ANSWER,
                    open_timeout=max(0.0, until_s - time.monotonic()),
                    close_timeout=CLOSING_S,
                    proxy=None,
                    ping_interval=None,  # a server that computes where it listens answers none
                    logger=_SILENT,
                )
            )
            # A wire that takes nothing any more must not block a send for ever.
            seconds, share = divmod(self.timeout_s, 1.0)
            bound = struct.pack("ll", int(seconds), int(share * 1e6))
            self._connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, bound)
            first = self._connection.recv(max(0.0, until_s - time.monotonic()))
        except ssl.SSLCertVerificationError as error:
            raise self._fail(f"expected a certificate that is trusted here, got {_said(error)}") from None
        except ssl.SSLError as error:
            raise self._fail(f"expected TLS, got {_said(error)}; without it, say ws://") from None
        except TimeoutError:
            raise self._fail(f"expected a connection within {within_s:.3g} s, got none", NotThereError) from None
        except (InvalidHandshake, InvalidURI, ValueError) as error:  # the last two: where it sends us elsewhere
            status = error.response.status_code if isinstance(error, InvalidStatus) else 0
            ended = isinstance(error, InvalidMessage) and isinstance(error.__cause__, EOFError)
            hint = "; is a token needed?" if status in (401, 403) else ""
            kind = NotThereError if ended or status in STARTING else EngineError
            raise self._fail(f"expected a policy server, got {_said(error)}{hint}", kind) from None
        except (OSError, WebSocketException) as error:
            fault = f"expected a connection, got {_said(error)}; is it running?"
            raise self._fail(fault, NotThereError) from None
        found = self._unpacked(first, "metadata")
        if self._metadata is None:
            self._metadata = found
        elif not _same(found, self._metadata):
            raise self._fail("expected the same policy as before, got another; configure again if that is meant")
        return self._connection

    def _dial(self, until_s: float) -> socket.socket:
        """A TCP connection to the first of the server's addresses that takes one, all within one time; OSError.

        A name is looked up once: that has no limit of time, and holds are no time for it.
        """
        uri = parse_uri(self.address)
        self._places = self._places or socket.getaddrinfo(uri.host, uri.port, type=socket.SOCK_STREAM)
        fault: OSError = OSError("its name has no address")
        for left, (family, kind, protocol, _, place) in zip(range(len(self._places), 0, -1), self._places, strict=True):
            dialled = socket.socket(family, kind, protocol)
            dialled.settimeout(max(0.001, (until_s - time.monotonic()) / left))
            try:
                dialled.connect(place)
            except OSError as error:
                dialled.close()
                fault = error
            else:
                dialled.settimeout(None)
                return dialled
        raise fault

    def _unpacked(self, frame: str | bytes, what: str) -> dict[str, Any]:
        try:
            found = unpack(frame) if isinstance(frame, bytes) else frame
            if isinstance(found, np.ndarray):
                found = {"actions": found}  # as vLLM-Omni answers
        except InputError as error:
            raise self._fail(f"expected {what}, got nonsense: {error}") from None
        if not isinstance(found, dict):
            raise self._fail(f"expected {what}, a map, got {_said(found)}")
        return found

    def _fail(self, fault: str, kind: type[EngineError] = EngineError) -> EngineError:
        self.disconnect()
        return kind(f"{self.description}: {fault}")


class RemotePolicy(Policy):
    """A policy that asks a server; steps and noise are the server's own. `executor`: what its chunks are joined by."""

    def __init__(
        self,
        bundle: Bundle,
        engine: ServerEngine,
        keys: Keys,
        executor: str = "asynchronous",
        stopped: Callable[[], bool] = lambda: False,
        say: Callable[[str], object] = lambda line: None,
    ) -> None:
        super().__init__(bundle, engine)
        keys.check(bundle.manifest.robot)
        self._server, self._keys, self._executor = engine, keys, executor
        self._stopped, self._say = stopped, say
        self._generation = 0
        self._question: tuple[Observation, dict[str, Any]] | None = None

    def warm_up(self) -> None:
        """ConfigurationError if the server says that its policy is another robot's; EngineError if it is not there.

        It is waited for: the robot's computer may have started before the server's.
        """
        self._server.reach(self._stopped, self._say)
        robot = self.bundle.manifest.robot
        ours = {"horizon": robot.horizon} | self._keys.meaning(robot)
        self._server.agree(ours, f"bundle {self.bundle.manifest.name!r}")
        if self._executor not in ("rtc", "rtc_trained"):
            return
        if (clean := self._running()) is None:
            raise ConfigurationError(f"parameter 'executor': {self._no_rtc()}")
        if self._executor == "rtc_trained" and clean < (most := self.bundle.manifest.max_prefix_delay):
            raise ConfigurationError(
                f"parameter 'executor': rtc_trained: expected a server whose model was trained on clean prefixes of "
                f"{most} actions, as bundle {self.bundle.manifest.name!r}, got {clean}; use rtc"
            )

    def _running(self) -> int | None:
        """How many actions of the running chunk may be clean, as the server says; None if it takes no such chunk."""
        said = self._server.metadata().get(RUNNING)
        return said if isinstance(said, int) and not isinstance(said, bool) and said >= 0 else None

    def see(self, observation: Observation, instruction: str, stage: Stage = untimed) -> KVCache:
        """Writes the question, which `denoise` asks; the ticket stands for it.

        The state goes out as an engine here would have it: in the turn that the model was trained in.
        """
        manifest = self.bundle.manifest
        with stage("preprocess"):
            observation = replace(observation, state_S=trained_turn(manifest, observation.state_S))
            clean_instruction(instruction, manifest.prompt.style)
            message = self._keys.message(observation, instruction, manifest.robot, manifest.image.size)
        self._generation += 1
        self._question = observation, message
        return KVCache(self, self._generation)

    def denoise(
        self,
        cache: KVCache,
        noise_HA: NDArray[np.float32],
        state_S: NDArray[np.float32] | None = None,
        guide: Guide | None = None,
    ) -> NDArray[np.float32]:
        """The server's answer as a model of this bundle would have given it."""
        if cache.engine is not self or cache.generation != self._generation or self._question is None:
            raise EngineError(f"{self._server.description}: expected the newest observation, got an older one")
        (observation, message), self._question = self._question, None
        if guide is not None:
            if self._running() is None:
                raise EngineError(f"{self._server.description}: {self._no_rtc()}")
            message |= {RUNNING: running_message(guide, observation.state_S, self, self._keys)}
        manifest = self.bundle.manifest
        given_HD = self._server.actions(message, manifest.horizon, len(manifest.robot.actions))
        return self.normalized(self._keys.robot_actions(given_HD, manifest.robot), observation.state_S)

    def _no_rtc(self) -> str:
        return (
            "expected a server that takes the running chunk, as ours does, for rtc and rtc_trained, got one that does "
            "not say so; use asynchronous, synchronous or temporal_ensemble"
        )


def open_remote(
    bundle: Bundle,
    settings: Settings,
    stopped: Callable[[], bool] = lambda: False,
    say: Callable[[str], object] = lambda line: None,
) -> RemotePolicy:
    """The policy of the settings' server; ConfigurationError if they are not for this robot.

    It connects later, and waits then; `stopped` and `say` are as in `ServerEngine.reach`.
    """
    keys = open_keys(settings.policy_server_keys, bundle.manifest.robot)
    path = settings.policy_server_token
    token = read_token(path, "parameter 'policy_server_token':") if path else ""
    engine = ServerEngine(
        settings.policy_server, token, settings.policy_server_timeout_s, settings.policy_server_wait_s
    )
    return RemotePolicy(bundle, engine, keys, settings.executor, stopped, say)


def _same(first: Any, second: Any) -> bool:
    """Whether two values of metadata are equal, which may have arrays in them; a product of periods is rounded."""
    if isinstance(first, float) and isinstance(second, float):
        return math.isclose(first, second, rel_tol=1e-6)
    return pack(first) == pack(second)


def _said(value: object) -> str:
    """What a server, or the library, said, on one line of bounded length; of a traceback its last line."""
    text = value if isinstance(value, str) else str(value) if isinstance(value, Exception) else short_repr(value)
    if text.startswith("Traceback "):
        text = text.rstrip().rpartition("\n")[2]
    return printable(" ".join(text[: 4 * LONGEST_SAID].split()))[:LONGEST_SAID] or type(value).__name__
