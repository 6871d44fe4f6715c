"""From a checkpoint to a bundle."""

from training.export.graphs import arrange, cast_weights, describe_graphs, modulations
from training.export.parity import Prefix, as_batch, cosine

__all__ = [
    "Prefix",
    "arrange",
    "as_batch",
    "cast_weights",
    "cosine",
    "describe_graphs",
    "modulations",
]
