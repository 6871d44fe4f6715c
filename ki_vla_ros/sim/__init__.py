"""The simulated arm: its world, its tasks and the demonstrator that solves them."""

from ki_vla_ros.sim.demonstrator import Demonstration, Demonstrator, joints_to_tip, tip_to_joints
from ki_vla_ros.sim.environment import ArmEnvironment
from ki_vla_ros.sim.rendering import Cameras
from ki_vla_ros.sim.task import COLOURS, SHAPES, VERBS, Scene, Split, Task, sample_scene
from ki_vla_ros.sim.world import HOME_J, JOINTS, TIME_LIMIT_S, TIMESTEP_S, World

__all__ = [
    "COLOURS",
    "HOME_J",
    "JOINTS",
    "SHAPES",
    "TIMESTEP_S",
    "TIME_LIMIT_S",
    "VERBS",
    "ArmEnvironment",
    "Cameras",
    "Demonstration",
    "Demonstrator",
    "Scene",
    "Split",
    "Task",
    "World",
    "joints_to_tip",
    "sample_scene",
    "tip_to_joints",
]
