"""ALOHA in simulation: two arms that hand over a cube or insert a peg, on the model of the package gym-aloha."""

from ki_vla_ros.sim.aloha.demonstrator import PERIOD_S, Demonstration, Demonstrator, Planner
from ki_vla_ros.sim.aloha.insertion import INSERTION, Inserter, InsertionScene, InsertionWorld, sample_insertion
from ki_vla_ros.sim.aloha.world import (
    CAMERAS,
    HIGHEST_REWARD,
    HOME_J,
    INSTRUCTION,
    JOINTS,
    TIME_LIMIT_S,
    AlohaWorld,
    Scene,
    TwoArms,
    find_model,
    sample_scene,
)

__all__ = [
    "CAMERAS",
    "HIGHEST_REWARD",
    "HOME_J",
    "INSERTION",
    "INSTRUCTION",
    "JOINTS",
    "PERIOD_S",
    "TIME_LIMIT_S",
    "AlohaWorld",
    "Demonstration",
    "Demonstrator",
    "Inserter",
    "InsertionScene",
    "InsertionWorld",
    "Planner",
    "Scene",
    "TwoArms",
    "find_model",
    "sample_insertion",
    "sample_scene",
]
