"""What travels from stage to stage: frozen records without ROS types.

Legend: H image height or horizon (by name), W width, C channel, J joints. Stamps are integer nanoseconds on the
node's clock. Arrays inside a record are never written to after the record was made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NS_PER_S = 1_000_000_000


@dataclass(frozen=True, slots=True, eq=False)
class CameraFrame:
    """One image: `rgb_HWC` uint8, taken at `stamp_ns`."""

    camera: str
    stamp_ns: int
    rgb_HWC: NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class JointReading:
    """Joint positions `position_J` (rad or m, order of `names`), measured at `stamp_ns`."""

    stamp_ns: int
    names: tuple[str, ...]
    position_J: NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """Inputs that belong together in time.

    `stamp_ns` is the oldest stamp among the frames; `state_J` is the joint state at that time in the manifest's order
    and units; `frames` holds one frame per required camera (an optional camera may be absent).
    """

    stamp_ns: int
    frames: Mapping[str, CameraFrame]
    state_J: NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class ActionChunk:
    """Absolute joint positions that a robot shall reach one period after another.

    `position_HJ[k]` (rad or m, order of `joints`) is due at `start_ns + (k + 1) * period_ns`: the first action is one
    period after the observation it was computed from (`start_ns` is that observation's stamp). `velocity_HJ` belongs to
    the same instants.
    """

    start_ns: int
    period_ns: int
    joints: tuple[str, ...]
    position_HJ: NDArray[np.float64]
    velocity_HJ: NDArray[np.float64]

    def due_ns(self, k: int) -> int:
        """When action `k` shall be reached, on the node's clock."""
        return self.start_ns + (k + 1) * self.period_ns

    @property
    def horizon(self) -> int:
        return int(self.position_HJ.shape[0])
