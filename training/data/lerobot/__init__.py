"""LeRobot datasets: v2.0, v2.1 and v3.0 read, v3.0 made from bags (docs/data.md)."""

from training.data.lerobot.dataset import Dataset
from training.data.lerobot.frames import LeRobotSamples
from training.data.lerobot.layout import (
    ACTION,
    EPISODES,
    IMAGE,
    IMAGES,
    INFO,
    MIB,
    PLACE,
    REPORTS,
    SOURCE,
    STAMP,
    STATE,
    STATS,
    TASKS,
    VERSION,
    Feature,
    Info,
    arrow_schema,
    make_features,
    next_file,
    tasks_table,
    write_json,
)
from training.data.lerobot.meta import Episode
from training.data.lerobot.robot_columns import RobotColumns, read_robot_columns
from training.data.lerobot.video import Video, VideoWriter

__all__ = [
    "ACTION",
    "EPISODES",
    "IMAGE",
    "IMAGES",
    "INFO",
    "MIB",
    "PLACE",
    "REPORTS",
    "SOURCE",
    "STAMP",
    "STATE",
    "STATS",
    "TASKS",
    "VERSION",
    "Dataset",
    "Episode",
    "Feature",
    "Info",
    "LeRobotSamples",
    "RobotColumns",
    "Video",
    "VideoWriter",
    "arrow_schema",
    "make_features",
    "next_file",
    "read_robot_columns",
    "tasks_table",
    "write_json",
]
