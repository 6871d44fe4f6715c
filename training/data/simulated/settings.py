"""How much simulated data is made, and where."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from ki_vla_ros.robot import Frozen

Positive = Annotated[int, Field(gt=0)]


class DataConfig(Frozen):
    """Simulated data, at the model's image size; `folder` is reused if it was made from the same settings."""

    folder: Path
    seed: int = 0
    robot_episodes: Positive
    frames_per_episode: Positive
    scenes: Positive = Field(description="vision-language frames: random scenes and arm poses, all 24 objects")
    validation_episodes: Positive = Field(description="episodes on held-out combinations, for gates and figures")
    workers: Positive = 1
