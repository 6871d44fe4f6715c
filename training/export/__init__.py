"""From a checkpoint to a bundle."""

from training.export.bundle import check_policy, export_bundle
from training.export.graphs import arrange, cast_weights, describe_graphs, modulations
from training.export.parity import PrefixTensors, as_batch, cosine

__all__ = [
    "PrefixTensors",
    "arrange",
    "as_batch",
    "cast_weights",
    "check_policy",
    "cosine",
    "describe_graphs",
    "export_bundle",
    "modulations",
]
