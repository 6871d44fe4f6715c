"""The demo's data: episodes of the simulated arm, and questions about its scenes."""

from training.data.simulated.generate import check_robot, load_arrays, make_data
from training.data.simulated.sources import SceneQuestions, SceneViews, describe_tasks

__all__ = [
    "SceneQuestions",
    "SceneViews",
    "check_robot",
    "describe_tasks",
    "load_arrays",
    "make_data",
]
