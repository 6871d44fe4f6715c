"""A frame's action: what the robot was told for one period later, or what it did by then, in the robot's units.

Legend: J axes, D action, M signals.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.errors import ConfigurationError, InputError
from ki_vla_ros.messages import BagMessage, decode, joint_reading
from ki_vla_ros.records import NS_PER_S, SignalReading
from ki_vla_ros.robot import CommandSpace, Output, nearest_turn, recorded_signal
from ki_vla_ros.runtime import ObservationBuffer
from ki_vla_ros.runtime.paths import CommandedAxes, MeasuredPath
from training.convert.clock import Clock
from training.convert.sources import Sources

Array = NDArray[np.float64]
Actions = Literal["commands", "states"]
Where = Callable[[], Array | None]
"""Says where the axes are now [J]; None: not known."""


# An axis that is told nothing is still while it stays this near: a share of its range, and at most so much (rad or m).
STILL, MOST_STILL = 0.02, 0.05
FAR_NS = 3600 * NS_PER_S  # by then every trajectory has ended


class ActionPath(Protocol):
    """Actions over time; nobody asks for a time before the last `forget`."""

    @property
    def topics(self) -> tuple[str, ...]:
        """Whose messages it takes, beside those that the observation is made of."""
        ...

    def take(self, message: BagMessage, where: Where) -> None:
        """Takes a message of one of `topics`; InputError says why it is refused."""
        ...

    def add(self, readings: tuple[SignalReading, ...]) -> None:
        """Takes what the observation has accepted of the robot's signals."""
        ...

    def known(self, time_ns: int, now_ns: int) -> bool:
        """Whether `at(..., time_ns, ...)` is final once everything up to `now_ns` has been taken in."""
        ...

    def at(self, stamp_ns: int, due_ns: int, measured_J: Array) -> Array:
        """The action [D] of a frame of `stamp_ns`, when the axes were at `measured_J`; NaN where it is not known."""
        ...

    def forget(self, before_ns: int) -> None: ...

    def clear(self) -> None: ...


class Commanded:
    """As the controllers of all outputs were told; as other joint states say, for actions with `recorded`.

    A gripper, say, may be told something only now and then. From an episode's first command on, outputs that were told
    nothing in it yet rest: where they were last told to be, or where they are, as long as they stay there.
    """

    def __init__(self, sources: Sources, space: CommandSpace, clock: Clock) -> None:
        robot = space.robot
        self._space, self._clock = space, clock
        self._axes = CommandedAxes(robot)
        self._outputs: dict[str, list[Output]] = {}
        for output in sources.commanded():
            self._outputs.setdefault(output.topic, []).append(output)
        self._begun: set[str] = set()  # outputs that a command has come for when it was known where they are
        found = [(d, signal) for d, a in enumerate(robot.actions) if (signal := recorded_signal(a)) is not None]
        self._recorded_D = [d for d, _ in found]
        signals = [signal for _, signal in found]
        self._readings = ObservationBuffer([], signals) if signals else None
        self._recorded = MeasuredPath(signals, max_gap_ns=sources.max_age_ns)
        self._recorded_topics = sources.recorded_topics
        self._previous_J = np.zeros(len(robot.axes), dtype=np.bool_)  # those that an action is counted from
        for pose in space.poses:
            self._previous_J[pose.axes] = not pose.from_observation
        span_J = np.array([axis.upper - axis.lower for axis in robot.axes])
        self._still_J = np.minimum(STILL * span_J, MOST_STILL)
        self._nowhere_J = np.full(len(robot.axes), np.nan)
        # Where axes were last told to be, or how fast to go, and where those rest that were told nothing since.
        self._told_J = self._rest_J = self._nowhere_J
        self._guessed_J = np.zeros(len(robot.axes), dtype=np.bool_)  # the rests that only readings say
        names = [axis.name for axis in robot.axes]
        self._unused_J = np.zeros(len(names), dtype=np.bool_)
        for d in self._recorded_D:
            self._unused_J[names.index(robot.actions[d].target)] = True

    @property
    def topics(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self._outputs, *self._recorded_topics)))

    def take(self, message: BagMessage, where: Where) -> None:
        for output in self._outputs.get(message.topic, ()):
            command = self._clock.command(message, decode(message, *output.message_types))
            # Only the first needs it: the others start from where the controller was told to be.
            measured_J = None if output.name in self._begun else where()
            self._axes.take(output.name, command, message.log_ns, measured_J)
            if measured_J is not None and not self._begun:
                self._rest(output, measured_J)
            if measured_J is not None:  # a command before the first reading begins nowhere: the next one may know
                self._begun.add(output.name)
        if self._readings is not None and message.topic in self._recorded_topics:
            reading = self._clock.reading(message, joint_reading(message))
            self._recorded.add(self._readings.add_joints(reading, message.log_ns, message.topic))

    def add(self, readings: tuple[SignalReading, ...]) -> None:
        pass

    def known(self, time_ns: int, now_ns: int) -> bool:
        recorded = self._readings is None or self._recorded.known(time_ns, now_ns)
        return recorded and self._axes.known(time_ns, now_ns)

    def at(self, stamp_ns: int, due_ns: int, measured_J: Array) -> Array:
        times_ns = np.array([stamp_ns, due_ns])
        position_2J, velocity_2J = self._axes.at(times_ns), self._axes.velocities(times_ns)
        # Numbers that a recording says otherwise count for nothing, but would spoil those that they are computed with.
        position_2J[:, self._unused_J] = velocity_2J[:, self._unused_J] = 0.0
        self._fill_in(position_2J[1], velocity_2J[1], measured_J)
        origin_J = np.where(self._previous_J & ~np.isnan(position_2J[0]), position_2J[0], measured_J)
        action_D = _action(self._space, position_2J[1], velocity_2J[1], origin_J, measured_J)
        if self._readings is not None:
            action_D[self._recorded_D] = self._recorded.at(times_ns[1:])[0]
        return action_D

    def forget(self, before_ns: int) -> None:
        self._axes.forget(before_ns)
        self._recorded.forget(before_ns)

    def clear(self) -> None:
        self._forget_commands()
        self._told_J = self._nowhere_J
        self._recorded.clear()
        if self._readings is not None:
            self._readings.clear()

    def begin_task(self, now_ns: int) -> None:
        """What was told for the task before counts no longer, but is still in force where nothing else is told."""
        then_N = np.array([now_ns + FAR_NS])
        told_J = np.where(self._space.velocity_J, self._axes.velocities(then_N)[0], self._axes.at(then_N)[0])
        self._told_J = np.where(np.isnan(told_J), self._told_J, told_J)
        self._forget_commands()

    def _forget_commands(self) -> None:
        self._axes.clear()
        self._begun.clear()
        self._rest_J = self._nowhere_J

    def _rest(self, first: Output, measured_J: Array) -> None:
        """All outputs but the `first` that was told something rest from now on."""
        velocity_J, untold_J = self._space.velocity_J, np.isnan(self._told_J)
        rest_J = np.where(untold_J, np.where(velocity_J, 0.0, measured_J), self._told_J)
        rest_J[velocity_J & (rest_J != 0.0)] = np.nan  # still going, or stopped by its controller: nobody says
        rest_J[self._space.robot.axes_of(first)] = np.nan
        self._rest_J, self._guessed_J = rest_J, untold_J & ~velocity_J

    def _fill_in(self, position_J: Array, velocity_J: Array, measured_J: Array) -> None:
        """The rests of axes that were told nothing; not of those that have moved all the same."""
        moved_J = self._guessed_J & ~(np.abs(measured_J - self._rest_J) <= self._still_J)
        moving_J = self._space.velocity_J
        resting_J = np.isnan(np.where(moving_J, velocity_J, position_J)) & ~np.isnan(self._rest_J) & ~moved_J
        position_J[resting_J] = np.where(moving_J, 0.0, self._rest_J)[resting_J]
        velocity_J[resting_J] = 0.0


