"""Bags to LeRobot datasets, and back."""

from training.convert.episodes import Frame
from training.convert.playback import PAUSE_NS, START_NS
from training.convert.statistics import PixelCounts
from training.convert.writer import DatasetWriter, Tables

__all__ = [
    "PAUSE_NS",
    "START_NS",
    "DatasetWriter",
    "Frame",
    "PixelCounts",
    "Tables",
]
