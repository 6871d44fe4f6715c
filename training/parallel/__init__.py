"""Several processes: averaged gradients, and FSDP2."""

from training.parallel.group import (
    average_gradients,
    choose_device,
    from_first,
    in_any_process,
    join_group,
    mean_of_processes,
    wait_for_all,
)
from training.parallel.sharding import checkpoint_activations, free_gathered, gather, layers, shard

__all__ = [
    "average_gradients",
    "checkpoint_activations",
    "choose_device",
    "free_gathered",
    "from_first",
    "gather",
    "in_any_process",
    "join_group",
    "layers",
    "mean_of_processes",
    "shard",
    "wait_for_all",
]
