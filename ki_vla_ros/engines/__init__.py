"""What runs the two graphs of a bundle: one contract (base.py), one file per library."""

from ki_vla_ros.engines.base import Engine, KVCache
from ki_vla_ros.engines.choice import check_engine, open_engine
from ki_vla_ros.engines.cuda import CudaDevice

__all__ = [
    "CudaDevice",
    "Engine",
    "KVCache",
    "check_engine",
    "open_engine",
]
