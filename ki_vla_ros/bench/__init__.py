"""Measures on this machine: the node, the two graphs, or two set-ups in turns."""

from ki_vla_ros.bench.model import EngineSetUp, least_ms, time_parts
from ki_vla_ros.bench.roofline import Work, measure_ceiling
from ki_vla_ros.bench.timing import Durations, choose_clock, every_tenth, time_alternating

__all__ = [
    "Durations",
    "EngineSetUp",
    "Work",
    "choose_clock",
    "every_tenth",
    "least_ms",
    "measure_ceiling",
    "time_alternating",
    "time_parts",
]
