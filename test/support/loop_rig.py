"""The policy loop without ROS: a real bundle, a clock that the test moves, a wire that records."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from ki_vla_ros.bundle.folder import Bundle
from ki_vla_ros.engines.onnx_engine import OnnxEngine
from ki_vla_ros.policy.policy import Policy
from ki_vla_ros.records import NS_PER_S, ActionChunk, JointReading, Motion
from ki_vla_ros.robot import plain_joints
from ki_vla_ros.runtime.diagnostics import Diagnostics, Stopwatch
from ki_vla_ros.runtime.loop import PolicyLoop
from ki_vla_ros.runtime.observation import CameraSource, ObservationBuffer
from ki_vla_ros.runtime.thread import LoopThread
from ki_vla_ros.settings.names import settings_from_parameters
from ki_vla_ros.settings.settings import Settings
from support.bundles import CAMERAS, JOINTS, TASK, demo_observation

MS = 1_000_000
START = 1_000 * NS_PER_S


class FakeWire:
    """Records what went out; `now_ns` stands still until the test changes it."""

    def __init__(self) -> None:
        self.time_ns = START
        self.stepped_ns = 0  # by how much the node's clock has been set since the start
        self.computing_ns: list[int] = []  # how long what is computed between two looks at the motion's clock takes
        self.commands: list[tuple[Motion, int]] = []
        self.chunks: list[ActionChunk] = []
        self.ticks: list[Mapping[str, object]] = []
        self.lines: list[str] = []
        self.on_tick: Callable[[], None] = lambda: None

    def now_ns(self) -> int:
        return self.time_ns

    def motion_ns(self) -> int:
        if self.computing_ns:
            self.time_ns += self.computing_ns.pop(0)
        return self.time_ns - self.stepped_ns

    def simulated_clock(self) -> bool:
        return True

    def moves_arm(self) -> bool:
        return True

    def send_command(self, motion: Motion, now_ns: int, hold: bool = False) -> None:
        self.commands.append((motion, now_ns))

    def report_chunk(self, chunk: ActionChunk) -> None:
        self.chunks.append(chunk)

    def report_tick(self, fields: Mapping[str, object]) -> None:
        self.ticks.append(fields)
        self.on_tick()

    def log(self, message: str, cause: str) -> None:
        self.lines.append(message)


class Rig:
    """A loop with everything that it needs; `give_inputs` supplies an observation of the present moment."""

    def __init__(self, bundle: Bundle, policy: Policy | None = None, **changes: object) -> None:
        self.policy = policy or Policy(bundle, OnnxEngine(bundle))
        self.engine = self.policy.engine
        self.wire = FakeWire()
        self.settings = settings_from_parameters({"ramp_in_s": 0.0, **changes})
        self.diagnostics = Diagnostics()
        self.buffer = ObservationBuffer(
            [CameraSource(c, f"/{c}") for c in CAMERAS], plain_joints(JOINTS, "/joint_states")
        )
        self.loop = PolicyLoop(self.policy, self.buffer, self.wire, self.diagnostics, lambda: self.settings)
        self.loop.instruction = TASK
        self.thread = LoopThread(self.loop)

    def give_inputs(self, age_ms: int = 0) -> None:
        observation = demo_observation(self.wire.time_ns - age_ms * MS)
        for frame in observation.frames.values():
            self.buffer.add_frame(frame)
        self.buffer.add_joints(JointReading(observation.stamp_ns, JOINTS, observation.state_S))

    def change(self, **changes: object) -> Settings:
        self.settings = settings_from_parameters({**self.settings.model_dump(exclude={"limits", "cameras"}), **changes})
        return self.settings

    def tick(self) -> tuple[int | None, Stopwatch]:
        watch = Stopwatch()
        sent = self.loop.tick(self.settings, self.wire.time_ns, watch)
        return None if sent is None else sent.index, watch

    def run_ticks(self, count: int, before: Callable[[int], None]) -> None:
        """Run ticks in the loop's thread: time advances by one period after each, and `before(n)` prepares tick n."""
        done = threading.Event()

        def next_tick() -> None:
            if len(self.wire.ticks) >= count:
                done.set()
                self.wire.on_tick = lambda: None
                return
            self.wire.time_ns += round(NS_PER_S / self.settings.rate_hz)
            before(len(self.wire.ticks))

        self.wire.on_tick = next_tick
        before(0)
        self.thread.start()
        try:
            assert done.wait(60.0)
        finally:
            self.thread.stop()


def is_hold(motion: Motion) -> bool:
    """The last quarter of a second of a chunk's motion moves; a hold is over by then."""
    return bool(motion.end_ns - motion.from_ns < 550 * MS)
