"""ALOHA in simulation: two arms that hand over a cube, on the model of the package gym-aloha."""

from ki_vla_ros.sim.aloha.demonstrator import PERIOD_S, Demonstration, Demonstrator
from ki_vla_ros.sim.aloha.world import (
    CAMERAS,
    HOME_J,
    INSTRUCTION,
    JOINTS,
    TIME_LIMIT_S,
    AlohaWorld,
    Scene,
    find_model,
    sample_scene,
)

__all__ = [
    "CAMERAS",
    "HOME_J",
    "INSTRUCTION",
    "JOINTS",
    "PERIOD_S",
    "TIME_LIMIT_S",
    "AlohaWorld",
    "Demonstration",
    "Demonstrator",
    "Scene",
    "find_model",
    "sample_scene",
]
