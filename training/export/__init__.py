"""From a checkpoint to a bundle."""

from training.export.graphs import arrange, cast_weights, describe_graphs, modulations
from training.export.parity import Prefix, as_batch, cosine
from training.export.random_weights import PROMPT_LENGTH, SIZES, draw_weights, policy_spec

__all__ = [
    "PROMPT_LENGTH",
    "SIZES",
    "Prefix",
    "arrange",
    "as_batch",
    "cast_weights",
    "cosine",
    "describe_graphs",
    "draw_weights",
    "modulations",
    "policy_spec",
]
