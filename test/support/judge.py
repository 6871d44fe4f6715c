"""An independent judge of what the node sends: random faults, a literal controller, every millisecond against limits.

`Case(seed)` says what goes wrong; `judge(case)` runs the real loop, its thread's code, governor, gate, buffer and
encoding through it on a simulated clock and returns the worst ratios to the limits. The judge reads the serialized
messages with support/controller.py and computes the limits from the parameters; it uses none of the runtime's own
models.

**Lateness.** What a delivery's delay does cannot be known by a sender, so it is computed. Two controllers get each
message: `meant` at the moment when it was sent, with the clock that the node had then, and `real` when and as it really
comes, by its own clock. `meant` is judged by the limits alone. `real` is the same motion shifted: the controller joins
it by a cubic that starts from another state, and as cubics are linear in their end states, it differs from `meant` by
the cubic of the difference alone. That difference must be no more than a joint can do in the time by which the two
starts of a message differ. Without such a time the two are one. A stall of the process, a gap and a step of the node's
clock are no lateness: nothing is allowed for them.

**Limits that change** hold for each message whose tick began after the change. A joint that is too fast or too far out
by the new ones may take the time that braking takes; a tighter acceleration counts from its next rest on.

**Strangers.** What another publisher's command does is not judged, nor the first piece with which ours takes over while
its motion, or the one of ours that it broke off, is not over for SEEN_NS: nobody could know that state. All others are.

Legend: J joints, N milliseconds. Times in ns on the steady clock unless a name says ROS.
"""

from __future__ import annotations

import random
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import FrameType, SimpleNamespace
from typing import Any, get_args
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.errors import ConfigurationError, EngineError, InputError
from ki_vla_ros.messages.encoding import encode_command
from ki_vla_ros.records import ActionChunk, CameraFrame, JointReading, Motion, to_ns
from ki_vla_ros.robot import Robot, plain_joints
from ki_vla_ros.robot.axes import Axis
from ki_vla_ros.robot.commands import CommandSpace
from ki_vla_ros.ros.stream import Player, Streamed
from ki_vla_ros.runtime import axis_bounds, pacing, thread
from ki_vla_ros.runtime.diagnostics import Diagnostics
from ki_vla_ros.runtime.loop import WATCHDOG_NS, PolicyLoop
from ki_vla_ros.runtime.observation import CameraSource, ObservationBuffer
from ki_vla_ros.runtime.thread import LoopThread
from ki_vla_ros.settings.names import settings_from_parameters
from ki_vla_ros.settings.settings import ExecutorName, Settings
from support.bundles import robot_of
from support.controller import NS_PER_S, TrajectoryController

Array = NDArray[np.float64]

MS = 1_000_000
START = 1_000 * NS_PER_S
ROS_OFFSET = 1_700_000_000 * NS_PER_S
READING_NS = 100 * MS
HORIZON, ACTION_NS = 10, 50 * MS
MODES = ("replace", "splice", "stream")
FAULTS = (
    "none",
    "gaps",
    "stalls",
    "clock",
    "state",
    "limits",
    "settings",
    "strangers",
    "stops",
    "late",
    "ramp",
    "wide",
)
CHUNKS = (*3 * ("smooth", "wander"), "jumps", "jumps", "anywhere", "broken")
ARM = Axis(kind="joint", name="arm", unit="rad", lower=-2.0, upper=2.0, max_velocity=1.5, relative=True)
GRIPPER = Axis(kind="joint", name="gripper", unit="m", lower=0.0, upper=0.04, max_velocity=0.1, relative=False)
WHEEL = Axis(kind="joint", name="arm", unit="rad", lower=-1e4, upper=1e4, max_velocity=8.0, relative=True)
NAMES = ("arm", "gripper")
# More than this share above a limit is a fault.
TOLERANCE = 1.01
# What a case may take of processor time, a hundred times its usual: a computation without bounds is a fault too.
LONGEST_S = 1.0
TICK_NS = 100 * MS
# After this time a reading has shown where a resting arm is.
SEEN_NS = 200 * MS

# What happens: after how many ms, to what, with which arguments.
Event = tuple[int, str, Any]


