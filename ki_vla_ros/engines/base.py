"""The contract between the policy and whatever runs the two graphs.

Legend: H horizon, A action dim, J joints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.preprocess import ModelInput


@dataclass(frozen=True, slots=True, eq=False)
class KVCache:
    """A ticket for the keys and values that an engine holds where it runs.

    An engine has one set of buffers, so a prefill overwrites what an earlier ticket stood for: that ticket is refused.
    """

    engine: object
    generation: int


class Engine(Protocol):
    """Runs the graphs of one bundle; calls come from one thread, arrays passed in are only read during the call."""

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
        state_J: NDArray[np.float32] | None,
        x_t_HA: NDArray[np.float32],
        time_H: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """One expert step: the flow's velocity [H, A] at x_t, one time in 0..1 per action; the caller may keep it."""
        ...

    def close(self) -> None:
        """Free sessions and buffers; further calls raise EngineError."""
        ...
