"""The simulated ALOHA as a ROS node: four controllers, joint states in parts, three cameras, in real time.

Each arm and each gripper has a controller of its own, and publishes its state as a message of its own, as the arms'
drivers and grippers of a real one do: those of one side share a topic.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Final

from ki_vla_ros.sim.aloha.world import (
    ARM_JOINTS,
    CAMERAS,
    HOME_J,
    INSTRUCTION,
    JOINTS,
    LARGEST_SEED,
    SIDES,
    AlohaWorld,
    Scene,
    sample_scene,
)
from ki_vla_ros.sim.simulation import Part, Simulation, run_simulation

NODE_NAME: Final = "sim_aloha"
PARTS: Final = tuple(
    Part(
        tuple(f"{side}_{joint}" for joint in joints),
        joint_states=f"follower_{side}/joint_states",
        command=f"follower_{side}/{controller}/joint_trajectory",
    )
    for side in SIDES
    for controller, joints in (("arm_controller", ARM_JOINTS), ("gripper_controller", ("gripper",)))
)


class AlohaNode(Simulation):
    """Two arms and two grippers that may hand over a cube."""

    def __init__(self) -> None:
        super().__init__(NODE_NAME, "simulated ALOHA", CAMERAS, PARTS, JOINTS, HOME_J)

    def declare_scene(self) -> None:
        self.declare_seed(LARGEST_SEED)
        self.declare_whole("image_width", 320, "width of the images in pixels", 32, 1280)
        self.declare_whole("image_height", 240, "height of the images in pixels", 32, 960)

    def wanted_scene(self) -> tuple[Scene, dict[str, Any]]:
        scene = sample_scene(self.get_parameter("scene_seed").value)
        cube = {"colour": "red", "shape": "cube", "x": scene.x, "y": scene.y}
        return scene, {"scene_seed": scene.seed, "instruction": INSTRUCTION, "objects": [cube]}

    def make_world(self) -> AlohaWorld:
        return AlohaWorld(self.get_parameter("image_width").value, self.get_parameter("image_height").value)


def main(arguments: Sequence[str] | None = None) -> int:
    """The executable `sim_aloha`: exit codes as `run_simulation` says."""
    description = "The simulated ALOHA: cameras and joint states out, joint trajectories for four controllers in."
    return run_simulation(AlohaNode, NODE_NAME, description, arguments)


if __name__ == "__main__":
    sys.exit(main())