class Case:
    """What one seed makes: settings, faults and when they come. `str` tells it in words."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        rng = self.rng = random.Random(seed)
        self.mode: str = rng.choice(MODES)
        self.faults = frozenset(rng.sample(FAULTS, rng.choice((1, 1, 1, 1, 2, 2, 3))))
        self.chunks: str = rng.choice(CHUNKS)
        self.ms = 100 * rng.randint(3, 6)
        self.joints = (WHEEL if "wide" in self.faults else ARM, GRIPPER)
        self.parameters: dict[str, Any] = {
            "executor": rng.choice(get_args(ExecutorName)),
            "execution_horizon_s": rng.choice((0.1, 0.2)),
            "publish_mode": self.mode,
            "ramp_in_s": rng.choice((0.5, 1.0)) if "ramp" in self.faults else 0.0,
            "lead_s": rng.choice((0.01, 0.01, 0.0, 0.03)),
            "command_period_s": rng.choice((0.02, 0.02, 0.01, 0.05)),
            "align_to_cameras": False,
        }
        self.period_s: float = self.parameters["command_period_s"]
        if rng.random() < 0.85:
            self.parameters |= {"limits.on_position": "clamp", "limits.on_speed": "clamp", "limits.max_jump_s": 10.0}
            self.parameters |= {"limits.max_chunk_age_s": 5.0, "max_age_s": 1.0}
        elif rng.random() < 0.4:
            self.parameters |= {"limits.on_jump": "stop", "limits.on_speed": "stop", "limits.on_position": "stop"}
        self.inference_ms = rng.choice((0, 20, 60, 60, *((300, 900) if "gaps" in self.faults else ())))
        self.lag_ms = rng.choice((0, 20))
        self.late_ms = rng.choice((1, 5, 30)) if "late" in self.faults else 0
        self.fail = rng.choice((0.0, 0.4)) if "gaps" in self.faults else 0.0
        self.stalls: dict[int, float] = {}  # at which call, in ms
        if "stalls" in self.faults:
            self.stalls = {
                rng.randint(1, 80): rng.choice((0.4, 3, 12.7, 30, 100, 300, 1000)) for _ in range(rng.randint(1, 5))
            }
        self.events: list[Event] = sorted(
            [event for fault in sorted(self.faults) for event in getattr(self, f"_{fault}", lambda: ())()],
            key=lambda event: event[0],
        )

    def __str__(self) -> str:
        parameters = ", ".join(f"{name}={value}" for name, value in self.parameters.items())
        ms = {"inference": self.inference_ms, "lag": self.lag_ms, "late": self.late_ms, "stalls": self.stalls}
        events = "".join(f"\n    {at} ms: {what} {how}" for at, what, how in self.events)
        return (
            f"seed {self.seed}: {self.mode}, faults {', '.join(sorted(self.faults))}, {self.chunks} chunks, "
            f"{self.ms} ms\n    {parameters}\n    ms: {ms}{events}"
        )

    def _at(self) -> int:
        return self.rng.randint(100, self.ms)

    def _gaps(self) -> Iterator[Event]:
        at = self._at()
        what, gone, there = self.rng.choice((("cameras", False, True), ("instruct", "", "go")))
        yield at, what, gone
        yield at + self.rng.choice((100, 400, 900)), what, there

    def _clock(self) -> Iterator[Event]:
        for _ in range(self.rng.randint(1, 4)):
            step_ms = self.rng.choice((-1, 1)) * self.rng.choice((10, 50, 150, 240, 1000, 3_600_000))
            yield self._at(), "clock", (step_ms, self.rng.random() < 0.7)

    def _state(self) -> Iterator[Event]:
        kind = self.rng.choice(("elsewhere", "moving", "swapped", "zeros", "ahead", "sags", "noise", "restarted"))
        at, share = self._at(), self.rng.choice((-1, 1)) * self.rng.choice((0.03, 0.2))
        if kind == "sags":  # from the start; where a stream's controller is then, nobody can know
            yield 0, "state", (kind, 0.01 if self.mode != "stream" else 0.0)
            return
        if kind == "restarted":  # while the node is inactive, someone moves the arm and starts the controller again
            yield at, "deactivate", None
            yield at + 200, "restart", share
            yield at + 400, "activate", None
            return
        yield at, "state", (kind, share)
        if self.rng.random() < 0.5:
            yield at + self.rng.choice((50, 300)), "state", ("true", 0.0)

    def _limits(self) -> Iterator[Event]:
        for _ in range(self.rng.randint(1, 2)):
            joint, value = self.rng.choice(NAMES), self.rng.choice
            changes = value(
                (
                    {"limits.velocity_scale": value((0.05, 0.5))},
                    {"limits.time_to_speed_s": value((0.3, 2.0))},
                    {f"limits.joints.{joint}.acceleration": value((1e-6, 0.01, 0.3))},
                    {f"limits.joints.{joint}.velocity": value((1e-3, 0.05))},
                    {"limits.joints.arm.upper": value((0.1, 1.0)), "limits.joints.arm.lower": value((-1.0, -0.1))},
                )
            )
            at = self._at()
            yield at, "set", changes
            if self.rng.random() < 0.5:
                yield at + self.rng.choice((30, 150, 300)), "unset", tuple(changes)

    def _settings(self) -> Iterator[Event]:
        for _ in range(self.rng.randint(1, 3)):
            value = self.rng.choice
            yield (
                self._at(),
                "set",
                value(
                    (
                        {"executor": value(get_args(ExecutorName))},
                        {"rate_hz": value((5.0, 20.0))},
                        {"lead_s": value((0.0, 0.1))},
                        {"dry_run": value((False, True))},
                        {"hold_after_s": 0.05},
                    )
                ),
            )

    def _strangers(self) -> Iterator[Event]:
        for _ in range(self.rng.randint(1, 2)):
            yield self._at(), "stranger", (self.rng.random(), self.rng.choice((0.1, 0.3)))

    def _stops(self) -> Iterator[Event]:
        at = self._at()
        for _ in range(self.rng.randint(1, 2)):
            stop, go = self.rng.choice((("latch", "reset"), ("deactivate", "activate")))
            yield at, stop, None
            at += self.rng.choice((0, 5, 60, 300))
            yield at, go, None
            at += self.rng.choice((0, 30, 150))


@dataclass(frozen=True, eq=False)
class Limits:
    lower_J: Array
    upper_J: Array
    speed_J: Array
    acceleration_J: Array


def limits_of(joints: tuple[Axis, ...], parameters: Mapping[str, Any]) -> Limits:
    """The limits in force, from the description of the parameters."""
    rows = []
    for joint in joints:
        of = f"limits.joints.{joint.name}."
        speed = min(joint.max_velocity, parameters.get(of + "velocity", np.inf))
        rows.append(
            (
                max(joint.lower, parameters.get(of + "lower", -np.inf)),
                min(joint.upper, parameters.get(of + "upper", np.inf)),
                speed * parameters.get("limits.velocity_scale", 1.0),
                min(
                    speed / parameters.get("limits.time_to_speed_s", 0.15), parameters.get(of + "acceleration", np.inf)
                ),
            )
        )
    return Limits(*np.array(rows).T)


@lru_cache(maxsize=4096)
def _settings(parameters: tuple[tuple[str, Any], ...]) -> Settings:
    return settings_from_parameters(dict(parameters))


@dataclass(frozen=True, eq=False)
class Told:
    """What a message was sent under: it is judged by this."""

    limits: Limits
    ramp_from: int = 0
    ramp_in_s: float = 0.0

    def share_N(self, time_N: NDArray[np.int64]) -> Array:
        """The share [N] of the speed limits that is in force: a tenth at first, rising over ramp_in_s."""
        if not self.ramp_in_s:
            return np.ones(len(time_N))
        return np.clip(0.1 + 0.9 * (time_N - self.ramp_from) / (self.ramp_in_s * NS_PER_S), 0.1, 1.0)


@dataclass
class World:
    """The clocks, the arm with its controllers, the topics and the policy: all that surrounds the loop."""

    case: Case
    steady: int = START
    offset_ns: int = ROS_OFFSET
    active: bool = True
    cameras: bool = True
    started: bool = False  # a chunk has gone out since activation or reset
    state: tuple[str, float, int] = ("true", 0.0, 0)
    calls: int = 0
    logged: list[str] = field(default_factory=list)
    stopped: list[list[int]] = field(default_factory=list)  # from when to when
    streamed: list[tuple[int, Array, Told | None]] = field(default_factory=list)
    stalled: list[tuple[int, int]] = field(default_factory=list)
    late: list[tuple[int, float]] = field(default_factory=list)  # from when on, by how many ns the starts may differ

    def __post_init__(self) -> None:
        case = self.case
        self.rng = random.Random(case.seed + 1)
        self.random = np.random.default_rng(case.seed)
        self.parameters = dict(case.parameters)
        self.settings = _settings(tuple(self.parameters.items()))
        self.limits = self.tick_limits = limits_of(case.joints, self.parameters)
        self.first = Told(self.limits)
        lower_J, upper_J = np.maximum(self.limits.lower_J, -2.0), np.minimum(self.limits.upper_J, 2.0)
        at_J = lower_J + (0.1 + 0.8 * self.random.random(2)) * (upper_J - lower_J)
        if "wide" in case.faults:
            at_J[0] = self.random.uniform(-9000.0, 9000.0)
        self.meant = TrajectoryController(NAMES, at_J, self.steady, self.offset_ns)
        # One and the same where nothing can make them differ.
        apart = {"late", "clock"} & case.faults
        self.real = TrajectoryController(NAMES, at_J, self.steady, self.offset_ns) if apart else self.meant
        self.buffer = Inputs(self)
        self.player, self.playing = Player(to_ns(case.period_s), Streamed.positions(2)), self.first
        self.diagnostics = Diagnostics()
        self.loop = PolicyLoop(Policy(self), self.buffer, self, self.diagnostics, lambda: self.settings)  # type: ignore[arg-type]
        self.loop.instruction = "go"
        self.ramp_from: int | None = None
        self.decoded = 0
        self.events = [(START + at * MS, what, how) for at, what, how in case.events]
        self.events.append((START + case.ms * MS, "deactivate", None))
        self.events.sort(key=lambda event: event[0])
        self.reading_due = self.watch_due = self.steady
        self.thread = LoopThread(self.loop)
        self.thread._stop = self  # type: ignore[assignment]  # its waits are the flow of time

    # --- the loop's wire

    def now_ns(self) -> int:
        self.stall()
        return self.ros_ns()

    def motion_ns(self) -> int:
        self.stall()
        return self.player.motion_ns(self.steady) if self.case.mode == "stream" else self.steady

    def simulated_clock(self) -> bool:
        return False

    def moves_arm(self) -> bool:
        return True

    def send_command(self, motion: Motion, now_ns: int, hold: bool = False) -> None:
        """As NodeWire's, but that what it publishes may come late."""
        if self.ramp_from is None:
            self.ramp_from = self.decoded
        # An arm that is outside its limits may be led back from there.
        limits, arm_J = self.tick_limits, self.arm()
        if np.any(arm_J < limits.lower_J) or np.any(arm_J > limits.upper_J):
            lower_J, upper_J = np.minimum(limits.lower_J, arm_J), np.maximum(limits.upper_J, arm_J)
            limits = replace(limits, lower_J=lower_J, upper_J=upper_J)
        told = Told(limits, self.ramp_from, self.settings.ramp_in_s)
        if self.case.mode == "stream":
            self.player.play(motion, self.steady)
            self.playing = told
            return
        data = encode_command(motion, now_ns, self.ros_ns() if self.case.mode == "splice" else 0)
        self.meant.offset_ns = self.offset_ns
        meant = self.meant.receive(data, self.steady, told)
        if self.real is self.meant:
            return
        late_ns = self.rng.choice((0, 0, self.case.late_ms)) * MS
        arrives = max([self.steady + late_ns, *(at for at, what, _ in self.events if what == "message")])
        self.late.append((self.steady, arrives - self.steady))
        self._plan(arrives, "message", (data, told, meant))
        self._happen_until(self.steady)

    def report_chunk(self, chunk: ActionChunk) -> None:
        self.started = True

    def report_tick(self, fields: Mapping[str, object]) -> None: ...

    def log(self, message: str, cause: str) -> None:
        if cause == "internal error":
            self.logged.append(message.strip().splitlines()[-1])

    def ros_ns(self) -> int:
        return self.steady + self.offset_ns

    # --- what the loop's thread waits on

    def is_set(self) -> bool:
        self.tick_limits = self.limits
        return not self.active

    def wait(self, timeout: float | None = None) -> bool:
        self.flow(self.steady + round((timeout or 0.0) * NS_PER_S), until_stopped=True)
        return not self.active

    # --- time

    def stall(self) -> None:
        """Called wherever the process may stop: nothing of the node runs, everything else goes on."""
        self.calls += 1
        if stalled_ms := self.case.stalls.get(self.calls):
            self.stalled.append((self.steady, self.steady + round(stalled_ms * MS)))
            self._happen_until(self.steady + round(stalled_ms * MS))
            self.steady += round(stalled_ms * MS)

    def flow(self, end: int, until_stopped: bool = False) -> None:
        """Lets time pass: the inputs come, the watchdog runs, the stream sends, and what the case says happens."""
        while not (until_stopped and not self.active):
            stream_due = 1 << 62 if self.player.motion is None else self.player.due_ns()
            due = min([self.reading_due, self.watch_due, stream_due, *(at for at, _, _ in self.events[:1])])
            if due > end:
                break
            self.steady = max(self.steady, due)
            if self.events and self.events[0][0] <= self.steady:
                self._happen(*self.events.pop(0))
            elif self.reading_due <= self.steady:
                self.reading_due = self.steady + READING_NS
                self.buffer.fill()
            elif stream_due <= self.steady:
                if (sample := self.player.next(self.steady)) is not None:
                    self.player.sent(sample, slice(0, 2))
                    position_J = sample.position_J
                    self.streamed.append((self.steady, position_J.copy(), self.playing))
            else:
                self.watch_due = self.steady + WATCHDOG_NS
                self.loop.watch(self.player.take_interruption)
        if not (until_stopped and not self.active):
            self.steady = max(self.steady, end)

    def _plan(self, at: int, what: str, how: Any) -> None:
        self.events.append((at, what, how))
        self.events.sort(key=lambda event: event[0])

    def _happen_until(self, end: int) -> None:
        """What does not need the node happens also while it is stalled or sends."""
        outside = ("message", "clock", "stranger", "restart", "state")
        for event in [e for e in self.events if e[0] <= end and e[1] in outside]:
            self.events.remove(event)
            began, self.steady = self.steady, max(self.steady, event[0])
            self._happen(*event)
            self.steady = began

    def _happen(self, at: int, what: str, how: Any) -> None:
        if what == "message":
            data, told, meant = how
            late_ns = float("inf")
            if (piece := self.real.receive(data, self.steady, told)) and meant:
                late_ns = abs(piece.start_ns - meant.start_ns)
            self.late.append((self.steady, late_ns))
        elif what == "clock":
            step_ms, along = how
            self.offset_ns += step_ms * MS
            self.meant.set_clock(self.meant.offset_ns, self.steady)
            if along:
                if self.real.pieces[-1].from_ns > self.steady:  # what waits now begins this much earlier or later
                    self.late.append((self.steady, abs(step_ms) * MS + max(late_ns for _, late_ns in self.late)))
                self.real.set_clock(self.real.offset_ns + step_ms * MS, self.steady)
            elif self.case.mode == "splice" and self.offset_ns > self.real.offset_ns:
                # Stamps are ahead of its clock: messages wait, and the next one drops them, for as long as that lasts.
                self.late.append((self.steady, float("inf")))
        elif what == "stranger":
            self.late.append((self.steady, float("inf")))  # it does not come between the same messages in both
            self._interfere(*how)
        elif what == "restart" and (self.active or (self.stalled and self.stalled[-1][1] > at)):
            pass  # whoever starts a controller anew waits until the node is inactive
        elif what == "restart":
            # While it stops and starts, it listens to nothing: what is on its way is lost.
            self.events = [event for event in self.events if event[1] != "message"]
            position_J = self.place(how)
            self.state = ("true", 0.0, 0)
            self.streamed.append((self.steady, position_J, None))
            for controller in {self.meant, self.real}:
                controller.rest(position_J, self.steady)
        elif what == "instruct":
            self.loop.instruction = how
        elif what == "state" and how[0] != "sags" and not self.started:
            self._plan(self.steady + READING_NS, what, how)  # before the first chunk, readings are all that it has
        elif what == "state":
            self.state = (*how, self.steady)
        elif what == "cameras":
            self.cameras = how
        elif what == "set":
            self._change(self.parameters | how)
        elif what == "unset":
            self._change({name: value for name, value in self.parameters.items() if name not in how})
        elif what == "latch":
            # A controller that is being led to where the arm is gets there: nobody knows where it is on its way.
            running = self.loop._governor.running
            led_ns = 0 if running is None else int(running.time_N[0])
            self.stopped.append([max(self.steady, led_ns), 1 << 62])
            self.loop.latch("by the case")
        elif what == "reset":
            for stop in self.stopped:
                stop[1] = min(stop[1], self.steady)
            self._look()
            self.loop.reset()
            self.ramp_from, self.started = None, False
        elif what == "deactivate":
            self.active = False
            self.loop.end()
        elif what == "activate":
            self._look()
            self.active = self.steady < START + self.case.ms * MS

    def _look(self) -> None:
        """Whoever lets a stream go on has set its controller to where the arm is: no message tells where that is."""
        if self.case.mode == "stream" and self.state[0] in ("elsewhere", "moving"):
            self.streamed.append((self.steady, self.arm(), None))
            self.state = ("true", 0.0, 0)

    def _change(self, parameters: dict[str, Any]) -> None:
        """As the node's parameter callback: what it refuses changes nothing."""
        settings = _settings(tuple(parameters.items()))
        try:
            axis_bounds(self.case.joints, settings.limits)
        except ConfigurationError:
            return
        self.settings, self.parameters = settings, parameters
        self.limits = limits_of(self.case.joints, parameters)

    def _interfere(self, share: float, lasts_s: float) -> None:
        """Someone else's command: for a while to a place near by, at half of the speed limit."""
        position_J, _ = self.commanded()
        way_J = (2.0 * share - 1.0) * 0.3 * self.limits.speed_J * lasts_s
        goal_J = np.clip(position_J + way_J, self.limits.lower_J, self.limits.upper_J)
        if self.case.mode == "stream":
            self.streamed.append((self.steady, goal_J, None))
            return
        time_N = np.array([0, round(lasts_s * NS_PER_S)])
        data = encode_command(Motion(NAMES, 0, time_N, np.array([position_J, goal_J]), np.zeros((2, 2))), 0)
        for controller in {self.meant, self.real}:
            controller.receive(data, self.steady)

    # --- the arm

    def commanded(self) -> tuple[Array, Array]:
        if self.case.mode == "stream":
            position_J = self.streamed[-1][1] if self.streamed else self.real.pieces[0].position_KJ[0]
            return position_J, np.zeros(2)
        return self.real.sample(self.steady - self.case.lag_ms * MS)

    def arm(self) -> Array:
        """Where the arm really is."""
        kind, share, since = self.state
        if kind == "elsewhere":
            return self.place(share)
        if kind == "moving":
            return self.place(share * min(1.0, (self.steady - since) / (500 * MS)))
        if kind == "sags":
            return self.commanded()[0] + share * np.minimum(self.first.limits.upper_J - self.first.limits.lower_J, 4.0)
        return self.commanded()[0]

    def place(self, share: float) -> Array:
        """Beside where the arm is told to be, by this share of its range (at most 4 rad)."""
        lower_J, upper_J = self.limits.lower_J, self.limits.upper_J
        return np.asarray(np.clip(self.commanded()[0] + share * np.minimum(upper_J - lower_J, 4.0), lower_J, upper_J))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Gives the runtime this world's steady clock."""
        clock = SimpleNamespace(monotonic_ns=lambda: self.steady)
        with (
            patch.object(thread, "time", clock),
            patch.object(pacing, "time", clock),
        ):
            yield

    def grace_ns(self) -> int:
        leads = [
            self.case.parameters["lead_s"],
            *(how.get("lead_s", 0.0) for _, what, how in self.case.events if what == "set"),
        ]
        return round((max(leads) + self.case.period_s) * NS_PER_S) + MS

    def run(self) -> None:
        end = START + self.case.ms * MS
        loop_thread = LoopThread(self.loop)
        loop_thread._stop = self  # type: ignore[assignment]  # its waits are the flow of time
        while self.steady < end:
            if self.active:
                self.ramp_from, self.started = None, False
                self.loop.begin()
                loop_thread._run()
                self.loop.rest()
            else:
                self.flow(min([end, *(at for at, what, _ in self.events if what == "activate")]))
        self.flow(self.steady + 100 * MS)


