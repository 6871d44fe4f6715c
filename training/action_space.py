"""Normalisation: what -1 and 1 mean for each joint's state and action, from the training data.

Legend: N frames, H horizon, J joints (action dim A = J). Quantiles as in pi0.5 (arXiv 2504.16054), not clipped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.policy import normalize, unnormalize

LEAST_RANGE = 0.03  # m or rad: a joint that hardly moves is not blown up to full scale


@dataclass(frozen=True)
class ActionSpace:
    """Linear maps of state and of the action relative to the state; tuples of J numbers."""

    state_low: tuple[float, ...]
    state_high: tuple[float, ...]
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]

    @classmethod
    def fit(cls, state_NJ: NDArray[np.floating], chunk_NHJ: NDArray[np.floating]) -> ActionSpace:
        """State: full range and a margin, as its bins cannot express more; action: symmetric 1 % and 99 % quantiles.

        Symmetric, so that "stay" is exactly 0 and motions to the left and to the right are resolved equally.
        """
        low, high = state_NJ.min(axis=0), state_NJ.max(axis=0)
        margin = np.maximum(0.05 * (high - low), LEAST_RANGE / 2)
        relative_NJ = (chunk_NHJ - state_NJ[:, None]).reshape(-1, state_NJ.shape[1])
        reach = np.maximum(np.abs(np.quantile(relative_NJ, (0.01, 0.99), axis=0)).max(axis=0), LEAST_RANGE)
        return cls(*(tuple(float(x) for x in values) for values in (low - margin, high + margin, -reach, reach)))

    def normalize_chunk(self, chunk_HJ: NDArray[np.floating], state_S: NDArray[np.floating]) -> NDArray[np.float64]:
        """Absolute positions [..., H, J] -> normalised, relative to the state [..., J]."""
        return normalize(chunk_HJ - state_S[..., None, :], self.action_low, self.action_high)

    def unnormalize_chunk(self, action_HA: NDArray[np.floating], state_S: NDArray[np.floating]) -> NDArray[np.float64]:
        """The inverse of `normalize_chunk`."""
        return unnormalize(action_HA, self.action_low, self.action_high) + state_S[..., None, :]
