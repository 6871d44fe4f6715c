"""What travels from stage to stage: frozen records without ROS types.

Legend: H image height or horizon (by name), W width, C channel, J axes (robot/axes.py: a joint, a gripper, a coordinate
of a pose, or the integral of a velocity), S state, M signals, G those of them that come in one message. Stamps are
integer nanoseconds on the node's clock. Arrays inside a record are never written to after the record was made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.errors import InputError, SafetyRefusal

NS_PER_S = 1_000_000_000
NO_REFERENCES = np.zeros((0, 4))


def to_ns(duration_s: float) -> int:
    """Seconds -> the nearest whole number of nanoseconds."""
    return round(duration_s * NS_PER_S)


@dataclass(frozen=True, slots=True, eq=False)
class CameraFrame:
    """One image: `rgb_HWC` uint8, taken at `stamp_ns`."""

    camera: str
    stamp_ns: int
    rgb_HWC: NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class JointReading:
    """A JointState as it came: joints `names`, measured at `stamp_ns`, in the topic's own units.

    `velocity` and `effort` are the message's arrays, in the order of `names`; empty where it has none.
    """

    stamp_ns: int
    names: tuple[str, ...]
    position_J: NDArray[np.float64]
    velocity: Sequence[float] = ()
    effort: Sequence[float] = ()

    @classmethod
    def from_fields(
        cls,
        stamp_ns: int,
        names: Sequence[str],
        positions: Any,
        velocity: Sequence[float] = (),
        effort: Sequence[float] = (),
    ) -> JointReading:
        """A reading from a message's fields; InputError if names and positions do not match.

        The values are not checked here: assembling the observation does that.
        """
        names = tuple(names)
        if len(names) != len(positions) and (len(positions) or not (len(velocity) or len(effort))):
            raise InputError(
                f"joint state: expected one position per name, got {len(names)} names, {len(positions)} positions"
            )
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise InputError(f"joint state: expected each joint once, got {', '.join(twice)} more than once")
        return cls(stamp_ns, names, np.array(positions, dtype=np.float64), velocity, effort)


@dataclass(frozen=True, slots=True, eq=False)
class PoseReading:
    """A PoseStamped as it came: `pose_7` is x, y, z (m) and a quaternion x, y, z, w in `frame_id`, at `stamp_ns`."""

    stamp_ns: int
    frame_id: str
    pose_7: NDArray[np.float64]

    @classmethod
    def from_message(cls, message: Any, received_ns: int | None = None) -> PoseReading:
        """The numbers of a geometry_msgs/PoseStamped, rclpy's or rosbags'; `received_ns`, if given, is the stamp."""
        place, turned = message.pose.position, message.pose.orientation
        pose_7 = np.array([place.x, place.y, place.z, turned.x, turned.y, turned.z, turned.w], dtype=np.float64)
        stamp_ns = header_ns(message) if received_ns is None else received_ns
        return cls(stamp_ns, str(message.header.frame_id), pose_7)


@dataclass(frozen=True, slots=True, eq=False)
class SignalReading:
    """What one message says of the robot: `value_G`, in the robot's units, of the signals with these indices."""

    stamp_ns: int
    signals: tuple[int, ...]
    value_G: NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """Inputs that belong together in time.

    `stamp_ns` is the oldest stamp among the frames; `state_S` is the state at that time in the manifest's order and
    units; `frames` holds one frame per required camera (an optional camera may be absent). `joint_ns` holds the stamps
    of the readings behind the state, for each part of it that comes in messages of its own: one, or the two that
    `stamp_ns` lies between. `signal_M` is all that was read of the robot at that time; left out, the state is all.
    """

    stamp_ns: int
    frames: Mapping[str, CameraFrame]
    state_S: NDArray[np.float64]
    joint_ns: tuple[int, ...] = ()
    signal_M: NDArray[np.float64] | None = None

    @property
    def signals(self) -> NDArray[np.float64]:
        return self.state_S if self.signal_M is None else self.signal_M

    @property
    def newest_ns(self) -> int:
        """The newest stamp among the frames."""
        return max(frame.stamp_ns for frame in self.frames.values())