class Inputs(ObservationBuffer):
    """The node's buffer, filled by the world."""

    def __init__(self, world: World) -> None:
        super().__init__([CameraSource("scene", "/scene")], plain_joints(NAMES, "/joint_states"))
        self.world = world
        self.image = np.zeros((1, 1, 3), np.uint8)
        self.fill()

    def fill(self) -> None:
        world = self.world
        stamp_ns = world.ros_ns()
        if world.cameras:
            self.add_frame(CameraFrame("scene", stamp_ns, self.image))
        kind, position_J = world.state[0], world.arm()
        if kind == "noise":
            position_J = position_J + world.random.uniform(-1e-3, 1e-3, 2) * [1.0, 0.1]
        elif kind == "swapped":
            position_J = position_J[::-1]
        elif kind == "ahead":
            stamp_ns += 3600 * NS_PER_S
        try:
            if kind == "zeros":
                self.add_joints(JointReading(stamp_ns - 1, NAMES, np.zeros(2)))
            self.add_joints(JointReading(stamp_ns, NAMES, position_J))
        except InputError as refusal:
            self.refuse("/joint_states", str(refusal))

    def observe(self, *given: Any) -> Any:
        self.world.stall()
        self.fill()
        return super().observe(*given)

    def latest(self, *given: Any) -> Any:
        found = super().latest(*given)
        self.world.stall()  # a motion is about to be made from it
        return found


