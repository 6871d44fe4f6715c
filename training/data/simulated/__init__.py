"""The demo's data: episodes of the simulated arm, and questions about its scenes."""

from training.data.simulated.generate import check_robot, load_arrays, make_data

__all__ = [
    "check_robot",
    "load_arrays",
    "make_data",
]
