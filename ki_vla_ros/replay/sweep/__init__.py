"""Tries many settings over one bag and recommends the best."""

from ki_vla_ros.replay.sweep.advice import Advice, sweep_section
from ki_vla_ros.replay.sweep.grid import make_grid
from ki_vla_ros.replay.sweep.run import RECOMMENDED, sweep, write_sweep

__all__ = [
    "RECOMMENDED",
    "Advice",
    "make_grid",
    "sweep",
    "sweep_section",
    "write_sweep",
]