@lru_cache
def _robot(joints: tuple[Axis, ...]) -> Robot:
    return robot_of(joints, HORIZON, ACTION_NS / 1e9)


class Policy:
    """Chunks of every kind, and inference that takes its time or fails."""

    def __init__(self, world: World) -> None:
        self.world = world
        robot = _robot(world.case.joints)
        manifest = SimpleNamespace(
            axes=world.case.joints,
            axis_names=NAMES,
            robot=robot,
            horizon=HORIZON,
            action_period_ns=ACTION_NS,
            max_prefix_delay=4,
            state=SimpleNamespace(as_token=False),
            flow=SimpleNamespace(steps=10),
        )
        self.bundle = SimpleNamespace(manifest=manifest, tokenizer=None)
        self.space = CommandSpace(robot)
        self.flow_steps = self.noise_seed = 0

    def see(self, *_: Any) -> None:
        world = self.world
        world.stall()
        world.flow(world.steady + world.rng.randint(0, world.case.inference_ms) * MS)
        if world.rng.random() < world.case.fail:
            raise EngineError("the engine fails")

    def noise(self, _: int) -> None: ...

    def guide(self, condition: Any, observation: Any) -> Any:
        return condition

    def denoise(self, *_: Any) -> None: ...

    def decode(self, _: Any, observation: Any, commanded_J: Any) -> ActionChunk:
        world, random_, start_J = self.world, self.world.random, observation.state_S
        step_J = world.limits.speed_J * 0.05
        path_HJ = {
            "smooth": lambda: start_J + np.arange(1, HORIZON + 1)[:, None] * random_.normal(0, 0.5, 2) * step_J,
            "wander": lambda: start_J + np.cumsum(random_.normal(0, 1.0, (HORIZON, 2)) * step_J, axis=0),
            "jumps": lambda: start_J + random_.uniform(-8, 8, 2) * step_J + np.zeros((HORIZON, 2)),
            "anywhere": lambda: start_J + random_.uniform(-1, 1, (HORIZON, 2)) * [1.0, 0.03],
            "broken": lambda: start_J * random_.choice([1.0, 1.0, 1.1, 1e9, np.nan], (HORIZON, 2)),
        }[world.case.chunks]()
        velocity_HJ = np.diff(path_HJ, axis=0, prepend=start_J[None]) / 0.05
        world.decoded = world.steady
        world.buffer.fill()
        world.stall()
        return ActionChunk(observation.stamp_ns, ACTION_NS, NAMES, path_HJ, velocity_HJ)


