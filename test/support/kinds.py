"""Robots of every kind under the real loop, judged by what is sent to each of their controllers.

`Case(seed)` draws a robot (arms behind trajectories or streams, grippers, joint velocities, a base, tools with poses),
a policy that asks for anything, and what goes wrong; `judge(case)` runs loop, governor, gate, buffer and CommandSpace
on a simulated clock. Trajectories are followed by support/controller.py every millisecond; streams are judged value by
value, with limits from the robot file. Beside limits it checks what a hold means for each kind: velocities end at zero
and stay there, everything else rests, and nothing moves after a stop.

Legend: J axes, D actions, N instants. Times in ns on the steady clock unless a name says ROS.
"""

from __future__ import annotations

import random
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.bundle.manifest import PolicySpec
from ki_vla_ros.errors import EngineError, InputError
from ki_vla_ros.messages.encoding import encode_command
from ki_vla_ros.policy.policy import Policy
from ki_vla_ros.records import ActionChunk, CameraFrame, JointReading, Motion, PoseReading
from ki_vla_ros.robot import rotations
from ki_vla_ros.robot.dimensions import POSE_STAMPED, QUATERNION, SIX_D, VECTOR
from ki_vla_ros.robot.outputs import POSE, TRAJECTORY
from ki_vla_ros.robot.robot import Robot
from ki_vla_ros.ros.stream import Player, Streamed
from ki_vla_ros.runtime.diagnostics import Diagnostics
from ki_vla_ros.runtime.loop import WATCHDOG_NS, PolicyLoop
from ki_vla_ros.runtime.observation import CameraSource, ObservationBuffer
from ki_vla_ros.settings.names import settings_from_parameters
from ki_vla_ros.settings.settings import ExecutorName, Settings
from support.controller import NS_PER_S, TrajectoryController

Array = NDArray[np.float64]
MS = 1_000_000
START = 1_000 * NS_PER_S
ROS_OFFSET = 1_700_000_000 * NS_PER_S
TICK_NS = 100 * MS
HORIZON, ACTION_S = 20, 0.05
TOLERANCE = 1.01
PARTS = ("arm", "servo", "gripper", "binary", "hand", "velocity", "free_velocity", "base", "pose", "delta")
FAULTS = ("none", "gaps", "engine", "stop", "restart", "limits", "clock", "moved", "slow", "ramp", "stalls")
CHUNKS = ("smooth", "smooth", "wander", "wander", "jumps", "broken")
IMAGE = np.zeros((1, 1, 3), np.uint8)
POSE_PARTS = {"vector": VECTOR, "quaternion": QUATERNION, "6d": SIX_D}


