"""Where batches come from: `Source.draw(count, rng) -> Batch`."""

from training.data.batch import NO_TARGET, Arrays, Batch, BatchMaker, ChunkTiming
from training.data.frames import RobotFrames
from training.data.loader import Loader
from training.data.source import Source

__all__ = [
    "NO_TARGET",
    "Arrays",
    "Batch",
    "BatchMaker",
    "ChunkTiming",
    "Loader",
    "RobotFrames",
    "Source",
]