@dataclass
class Verdict:
    """The worst ratio of each quantity to its limit, and what else is a fault, in words."""

    case: Case
    ratios: dict[str, float]
    faults: list[str]
    moved: bool
    where: list[str]

    @property
    def bad(self) -> list[str]:
        return [name for name, ratio in self.ratios.items() if not ratio <= TOLERANCE] + self.faults


@contextmanager
def limited_time() -> Iterator[None]:
    """Raises Unbounded in whatever takes longer than LONGEST_S of processor time."""

    def give_up(signum: int, frame: FrameType | None) -> None:
        raise Unbounded

    before = signal.signal(signal.SIGPROF, give_up)
    signal.setitimer(signal.ITIMER_PROF, LONGEST_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)


class Unbounded(BaseException):
    """No Exception: the loop must not take it for a failed tick."""


def judge(case: Case) -> Verdict:
    faults: list[str] = []
    world = World(case)
    try:
        with world.in_place(), limited_time():
            world.run()
    except Unbounded:
        faults.append("takes too long")
    except Exception as error:
        faults.append(f"raises {type(error).__name__} in {traceback.extract_tb(error.__traceback__)[-1].name}")
    faults += sorted({f"internal error: {line}"[:90] for line in world.logged})
    faults += [f"the controller refuses it: {why}" for why in world.meant.refused[:1]]
    track = stream_track(world) if case.mode == "stream" else path_track(world)
    ratios = Ratios(track)
    if case.mode != "stream" and max(ratios.worst.values()) <= TOLERANCE:
        widest = ratios.speed_PJ.max(axis=0), ratios.acceleration_PJ.max(axis=0)
        ratios.worst["lateness"] = lateness(world, track.time_N, track.position_NJ, *widest)
    if moves_when_stopped(world, ratios):
        faults.append("moves after a stop")
    return Verdict(case, ratios.worst, faults, bool(np.any(ratios.speed_NJ)), ratios.where)


