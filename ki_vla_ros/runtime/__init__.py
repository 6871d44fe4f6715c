"""One tick of the policy, without ROS: observation, chunking, governor, safety, loop; and the arm's paths."""

from ki_vla_ros.runtime.chunking import cubic
from ki_vla_ros.runtime.diagnostics import Diagnostics, Level, Report
from ki_vla_ros.runtime.loop import WATCHDOG_NS, PolicyLoop
from ki_vla_ros.runtime.observation import (
    BURST_WAIT_NS,
    CameraSource,
    Latest,
    ObservationBuffer,
    camera_sources,
    input_signals,
    own_limit_ns,
)
from ki_vla_ros.runtime.pacing import Pacer, alignment_ns
from ki_vla_ros.runtime.readings import Reading, Readings
from ki_vla_ros.runtime.safety import axis_bounds
from ki_vla_ros.runtime.shadow import ShadowComparison
from ki_vla_ros.runtime.thread import LoopThread

__all__ = [
    "BURST_WAIT_NS",
    "WATCHDOG_NS",
    "CameraSource",
    "Diagnostics",
    "Latest",
    "Level",
    "LoopThread",
    "ObservationBuffer",
    "Pacer",
    "PolicyLoop",
    "Reading",
    "Readings",
    "Report",
    "ShadowComparison",
    "alignment_ns",
    "axis_bounds",
    "camera_sources",
    "cubic",
    "input_signals",
    "own_limit_ns",
]
