"""The simulated arm as a ROS node: cameras and joint states out, joint trajectories in, in real time."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Final

from rcl_interfaces.msg import ParameterDescriptor

from ki_vla_ros.sim.simulation import Part, Simulation, run_simulation
from ki_vla_ros.sim.task import Scene, Task, sample_scene
from ki_vla_ros.sim.world import CAMERAS, HOME_J, JOINTS, World

NODE_NAME: Final = "sim_arm"


class ArmNode(Simulation):
    """The demo arm: one controller, one topic of joint states."""

    def __init__(self) -> None:
        part = Part(JOINTS, joint_states="joint_states", command="arm_controller/joint_trajectory")
        super().__init__(NODE_NAME, "simulated arm", CAMERAS, [part], JOINTS, HOME_J)

    def declare_scene(self) -> None:
        self.declare_seed()
        combinations = "combinations to choose from (train, held_out, all); used at the next reset"
        self.declare_parameter("split", "all", ParameterDescriptor(description=combinations))
        task = "instruction to build the scene for, drawn if empty; used at the next reset"
        self.declare_parameter("task", "", ParameterDescriptor(description=task))
        self.declare_whole("image_size", 288, "side of the images in pixels", 32, 640)

    def check_parameter(self, name: str, value: Any) -> None:
        if name == "split":
            sample_scene(0, split=value)
        elif name == "task" and value:
            Task.parse(value)

    def wanted_scene(self) -> tuple[Scene, dict[str, Any]]:
        seed, split, task = (self.get_parameter(name).value for name in ("scene_seed", "split", "task"))
        scene = sample_scene(seed, split=split, task=Task.parse(task) if task else None)
        objects = [
            {"colour": o.colour, "shape": o.shape, "x": round(o.x, 4), "y": round(o.y, 4)} for o in scene.objects
        ]
        return scene, {
            "scene_seed": scene.seed,
            "split": split,
            "instruction": scene.task.instruction,
            "objects": objects,
            "target": scene.target,
        }

    def make_world(self) -> World:
        return World(render_size=self.get_parameter("image_size").value)


def main(arguments: Sequence[str] | None = None) -> int:
    """The executable `sim_arm`: exit codes as `run_simulation` says."""
    description = "The simulated arm: cameras and joint states out, joint trajectories in, in real time."
    return run_simulation(ArmNode, NODE_NAME, description, arguments)


if __name__ == "__main__":
    sys.exit(main())