@dataclass(frozen=True, eq=False)
class Track:
    """What the arm was told, step by step, and under what: `told_P[number_N]`, from `from_P[number_N]` on."""

    step_s: float
    time_N: NDArray[np.int64]
    position_NJ: Array
    number_N: NDArray[np.int64]
    told_P: list[Told]
    from_P: list[int]
    judged_N: NDArray[np.bool_]
    sent_N: NDArray[np.int64]  # on the steady clock
    grace_ns: int  # how long a message may repeat the motion before it
    joints: tuple[str, ...] = NAMES


def path_track(world: World) -> Track:
    """Every millisecond of the controller that gets everything on time."""
    pieces = world.meant.pieces
    end = min(max(int(pieces[-1].time_K[-1]), world.steady), START + 10 * NS_PER_S)
    time_N = np.arange(START, end + 3 * MS, MS)
    position_NJ, _, number_N = world.meant.walk(time_N)
    judged_N = np.ones(len(time_N), dtype=bool)
    ours_until = START
    for piece, after in zip(pieces, [*pieces[1:], None], strict=True):
        if piece.label is not None:
            ours_until = int(piece.time_K[-1])
        if piece.label is not None or piece is pieces[0]:
            continue
        until = int(time_N[-1]) if after is None else after.from_ns
        # Ours too: as far as the node knows, it goes on. And while the node is stopped, it sees nothing.
        if after is not None:
            unseen = [end for begin, end in world.stalled if begin <= after.from_ns]
            if after.from_ns < max([ours_until, int(piece.time_K[-1]), *unseen]) + SEEN_NS:
                until = int(after.time_K[min(1, len(after.time_K) - 1)]) + 3 * MS
        judged_N[(time_N >= piece.from_ns) & (time_N < until)] = False
    told = [piece.label if isinstance(piece.label, Told) else world.first for piece in pieces]
    begun = [piece.from_ns for piece in pieces]
    return Track(1e-3, time_N, position_NJ, number_N, told, begun, judged_N, time_N, world.grace_ns())


