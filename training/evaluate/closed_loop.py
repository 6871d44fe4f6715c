"""A policy in closed loop with the simulated arm, without ROS and in simulated time.

The policy is the robot's own code (`ki_vla_ros.policy.policy` on the chosen engine), the arm executes trajectories as a
real controller does, and a chunk arrives a fixed delay after the observation it was made from. The demo measures the
same over real topics in real time; here an episode takes about a second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.policy import Policy
from ki_vla_ros.records import NS_PER_S, ActionChunk, CameraFrame, JointReading, Motion, to_ns
from ki_vla_ros.robot import plain_joints
from ki_vla_ros.runtime import CameraSource, Diagnostics, Latest, ObservationBuffer, PolicyLoop
from ki_vla_ros.runtime.paths import CommandedPath, Trajectory, TrajectoryPoint
from ki_vla_ros.settings import Settings
from ki_vla_ros.sim import TIMESTEP_S, Scene, World

FIRST_SCENE = 900_000_000  # training draws its scenes from smaller numbers


class Arm:
    """The simulated arm as the policy loop's wire: a command arrives `delay_s` after the tick that computed it."""

    def __init__(self, delay_s: float) -> None:
        self.world = World()
        self.delay_ns = to_ns(delay_s)
        self.holds = 0
        self.seam_step = self.seam_speed_step = 0.0
        self.speeds: list[list[NDArray[np.float64]]] = []  # measured, by episode, every physics step
        self._ready_ns = 0
        self._controller = CommandedPath(self.world.joints, self.world.joint_position_J)

    def reset(self, scene: Scene) -> None:
        self.world.reset(scene)
        self.speeds.append([])
        self._ready_ns = 0
        self._controller = CommandedPath(self.world.joints, self.world.joint_position_J)

    def advance(self, until_ns: int) -> None:
        """Run the physics until then, or until the episode is over."""
        while self.time_ns() < until_ns - to_ns(TIMESTEP_S) // 2 and not self.world.judge.done:
            self.world.step(self._controller.sample(self.time_ns())[0])
            self.speeds[-1].append(self.world.joint_velocity_J)

    def begin_tick(self) -> None:
        """From now on the tick's result is ready `delay_ns` later; the arm moves on meanwhile (`LiveBuffer`)."""
        self._ready_ns = self.time_ns() + self.delay_ns

    def jerk_rms(self) -> float:
        """RMS jerk of the arm's joints as measured, in rad/s^3, from speeds at 100 Hz."""
        every = round(0.01 / TIMESTEP_S)
        jerks = [np.diff(np.array(speeds)[::every, :-1], n=2, axis=0) / 0.01**2 for speeds in self.speeds]
        return float(np.sqrt(np.square(np.concatenate(jerks)).mean()))

    def time_ns(self) -> int:
        # Starts at one second: 0 means "no time yet".
        return NS_PER_S + to_ns(self.world.time_s)

    def now_ns(self) -> int:
        return max(self.time_ns(), self._ready_ns)

    def motion_ns(self) -> int:
        return self.now_ns()

    def simulated_clock(self) -> bool:
        return True

    def moves_arm(self) -> bool:
        return True

    def send_command(self, motion: Motion, now_ns: int, hold: bool = False) -> None:
        before = self._controller.sample(now_ns)
        self._controller.accept(as_trajectory(motion, now_ns), now_ns)
        after = self._controller.sample(now_ns)
        self.seam_step = max(self.seam_step, float(np.abs(after[0] - before[0]).max()))
        self.seam_speed_step = max(self.seam_speed_step, float(np.abs(after[1] - before[1]).max()))

    def report_chunk(self, chunk: ActionChunk) -> None: ...

    def report_tick(self, fields: Mapping[str, object]) -> None:
        self.holds += fields["hold"] is not None

    def log(self, message: str, cause: str) -> None: ...


class LiveBuffer(ObservationBuffer):
    """A buffer whose joint states keep arriving while the policy computes: reading the latest advances the arm."""

    def __init__(self, cameras: Sequence[str], arm: Arm) -> None:
        joints = plain_joints(arm.world.joints, "joint_states")
        super().__init__([CameraSource(name, name) for name in cameras], joints)
        self._arm = arm

    def latest(self, now_ns: int, max_age_ns: int) -> Latest:
        self._arm.advance(now_ns)
        self.add_joints(JointReading(now_ns, self._arm.world.joints, self._arm.world.joint_position_J))
        return super().latest(now_ns, max_age_ns)


class ClosedLoop:
    """A policy on the simulated arm, through the robot's own loop: observation, chunk execution, governor, gate."""

    def __init__(self, policy: Policy, delay_s: float, settings: Settings) -> None:
        self.policy, self.settings = policy, settings
        self.arm = Arm(delay_s)

    def run(self, scene: Scene) -> tuple[int | None, bool, float]:
        """Object reached first (None: none), success, and the episode's simulated time."""
        arm, world, manifest = self.arm, self.arm.world, self.policy.bundle.manifest
        arm.reset(scene)
        cameras = [camera.name for camera in manifest.cameras]
        buffer = LiveBuffer(cameras, arm)
        loop = PolicyLoop(self.policy, buffer, arm, Diagnostics(), lambda: self.settings)
        loop.instruction = scene.task.instruction
        while not world.judge.done:
            now_ns = arm.time_ns()
            for name in cameras:
                buffer.add_frame(CameraFrame(name, now_ns, world.render(name)))
            buffer.add_joints(JointReading(now_ns, world.joints, world.joint_position_J))
            arm.begin_tick()
            loop.step(self.settings, now_ns, 0)
            # As on the robot, a tick that takes longer than its period skips the next ones.
            period_ns = to_ns(1.0 / self.settings.rate_hz)
            arm.advance(now_ns + max(1, -(-arm.delay_ns // period_ns)) * period_ns)
        return world.judge.reached, world.judge.success, world.time_s


def as_trajectory(motion: Motion, sent_ns: int) -> Trajectory:
    """The controller's message as the node makes it: the points after `sent_ns`, starting now (stamp 0)."""
    first = min(int(np.searchsorted(motion.time_N, sent_ns, side="right")), len(motion.time_N) - 1)
    points = [
        TrajectoryPoint(int(motion.time_N[k]) - sent_ns, motion.position_NJ[k].tolist(), motion.velocity_NJ[k].tolist())
        for k in range(first, len(motion.time_N))
    ]
    return Trajectory(0, motion.joints, points)


def evaluate(policy: Policy, scenes: Sequence[Scene], delay_s: float, settings: Settings) -> dict[str, float]:
    """Figures over these scenes, such as `success_rate` and `follow_rate` (the instructed object was reached first).

    `seam_step` (rad or m) and `seam_speed_step` (per second) are the largest steps of the commanded motion where one
    command takes over from another; `jerk_rms` is of the measured motion.
    """
    loop = ClosedLoop(policy, delay_s, settings)
    outcomes = [loop.run(scene) for scene in scenes]
    return {
        "episodes": len(scenes),
        "follow_rate": float(np.mean([o[0] == s.target for o, s in zip(outcomes, scenes, strict=True)])),
        "success_rate": float(np.mean([success for _, success, _ in outcomes])),
        "chance_follow_rate": float(np.mean([1 / len(scene.objects) for scene in scenes])),
        "mean_seconds": float(np.mean([seconds for *_, seconds in outcomes])),
        "holds": loop.arm.holds,
        "jerk_rms": loop.arm.jerk_rms(),
        "seam_step": loop.arm.seam_step,
        "seam_speed_step": loop.arm.seam_speed_step,
    }