class Measured:
    """As the robot did: where its axes were, and how fast they went in between."""

    def __init__(self, sources: Sources, space: CommandSpace) -> None:
        """ConfigurationError names the actions that nobody measures."""
        self._space = space
        self._path = MeasuredPath(space.robot.signals, space.robot, sources.max_age_ns)
        if unmeasured := [axis.name for axis in space.axes if not axis.measured]:
            raise ConfigurationError(
                f"robot {space.robot.name}: actions: {', '.join(map(repr, unmeasured))}: expected a `source` that says "
                "where it is, got none, so nobody knows what it did; give it one, or take --actions commands"
            )

    @property
    def topics(self) -> tuple[str, ...]:
        return ()

    def take(self, message: BagMessage, where: Where) -> None:
        raise InputError(f"{message.topic}: expected no commands")

    def add(self, readings: tuple[SignalReading, ...]) -> None:
        self._path.add(readings)

    def known(self, time_ns: int, now_ns: int) -> bool:
        return self._path.known(time_ns, now_ns)

    def at(self, stamp_ns: int, due_ns: int, measured_J: Array) -> Array:
        position_J = self._path.at(np.array([due_ns]))[0]
        velocity_J = np.zeros_like(position_J)
        if (moving_J := self._space.velocity_J).any():
            velocity_J[moving_J] = (position_J - measured_J)[moving_J] / ((due_ns - stamp_ns) / NS_PER_S)
        return _action(self._space, position_J, velocity_J, measured_J, measured_J)

    def forget(self, before_ns: int) -> None:
        self._path.forget(before_ns)

    def clear(self) -> None:
        self._path.clear()


def _action(space: CommandSpace, position_J: Array, velocity_J: Array, origin_J: Array, measured_J: Array) -> Array:
    """The action that leads to the given place, at the given velocities; NaN where they are not known."""
    position_J = nearest_turn(position_J, measured_J, space.continuous_J)
    action_D: Array = space.actions(position_J[np.newaxis], velocity_J[np.newaxis], origin_J)[0]
    return action_D.copy()
