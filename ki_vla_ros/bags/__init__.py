"""Recordings: reads rosbag2 bags, whole or damaged, finds the session in them, and writes mcap."""

from ki_vla_ros.bags.bag import Bag, open_bag
from ki_vla_ros.bags.session import find_session

__all__ = [
    "Bag",
    "find_session",
    "open_bag",
]
