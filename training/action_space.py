"""Normalisation: what -1 and 1 mean for each dimension of one robot's state and actions, from its training data.

Legend: N frames, H horizon, S state, D actions. Nothing is clipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.policy import normalize, unnormalize
from ki_vla_ros.robot import (
    ActionDimension,
    CommandSpace,
    Robot,
    StateDimension,
    continuous,
    nearest_rotation,
    nearest_turn,
)

Array = NDArray[np.float64]
Normalization = Literal["quantile", "mean_std"]
StateRange = Literal["whole", "quantile"]
LEAST_SHARE = 0.01  # of a dimension's limits, or of its kind's largest reach: what hardly moves is not blown up


@dataclass(frozen=True)
class Numbers:
    """What a fit looks at: frames drawn from all of a robot's data, and what is exact over all of it."""

    state_NS: Array
    chunk_NHD: Array
    known_NH: NDArray[np.bool_]
    lowest_S: Array
    highest_S: Array


@dataclass(frozen=True)
class ActionSpace:
    """Linear maps of a robot's state, and of its actions counted from where they begin: the state if relative."""

    robot: Robot
    state_low: tuple[float, ...]
    state_high: tuple[float, ...]
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]

    @classmethod
    def fit(
        cls, robot: Robot, numbers: Numbers, method: Normalization = "quantile", state_range: StateRange = "whole"
    ) -> ActionSpace:
        """From the data's numbers, by one of two methods.

        quantile: actions from their 1 % to their 99 % quantile, and symmetric where zero means "stay" (differences,
        steps, velocities), so that zero is 0 and both directions are resolved equally; states over their whole range
        and a margin, as bins cannot express more, or with `state_range` from quantile to quantile too, as in pi0.5:
        finer bins, and the outermost for all that lies beyond. mean_std: one standard deviation to both sides of the
        mean.
        """
        counted_NHD = cls._plain(robot).count(numbers.chunk_NHD, numbers.state_NS)
        known_ND = counted_NHD[numbers.known_NH]
        if method == "mean_std":
            state = _around(numbers.state_NS, _floors(robot.state, numbers.highest_S - numbers.lowest_S))
            deviation_D = known_ND.std(axis=0)
            action = _around(known_ND, _floors(robot.actions, deviation_D))
        else:
            span_S = numbers.highest_S - numbers.lowest_S
            if state_range == "quantile":
                low_S, high_S = np.quantile(numbers.state_NS, (0.01, 0.99), axis=0)
                margin_S = np.maximum(0.0, _floors(robot.state, span_S) - (high_S - low_S) / 2)
            else:
                low_S, high_S = numbers.lowest_S, numbers.highest_S
                margin_S = np.maximum(0.05 * span_S, _floors(robot.state, span_S) / 2)
            state = low_S - margin_S, high_S + margin_S
            low_D, high_D = np.quantile(known_ND, (0.01, 0.99), axis=0)
            centred_D = np.array([stays_at_zero(action) for action in robot.actions])
            reach_D = np.maximum(np.abs(low_D), np.abs(high_D))
            low_D, high_D = np.where(centred_D, -reach_D, low_D), np.where(centred_D, reach_D, high_D)
            short_D = np.maximum(0.0, _floors(robot.actions, reach_D) - (high_D - low_D) / 2)
            action = low_D - short_D, high_D + short_D
        return cls(robot, *(tuple(float(x) for x in values) for values in (*state, *action)))

    @classmethod
    def _plain(cls, robot: Robot) -> ActionSpace:
        """Before anything is known: turns and rotations stay as they are written."""
        states, actions = ((1.0,) * len(dimensions) for dimensions in (robot.state, robot.actions))
        return cls(robot, tuple(-x for x in states), states, tuple(-x for x in actions), actions)

    @cached_property
    def commands(self) -> CommandSpace:
        return CommandSpace(self.robot)

    def normalize_state(self, state_S: Array) -> Array:
        """[..., S], as `ki_vla_ros.policy` has it on the robot."""
        return normalize(self._trained_turn(state_S), self.state_low, self.state_high)

    def normalize_chunk(self, chunk_HD: Array, state_S: Array) -> Array:
        """Absolute actions [..., H, D] -> normalised, counted from the state [..., S] where they are relative."""
        counted_HD = self.count(chunk_HD, state_S)
        middle_D = (np.array(self.action_low) + np.array(self.action_high)) / 2.0
        counted_HD = nearest_rotation(counted_HD, middle_D, self.robot.actions)
        return normalize(counted_HD, self.action_low, self.action_high)

    def unnormalize_chunk(self, action_HD: Array, state_S: Array) -> Array:
        """The inverse of `normalize_chunk`, up to whole turns and the two ways of writing a rotation."""
        return unnormalize(action_HD, self.action_low, self.action_high) + self._origin(state_S)[..., None, :]

    def count(self, chunk_HD: Array, state_S: Array) -> Array:
        """Actions [..., H, D] from where they are counted; joints that turn without end go the shortest way."""
        counted_HD = chunk_HD - self._origin(state_S)[..., None, :]
        endless_D = continuous(self.robot.actions) & np.array([action.relative for action in self.robot.actions])
        if endless_D.any():
            counted_HD[..., 0, :] = nearest_turn(counted_HD[..., 0, :], np.zeros(len(endless_D)), endless_D)
            unwound_HD = np.unwrap(counted_HD, axis=-2)
            counted_HD = np.where(endless_D, unwound_HD, counted_HD)
        return counted_HD

    def _origin(self, state_S: Array) -> Array:
        return self.commands.origin(state_S, state_S - self._trained_turn(state_S))

    def _trained_turn(self, state_S: Array) -> Array:
        middle_S = (np.array(self.state_low) + np.array(self.state_high)) / 2.0
        state_S = nearest_turn(state_S, middle_S, continuous(self.robot.state))
        return nearest_rotation(state_S, middle_S, self.robot.state)


def stays_at_zero(action: ActionDimension) -> bool:
    """Whether an action of zero, counted from where it begins, means "stay"."""
    return action.relative or action.kind in ("pose_delta", "twist", "joint_velocity")


def _floors(dimensions: Sequence[StateDimension | ActionDimension], reach_D: Array) -> Array:
    """The least half-width of each dimension's range."""
    floors = []
    for dimension in dimensions:
        alike = [reach_D[e] for e, other in enumerate(dimensions) if other.own_unit() == dimension.own_unit()]
        widest = max((float(reach) for reach in alike), default=0.0)
        if dimension.limits is not None:
            widest = max(widest, dimension.limits[1] - dimension.limits[0])
        floors.append(max(LEAST_SHARE * widest, 1e-6))
    return np.array(floors)


def _around(values_ND: Array, floor_D: Array) -> tuple[Array, Array]:
    mean_D, deviation_D = values_ND.mean(axis=0), np.maximum(values_ND.std(axis=0), floor_D)
    return mean_D - deviation_D, mean_D + deviation_D
