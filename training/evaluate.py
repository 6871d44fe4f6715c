"""Closed-loop figures of a bundle in the simulator, without ROS and in simulated time.

    python -m training.evaluate models/demo --episodes 100

The policy is the robot's own code (`ki_vla_ros.policy` on onnxruntime), the arm executes trajectories as a real
controller does, and a chunk arrives a fixed delay after the observation it was made from. The demo measures the same
over real topics and in real time; here an episode takes about a second.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ki_vla_ros.bundle import load_bundle
from ki_vla_ros.chunking import drop_actions
from ki_vla_ros.engines.onnx_engine import OnnxEngine
from ki_vla_ros.policy import Policy
from ki_vla_ros.records import NS_PER_S, ActionChunk, CameraFrame, Observation
from ki_vla_ros.sim.task import Scene, sample_scene
from ki_vla_ros.sim.trajectory import Trajectory, TrajectoryExecutor, TrajectoryPoint
from ki_vla_ros.sim.world import TIMESTEP_S, World

FIRST_SCENE = 900_000_000  # training draws its scenes from smaller numbers
TICK_S = 0.1


class ClosedLoop:
    """A policy on the simulated arm: asynchronous chunks at 10 Hz, actions that the delay has consumed dropped."""

    def __init__(self, policy: Policy, delay_s: float) -> None:
        self.policy, self.delay_s = policy, delay_s
        self.world = World()

    def run(self, scene: Scene) -> tuple[int | None, bool, float]:
        """Object reached first (None: none), success, and the episode's simulated time."""
        world = self.world
        world.reset(scene)
        arm = TrajectoryExecutor(world.joints, world.joint_position_J)
        tick = 0
        while not world.judge.done:
            chunk = self.policy.infer(self.observe(), scene.task.instruction, tick)
            arrives_ns = chunk.start_ns + round(self.delay_s * NS_PER_S)
            tick += 1
            sent = False
            while world.time_s < tick * TICK_S - TIMESTEP_S / 2 and not world.judge.done:
                now_ns = self.now_ns()
                if not sent and now_ns >= arrives_ns:
                    arm.accept(trajectory(chunk, now_ns), now_ns)
                    sent = True
                world.step(arm.sample(now_ns)[0])
        return world.judge.reached, world.judge.success, world.time_s

    def observe(self) -> Observation:
        """What the cameras and joints say now."""
        now_ns = self.now_ns()
        cameras = [camera.name for camera in self.policy.bundle.manifest.cameras]
        frames = {name: CameraFrame(name, now_ns, self.world.render(name)) for name in cameras}
        return Observation(now_ns, frames, self.world.joint_position_J)

    def now_ns(self) -> int:
        return round(self.world.time_s * NS_PER_S)


def trajectory(chunk: ActionChunk, now_ns: int) -> Trajectory:
    """What of the chunk lies ahead, as the controller's message: "start now", at rest at the end."""
    ahead = drop_actions(chunk, next(k for k in range(chunk.horizon) if chunk.due_ns(k) > now_ns))
    velocity_HJ = ahead.velocity_HJ.copy()
    velocity_HJ[-1] = 0.0
    points = [
        TrajectoryPoint(ahead.due_ns(k) - now_ns, position_J.tolist(), velocity_J.tolist())
        for k, (position_J, velocity_J) in enumerate(zip(ahead.position_HJ, velocity_HJ, strict=True))
    ]
    return Trajectory(0, ahead.joints, points)


def evaluate(policy: Policy, scenes: Sequence[Scene], delay_s: float) -> dict[str, float]:
    """Rates over these scenes: `follow_rate` (the instructed object was the first one reached) and `success_rate`."""
    loop = ClosedLoop(policy, delay_s)
    outcomes = [loop.run(scene) for scene in scenes]
    return {
        "episodes": len(scenes),
        "follow_rate": float(np.mean([o[0] == s.target for o, s in zip(outcomes, scenes, strict=True)])),
        "success_rate": float(np.mean([success for _, success, _ in outcomes])),
        "chance_follow_rate": float(np.mean([1 / len(scene.objects) for scene in scenes])),
        "mean_seconds": float(np.mean([seconds for *_, seconds in outcomes])),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--split", choices=("held_out", "train", "all"), default="held_out")
    parser.add_argument("--first-scene", type=int, default=FIRST_SCENE)
    parser.add_argument(
        "--delay-s", type=float, default=0.03, help="from observation to the chunk's arrival at the arm"
    )
    parser.add_argument("--flow-steps", type=int, help="default: what the bundle says")
    parser.add_argument("--noise-seed", type=int, default=0)
    options = parser.parse_args(arguments)
    bundle = load_bundle(options.bundle)
    policy = Policy(bundle, OnnxEngine(bundle), options.flow_steps, options.noise_seed)
    first = options.first_scene
    scenes = [sample_scene(seed, split=options.split) for seed in range(first, first + options.episodes)]
    settings = {"bundle": bundle.manifest.name, **{k: v for k, v in vars(options).items() if k != "bundle"}}
    print(json.dumps(settings | evaluate(policy, scenes, options.delay_s), indent=1))


if __name__ == "__main__":
    main()
