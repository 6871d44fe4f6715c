"""The contract between the policy and whatever runs the two graphs.

Legend: H horizon, A action dim, W width of the state token, M modulation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.bundle import EXPERT, TensorType
from ki_vla_ros.errors import EngineError
from ki_vla_ros.records import ModelInput


@dataclass(frozen=True, slots=True, eq=False)
class KVCache:
    """A ticket for the keys and values that an engine holds where it runs.

    An engine has one set of buffers, so a prefill overwrites what earlier tickets stood for: those are refused.
    """

    engine: object
    generation: int


class Engine(Protocol):
    """Runs the graphs of one bundle; calls come from one thread, arrays passed in are only read during the call.

    Every engine writes these signatures out: they share no code, so there is no base class, and mypy compares each with
    this contract.
    """

    @property
    def description(self) -> str:
        """What runs where, for logs and diagnostics."""
        ...

    def prefill(self, model_input: ModelInput) -> KVCache:
        """Run the backbone once. The cache is valid until the next prefill or close."""
        ...

    def velocity(
        self,
        cache: KVCache,
        state_W: NDArray[np.float32] | None,
        x_t_HA: NDArray[np.float32],
        time: float,
        clean_H: NDArray[np.bool_],
    ) -> NDArray[np.float32]:
        """One expert step: the flow's velocity [H, A] at x_t and flow time 0..1; the caller may keep it.

        Clean actions have time 0, whatever `time` is.
        """
        ...

    def close(self) -> None:
        """Free sessions and buffers; further calls raise EngineError."""
        ...


@runtime_checkable
class IntegratingEngine(Engine, Protocol):
    """An engine that takes all steps of a chunk without the host in between."""

    def integrate(
        self,
        cache: KVCache,
        state_W: NDArray[np.float32] | None,
        x_t_HA: NDArray[np.float32],
        steps: int,
        clean_H: NDArray[np.bool_],
    ) -> NDArray[np.float32]:
        """Euler steps from t = 1 to 0; clean actions stay as they are -> [H, A], which the caller may keep."""
        ...


@runtime_checkable
class DifferentiableEngine(Engine, Protocol):
    """An engine with a backward pass through the expert."""

    def pullback(
        self,
        cache: KVCache,
        state_W: NDArray[np.float32] | None,
        x_t_HA: NDArray[np.float32],
        time: float,
        clean_H: NDArray[np.bool_],
        vector_HA: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """(d velocity / d x_t)^T vector, [H, A], at x_t; the caller may keep it. A forward and a backward pass."""
        ...


def prefill_inputs(model_input: ModelInput) -> dict[str, NDArray[np.generic]]:
    """The inputs by their names in the prefill graph."""
    return {
        "images": model_input.images_VCHW,
        "image_mask": model_input.image_mask_V,
        "tokens": model_input.tokens_L,
        "token_mask": model_input.token_mask_L,
    }


def expert_inputs(
    types: Mapping[str, TensorType],
    state_W: NDArray[np.float32] | None,
    x_t_HA: NDArray[np.float32],
    modulation_M: NDArray[np.float32],
    clean_H: NDArray[np.bool_],
    step: float = 0.0,
) -> dict[str, NDArray[np.generic]]:
    """The inputs that change from step to step; EngineError if a state is missing, or the expert takes none."""
    expected = "state" in types
    if expected != (state_W is not None):
        wanted, got = ("a state token", "none") if expected else ("none, the prompt has it as text", "one")
        raise EngineError(f"{EXPERT}: state: expected {wanted}, got {got}")
    inputs: dict[str, NDArray[np.generic]] = {"x_t": x_t_HA, "modulation": modulation_M, "clean": clean_H}
    inputs["step"] = np.array([step], dtype=np.float32)
    return inputs if state_W is None else inputs | {"state": state_W}


def check_types(graph: str, types: Mapping[str, TensorType], inputs: Mapping[str, NDArray[np.generic]]) -> None:
    for name, array in inputs.items():
        expected, got = types[name], TensorType(array.dtype.name, array.shape)
        if got != expected:
            raise EngineError(f"{graph}: {name}: expected {expected}, got {got}")


def check_cache(engine: object, cache: KVCache, newest: int) -> None:
    """EngineError unless the ticket comes from this engine's newest prefill."""
    if cache.engine is not engine or cache.generation != newest:
        raise EngineError(
            f"KV cache: expected that of this engine's newest prefill ({newest}), got one of prefill "
            f"{cache.generation}{'' if cache.engine is engine else ' of another engine'}; "
            "run prefill and its steps without another prefill between them"
        )


def check_finite(values_HA: NDArray[np.float32], what: str = "velocities") -> NDArray[np.float32]:
    if not np.all(np.isfinite(values_HA)):
        raise EngineError(f"{EXPERT}: expected finite {what}, got NaN or infinity; is an input or the bundle damaged?")
    return values_HA


def check_open(graphs: Mapping[str, object]) -> None:
    if not graphs:
        raise EngineError("engine: expected an open one, got one that was closed; configure again")


def step_times(steps: int) -> list[float]:
    """Times of the Euler steps from t = 1 to 0; counted in integers, since a sum of -1/steps would drift."""
    return [1.0 - step / steps for step in range(steps)]