def stream_track(world: World) -> Track:
    """Every position that was sent, as if they were one period apart: a step is one however late it comes.

    While the process is stopped no position comes, and the arm stands still: after more than a period of that it has
    been stopped, and is judged from there on.
    """
    rest_J = world.real.pieces[0].position_KJ[0]
    period_ns = to_ns(world.case.period_s)
    sent: list[tuple[Array, Told, bool]] = [(rest_J, world.first, True)] * 2
    sent_at = [START] * 2
    # A forwarding controller obeys whoever spoke last: beside a stranger there is nothing to judge.
    alone_until = min([START + at * MS for at, what, _ in world.case.events if what == "stranger"], default=1 << 62)
    before_ns, stranger_ns, excused, stranger = START, 0, 0, Told(world.first.limits)
    for time_ns, position_J, told in world.streamed:
        if any(a < time_ns and before_ns < b for a, b in world.stalled) and time_ns - before_ns > 2 * period_ns:
            sent += [(sent[-1][0], sent[-1][1], False)] * 2
        if told is None:
            sent += [(position_J, stranger, False)] * 3
            excused, stranger_ns = 3, time_ns
        else:
            unseen = [end for begin, end in world.stalled if begin <= time_ns]
            if excused == 3 and time_ns >= max([stranger_ns, *unseen]) + SEEN_NS:
                excused = 0
            sent.append((position_J, told, not excused and time_ns < alone_until))
            excused = max(excused - 1, 0)
        sent_at += [time_ns] * (len(sent) - len(sent_at))
        before_ns = time_ns
    number_N = np.cumsum([bool(n) and told is not sent[n - 1][1] for n, (_, told, _) in enumerate(sent)])
    time_N = START + period_ns * np.arange(len(sent))
    first_P = np.unique(number_N, return_index=True)[1]
    return Track(
        world.case.period_s,
        time_N,
        np.array([position_J for position_J, _, _ in sent]),
        number_N,
        [sent[n][1] for n in first_P],
        time_N[first_P].tolist(),
        np.array([judged for _, _, judged in sent]),
        np.array(sent_at),
        world.grace_ns() + period_ns,  # a step is the mean of a period
    )


