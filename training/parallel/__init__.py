"""Several processes: averaged gradients, and FSDP2."""

from training.parallel.group import average_gradients, choose_device, join_group, wait_for_all
from training.parallel.sharding import checkpoint_activations, free_gathered, gather, layers, like, load_whole, shard

__all__ = [
    "average_gradients",
    "checkpoint_activations",
    "choose_device",
    "free_gathered",
    "gather",
    "join_group",
    "layers",
    "like",
    "load_whole",
    "shard",
    "wait_for_all",
]