@dataclass(frozen=True, slots=True, eq=False)
class ActionChunk:
    """Places for the robot's axes to reach, one per period.

    `position_HJ[k]` (in each axis's unit, order of the axes `joints`) is due at `start_ns + (k + 1) * period_ns`:
    the first action is one period after the observation it was computed from (`start_ns` is that observation's stamp).
    `velocity_HJ` belongs to the same instants.
    """

    start_ns: int
    period_ns: int
    joints: tuple[str, ...]
    position_HJ: NDArray[np.float64]
    velocity_HJ: NDArray[np.float64]

    def due_ns(self, k: int) -> int:
        """When action `k` is due, on the node's clock."""
        return self.start_ns + (k + 1) * self.period_ns

    @property
    def horizon(self) -> int:
        return int(self.position_HJ.shape[0])


@dataclass(frozen=True, slots=True, eq=False)
class Motion:
    """What the robot is told to do: be at `position_NJ[k]`, moving at `velocity_NJ[k]`, at `time_N[k]` (ns, rising).

    The acceleration is constant between two instants, and the arm rests after the last. A piece of constant
    acceleration is also the cubic through its two ends, even for a controller that joins it halfway. Until `from_ns`,
    which is one of the instants, the motion repeats the one that it continues. `reference_P4` are the orientations that
    rotation axes count from, one per output with a pose.
    """

    joints: tuple[str, ...]
    from_ns: int
    time_N: NDArray[np.int64]
    position_NJ: NDArray[np.float64]
    velocity_NJ: NDArray[np.float64]
    reference_P4: NDArray[np.float64] = field(default_factory=lambda: NO_REFERENCES)

    @property
    def end_ns(self) -> int:
        return int(self.time_N[-1])

    def at(self, time_ns: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Position and velocity [J]; outside the motion's span, those of its first or last instant."""
        k = int(np.searchsorted(self.time_N, time_ns, side="right"))
        if k == 0 or k == len(self.time_N):
            edge = 0 if k == 0 else -1
            return self.position_NJ[edge], self.velocity_NJ[edge]
        since_s = (time_ns - int(self.time_N[k - 1])) / NS_PER_S
        whole_s = int(self.time_N[k] - self.time_N[k - 1]) / NS_PER_S
        change_J = (self.velocity_NJ[k] - self.velocity_NJ[k - 1]) / whole_s
        velocity_J = self.velocity_NJ[k - 1] + change_J * since_s
        return self.position_NJ[k - 1] + (self.velocity_NJ[k - 1] + velocity_J) * (since_s / 2.0), velocity_J


class MotionInterrupted(SafetyRefusal):
    """Some axes do not do what they were told: the axes `axis_J` (bool [J]) do `motion`; all others go on as before.

    A position that is NaN is wherever the axis is measured.
    """

    def __init__(self, message: str, motion: Motion, axis_J: NDArray[np.bool_]) -> None:
        super().__init__(message)
        self.motion, self.axis_J = motion, axis_J


@dataclass(frozen=True, slots=True, eq=False)
class ModelInput:
    """What the model reads for one chunk; `state_S` (normalised) is set only if the bundle has a state token."""

    images_VCHW: NDArray[np.float32]
    image_mask_V: NDArray[np.bool_]
    tokens_L: NDArray[np.int64]
    token_mask_L: NDArray[np.bool_]
    state_S: NDArray[np.float32] | None = None


@dataclass(frozen=True, eq=False)
class Condition:
    """What a new chunk is conditioned on: places and velocities of the running one, each with a weight.

    If `clean`, rows of weight 1 are given to the model as finished actions (flow time 0). Otherwise the flow is guided
    towards the rows, with at most `strength`. Rows of weight 0 are arbitrary.
    """

    position_HJ: NDArray[np.float64]
    velocity_HJ: NDArray[np.float64]
    weight_H: NDArray[np.float64]
    clean: bool
    strength: float = 0.0


def time_to_ns(time: Any) -> int:
    """A builtin_interfaces Time or Duration, rclpy's or rosbags', in nanoseconds."""
    return int(time.sec) * NS_PER_S + int(time.nanosec)


def header_ns(message: Any) -> int:
    """The stamp in a message's header; InputError as in `stamp_to_ns`."""
    return stamp_to_ns(int(message.header.stamp.sec), int(message.header.stamp.nanosec))


def stamp_to_ns(sec: int, nanosec: int) -> int:
    """A header's stamp; InputError if its nanoseconds are a second or more, which no clock gives."""
    if not 0 <= nanosec < NS_PER_S:
        raise InputError(f"stamp: expected nanosec below {NS_PER_S}, got {nanosec}; is the message damaged?")
    return sec * NS_PER_S + nanosec