def draw_robot(rng: random.Random, parts: tuple[str, ...], *, in_any_order: bool = False) -> Robot:
    """A robot file with these parts, each with an output of its own."""
    state: list[dict[str, Any]] = []
    actions: list[dict[str, Any]] = []
    outputs: list[dict[str, Any]] = []
    for part in parts:
        output: dict[str, Any] = {"name": part, "topic": f"{part}/command"}
        names = [f"{part}_{i}" for i in range(2 if part in ("arm", "servo", "velocity", "free_velocity") else 1)]
        if part in ("arm", "servo"):
            output["type"] = TRAJECTORY if part == "arm" else "std_msgs/msg/Float64MultiArray"
            turns = rng.random() < 0.2
            for name in names:
                joint = {"name": name, "kind": "joint_position", "unit": "rad", "continuous": turns}
                limits = {} if turns and rng.random() < 0.5 else {"lower": -2.0, "upper": 2.0}
                source = rng.choice(
                    ({}, {"topic": f"{part}/joint_states"}, {"topic": f"{part}/degrees", "unit": "deg"})
                )
                state.append({**joint, "source": source, "dataset": {"unit": "deg"}})
                actions.append({**joint, **limits, "max_velocity": 1.5, "relative": rng.random() < 0.5})
        elif part in ("gripper", "binary", "hand"):
            output["type"] = "std_msgs/msg/Float64MultiArray" if part == "hand" else TRAJECTORY
            ends = {"open": 0.04, "closed": 0.0} if rng.random() < 0.5 else {"open": 0.0, "closed": 0.8}
            unit = "m" if ends["open"] else "rad"
            gripper = {"name": names[0], "kind": "gripper", "unit": unit, **ends}
            state.append(gripper)
            actions.append({**gripper, "max_velocity": 0.5, "binary": part != "gripper"})
        elif part in ("velocity", "free_velocity"):
            output["type"] = "std_msgs/msg/Float64MultiArray"
            for name in names:
                if part == "velocity":
                    state.append({"name": name, "kind": "joint_position", "unit": "rad", "lower": -1.0, "upper": 1.0})
                actions.append({"name": f"{name}_speed", "joint": name, "kind": "joint_velocity", "unit": "rad/s"})
                actions[-1] |= {"max_velocity": 1.0, "dataset": {"range": [-1, 1]}}
        elif part == "base":
            output["type"] = rng.choice(("geometry_msgs/msg/Twist", "geometry_msgs/msg/TwistStamped"))
            for component in ("vx", "vy", "wz"):
                name, kind = f"{part}_{component}", {"kind": "twist", "component": component}
                actions.append({"name": name, **kind, "max_velocity": 0.5, "max_acceleration": 1.0})
        else:
            kind = "pose" if part == "pose" else "pose_delta"
            source = {"topic": f"{part}/state", "type": "geometry_msgs/msg/PoseStamped"}
            box = {"x": [0.2, 0.8], "y": [-0.5, 0.5], "z": [0.0, 0.6]}
            output |= {"type": POSE, "workspace": box, "max_linear_velocity": 0.5, "max_angular_velocity": 1.0}
            output |= {"source": source, "delta_frame": rng.choice(("base", "tool"))}
            output["delta_from"] = rng.choice(("previous", "observation"))
            rotation = POSE_PARTS[rng.choice(tuple(POSE_PARTS) if kind == "pose" else ("vector",))]
            written = rng.choice((("x", "y", "z", *rotation), ("x", "y", "z", *rotation), ("x", "y", "z"), rotation))
            for component in written:
                actions.append({"name": f"{part}_{component}", "kind": kind, "component": component})
            if rng.random() < 0.5:
                for component in ("x", "y", "z", *POSE_PARTS[rng.choice(tuple(POSE_PARTS))]):
                    at = {"kind": "pose", "component": component, "source": source}
                    state.append({"name": f"{part}_{component}", **at})
        for action in actions:
            action.setdefault("output", part)
        outputs.append(output)
    if not state:
        state.append({"name": "torso", "kind": "joint_position", "unit": "m", "lower": 0.0, "upper": 0.4})
    if in_any_order:
        rng.shuffle(state)
        rng.shuffle(actions)
    return Robot.model_validate(
        {
            "name": "drawn",
            "cameras": [{"name": "scene"}],
            "state": state,
            "actions": actions,
            "outputs": outputs,
            "action_period_s": ACTION_S,
            "horizon": HORIZON,
        }
    )


