"""Where the loop's line ends: ROS topics (ros/publishers.py), a replay (replay/wire.py), or a simulation (training)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from ki_vla_ros.records import ActionChunk, Motion


class Wire(Protocol):
    """Where commands and reports go, and the node's clock."""

    def now_ns(self) -> int:
        """0 while there is no time yet (simulated time before the first message on /clock)."""
        ...

    def simulated_clock(self) -> bool: ...

    def send_command(self, motion: Motion, now_ns: int) -> None: ...

    def report_chunk(self, chunk: ActionChunk) -> None:
        """The whole chunk as predicted, before anything is dropped or corrected."""
        ...

    def report_tick(self, fields: Mapping[str, object]) -> None: ...

    def log(self, message: str, cause: str) -> None:
        """A warning; repetitions with the same cause may be thinned out."""
        ...
