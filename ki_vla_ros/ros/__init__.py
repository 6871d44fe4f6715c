"""Everything that uses rclpy: the node and its topics, parameters, the recorder, processes.

Names are loaded on first use, because some files (`ros.children`) also run without ROS.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ki_vla_ros.ros.node import PolicyNode
    from ki_vla_ros.ros.outputs import COMMAND_KINDS
    from ki_vla_ros.ros.process import run_node
    from ki_vla_ros.ros.releases import make_executor
    from ki_vla_ros.ros.topics import endpoint_name, ns_to_stamp, publishers

__all__ = ["COMMAND_KINDS", "PolicyNode", "endpoint_name", "make_executor", "ns_to_stamp", "publishers", "run_node"]

_HOMES = {
    "COMMAND_KINDS": "outputs",
    "PolicyNode": "node",
    "endpoint_name": "topics",
    "make_executor": "releases",
    "ns_to_stamp": "topics",
    "publishers": "topics",
    "run_node": "process",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ki_vla_ros.ros' has no attribute {name!r}")
    return getattr(import_module(f"ki_vla_ros.ros.{_HOMES[name]}"), name)
