"""Evaluates a policy on a recorded bag: runs the loop over it, computes figures and writes a report."""

from ki_vla_ros.replay.latency import parse_latency
from ki_vla_ros.replay.loop import Replay
from ki_vla_ros.replay.run import replay
from ki_vla_ros.replay.setup import ReplayOptions, set_up

__all__ = [
    "Replay",
    "ReplayOptions",
    "parse_latency",
    "replay",
    "set_up",
]