class Ratios:
    """The ratios to the limits at every step of a track; what is beyond one may be braking after a tightening."""

    def __init__(self, track: Track) -> None:
        self.track, self.where = track, list[str]()
        limits = [told.limits for told in track.told_P]
        self.lower_PJ, self.upper_PJ = np.array([x.lower_J for x in limits]), np.array([x.upper_J for x in limits])
        self.speed_PJ = np.array([x.speed_J for x in limits])
        self.share_PN = np.array([told.share_N(track.sent_N) for told in track.told_P])
        share_N = self.share_PN[track.number_N, np.arange(len(track.time_N))]
        self.limit_NJ = self.speed_PJ[track.number_N] * share_N[:, None]
        self.acceleration_PJ = np.array([x.acceleration_J for x in limits])
        self.range_PJ = self.upper_PJ - self.lower_PJ
        position_NJ, number_N, step_s = track.position_NJ, track.number_N, track.step_s
        self.speed_NJ = np.diff(position_NJ, axis=0, prepend=position_NJ[:1]) / step_s
        change_NJ = np.abs(np.diff(self.speed_NJ, axis=0, prepend=self.speed_NJ[:1])) / step_s
        # What rounding a position to double precision makes of two differences.
        change_NJ = np.maximum(change_NJ - 8.0 * np.spacing(np.abs(position_NJ).max(axis=0)) / step_s**2, 0.0)
        out_NJ = np.maximum(self.lower_PJ[number_N] - position_NJ, position_NJ - self.upper_PJ[number_N])
        self.worst = {
            "position": self._worst("position", self._beyond(out_NJ, self.range_PJ[number_N]), self._position),
            "step": self._worst("step", np.abs(self.speed_NJ) / self.limit_NJ, self._speed),
            "acceleration": self._worst("acceleration", change_NJ / self.acceleration_PJ[number_N], self._acceleration),
        }

    @staticmethod
    def _beyond(out: Array, range_: Array) -> Array:
        """Positions are to stay within their limits, so that a millionth of the range counts as one hundredth."""
        return 1.0 + 1e4 * np.maximum(out / range_ - 1e-9, 0.0)

    def _worst(self, name: str, ratio_NJ: Array, look: Callable[[int, int, float], float]) -> float:
        ratio_NJ = np.where(self.track.judged_N[:, None], ratio_NJ, 0.0)
        highest = float(ratio_NJ.max())
        if highest <= TOLERANCE:
            return highest
        found = [(look(n, j, float(ratio_NJ[n, j])), -n, j) for n, j in np.argwhere(ratio_NJ > TOLERANCE).tolist()]
        highest, n, j = max(found)
        ms = (int(self.track.time_N[-n]) - int(self.track.time_N[0])) // MS
        self.where.append(f"{name} {highest:.3f} times the limit at {ms} ms, {self.track.joints[j]}")
        return highest

    def _acceleration(self, n: int, j: int, ratio: float) -> float:
        """The widest limit since the joint last rested counts; what repeats the motion before is part of that."""
        still_N = self.speed_NJ[:n, j] == 0.0
        rested = np.flatnonzero(still_N[1:] & still_N[:-1])
        first = int(rested[-1]) + 2 if len(rested) else 0
        k = int(self.track.number_N[first])
        while k and self.track.time_N[first] - self.track.from_P[k] <= self.track.grace_ns:
            k -= 1
        here = int(self.track.number_N[n])
        return ratio * float(self.acceleration_PJ[here, j]) / float(self.acceleration_PJ[k : here + 1, j].max())

    def _speed(self, n: int, j: int, ratio: float) -> float:
        return ratio * float(self.limit_NJ[n, j]) / self._allowed(int(self.track.number_N[n]), j, n)

    def _allowed(self, k: int, j: int, n: int) -> float:
        """The speed limit of message k at step n, or what it leaves of the one before while it brakes."""
        limit, track = float(self.speed_PJ[k, j] * self.share_PN[k, n]), self.track
        if k == 0:
            return limit
        braking_s = max(int(track.time_N[n]) - track.from_P[k] - track.grace_ns, 0) / NS_PER_S
        before = self._allowed(k - 1, j, n - round(braking_s / track.step_s))
        return max(limit, before - 0.9 * float(self.acceleration_PJ[k, j]) * braking_s)

    def _position(self, n: int, j: int, ratio: float) -> float:
        """Where limits came closer: as far as the joint goes until it has braked."""
        track, k = self.track, int(self.track.number_N[n])
        lower, upper = float(self.lower_PJ[k, j]), float(self.upper_PJ[k, j])
        if lower <= self.lower_PJ[:k, j].min(initial=np.inf) and upper >= self.upper_PJ[:k, j].max(initial=-np.inf):
            return ratio
        joined = slice(*np.searchsorted(track.time_N, [track.from_P[k], track.from_P[k] + track.grace_ns + MS]))
        at, speed = track.position_NJ[joined, j], self.speed_NJ[joined, j]
        way = np.abs(speed) * track.grace_ns / NS_PER_S + speed**2 / 2.0 / self.acceleration_PJ[k, j]
        out = max(
            min(lower, float((at - way).min())) - track.position_NJ[n, j],
            track.position_NJ[n, j] - max(upper, float((at + way).max())),
        )
        return float(self._beyond(np.array(out), self.range_PJ[k, j]))


def moves_when_stopped(world: World, ratios: Ratios) -> bool:
    """Whether the arm moves later after ~/stop than two ticks and the time that braking takes at most."""
    if any(what in ("stranger", "restart") for _, what, _ in world.case.events):
        return False
    braking_s = float((ratios.speed_PJ / ratios.acceleration_PJ).max())
    times, positions = list(ratios.track.time_N), list(ratios.track.position_NJ)
    if world.case.mode == "stream":
        times, positions = [t for t, _, _ in world.streamed], [position_J for _, position_J, _ in world.streamed]
    for called, until in world.stopped:
        since = called + sum(end - begin for begin, end in world.stalled if called < end and begin < until)
        since += 2 * TICK_NS + world.grace_ns() + round(braking_s * NS_PER_S)
        at_rest = [position_J for time_ns, position_J in zip(times, positions, strict=True) if since < time_ns < until]
        if any(np.any(position_J != at_rest[0]) for position_J in at_rest):
            return True
    return False


def lateness(
    world: World, time_N: NDArray[np.int64], position_NJ: Array, speed_J: Array, acceleration_J: Array
) -> float:
    """How far the real controller is from the one that gets everything on time, against what its lateness explains."""
    if not any(late_ns for _, late_ns in world.late):
        return 0.0
    late_N = np.zeros(len(time_N))
    for since, late_ns in world.late:
        late_N[time_N >= since] = np.maximum(late_N[time_N >= since], late_ns)
    apart_NJ = np.abs(world.real.walk(time_N)[0] - position_NJ)
    late_s_N = late_N[:, None] / NS_PER_S
    # A cubic of the length T whose start is off by a velocity v strays by 4/27 T v at most.
    allowed_NJ = late_s_N * (speed_J + 4.0 / 27.0 * world.case.period_s * acceleration_J) + 1e-9
    return float((apart_NJ / allowed_NJ).max())