class Case:
    """What one seed makes; `str` tells it in words."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        rng = self.rng = random.Random(seed)
        self.parts = tuple(rng.sample(PARTS, rng.choice((1, 1, 1, 2, 2, 3, 4))))
        self.robot = draw_robot(rng, self.parts, in_any_order=True)
        self.faults = frozenset(rng.sample(FAULTS, rng.choice((1, 1, 2, 3))))
        self.chunks = rng.choice(CHUNKS)
        self.ms = 100 * rng.randint(5, 9)
        self.parameters: dict[str, Any] = {
            "executor": rng.choice(get_args(ExecutorName)),
            "execution_horizon_s": rng.choice((0.1, 0.2)),
            "ramp_in_s": 0.5 if "ramp" in self.faults else 0.0,
            "command_period_s": rng.choice((0.02, 0.02, 0.01, 0.05)),
            "align_to_cameras": False,
            "hold_after_s": 0.3,
        }
        if rng.random() < 0.85:
            self.parameters |= {"limits.on_position": "clamp", "limits.on_speed": "clamp", "limits.max_jump_s": 10.0}
            self.parameters |= {"limits.max_chunk_age_s": 5.0, "max_age_s": 1.0}
        self.inference_ms = rng.choice((10, 40, 300, 700)) if "slow" in self.faults else rng.choice((0, 10, 40))
        self.fail = 0.4 if "engine" in self.faults else 0.0
        self.events: list[tuple[int, str, Any]] = []
        at = lambda: rng.randint(100, self.ms)  # noqa: E731
        if "gaps" in self.faults:
            gone = at()
            what, off, on = rng.choice((("cameras", False, True), ("readings", False, True), ("instruct", "", "go")))
            self.events += [(gone, what, off), (gone + rng.choice((150, 500)), what, on)]
        if "stop" in self.faults:
            self.events.append((stopped := at(), "latch", None))
            if rng.random() < 0.5:
                self.events.append((stopped + rng.choice((50, 300)), "reset", None))
        if "restart" in self.faults:
            self.events += [(off := at(), "deactivate", None), (off + rng.choice((50, 200)), "activate", None)]
        if "limits" in self.faults:
            tighter = rng.choice(({"limits.velocity_scale": 0.2}, {"limits.time_to_speed_s": 0.4}))
            self.events.append((at(), "set", tighter))
        if "clock" in self.faults:
            self.events.append((at(), "clock", rng.choice((-300, -5, 5, 300, 5000))))
        if "moved" in self.faults:
            self.events.append((at(), "moved", rng.choice((0.02, 0.2))))
        self.stalls: dict[int, float] = {}  # at which call, in ms
        if "stalls" in self.faults:
            self.stalls = {rng.randint(1, 120): rng.choice((3, 12.7, 30, 100, 400)) for _ in range(rng.randint(1, 4))}
        self.events.sort(key=lambda event: event[0])

    def __str__(self) -> str:
        parameters = ", ".join(f"{name}={value}" for name, value in self.parameters.items())
        events = "".join(f"\n    {at} ms: {what} {how}" for at, what, how in self.events)
        return (
            f"kinds seed {self.seed}: {', '.join(self.parts)}; faults {', '.join(sorted(self.faults))}, {self.chunks} "
            f"chunks, {self.ms} ms, inference {self.inference_ms} ms, stalls {self.stalls}\n    {parameters}{events}"
        )


@lru_cache(maxsize=1024)
def _settings(parameters: tuple[tuple[str, Any], ...]) -> Settings:
    return settings_from_parameters(dict(parameters))


class WildPolicy(Policy):
    """Asks for anything, after some time; decodes with the real code."""

    def __init__(self, world: World) -> None:
        self.world, robot = world, world.case.robot
        high = [_most(action) for action in robot.actions]
        spec = PolicySpec.model_validate(
            {
                "name": "wild",
                "created": "today",
                "robot": robot,
                "image": {"size": 8},
                "prompt": {"template": "{task} {state}", "length": 16},
                "state": {"encoding": "text", "low": [-4.0] * len(robot.state), "high": [4.0] * len(robot.state)},
                "action": {"low": [-x for x in high], "high": high},
                "max_prefix_delay": 4,
                "provenance": {"recipe": "none", "seed": 0, "commit": "none", "data_fingerprint": "none"},
            }
        )
        engine = SimpleNamespace(description="none")
        super().__init__(SimpleNamespace(manifest=spec, tokenizer=None), engine)  # type: ignore[arg-type]

    def see(self, *_: Any) -> Any:
        world = self.world
        world.flow(world.steady + world.rng.randint(0, world.case.inference_ms) * MS)
        if world.rng.random() < world.case.fail:
            raise EngineError("the engine fails")

    def noise(self, _: int) -> Any: ...

    def guide(self, condition: Any, observation: Any) -> Any:
        self.encode(condition.position_HJ, condition.velocity_HJ, observation)

    def denoise(self, *_: Any) -> Any:
        random_, width = self.world.random, len(self.world.case.robot.actions)
        return {
            "smooth": lambda: np.tile(random_.uniform(-1, 1, width), (HORIZON, 1)),
            "wander": lambda: np.cumsum(random_.normal(0, 0.2, (HORIZON, width)), axis=0),
            "jumps": lambda: random_.choice([-1.2, 1.0], (HORIZON, width)),
            "broken": lambda: (
                random_.uniform(-1, 1, (HORIZON, width)) * random_.choice([1, 1, 1, 1e6, np.nan, 0], width)
            ),
        }[self.world.case.chunks]().astype(np.float32)


def _most(action: Any) -> float:
    if action.kind in ("joint_velocity", "twist"):
        return float(1.5 * action.max_velocity)
    if action.kind == "pose_delta":
        return 0.03 if action.component in ("x", "y", "z") else 0.1
    if action.kind == "pose":
        return 1.0
    low, high = action.span
    most = min(max(abs(low), abs(high)), 4.0)
    return 0.3 * most if action.relative else most


@dataclass
class World:
    """The clocks, the robot with its controllers, the topics: all that surrounds the loop."""

    case: Case
    steady: int = START
    offset_ns: int = ROS_OFFSET
    active: bool = True
    cameras: bool = True
    readings: bool = True
    logged: list[str] = field(default_factory=list)
    told: list[tuple[int, Any]] = field(default_factory=list)  # from when on which limits hold
    fresh: list[int] = field(default_factory=list)  # when chunks went out
    stopped: list[list[int]] = field(default_factory=list)
    calls: int = 0
    broken: list[int] = field(default_factory=list)  # when a stream stood still because the process did
    _interruption: Any = None
    streamed: list[tuple[int, Array, Array, Array]] = field(default_factory=list)  # time, position, velocity, reference

    def __post_init__(self) -> None:
        case = self.case
        self.rng, self.parts = random.Random(case.seed + 1), random.Random(case.seed + 2)
        self.random = np.random.default_rng(case.seed)
        self.parameters = dict(case.parameters)
        self.settings = _settings(tuple(self.parameters.items()))
        self.robot, self.axes = case.robot, case.robot.axes
        self.period_ns = round(case.parameters["command_period_s"] * NS_PER_S)
        self.streams_J = np.array([case.robot.outputs[axis.output].streams("replace") for axis in self.axes])
        self.policy = WildPolicy(self)
        self.signal_M = np.array([self._begin(signal) for signal in case.robot.signals])
        for pose in self.policy.space.poses:
            turned = slice(pose.signals.start + 3, pose.signals.stop)
            self.signal_M[turned] = rotations.from_vector(self.random.normal(0.0, 1.0, 3))
        self.where_J = np.nan_to_num(self.policy.space.measured(self.signal_M))
        self.begin_J = self.where_J.copy()
        self.trajectory_J = {
            number: np.flatnonzero([axis.output == number for axis in self.axes])
            for number in sorted({axis.output for j, axis in enumerate(self.axes) if not self.streams_J[j]})
        }
        self.controllers = {
            number: TrajectoryController(
                [self.axes[j].name for j in index], self.where_J[index], self.steady, self.offset_ns
            )
            for number, index in self.trajectory_J.items()
        }
        self.velocity_J = self.policy.space.velocity_J
        self.shift_M = np.zeros(len(self.signal_M))
        self.moved_ns: int | None = None
        self.buffer, self.topics = self._make_buffer(), Topics(self.robot)
        self.diagnostics = Diagnostics()
        self.loop = PolicyLoop(self.policy, self.buffer, self, self.diagnostics, lambda: self.settings)
        self.loop.instruction = "go"
        self.events = [(START + at * MS, what, how) for at, what, how in case.events]
        self.reading_due = self.watch_due = self.steady
        self.told.append((0, self.loop._gate.bounds))
        acceleration_J = np.where(self.velocity_J, self.loop._gate.bounds.acceleration_J, np.inf)
        streamed = Streamed(self.streams_J, self.velocity_J, acceleration_J)
        self.player = Player(self.period_ns, streamed, on_grid=bool(self.controllers))
        self.fill()

    def _begin(self, signal: Any) -> float:
        low, high = max(signal.lower, -1.5), min(signal.upper, 1.5)
        if signal.part in ("x", "y", "z"):
            low, high = {"x": (0.3, 0.7), "y": (-0.3, 0.3), "z": (0.1, 0.5)}[signal.part]
        return float(low + (0.1 + 0.8 * self.random.random()) * (high - low))

    def _make_buffer(self) -> ObservationBuffer:
        return ObservationBuffer([CameraSource("scene", "/scene")], self.robot.signals, state=self.policy.space.state)

    # --- the loop's wire

    def now_ns(self) -> int:
        self.stall()
        return self.ros_ns()

    def ros_ns(self) -> int:
        return self.steady + self.offset_ns

    def motion_ns(self) -> int:
        self.stall()
        return self.steady if self.controllers else self.player.motion_ns(self.steady)

    def stall(self) -> None:
        """Called wherever the process may stop: nothing of the node runs then, but the controllers go on."""
        self.calls += 1
        self.steady += round(self.case.stalls.get(self.calls, 0) * MS)

    def simulated_clock(self) -> bool:
        return False

    def moves_arm(self) -> bool:
        return True

    def send_command(self, motion: Motion, now_ns: int, hold: bool = False) -> None:
        if self.streams_J.any():
            self.player.play(motion, self.steady)
        for number, index in self.trajectory_J.items():
            part = replace(
                motion,
                joints=self.controllers[number].joints,
                position_NJ=motion.position_NJ[:, index],
                velocity_NJ=motion.velocity_NJ[:, index],
            )
            self.controllers[number].receive(encode_command(part, now_ns), self.steady)

    def report_chunk(self, chunk: ActionChunk) -> None:
        self.fresh.append(self.steady)

    def report_tick(self, fields: Mapping[str, object]) -> None: ...

    def log(self, message: str, cause: str) -> None:
        if cause == "internal error":
            self.logged.append(message.strip().splitlines()[-1])

    # --- time

    def flow(self, end: int) -> None:
        while True:
            grid = self.player.due_ns() if self.player.motion is not None else 1 << 62
            due = min(self.reading_due, self.watch_due, grid, *(at for at, _, _ in self.events[:1]))
            if due > end:
                break
            self.steady = max(self.steady, due)
            if self.events and self.events[0][0] <= self.steady:
                self._happen(*self.events.pop(0)[1:])
            elif grid <= self.steady:
                self._stream()
            elif self.reading_due <= self.steady:
                self.reading_due = self.steady + 20 * MS
                self.fill()
            else:
                self.watch_due = self.steady + WATCHDOG_NS
                self.loop.watch(self.player.take_interruption)
        self.steady = max(self.steady, end)

    def _stream(self) -> None:
        sample = self.player.next(self.steady)
        if self.player._interruption is not self._interruption:
            self._interruption = self.player._interruption
            self.broken.append(self.player._played_ns)
        if sample is None:
            return
        self.player.sent(sample, slice(None))
        position_J, velocity_J = sample.position_J.copy(), sample.velocity_J.copy()
        self.streamed.append((self.player._played_ns, position_J, velocity_J, sample.reference_P4))
        # What a controller of velocities makes of them until the next one.
        self.where_J = np.where(self.velocity_J, self.where_J + velocity_J * self.period_ns / NS_PER_S, self.where_J)

    def fill(self) -> None:
        """Where the robot is, as its topics say."""
        for number, index in self.trajectory_J.items():
            self.where_J[index] = self.controllers[number].sample(self.steady)[0]
        signal_M, space = self.signal_M, self.policy.space
        if self.streamed:
            _, position_J, _, reference_P4 = self.streamed[-1]
            moved_J = self.streams_J & ~self.velocity_J
            self.where_J[moved_J] = position_J[moved_J]
            for pose in space.poses:
                signal_M[pose.signals][:3] = position_J[pose.axes][:3]
                turned = space.quaternions(pose, position_J, reference_P4)
                signal_M[pose.signals.start + 3 : pose.signals.stop] = turned * self.rng.choice((1.0, 1.0, -1.0))
        for j, axis in enumerate(self.axes):
            if axis.measured and axis.kind not in ("position", "rotation"):
                m = space._signal_of_axis[j]
                signal_M[m] = (self.where_J[j] - space._offset_J[j]) / space._scale_J[j]
        signal_M = signal_M + self.shift_M
        if self.cameras:
            self.buffer.add_frame(CameraFrame("scene", self.ros_ns(), IMAGE))
        if self.readings:
            self.topics.publish(self.buffer, self.ros_ns(), signal_M, self.parts)

    def _happen(self, what: str, how: Any) -> None:
        if what == "instruct":
            self.loop.instruction = how
        elif what in ("cameras", "readings"):
            setattr(self, what, how)
        elif what == "set":
            before = self.loop._gate.bounds
            self.parameters |= how
            self.settings = _settings(tuple(self.parameters.items()))
            self.told.append((self.steady, before))
        elif what == "clock":
            self.offset_ns += how * MS
            self.loop.clock_stepped(back=how < 0)
            for controller in self.controllers.values():
                controller.set_clock(controller.offset_ns, self.steady)
        elif what == "moved" and self.loop._governor.running is None:  # nobody was told yet where it should be
            self.events.insert(0, (self.steady + TICK_NS, what, how))
        elif what == "moved":  # what is measured is no longer where it was sent
            self.moved_ns = self.steady
            self.shift_M = np.array([0.0 if signal.part in QUATERNION else how for signal in self.robot.signals])
        elif what == "latch":
            self.stopped.append([self.steady, 1 << 62])
            self.loop.latch("by the case")
        elif what == "reset":
            for stop in self.stopped:
                stop[1] = min(stop[1], self.steady)
            self.loop.reset()
        elif what == "deactivate":
            self.active = False
            self.loop.end()
        elif what == "activate":
            self.active = True
            self.loop.begin()

    def run(self) -> None:
        end = START + self.case.ms * MS
        self.loop.begin()
        due = self.steady
        while self.steady < end:
            if self.active:
                self.loop.step(self.settings, self.ros_ns(), 0)
            due = max(due + TICK_NS, self.steady)
            self.flow(due)
        self.loop.end()
        self.reading_due = 1 << 62  # nobody reads any more
        self.flow(self.steady + 1500 * MS)


class Topics:
    """Each topic's message, as a driver would publish it; joint states sometimes in two parts."""

    def __init__(self, robot: Robot) -> None:
        self.names = [signal.part for signal in robot.signals]
        self.offset_M = np.array([signal.offset for signal in robot.signals])
        self.scale_M = np.array([signal.scale for signal in robot.signals])
        self.index: dict[tuple[str, str], list[int]] = {}  # of the signals of each topic and type
        for m, signal in enumerate(robot.signals):
            self.index.setdefault((signal.topic, signal.type), []).append(m)

    def publish(self, buffer: ObservationBuffer, stamp_ns: int, signal_M: Array, rng: random.Random) -> None:
        value_M = (signal_M - self.offset_M) / self.scale_M
        for (topic, kind), index in self.index.items():
            try:
                if kind == POSE_STAMPED:
                    buffer.add_pose(PoseReading(stamp_ns, "base", value_M[index]), topic=topic)
                    continue
                cut = rng.choice((0, 0, len(index) // 2))
                for part in filter(None, (index[:cut], index[cut:])):
                    buffer.add_joints(
                        JointReading(stamp_ns, tuple(self.names[m] for m in part), value_M[part]), topic=topic
                    )
            except InputError as refusal:
                buffer.refuse(topic, str(refusal))


@dataclass
class Verdict:
    case: Case
    ratios: dict[str, float]
    faults: list[str]
    moved: frozenset[str]  # the kinds of axes that moved

    @property
    def bad(self) -> list[str]:
        return [name for name, ratio in self.ratios.items() if not ratio <= TOLERANCE] + self.faults


def judge(case: Case) -> Verdict:
    faults: list[str] = []
    world = World(case)
    try:
        world.run()
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        faults.append(f"raises {type(error).__name__} {error} in {where.name}:{where.lineno}")
    faults += sorted({f"internal error: {line}"[:120] for line in world.logged})
    for controller in world.controllers.values():
        faults += [f"the controller refuses it: {why}" for why in controller.refused[:1]]
    ratios: dict[str, float] = {}
    moved: set[str] = set()
    for number, index in world.trajectory_J.items():
        time_N = np.arange(START, world.steady, MS)
        position_NJ = world.controllers[number].walk(time_N)[0]
        _judge_places(world, index, time_N, position_NJ, 1e-3, ratios, moved, faults)
    index = np.flatnonzero(world.streams_J)
    if world.moved_ns is not None:  # a stream then begins anew where the robot was put
        world.streamed = [sent for sent in world.streamed if sent[0] <= world.moved_ns]
    if len(index) and world.streamed:
        step_s = world.period_ns / NS_PER_S
        time_N = np.array([time for time, *_ in world.streamed])
        position_NJ = np.array([position for _, position, _, _ in world.streamed])
        velocity_NJ = np.array([velocity for _, _, velocity, _ in world.streamed])
        _judge_velocities(world, time_N, velocity_NJ, step_s, ratios, moved, faults)
        _judge_poses(world, time_N, position_NJ, step_s, ratios, moved, faults)
        placed = [j for j in index if world.axes[j].kind in ("joint", "gripper")]
        if placed:
            _judge_places(world, np.array(placed), time_N, position_NJ[:, placed], step_s, ratios, moved, faults)
    return Verdict(case, ratios, faults, frozenset(moved))


def _limits(world: World, name: str) -> Array:
    """The widest of the limits that a case had: what tightens in motion is judged by the other judge."""
    bounds = [bounds for _, bounds in world.told] + [world.loop._gate.bounds]
    return np.asarray(np.max([getattr(b, name) for b in bounds], axis=0))


def _put(ratios: dict[str, float], name: str, value: Any) -> None:
    ratios[name] = max(ratios.get(name, 0.0), float(np.max(value, initial=0.0)))


def _judge_places(
    world: World, index: Any, time_N: Any, position_NJ: Array, step_s: float, ratios: Any, moved: Any, faults: Any
) -> None:
    axes = [world.axes[j] for j in index]
    streamed = step_s > 1e-3
    gap_N = _gaps(world, time_N, step_s)
    step_NJ = np.diff(position_NJ, axis=0, prepend=world.begin_J[None, index])
    speed_J, acceleration_J = _limits(world, "speed_J")[index], _limits(world, "acceleration_J")[index]
    _judge_starts(world, step_NJ[gap_N] / _apart_s(time_N, step_s)[gap_N, None] / speed_J, ratios)
    step_NJ[gap_N] = 0.0
    speed_NJ = step_NJ / step_s
    change_NJ = np.diff(speed_NJ, axis=0, prepend=0 * speed_NJ[:1]) / step_s
    after_gap_N = gap_N | np.roll(gap_N, 1)
    change_NJ[after_gap_N] = 0.0
    what = "stream" if streamed else "trajectory"
    _put(ratios, f"{what} speed", np.abs(speed_NJ) / speed_J)
    rounding_NJ = 8.0 * np.spacing(np.abs(position_NJ)) / step_s**2
    _put(ratios, f"{what} acceleration", np.maximum(np.abs(change_NJ) - rounding_NJ, 0.0) / acceleration_J)
    lower_J, upper_J = (np.array([getattr(axis, name) for axis in axes]) for name in ("lower", "upper"))
    room_J = 0.0 if "moved" not in world.case.faults else 0.2
    if np.any(position_NJ < lower_J - room_J - 1e-9) or np.any(position_NJ > upper_J + room_J + 1e-9):
        faults.append(f"{what} leaves its limits")
    moved |= {axis.kind for axis, column in zip(axes, speed_NJ.T, strict=True) if np.any(column)}
    _judge_stops(world, time_N, position_NJ, f"{what} of {', '.join(axis.name for axis in axes)}", faults)


def _judge_velocities(
    world: World, time_N: Any, velocity_NJ: Array, step_s: float, ratios: Any, moved: Any, faults: Any
) -> None:
    index = np.flatnonzero(world.velocity_J)
    if not len(index):
        return
    value_NV = velocity_NJ[:, index]
    speed_J, acceleration_J = _limits(world, "speed_J")[index], _limits(world, "acceleration_J")[index]
    _put(ratios, "velocity", np.abs(value_NV) / speed_J)
    # Between the motions of a case nothing is sent, and the last value is zero.
    before_NV = np.concatenate([np.zeros_like(value_NV[:1]), value_NV[:-1]])
    _put(ratios, "change of velocity", np.abs(value_NV - before_NV) / step_s / acceleration_J)
    if np.any(value_NV):
        moved.add("velocity")
    # The watchdog looks every 20 ms; then the controller's period and the time of braking pass.
    # A setting may have made the acceleration smaller in motion: the slowest braking of the case counts.
    bounds = [bounds for _, bounds in world.told] + [world.loop._gate.bounds]
    braking_s = max(float((b.speed_J[index] / b.acceleration_J[index]).max()) for b in bounds)
    braking_s += world.parameters["hold_after_s"] + 0.04 + 2.0 * step_s
    braking_s += sum(world.case.stalls.values()) / 1e3  # while the process is stopped, nobody can send anything
    last_N = np.searchsorted(world.fresh, time_N, side="right") - 1
    since_N = (time_N - np.array([START, *world.fresh])[last_N + 1]) / NS_PER_S
    if np.any(value_NV[since_N > braking_s] != 0.0):
        faults.append("a velocity without anything fresh")
    if np.any(value_NV[-1] != 0.0) and world.moved_ns is None:
        faults.append("a velocity is left standing")
    gap_N = np.diff(time_N, append=time_N[-1:]) > 3.5 * step_s * NS_PER_S
    if np.any(value_NV[gap_N] != 0.0) and not world.case.stalls:
        faults.append("a velocity is left standing for a while")
    _judge_stops(world, time_N, np.cumsum(np.abs(value_NV), axis=0), "velocity", faults)
    for j, column in zip(index, value_NV.T, strict=True):
        axis = world.axes[j]
        if not axis.measured or "moved" in world.case.faults:
            continue
        # Each value stands for a period: the joint is at most half a step of acceleration per period off the plan.
        begin = float(world.begin_J[j])
        place_N = begin + np.cumsum(column) * step_s
        room = float(axis.max_velocity) * step_s
        if np.any(place_N < axis.lower - room) or np.any(place_N > axis.upper + room):
            faults.append(f"velocity leads {axis.name} beyond its limits")


def _judge_poses(
    world: World, time_N: Any, position_NJ: Array, step_s: float, ratios: Any, moved: Any, faults: Any
) -> None:
    space = world.policy.space
    gap_N = _gaps(world, time_N, step_s)
    for pose in space.poses:
        output = world.robot.outputs[pose.output]
        place_N3 = position_NJ[:, pose.axes.start : pose.axes.start + 3]
        turned_N4 = space.quaternions(
            pose, position_NJ, np.stack([reference for *_, reference in world.streamed], axis=1)
        )
        begin_3 = world.begin_J[None, pose.axes.start : pose.axes.start + 3]
        step_N3 = np.diff(place_N3, axis=0, prepend=begin_3)
        apart_s_N = _apart_s(time_N, step_s)
        _judge_starts(world, step_N3[gap_N] / apart_s_N[gap_N, None] / output.max_linear_velocity, ratios)
        step_N3[gap_N] = 0.0
        linear_N = np.linalg.norm(step_N3, axis=1) / step_s
        _put(ratios, "linear speed", linear_N / output.max_linear_velocity)
        rates_N3 = rotations.to_vector(rotations.multiply(turned_N4[1:], rotations.inverse(turned_N4[:-1]))) / step_s
        rates_N3 = np.concatenate([np.zeros((1, 3)), rates_N3])
        rates_N3[gap_N] = 0.0
        _put(ratios, "angular speed", np.linalg.norm(rates_N3, axis=1) / output.max_angular_velocity)
        again_N = gap_N | np.roll(gap_N, 1)
        for name, value_N3, limit in (
            ("linear acceleration", step_N3 / step_s, output.max_linear_velocity),
            ("angular acceleration", rates_N3, output.max_angular_velocity),
        ):
            change_N = np.linalg.norm(np.diff(value_N3, axis=0, prepend=0 * value_N3[:1]), axis=1) / step_s
            change_N[again_N] = 0.0
            allowed = limit / 0.15 + (limit**2 if name.startswith("angular") else 0.0)
            _put(ratios, name, change_N / allowed)
        assert output.workspace is not None
        box = np.array([output.workspace.x, output.workspace.y, output.workspace.z])
        room = 0.2 if "moved" in world.case.faults else 0.0
        if np.any(place_N3 < box[:, 0] - room - 1e-9) or np.any(place_N3 > box[:, 1] + room + 1e-9):
            faults.append("a pose leaves its workspace")
        if np.any(linear_N):
            moved.add("position")
        if np.any(rates_N3):
            moved.add("rotation")
        _judge_stops(world, time_N, np.concatenate([place_N3, turned_N4], axis=1), "pose", faults)


def _gaps(world: World, time_N: Any, step_s: float) -> Any:
    """Where a stream begins, and begins anew: its first step there is shorter or longer than a period."""
    gap_N = np.diff(time_N, prepend=time_N[:1]) > 1.001 * step_s * NS_PER_S
    gap_N[0] = True
    for broken_ns in world.broken if step_s > 1e-3 else ():  # the arm stood still before
        gap_N |= (time_N >= broken_ns) & (time_N <= broken_ns + 1.001 * step_s * NS_PER_S)
    return gap_N


def _apart_s(time_N: Any, step_s: float) -> Array:
    """The time [N] since the value before, one to three periods: on a grid a late value is left out."""
    return np.asarray(np.clip(np.diff(time_N, prepend=time_N[:1]) / NS_PER_S, step_s, 3 * step_s))


def _judge_starts(world: World, ratio_NJ: Array, ratios: dict[str, float]) -> None:
    """A stream goes on from where the last one ended, unless the robot was moved."""
    if "moved" not in world.case.faults:
        _put(ratios, "start of a stream", np.abs(ratio_NJ))


def _judge_stops(world: World, time_N: Any, value_NJ: Array, what: str, faults: list[str]) -> None:
    """Nothing moves from two ticks and the time of braking after a stop on."""
    for called, until in world.stopped:
        since = called + 2 * TICK_NS + 600 * MS
        at_rest = value_NJ[(time_N > since) & (time_N < until)]
        if len(at_rest) and np.any(at_rest != at_rest[0]):
            faults.append(f"{what} moves after a stop")
