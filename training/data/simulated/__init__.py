"""The demo's data: episodes of the simulated arm, and questions about its scenes."""

from training.data.simulated.sources import SceneQuestions, SceneViews, describe_tasks

__all__ = [
    "SceneQuestions",
    "SceneViews",
    "describe_tasks",
]
