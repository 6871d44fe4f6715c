"""Weights on disk: our checkpoints, and files that others publish."""

from training.weights.checkpoints import (
    CONFIG,
    POLICY,
    RESUME,
    WEIGHTS,
    assemble,
    empty_model,
    load_checkpoint,
    load_resume,
    newest_checkpoint,
    read_config,
    read_policy,
    read_sizes,
    read_weights,
    save_checkpoint,
    save_run,
    shapes,
)
from training.weights.files import find_weights
from training.weights.foreign import Kind, import_weights, their_name
from training.weights.lora import ADAPTER
from training.weights.published import check_published, sizes_beside
from training.weights.start import Start, open_start
from training.weights.statistics import FIELDS, Method, read_ranges, to_robot

__all__ = [
    "ADAPTER",
    "CONFIG",
    "FIELDS",
    "POLICY",
    "RESUME",
    "WEIGHTS",
    "Kind",
    "Method",
    "Start",
    "assemble",
    "check_published",
    "empty_model",
    "find_weights",
    "import_weights",
    "load_checkpoint",
    "load_resume",
    "newest_checkpoint",
    "open_start",
    "read_config",
    "read_policy",
    "read_ranges",
    "read_sizes",
    "read_weights",
    "save_checkpoint",
    "save_run",
    "shapes",
    "sizes_beside",
    "their_name",
    "to_robot",
]
