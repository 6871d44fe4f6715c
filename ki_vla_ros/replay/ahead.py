"""The next tick's chunk, computed on a second engine while the present tick is worked on.

A bag says early what the next tick will see. Where the guess was right (the very arrays), the tick takes the finished
chunk; where it was not, it computes as ever, so a replay gives the same with and without. Not for measured latencies,
which it would disturb, nor for executors that tell a chunk of the one before.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.bundle.folder import Bundle
from ki_vla_ros.engines.base import Engine
from ki_vla_ros.errors import KiVlaError
from ki_vla_ros.policy.policy import Policy
from ki_vla_ros.policy.preprocess import make_model_input
from ki_vla_ros.records import ModelInput, Observation
from ki_vla_ros.settings.settings import Settings


@dataclass(frozen=True, eq=False)
class Guess:
    """The input that was expected, and what the policy makes of it and of `noise_HA`: normalised actions."""

    model_input: ModelInput
    noise_HA: NDArray[np.float32]
    flow_steps: int
    actions_HA: NDArray[np.float32]

    def is_of(self, model_input: ModelInput) -> bool:
        names = [field.name for field in fields(ModelInput)]
        return all(np.array_equal(getattr(self.model_input, name), getattr(model_input, name)) for name in names)


class Ahead:
    """A thread with an engine of its own, which stays the caller's. Use as a context manager."""

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        self._policy = Policy(bundle, engine)
        self._policy.warm_up()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._future: Future[Guess | None] | None = None

    def __enter__(self) -> Ahead:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)

    def begin(self, observation: Observation, instruction: str, chunk_index: int, flow_steps: int, seed: int) -> None:
        """Starts on a guess; the one before is over or forgotten."""
        self.take()
        self._future = self._thread.submit(self._compute, observation, instruction, chunk_index, flow_steps, seed)

    def take(self) -> Guess | None:
        """The last guess, when it is finished; None if there is none, or it cannot be computed."""
        future, self._future = self._future, None
        return None if future is None else future.result()

    def _compute(
        self, observation: Observation, instruction: str, chunk_index: int, flow_steps: int, seed: int
    ) -> Guess | None:
        policy = self._policy
        policy.flow_steps, policy.noise_seed = flow_steps, seed
        try:
            bundle = policy.bundle
            model_input = make_model_input(bundle.manifest, bundle.tokenizer, observation, instruction)
            noise_HA = policy.noise(chunk_index)
            actions_HA = policy.denoise(policy.prefill(model_input), noise_HA, model_input.state_J)
        except KiVlaError:
            return None  # the tick itself will say what is wrong
        return Guess(model_input, noise_HA, flow_steps, actions_HA)


def can_guess(settings: Settings) -> bool:
    """Whether every tick makes a chunk that depends on nothing but its inputs."""
    every_tick = settings.executor == "temporal_ensemble" or (
        settings.executor == "asynchronous" and settings.execution_horizon_s * settings.rate_hz < 1.5
    )
    return every_tick and settings.prefill_period_s == 0.0
