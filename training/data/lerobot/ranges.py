"""How far the numbers of a dataset reach, beside the limits of the robot file.

Legend: F frames, S state, D actions, N both: the state, then the actions.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.robot import ActionDimension, Robot, StateDimension
from ki_vla_ros.survey import BEYOND

FAR: Final = 0.1  # of that range: no rounding, and no arm that leans on its stop
WILD: Final = 1.0  # a range's width away from it
LARGEST: Final = 1e6  # of what has no limits; no robot counts so far in any unit
MOST_FAR: Final = 0.01  # of the frames


class Ranges:
    """Of each number of state and actions: the least, the largest, and in how many frames it is outside or far away."""

    def __init__(self, robot: Robot) -> None:
        self.robot = robot
        self.dimensions: list[tuple[str, StateDimension | ActionDimension]] = [
            *(("state", d) for d in robot.state),
            *(("action", d) for d in robot.actions),
        ]
        self.limits_N2 = np.array([_limits_of(d, robot) for _, d in self.dimensions])
        count, self.frames = len(self.dimensions), 0
        self.low_N, self.high_N = np.full(count, np.inf), np.full(count, -np.inf)
        self.outside_N, self.far_N = (np.zeros(count, dtype=np.int64) for _ in range(2))
        self.wild_N: list[str | None] = [None] * count  # where the first number is that no robot has

    def add(self, episode: int, state_FS: NDArray[Any], action_F: NDArray[Any]) -> None:
        """An episode's frames; `action_F` is [F, D], or has a chunk [H, D] for each."""
        count = len(state_FS)
        action_FHD = action_F.reshape(count, -1, action_F.shape[-1])
        low_FN = np.concatenate([state_FS, action_FHD.min(axis=1)], axis=1)
        high_FN = np.concatenate([state_FS, action_FHD.max(axis=1)], axis=1)
        self.low_N, self.high_N = (
            np.minimum(self.low_N, low_FN.min(axis=0)),
            np.maximum(self.high_N, high_FN.max(axis=0)),
        )
        self.outside_N += self._beyond(low_FN, high_FN, BEYOND).sum(axis=0)
        self.far_N += self._beyond(low_FN, high_FN, FAR).sum(axis=0)
        for n in np.flatnonzero((wild_FN := self._beyond(low_FN, high_FN, WILD)).any(axis=0)).tolist():
            self.wild_N[n] = self.wild_N[n] or f"frame {int(wild_FN[:, n].argmax())} of episode {episode}"
        self.frames += count

    def describe(self, n: int) -> str:
        what, dimension = self.dimensions[n]
        low, high = self.limits_N2[n]
        between = f"{low:g} to {high:g}" if np.isfinite(low) or np.isfinite(high) else "none"
        reach = f"{self.low_N[n]:.4g} to {self.high_N[n]:.4g} {dimension.own_unit()}"
        return f"{what} {dimension.name}: {reach}, limits {between}"

    def misfit(self) -> str | None:
        """What of these numbers can hardly be this robot's, with what to do; None: nothing."""
        for n, (what, dimension) in enumerate(self.dimensions):
            far, wild = int(self.far_N[n]), self.wild_N[n]
            if far <= MOST_FAR * self.frames and wild is None:
                continue
            low, high = self.limits_N2[n]
            hint, reach = "", max(-self.low_N[n], self.high_N[n])
            if dimension.own_unit() == "rad" and np.radians(reach) <= 1.1 * max(-low, high):
                hint = "are these degrees? (unit: deg under its dataset) "
            first = f", first in {wild}" if wild is not None else ""
            key = "state" if what == "state" else "actions"
            return (
                f"{self.describe(n)}: {far} of {self.frames} frames are far outside{first}; {hint}correct limits, unit "
                f"or index of {dimension.name!r} under {key} in the robot file of {self.robot.name}, or leave such "
                "episodes out (episodes)"
            )
        return None

    def _beyond(self, low_FN: NDArray[Any], high_FN: NDArray[Any], share: float) -> NDArray[np.bool_]:
        limits_N2 = np.where(np.isfinite(self.limits_N2), self.limits_N2, np.sign(self.limits_N2) * LARGEST)
        slack_N = share * (limits_N2[:, 1] - limits_N2[:, 0])
        return np.asarray((low_FN < limits_N2[:, 0] - slack_N) | (high_FN > limits_N2[:, 1] + slack_N))


def _limits_of(dimension: StateDimension | ActionDimension, robot: Robot) -> tuple[float, float]:
    """Infinite where there is none. What is seen of a joint has the limits of what moves it."""
    if dimension.continuous or dimension.kind in ("pose", "pose_delta"):
        return -np.inf, np.inf
    if isinstance(dimension, ActionDimension):
        most = dimension.max_velocity or np.inf
        return (-most, most) if dimension.kind in ("twist", "joint_velocity") else dimension.span
    if found := dimension.limits or dimension.ends:
        return min(found), max(found)
    alike = (dimension.name, dimension.kind, dimension.own_unit())
    moved = [a for a in robot.actions if (a.name, a.kind, a.own_unit()) == alike]
    return _limits_of(moved[0], robot) if moved else (-np.inf, np.inf)
