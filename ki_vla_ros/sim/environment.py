"""The simulated arm as an environment: one action of its robot file per period, without ROS.

It is what training/evaluate/environment.py asks for. The arm's controller goes to an action in a straight line. How the
robot's own loop drives it, with its delays, is training/evaluate/closed_loop.py.

Legend: S state, D actions; both are the joints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ki_vla_ros.errors import ConfigurationError
from ki_vla_ros.robot import find_robot, read_robot
from ki_vla_ros.sim.demonstrator import Demonstration, Demonstrator
from ki_vla_ros.sim.task import Split, sample_scene
from ki_vla_ros.sim.world import HOME_J, TIME_LIMIT_S, TIMESTEP_S, World

Array = NDArray[np.float64]
ROBOT: Final = "demo_arm"


class ArmEnvironment:
    """`split`: which combinations of colour and shape are commanded; images are square, `image_size` pixels wide."""

    def __init__(self, split: Split = "all", image_size: int = 288, cameras: Sequence[str] | None = None) -> None:
        self.robot = read_robot(find_robot(ROBOT))
        self._cameras = self.robot.camera_names if cameras is None else tuple(cameras)
        if unknown := [name for name in self._cameras if name not in self.robot.camera_names]:
            known = ", ".join(self.robot.camera_names)
            raise ConfigurationError(f"arm: cameras: expected some of {known}, got {unknown[0]!r}")
        self.instruction = ""
        self.time_limit_s = TIME_LIMIT_S
        self._split: Split = split
        self._world = World(image_size, render=bool(self._cameras))
        self._demonstrator = Demonstrator(self._world)
        self._command_J = HOME_J
        self._plan: Demonstration | None = None
        self._planned_s = 0.0

    def close(self) -> None:
        self._world.close()

    def reset(self, seed: int) -> None:
        scene = sample_scene(seed, split=self._split)
        self._world.reset(scene)
        self.instruction = scene.task.instruction
        self._command_J, self._plan = HOME_J, None

    def observe(self) -> tuple[Mapping[str, NDArray[np.uint8]], Array]:
        return {name: self._world.render(name) for name in self._cameras}, self._world.joint_position_J

    def step(self, action_D: Array) -> None:
        count = round(self.robot.action_period_s / TIMESTEP_S)
        for command_J in np.linspace(self._command_J, action_D, count + 1)[1:]:
            self._world.step(command_J)
        self._command_J = np.asarray(action_D, dtype=np.float64)

    @property
    def success(self) -> bool:
        return self._world.judge.success

    @property
    def followed(self) -> bool:
        world = self._world
        return world.judge.reached == world.scene.target

    @property
    def over(self) -> bool:
        return self._world.judge.done

    def place(self, camera: str) -> tuple[float, float] | None:
        """Where a camera's image shows the object of the task, in 0..1, to the right and down."""
        world = self._world
        u, v = world.project(camera, world.object_positions[world.scene.target])
        return u / world.render_size, v / world.render_size

    def demonstrate(self) -> Array:
        """Planned on the first call of an episode, from where arm and objects are then; a disturbed arm comes back."""
        if self._plan is None:
            world = self._world
            self._plan = self._demonstrator.plan(world.joint_position_J, None, world.scene, world.object_positions)
            self._planned_s = world.time_s
        return self._plan.position(self._world.time_s - self._planned_s + self.robot.action_period_s)
