"""Weights on disk: our checkpoints, and files that others publish."""

from training.weights.checkpoints import (
    CONFIG,
    POLICY,
    WEIGHTS,
    assemble,
    empty_model,
    load_checkpoint,
    read_config,
    read_policy,
    read_sizes,
    save_checkpoint,
    shapes,
)
from training.weights.files import find_weights
from training.weights.foreign import Kind, import_weights, their_name
from training.weights.lora import ADAPTER
from training.weights.pieces import PieceReader
from training.weights.published import check_published, sizes_beside
from training.weights.runs import RunState, check_same, newest_checkpoint, open_run, save_run
from training.weights.start import Start, adopt, check_statistics, open_start, start_tokenizer
from training.weights.statistics import FIELDS, Method, read_ranges, to_robot

__all__ = [
    "ADAPTER",
    "CONFIG",
    "FIELDS",
    "POLICY",
    "WEIGHTS",
    "Kind",
    "Method",
    "PieceReader",
    "RunState",
    "Start",
    "adopt",
    "assemble",
    "check_published",
    "check_same",
    "check_statistics",
    "empty_model",
    "find_weights",
    "import_weights",
    "load_checkpoint",
    "newest_checkpoint",
    "open_run",
    "open_start",
    "read_config",
    "read_policy",
    "read_ranges",
    "read_sizes",
    "save_checkpoint",
    "save_run",
    "shapes",
    "sizes_beside",
    "start_tokenizer",
    "their_name",
    "to_robot",
]
